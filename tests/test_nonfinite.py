"""Answers that are no numbers: every way of answering says which rows they are, and nothing is written of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lanes import telling
from questions import write_jsonl
from safetensors.torch import load_file, save_file
from tiny import refusal
from workbench import NEUTRAL, NOTICE, SPECIAL, Workbench, labeled, lightpeft, save_base, write_rows

from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.tasks.answers import require_finite
from lightpeft.app.tasks.loading import load_task
from lightpeft.config import DataConfig, ModelConfig, TaskEntry
from lightpeft.models.loading import load_model
from lightpeft.models.tokenizers import load_tokenizer

POISON = NEUTRAL[7]
"""A word whose embedding is NaN, so that only rows which have it overflow, as rare rows do in half precision."""
SAFE = NEUTRAL[8]


def poisoned(base: Path) -> Path:
    """The base, with the embedding of `POISON` gone."""
    file = base / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(("word_embeddings.weight", "embed_tokens.weight")))
    weights[name][len(SPECIAL) + NEUTRAL.index(POISON)] = torch.nan
    save_file(weights, file, {"format": "pt"})
    return base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: poisoned(save_base(folder / family, family)) for family in ("bert", "llama")}


def words(number: int) -> str:
    """Rows 2 and 5, of numbers from 0, have the word."""
    return f"{NEUTRAL[number]} {POISON if number in (2, 5) else SAFE}"


MAKE: dict[str, Callable[[int], dict[str, Any]]] = {
    "classification": lambda n: {"text": words(n), "label": "ab"[n % 2]},
    "regression": lambda n: {"text": words(n), "label": float(n)},
    "multiple-choice": lambda n: {"context": words(n), "options": ["good0", "bad0", "bad1"][: 2 + n % 2], "answer": 0},
    "span": lambda n: {"question": "word0", "context": f"{words(n)} good0", "answers": ["good0"]},
    "generation": lambda n: {"question": words(n), "answers": ["good0"]},
    "causal-lm": lambda n: {"prompt": words(n), "completion": "good0 good1"},
}


@pytest.mark.parametrize(
    ("kind", "family", "answer"),
    [
        ("classification", "bert", "head"),
        ("regression", "bert", "head"),
        ("multiple-choice", "bert", "head"),
        ("span", "bert", "head"),
        ("classification", "llama", "head"),
        ("classification", "llama", "likelihood"),
        ("multiple-choice", "llama", "likelihood"),
        ("generation", "llama", "head"),
        ("causal-lm", "llama", "head"),
    ],
)
@telling("batch_size", [1, 3], [3])
def test_every_way_of_answering_names_the_rows(
    bases: dict[str, Path], tmp_path: Path, kind: Any, family: str, answer: Any, batch_size: int
) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows := [MAKE[kind](n) for n in range(7)])
    write_jsonl(tmp_path / "test.jsonl", rows)
    config = DataConfig(task="mine", answer=answer, max_length=40, answer_tokens=4)
    task = load_task(config, None, {"mine": TaskEntry(kind=kind, path=str(tmp_path), test="test")})
    model = ModelConfig(name=str(bases[family]))
    tokenizer = load_tokenizer(model)
    live = load_model(model, task.head, task.labels).model
    encoded = task.encode_test(task.test, tokenizer)
    line = refusal(lambda: task.answer(BatchedModel(live, task.collator(tokenizer), batch_size), encoded))
    assert "answers to 2 of 7 rows are NaN or infinite (row 3, 6);" in line
    assert "float32" in line and "lower learning rate" in line


def test_only_the_first_rows_are_named() -> None:
    require_finite([True] * 9)
    require_finite(np.array([True]))
    assert "20 of 21 rows are NaN or infinite (row 2, 3, 4, 5, 6, ...);" in refusal(
        lambda: require_finite([True, *[False] * 20])
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """Only one test row, number 2, has the word."""
    bench = Workbench(tmp_path_factory.mktemp("nonfinite"))
    poisoned(bench.base)
    for path, count in ((bench.train, 64), (bench.test, 40)):
        rows = [{**row, "text": row["text"].replace(POISON, SAFE)} for row in labeled(count)]
        write_rows(path, rows)
    write_rows(bench.folder / "clean.csv", rows)
    rows[1]["text"] += f" {POISON}"
    write_rows(bench.test, rows)
    return bench


def test_a_run_says_so_and_so_does_the_same_command_again(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    file = bench.yaml("met")
    for _ in range(2):
        assert lightpeft("run", "--config", file) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if not NOTICE.match(line)]
        assert len(error) == 1
        assert "answers to 1 of 40 rows are NaN or infinite (row 2);" in error[0]
    assert (bench.folder / "met" / "adapter" / "lightpeft.json").is_file()
    assert not (bench.folder / "met" / "metrics.json").exists()


def test_evaluate_and_predict_refuse_such_answers(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    clean = bench.folder / "clean.csv"
    assert lightpeft("run", "--config", bench.yaml("unmet", **{"data.test": str(clean)})) == 0
    answers, report = bench.folder / "answers.csv", bench.folder / "report.json"
    capsys.readouterr()
    adapter = bench.folder / "unmet" / "adapter"
    for command in (
        ("evaluate", adapter, "--data.test", bench.test, "--json", report),
        ("predict", adapter, bench.test, "--output", answers),
    ):
        assert lightpeft(*command) == 2
        written = capsys.readouterr()
        assert "1 of 40 rows are NaN or infinite (row 2);" in written.err and written.err.count("\n") == 1
        assert written.out == ""
    assert not answers.exists() and not report.exists()
    assert lightpeft("predict", adapter, clean, "--output", answers) == 0
    assert lightpeft("evaluate", adapter, "--data.test", clean) == 0
