"""Evaluate any model on data: metrics with intervals, per class, compared with another model, and each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import classification_report

from lightpeft.app.evaluation.batching import check_batch_size
from lightpeft.app.evaluation.class_names import class_order, renumber_classes
from lightpeft.app.evaluation.milestones import doubts, majority_score
from lightpeft.app.evaluation.overlap import rows_seen_by
from lightpeft.app.evaluation.prediction_files import check_predictions_path, write_predictions
from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.evaluation.scores import add_prefix, scores_of
from lightpeft.app.evaluation.statistics import LEVEL, RESAMPLES, compare_as_data
from lightpeft.app.folders.forms import Found, Wanted
from lightpeft.app.folders.opening import find_model
from lightpeft.app.tasks.answers import Answers, MeanMetric, Metric, Outcome
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.task_kinds import task_class
from lightpeft.app.tasks.loading import load_task, run_settings
from lightpeft.app.tasks.tokens import check_max_length, check_tokens
from lightpeft.config import RunConfig, merge_settings, run_config_from_dict
from lightpeft.errors import require
from lightpeft.files import check_no_folder, write_json
from lightpeft.machine import autocast_dtype
from lightpeft.models.families.family_table import max_positions
from lightpeft.models.tokenizers import check_vocabulary, ensure_pad_token
from lightpeft.models.unwrap import transformers_model
from lightpeft.profiling.sizes import parameter_report

TOKEN_SUMS = ("loss", "right", "tokens")
"""Names of a text's sums in language modeling: cross-entropy in nats, correct tokens, tokens."""


@dataclass(frozen=True)
class MeasuredModel:
    """A model with its answers on every split."""

    found: Found
    task: Task
    """The task, with its classes in the model's order."""
    outcomes: dict[str, Outcome]
    """Prefix of the metrics ("" for the test rows) -> outcome on that split."""
    parameters: dict[str, Any]

    def answers(self, prefix: str = "") -> Answers:
        """Return its answers on a split."""
        return self.outcomes[prefix].answers


def evaluate_model(
    name: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    base: str | None = None,
    other: str | None = None,
    per_class: bool = False,
    predictions: str | Path | None = None,
    json: str | Path | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the rows of a task, alone or against a second model.

    Args:
        name: a run, a light adapter, a merged light model, a PEFT adapter or a transformers model (see
            `opening.find_model`).
        settings: nested settings of `RunConfig`; `data` overrides the settings of training, `model` says how to load
            the model.
        base: name or folder of an adapter's base model, if it is not where the adapter says.
        other: a second model, which answers the same rows.
        per_class: True to add precision, recall and F1 of every class.
        predictions: .csv or .jsonl file to write, one row per example.
        json: file to write the report to.
        batch_size: rows per forward pass; None: the default of the device.

    Returns:
        The report: task, examples, majority_baseline (its main metric), and model (name, kind, metrics, intervals,
        warnings, parameters); with `other`, also other (the same keys) and comparison; with `per_class`, classes.

    Raises:
        LightPeftError: the input is invalid, or a model does not fit the data.

    Example:
        ```python
        report = evaluate_model("out/light", other="out/plain")
        report["comparison"]["accuracy"]["p_value"]
        ```
    """
    check_batch_size(batch_size)
    check_no_folder(json, "json")
    if predictions is not None:
        check_predictions_path(Path(predictions))
    given = dict(settings or {})
    found = [find_model(each, base, given.get("model")) for each in (name, other) if each is not None]
    config = _merge_settings(found[0], given)
    task = _load_rows(found[0], config)
    said = given.get("data") or {}
    tasks = [_adapt_to_model(each, task, said) for each in found]  # check all models before any of them is loaded
    require(not per_class or task.labels, f"per_class: task {task.config.task} has no classes; leave it out")
    autocast = autocast_dtype(config.training)
    measured = [_measure(each, of, batch_size, autocast) for each, of in zip(found, tasks, strict=True)]
    report = _report(measured, per_class)
    if predictions is not None:
        write_predictions(Path(predictions), task.test, _predictions(measured[0]))
    if json is not None:
        write_json(json, report)
    return report


# -- the rows, and the task as each model answers it ---------------------------------------------------------------


def _merge_settings(found: Found, given: dict[str, Any]) -> RunConfig:
    """Return the config that the model was trained with, as far as it is known, overridden by `given`."""
    said = run_settings(found.facts) if found.run is None else asdict(found.run)
    data, asked = said.get("data", {}), given.get("data")
    if isinstance(asked, dict) and asked.get("task", data.get("task")) != data.get("task"):
        said = {**said, "data": {**data, "columns": {}}}  # they belong to another task
    return run_config_from_dict(merge_settings(said, given))


def _load_rows(found: Found, config: RunConfig) -> Task:
    """Return the task with its test rows: the run's held-out rows, or those of the settings."""
    return load_task(config.data, found.config, config.tasks, train=found.run is not None)


def _adapt_to_model(found: Found, task: Task, said: Mapping[str, Any]) -> Task:
    """Return the task as a model answers it: by head or likelihood, with the classes in the model's order.

    Args:
        said: settings of `data` from the user, which apply to every model.
    """
    own_ways = {
        name: found.facts[name] for name in ("answer", "max_length") if name in found.facts and name not in said
    }
    config = replace(task.config, **own_ways)
    kind = task_class(task.entry.kind, config.answer, found.config)
    labels = task.labels
    if found.class_names is not None and kind.head.outputs == "classes":
        labels = class_order(found.class_names, labels, found.name)
    own = kind(config, task.train, task.test, labels, task.entry, task.more_tests)
    found.check(Wanted.of(own))
    return own


# -- measuring -----------------------------------------------------------------------------------------------------


def _measure(found: Found, task: Task, batch_size: int | None, autocast: torch.dtype | None) -> MeasuredModel:
    tokenizer = found.tokenizer()
    check_vocabulary(tokenizer, found.config)
    check_max_length(task.config.max_length, max_positions(found.config), tokenizer)
    encoded = {prefix: task.encode_test(rows, tokenizer) for prefix, rows in {"": task.test, **task.more_tests}.items()}
    for rows in encoded.values():
        check_tokens(rows, found.config, "the test rows", tokenizer)
    model = found.open(Wanted.of(task))
    ensure_pad_token(tokenizer, transformers_model(model).config)
    collator = task.collator(tokenizer, found.padding(task.config.max_length))
    respondent = BatchedModel(model, collator, batch_size, autocast)
    outcomes = {prefix: task.answer(respondent, rows) for prefix, rows in encoded.items()}
    return MeasuredModel(found, task, outcomes, parameter_report(model))


def _report(measured: Sequence[MeasuredModel], per_class: bool) -> dict[str, Any]:
    first = measured[0]
    report = {
        "task": first.task.config.task,
        "examples": len(first.answers()),
        "majority_baseline": majority_score(first.answers(), first.task),
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": 0},
        "model": _model_report(first),
    }
    if per_class:
        report["classes"] = by_class(first.answers(), first.task.labels)
    if len(measured) == 2:
        report["other"] = _model_report(measured[1])
        report["comparison"] = _comparison(first, measured[1])
    return report


def _model_report(measured: MeasuredModel) -> dict[str, Any]:
    scores = scores_of(measured.outcomes, measured.task)
    interval = scores.intervals.get(measured.task.main_metric)
    seen = rows_seen_by(measured.found, measured.task)
    return {
        "name": measured.found.name,
        "kind": measured.found.kind,
        **asdict(scores),
        "warnings": [*doubts(measured.answers(), measured.task, interval), *([seen] if seen else [])],
        "parameters": measured.parameters,
    }


def _comparison(first: MeasuredModel, second: MeasuredModel) -> dict[str, Any]:
    order = list(dict.fromkeys([*first.task.labels, *second.task.labels]))
    result: dict[str, Any] = {}
    for prefix in first.outcomes:
        one, other = (renumber_classes(each.answers(prefix), each.task.labels, order) for each in (first, second))
        metrics: list[Metric] = [*first.task.measures, _shared_scores(one, other)]
        result |= add_prefix(prefix, compare_as_data(one, other, *metrics))
    return result


def _shared_scores(one: Answers, other: Answers) -> MeanMetric:
    """Return the metric of the scores that both models have, such as the loss; head and likelihood share none."""
    names = [name for name in one.scores if name in other.scores]
    return MeanMetric(lambda answers: {name: answers.scores[name] for name in names})


def by_class(answers: Answers, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return scikit-learn's report: precision, recall, f1-score and support of every class, and their means."""
    report = classification_report(
        answers.references,
        answers.predictions,
        labels=range(len(labels)),
        target_names=list(labels),
        output_dict=True,
        zero_division=0,
    )
    return {name: entry for name, entry in report.items() if isinstance(entry, dict)}


# -- every single answer -------------------------------------------------------------------------------------------


def _predictions(measured: MeasuredModel) -> dict[str, list[Any]]:
    """Return columns with reference, prediction and class probabilities, one value per example."""
    task, answers = measured.task, measured.answers()
    sides = {"reference": answers.references, "prediction": answers.predictions}
    columns = {
        name: [readable(value, task.labels, row) for value, row in zip(values, task.test, strict=True)]
        for name, values in sides.items()
    }
    if answers.probabilities is not None:
        of_classes = zip(task.labels, answers.probabilities.T, strict=True)
        columns |= {f"p_{name}": [round(float(p), 6) for p in column] for name, column in of_classes}
    return columns


def readable(answer: Any, labels: Sequence[str], row: Mapping[str, Any]) -> Any:
    """Return an answer in readable form: a class name, the text of an option, or named sums; else unchanged."""
    if isinstance(answer, tuple):
        return dict(zip(TOKEN_SUMS, answer, strict=True))
    if not isinstance(answer, int):
        return answer
    names = row.get("options") or labels
    return names[answer] if names else answer
