"""A kind of task is one class and one line: here is one that lightpeft does not have, from its rows to predictions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import TaskType
from questions import write_jsonl
from tiny import refusal
from torch import Tensor
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, PreTrainedTokenizerBase
from workbench import BAD, GOOD, NEUTRAL, Workbench, lightpeft, read

from lightpeft.app.evaluation.reports import evaluate_model
from lightpeft.app.tasks.answers import Columns, Outcome, answers_of, require_finite
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.task_kinds import TASK_KINDS
from lightpeft.app.tasks.loading import load_task, run_settings, task_facts
from lightpeft.app.tasks.respondent import Respondent
from lightpeft.app.tasks.rows.columns import check_strings, values
from lightpeft.app.tasks.tokens import Collator, in_chunks
from lightpeft.config import DataConfig, TaskEntry
from lightpeft.errors import require
from lightpeft.models.batches import IGNORED
from lightpeft.models.task_heads import TaskHead

# -- the kind's module -------------------------------------------------------------------------------------------------

INPUTS = ("input_ids", "attention_mask", "labels")


class TaggingTask(Task):
    """The tag of one word among others: rows have `words`, the `place` of the word from 0 on, and its `tag`."""

    head: ClassVar[TaskHead] = TaskHead(
        "tagging", AutoModelForTokenClassification, TaskType.TOKEN_CLS, outputs="classes"
    )
    columns: ClassVar[tuple[str, ...]] = ("words", "place", "tag")
    targets: ClassVar[tuple[str, ...]] = ("tag",)
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        cls.check_inputs(rows, entry, what)
        check_strings(rows, "tag", entry, what)

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        for (where, place), words in zip(values(rows, "place", entry, what), rows["words"], strict=True):
            require(0 <= place < len(words), f"{where}: there is no word {place} among {len(words)}")

    @classmethod
    def label_set(cls, rows: Dataset, entry: TaskEntry) -> list[str]:
        return sorted(set(rows["tag"]))

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        encoded = self.encode_inputs(rows, tokenizer)
        labels = [[IGNORED] * len(ids) for ids in encoded["input_ids"]]
        for of_row, token, tag in zip(labels, encoded["token"], rows["tag"], strict=True):
            of_row[token] = self.labels.index(tag)
        return encoded.add_column("labels", labels)

    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            made = tokenizer(
                chunk["words"], is_split_into_words=True, truncation=True, max_length=self.config.max_length
            )
            tokens = [made.word_ids(row).index(place) for row, place in enumerate(chunk["place"])]
            return {**{name: made[name] for name in INPUTS if name in made}, "token": tokens}

        return in_chunks(rows, encode)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        pad = DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=multiple_of)
        return Collator(lambda rows: dict(pad([{name: row[name] for name in INPUTS if name in row} for row in rows])))

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        pairs = zip(encoded["labels"], encoded["token"], strict=True)
        right = [labels[token] for labels, token in pairs]
        return Outcome(answers_of(encoded, self._logits(respondent, encoded).argmax(-1).tolist(), right))

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        return {"tag": [self.labels[best] for best in self._logits(respondent, encoded).argmax(-1).tolist()]}

    def _logits(self, respondent: Respondent, encoded: Dataset) -> Tensor:
        """Float32 [rows, tags]."""
        logits = torch.empty(len(encoded), len(self.labels))
        for rows, _, output in respondent.outputs(encoded, "Tagging"):
            for of_batch, row in zip(output.logits.float().cpu(), rows, strict=True):
                logits[row] = of_batch[encoded["token"][row]]
        require_finite(np.asarray(logits.isfinite().all(-1)))
        return logits


# -- and its line in the registry --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASK_KINDS, "tagging", TaggingTask)
        yield


def tagged(count: int, seed: int) -> list[dict[str, Any]]:
    """Words of both tags among others, of which the one at `place` counts."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        words = [*draw.choices(NEUTRAL, k=5), draw.choice(GOOD), draw.choice(BAD)]
        draw.shuffle(words)
        wanted = GOOD if index % 2 else BAD
        place = next(number for number, word in enumerate(words) if word in wanted)
        rows.append({"words": words, "place": place, "tag": "good" if index % 2 else "bad"})
    return rows


@pytest.fixture(scope="module")
def bench(registered: None, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """With a light run."""
    bench = Workbench(tmp_path_factory.mktemp("tagging"))
    for name, rows in {"train": tagged(96, 1), "test": tagged(40, 2)}.items():
        write_jsonl(bench.folder / f"{name}.jsonl", rows)
    assert lightpeft("run", "--config", bench.yaml("run", **settings(bench))) == 0
    return bench


def settings(bench: Workbench, **more: Any) -> dict[str, Any]:
    files = {f"data.{name}": str(bench.folder / f"{name}.jsonl") for name in ("train", "test")}
    return {"data.task": "tagging", **files, "training.epochs": 6, **more}


def test_a_light_run_evaluates_predicts_and_exports(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    report = read(bench.folder / "run" / "metrics.json")
    assert report["main_metric"] == "accuracy" and report["metrics"]["accuracy"] > 0.9
    assert report["parameters"]["base_removed_ratio"] > 0
    assert report["milestones"]["metrics"]["majority_baseline"] == {"accuracy": 0.5}

    adapter, test, merged = (str(bench.folder / name) for name in ("run/adapter", "test.jsonl", "merged"))
    written = bench.folder / "tags.jsonl"
    assert lightpeft("predict", adapter, test, "--output", written) == 0
    rows = Dataset.from_json(str(written)).to_list()
    hits = [row["tag"] == row["input_tag"] for row in rows]
    assert sum(hits) / len(hits) == report["metrics"]["accuracy"]

    assert lightpeft("export", adapter, merged) == 0
    for model in (adapter, merged):
        answers = bench.folder / "answers.csv"
        options = ("--data.test", test, "--predictions", answers, "--json", bench.folder / "report.json")
        assert lightpeft("evaluate", model, *options) == 0, capsys.readouterr().err
        assert read(bench.folder / "report.json")["model"]["metrics"] == report["metrics"]
        assert answers.read_text(encoding="utf-8").splitlines()[0].endswith("reference,prediction")


def test_rows_that_lack_a_class_count_the_model_s_classes(bench: Workbench) -> None:
    test = write_jsonl(bench.folder / "good.jsonl", [row for row in tagged(40, 2) if row["tag"] == "good"])
    adapter = bench.folder / "run" / "adapter"
    report = evaluate_model(adapter, {"data": {"test": str(test)}})
    assert report["examples"] == 20 and report["model"]["metrics"]["accuracy"] > 0.8


def test_its_rows_are_checked_and_its_columns_named(bench: Workbench) -> None:
    bad = write_jsonl(bench.folder / "bad.jsonl", [{"w": ["word0"], "place": 3, "tag": "good"}] * 4)
    config = DataConfig(task="tagging", train=str(bad))
    line = refusal(lambda: load_task(config))
    assert 'data.columns.words is "words", but' in line and "has only the columns w, place, tag" in line
    line = refusal(lambda: load_task(replace(config, columns={"words": "w"})))
    assert 'row 1 (the header not counted), column "place": there is no word 3 among 1' in line
    line = refusal(lambda: load_task(DataConfig(task="rte", columns={"tag": "label"})))
    assert "data.columns is only for kinds, and task rte has its own columns" in line


def test_its_facts_name_it_again(bench: Workbench) -> None:
    task = load_task(bench.config("facts", **settings(bench)).data)
    said = run_settings(task_facts(task))["data"]
    assert (said["task"], said["answer"]) == ("tagging", "head")
    assert said["columns"] == {name: name for name in ("words", "place", "tag")}


def test_a_name_close_to_it_is_no_kind() -> None:
    assert 'did you mean "tagging"?' in refusal(lambda: load_task(DataConfig(task="taging", train="rows.csv")))
