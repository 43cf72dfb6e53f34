"""The stages of a run: estimate -> plan -> prune -> fine-tune (-> widen) -> evaluate.

A run does the stages that are not done yet, in one training where possible: the live model goes from stage to stage.
Each stage writes its result into the run folder, so a stopped run continues where it was, and a stage can be run alone;
both give the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, set_seed

from lightpeft.adapters.full_width import load_full_width
from lightpeft.adapters.light_adapter import load_light, save_metrics
from lightpeft.app.evaluation.linear_probe import LinearProbe, doubts_by_depth, is_probed, linear_probe
from lightpeft.app.evaluation.milestones import Watcher, majority_score, notices
from lightpeft.app.evaluation.overlap import seen_rows
from lightpeft.app.evaluation.scores import Scores, scores_of
from lightpeft.app.folders.forms import to_device
from lightpeft.app.folders.metrics_file import read_report
from lightpeft.app.folders.opening import open_result
from lightpeft.app.folders.results import Model, open_peft, save_full, save_result
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs.depth import found_depth, settle_depth
from lightpeft.app.runs.reuse import find_estimation, take_estimation
from lightpeft.app.runs.stages import (
    LEARNING,
    StageCost,
    estimated_model,
    found_budget,
    write_estimation,
    write_plan,
    write_pruned,
)
from lightpeft.app.runs.stopping import stop_facts, stop_line
from lightpeft.app.runs.trainers import DenseRun, LightRun, WideRun
from lightpeft.app.runs.workspace import Workspace, prepare
from lightpeft.app.tasks.answers import Outcome
from lightpeft.app.tasks.loading import task_facts
from lightpeft.config import SWITCHES, RunConfig
from lightpeft.console.progress import print_line
from lightpeft.errors import LightPeftError, require
from lightpeft.files import explain_content_errors, write_json
from lightpeft.machine import processes, sharding_launched
from lightpeft.models.unwrap import transformers_model
from lightpeft.models.vocabulary.cutting import cut_parameters
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.memory import PeakMemory
from lightpeft.profiling.sizes import folder_bytes, parameter_report
from lightpeft.profiling.surroundings import hardware
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.checkpoints import read_cut
from lightpeft.recipe.pruner import EarlyPruner
from lightpeft.training.fitting import run_training
from lightpeft.training.loss_rise import loss_rise

__all__ = ["Workspace", "estimate", "evaluate", "plan", "prepare", "prune", "run", "train", "widen"]


def run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    estimation: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Run all stages of a configuration that are not finished yet, as `lightpeft run` does.

    The folder `config.output` then holds the estimation, the plan, the adapter, `metrics.json` and logs.

    Args:
        config: settings of the run, as from `load_config`.
        overwrite: True to delete a run with other settings from the output folder first.
        estimation: folder of another run whose estimation is reused; None: estimate.
        callbacks: further callbacks of the trainer.

    Returns:
        The content of `metrics.json`: metrics with intervals, milestones, warnings, parameters, and time, speed and
        memory of each stage.

    Raises:
        LightPeftError: a setting, the data or the model is invalid, or the output folder holds something else.
        Interrupted: a signal stopped the run; the same call continues it.

    Example:
        ```python
        metrics = run(load_config("run.yaml"))
        print(metrics["metrics"]["accuracy"])
        ```
    """
    given = f"run got a {type(config).__name__}; make a RunConfig by load_config"
    require(isinstance(config, RunConfig), given)
    work = prepare(config, overwrite=overwrite)
    donor = None if estimation is None else find_estimation(config, Path(estimation))
    if overwrite:
        work.run.start_anew()
    if donor is not None:
        take_estimation(work.run, donor)
    finished = work.run.has("evaluate")
    if config.method_spec.prunes and not work.run.has("estimate"):
        _train_light(work, callbacks)
    elif config.method_spec.prunes:
        plan(work)
    train(work, callbacks, prune(work) if config.method_spec.prunes else None)
    metrics = evaluate(work)
    if finished and processes().is_main_process:
        print_line(f"{config.output} was finished already; these are its results")
    return metrics


def estimate(work: Workspace) -> EstimationRecord:
    """Train masks and PEFT modules for the first steps of the run, and score every unit (Light-PEFT, section 3).

    Blocks that `light.remove.depth` leaves out are removed first. If nothing is to be removed, nothing trains.
    """
    if not work.run.has("estimate") and work.config.light.uses_scores:
        _train_light(work, stop_at_cut=True)
    elif not work.run.has("estimate"):
        _write_unscored(work)
    return EstimationRecord.load(work.run.estimation)


def _train_light(work: Workspace, callbacks: Sequence[TrainerCallback] = (), stop_at_cut: bool = False) -> None:
    """Estimate, cut and fine-tune in one training, from a checkpoint before the cut if there is one."""
    run = work.run
    work.taught_rows()  # frees the memory of the teacher before the student is loaded
    settle_depth(work)
    set_seed(work.config.seed)
    trainer = LightRun(work, _with_peft(work), stop_at_cut=stop_at_cut, callbacks=callbacks)
    with run.held():
        trainer.settle()
        work.announce_settings()
        run_training(trainer, run.last_checkpoint("train"))
        ended = f"a callback stopped training at step {trainer.state.global_step}, during estimation"
        require(run.has("estimate"), f"{ended}; let it run at least until the cut")
        if not stop_at_cut:
            _finish(work, trainer, begun=trainer.light_report["estimation_steps"])


def _write_unscored(work: Workspace) -> None:
    """Write an estimation without steps: PEFT modules at their initial values, and a record without scores."""
    settle_depth(work)
    set_seed(work.config.seed)
    started, model = time.perf_counter(), _with_peft(work)
    with PeakMemory(model) as memory:
        pruner = EarlyPruner(model, work.config.light)
        pruner.estimator.start(work.steps)
        record = pruner.record()
        pruner.estimator.stop()
    with work.run.held():
        work.announce_settings()
        seconds = time.perf_counter() - started
        write_estimation(work, model, record, StageCost(seconds, 0.0, memory.bytes, memory.method, 0))


def _with_peft(work: Workspace) -> PeftModel:
    return add_peft(work.dense_model(to_train=True), work.config)


def plan(work: Workspace | RunFolder) -> PrunePlan:
    """Make the plan (which heads, neurons, modules and ranks to keep) from the scores and the budget.

    Args:
        work: the run; its folder is enough if the budget is a number.
    """
    run = work if isinstance(work, RunFolder) else work.run
    run.need("estimate", "plan")
    with nullcontext() if run.has("prune") else run.held():  # the plan of a pruned run does not change
        if run.config.light.is_auto and isinstance(work, Workspace) and found_budget(run) is None:
            _find_budget(work)
        return write_plan(run)


def _find_budget(work: Workspace) -> None:
    """Search for the budget of `light: auto` after a finished estimation, and write it into the run folder."""
    record = EstimationRecord.load(work.run.estimation)
    set_seed(work.config.seed)
    light = work.config.light.with_depth(0.0)  # those blocks are gone
    work = replace(work, config=replace(work.config, light=light), teacher=None)  # labels alone tell
    LightRun(work, estimated_model(work, record)).write_light_budget(record)


def prune(work: Workspace) -> LightModel | None:
    """Cut the model by the plan; return it, or None if the run was pruned before."""
    run = work.run
    if run.has("prune"):
        return None
    run.need("plan", "prune")
    chosen = PrunePlan.load(run.plan)
    set_seed(work.config.seed)
    model = estimated_model(work, chosen)
    with run.held():
        return write_pruned(work, model, chosen)


def train(work: Workspace, callbacks: Sequence[TrainerCallback] = (), model: Model | None = None) -> None:
    """Fine-tune: the pruned model (method light), the base with plain PEFT (plain), or all weights of it (full).

    Afterwards `widen` the result, if the run keeps it at full width.

    Args:
        callbacks: callbacks of the trainer.
        model: the return value of `prune` or, of other methods, a model to train; None: it is loaded or made.
    """
    way = work.config.method_spec
    if not work.run.has("train"):
        work.taught_rows()
        set_seed(work.config.seed)
        if way.prunes:
            work.run.need("prune", "train")
            _train_behind_the_cut(work, model or _pruned_model(work), callbacks)
        else:
            _train_dense(work, model or (_with_peft(work) if way.has_peft else _full_model(work)), callbacks)
    del model  # frees its memory before the whole base is loaded
    widen(work, callbacks)


def _train_dense(work: Workspace, model: Model, callbacks: Sequence[TrainerCallback]) -> None:
    trainer = DenseRun(work, model, callbacks)
    with work.run.held():
        trainer.settle()
        work.announce_settings()
        run_training(trainer, work.run.last_checkpoint("train"))
        _finish(work, trainer)


def _pruned_model(work: Workspace) -> LightModel:
    """Load the pruned model for training, straight into the cut layers, so that memory never holds the dense model."""
    model = work.config.model
    switches = {name: getattr(model, name) for name in SWITCHES}
    try:
        as_asked = {"attn_implementation": model.attn_implementation, **switches}
        light = load_light(work.run.pruned, is_trainable=True, low_memory=True, **as_asked)
        return light if sharding_launched() else to_device(light)
    except LightPeftError:  # a quantized base or another file format, which is read whole; damage raises again below
        return load_light(work.run.pruned, work.dense_model().model, is_trainable=True)


def _train_behind_the_cut(work: Workspace, light: Model, callbacks: Sequence[TrainerCallback]) -> None:
    """Continue training from the cut, or from a checkpoint after it."""
    run, begun = work.run, EstimationRecord.load(work.run.estimation).meta["steps"]
    trainer = LightRun(work, light, callbacks=callbacks)
    with run.held():
        trainer.settle()
        checkpoint = run.last_checkpoint("train")
        if checkpoint is None or read_cut(checkpoint) is None:
            checkpoint = trainer.checkpoint_at_cut(begun)
        run_training(trainer, checkpoint)
        _finish(work, trainer, begun=begun)


def widen(work: Workspace, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Put the PEFT modules of the pruned model over the whole base, and train them there for the last steps of the run.

    Do nothing if the run does not keep the full width (`light.after.keep`), or has it already.
    """
    run = work.run
    if not run.keeps_full or run.has("widen"):
        return
    run.need("train", "widen")
    set_seed(work.config.seed)
    started, watcher = time.perf_counter(), work.watcher()
    model = load_full_width(run.adapter, work.dense_model().model, is_trainable=True)
    watcher.look("at_full_width", model)

    def save() -> None:
        save_full(run, model, task_facts(work.task))

    if work.last_steps:
        trainer = WideRun(work, model, callbacks)
        with run.held():
            trainer.settle()
            run_training(trainer, run.last_checkpoint(trainer.stage))
            _finish(work, trainer, save, **watcher.facts())
        return
    with run.held():
        run.finish_stage("widen", time.perf_counter() - started - watcher.seconds, save, **watcher.facts())


def _finish(
    work: Workspace,
    trainer: LightRun | DenseRun,
    save: Callable[[], None] | None = None,
    begun: int = 0,
    **facts: Any,
) -> None:
    """Write the result of training into the run folder.

    Args:
        save: writes the result; None: as the run's method does.
        begun: number of steps of the run before this training.
        facts: more entries for the log.

    Raises:
        LightPeftError: training diverged.
    """
    run, model, step = work.run, trainer.model, trainer.state.global_step
    assert trainer.meter is not None
    cost = trainer.meter.stop(step)
    require(_finite(model), "training diverged: trained weights are NaN or infinite; lower training.learning_rate")

    told = stop_facts(trainer, work) if trainer.stage == "train" else {}
    if told:
        run.announce("train", stop_line(told["stopped"]))
    rise = loss_rise(trainer.state.log_history, begun)
    if rise is not None:
        run.announce(trainer.stage, f"warning: {rise}")
        told["loss_rise"] = asdict(rise)

    def save_trained() -> None:
        save_result(run, model, work.tokenizer, task_facts(work.task))

    run.finish_stage(trainer.stage, **asdict(cost), save=save or save_trained, steps=step - begun, **facts, **told)


def _full_model(work: Workspace) -> PreTrainedModel:
    """Load the dense model for method full, which trains all its weights."""
    on_disk = "method full trains every weight, which model.low_memory leaves on disk; set model.low_memory to false"
    require(not work.config.model.low_memory, on_disk)
    model = work.dense_model().model
    quantized = getattr(model, "is_quantized", False)
    require(
        not quantized,
        "method full cannot train a quantized base; give an unquantized one, and leave model.quantization unset",
    )
    return model


def evaluate(work: Workspace) -> dict[str, Any]:
    """Measure the result on the test rows; write the metrics to metrics.json and into the light adapter."""
    run = work.run
    if run.has("evaluate"):
        return read_report(run.metrics)
    run.need(run.last_training, "evaluate")
    started = time.perf_counter()
    watcher = work.watcher()
    base, probe = _measure_base(work, watcher)
    model = open_result(run, work.task, base)
    outcomes = measure(work, model)
    scores = scores_of(outcomes, work.task)
    if watcher.examples == len(work.task.test):
        watcher.outcomes["final"] = outcomes[""]
    else:
        watcher.look("final", model)
    earlier = [entry for stage, entry in run.finished_stages().items() if stage != "evaluate"]
    noticed = notices(watcher, earlier, outcomes[""].answers, scores.intervals)
    besides = _measure_full_width(work) if isinstance(model, LightModel) and run.keeps_full else {}
    if probe is not None:
        besides["linear_probe"] = probe.facts()
        noticed["warnings"] += probe.doubts(scores, work.task, majority_score(outcomes[""].answers, work.task))
    noticed["warnings"] += doubts_by_depth(found_depth(run) or {}, scores)
    if (line := seen_rows(work.task, work.task.train)) is not None:
        noticed["warnings"].append(line)

    def save() -> None:
        if isinstance(model, LightModel):
            model.light_metrics, model.light_intervals = dict(scores.metrics), dict(scores.intervals)
            save_metrics(model, run.adapter)
        write_json(run.metrics, {**report(work, model, scores), **besides, **noticed})

    seconds = time.perf_counter() - started - watcher.seconds
    with run.held():
        run.finish_stage("evaluate", seconds, save, warnings=noticed["warnings"])
    return read_report(run.metrics)


def _measure_full_width(work: Workspace) -> dict[str, Any]:
    """Measure the full-width model of a run that keeps it beside the light one."""
    model = open_peft(work.run.full, work.dense_model().model)
    scores = scores_of(measure(work, model), work.task)
    return {"full_width": {"metrics": scores.metrics, "intervals": scores.intervals}}


def _measure_base(work: Workspace, watcher: Watcher) -> tuple[PreTrainedModel | None, LinearProbe | None]:
    """Measure the base model before a result is built on it, and fit the linear probe.

    Returns:
        The base (None: the result needs no base), and the probe (None: the run has none).
    """
    base = work.dense_model()
    if not base.new_modules:  # a new head is random, and so are its answers
        watcher.look("base_model", base.model)
    probe = _probe(work, watcher, base.model)
    return base.model if work.config.method_spec.has_peft else None, probe


def _probe(work: Workspace, watcher: Watcher, base: PreTrainedModel) -> LinearProbe | None:
    """Fit a linear probe on the base; a failure becomes a warning, and does not end the run."""
    task = work.task
    if not is_probed(task, base.config):
        return None
    started = time.perf_counter()
    try:
        return linear_probe(work.respondent(base), base, task, task.encode(task.train, work.tokenizer), work.test_rows)
    except LightPeftError as error:
        watcher.warnings.append(f"linear probe: {error}")
        return None
    finally:
        watcher.seconds += time.perf_counter() - started


def measure(work: Workspace, model: Model) -> dict[str, Outcome]:
    """Compute the model's answers on the test rows (prefix ""), and on further splits by their prefix."""
    asked, splits = work.respondent(model), {"": work.test_rows, **work.more_test_rows}
    return {prefix: work.task.answer(asked, rows) for prefix, rows in splits.items()}


def report(work: Workspace, model: Model, scores: Scores) -> dict[str, Any]:
    """Make the content of metrics.json: quality, parameters, times, and all that is needed to repeat the run."""
    run, config = work.run, work.config
    return {
        "method": config.method,
        "metrics": scores.metrics,
        "intervals": scores.intervals,
        "main_metric": work.task.main_metric,
        "parameters": parameter_report(model),
        **_vocabulary_report(work, model),
        "seconds": run.stage_seconds(),
        "training": dict(_training_costs(run)),
        **_estimation_report(run),
        **_stopped_report(run),
        **({"depth": depth} if (depth := found_depth(run)) is not None else {}),
        **({"budget": budget} if (budget := found_budget(run)) is not None else {}),
        "adapter_bytes": folder_bytes(run.result),
        "seed": config.seed,
        "hardware": hardware(),
        "config": asdict(config),
    }


def _estimation_report(run: RunFolder) -> dict[str, Any]:
    """Return the steps of estimation, and how much the model learned in it."""
    entry = run.finished_stages().get("estimate")
    with explain_content_errors(run.log):
        return {"estimation": {name: entry[name] for name in LEARNING}} if entry is not None else {}


def _stopped_report(run: RunFolder) -> dict[str, Any]:
    """Return the step at which training stopped early and the step that was kept; nothing if it ran to its end."""
    entry = run.finished_stages().get("train", {})
    return {"stopped": entry["stopped"]} if "stopped" in entry else {}


def _vocabulary_report(work: Workspace, model: Model) -> dict[str, Any]:
    """Return the number of tokens kept and of parameters removed with the others; nothing if the run keeps all."""
    if work.vocabulary is None:
        return {}
    counts = {"tokens": len(work.vocabulary), "of": work.vocabulary.size}
    lost = {"removed_parameters": cut_parameters(transformers_model(model))}
    return {"vocabulary": {**counts, **lost}}


def _training_costs(run: RunFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the time and memory of each training stage by its name."""
    names = [field.name for field in fields(StageCost)]
    for stage, entry in run.finished_stages().items():
        if entry.keys() >= set(names):
            yield stage, {name: entry[name] for name in names}


def _finite(model: Model) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad)
