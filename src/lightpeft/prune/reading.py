"""How deep a task has to be read: what a linear classifier makes of each block's output, before anything is trained.

What the upper blocks of a decoder are there for is the next word; a label is often to be read below them. Each block's
output at the place that a head reads goes into ridge regression on the labels, and every row is judged by the
classifier of all others, which has a closed form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft.compat.transformers import class_names
from lightpeft.errors import require
from lightpeft.machine import autocasting
from lightpeft.models.families.decoders import DECODERS
from lightpeft.models.families.registry import block_lists
from lightpeft.models.patching import in_mode
from lightpeft.models.unwrap import transformers_model
from lightpeft.profiling.live import Batch, device_of, moved
from lightpeft.prune.learning import classes_of, one_of_several

RIDGES = (1e1, 1e2, 1e3, 1e4, 1e5)
"""Strengths of the penalty that are tried on standardised states; each block has its best."""
ROWS = 512
"""Training rows that are looked at."""
ONLY_THESE = "only decoders that classify are known to bear it"
"""Why nothing is left out of other models."""


@dataclass(frozen=True)
class FoundDepth:
    """What the lowest blocks, one after another, say of the labels."""

    accuracy: list[float]
    """Of the classifier on each block's output."""
    error: list[float]
    """Its mean squared error."""
    enough: int
    """Blocks from which on nothing is to be gained: the least of which the error is within a standard error of the best
    one's, row by row."""
    rows: int
    """Rows that were looked at."""

    @property
    def depth(self) -> float:
        """Part of the blocks above these, as `light.remove.depth` has it."""
        return 1 - self.enough / len(self.error)

    def within(self, blocks: float | str | None) -> float:
        """The same, or as much of it as takes no more than a budget's `blocks`, where that is a number."""
        count = len(self.error)
        return self.depth if blocks is None or isinstance(blocks, str) else min(self.depth, int(blocks * count) / count)

    def summary(self) -> str:
        """What was found, in one line."""
        right = f"{self.accuracy[self.enough - 1]:.1%} of {self.rows} rows are classified right"
        return f"from block {self.enough} of {len(self.error)} on there is nothing to be gained ({right} by its output)"

    def facts(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**asdict(self), "depth": self.depth}


def is_classifying_decoder(model: nn.Module) -> bool:
    """Whether it is known what the upper blocks of a model do for its task: of a decoder that classifies."""
    inner = transformers_model(model)
    classifiers = class_names("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "A depth that is measured").values()
    named = isinstance(inner, PreTrainedModel) and type(inner).__name__ in classifiers
    return named and _is_decoder(inner) and classes_of(inner) > 0


def _is_decoder(model: PreTrainedModel) -> bool:
    return model.config.model_type in {family.model_type for family in DECODERS}


def find_depth(model: nn.Module, batches: Iterable[Batch], autocast: torch.dtype | None = None) -> FoundDepth:
    """How many of a model's blocks a task has to be read through; nothing is trained.

    Of decoders that classify, the others may be left out (`light.remove.depth`). An encoder's blocks are read otherwise
    by the same measure: leaving out what it calls superfluous cost MiniLM accuracy (docs/explanation/results.md).

    Args:
        model: the untouched one, with one stack of blocks and whatever head.
        batches: of training rows, `ROWS` or so, with the number of a class for each row as `labels` [rows]; without an
            `attention_mask`, all tokens are real.
        autocast: type that matrix products are computed in; None: that of the weights.

    Raises:
        LightPeftError: the labels are no classes, or all alike.
    """
    states, labels = states_by_block(model, batches, autocast)
    found = [read_out(of_block, labels) for of_block in states]
    return FoundDepth(
        accuracy=[of_block.accuracy for of_block in found],
        error=[float(of_block.errors.mean()) for of_block in found],
        enough=enough([of_block.errors for of_block in found]),
        rows=len(labels),
    )


@torch.no_grad()
def states_by_block(
    model: nn.Module, batches: Iterable[Batch], autocast: torch.dtype | None = None
) -> tuple[list[Tensor], Tensor]:
    """What a head would read after each block, [rows, width] each, and the labels, [rows]; arguments as `find_depth`.

    Raises:
        LightPeftError: as `find_depth`.
    """
    inner = transformers_model(model)
    first = not _is_decoder(inner)
    blocks = block_lists(inner)[0]
    seen: list[list[Tensor]] = [[] for _ in blocks]
    labels: list[Tensor] = []
    with in_mode(model, training=False), autocasting(device_of(model), autocast):
        for batch in batches:
            real = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
            places = place_of_head(real, first)
            labels.append(batch["labels"])
            handles = [block.register_forward_hook(_keep(at, places)) for block, at in zip(blocks, seen, strict=True)]
            given = {name: values for name, values in batch.items() if name != "labels"}
            try:
                model(**moved(given, device_of(model)))
            finally:
                for handle in handles:
                    handle.remove()
    classes = all(map(one_of_several, labels))
    require(classes, "depth is read off the number of a class for each row, and these labels are no such")
    together = torch.cat(labels).cpu()
    alike = f"all {len(together)} rows have one label, which can be read anywhere; give light.remove.depth as a number"
    require(len(together.unique()) > 1, alike)
    return [torch.cat(parts) for parts in seen], together


def place_of_head(mask: Tensor, first: bool) -> Tensor:
    """The first or the last real token of every row: [rows]."""
    order = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), order, mask.shape[1]).amin(1) if first else (mask * order).amax(1)


def _keep(seen: list[Tensor], places: Tensor) -> Any:
    """Forward hook that keeps a block's output at one place a row; all of every block's would not fit into memory."""

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        rows = torch.arange(len(places), device=states.device)
        seen.append(states[rows, places.to(states.device)].float().cpu())

    return hook


@dataclass(frozen=True)
class ReadOut:
    """What one block's output says of the labels."""

    accuracy: float
    errors: Tensor
    """Squared error of each row, [rows], by the classifier of all others."""


def read_out(states: Tensor, labels: Tensor) -> ReadOut:
    """Accuracy and squared errors of rows by classifiers that have not seen them.

    With K = X X^T of the standardised states, the fit is H Y, H = K (K + lambda I)^-1 + 1/n (a free intercept), and the
    error of row i without itself in the data is (Y - H Y)_i / (1 - H_ii).

    Args:
        states: [rows, width].
        labels: [rows], class numbers.
    """
    scaled = (states.double() - states.double().mean(0)) / states.double().std(0).clamp_min(1e-6)
    targets = nn.functional.one_hot(labels).double()
    products, identity = scaled @ scaled.T, torch.eye(len(scaled), dtype=torch.float64)

    def by(ridge: float) -> ReadOut:
        fit = torch.linalg.solve(products + ridge * identity, products) + 1 / len(scaled)
        left = (targets - fit @ targets) / (1 - fit.diagonal()).unsqueeze(1)
        right = (targets - left).argmax(1) == labels
        return ReadOut(float(right.double().mean()), left.square().sum(1))

    return min(map(by, RIDGES), key=lambda found: float(found.errors.mean()))


def enough(errors: Sequence[Tensor]) -> int:
    """The least number of blocks whose squared error is within a standard error of the best one's, row by row."""
    best = min(range(len(errors)), key=lambda block: float(errors[block].mean()))
    for block, of_block in enumerate(errors[:best]):
        more = of_block - errors[best]
        if float(more.mean()) <= float(more.std()) / len(more) ** 0.5:
            return block + 1
    return best + 1
