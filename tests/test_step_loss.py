"""The loss of a step: that of stock `Trainer`, but a mean over its parts where it ignores how many labels it has."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lanes import needs, older, thorough
from lights import light_of
from peft import LoraConfig, get_peft_model
from tiny import VOCABULARY, make, without_dropout
from torch import Tensor
from torch.nn import functional
from training import trained_weights
from transformers import BertConfig, BertForTokenClassification, PreTrainedModel, Trainer, TrainingArguments, set_seed

from lightpeft import LightTrainer, light_trainer
from lightpeft.app.runs.trainers import RunTrainer

Loss = Callable[..., Tensor]
ROWS, LENGTH, BATCH, STEPS = 32, 6, 8, 2
NOTHING = light_of(heads=0.0, neurons=0.0, experts=0.0, modules=0.0, ranks=0.0, dropout=None, scale=1.0)
"""Of the blocks, that is; light training is then stock training."""


def token_tagger() -> PreTrainedModel:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                        intermediate_size=48, pad_token_id=0, num_labels=2)  # fmt: skip
    return BertForTokenClassification(config)


def integers(*shape: int, below: int = 2) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


def unequal(labels: Tensor) -> Tensor:
    """Labels whose number differs between rows, so that a mean of means is not the mean."""
    for row, seen in enumerate(labels):
        seen[: 1 + row % 4] = -100
    return labels


def cross_entropy(outputs: Any, labels: Tensor, **options: Any) -> Tensor:
    logits = outputs.logits
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), **options)


def next_token(outputs: Any, labels: Tensor, **options: Any) -> Tensor:
    logits = outputs.logits[:, :-1]
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), **options)


def squares(outputs: Any, labels: Tensor, **options: Any) -> Tensor:
    return functional.mse_loss(outputs.logits.reshape(-1), labels.reshape(-1), **options)


def each_label(outputs: Any, labels: Tensor, **options: Any) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs.logits, labels, **options)


@dataclass(frozen=True)
class Kind:
    """A model, labels for it, and its loss; `reads`: whether the model's own divides by the labels of the step."""

    make: Callable[[], PreTrainedModel]
    labels: Callable[[], Tensor]
    loss: Loss
    reads: bool = False


KINDS = {
    "classes": Kind(lambda: make("bert"), lambda: integers(ROWS), cross_entropy),
    "classes-in-a-column": Kind(lambda: make("bert"), lambda: integers(ROWS, 1), cross_entropy),
    "numbers": Kind(lambda: make("bert", num_labels=1), lambda: integers(ROWS, below=5).float(), squares),
    "numbers-in-a-column": Kind(
        lambda: make("bert", num_labels=1), lambda: integers(ROWS, 1, below=5).float(), squares
    ),
    "several-labels": Kind(lambda: make("bert", num_labels=3), lambda: integers(ROWS, 3).float(), each_label),
    "tags": Kind(token_tagger, lambda: integers(ROWS, LENGTH), cross_entropy),
    "next-tokens": Kind(
        lambda: make("llama-gqa"), lambda: integers(ROWS, LENGTH, below=VOCABULARY), next_token, reads=True
    ),
    "some-next-tokens": Kind(
        lambda: make("llama-gqa"), lambda: unequal(integers(ROWS, LENGTH, below=VOCABULARY)), next_token, reads=True
    ),
}


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None, *, loss: Loss) -> Tensor:
    """As the documentation of transformers has it."""
    return loss(outputs, labels, reduction="sum") / num_items_in_batch


def meant(outputs: Any, labels: Tensor, num_items_in_batch: Any = None, *, loss: Loss) -> Tensor:
    return loss(outputs, labels)


def trained(
    trainer_class: Any, kind: Kind, folder: Path, accumulation: int, function: Loss | None, **options: Any
) -> Any:
    """Weights and losses of a few steps of plain gradient descent, which shows how large gradients are."""
    set_seed(0)
    model = without_dropout(kind.make())
    ids = integers(ROWS, LENGTH, below=VOCABULARY - 3) + 3
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": kind.labels()}
    placed = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False)
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=STEPS, optim="sgd", learning_rate=1e-2, max_grad_norm=0.0, logging_steps=1, save_strategy="no",
        train_sampling_strategy="sequential", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = trainer_class(
        model=get_peft_model(model, placed),
        args=args,
        train_dataset=Dataset.from_dict({name: values.tolist() for name, values in rows.items()}),
        compute_loss_func=function,
        **options,
    )
    trainer.train()
    return trained_weights(trainer.model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(one: Any, other: Any) -> None:
    assert one[1] == pytest.approx(other[1], abs=2e-4), "losses, as they are logged"
    assert one[0].keys() == other[0].keys()
    for name, weight in one[0].items():
        assert weight.allclose(other[0][name], rtol=0, atol=1e-6), name


PARTS = [1, 4]
DIVIDES_ONCE = not older("transformers", "5.6")
"""Whether stock steps of several parts are as large as those of one; older ones have accelerate divide once more."""
IN_MAKE_TEST = {"classes", "several-labels", "some-next-tokens"}


def cases() -> list[Any]:
    """Of all kinds and functions; a mean of means says nothing where rows have labels of different number."""
    functions = {"own-loss": None, "sum": summed, "mean": meant}
    found = itertools.product(KINDS, functions, PARTS)
    return [
        pytest.param(
            KINDS[kind],
            functions[name],
            parts,
            id=f"{kind}-{name}-{parts}",
            marks=() if kind in IN_MAKE_TEST and parts == 4 else thorough,
        )
        for kind, name, parts in found
        if (kind, name) != ("some-next-tokens", "mean")
    ]


@pytest.mark.parametrize(("kind", "function", "parts"), cases())
def test_a_step_is_that_of_stock_trainer(kind: Kind, function: Loss | None, parts: int, tmp_path: Path) -> None:
    """Where the loss ignores how many labels a step has, stock steps grow with accumulation: these are of one part."""
    own = None if function is None else partial(function, loss=kind.loss)
    light = trained(LightTrainer, kind, tmp_path, parts, own, light=NOTHING)
    reads = kind.reads if function is None else function is summed
    assert_same(light, trained(Trainer, kind, tmp_path, parts if reads and DIVIDES_ONCE else 1, own))


class Summed(Trainer):
    """A loss that divides by the labels of the step."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = summed(
            outputs, labels, len(labels) if num_items_in_batch is None else num_items_in_batch, loss=cross_entropy
        )
        return (loss, outputs) if return_outputs else loss


class Meant(Trainer):
    """A loss that is a mean, as most people write it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs, labels)
        return (loss, outputs) if return_outputs else loss


asked = needs("transformers", "5.19", "older ones do not ask whether a loss is scaled")


class Told(Meant):
    loss_is_scaled_for_ga = False


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("trainer_class", [Summed, Meant, pytest.param(Told, marks=asked)])
def test_a_loss_of_ones_own(trainer_class: type[Trainer], parts: int, tmp_path: Path) -> None:
    light = trained(light_trainer(trainer_class), KINDS["classes"], tmp_path, parts, None, light=NOTHING)
    assert_same(light, trained(Trainer, KINDS["classes"], tmp_path, 1, None))


@pytest.mark.parametrize("kind", ["classes", "several-labels", "tags", "some-next-tokens"])
def test_a_run(kind: str, tmp_path: Path) -> None:
    """The trainer of runs, which is none of light training's."""
    parts = PARTS[-1]
    one = trained(Trainer, KINDS[kind], tmp_path, parts if KINDS[kind].reads and DIVIDES_ONCE else 1, None)
    assert_same(trained(RunTrainer, KINDS[kind], tmp_path, parts, None), one)
