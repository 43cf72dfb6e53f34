"""Small training runs for the tests of the estimation stage: data, a `Trainer`, and a hand-written loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lights import light_of
from peft import PeftModel
from tiny import VOCABULARY, batch, inputs_for, make, with_lora, without_dropout
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightpeft.app.runs.trainers import RunTrainer
from lightpeft.models.families.family_table import block_lists
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.profiling.live import device_of, move_batch
from lightpeft.prune.estimation import Estimator
from lightpeft.recipe.trainer import LightTrainer


def student(name: str = "bert", **changes: Any) -> PeftModel:
    """A tiny LoRA model in training mode, without any dropout but what `changes` ask for in LoRA."""
    return with_lora(without_dropout(make(name)), **changes).train()


def inputs(name: str = "bert", **changes: Any) -> dict[str, Tensor]:
    """A padded batch with the labels that the model's task needs."""
    return inputs_for(make(name), labels=True, **changes)


def dataset(causal: bool = False, rows: int = 64) -> Dataset:
    """Rows of equal length for sequence classification or for a language model."""
    whole = batch(rows=rows, length=8, padding="none", labels=True)
    if causal:
        whole["labels"] = whole["input_ids"]
    return Dataset.from_dict({key: value.tolist() for key, value in whole.items()})


def trainer(model: PeftModel, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    """A plain `Trainer` that sees the rows in order."""
    values: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": 40,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    rows = dataset(causal=model.peft_config["default"].task_type == "CAUSAL_LM")
    return Trainer(model, TrainingArguments(str(folder), **values), train_dataset=rows, callbacks=list(callbacks))


def one_light_training(folder: Path, rows: int = 8, train: str = "peft", length: int | str = 4, **settings: Any) -> Any:
    """A `LightTrainer` of a tiny language model, that sees the rows in order and is cut after four of 16 steps.

    Args:
        length: of estimation.
        train: which weights train behind the cut, at the rate of PEFT or a tenth of it.
    """
    scales = {"estimation_scale": 1.0, "scale": 0.1 if train == "all" else 1.0}
    light = light_of(length=length, heads=0.5, neurons=0.5, modules=0.5, dropout=0.0, train=train, **scales)
    values: dict[str, Any] = {
        "per_device_train_batch_size": rows,
        "max_steps": 16,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    arguments = TrainingArguments(str(folder), **values)
    return LightTrainer(student("llama-gqa"), arguments, light=light, train_dataset=dataset(causal=True))


def trained_classifier(folder: Path, rows: int = 8, **settings: Any) -> PeftModel:
    """A classifier after gradient descent in a run's trainer; its loss ignores how many labels a step has."""
    values: dict[str, Any] = {
        "per_device_train_batch_size": rows,
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    model = student()
    RunTrainer(model, TrainingArguments(str(folder), **values), train_dataset=dataset()).train()
    return model


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class StopAt(TrainerCallback):
    """Ends a run early, as a lost machine would, but politely."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def chunks(whole: dict[str, Tensor], rows: int) -> Iterator[dict[str, Tensor]]:
    """The batch in parts of so many rows."""
    for start in range(0, len(whole["input_ids"]), rows):
        yield {key: value[start : start + rows] for key, value in whole.items()}


def estimate(
    model: PeftModel,
    steps: int = 2,
    parts: int = 1,
    rows: int = 8,
    before_step: Callable[[list[torch.nn.Parameter]], None] = lambda _: None,
    scale: float = 1.0,
    learning_rate: float = 0.1,
    **config: Any,
) -> Estimator:
    """Run a whole estimation stage in a hand-written loop of SGD steps on one batch a step."""
    estimator = Estimator(model, light_of(length=steps, **config))
    estimator.start(total_steps=None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate)
    for step in range(steps):
        for part in chunks(batch(rows=rows, length=20, seed=step, labels=True), rows // parts):
            (model(**move_batch(part, device_of(model))).loss / parts * scale).backward()
        before_step(parameters)
        estimator.step(grad_scale=scale)
        for parameter in parameters:
            parameter.grad = None if parameter.grad is None else parameter.grad / scale
        optimizer.step()
        optimizer.zero_grad()
    estimator.stop()
    return estimator


def assert_equal(a: EstimationRecord, b: EstimationRecord) -> None:
    """The same scores, bit by bit."""
    assert a.scores.keys() == b.scores.keys()
    different = [key for key in a.scores if not a.scores[key].equal(b.scores[key])]
    assert not different


def assert_close(a: EstimationRecord, b: EstimationRecord, tolerance: float = 1e-4) -> None:
    """The same scores, up to `tolerance` of the largest one of each tensor."""
    assert a.scores.keys() == b.scores.keys()
    for key, value in b.scores.items():
        difference = (a.scores[key] - value).abs().max() / value.abs().max()
        assert difference <= tolerance, f"{key}: {difference:.2e}"


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a tiny model with one stack."""
    return list(block_lists(transformers_model(model))[0])


def upper(name: str = "bert", lowest: int = 2) -> PeftModel:
    """A tiny model whose LoRA trains in the blocks from `lowest` on only, without dropout."""
    model = with_lora(make(name))
    for block in blocks_of(model)[:lowest]:
        block.requires_grad_(False)
    return without_dropout(model).train()


def encoded(rows: int = 10) -> Dataset:
    """Rows of several lengths, as a task encodes them."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3 + index % 4 for index in range(rows)]
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": [0, 1] * (rows // 2), "length": lengths})


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A padded batch of them."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor([row["labels"] for row in rows])}
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}
