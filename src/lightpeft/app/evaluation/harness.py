"""Evaluate a model with lm-evaluation-harness, by the harness's own task files; nothing is exported.

The harness returns one number per document and metric. They become `Answers`, so that its tasks get the same intervals
and paired tests as lightpeft's own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets.exceptions import DatasetsError
from scipy.stats import norm
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.app.evaluation.batching import check_batch_size
from lightpeft.app.evaluation.statistics import LEVEL, Interval, bootstrap_intervals, compare_as_data
from lightpeft.app.folders.forms import Wanted
from lightpeft.app.folders.opening import find_model
from lightpeft.app.tasks.answers import Answers, MeanMetric
from lightpeft.errors import LightPeftError, nearest, one_line, require
from lightpeft.files import check_no_folder, write_json
from lightpeft.models.task_heads import CAUSAL_LM, is_decoder
from lightpeft.models.unwrap import transformers_model

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

NOT_INSTALLED = "lm-evaluation-harness is not installed; pip install 'lightpeft[harness]'"
CPU_BATCH_SIZE = 8
"""Requests per forward pass on a CPU; larger batches are no faster there."""


@dataclass(frozen=True)
class HarnessScores:
    """Scores of a model in one task, or group of tasks, of the harness."""

    metrics: dict[str, float]
    """Metric by the harness's name; `name,filter` for filtered answers."""
    intervals: dict[str, Interval | None]
    """95% intervals: bootstrap if the metric is a mean over documents; else normal, from the harness's standard error;
    None without one."""
    examples: int
    """Number of documents."""
    num_fewshot: int | None
    """Number of solved examples in the prompt; None for a group."""
    answers: Answers
    """Per document, a prediction (metric -> number) and its hash as the reference; empty for a group."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the answers, for a report."""
        names = ("metrics", "intervals", "examples", "num_fewshot")
        return {name: getattr(self, name) for name in names}


def document_scores(answers: Answers) -> dict[str, np.ndarray]:
    """Return metric -> float [documents], from `HarnessScores.answers`."""
    names = answers.predictions[0] if len(answers) else {}
    return {name: np.array([scores[name] for scores in answers.predictions], dtype=float) for name in names}


DOCUMENT_MEANS = MeanMetric(document_scores)
"""Metrics of a harness task that are means over documents."""


def evaluate_harness(
    name: str | Path,
    tasks: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    *,
    base: str | None = None,
    other: str | None = None,
    json: str | Path | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a language model on tasks of lm-evaluation-harness, alone or against a second model.

    Args:
        name: a run, a light adapter, a merged light model, a PEFT adapter or a transformers model.
        tasks: names of tasks or groups of the harness.
        settings: nested settings of `RunConfig`; `model` says how to load the model.
        base: name or folder of an adapter's base model, if it is not where the adapter says.
        other: a second model, evaluated on the same documents.
        json: file to write the report to.
        batch_size: requests per forward pass; None: on an accelerator the most that fit, else 8.
        options: include_path, num_fewshot and limit of `run_harness`.

    Returns:
        The report: model (name, kind, tasks: metrics, intervals, examples, num_fewshot); with `other`, also other (the
        same keys) and comparison by task.

    Raises:
        LightPeftError: the input is invalid, the harness is not installed, or a model generates no text.

    Example:
        ```python
        report = evaluate_harness("out/run", ["arc_easy"], limit=100)
        report["model"]["tasks"]["arc_easy"]["metrics"]["acc"]
        ```
    """
    check_batch_size(batch_size)
    check_no_folder(json, "json")
    given = dict(settings or {})
    found = [find_model(each, base, given.get("model")) for each in (name, other) if each is not None]
    wanted = Wanted("tasks of lm-evaluation-harness", CAUSAL_LM)
    for each in found:
        each.check(wanted)
        refusal = f"lm-evaluation-harness needs a causal language model, and {each.name} is a {each.config.model_type}"
        require(is_decoder(each.config), refusal)
    scores = [
        run_harness(each.open(wanted), each.tokenizer(), tasks, batch_size=batch_size, **options) for each in found
    ]
    report: dict[str, Any] = {
        role: {"name": each.name, "kind": each.kind, "tasks": {task: entry.to_dict() for task, entry in of.items()}}
        for role, each, of in zip(("model", "other"), found, scores, strict=False)
    }
    if len(scores) == 2:
        report["comparison"] = {
            task: compare_as_data(entry.answers, scores[1][task].answers, DOCUMENT_MEANS)
            for task, entry in scores[0].items()
            if len(entry.answers)
        }
    if json is not None:
        write_json(json, report)
    return report


def run_harness(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | None = None,
) -> dict[str, HarnessScores]:
    """Evaluate a live model, pruned or dense, on tasks of lm-evaluation-harness.

    Args:
        model: a causal or sequence-to-sequence language model, transformers or PEFT.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags of the harness or of `include_path`, or paths of task files.
        include_path: folder with task files (YAML) of your own. They may name Python functions, which are then run.
        num_fewshot: solved examples in the prompt; None: what each task says.
        limit: most documents per task or, below 1, their share; None: all.
        batch_size: requests per forward pass; None: on an accelerator the most that fit, else 8.

    Returns:
        Name of a task, or of a group with metrics of its own -> its scores.

    Raises:
        LightPeftError: the harness is not installed, the model cannot generate text, a task is unknown, or a data set
            cannot be read.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise LightPeftError(NOT_INSTALLED) from error
    inner = transformers_model(model)
    require(
        inner.can_generate(),
        f"lm-evaluation-harness needs a language model, and {type(inner).__name__} is not one; "
        "evaluate it on its own task, without --harness",
    )
    require(tasks, "no tasks of lm-evaluation-harness are given; name some: --tasks arc_easy,piqa")
    require(num_fewshot is None or num_fewshot >= 0, f"num_fewshot is {num_fewshot}; set it to 0 or more")
    require(limit is None or limit > 0, f"limit is {limit}; set it to a number of documents, or to a share below 1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager(tasks, include_path)
    specs = _load_tasks(manager, tasks)
    report = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or _batch_size(inner)),
        tasks=specs,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=0 if limit == 1 else 1000,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    assert report is not None
    scores = {name: _task_scores(report, name) for name in report["samples"]}
    return scores | {name: _group_scores(values) for name, values in report.get("groups", {}).items()}


def _batch_size(model: PreTrainedModel) -> int | str:
    """Return "auto" on an accelerator, whose out-of-memory errors the harness tries out; a constant on a CPU."""
    return CPU_BATCH_SIZE if model.device.type == "cpu" else "auto"


# -- tasks -------------------------------------------------------------------------------------------------------


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """Return the index of task files; the harness's own thousands are read only if the user's lack a task."""
    from lm_eval.tasks import TaskManager

    folder = Path(include_path) if include_path is not None else None
    require(folder is None or folder.is_dir(), f"include_path {folder} is not a folder; give a folder of task files")
    own = TaskManager(include_path=folder, include_defaults=False)
    if all(name in own.all_tasks or Path(name).is_file() for name in tasks):
        return own
    manager = TaskManager(include_path=folder)
    for name in tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise LightPeftError(_unknown_task(name, manager.all_tasks))
    return manager


def _unknown_task(name: str, known: Sequence[str]) -> str:
    meant = nearest(name, known)
    hint = f"did you mean {meant}?" if meant else "give the folder of your own tasks: --include_path"
    return f'lm-evaluation-harness has no task "{name}"; {hint}'


def _load_tasks(manager: TaskManager, names: Sequence[str]) -> list[Any]:
    """Load groups and tasks with their data sets; a data set that cannot be read raises `LightPeftError`."""
    try:
        loaded = manager.load(list(names))
    except (DatasetsError, OSError, ValueError) as error:
        reason = one_line(error, 200)
        raise LightPeftError(
            f"a data set of {', '.join(names)} cannot be read ({reason}); offline, put its files into the "
            "cache of datasets (HF_HOME), or name local files in a task file of your own"
        ) from error
    inside = {child for children in loaded.get("group_map", {}).values() for child in children}
    return [item for kind in ("groups", "tasks") for name, item in loaded.get(kind, {}).items() if name not in inside]


# -- results -----------------------------------------------------------------------------------------------------


def _task_scores(report: Mapping[str, Any], task: str) -> HarnessScores:
    metrics, errors = _split_metrics(report["results"][task])
    answers = _answers(report["samples"][task], metrics)
    intervals = {name: _normal_interval(metrics[name], errors.get(name)) for name in metrics}
    return HarnessScores(
        metrics,
        intervals | bootstrap_intervals(answers, DOCUMENT_MEANS),
        len(answers),
        report["n-shot"].get(task),
        answers,
    )


def _group_scores(values: Mapping[str, Any]) -> HarnessScores:
    metrics, errors = _split_metrics(values)
    intervals = {name: _normal_interval(metrics[name], errors.get(name)) for name in metrics}
    return HarnessScores(metrics, intervals, int(values.get("sample_len", 0)), None, Answers([], []))


def _split_metrics(results: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return metrics and their standard errors from keys such as `acc,none` and `acc_stderr,none`."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in results.items():
        name, comma, kind = key.partition(",")
        if comma and isinstance(value, Real):
            target = errors if name.endswith("_stderr") else metrics
            target[_metric_name(name.removesuffix("_stderr"), kind)] = float(value)
    return metrics, errors


def _metric_name(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric},{kind}"


def _answers(samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> Answers:
    """Return the numbers of every document, in order, for metrics that are means over documents."""
    documents: dict[int, dict[str, Any]] = {}
    hashes: dict[int, str] = {}
    for sample in samples:
        scores = {_metric_name(name, sample["filter"]): sample[name] for name in sample["metrics"]}
        documents.setdefault(sample["doc_id"], {}).update(scores)
        hashes[sample["doc_id"]] = sample["doc_hash"]
    order = sorted(documents)
    means = [name for name, value in metrics.items() if _is_mean([documents[i].get(name) for i in order], value)]
    return Answers([{name: float(documents[i][name]) for name in means} for i in order], [hashes[i] for i in order])


def _is_mean(values: Sequence[Any], reported: float) -> bool:
    return all(isinstance(value, Real) for value in values) and bool(np.isclose(np.mean(values), reported))


def _normal_interval(value: float, error: float | None) -> Interval | None:
    if error is None or not np.isfinite(error):
        return None
    width = float(norm.ppf((1 + LEVEL) / 2)) * error
    return value - width, value + width
