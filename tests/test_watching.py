"""What a run says of its own course: the same rows at every turn, nothing of the run changed, and doubts said aloud."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from workbench import Workbench, comparable, lightpeft, read

from lightpeft.app.evaluation.milestones import (
    LEAST_SAMPLED_ROWS,
    MOST_GENERATED_ROWS,
    MOST_SAMPLED_ROWS,
    Watcher,
    course,
    doubts,
    doubts_of_run,
    majority_answers,
    majority_score,
    notices,
    sample,
)
from lightpeft.app.evaluation.reports import evaluate_model
from lightpeft.app.evaluation.statistics import bootstrap_intervals
from lightpeft.app.folders.results import open_peft
from lightpeft.app.runs import pipeline
from lightpeft.app.tasks.answers import Answers, Outcome
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.causal import CausalLMTask
from lightpeft.app.tasks.kinds.classification import ClassificationTask
from lightpeft.app.tasks.kinds.generation import GenerationTask
from lightpeft.app.tasks.kinds.regression import RegressionTask
from lightpeft.app.tasks.kinds.span import SpanTask
from lightpeft.config import DataConfig
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.estimation_record import EstimationRecord

FEW: dict[str, Any] = {}
"""Runs this short estimate on few examples."""


def task_of(kind: type[Task], labels: Sequence[str] = (), rows: int = 4) -> Task:
    numbered = Dataset.from_dict({"number": list(range(rows))})
    return kind(DataConfig(train="unused"), numbered, numbered, list(labels))


CLASSES = task_of(ClassificationTask, ["no", "yes"])


# -- what a model is held against ----------------------------------------------------------------------------------


class TestConstantAnswers:
    @pytest.mark.parametrize(
        ("references", "best"),
        [
            ([1, 0, 1], 1),
            ([1.0, 2.0, 6.0], 3.0),
            ([["a", "b"], ["b"], ["a"]], "a"),
            ([[], [], ["a"]], ""),
            (["x", "y", "y"], "y"),
        ],
    )
    def test_the_best_of_them(self, references: list[Any], best: Any) -> None:
        constant = majority_answers(Answers(references, references))
        assert constant is not None and list(constant.predictions) == [best] * 3
        assert constant.references == references

    def test_language_modeling_has_none(self) -> None:
        answers = Answers([(1.0, 2.0, 3.0)], [None])
        assert majority_answers(answers) is None
        assert majority_score(answers, task_of(CausalLMTask)) == {}

    def test_a_metric_that_these_rows_do_not_have(self) -> None:
        task = task_of(SpanTask)
        task.entry = replace(task.entry, metrics=["answerability"])
        assert majority_score(Answers(["", "a"], [[], []]), task) == {}

    def test_classes_that_no_row_has_count_too(self) -> None:
        """F1 of three classes is a mean over them, whichever are right somewhere."""
        task = task_of(ClassificationTask, ["a", "b", "c"])
        answers = Answers([0, 1, 1], [0, 0, 1], None, np.eye(3, dtype=np.float32)[[0, 1, 1]])
        constant = majority_answers(answers)
        assert constant is not None and constant.probabilities is not None
        assert constant.probabilities.tolist() == [[1, 0, 0]] * 3
        assert majority_score(answers, task) == {"accuracy": 2 / 3}


class TestSample:
    @pytest.mark.parametrize(
        ("kind", "rows", "trained", "chosen"),
        [
            (ClassificationTask, 1000, 24_000, MOST_SAMPLED_ROWS),
            (ClassificationTask, 1000, 2_000, 100),
            (ClassificationTask, 1000, 640, LEAST_SAMPLED_ROWS),
            (GenerationTask, 1000, 640, MOST_GENERATED_ROWS),
            (ClassificationTask, 7, 640, 7),
        ],
    )
    def test_so_many_rows_and_always_the_same(self, kind: type[Task], rows: int, trained: int, chosen: int) -> None:
        """The shorter the run, the fewer rows, so that they take a small part of its time."""
        state = torch.get_rng_state()
        first, again = (sample(task_of(kind, rows=rows), trained)["number"][:] for _ in range(2))
        assert first == again == sorted(set(first)) and len(first) == chosen
        assert chosen == rows or first != list(range(chosen))
        assert torch.get_rng_state().equal(state)


# -- doubts --------------------------------------------------------------------------------------------------------


def told(answers: Answers, task: Task) -> list[str]:
    intervals = bootstrap_intervals(answers, *task.measures)
    return list(doubts(answers, task, intervals[task.main_metric]))


def classes(right: int, wrong: int, task: Task = CLASSES) -> Answers:
    """Half of the rows are of either class."""
    references = [number % 2 for number in range(right + wrong)]
    return Answers([r if n < right else 1 - r for n, r in enumerate(references)], references)


class TestDoubts:
    def test_a_good_model_raises_none(self) -> None:
        assert told(classes(80, 20), CLASSES) == []

    def test_no_better_than_a_constant_answer(self) -> None:
        (line,) = told(classes(55, 45), CLASSES)
        assert line.startswith("accuracy 0.5500 (95% interval 0.4")
        assert ' is no better than the majority baseline 0.5000 (always "no"); train longer' in line

    def test_worse_than_a_constant_answer(self) -> None:
        (line,) = told(classes(20, 80), CLASSES)
        assert (
            line.startswith("accuracy 0.2000 ")
            and ' is worse than the majority baseline 0.5000 (always "no"); ' in line
        )

    def test_one_class_alone(self) -> None:
        (line,) = told(Answers([1] * 40, [0, 1] * 20), CLASSES)
        assert line.startswith('all 40 test rows are answered "yes"; train longer')

    @pytest.mark.parametrize("references", [[0, 1, 1, 1], [1] * 40, [0] + [1] * 199])
    def test_one_class_alone_may_be_right(self, references: list[int]) -> None:
        """Rows are few, all of that class, or nearly all: a model that is right as often may well answer so."""
        assert not [
            line for line in told(Answers([1] * len(references), references), CLASSES) if "are answered" in line
        ]

    def test_less_is_better_of_errors(self) -> None:
        task = task_of(RegressionTask)
        task.entry.metrics = ["mse"]
        right = [float(number) for number in range(40)]
        assert told(Answers([value + 1 for value in right], right), task) == []
        (line,) = told(Answers([value + 50 for value in right], right), task)
        assert " is worse than the majority baseline 133.2500 (always the mean, 19.5); " in line

    def test_language_modeling_and_single_rows_tell_nothing(self) -> None:
        assert told(Answers([(1.0, 2.0, 3.0)] * 3, [None] * 3), task_of(CausalLMTask)) == []
        assert told(classes(0, 1), CLASSES) == []


def watcher(**answers: Answers) -> Watcher:
    outcomes = {moment: Outcome(of_then) for moment, of_then in answers.items()}
    return Watcher(CLASSES, Dataset.from_dict({}), 100, lambda model: pytest.fail("asked"), outcomes)


class TestDoubtsOfRun:
    def test_worse_than_the_untouched_base(self) -> None:
        before, after = classes(80, 20), classes(60, 40)
        (line,) = doubts_of_run(watcher(base_model=before, final=after), {})
        assert line.startswith("accuracy 0.6000 on 100 test rows is worse than the base model's 0.8000 (p = ")
        assert line.endswith("; use a lower learning rate, or cut less (light.remove.blocks)")
        assert list(doubts_of_run(watcher(base_model=after, final=before), {})) == []
        assert list(doubts_of_run(watcher(base_model=before, final=classes(78, 22)), {})) == []  # by chance

    @pytest.mark.parametrize(
        ("losses", "accuracies", "said"),
        [
            ((0.5, 0.7, 0.6), (0.8, 0.7), True),
            ((0.5, 0.7, 0.6), (0.8, 0.8), True),
            ((0.5, 0.7, 0.6), (0.8, 0.9), False),  # surer of fewer mistakes
            ((0.5, 0.7, 0.51), (0.8, 0.7), False),  # brought back
            ((0.5, 0.51, 0.7), (0.8, 0.7), False),  # not by the cut
        ],
    )
    def test_a_loss_that_the_cut_raised(
        self, losses: tuple[float, ...], accuracies: tuple[float, float], said: bool
    ) -> None:
        before, after = accuracies
        moments = zip(("after_estimation", "after_pruning", "final"), losses, (before, after, after), strict=True)
        milestones = {name: {"accuracy": accuracy, "loss": loss} for name, loss, accuracy in moments}
        lines = list(doubts_of_run(watcher(final=classes(80, 20)), milestones))
        assert len(lines) == said
        if said:
            assert (
                "the cut raised the loss on 100 test rows from 0.5000 to 0.7000, and training left it at 0.6000; "
                in lines[0]
            )

    def test_a_loss_that_fewer_modules_raised(self) -> None:
        losses = {"after_estimation": 0.5, "after_pruning_modules": 0.7, "final": 0.6}
        milestones = {name: {"accuracy": 0.8, "loss": loss} for name, loss in losses.items()}
        (line,) = doubts_of_run(watcher(final=classes(80, 20)), milestones)
        assert line.startswith("the cut of PEFT modules raised the loss on 100 test rows from 0.5000 to 0.7000")
        assert "light.modules" in line and "light.remove.blocks" not in line


class TestCourse:
    def test_of_all_stages_in_order(self) -> None:
        earlier = [
            {"stage": "train", "done": True},
            {"stage": "prune", "milestones": {"after_pruning": {"loss": 2.0}, "after_estimation": {"loss": 1.0}}},
        ]
        found = course(watcher(final=classes(3, 1)), earlier)
        assert list(found) == ["majority_baseline", "after_estimation", "after_pruning", "final"]
        assert found["final"] == {"accuracy": 0.75} and found["majority_baseline"] == {"accuracy": 0.5}

    @pytest.mark.parametrize("entry", [{}, {"warnings": 5}, {"warnings": None}, {"warnings": ["of the cut"]}])
    def test_warnings_of_earlier_stages(self, entry: dict[str, Any]) -> None:
        answers = classes(80, 20)
        found = notices(watcher(final=answers), [entry], answers, bootstrap_intervals(answers, *CLASSES.measures))
        assert found["warnings"] == (["of the cut"] if entry.get("warnings") == ["of the cut"] else [])


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    bench = Workbench(tmp_path_factory.mktemp("watching"))
    pipeline.run(bench.config("light", **FEW))
    return bench


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("language"), "llama", "causal-lm")


def milestones(folder: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = read(folder / "metrics.json")["milestones"]["metrics"]
    return found


def test_every_number_is_that_of_the_model_then(bench: Workbench) -> None:
    folder = bench.folder / "light"
    found = milestones(folder)
    assert list(found) == ["majority_baseline", "after_estimation", "after_pruning", "final"]
    assert found["majority_baseline"] == {"accuracy": 0.5}
    metrics = read(folder / "metrics.json")["metrics"]
    assert found["final"] == {name: metrics[name] for name in ("accuracy", "loss")}
    cut = evaluate_model(folder / "pruned", {"data": {"test": str(bench.test), "max_length": 32}})["model"]["metrics"]
    assert found["after_pruning"] == pytest.approx({name: cut[name] for name in ("accuracy", "loss")})
    work = pipeline.prepare(bench.config("light", **FEW))
    dense = open_peft(folder / "estimation" / "adapter", work.dense_model().model)
    before = pipeline.measure(work, dense)[""].answers
    assert found["after_estimation"]["loss"] == pytest.approx(before.scores["loss"].mean())


def test_watching_changes_nothing(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watcher, "look", lambda self, name, model: None)
    pipeline.run(bench.config("unwatched", **FEW))
    assert comparable(bench.folder / "unwatched") == comparable(bench.folder / "light")


@pytest.mark.parametrize("method", ["light", "plain", "full"])
def test_a_base_that_can_answer_is_asked(llama: Workbench, method: str) -> None:
    """The language-modeling head needs no training to answer."""
    pipeline.run(llama.config(method, method=method, **FEW))
    found = milestones(llama.folder / method)
    between = ["after_estimation", "after_pruning"] if method == "light" else []
    assert list(found) == ["base_model", *between, "final"]
    columns = {"prompt": "prompt", "completion": "completion"}
    data = {"task": "causal-lm", "test": str(llama.test), "columns": columns}
    base = evaluate_model(llama.base, {"data": {**data, "max_length": 32}})["model"]["metrics"]
    assert found["base_model"] == pytest.approx({name: base[name] for name in ("perplexity", "loss")})
    assert found["final"]["loss"] < found["base_model"]["loss"]


def test_a_cut_by_scores_that_know_nothing_says_so_at_once(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightpeft.prune.learning.FEWEST_TELLING", 1)
    slow = {"training.learning_rate": 1e-9}
    assert lightpeft("run", "--config", bench.yaml("blind", **FEW, **slow)) == 0
    before_training = capsys.readouterr().err.partition("train: done")[0]
    (line,) = [line for line in before_training.splitlines() if "hardly learned" in line]
    assert line.startswith("warning: the model had hardly learned the task when it was cut (loss ")
    assert line.removeprefix("warning: ") in read(bench.folder / "blind" / "metrics.json")["warnings"]
    assert lightpeft("run", "--config", bench.yaml("uncut", **FEW, **slow, **{"light.remove.blocks": 0.0})) == 0
    told = capsys.readouterr().err
    assert "hardly learned" not in told and "had learned too little" not in told
    monkeypatch.setattr("lightpeft.prune.estimation.ENOUGH_LEARNED", 0.9)
    monkeypatch.setattr("lightpeft.prune.length.LEAST_STEPS", 6)
    monkeypatch.setattr("lightpeft.prune.length.MOST_PART", 0.5)
    longer = {"light.estimate.length": "auto"}
    assert lightpeft("run", "--config", bench.yaml("longer", **FEW, **longer)) == 0
    assert (
        "estimation took 12 steps instead of 6, because the model had learned too little by then\n"
        in capsys.readouterr().err
    )
    told = read(bench.folder / "longer" / "metrics.json")["estimation"]
    assert (told["steps"], told["planned_steps"]) == (12, 6)
    meta = EstimationRecord.load(bench.folder / "longer" / "estimation").meta
    assert told["learned"] == meta["learned"] is not None


def flat(model: nn.Module) -> None:
    """Answer the first class, whatever is asked."""
    head = transformers_model(model).classifier
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.zero_()
            module.bias.data.copy_(torch.tensor([1.0, 0.0]))


def test_a_collapsed_run_says_so_whenever_it_is_shown(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: Callable[..., nn.Module] = pipeline.open_result

    def collapsed(*args: Any) -> nn.Module:
        model = trained(*args)
        flat(model)
        return model

    monkeypatch.setattr(pipeline, "open_result", collapsed)
    file = bench.yaml("collapsed", **FEW)
    for _ in range(2):
        capsys.readouterr()
        assert lightpeft("run", "--config", file) == 0
        written = capsys.readouterr()
        lines = [line for line in written.err.splitlines() if line.startswith("warning: ")]
        assert 'warning: all 40 test rows are answered "negative"; train longer' in lines[0]
        for shown in ("quality over the run, on 40 test rows", "majority baseline", "after pruning", "final"):
            assert shown in written.out
        monkeypatch.undo()
    warnings = read(bench.folder / "collapsed" / "metrics.json")["warnings"]
    assert [f"warning: {line}" for line in warnings] == lines
    log = [json.loads(line) for line in (bench.folder / "collapsed" / "log.jsonl").read_text().splitlines()]
    assert next(entry for entry in log if entry["stage"] == "evaluate")["warnings"] == warnings


def test_evaluate_holds_any_model_against_a_constant_answer(
    bench: Workbench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = {"training.learning_rate": 1e-9, "method": "plain"}  # learns nothing
    pipeline.run(bench.config("unlearned_warning", **settings))
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert lightpeft("evaluate", bench.folder / "unlearned_warning", "--json", report) == 0
    written = capsys.readouterr()
    entry = read(report)
    assert entry["majority_baseline"] == {"accuracy": 0.5}
    (line,) = entry["model"]["warnings"]
    assert "test rows are answered" in line or "the majority baseline" in line
    assert written.err == f"warning: {bench.folder / 'unlearned_warning'}: {line}\n"
    assert "majority baseline" in written.out and "0.5000" in written.out
