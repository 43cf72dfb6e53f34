"""Few rows: a logistic regression on the untouched base's states stands beside a run; a line says if it is as good."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from lanes import thorough
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer, BertConfig, LlamaConfig, T5Config
from workbench import Workbench, labeled, lightpeft, read, save_base, tokenizer_of_word_pieces, write_rows

from lightpeft.app.evaluation import linear_probe
from lightpeft.app.evaluation.scores import Scores
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.report.facts import read_run
from lightpeft.app.runs.report.page import page
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.classification import ClassificationByLikelihood, ClassificationTask
from lightpeft.app.tasks.kinds.regression import RegressionTask
from lightpeft.config import DataConfig
from lightpeft.errors import LightPeftError

UNTAUGHT: dict[str, Any] = {"training.learning_rate": 1e-9, "training.epochs": 2}
"""A run that learns nothing."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    bench = Workbench(tmp_path_factory.mktemp("probe"))
    save_base(bench.base, tokenizer=tokenizer_of_word_pieces())
    return bench


def embedded(bench: Workbench, texts: Sequence[str]) -> np.ndarray:
    """Means of the untouched base's last states, a text at a time."""
    model, tokenizer = AutoModel.from_pretrained(bench.base).eval(), AutoTokenizer.from_pretrained(bench.base)
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    return torch.stack([each.mean(0) for each in states]).numpy()


@pytest.fixture(scope="module")
def by_hand(bench: Workbench) -> float:
    """Accuracy of the same regression, in scikit-learn's own words."""
    rows = {"train": labeled(64, seed=1), "test": labeled(40, seed=2)}
    x = {name: embedded(bench, [row["text"] for row in of]) for name, of in rows.items()}
    y = {name: [row["label"] for row in of] for name, of in rows.items()}
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    strengths = {"logisticregression__C": [1e-4, 1e-3, 1e-2, 0.1, 1, 10]}
    search = GridSearchCV(model, strengths, cv=StratifiedKFold(5, shuffle=True, random_state=0))
    return float(search.fit(x["train"], y["train"]).score(x["test"], y["test"]))


def test_a_probe_that_wins_is_said(bench: Workbench, by_hand: float, capsys: pytest.CaptureFixture[str]) -> None:
    """In the file, in the table, on stderr and on the page; and it is what scikit-learn says."""
    assert lightpeft("run", "--config", bench.yaml("untaught", **UNTAUGHT)) == 0
    said = capsys.readouterr()
    folder = bench.folder / "untaught"
    report = read(folder / "metrics.json")
    probe, own = report["linear_probe"], report["metrics"]["accuracy"]
    assert probe.keys() == {"metrics", "intervals", "seconds"} and probe["seconds"] > 0
    assert list(probe["metrics"]) == list(report["metrics"]) and probe["intervals"].keys() == report["intervals"].keys()
    accuracy, (low, high) = probe["metrics"]["accuracy"], probe["intervals"]["accuracy"]
    assert accuracy == pytest.approx(by_hand) and low <= accuracy <= high and accuracy > own + 0.2
    values = f"accuracy {accuracy:.4f}, the run {own:.4f}, from 64 rows in "
    (line,) = [line for line in report["warnings"] if "linear probe" in line]
    assert line.startswith(f"a linear probe of the base model is as good: {values}")
    assert f"warning: {line}" in said.err.splitlines()
    (row,) = [line for line in said.out.splitlines() if "linear probe, accuracy" in line]
    assert f"{accuracy:.4f}" in row and f"{low:.4f} to {high:.4f}" in row
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert line in next(entry for entry in log if entry["stage"] == "evaluate")["warnings"]
    text = page([read_run(folder)])
    row = f"{100 * accuracy:.1f}%</td><td>{100 * low:.1f} to {100 * high:.1f}"
    assert f"accuracy of a linear probe of the base</th><td>{row}" in text


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "plain"},
        pytest.param({"method": "full"}, marks=thorough),
        {"light.remove.vocabulary": "task"},
        {"model.low_memory": True},
        pytest.param({"light.after.keep": "full"}, marks=thorough),
    ],
    ids=str,
)
def test_it_is_the_same_whatever_the_run_does(settings: dict[str, Any], bench: Workbench, by_hand: float) -> None:
    name = "_".join(f"{key}_{value}" for key, value in settings.items())
    found = pipeline.run(bench.config(name, **{**UNTAUGHT, **settings}))["linear_probe"]
    assert found["metrics"]["accuracy"] == pytest.approx(by_hand)


def test_pairs(tmp_path: Path) -> None:
    """The second text tells the classes apart, and the first one does not."""
    bench = Workbench(tmp_path)
    for file, count, seed in ((bench.train, 64, 1), (bench.test, 40, 2)):
        rows = labeled(count, seed)
        write_rows(file, [{"first": "word1 word2", "second": row["text"], "label": row["label"]} for row in rows])
    columns = {"text": "first", "text_pair": "second", "label": "label"}
    found = pipeline.run(bench.config("run", **UNTAUGHT, **{"data.columns": columns}))["linear_probe"]
    assert found["metrics"]["accuracy"] > 0.8


def test_texts_are_means_over_their_own_tokens(bench: Workbench) -> None:
    """Whatever is padded beside them; the base stays in the mode that it was in."""
    work = pipeline.prepare(bench.config("states"))
    base = work.dense_model().model.train()
    asked = replace(work.respondent(base), model=base.base_model)
    rows = linear_probe._embed(asked, work.test_rows)
    assert np.allclose(rows, embedded(bench, [row["text"] for row in labeled(40, seed=2)]), atol=0.02)
    assert base.base_model.training


# -- where there is none -----------------------------------------------------------------------------------------------


def test_from_a_thousand_rows_on_there_is_none(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_probe, "FEW_ROWS", 64)
    result = pipeline.run(bench.config("enough", **UNTAUGHT))
    assert "linear_probe" not in result and not any("probe" in line for line in result["warnings"])
    assert "linear probe" not in page([read_run(bench.folder / "enough")])


def task_of(kind: type[Task], rows: int) -> Task:
    return kind(DataConfig(train="unused"), Dataset.from_dict({"n": range(rows)}), Dataset.from_dict({}), ["no", "yes"])


@pytest.mark.parametrize(
    ("kind", "rows", "config", "probed"),
    [
        (ClassificationTask, 999, BertConfig(), True),
        (ClassificationTask, 1000, BertConfig(), False),
        (ClassificationTask, 999, LlamaConfig(), False),
        (ClassificationTask, 999, T5Config(), False),
        (ClassificationByLikelihood, 999, LlamaConfig(), False),
        (RegressionTask, 999, BertConfig(), False),
    ],
)
def test_which_runs_have_one(kind: type[Task], rows: int, config: Any, probed: bool) -> None:
    assert linear_probe.is_probed(task_of(kind, rows), config) == probed


def test_what_keeps_it_from_that_ends_no_run(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Any:
        raise LightPeftError("hidden states are NaN or infinite")

    monkeypatch.setattr(pipeline, "linear_probe", fails)
    result = pipeline.run(bench.config("failed", **UNTAUGHT))
    assert "linear_probe" not in result and "accuracy" in result["metrics"]
    assert "linear probe: hidden states are NaN or infinite" in result["warnings"]


def test_states_that_are_no_numbers_are_refused(bench: Workbench) -> None:
    work = pipeline.prepare(bench.config("broken"))
    base = work.dense_model().model
    base.base_model.encoder.layer[0].output.dense.weight.data.fill_(float("nan"))
    with pytest.raises(LightPeftError, match="hidden states of the base model are NaN or infinite"):
        linear_probe.linear_probe(work.respondent(base), base, work.task, work.train_rows, work.test_rows)


# -- what is said and fitted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "run", "said"), [(0.8, 0.8, True), (0.81, 0.8, True), (0.79, 0.8, False), (0.5, 0.5, False)]
)
def test_the_line_is_said_of_probes_that_are_as_good(own: float, run: float, said: bool) -> None:
    probe = linear_probe.LinearProbe(Scores({"accuracy": own}, {}), 1.0, 64)
    lines = list(probe.doubts(Scores({"accuracy": run}, {}), task_of(ClassificationTask, 64), {"accuracy": 0.5}))
    assert len(lines) == said


@pytest.mark.parametrize("counts", [[1, 1], [5, 1], [2, 1, 1], [3, 2], [2, 2, 2], [40, 3, 1]])
def test_classes_may_be_rare(counts: Sequence[int]) -> None:
    """Down to a row a class, rows far apart by class are told apart."""
    labels = [number for number, count in enumerate(counts) for _ in range(count)]
    places = 50 * np.eye(len(counts), dtype=np.float32)[labels]
    noise = np.random.default_rng(0).normal(size=places.shape).astype(np.float32)
    fitted = linear_probe._fit_regression(places + noise, labels)
    assert fitted.predict(50 * np.eye(len(counts))).tolist() == list(range(len(counts)))


def test_a_class_that_no_training_row_has_has_a_finite_loss(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    rows = [row | {"label": "neither"} for row in labeled(2, seed=3)]
    write_rows(bench.train, [*labeled(30, seed=1), *rows])
    write_rows(bench.test, labeled(40, seed=2))
    work = pipeline.prepare(bench.config("run"))
    base, some = work.dense_model().model, work.train_rows.filter(lambda row: row["labels"] != 1)
    found = linear_probe.linear_probe(work.respondent(base), base, work.task, some, work.test_rows)
    assert work.task.labels == ["negative", "neither", "positive"] and np.isfinite(found.scores.metrics["loss"])
