"""What estimation has taught a model: beside an answer by the frequencies of labels, read while it trains."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lights import light_of
from peft import PeftModel
from tiny import make, random_record, with_lora
from torch import Tensor
from torch.nn.functional import cross_entropy
from training import chunks, dataset, inputs, student
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    TrainingArguments,
)

from lightpeft import EarlyPruner, LightTrainer
from lightpeft.budget.room import SearchRoom
from lightpeft.budget.trainer import budget_in
from lightpeft.prune.learning import LossObserver, learned_of, loss_by_frequencies, unlearned_warning


def observed(model: PeftModel, *batches: dict[str, Tensor]) -> Tensor:
    observer = LossObserver(model, torch.device("cpu"))
    for batch in batches:
        model(**batch)
    observer.detach()
    model(**batches[0])
    return observer.take()


def test_the_loss_of_an_answer_by_frequencies() -> None:
    assert loss_by_frequencies(torch.tensor([5, 5])) == pytest.approx(math.log(2))
    assert loss_by_frequencies(torch.tensor([3, 0, 1])) == pytest.approx(0.5623, abs=1e-4)
    assert loss_by_frequencies(torch.tensor([0, 7])) == 0


@pytest.mark.parametrize(
    ("sums", "learned"),
    [
        ([100 * math.log(2), 50, 50], 0.0),
        ([50 * math.log(2), 50, 50], 0.5),
        ([200 * math.log(2), 50, 50], -1.0),
        ([400 * 0.5623351, 300, 0, 100], 0.0),
        ([90.0, 50, 49], None),
        ([1.0, 0, 700], None),
        ([0.0], None),
    ],
)
def test_what_is_learned(sums: list[float], learned: float | None) -> None:
    found = learned_of(torch.tensor(sums))
    assert found is None if learned is None else found == pytest.approx(learned, abs=1e-5)


def test_micro_batches_add_up() -> None:
    model, data = student(), inputs()
    whole = observed(model, data)
    assert whole[1:].sum() == len(data["labels"])
    assert whole[0].item() == pytest.approx(model(**data).loss.item() * len(data["labels"]), rel=1e-5)
    torch.testing.assert_close(observed(model, *chunks(data, 2)), whole)


def test_only_what_trains_counts() -> None:
    model, data = student(), inputs()
    with torch.no_grad():
        assert not observed(model, data).any()
    assert not observed(model, {key: value for key, value in data.items() if key != "labels"}).any()
    observer = LossObserver(model, torch.device("cpu"))
    model(**data)
    assert observer.take().any() and not observer.take().any(), "of one step"


def test_other_tasks_are_not_known() -> None:
    language = student("llama-gqa")
    assert learned_of(observed(language, inputs("llama-gqa"))) is None, "tokens"
    numbers = student()
    numbers.get_base_model().config.num_labels = 1
    assert observed(numbers, inputs()).tolist() == [0], "one output"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    options = with_lora(BertForMultipleChoice(BertConfig(vocab_size=50, **sizes)))
    data = {"input_ids": torch.randint(50, (4, 3, 6)), "labels": torch.tensor([0, 1, 2, 0])}
    assert not observed(options, data).any(), "options are no classes"


def test_labels_of_tokens_count_without_the_ignored() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tags = with_lora(BertForTokenClassification(BertConfig(vocab_size=50, num_labels=3, **sizes)))
    data = {"input_ids": torch.randint(50, (2, 4)), "labels": torch.tensor([[0, 1, -100, 1], [2, -100, -100, 1]])}
    found = observed(tags, data)
    assert found[1:].tolist() == [1, 3, 1]
    assert found[0].item() == pytest.approx(5 * tags(**data).loss.item(), rel=1e-5)


@pytest.mark.parametrize(("model", "blocks"), [(BertForTokenClassification, 0.0), (BertForSequenceClassification, 0.4)])
def test_a_fixed_budget_is_for_one_class_a_row(model: Any, blocks: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cost was not measured on tokens, even if it is known that they were learned."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    peft = with_lora(model(BertConfig(vocab_size=50, **sizes)))
    record = random_record(peft)
    record.meta["learned"] = 0.5
    monkeypatch.setattr(SearchRoom, "of", lambda *args, **options: None)
    monkeypatch.setattr("lightpeft.budget.trainer.why_unmeasured", lambda *args: "too short")
    host: Any = SimpleNamespace(light_config=light_of(), light_tolerance=lambda: None, _peft_model=peft)
    assert budget_in(host, record, 10, sharded=False).blocks == blocks


def smoothed(folder: Path) -> LightTrainer:
    arguments = TrainingArguments(str(folder), max_steps=6, label_smoothing_factor=0.4, report_to=[], use_cpu=True)
    return LightTrainer(student(), arguments, train_dataset=dataset(), light=light_of(length=4))


def custom(folder: Path) -> LightTrainer:
    arguments = TrainingArguments(str(folder), max_steps=6, report_to=[], use_cpu=True)
    loss = lambda outputs, labels, num_items_in_batch=None: cross_entropy(outputs["logits"], labels) ** 2  # noqa: E731
    light = light_of(length=4)
    return LightTrainer(student(), arguments, train_dataset=dataset(), light=light, compute_loss_func=loss)


@pytest.mark.parametrize("make_trainer", [smoothed, custom])
def test_labels_that_the_trainer_keeps_back_count(
    make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With label smoothing or a custom loss the model gets no labels; its cross-entropy is known all the same."""
    monkeypatch.setattr("lightpeft.prune.learning.FEWEST_TELLING", 1)
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert trainer.light_record.meta["learned"] is not None


def test_label_smoothing_does_not_change_what_is_known() -> None:
    model, data = student(), inputs()
    plain = observed(model, data)
    observer = LossObserver(model, torch.device("cpu"))
    observer.expect(data.pop("labels"))
    model(**data)
    torch.testing.assert_close(observer.take(), plain)
    model(**data)
    assert not observer.take().any(), "labels are of one call"


def test_a_loop_of_ones_own_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("lightpeft.prune.learning.FEWEST_TELLING", 1)
    pruner = EarlyPruner(student(), light_of(length=2))
    pruner.start()
    while not pruner.finished:
        pruner.model(**inputs()).loss.backward()
        pruner.step()
    pruner.prune()
    assert "the model had hardly learned the task when it was cut" in caplog.text


@pytest.mark.parametrize(
    ("learned", "words"),
    [
        (None, None),
        (0.05, None),
        (0.9, None),
        (0.02, "loss 2.0% below that of the label frequencies after 4 steps"),
        (-0.1, "loss 10.0% above that of the label frequencies after 4 steps"),
    ],
)
def test_what_is_said_before_a_cut(learned: float | None, words: Any) -> None:
    record = random_record(with_lora(make("bert")))
    record.meta.update(learned=learned, steps=4)
    line = unlearned_warning(record)
    assert line is None if words is None else words in (line or "")
