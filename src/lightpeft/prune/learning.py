"""What estimation has taught the model: its loss beside that of an answer by the frequencies of labels.

Scores of a model that has learned nothing know nothing of the task, and a cut by them looks cheap whatever it takes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.records import EstimationRecord

LEAST_LEARNED = 0.05
"""Part of the loss of an answer by the frequencies of labels that estimation has to have taken away: a model that does
no better has nothing to lose yet."""
FEWEST_TELLING = 100
"""Rows that it takes at least to tell whether a model does better than the frequencies of labels."""


class LossObserver:
    """Sums of what a model that gives a row one of several classes loses and is to answer, without host copies.

    Read from what training calls the model with, and gets from it. Of other models, and where the loss is made outside
    of the model, the sums stay zero.
    """

    def __init__(self, model: PeftModel, device: torch.device) -> None:
        self._classes = torch.arange(classes_of(model), device=device)
        self.size = 1 + len(self._classes)
        self._sums = torch.zeros(self.size, device=device)
        self._handle = model.register_forward_hook(self._add, with_kwargs=True)

    def take(self) -> Tensor:
        """The step's sums, [1 + classes]: the loss in nats over its rows, and the rows of each class."""
        taken, self._sums = self._sums, torch.zeros_like(self._sums)
        return taken

    def detach(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    @torch.no_grad()
    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        loss, logits, labels = getattr(output, "loss", None), getattr(output, "logits", None), kwargs.get("labels")
        if loss is None or not loss.requires_grad or not isinstance(labels, Tensor) or not one_of_several(labels):
            return
        if logits is not None and logits.shape == (len(labels), len(self._classes)):
            of_classes = (labels.unsqueeze(1) == self._classes).sum(0)
            self._sums += torch.cat([loss.float().reshape(1) * len(labels), of_classes.to(self._sums)])


def classes_of(model: nn.Module) -> int:
    """How many classes a model knows; 0 where it gives a row none."""
    classes = getattr(transformers_model(model).config, "num_labels", 0)
    return classes if classes > 1 else 0


def one_of_several(labels: Tensor) -> bool:
    """Whether labels give a row one of several classes."""
    return labels.dim() == 1 and not labels.is_floating_point()


def learned_of(sums: Tensor) -> float | None:
    """The part that is gone of the loss of an answer by the frequencies of labels.

    Args:
        sums: as `LossObserver.take` gives them, of any number of steps.

    Returns:
        None where too few losses were seen to tell, or all rows had one label.
    """
    loss, of_classes = float(sums[0]), sums[1:].double()
    rows = float(of_classes.sum())
    chance = loss_by_frequencies(of_classes) if rows >= FEWEST_TELLING else 0.0
    return 1 - loss / rows / chance if chance else None


def loss_by_frequencies(of_classes: Tensor) -> float:
    """The loss, in nats, of an answer that gives every class the part of the rows that it has.

    Args:
        of_classes: rows of each class, [classes].
    """
    return float(torch.special.entr(of_classes.double() / of_classes.sum()).sum())


def unlearned_warning(record: EstimationRecord) -> str | None:
    """What to say before a cut by the scores of a model that has learned next to nothing; None: it has, or who knows.

    On CoLA, where that was so, a cut of 60% of the blocks cost MPNet-base nearly all of its Matthews' correlation
    (docs/explanation/results.md).
    """
    learned = record.meta.get("learned")
    if learned is None or learned >= LEAST_LEARNED:
        return None
    beside = f"{abs(learned):.1%} {'below' if learned > 0 else 'above'} that of an answer by the frequencies of labels"
    return (
        f"the model had hardly learned the task when it was cut (a loss {beside}, after {record.meta['steps']} steps), "
        "so its scores say little; estimate for longer (light.estimate.length), or cut less (light: 0.2)"
    )
