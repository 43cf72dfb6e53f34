"""Labels for new texts, from the command line and from Python, against the model called directly."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import refusal
from transformers import AutoTokenizer
from workbench import Workbench, labeled, lightpeft, read, write_rows

from lightpeft import load_light
from lightpeft.app.evaluation import predicting
from lightpeft.app.evaluation.predicting import predict
from lightpeft.app.evaluation.reports import evaluate_model
from lightpeft.app.runs import pipeline
from lightpeft.app.tasks.entries.task_entries import find_entry
from lightpeft.app.tasks.kinds.task_kinds import task_class
from lightpeft.app.tasks.loading import task_facts
from lightpeft.config import DataConfig

LABELS = ["negative", "positive"]
METHODS = ("light", "plain", "full")
TEXTS = [row["text"] for row in labeled(17, seed=9)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    bench = Workbench(tmp_path_factory.mktemp("predicting"))
    pipeline.run(bench.config("run"))
    return bench


@pytest.fixture(scope="module")
def expected(bench: Workbench) -> np.ndarray:
    """Probabilities from the loaded model and its tokenizer, one text at a time, without padding."""
    return direct(bench.folder / "run" / "adapter", bench.base, [(text,) for text in TEXTS])


def direct(adapter: Path, base: Path, texts: list[tuple[str, ...]]) -> np.ndarray:
    model, tokenizer = load_light(adapter, base), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        logits = [model(**tokenizer(*text, return_tensors="pt")).logits for text in texts]
    return torch.cat(logits).softmax(-1).numpy()


def check(rows: list[dict[str, Any]], expected: np.ndarray) -> None:
    probabilities = np.array([[float(row[f"p_{label}"]) for label in LABELS] for row in rows])
    assert np.allclose(probabilities, expected, atol=2e-6)
    assert np.allclose(probabilities.sum(1), 1, atol=2e-6)
    assert [row["label"] for row in rows] == [LABELS[best] for best in expected.argmax(1)]
    assert len(set(expected.argmax(1))) == 2


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_text_lines_to_standard_output(
    bench: Workbench, expected: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(TEXTS) + "\n\n", encoding="utf-8")
    assert lightpeft("predict", bench.folder / "run", source) == 0
    rows = table(capsys.readouterr().out)
    assert [row["text"] for row in rows] == TEXTS
    check(rows, expected)


def test_standard_input(
    bench: Workbench, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS)))
    assert lightpeft("predict", bench.folder / "run" / "adapter", "-", "--batch_size", "3") == 0
    written = capsys.readouterr()
    assert written.err == ""
    check(table(written.out), expected)
    assert lightpeft("predict", bench.folder / "run", "--example", json.dumps({"text": TEXTS[0]})) == 0
    (row,) = table(capsys.readouterr().out)
    assert row["label"] == LABELS[expected[0].argmax()] and row["text"] == TEXTS[0]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("output", ["csv", "jsonl"])
def test_tables_in_and_out(bench: Workbench, expected: np.ndarray, tmp_path: Path, suffix: str, output: str) -> None:
    rows = [{"id": str(number), "text": text, "label": "unknown"} for number, text in enumerate(TEXTS)]
    source = write_rows(tmp_path / f"rows.{suffix}", rows)
    target = tmp_path / "below" / f"out.{output}"
    assert lightpeft("predict", bench.folder / "run", source, "--output", target) == 0
    text = target.read_text(encoding="utf-8")
    result = table(text) if output == "csv" else [json.loads(line) for line in text.splitlines()]
    assert list(result[0]) == ["id", "text", "input_label", "label", "p_negative", "p_positive"]
    assert [row["id"] for row in result] == [row["id"] for row in rows]
    check(result, expected)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("option", ["--data.columns.text"])
def test_columns_are_called_the_same_in_predict_and_evaluate(
    bench: Workbench, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"sentence": row["text"], "label": row["label"]} for row in labeled(40, seed=2)]
    source, run = write_rows(tmp_path / "rows.csv", rows), bench.folder / "run" / "adapter"
    assert lightpeft("predict", run, source, option, "sentence", "--output", tmp_path / "out.csv") == 0
    predicted = table((tmp_path / "out.csv").read_text(encoding="utf-8"))
    right = sum(row["label"] == row["input_label"] for row in predicted) / len(predicted)
    options = ("--data.test", source, option, "sentence", "--json", tmp_path / "out.json")
    assert lightpeft("evaluate", run, *options) == 0
    assert read(tmp_path / "out.json")["model"]["metrics"]["accuracy"] == pytest.approx(right)


def test_base_that_moved(
    bench: Workbench, expected: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Path(shutil.copytree(bench.folder / "run" / "adapter", tmp_path / "adapter"))
    description = (adapter / "lightpeft.json").read_text(encoding="utf-8")
    assert str(bench.base) in description
    source = write_rows(tmp_path / "rows.csv", [{"text": text} for text in TEXTS])
    elsewhere = bench.base.rename(bench.folder / "moved_base")
    try:
        assert lightpeft("predict", adapter, source) == 2
        assert "give its name or folder: --base" in capsys.readouterr().err
        assert lightpeft("predict", adapter, source, "--base", elsewhere) == 0
        check(table(capsys.readouterr().out), expected)
    finally:
        elsewhere.rename(bench.base)


@pytest.fixture(scope="module")
def halves(bench: Workbench) -> Workbench:
    """A run of each method, in bfloat16, whose training data are gone."""
    train = shutil.copy(bench.train, bench.folder / "gone.csv")
    for method in METHODS:
        settings = {"method": method, "data.train": str(train), "training.precision": "bf16"}
        rate = {"training.learning_rate": 3e-3} if method == "full" else {}
        pipeline.run(bench.config(f"half-{method}", **settings, **rate))
    Path(train).rename(bench.folder / "elsewhere.csv")
    return bench


def probabilities(file: Path) -> np.ndarray:
    return np.array([[float(row[f"p_{label}"]) for label in LABELS] for row in table(file.read_text(encoding="utf-8"))])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_answers_as_it_was_evaluated(halves: Workbench, tmp_path: Path, method: str) -> None:
    """Whatever its method, without its training data, and in its precision unless another one is asked for."""
    run = halves.folder / f"half-{method}"
    predict(run, halves.test, output=tmp_path / "out.csv")
    rows = table((tmp_path / "out.csv").read_text(encoding="utf-8"))
    right = sum(row["label"] == row["input_label"] for row in rows) / len(rows)
    assert right == pytest.approx(read(run / "metrics.json")["metrics"]["accuracy"])
    (halves.folder / "elsewhere.csv").rename(halves.folder / "gone.csv")
    try:
        evaluate_model(run, predictions=tmp_path / "evaluated.csv")
    finally:
        (halves.folder / "gone.csv").rename(halves.folder / "elsewhere.csv")
    evaluated = table((tmp_path / "evaluated.csv").read_text(encoding="utf-8"))
    assert [row["label"] for row in rows] == [row["prediction"] for row in evaluated]
    assert len({row["label"] for row in rows}) == 2
    assert np.allclose(probabilities(tmp_path / "out.csv"), probabilities(tmp_path / "evaluated.csv"), atol=2e-6)
    for given in ((), ("--bf16",)):
        assert lightpeft("predict", run, halves.test, *given, "--output", tmp_path / "half.csv") == 0
        assert (probabilities(tmp_path / "half.csv") == probabilities(tmp_path / "out.csv")).all()
    assert lightpeft("predict", run, halves.test, "--no_bf16", "--output", tmp_path / "whole.csv") == 0
    difference = np.abs(probabilities(tmp_path / "whole.csv") - probabilities(tmp_path / "out.csv")).max()
    assert 1e-5 < difference < 0.1


def test_a_run_that_says_nothing_of_its_task(halves: Workbench, tmp_path: Path) -> None:
    """As earlier versions left those of methods plain and full; and no adapter of PEFT says anything."""
    run = Path(shutil.copytree(halves.folder / "half-plain", tmp_path / "run"))
    for silent in (run / "adapter", run):
        (run / "task.json").unlink(missing_ok=True)
        text = refusal(lambda at=silent: predict(at, halves.test, output=tmp_path / "out.csv"))
        assert "does not name its task" in text
    (run / "task.json").write_text("{}", encoding="utf-8")
    assert "task.json" in refusal(lambda: predict(run, halves.test, output=tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()


def test_pairs(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    pairs = [{**row, "second": other["text"]} for row, other in zip(labeled(40), labeled(40, seed=3), strict=True)]
    train = write_rows(tmp_path / "pairs.csv", pairs)
    changes = {"data.train": str(train), "data.test": None, "data.columns.text_pair": "second"}
    pipeline.run(bench.config("pairs", **changes))
    source = write_rows(tmp_path / "new.jsonl", [{"text": row["text"], "second": row["second"]} for row in pairs[:6]])
    predict(tmp_path / "pairs", source, output=tmp_path / "out.csv")
    rows = table((tmp_path / "out.csv").read_text(encoding="utf-8"))
    texts = [(row["text"], row["second"]) for row in pairs[:6]]
    expected = direct(tmp_path / "pairs" / "adapter", bench.base, texts)
    assert np.allclose([float(row["p_positive"]) for row in rows], expected[:, 1], atol=2e-6)


def test_columns_of_a_task_that_converts_its_rows_are_its_own() -> None:
    none, config = Dataset.from_dict({}), DataConfig(task="multirc")
    entry = find_entry(config, {})
    task = task_class(entry.kind, "likelihood", None)(config, none, none, list(entry.labels), entry)
    found = SimpleNamespace(name="adapter", kind="light adapter", facts=task_facts(task))
    line = refusal(lambda: predicting._restore_trained_task(found, {"text": "body"}, None))  # type: ignore[arg-type]
    assert line == "text: task multirc has no such column; leave it out"


def test_another_text_column_by_likelihood(tmp_path: Path) -> None:
    """A language model that scores label words takes its texts from any column, as a head does."""
    bench = Workbench(tmp_path, "llama")
    words = {"positive": "good0", "negative": "bad0"}  # labels that the tokenizer knows
    write_rows(bench.train, [{**row, "label": words[row["label"]]} for row in labeled(64)])
    pipeline.run(
        bench.config(
            "run",
            **{
                "data.answer": "likelihood",
                "data.test": None,
            },
        )
    )
    answers = {}
    for column in ("text", "body"):
        write_rows(tmp_path / f"{column}.jsonl", [{column: text} for text in TEXTS])
        output = tmp_path / f"{column}_answers.csv"
        predict(bench.folder / "run" / "adapter", tmp_path / f"{column}.jsonl", output, text=column)
        answers[column] = [row["p_good0"] for row in table(output.read_text(encoding="utf-8"))]
    assert answers["body"] == answers["text"] and len(set(answers["text"])) > 1
