"""The `lightpeft` command: one verb a function. Heavy modules are imported by the verbs that need them."""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from rich.console import Console

from lightpeft import __version__
from lightpeft.cli.hints import explained
from lightpeft.compat.argparse import options_of
from lightpeft.config import PRESETS, SWITCHES, RunConfig, overlaid, run_config_from_dict
from lightpeft.config.validation import load_yaml, shown
from lightpeft.console import streams
from lightpeft.errors import LightPeftError, require


class _Screen(Console):
    """Standard output for tables and lines; what cannot be written is told, not lost."""

    def print(self, *objects: Any, **options: Any) -> None:
        with streams.written():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


_out = _Screen()

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_STAGES = {
    "run": "All stages that are not done yet: estimate, plan, prune, train, evaluate.",
    "estimate": "Train masks and PEFT modules for the first steps and record every unit's importance.",
    "plan": "Decide from the record and the budget which units stay, and show the plan.",
    "prune": "Cut base and PEFT modules down to the plan.",
    "train": "Fine-tune the small model.",
    "evaluate": "Measure a run, an adapter or any model on the test rows, alone or beside another one.",
    "bench": "Measure plain LoRA beside the light model: speed, memory, FLOPs; alternating, with spread.",
}
_USAGES = {"evaluate": "lightpeft evaluate [model] [options]"}
_OTHERS = {
    "predict": "Answer text lines, the rows of a table or one row: labels, options, spans or texts.",
    "export": "Merge a light adapter into its pruned base: a whole model in a folder of its own.",
    "inspect": "Show a plan, a light adapter, a merged light model or a run as a table, layer by layer.",
    "reproduce": "Run a grid of models, tasks, methods and seeds, and write one table of it.",
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Bad input prints one line and exits with 2; an interrupted run exits with 130."""
    streams.prepare()
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # on import they warn of kernels they lack
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _stoppable(), streams.flushed():
            _dispatch(sys.argv[1:] if arguments is None else arguments)
    except LightPeftError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "stopped; the same command goes on from the last result", 130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        name = "" if error.filename is None else f"{shown(str(error.filename))}: "
        _fail(f"{name}{error.strerror or shown(str(error))}", 2)
    except MemoryError:
        _fail("out of memory; give smaller batches, a smaller model, or fewer rows", 2)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does (in the main thread; elsewhere signals cannot be handled)."""

    def handle(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(arguments: list[str]) -> None:
    asked = next((word for word in arguments if word in _STAGES or word in _OTHERS), None)
    parser, options_of_verb = _parser(asked)
    try:
        given = parser.parse_args(arguments, defaults=False)
    except ArgumentError as error:
        raise LightPeftError(explained(str(error), options_of_verb, arguments)) from error
    verb = given.subcommand
    options = given[verb]
    if verb in _STAGES:
        _run_stage(verb, options)
    else:
        _OTHER_VERBS[verb](options)


def _parser(asked: str | None) -> tuple[ArgumentParser, list[str]]:
    """The parser, and the options of the verb that is asked for; the others' are not collected, which takes time."""
    parser = ArgumentParser(
        prog="lightpeft",
        description="PEFT on a foundation model that is pruned early in the same run. Settings come from the preset, "
        "then --config, then options such as --light.heads 0.5.",
        exit_on_error=False,
        version=__version__,
    )
    verbs = parser.add_subcommands(required=True, metavar="verb")
    known: list[str] = []
    for verb, description in {**_STAGES, **_OTHERS}.items():
        usage = _USAGES.get(verb, f"lightpeft {verb} [options]") if verb in _STAGES else None
        subparser = ArgumentParser(
            description=description, usage=usage, exit_on_error=False, allow_abbrev=False, print_config=None
        )
        if verb == asked:
            _OPTIONS.get(verb, _stage_options)(subparser)
            known = options_of(subparser)
        verbs.add_subcommand(verb, subparser, help=description)
    return parser, known


# -- verbs on a run ----------------------------------------------------------------------------------------------


def _stage_options(parser: ArgumentParser, skip: Collection[str] = ()) -> None:
    parser.add_argument("--config", type=str, help="YAML file with settings.")
    parser.add_argument("--run", type=str, help="Folder of a run to go on with; its own config.yaml holds.")
    parser.add_argument(
        "--print_config", action="store_true", help="Show all settings as YAML, as they would be, and exit."
    )
    parser.add_class_arguments(RunConfig, skip=set(skip))
    preset = PRESETS[RunConfig.preset]
    parser.set_defaults({f"light.{name}": value for name, value in preset.items()})  # as help shows them


_EVALUATE: dict[str, dict[str, Any]] = {
    "base": {"type": str, "help": "Name or folder of an adapter's base, if it moved."},
    "compare": {"type": str, "help": "A second model on the same rows, with a paired test."},
    "per_class": {"action": "store_true", "help": "Precision, recall and F1 of every class."},
    "predictions": {"type": str, "help": "File for one row an example: inputs, reference, prediction (.csv, .jsonl)."},
    "json": {"type": str, "help": "Where the whole report goes."},
    "batch_size": {"type": int, "help": "Rows a forward pass (default: as many as fit into memory)."},
    "harness": {"choices": ["lm-eval"], "help": "Measure on tasks of lm-evaluation-harness instead."},
    "tasks": {"type": str, "help": "Names of the harness's tasks, separated by commas."},
    "include_path": {"type": str, "help": "Folder with task files of your own for the harness."},
    "num_fewshot": {"type": int, "help": "Solved examples in the harness's prompts (default: what a task says)."},
    "limit": {"type": float, "help": "Documents a task of the harness or, below 1, that part of them (default: all)."},
}
"""Options of `evaluate` beside those of a run."""
_COLUMNS = ("text", "text_pair")
"""Settings of `data` that `predict` and `evaluate` take without their section, too."""


def _evaluate_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        type=str,
        help="Folder of a run, a light adapter, a merged light model, a PEFT adapter or a transformers model, or a "
        "model's name on the hub.",
    )
    for name, option in _EVALUATE.items():
        parser.add_argument(f"--{name}", **option)
    _stage_options(parser, skip=["tasks"])  # tasks of one's own come from --config
    for name in _COLUMNS:
        parser.add_argument(f"--{name}", type=str, help=SUPPRESS)


_ESTIMATION = "Folder of another run, of the same settings but for the budget: take its estimation."


def _run_options(parser: ArgumentParser) -> None:
    _plan_options(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="Remove the run of another config from the output folder first."
    )


def _plan_options(parser: ArgumentParser) -> None:
    _stage_options(parser)
    parser.add_argument("--estimation", type=str, help=_ESTIMATION)


def _bench_options(parser: ArgumentParser) -> None:
    _stage_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="Alternations of plain LoRA and light.")
    parser.add_argument("--steps", type=int, default=20, help="Batches a round, training and inference each.")
    parser.add_argument("--json", type=str, help="Where the result goes (default: bench.json in the run folder).")


def _run_stage(verb: str, options: Namespace) -> None:
    given = options.as_dict()
    show = given.pop("print_config", False)
    columns = {name: given.pop(name) for name in _COLUMNS if name in given}
    given = overlaid(given, {"data": columns}) if columns else given
    extra = {name: given.pop(name) for name in _EXTRA.get(verb, ()) if name in given}
    if show:
        _print_config(_config(given))
        return
    quiet()
    if verb == "evaluate":
        _evaluate(given, extra)
    else:
        _STAGE_VERBS[verb](_config(given), **extra)


_EXTRA: dict[str, tuple[str, ...]] = {
    "run": ("estimation", "overwrite"),
    "plan": ("estimation",),
    "bench": ("rounds", "steps", "json"),
    "evaluate": ("model", *_EVALUATE),
}
"""Options of a verb that are no settings of a run."""


def _print_config(config: RunConfig) -> None:
    with streams.utf8_output() as file:
        file.write(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))


def _run(config: RunConfig, **options: Any) -> None:
    from lightpeft.runs import pipeline

    _show_metrics(pipeline.run(config, **options))


def _estimate(config: RunConfig) -> None:
    from lightpeft.runs import pipeline

    record = pipeline.estimate(pipeline.prepare(config))
    _out.print(f"{record.meta['steps']} steps; scores are in {config.output}/estimation", markup=False, soft_wrap=True)


def _plan(config: RunConfig, estimation: str | None = None) -> None:
    from lightpeft.cli.tables import plan_table
    from lightpeft.runs import pipeline
    from lightpeft.runs.reuse import find_estimation, take_estimation
    from lightpeft.saved.run_folder import RunFolder

    run = RunFolder.open(config, replan=True)
    if estimation is not None:
        take_estimation(run, find_estimation(config, Path(estimation)))
    _out.print(plan_table(pipeline.plan(run)))


def _prune(config: RunConfig) -> None:
    from lightpeft.runs import pipeline

    pipeline.prune(pipeline.prepare(config))
    _out.print(f"the pruned model is in {config.output}/pruned", markup=False, soft_wrap=True)


def _train(config: RunConfig) -> None:
    from lightpeft.runs import pipeline

    pipeline.train(pipeline.prepare(config))
    _out.print(f"the trained adapter is in {config.output}/adapter", markup=False, soft_wrap=True)


def _bench(config: RunConfig, **options: Any) -> None:
    from lightpeft.cli.tables import bench_table
    from lightpeft.runs.bench import bench

    _out.print(bench_table(bench(config, **options)))


_STAGE_VERBS: dict[str, Callable[..., None]] = {
    "run": _run,
    "estimate": _estimate,
    "plan": _plan,
    "prune": _prune,
    "train": _train,
    "bench": _bench,
}


def _show_metrics(report: dict[str, Any]) -> None:
    from lightpeft.cli.tables import facts_table, metrics_table, milestones_table

    _out.print(metrics_table(report["metrics"], report.get("intervals", {}), f"method {report['method']}"))
    if "milestones" in report:  # older runs have none
        _out.print(milestones_table(report["milestones"]))
    _out.print(facts_table(report["parameters"], "parameters"))
    _warn(report.get("warnings", []))


def _warn(lines: Sequence[str]) -> None:
    """Say what there is to worry about, one line each."""
    for line in lines if not _out.quiet else ():
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"warning: {line}", markup=False)


def _config(given: dict[str, Any]) -> RunConfig:
    """Settings of a run: those of `--run` or of `--config`, with the options on top."""
    return run_config_from_dict(_settings(given))


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """The same as far as they are given, nested, before presets and defaults."""
    from lightpeft.saved.run_folder import stored_settings

    file, folder = given.pop("config", None), given.pop("run", None)
    require(not (file and folder), "give --config or --run, not both: a run folder has its own config.yaml")
    data: dict[str, Any] = {}
    if folder is not None:
        require((Path(folder) / "config.yaml").is_file(), f"{folder} is not a run folder: it has no config.yaml")
        data = {**stored_settings(Path(folder)), "output": str(folder)}
    elif file is not None:
        data = load_yaml(file)
    return overlaid(data, given)


# -- evaluate ----------------------------------------------------------------------------------------------------


def _evaluate(given: dict[str, Any], options: dict[str, Any]) -> None:
    """Measure a model or, if none is named, do the stage of a run and then what the options ask for."""
    from lightpeft.runs import pipeline

    model = options.pop("model", None)
    if model is None:
        config = _config(given)
        report = pipeline.evaluate(pipeline.prepare(config))
        if not options:
            _show_metrics(report)
            return
        model, settings = config.output, {"model": {name: getattr(config.model, name) for name in SWITCHES}}
    else:
        require("run" not in given, f"give {model} or --run, not both: a run folder can be the model itself")
        settings = _settings(given)
    measure = _evaluate_harness if options.pop("harness", None) else _evaluate_task
    measure(model, settings, **options)


def _evaluate_task(model: str, settings: dict[str, Any], compare: str | None = None, **options: Any) -> None:
    from lightpeft.cli.tables import metrics_table, paired_table, per_class_table
    from lightpeft.evaluation.reports import evaluate_model

    only = [name for name in ("tasks", "include_path", "num_fewshot", "limit") if name in options]
    require(not only, f"--{' and --'.join(only)} need --harness lm-eval; a task of lightpeft's own is --data.task")
    report = evaluate_model(model, settings, other=compare, **options)
    shown = [report[name] for name in ("model", "other") if name in report]
    for entry in shown:
        title = f"{entry['name']}: {report['task']}"
        _out.print(metrics_table(entry["metrics"], entry["intervals"], title, report["constant_answer"]))
        _warn([f"{entry['name']}: {line}" for line in entry["warnings"]])
    if "comparison" in report:
        _out.print(paired_table(report["comparison"], *(entry["name"] for entry in shown)))
    if "classes" in report:
        _out.print(per_class_table(report["classes"]))


def _evaluate_harness(model: str, settings: dict[str, Any], compare: str | None = None, **options: Any) -> None:
    from lightpeft.cli.tables import metrics_table, paired_table
    from lightpeft.evaluation.reports import evaluate_harness

    only = [name for name in ("per_class", "predictions") if name in options]
    require(not only, f"--{' and --'.join(only)} are about lightpeft's own tasks; leave them out with --harness")
    names = [name for name in (options.pop("tasks", None) or "").split(",") if name]
    report = evaluate_harness(model, names, settings, other=compare, **options)
    shown = [report[name] for name in ("model", "other") if name in report]
    for entry in shown:
        for task, scores in entry["tasks"].items():
            _out.print(metrics_table(scores["metrics"], scores["intervals"], f"{entry['name']}: {task}"))
    for task, comparison in report.get("comparison", {}).items():
        _out.print(task, markup=False)
        _out.print(paired_table(comparison, *(entry["name"] for entry in shown)))


# -- verbs on results --------------------------------------------------------------------------------------------


def _predict_options(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="Folder of a light adapter, a merged light model or a finished run.")
    parser.add_argument(
        "input",
        type=str | None,
        nargs="?",
        help="Text lines (.txt), a table (.csv, .tsv, .json, .jsonl, .parquet), or - for stdin: text lines or, where a "
        "row needs several columns, JSON lines.",
    )
    parser.add_argument(
        "--example", type=str, help="One row instead of a file: its text, or a JSON object if it needs several columns."
    )
    parser.add_argument("--output", type=str, help="Where predictions go, .csv or .jsonl (default: stdout, as CSV).")
    parser.add_argument("--base", type=str, help="Name or folder of the base, if it moved since the adapter was saved.")
    parser.add_argument("--batch_size", type=int, help="Rows a forward pass (default: as many as fit into memory).")
    parser.add_argument(
        "--answer_tokens", type=int, help="Tokens of an answer at most, where it is a text (default: as in training)."
    )
    for name, what in (("text", "the text"), ("text_pair", "the second text")):
        parser.add_argument(
            f"--data.{name}", f"--{name}", type=str, help=f"Column with {what} (default: as in training)."
        )
    parser.add_argument(
        "--bf16", type=bool, nargs="?", const=True, help="Compute in bfloat16, or not (default: as the run evaluated)."
    )
    _switch_options(parser)


def _switch_options(parser: ArgumentParser) -> None:
    parser.add_argument("--trust_remote_code", action="store_true", help="Run Python code that comes with the base.")
    parser.add_argument("--allow_pickle", action="store_true", help="Read pickled weights of the base (.bin).")


def _predict(options: Namespace) -> None:
    from lightpeft.evaluation.predicting import predict

    quiet()
    given = options.as_dict()
    predict(
        given.pop("model"),
        given.pop("input", None),
        **given.pop("data", {}),
        **given,
        announce=lambda line: _warn([line]),
    )


def _export_options(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="Folder of a light adapter or of a finished run.")
    parser.add_argument("output", type=str, help="Where the whole model goes: a new folder.")
    parser.add_argument("--base", type=str, help="Name or folder of the base, if it moved since the adapter was saved.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a merged light model that is there.")
    _switch_options(parser)


def _export(options: Namespace) -> None:
    from lightpeft.saved.merging import save_merged
    from lightpeft.saved.opening import find_model, open_light

    quiet()
    switches = {name: options[name] for name in SWITCHES if name in options}
    found = find_model(options.model, options.get("base"), switches)
    light = open_light(found)
    native = save_merged(light, options.output, found.tokenizer(), overwrite=options.get("overwrite", False))
    reader = "transformers" if native else "lightpeft.load_merged"
    line = f"{light.light_plan.summary()}; the model is in {options.output}, for {reader} to load"
    _out.print(line, markup=False, soft_wrap=True)


def _inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "path", type=str, help="plan.json, or the folder of an adapter, a merged light model, an estimation or a run."
    )


def _inspect(options: Namespace) -> None:
    from lightpeft.cli.inspecting import inspect

    streams.standard_output()
    for table in inspect(Path(options.path)):
        _out.print(table)


def _reproduce_options(parser: ArgumentParser) -> None:
    parser.add_argument("grid", type=str, help="YAML file of the grid; paths in it are relative to this folder.")
    parser.add_argument("--out", type=str, help="Folder of the cells and tables (default: runs/<folder>/<file>).")
    parser.add_argument(
        "--only",
        type=str,
        nargs="+",
        default=[],
        metavar="AXIS=NAME",
        help="Run a part of the grid, as in method=lora seed=0; several of one axis are alternatives.",
    )
    parser.add_argument(
        "--devices",
        type=int,
        help="Accelerators, or without any processes on the CPU, that each cell is spread over (default: all; 1).",
    )


def _reproduce(options: Namespace) -> None:
    from lightpeft.runs.reproduce import reproduce, rich_table

    quiet()
    given = options.as_dict()
    results = reproduce(given.pop("grid"), **given)
    _out.print(rich_table(results, _out.width))
    if results.failures:
        sys.exit(1)


_OPTIONS: dict[str, Callable[[ArgumentParser], None]] = {
    "run": _run_options,
    "plan": _plan_options,
    "evaluate": _evaluate_options,
    "bench": _bench_options,
    "predict": _predict_options,
    "export": _export_options,
    "inspect": _inspect_options,
    "reproduce": _reproduce_options,
}
"""What adds the options of a verb; of all others those of a run."""
_OTHER_VERBS: dict[str, Callable[[Namespace], None]] = {
    "predict": _predict,
    "export": _export,
    "inspect": _inspect,
    "reproduce": _reproduce,
}


# -- errors ------------------------------------------------------------------------------------------------------


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"lightpeft: {message}", markup=False)
    sys.exit(code)


def quiet() -> None:
    """Leave the screen to lightpeft's own bars, tables and one-line errors; of several processes, the main one's."""
    from lightpeft.machine import processes
    from lightpeft.models.loading import quiet_libraries

    quiet_libraries()
    _out.quiet = not processes().is_main_process
