"""Learning progress of estimation: the loss of the model compared with that of the label frequencies.

Scores of a model that has learned nothing say nothing about the task, and pruning by them looks cheap at any amount.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightpeft.models.batches import IGNORED
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.estimation_record import EstimationRecord

LEAST_LEARNED = 0.05
"""Minimum fraction by which estimation has to get below the loss of the label frequencies, without a warning."""
FEWEST_TELLING = 100
"""Minimum number of labels for a comparison with the label frequencies."""


class LossObserver:
    """Sums of the cross-entropy and of the labels of a classifier in training, on the device, without host copies.

    A hook reads logits and labels from the calls of the model, so that label smoothing, a teacher or a custom loss do
    not count. A trainer that keeps the labels for its own loss passes them to `expect`. For other models the sums stay
    zero.
    """

    def __init__(self, model: PeftModel, device: torch.device) -> None:
        self._classes = torch.arange(classes_of(model), device=device)
        self.size = 1 + len(self._classes)
        self._sums = torch.zeros(self.size, device=device)
        self._expected: Any = None
        self._handle = model.register_forward_hook(self._add, with_kwargs=True)

    def expect(self, labels: Any) -> None:
        """Note the labels of the model's next call, which it may be called without."""
        self._expected = labels

    def take(self) -> Tensor:
        """Return the sums of the step and reset them, [1 + classes]: loss in nats over its labels, labels by class."""
        taken, self._sums = self._sums, torch.zeros_like(self._sums)
        return taken

    def detach(self) -> None:
        """Remove the hook from the model."""
        self._handle.remove()

    @torch.no_grad()
    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        logits, labels = getattr(output, "logits", None), kwargs.get("labels")
        labels, self._expected = self._expected if labels is None else labels, None
        if not isinstance(logits, Tensor) or not logits.requires_grad or not isinstance(labels, Tensor):
            return
        if logits.shape == (*labels.shape, len(self._classes)) and not labels.is_floating_point():
            labels = labels.flatten()
            loss = cross_entropy(logits.float().flatten(0, -2), labels, reduction="sum", ignore_index=IGNORED)
            of_classes = (labels.unsqueeze(1) == self._classes).sum(0)
            self._sums += torch.cat([loss.reshape(1).to(self._sums), of_classes.to(self._sums)])


def classes_of(model: nn.Module) -> int:
    """Return the number of classes of a classifier; 0 for other models."""
    classes = getattr(transformers_model(model).config, "num_labels", 0)
    return classes if classes > 1 else 0


def one_of_several(labels: Tensor) -> bool:
    """Return whether labels are class numbers, one for each row."""
    return labels.dim() == 1 and not labels.is_floating_point()


def learned_of(sums: Tensor) -> float | None:
    """Compute the fraction by which the loss is below that of the label frequencies.

    Args:
        sums: sums of `LossObserver.take` over any number of steps.

    Returns:
        None for too few labels, or if all are of one class.
    """
    loss, of_classes = float(sums[0]), sums[1:].double()
    rows = float(of_classes.sum())
    chance = loss_by_frequencies(of_classes) if rows >= FEWEST_TELLING else 0.0
    return 1 - loss / rows / chance if chance else None


def loss_by_frequencies(of_classes: Tensor) -> float:
    """Compute the loss in nats of predicting the label frequencies (their entropy).

    Args:
        of_classes: number of rows of each class, [classes].
    """
    return float(torch.special.entr(of_classes.double() / of_classes.sum()).sum())


def unlearned_warning(record: EstimationRecord) -> str | None:
    """Return a warning about scores of a model that has hardly learned its task; None: it has, or it is not known.

    On CoLA, where the model had not, removing 60% of the blocks cost MPNet-base nearly all of its Matthews correlation
    (docs/explanation/results.md).
    """
    learned = record.meta.get("learned")
    if learned is None or learned >= LEAST_LEARNED:
        return None
    beside = f"{abs(learned):.1%} {'below' if learned > 0 else 'above'} that of the label frequencies"
    return (
        f"the model had hardly learned the task when it was cut (loss {beside} after {record.meta['steps']} steps), "
        "so its scores are unreliable; estimate for longer (light.estimate.length), or remove less (light: 0.2)"
    )
