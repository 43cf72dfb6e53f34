"""`lightpeft run` and its stages, each of which can be run alone."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.settings import run_config
from lightpeft.app.cli.verbs.verb import Verb
from lightpeft.errors import require

if TYPE_CHECKING:
    from lightpeft.config import RunConfig

_ESTIMATION = Option(
    "--estimation", "Folder of another run that differs in its budget alone: reuse its estimation.", rare=True
)


def _run(given: dict[str, Any], **options: Any) -> None:
    from lightpeft.app.runs import pipeline

    config = run_config(given)
    show_metrics(pipeline.run(config, **options))
    folder = shlex.quote(config.output)
    screen.say("next:")
    screen.say(f"  lightpeft predict {folder} new_rows.csv --output answers.csv")
    screen.say(f"  lightpeft report {folder}  # one HTML page about this run")
    if config.method_spec.prunes:
        screen.say(f"  lightpeft inspect {folder}  # what each layer has kept")
        screen.say(f"  lightpeft export {folder} exported --form onnx  # or merged, peft, gguf, openvino")


def show_metrics(report: dict[str, Any]) -> None:
    """Print the metrics, milestones and parameters of a run's metrics.json as tables, and its warnings on stderr."""
    from lightpeft.app.cli.tables import metrics_table, milestones_table, parameters_table

    metrics, intervals = dict(report["metrics"]), dict(report["intervals"])
    if "linear_probe" in report:
        name, probe = report["main_metric"], report["linear_probe"]
        row = f"linear probe, {name}"
        metrics[row], intervals[row] = probe["metrics"][name], probe["intervals"].get(name)
    screen.print(metrics_table(metrics, intervals, f"on the test rows, method {report['method']}"))
    if "full_width" in report:
        screen.print(
            metrics_table(
                **report["full_width"], title="method light at full width: what was learned, over the whole base"
            )
        )
    if "milestones" in report:
        screen.print(milestones_table(report["milestones"]))
    screen.print(parameters_table(report["parameters"]))
    screen.warn(report.get("warnings", []))


def _estimate(given: dict[str, Any]) -> None:
    from lightpeft.app.runs import pipeline

    config = run_config(given)
    record = pipeline.estimate(pipeline.prepare(config))
    screen.say(f"estimation took {record.meta['steps']} steps; the scores are in {config.output}/estimation")


def _plan(given: dict[str, Any], estimation: str | None = None, curve: bool = False, rows: int | None = None) -> None:
    from lightpeft.app.cli.tables import plan_table
    from lightpeft.app.folders.run_folder import RunFolder
    from lightpeft.app.runs import pipeline
    from lightpeft.app.runs.reuse import find_estimation, take_estimation

    require(curve or rows is None, "--rows needs --curve; give both, or leave --rows out")
    config = run_config(given)
    run = RunFolder.open(config, replan=True)
    if estimation is not None:
        take_estimation(run, find_estimation(config, Path(estimation)))
    if curve:
        _show_curve(config, rows)
    else:
        screen.print(plan_table(pipeline.plan(pipeline.prepare(config, replan=True) if config.light.is_auto else run)))


def _show_curve(config: RunConfig, rows: int | None) -> None:
    from lightpeft.app.cli.tables import curve_table
    from lightpeft.app.runs import curve, pipeline

    work = pipeline.prepare(config, replan=True)
    found = curve.curve(work, rows=curve.CURVE_ROWS if rows is None else rows)
    screen.print(curve_table(found))
    screen.say(f"all numbers are in {work.run.curve}; lightpeft report shows them")


def _prune(given: dict[str, Any]) -> None:
    from lightpeft.app.runs import pipeline
    from lightpeft.plans.prune_plan import PrunePlan

    work = pipeline.prepare(run_config(given))
    pipeline.prune(work)
    cut = PrunePlan.load(work.run.plan).cuts_blocks
    what = "the pruned model" if cut else "the plan removes nothing of the blocks; the light model"
    screen.say(f"{what} is in {work.config.output}/pruned")


def _train(given: dict[str, Any]) -> None:
    from lightpeft.app.runs import pipeline

    config = run_config(given)
    pipeline.train(pipeline.prepare(config))
    screen.say(f"the trained adapter is in {config.output}/adapter")


RUN = Verb(
    "run",
    "Train: run all stages that are not done yet (estimate, plan, prune, train, evaluate).",
    _run,
    options=(
        _ESTIMATION,
        Option("--overwrite", "Delete a run with other settings from the output folder first.", flag=True, rare=True),
    ),
    on_runs=True,
)
ESTIMATE = Verb(
    "estimate",
    "Train masks and PEFT modules for the first steps, and score every head, neuron and rank.",
    _estimate,
    on_runs=True,
)
PLAN = Verb(
    "plan",
    "Choose by score and budget which heads, neurons and ranks to keep, and print the plan.",
    _plan,
    options=(
        _ESTIMATION,
        Option(
            "--curve",
            "Make no plan: measure the loss at budgets from 10% to 80% of the blocks, and print it.",
            flag=True,
        ),
        Option("--rows", "Training rows on which --curve measures the loss (default: 256).", type=int),
    ),
    on_runs=True,
)
PRUNE = Verb("prune", "Cut the base and the PEFT modules as the plan says.", _prune, on_runs=True)
TRAIN = Verb("train", "Fine-tune the pruned model.", _train, on_runs=True)
