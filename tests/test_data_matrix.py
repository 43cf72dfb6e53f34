"""Whatever data sets, collators and trainers give, the faster steps and the prefix cache change no loss."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl_settings
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import thorough
from lights import light_of
from peft import LoraConfig
from torch import Tensor
from training import blocks_of, collate, encoded, upper
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)
from workbench import Workbench, labeled

from lightpeft import LightTrainer, light_trainer
from lightpeft.training.prefix import FrozenPrefix, PrefixCache, cache_prefix

trl = pytest.importorskip("trl")

LIGHT = light_of(length=3, heads=0.25, neurons=0.5, modules=0.0, module_blocks=0.5, ranks=0.5, dropout=0.0)
SLOWLY: dict[str, Any] = {"prefix_cache": None, "fast_steps": False}
STEPS = 14
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def tokenizer(bench: Workbench) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(bench.base)


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast) -> Dataset:
    texts = labeled(32, 1)
    tokens = tokenizer([row["text"] for row in texts], truncation=True, max_length=32)
    labels = [int(row["label"] == "positive") for row in texts]
    return Dataset.from_dict({**tokens, "labels": labels, "text": [row["text"] for row in texts]})


# -- data sets


def blanked(batch: dict[str, Any]) -> dict[str, Any]:
    """Every token but the first is another."""
    return {**batch, "input_ids": [ids[:1] + [4] * (len(ids) - 1) for ids in batch["input_ids"]]}


def own_columns(batch: dict[str, Any]) -> dict[str, Any]:
    """What a transform that tokenizes as it goes gives: no column of the data set is left."""
    ids = [[2, *(4 + len(word) for word in text.split()), 3] for text in batch["text"]]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": batch["labels"]}


def streamed(rows: Dataset) -> IterableDataset:
    def generate() -> Iterator[dict[str, Any]]:
        yield from rows.remove_columns("text")

    return IterableDataset.from_generator(generate)


DATA: dict[str, Callable[[Dataset], Any]] = {
    "map": lambda rows: rows,
    "streaming": streamed,
    "transform": lambda rows: rows.remove_columns("text").with_transform(blanked),
    "transform, own columns": lambda rows: rows.with_transform(own_columns),
    "length of text": lambda rows: rows.add_column("length", [len(text) for text in rows["text"]]),
}
KEPT = {"transform", "transform, own columns"}
"""Data sets whose columns Trainer must not drop, as its documentation says of transforms."""


# -- collators


class Padding:
    """A collator of a user's own, that pads lists or tensors."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.calls = 0

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        self.calls += 1
        ids = [torch.as_tensor(row["input_ids"]) for row in self.changed(rows)]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        labels = torch.tensor([int(row["labels"]) for row in self.changed(rows)])
        return {"input_ids": padded, "attention_mask": (padded != 0).long(), "labels": labels}

    def changed(self, rows: Rows) -> Rows:
        return rows


class Truncating(Padding):
    def changed(self, rows: Rows) -> Rows:
        return [{**row, "input_ids": row["input_ids"][:4]} for row in rows]


class MaskingLater(Padding):
    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        batch = super().__call__(rows)
        masked = (batch["input_ids"] != 0) & (self.calls > 6)
        return {**batch, "input_ids": batch["input_ids"].masked_fill(masked, 4)}


class AddingColumns(Padding):
    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        batch = super().__call__(rows)
        types = (torch.arange(batch["input_ids"].shape[1]) > 2).long().expand_as(batch["input_ids"])
        return {**batch, "token_type_ids": types * batch["attention_mask"]}


COLLATORS: dict[str, Callable[[Any], Any]] = {
    "pad": lambda tokenizer: DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
    "own": Padding,
    "truncate": Truncating,
    "mask later": MaskingLater,
    "add columns": AddingColumns,
}


# -- the matrix


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(bench: Workbench, tokenizer: Any, rows: Any, collator: str, folder: Path, **options: Any) -> Any:
    """A light training on these rows."""
    set_seed(0)
    kept = {"remove_unused_columns": False} if options.pop("kept") else {}
    trainer = LightTrainer(
        AutoModelForSequenceClassification.from_pretrained(bench.base, num_labels=2),
        TrainingArguments(str(folder), **ARGUMENTS, **kept),
        train_dataset=rows,
        data_collator=COLLATORS[collator](tokenizer),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.0),
        light=LIGHT,
        **options,
    )
    trainer.train()
    assert trainer.light_plan is not None and trainer.state.global_step == STEPS
    return trainer


IN_MAKE_TEST = {("map", "pad"), ("streaming", "own"), ("transform", "truncate"), ("map", "mask later")}
CELLS = [
    pytest.param(*cell, marks=() if cell in IN_MAKE_TEST else thorough) for cell in itertools.product(DATA, COLLATORS)
]


@pytest.mark.parametrize(("data", "collator"), CELLS)
def test_a_cell(
    bench: Workbench, tokenizer: Any, rows: Dataset, data: str, collator: str, tmp_path: Path, caplog: Any
) -> None:
    made, options = DATA[data](rows), {"kept": data in KEPT}
    with caplog.at_level(logging.INFO, "lightpeft"):
        fast = trained(bench, tokenizer, made, collator, tmp_path / "fast", **options)
    cached = "computed once" in caplog.text
    assert cached == (collator == "pad" and data in {"map", "length of text"})
    assert cached or caplog.text.count("no prefix cache: ") == 1
    slow = trained(bench, tokenizer, made, collator, tmp_path / "slow", **options, **SLOWLY)
    assert losses(fast) == pytest.approx(losses(slow), abs=1e-6)


CHANGES: dict[str, Callable[[list[int]], list[int]]] = {
    "keep": lambda ids: ids,
    "blank": lambda ids: [3] * len(ids),
    "truncate": lambda ids: ids[:-1] or ids,
    "append": lambda ids: [*ids, 5],
    "turn": lambda ids: ids[::-1],
}
BATCHES = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(sorted(CHANGES))), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(schedule=st.lists(BATCHES, min_size=1, max_size=4), more=st.integers(0, 3))
def test_any_schedule_of_changed_rows(
    schedule: list[list[tuple[int, str]]], more: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The states of a row are used for its very tokens, whatever changed it, in whatever company."""
    model, plain, kept = upper(), upper(), encoded()
    with FrozenPrefix(model).attached() as prefix:
        prefix.known = cache_prefix(
            prefix, kept, collate, PrefixCache("memory"), tmp_path_factory.mktemp("states"), batch_size=4
        )
        assert prefix.known is not None
        for picked in schedule:
            taken = [{**kept[row], "input_ids": CHANGES[change](kept[row]["input_ids"])} for row, change in picked]
            batch = collate(taken)
            batch = {
                name: torch.nn.functional.pad(value, (0, more)) if value.dim() == 2 else value
                for name, value in batch.items()
            }
            # states come from batches of another shape, which round otherwise
            assert float(model(**batch).loss) == pytest.approx(float(plain(**batch).loss), abs=1e-5)


def test_states_are_of_the_call_and_not_of_the_batch(tmp_path: Path) -> None:
    """A loss that changes tokens after the trainer gave them, or asks for hidden states, gets the model's own."""
    model, plain, kept = upper(), upper(), encoded()
    batch = collate(kept.select([1, 4, 8]).to_list())
    seen: list[bool] = []
    with FrozenPrefix(model).attached() as prefix:
        prefix.known = cache_prefix(prefix, kept, collate, PrefixCache("memory"), tmp_path, batch_size=4)
        model(**batch)
        blocks_of(model)[0].attention.register_forward_hook(lambda *_: seen.append(True))
        model(**batch)
        assert not seen
        asked = model(**batch, output_hidden_states=True).hidden_states
        assert seen and all(map(torch.allclose, asked, plain(**batch, output_hidden_states=True).hidden_states))


# -- other trainers


def sft(folder: Path, rows: Any, **options: Any) -> Any:
    set_seed(0)
    return light_trainer(trl.SFTTrainer)(
        model=tiny.without_dropout(tiny.make("llama-gqa")),
        args=trl.SFTConfig(str(folder), **{**ARGUMENTS, "bf16": False, "max_length": 16}),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0),
        light=LIGHT,
        **options,
    )


def tiny_tokenizer() -> Any:
    return trl_settings.tokenizer()


def truncating(rows: Rows) -> dict[str, Tensor]:
    batch = Truncating(None)([{**row, "labels": 0} for row in rows])  # type: ignore[arg-type]
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


@pytest.mark.parametrize("collator", [None, pytest.param(truncating, marks=thorough)], ids=["own", "truncate"])
@pytest.mark.parametrize("data", ["map", pytest.param("streaming", marks=thorough)])
def test_sft(data: str, collator: Any, tmp_path: Path, caplog: Any) -> None:
    texts = Dataset.from_list([{"text": f"word{i % 7} word{i % 5} word{i % 3} good{i % 2}"} for i in range(32)])
    made = {
        "map": lambda: texts,
        "streaming": lambda: IterableDataset.from_generator(lambda: iter(texts)),
    }[data]
    changes = {} if collator is None else {"data_collator": collator}
    with caplog.at_level(logging.INFO, "lightpeft"):
        fast = sft(tmp_path / "fast", made(), **changes)
        fast.train()
    assert ("computed once" in caplog.text) == (data == "map" and collator is None)
    slow = sft(tmp_path / "slow", made(), **changes, **SLOWLY)
    slow.train()
    assert fast.light_plan is not None
    assert losses(fast) == pytest.approx(losses(slow), rel=1e-6)
