"""The story of a run: estimate -> plan -> prune -> fine-tune -> evaluate.

Each stage reads what the one before it left in the run folder and leaves its own result there, so a run that was
stopped anywhere goes on where it was, and a stage can be run alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from lightpeft.config import ModelConfig, RunConfig, TrainingConfig
from lightpeft.console.bars import silent
from lightpeft.errors import require
from lightpeft.evaluation import answering
from lightpeft.evaluation.answering import Outcome, Scores
from lightpeft.evaluation.milestones import Watcher, notices, sample
from lightpeft.files import check_sealed, replacing_folder, seal, write_json
from lightpeft.machine import accelerator, autocast_dtype, check_precision, has_bf16, processes
from lightpeft.models.families import max_positions
from lightpeft.models.loading import LoadedModel, load_model, load_model_config, load_tokenizer
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.profiling import MemoryMethod, PeakMemory, folder_bytes, hardware, throughput
from lightpeft.profiling.sizes import parameter_report
from lightpeft.prune.depth import leave_out
from lightpeft.prune.discovery import ensure_family
from lightpeft.prune.estimation import check_examples, stage_length
from lightpeft.recipe.pruner import EarlyPruner, cut
from lightpeft.runs.reuse import find_estimation, take_estimation
from lightpeft.saved.light_adapter import LightModel, load_light, save_metrics
from lightpeft.saved.peft_adapter import load_adapter, read_adapter
from lightpeft.saved.run_folder import RunFolder, read_report
from lightpeft.tasks import (
    Collator,
    Task,
    check_max_length,
    check_tokens,
    check_vocabulary,
    ensure_pad_token,
    load_task,
    share_at_limit,
    task_facts,
)
from lightpeft.tasks.tokens import without_labels
from lightpeft.training.acceleration import accelerated, base_dropout
from lightpeft.training.prefix import Collate, FrozenPrefix, PrefixCache, cache_prefix
from lightpeft.training.schedule import least_examples, scored_steps, settled, steps_an_epoch, total_steps
from lightpeft.training.trainer import fit, make_trainer, step_of

NOTABLE_CUTS = 0.05
"""Part of the training rows that may be cut without a word."""
Model: TypeAlias = PeftModel | PreTrainedModel
"""What is trained and measured: a model with PEFT or, with method full, the model itself."""


@dataclass
class Workspace:
    """A run with its data at hand."""

    run: RunFolder
    task: Task
    tokenizer: PreTrainedTokenizerBase
    train_rows: Dataset
    test_rows: Dataset
    more_test_rows: dict[str, Dataset]
    """Rows of further splits to evaluate on, by the prefix of their metrics."""
    positions: int | None
    """Tokens that the model's position table has room for; None: any number."""
    config: RunConfig
    """The run's settings, with numbers for what is auto in `training`."""

    @property
    def collator(self) -> Collator:
        """Rows to padded batches."""
        multiple, length = self.config.training.pad_to_multiple_of, self.config.data.max_length
        fits = self.positions is None or math.ceil(length / multiple) * multiple <= self.positions
        return self.task.collator(self.tokenizer, multiple if fits else None)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, estimation included."""
        return total_steps(len(self.train_rows), self.config.training, processes=processes().num_processes)


def run(config: RunConfig, *, overwrite: bool = False, estimation: str | Path | None = None) -> dict[str, Any]:
    """Run all stages that are not done yet and return the metrics.

    Args:
        overwrite: where the output folder holds the run of another config, remove that and begin anew.
        estimation: folder of another run, whose estimation is taken instead of one of this run's own.

    Raises:
        LightPeftError: bad input, or an output folder that holds something else.
        Interrupted: a signal stopped the run; the same call goes on from there.
    """
    work = prepare(config, overwrite=overwrite)
    donor = None if estimation is None else find_estimation(config, Path(estimation))
    if overwrite:
        work.run.start_anew()
    if donor is not None:
        take_estimation(work.run, donor)
    if config.method == "light":
        estimate(work)
        plan(work.run)
        prune(work)
    train(work)
    return evaluate(work)


def prepare(config: RunConfig, *, overwrite: bool = False) -> Workspace:
    """Read and check the data, the tokenizer and the run folder; nothing is written yet.

    Args:
        overwrite: the output folder may hold the run of another config.
    """
    check_precision(config.training)
    model_config = load_model_config(config.model)
    task = load_task(config.data, model_config, config.tasks)
    tokenizer = load_tokenizer(config.model)
    positions = max_positions(model_config)
    check_max_length(config.data.max_length, positions, tokenizer)
    check_vocabulary(tokenizer, model_config)
    ensure_pad_token(tokenizer, model_config)
    train_rows = task.encode(task.train, tokenizer, config.data.max_length)
    test_rows = task.encode_test(task.test, tokenizer, config.data.max_length)
    more = {
        prefix: task.encode_test(rows, tokenizer, config.data.max_length) for prefix, rows in task.more_tests.items()
    }
    for what, rows in {"the training rows": train_rows, "the test rows": test_rows, **more}.items():
        check_tokens(rows, tokenizer, model_config, what)
    run = RunFolder.open(config, overwrite=overwrite)
    width = getattr(model_config.get_text_config(), "hidden_size", None)
    numbers = settled(config, len(train_rows), width, processes().num_processes)
    work = Workspace(run, task, tokenizer, train_rows, test_rows, more, positions, numbers)
    if config.method == "light" and (overwrite or not run.has("estimate")):
        _check_estimation(work)
    return work


def _check_estimation(work: Workspace) -> None:
    """Before anything is trained: whether estimation leaves steps to train with, and sees enough to be trusted."""
    steps, light = work.steps, work.config.light
    length = stage_length(light, steps)
    require(length < steps, f"estimation of {length} steps leaves none of the run's {steps}; shorten light.length")
    rows, number = len(work.train_rows), processes().num_processes
    check_examples(light, least_examples(scored_steps(length), rows, work.config.training, number))


def estimate(work: Workspace) -> EstimationRecord:
    """Train masks and PEFT modules together for the first steps of the run, and record every unit's importance.

    Blocks that `light.depth` leaves out are gone before that: `EarlyPruner` takes them out.
    """
    run, config = work.run, work.config
    if run.has("estimate"):
        return EstimationRecord.load(run.estimation)
    set_seed(config.seed)
    model = add_peft(dense_model(work), config)
    pruner = EarlyPruner(model, config.light)
    length = stage_length(config.light, work.steps)
    with run.held():
        checkpoint = run.last_checkpoint("estimate")
        options = {"shown_steps": length, "callbacks": [pruner.callback(resume_from=checkpoint)]}
        cost = _train_stage(work, model, "estimate", work.steps, config.seed, checkpoint, **options)
        record = pruner.record()

        def save() -> None:
            save_peft(model, run.estimation / "adapter")
            record.save(run.estimation)

        run.finish_stage("estimate", **asdict(cost), save=save, steps=record.meta["steps"])
    return record


def plan(run: RunFolder) -> PrunePlan:
    """Decide from the record and the budget which units stay."""
    run.need("estimate", "plan")
    result = make_plan(EstimationRecord.load(run.estimation), run.config.light)
    if run.has("plan") and run.has("prune"):
        unchanged = PrunePlan.load(run.plan) == result
        require(unchanged, f"{run.path} was pruned by another plan already; give another output for this budget")
        return result
    with run.held():
        if processes().is_main_process:
            result.save(run.plan)
        processes().wait_for_everyone()
    return result


def prune(work: Workspace) -> None:
    """Cut base and PEFT modules down to the plan; leaves a light adapter that fine-tuning starts from."""
    run, config = work.run, work.config
    if run.has("prune"):
        return
    run.need("plan", "prune")
    started = time.perf_counter()
    chosen = PrunePlan.load(run.plan)
    base = dense_model(work).model
    model = _load_peft(base, run.estimation / "adapter", is_trainable=True)
    watcher = watcher_of(work)
    if chosen.left_out:
        leave_out(model, len(chosen.blocks))  # estimation did without these blocks
    watcher.look("after_estimation", model)
    light = cut(model, chosen, config.light, lambda: calibration_batches(work))
    watcher.look("after_the_cut", light)
    light.light_task = task_facts(work.task)
    seconds = time.perf_counter() - started - watcher.seconds
    with run.held():
        run.finish_stage("prune", seconds, lambda: light.save_pretrained(run.pruned), **watcher.facts())


def watcher_of(work: Workspace) -> Watcher:
    """What looks at the model between stages, on a few test rows."""
    chosen = sample(work.task)
    rows = work.task.encode_test(chosen, work.tokenizer, work.config.data.max_length, progress=silent)
    return Watcher(work.task, rows, len(chosen), lambda model: _asking(work, model))


def calibration_batches(work: Workspace) -> Iterator[dict[str, Tensor]]:
    """Batches of some training rows, without labels, on the device of the model."""
    config = work.config
    generator = torch.Generator().manual_seed(config.seed)
    numbers = torch.randperm(len(work.train_rows), generator=generator)[: config.light.refit_rows].tolist()
    device = accelerator() or torch.device("cpu")
    for start in range(0, len(numbers), config.training.eval_batch_size):
        rows = work.train_rows.select(numbers[start : start + config.training.eval_batch_size]).to_list()
        yield {name: values.to(device) for name, values in without_labels(work.collator(rows)).items()}


def train(work: Workspace) -> None:
    """Fine-tune the small model with the small PEFT (light), the dense one with plain PEFT, or all of the dense one."""
    run, config = work.run, work.config
    if run.has("train"):
        return
    set_seed(config.seed)
    if config.method == "light":
        run.need("prune", "train")
        model: Model = load_light(run.pruned, dense_model(work).model, is_trainable=True)
        steps, seed = work.steps - EstimationRecord.load(run.estimation).meta["steps"], config.seed + 1
    else:
        model = _full_model(work) if config.method == "full" else add_peft(dense_model(work), config)
        steps, seed = work.steps, config.seed
    with run.held():
        cost = _train_stage(work, model, "train", steps, seed, run.last_checkpoint("train"))
        rate = "full_learning_rate" if config.method == "full" else "learning_rate"
        require(_finite(model), f"training diverged: weights are NaN or infinite; lower training.{rate}")
        run.finish_stage("train", **asdict(cost), save=lambda: save_result(work, model), steps=steps)


def _full_model(work: Workspace) -> PreTrainedModel:
    """The dense model, all of whose weights train."""
    model = dense_model(work).model
    quantised = getattr(model, "is_quantized", False)
    require(
        not quantised, "method full trains every weight, which cannot be done in 4 or 8 bits; give the base unquantised"
    )
    return model


@dataclass(frozen=True)
class StageCost:
    """What a training stage took, as metrics.json has it."""

    seconds: float
    """Wall-clock time, that of storing a frozen prefix included; of a resumed stage, that of its last part."""
    samples_per_second: float
    """Training rows a second of all processes together, that time left out."""
    peak_memory_bytes: int
    """Peak of training: on CUDA all that was allocated, else what came on top of the loaded model."""
    peak_memory_method: MemoryMethod
    resumed_at: int
    """Step that the last part of the stage began at; 0 for a stage that was not interrupted."""


def _train_stage(
    work: Workspace, model: Model, stage: str, steps: int, seed: int, checkpoint: Path | None, **options: Any
) -> StageCost:
    """Train for a stage, from a checkpoint if there is one."""
    run, config = work.run, work.config
    announce_settings(work, stage)
    # in estimation the masks of every block train, so that no block is frozen, wherever the modules are
    prefix = FrozenPrefix(model, blocks=[] if stage == "estimate" else None)
    with prefix.attached():
        started = time.perf_counter()
        rows, collator = rows_for(work, prefix, stage, steps)
        caching = time.perf_counter() - started
        trainer = make_trainer(
            model,
            rows,
            collator,
            _settings(config),
            stage=stage,
            checkpoints=run.checkpoints(stage),
            log=run.log,
            steps=steps,
            seed=seed,
            token_loss=work.task.head == "causal-lm",
            **options,
        )
        with accelerating(work, model), PeakMemory(model) as memory:
            seconds = fit(trainer, checkpoint)
    begun = step_of(checkpoint) if checkpoint else 0
    rows_seen = len(work.train_rows)
    a_step = rows_seen / steps_an_epoch(rows_seen, config.training, processes().num_processes)
    speed = throughput(a_step * (trainer.state.global_step - begun), seconds)
    return StageCost(caching + seconds, speed, memory.bytes, memory.method, begun)


def accelerating(work: Workspace, model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block, steps of a light run are faster; the others train as they are used by habit."""
    config = work.config
    if config.method != "light":
        return nullcontext()
    if not config.training.fast_steps:
        return base_dropout(model, config.light.dropout)
    lengths = work.train_rows["length"][:]
    autocast = autocast_dtype(config.training)
    return accelerated(model, lengths, dropout=config.light.dropout, autocast=autocast, loss_alone=True)


def announce_settings(work: Workspace, stage: str) -> None:
    """Say in a run's first stage which settings cost more than a user may know of."""
    if stage != ("estimate" if work.config.method == "light" else "train"):
        return
    asked = work.run.config.training
    if "auto" in (asked.epochs, asked.learning_rate):
        rate = float(_settings(work.config).learning_rate)
        length = f"{work.steps} steps (epochs: {work.config.training.epochs:g})"
        work.run.announce(stage, f"training takes {length} at a learning rate of {rate:.2g}")
    limit = work.config.data.max_length
    share = share_at_limit(work.train_rows, limit) if work.task.cuts else 0.0
    if share >= NOTABLE_CUTS:
        work.run.announce(stage, f"{share:.0%} of the training rows are cut to data.max_length: {limit} tokens")
    if autocast_dtype(work.config.training) is torch.bfloat16 and not has_bf16():
        work.run.announce(stage, "training.bf16 is slow here, without bfloat16 arithmetic; auto takes float32 instead")


def _settings(config: RunConfig) -> TrainingConfig:
    """How the run's method trains."""
    training = config.training
    rates = {
        "full": training.full_learning_rate,
        "plain": float(training.learning_rate),
        "light": float(training.learning_rate) * config.light.learning_rate_scale,
    }
    return replace(training, learning_rate=rates[config.method])


def rows_for(work: Workspace, prefix: FrozenPrefix, stage: str, steps: int) -> tuple[Dataset, Collate]:
    """The training rows and their collator; with the outputs of a frozen prefix where that saves time."""
    config, settings = work.config.training, prefix_cache(work, prefix, steps)
    cached = settings and cache_prefix(
        prefix,
        work.train_rows,
        work.collator,
        settings,
        work.run.checkpoints("prefix"),
        batch_size=config.eval_batch_size,
        autocast=autocast_dtype(config),
        announce=lambda line: work.run.announce(stage, line),
    )
    return (cached.rows, cached.collator) if cached else (work.train_rows, work.collator)


def prefix_cache(work: Workspace, prefix: FrozenPrefix, steps: int) -> PrefixCache | None:
    """How a stage of so many steps keeps the outputs of its frozen blocks; None where no row is seen twice."""
    config = work.config.training
    seen = steps * config.batch_size * config.gradient_accumulation * processes().num_processes
    if config.prefix_cache == "off" or not prefix or seen <= len(work.train_rows):
        return None
    return PrefixCache(config.prefix_cache, config.prefix_dtype, int(config.prefix_limit * 2**30))


def evaluate(work: Workspace) -> dict[str, Any]:
    """Measure the result on the test rows; the numbers go to metrics.json and into the light adapter."""
    run = work.run
    if run.has("evaluate"):
        return read_report(run.metrics)
    run.need("train", "evaluate")
    started = time.perf_counter()
    watcher = watcher_of(work)
    model = trained_model(work, _asked_base(work, watcher))
    outcomes = measure(work, model)
    scores = answering.scores_of(outcomes, work.task)
    if watcher.examples == len(work.task.test):
        watcher.outcomes["in_the_end"] = outcomes[""]
    else:
        watcher.look("in_the_end", model)
    earlier = [entry for stage, entry in run.finished_stages().items() if stage != "evaluate"]
    noticed = notices(watcher, earlier, outcomes[""].answers, scores.intervals)

    def save() -> None:
        if isinstance(model, LightModel):
            model.light_metrics = dict(scores.metrics)
            save_metrics(model, run.adapter)
        write_json(run.metrics, {**report(work, model, scores), **noticed})

    seconds = time.perf_counter() - started - watcher.seconds
    with run.held():
        run.finish_stage("evaluate", seconds, save, warnings=noticed["warnings"])
    return read_report(run.metrics)


def _asked_base(work: Workspace, watcher: Watcher) -> PreTrainedModel | None:
    """The untouched base, which has answered before a result is built on it; None where the result needs none."""
    base = dense_model(work)
    if not base.new_modules:  # else its head is random, and so are its answers
        watcher.look("untouched_base", base.model)
    return None if work.config.method == "full" else base.model


def measure(work: Workspace, model: Model) -> dict[str, Outcome]:
    """What the model does on the test rows (prefix ""), and on those of further splits by their prefix."""
    run, splits = _asking(work, model), {"": work.test_rows, **work.more_test_rows}
    return {prefix: answering.outcome(run, rows, work.task) for prefix, rows in splits.items()}


def _asking(work: Workspace, model: nn.Module) -> answering.Run:
    """How test rows are fed to a model."""
    training = work.config.training
    return answering.Run(model, work.collator, training.eval_batch_size, autocast_dtype(training))


def report(work: Workspace, model: Model, scores: Scores) -> dict[str, Any]:
    """What metrics.json holds: quality, parameters, times, and all that is needed to repeat the run."""
    run, config = work.run, work.config
    return {
        "method": config.method,
        "metrics": scores.metrics,
        "intervals": scores.intervals,
        "main_metric": work.task.main_metric,
        "parameters": parameter_report(model),
        "seconds": run.stage_seconds(),
        "training": dict(_training_costs(run)),
        "adapter_bytes": folder_bytes(run.result),
        "seed": config.seed,
        "hardware": hardware(),
        "config": asdict(config),
    }


def _training_costs(run: RunFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stage by stage what training took, as far as the log knows: older runs noted seconds alone."""
    names = [field.name for field in fields(StageCost)]
    for stage, entry in run.finished_stages().items():
        if entry.keys() >= set(names):
            yield stage, {name: entry[name] for name in names}


def dense_model(work: Workspace, model: ModelConfig | None = None) -> LoadedModel:
    """The untouched foundation model, or another one, with the task's head, on the device that training uses."""
    loaded = load_model(model or work.config.model, work.task.head, work.task.labels)
    ensure_family(loaded.model)
    ensure_pad_token(work.tokenizer, loaded.model.config)
    device = accelerator()
    if device is not None and not getattr(loaded.model, "is_quantized", False):  # those are put there on loading
        loaded.model.to(device)
    return loaded


def trained_model(work: Workspace, base: PreTrainedModel | None = None) -> Model:
    """The run's result, loaded for inference; unless the method is full, over its base, which is changed in place."""
    if work.config.method == "full":
        check_sealed(work.run.model)
        trained = replace(work.config.model, name=str(work.run.model), revision=None, gguf_file=None)
        return dense_model(work, trained).model.eval()
    base = base or dense_model(work).model
    if work.config.method == "light":
        return load_light(work.run.adapter, base)
    return _load_peft(base, work.run.adapter)


def save_result(work: Workspace, model: Model) -> None:
    """Write what training made: an adapter or, with method full, a whole transformers model with its tokenizer."""
    if isinstance(model, PeftModel):
        save_peft(model, work.run.adapter)
        return
    with replacing_folder(work.run.model) as temporary:
        model.save_pretrained(temporary)
        work.tokenizer.save_pretrained(temporary)
        seal(temporary)


def save_peft(model: PeftModel, folder: Path) -> None:
    """Write a light adapter, or an adapter as PEFT writes it: whole or not at all."""
    if isinstance(model, LightModel):
        model.save_pretrained(folder)
        return
    with replacing_folder(folder) as temporary:
        model.save_pretrained(str(temporary))
        seal(temporary)


def _load_peft(base: PreTrainedModel, folder: Path, is_trainable: bool = False) -> PeftModel:
    """What `save_peft` wrote of plain PEFT.

    Raises:
        LightPeftError: a file is missing or altered, or the adapter does not fit.
    """
    check_sealed(folder)
    return load_adapter(base, folder, read_adapter(folder), is_trainable)


def _finite(model: Model) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad)
