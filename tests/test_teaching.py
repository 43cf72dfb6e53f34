"""A teacher: its logits beside the labels, the loss by its formula, what it may be, and whole runs with one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lights import light_of
from peft import LoraConfig, get_peft_model
from tiny import VOCABULARY, make, refusal, without_dropout
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForTokenClassification,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from workbench import (
    BAD,
    GOOD,
    NEUTRAL,
    SPECIAL,
    Workbench,
    _tokenizer,
    labelled,
    lightpeft,
    read,
    save_base,
    write_rows,
)

from lightpeft import LightTrainer, light_trainer
from lightpeft.app.runs import pipeline
from lightpeft.training.teaching import TEMPERATURE

ROWS, BATCH = 24, 8
NOTHING = light_of(heads=0.0, neurons=0.0, experts=0.0, modules=0.0, ranks=0.0, dropout=None, scale=1.0)
"""Of the blocks, that is; light training is then stock training."""
CUT = light_of(length=2, heads=0.5, neurons=0.5, modules=0.5, dropout=0.0, scale=1.0)
TOKENIZER = _tokenizer([*SPECIAL, *(f"word{index}" for index in range(4, VOCABULARY))], "bert")


def drawn(*shape: int, below: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def tiny(cls: type[PreTrainedModel], seed: int, labels: int = 3) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                        intermediate_size=48, pad_token_id=0, num_labels=labels)  # fmt: skip
    model = cls(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.3) if weight.dim() > 1 else weight.add_(0.2 * torch.randn_like(weight))
    return model


def classes_rows() -> dict[str, list[Any]]:
    return {"input_ids": ids_of(ROWS), "labels": drawn(ROWS).tolist()}


def numbers_rows() -> dict[str, list[Any]]:
    return {"input_ids": ids_of(ROWS), "labels": drawn(ROWS, below=5).float().tolist()}


def tokens_rows() -> dict[str, list[Any]]:
    ids = ids_of(ROWS)
    labels = [drawn(len(row), below=3, seed=index).tolist() for index, row in enumerate(ids)]
    return {"input_ids": ids, "labels": [[-100, *own[1:]] for own in labels]}


def options_rows() -> dict[str, list[Any]]:
    ids = [ids_of(3, seed=index) for index in range(ROWS)]
    return {"input_ids": ids, "labels": drawn(ROWS, below=3).tolist()}


def ids_of(rows: int, seed: int = 0) -> list[list[int]]:
    """Rows of 3 to 8 tokens."""
    lengths = (3 + drawn(rows, below=6, seed=seed)).tolist()
    return [(4 + drawn(length, below=VOCABULARY - 4, seed=index)).tolist() for index, length in enumerate(lengths)]


KINDS: dict[str, tuple[Callable[[int], PreTrainedModel], Callable[[], dict[str, list[Any]]], Any]] = {
    "classes": (lambda seed: make("bert", seed), classes_rows, None),
    "numbers": (lambda seed: make("bert", seed, num_labels=1), numbers_rows, None),
    "tokens": (
        lambda seed: tiny(BertForTokenClassification, seed),
        tokens_rows,
        DataCollatorForTokenClassification(TOKENIZER),
    ),
    "options": (lambda seed: tiny(BertForMultipleChoice, seed), options_rows, DataCollatorForMultipleChoice(TOKENIZER)),
}


def rows_of(kind: str) -> Dataset:
    rows = KINDS[kind][1]()
    ones = [[[1] * len(each) for each in row] if kind == "options" else [1] * len(row) for row in rows["input_ids"]]
    return Dataset.from_dict({**rows, "attention_mask": ones})


def trainer(kind: str, folder: Path, parts: int = 1, rows: Dataset | None = None, **options: Any) -> Any:
    """Plain gradient descent, which shows how large gradients are."""
    set_seed(0)
    model = without_dropout(KINDS[kind][0](0))
    placed = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False)
    settings = {
        "per_device_train_batch_size": BATCH // parts, "gradient_accumulation_steps": parts, "max_steps": 2,
        "optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no",
        "train_sampling_strategy": "sequential", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    settings |= options.pop("settings", {})
    return LightTrainer(
        model=get_peft_model(model, placed),
        args=TrainingArguments(str(folder), **settings),
        train_dataset=rows_of(kind) if rows is None else rows,
        processing_class=TOKENIZER,
        data_collator=KINDS[kind][2],
        **{"light": NOTHING, **options},
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


# -- the loss ----------------------------------------------------------------------------------------------------


def by_hand(kind: str, student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], weight: float) -> Tensor:
    """The formula, of a batch."""
    labels, inputs = batch["labels"], {name: value for name, value in batch.items() if name != "labels"}
    ours = student(**inputs).logits
    with torch.no_grad():
        theirs = teacher(**inputs).logits
    if kind == "numbers":
        own, distance = functional.mse_loss(ours.squeeze(-1), labels), functional.mse_loss(ours, theirs)
        return (1 - weight) * own + weight * distance
    if kind == "tokens":
        ours, theirs, labels = ours[labels != -100], theirs[labels != -100], labels[labels != -100]
    own = functional.cross_entropy(ours, labels)
    p, q = (theirs / TEMPERATURE).softmax(-1), (ours / TEMPERATURE).softmax(-1)
    return (1 - weight) * own + weight * TEMPERATURE**2 * (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loss_is_the_formula(kind: str, parts: int, tmp_path: Path) -> None:
    """Of a step and of its gradients: weights after two steps of plain descent are those of a loop by hand."""
    teacher = KINDS[kind][0](7)
    trained = trainer(kind, tmp_path, parts, teacher=teacher, teacher_weight=0.3)
    expected, found = copy.deepcopy(trained.model).train(), []
    rows = rows_of(kind)
    for step, rate in enumerate((1e-2, 0.5e-2)):
        expected.zero_grad()
        mean = torch.zeros(())
        for part in range(parts):
            first = step * BATCH + part * BATCH // parts
            batch = trained.data_collator([rows[first + index] for index in range(BATCH // parts)])
            loss = by_hand(kind, expected, teacher, dict(batch), 0.3) / parts
            loss.backward()
            mean += loss.detach()
        found.append(float(mean))
        with torch.no_grad():
            for weight in expected.parameters():
                if weight.grad is not None:
                    weight -= rate * weight.grad
    trained.train()
    assert losses(trained) == pytest.approx(found, rel=1e-3)
    for name, weight in weights(expected).items():
        assert weight.allclose(trained.model.get_parameter(name), rtol=0, atol=1e-5), name


# -- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A student whose labels say nothing, and a teacher of another family, which knows the same words by other ids."""
    made = Workbench(tmp_path_factory.mktemp("teaching"))
    other = _tokenizer([*SPECIAL, *BAD, *GOOD, *NEUTRAL], "mpnet")
    save_base(made.folder / "other", "mpnet", seed=3, tokenizer=other)
    changes = {"method": "full", "model.name": str(made.folder / "other"), "training.learning_rate": 3e-3}
    pipeline.run(made.config("teacher", **changes, **{"training.epochs": 10}))
    draw = random.Random(0)
    spoilt = [{**row, "label": draw.choice(["positive", "negative"])} for row in labelled(64, seed=1)]
    write_rows(made.train, spoilt)
    return made


def taught(bench: Workbench, name: str, **changes: Any) -> Any:
    teacher = {"training.teacher": str(bench.folder / "teacher"), "training.teacher_weight": 1.0}
    return bench.config(name, **{**teacher, "training.epochs": 6, **changes})


def accuracy(report: dict[str, Any]) -> float:
    return float(report["metrics"]["accuracy"])


@pytest.mark.parametrize("method", ["light", "plain", "full"])
def test_a_run_learns_from_a_teacher_with_another_tokenizer(bench: Workbench, method: str) -> None:
    changes = {"method": method} | ({"training.learning_rate": 3e-3} if method == "full" else {})
    assert accuracy(read(bench.folder / "teacher/metrics.json")) > 0.95
    report = pipeline.run(taught(bench, method, **changes))
    assert accuracy(report) > 0.9
    assert report["seconds"]["teach"] > 0
    alone = pipeline.run(taught(bench, f"{method}-alone", **changes, **{"training.teacher": None}))
    assert accuracy(alone) < 0.8
