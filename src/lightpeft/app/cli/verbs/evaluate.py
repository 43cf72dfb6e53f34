"""`lightpeft evaluate`: a stage of a run, or any model on any rows."""

from __future__ import annotations

from typing import Any, Literal

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.settings import run_config, run_settings
from lightpeft.app.cli.verbs.stages import show_metrics
from lightpeft.app.cli.verbs.verb import Verb
from lightpeft.config import SWITCHES
from lightpeft.errors import require


def _evaluate(given: dict[str, Any], model: str | None = None, **options: Any) -> None:
    """Measure a model; without one, run the evaluation stage of the run, then measure its result as options ask."""
    from lightpeft.app.runs import pipeline

    if model is None:
        config = run_config(given)
        report = pipeline.evaluate(pipeline.prepare(config))
        if not options:
            show_metrics(report)
            return
        model, settings = config.output, {"model": {name: getattr(config.model, name) for name in SWITCHES}}
    else:
        require(
            "run" not in given,
            f"{model} and --run exclude each other; give one of them (a run folder can be the model)",
        )
        settings = run_settings(given)
    measure = _on_harness if options.pop("harness", None) else _on_task
    measure(model, settings, **options)


def _on_task(model: str, settings: dict[str, Any], compare: str | None = None, **options: Any) -> None:
    from lightpeft.app.cli.tables import metrics_table, paired_table, per_class_table
    from lightpeft.app.evaluation.reports import evaluate_model

    only = [name for name in ("tasks", "include_path", "num_fewshot", "limit") if name in options]
    require(
        not only, f"--{' and --'.join(only)} need --harness lm-eval; name a task of lightpeft's own with --data.task"
    )
    report = evaluate_model(model, settings, other=compare, **options)
    measured = [report[name] for name in ("model", "other") if name in report]
    for entry in measured:
        title = f"{entry['name']}: {report['task']}"
        screen.print(metrics_table(entry["metrics"], entry["intervals"], title, report["majority_baseline"]))
        screen.warn([f"{entry['name']}: {line}" for line in entry["warnings"]])
    if "comparison" in report:
        screen.print(paired_table(report["comparison"], *(entry["name"] for entry in measured)))
    if "classes" in report:
        screen.print(per_class_table(report["classes"]))


def _on_harness(model: str, settings: dict[str, Any], compare: str | None = None, **options: Any) -> None:
    from lightpeft.app.cli.tables import metrics_table, paired_table
    from lightpeft.app.evaluation.harness import evaluate_harness

    only = [name for name in ("per_class", "predictions") if name in options]
    require(not only, f"--{' and --'.join(only)} do not work with --harness; leave them out, or leave --harness out")
    names = [name for name in options.pop("tasks", "").split(",") if name]
    report = evaluate_harness(model, names, settings, other=compare, **options)
    measured = [report[name] for name in ("model", "other") if name in report]
    for entry in measured:
        for task, scores in entry["tasks"].items():
            screen.print(metrics_table(scores["metrics"], scores["intervals"], f"{entry['name']}: {task}"))
    for task, comparison in report.get("comparison", {}).items():
        screen.print(task, markup=False)
        screen.print(paired_table(comparison, *(entry["name"] for entry in measured)))


EVALUATE = Verb(
    "evaluate",
    "Measure a run, an adapter or any model on the test rows; --compare adds a second one.",
    _evaluate,
    options=(
        Option(
            "model",
            "Folder of a run, a light adapter, a merged light model, a PEFT adapter or a transformers model, or the "
            "name of an adapter or a model on the hub (owner/name, owner/name@revision).",
            count="?",
        ),
        Option("--base", "Name or folder of the adapter's base model, if it moved."),
        Option("--compare", "Second model to measure on the same rows, with a paired significance test."),
        Option("--per_class", "Precision, recall and F1 of every class.", flag=True),
        Option(
            "--predictions", "File for the prediction of each test row, with its inputs and reference (.csv, .jsonl)."
        ),
        Option("--json", "JSON file for the whole report."),
        Option(
            "--batch_size",
            "Rows per forward pass (default: 32 on a CPU, 256 elsewhere; fewer if they are long).",
            type=int,
        ),
        Option("--harness", "Measure on tasks of lm-evaluation-harness instead.", type=Literal["lm-eval"]),
        Option("--tasks", "Names of the harness's tasks, separated by commas."),
        Option("--include_path", "Folder with your own task files for the harness."),
        Option(
            "--num_fewshot", "Few-shot examples in the harness's prompts (default: as each task defines).", type=int
        ),
        Option(
            "--limit",
            "Documents per task of the harness; below 1: that fraction of them (default: all).",
            type=float,
        ),
    ),
    on_runs=True,
    without=("tasks",),  # tasks of one's own come from --config
)
