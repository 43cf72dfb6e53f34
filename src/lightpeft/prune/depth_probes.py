"""Depth that a task needs: linear probes on each block's output, before any training.

The upper blocks of a decoder serve next-token prediction; labels can often be predicted from lower blocks. Each block's
output at the position that the head reads goes into ridge regression on the labels, with leave-one-out errors, which
have a closed form.
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
from lightpeft.models.families.family_table import block_lists
from lightpeft.models.patching import in_mode
from lightpeft.models.task_heads import is_decoder
from lightpeft.models.unwrap import transformers_model
from lightpeft.profiling.live import Batch, device_of, move_batch
from lightpeft.prune.learning import classes_of, one_of_several

RIDGES = (1e1, 1e2, 1e3, 1e4, 1e5)
"""Ridge penalties that are tried on standardized states; each block uses its best one."""
PROBE_ROWS = 512
"""Number of training rows for the probes."""
DECODERS_ONLY = "only decoders that classify are measured"
"""Reason why no blocks of other models are dropped."""


@dataclass(frozen=True)
class FoundDepth:
    """Results of linear probes on the output of each block, from the lowest block on.

    Example:
        found = find_depth(model, batches)
        print(found.summary(), found.depth)
    """

    accuracy: list[float]
    """Leave-one-out accuracy of the linear probe on each block's output."""
    error: list[float]
    """Mean leave-one-out squared error of the linear probe on each block's output."""
    enough: int
    """Number of blocks that the task needs: the fewest with an error within one standard error of the best, paired by
    row."""
    rows: int
    """Number of rows."""

    @property
    def depth(self) -> float:
        """Fraction of the blocks that the task does not need, for `light.remove.depth`."""
        return 1 - self.enough / len(self.error)

    def within(self, blocks: float | str | None) -> float:
        """Return `depth`, limited to whole blocks within `light.remove.blocks` if that is a number.

        Args:
            blocks: the setting.
        """
        count = len(self.error)
        return self.depth if blocks is None or isinstance(blocks, str) else min(self.depth, int(blocks * count) / count)

    def summary(self) -> str:
        """Return the result as one line."""
        probe = f"accuracy of a linear probe there: {self.accuracy[self.enough - 1]:.1%} of {self.rows} rows"
        return f"the task needs {self.enough} of {len(self.error)} blocks ({probe})"

    def facts(self) -> dict[str, Any]:
        """Return the fields and `depth` as plain data."""
        return {**asdict(self), "depth": self.depth}


def is_classifying_decoder(model: nn.Module) -> bool:
    """Return whether a model is a decoder with a classification head, for which depth can be measured."""
    inner = transformers_model(model)
    classifiers = class_names("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "A depth that is measured")
    named = isinstance(inner, PreTrainedModel) and type(inner).__name__ in classifiers
    return named and is_decoder(inner.config) and classes_of(inner) > 0


def find_depth(model: nn.Module, batches: Iterable[Batch], autocast: torch.dtype | None = None) -> FoundDepth:
    """Measure the number of blocks that a classification task needs, by linear probes; nothing is trained.

    Decoders that classify can drop the other blocks (`light.remove.depth`). For encoders the measure misleads: dropping
    the blocks that it calls superfluous cost MiniLM accuracy (docs/explanation/results.md).

    Example:
        found = find_depth(model, batches)
        light = LightConfig(remove={"blocks": "auto", "depth": found.depth})

    Args:
        model: the unpruned model, with one stack of blocks and any head.
        batches: batches of about `PROBE_ROWS` training rows, with class numbers as `labels` [rows]; without an
            `attention_mask`, all tokens are real.
        autocast: half precision of the forward pass; None: no autocast.

    Returns:
        The accuracy at each block, and the number of blocks that the task needs.

    Raises:
        LightPeftError: the labels are not class numbers, or all are equal.
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
    """Compute the state that a head would read after each block, [rows, width] each, and the labels, [rows].

    Args:
        model: the unpruned model, with one stack of blocks and any head.
        batches: batches of training rows, with class numbers as `labels` [rows].
        autocast: half precision of the forward pass; None: no autocast.

    Raises:
        LightPeftError: the labels are not class numbers, or all are equal.
    """
    inner = transformers_model(model)
    first = not is_decoder(inner.config)
    blocks = block_lists(inner)[0]
    seen: list[list[Tensor]] = [[] for _ in blocks]
    labels: list[Tensor] = []
    with in_mode(model, training=False), autocasting(device_of(model), autocast):
        for batch in batches:
            real = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
            places = place_of_head(real, first)
            labels.append(batch["labels"])
            handles = [
                block.register_forward_hook(_record_states(at, places)) for block, at in zip(blocks, seen, strict=True)
            ]
            given = {name: values for name, values in batch.items() if name != "labels"}
            try:
                model(**move_batch(given, device_of(model)))
            finally:
                for handle in handles:
                    handle.remove()
    classes = all(map(one_of_several, labels))
    require(classes, "find_depth needs one class number for each row as labels; give light.remove.depth as a number")
    together = torch.cat(labels).cpu()
    alike = f"all {len(together)} rows have the same label; give light.remove.depth as a number, or other rows"
    require(len(together.unique()) > 1, alike)
    return [torch.cat(parts) for parts in seen], together


def place_of_head(mask: Tensor, first: bool) -> Tensor:
    """Return the position of the first or the last real token of every row: [rows]."""
    order = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), order, mask.shape[1]).amin(1) if first else (mask * order).amax(1)


def _record_states(seen: list[Tensor], places: Tensor) -> Any:
    """Return a forward hook that keeps a block's output at one position of each row, to save memory."""

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        rows = torch.arange(len(places), device=states.device)
        seen.append(states[rows, places.to(states.device)].float().cpu())

    return hook


@dataclass(frozen=True)
class ReadOut:
    """Linear probe on one block's output."""

    accuracy: float
    errors: Tensor
    """Leave-one-out squared error of each row, [rows]."""


def read_out(states: Tensor, labels: Tensor) -> ReadOut:
    """Compute leave-one-out accuracy and squared errors of ridge regression, with the best of `RIDGES`.

    With K = X X^T of the standardized states, the fit is H Y, H = K (K + lambda I)^-1 + 1/n (a free intercept), and the
    leave-one-out error of row i is (Y - H Y)_i / (1 - H_ii).

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
    """Return the fewest blocks with a squared error within one standard error of the best, paired by row."""
    best = min(range(len(errors)), key=lambda block: float(errors[block].mean()))
    for block, of_block in enumerate(errors[:best]):
        more = of_block - errors[best]
        if float(more.mean()) <= float(more.std()) / len(more) ** 0.5:
            return block + 1
    return best + 1
