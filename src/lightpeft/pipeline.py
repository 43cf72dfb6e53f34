"""The story of a run: estimate -> plan -> prune -> fine-tune -> evaluate.

Each stage reads what the one before it left in the run folder and leaves its own result there, so a run that was
stopped anywhere goes on where it was, and a stage can be run alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from lightpeft import evaluation
from lightpeft.checkpoint import LightModel, load_light
from lightpeft.config import RunConfig
from lightpeft.discovery import ensure_family
from lightpeft.errors import require
from lightpeft.estimation import stage_length
from lightpeft.families import max_positions
from lightpeft.loading import LoadedModel, accelerator, add_peft, load_model, load_model_config, load_tokenizer
from lightpeft.planning import make_plan
from lightpeft.prefix import Collate, FrozenPrefix, PrefixCache, cache_prefix
from lightpeft.profiling import count_parameters, folder_bytes, hardware
from lightpeft.pruner import EarlyPruner, cut
from lightpeft.records import EstimationRecord, PrunePlan, read_json, write_json, writing_files
from lightpeft.runs import RunFolder
from lightpeft.tasks import Collator, Task, check_max_length, ensure_pad_token, load_task
from lightpeft.training import fit, last_checkpoint, make_trainer, total_steps


@dataclass
class Workspace:
    """A run with its data at hand."""

    run: RunFolder
    task: Task
    tokenizer: PreTrainedTokenizerBase
    train_rows: Dataset
    test_rows: Dataset

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self.run.config

    @property
    def collator(self) -> Collator:
        """Rows to padded batches."""
        return self.task.collator(self.tokenizer)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, estimation included."""
        return total_steps(len(self.train_rows), self.config.training, processes=process_count())


def run(config: RunConfig) -> dict[str, Any]:
    """Run all stages that are not done yet and return the metrics.

    Raises:
        LightPeftError: bad input, or an output folder that holds something else.
        Interrupted: a signal stopped the run; the same call goes on from there.
    """
    work = prepare(config)
    if config.method == "light":
        estimate(work)
        plan(work.run)
        prune(work)
    train(work)
    return evaluate(work)


def prepare(config: RunConfig) -> Workspace:
    """Read and check the data, the tokenizer and the run folder; nothing is written yet."""
    model_config = load_model_config(config.model)
    task = load_task(config.data)
    tokenizer = load_tokenizer(config.model)
    check_max_length(config.data.max_length, max_positions(model_config), tokenizer)
    ensure_pad_token(tokenizer, model_config)
    train_rows = task.encode(task.train, tokenizer, config.data.max_length)
    test_rows = task.encode(task.test, tokenizer, config.data.max_length)
    if config.method == "light":
        steps = total_steps(len(train_rows), config.training, process_count())
        length = stage_length(config.light, steps)
        require(length < steps, f"estimation of {length} steps leaves none of the run's {steps}; shorten light.length")
    return Workspace(RunFolder.open(config), task, tokenizer, train_rows, test_rows)


def estimate(work: Workspace) -> EstimationRecord:
    """Train masks and PEFT modules together for the first steps of the run, and record every unit's importance."""
    run, config = work.run, work.config
    if run.has("estimate"):
        return EstimationRecord.load(run.estimation)
    set_seed(config.seed)
    model = add_peft(dense_model(work), config)
    pruner = EarlyPruner(model, config.light)
    callback = pruner.callback(resume_from=last_checkpoint(run.checkpoints("estimate")))
    length = stage_length(config.light, work.steps)
    seconds = _train_stage(work, model, "estimate", work.steps, config.seed, shown_steps=length, callbacks=[callback])
    record = pruner.record()

    def save() -> None:
        save_peft(model, run.estimation / "adapter")
        record.save(run.estimation)

    run.finish_stage("estimate", seconds, save, steps=record.meta["steps"])
    return record


def plan(run: RunFolder) -> PrunePlan:
    """Decide from the record and the budget which units stay."""
    run.need("estimate", "plan")
    result = make_plan(EstimationRecord.load(run.estimation), run.config.light)
    if run.has("plan") and run.has("prune"):
        unchanged = PrunePlan.load(run.plan) == result
        require(unchanged, f"{run.path} was pruned by another plan already; give another output for this budget")
        return result
    run.begin()
    if PartialState().is_main_process:
        result.save(run.plan)
    PartialState().wait_for_everyone()
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
    model = PeftModel.from_pretrained(base, str(run.estimation / "adapter"), is_trainable=True)
    light = cut(model, chosen, config.light, lambda: calibration_batches(work))
    light.light_task = task_facts(work)
    run.finish_stage("prune", time.perf_counter() - started, lambda: light.save_pretrained(run.pruned))


def calibration_batches(work: Workspace) -> Iterator[dict[str, Tensor]]:
    """Batches of some training rows, without labels, on the device of the model."""
    config = work.config
    generator = torch.Generator().manual_seed(config.seed)
    numbers = torch.randperm(len(work.train_rows), generator=generator)[: config.light.refit_rows].tolist()
    device = accelerator() or torch.device("cpu")
    for start in range(0, len(numbers), config.training.eval_batch_size):
        rows = work.train_rows.select(numbers[start : start + config.training.eval_batch_size]).to_list()
        yield {name: values.to(device) for name, values in work.collator(rows).items() if name != "labels"}


def train(work: Workspace) -> None:
    """Fine-tune the small model with the small PEFT (method light), or plain PEFT on the dense model (method plain)."""
    run, config = work.run, work.config
    if run.has("train"):
        return
    set_seed(config.seed)
    if config.method == "light":
        run.need("prune", "train")
        model: PeftModel = load_light(run.pruned, dense_model(work).model, is_trainable=True)
        steps, seed = work.steps - EstimationRecord.load(run.estimation).meta["steps"], config.seed + 1
    else:
        model = add_peft(dense_model(work), config)
        steps, seed = work.steps, config.seed
    seconds = _train_stage(work, model, "train", steps, seed)
    require(_finite(model), "training diverged: weights are NaN or infinite; lower training.learning_rate")
    run.finish_stage("train", seconds, lambda: save_peft(model, run.adapter), steps=steps)


def _train_stage(work: Workspace, model: PeftModel, stage: str, steps: int, seed: int, **options: Any) -> float:
    """Train for a stage, from its last checkpoint if there is one; returns the seconds it took in all."""
    run, config = work.run, work.config
    run.begin()
    prefix = FrozenPrefix(model)
    # in estimation the masks of every block train, so that no block is frozen, wherever the modules are
    with nullcontext() if stage == "estimate" else prefix.attached():
        started = time.perf_counter()
        rows, collator = (work.train_rows, work.collator) if stage == "estimate" else rows_for(work, prefix, stage, steps)
        caching = time.perf_counter() - started
        trainer = make_trainer(
            model,
            rows,
            collator,
            config.training,
            stage=stage,
            checkpoints=run.checkpoints(stage),
            log=run.log,
            steps=steps,
            seed=seed,
            token_loss=config.data.task == "causal-lm",
            **options,
        )
        return caching + fit(trainer, last_checkpoint(run.checkpoints(stage)))


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
        bf16=config.bf16,
        announce=lambda line: work.run.announce(stage, line),
    )
    return (cached.rows, cached.collator) if cached else (work.train_rows, work.collator)


def prefix_cache(work: Workspace, prefix: FrozenPrefix, steps: int) -> PrefixCache | None:
    """How a stage of so many steps keeps the outputs of its frozen blocks; None where no row is seen twice."""
    config = work.config.training
    seen = steps * config.batch_size * config.gradient_accumulation * process_count()
    if config.prefix_cache == "off" or not prefix or seen <= len(work.train_rows):
        return None
    return PrefixCache(config.prefix_cache, config.prefix_dtype, int(config.prefix_limit * 2**30))


def evaluate(work: Workspace) -> dict[str, Any]:
    """Measure the result on the test rows; the numbers go to metrics.json and into the light adapter."""
    run, config = work.run, work.config
    if run.has("evaluate"):
        return read_json(run.metrics)
    run.need("train", "evaluate")
    started = time.perf_counter()
    model = trained_model(work)
    scores = evaluation.evaluate(
        model, work.test_rows, work.task, work.collator, config.training.eval_batch_size, config.training.bf16
    )

    def save() -> None:
        if isinstance(model, LightModel):
            model.light_metrics = dict(scores)
            model.save_pretrained(run.adapter)
        write_json(run.metrics, report(work, model, scores))

    run.finish_stage("evaluate", time.perf_counter() - started, save)
    return read_json(run.metrics)


def report(work: Workspace, model: PeftModel, scores: dict[str, float]) -> dict[str, Any]:
    """What metrics.json holds: quality, parameters, times, and all that is needed to repeat the run."""
    run, config = work.run, work.config
    return {
        "method": config.method,
        "metrics": scores,
        "parameters": parameter_report(model),
        "seconds": run.stage_seconds(),
        "adapter_bytes": folder_bytes(run.adapter),
        "seed": config.seed,
        "hardware": hardware(),
        "config": asdict(config),
    }


def dense_model(work: Workspace) -> LoadedModel:
    """The untouched foundation model with the task's head, on the device that training uses."""
    loaded = load_model(work.config.model, work.config.data.task, work.task.labels)
    ensure_family(loaded.model)
    ensure_pad_token(work.tokenizer, loaded.model.config)
    device = accelerator()
    if device is not None and not getattr(loaded.model, "is_quantized", False):  # those are put there on loading
        loaded.model.to(device)
    return loaded


def trained_model(work: Workspace) -> PeftModel:
    """The run's result, loaded for inference."""
    base = dense_model(work).model
    if work.config.method == "light":
        return load_light(work.run.adapter, base)
    return PeftModel.from_pretrained(base, str(work.run.adapter))


def save_peft(model: PeftModel, folder: Path) -> None:
    """Write a light adapter, or an adapter as PEFT writes it: whole or not at all."""
    if isinstance(model, LightModel):
        model.save_pretrained(folder)
        return
    with writing_files(folder, last="adapter_config.json") as temporary:
        model.save_pretrained(str(temporary))


def parameter_report(model: PeftModel) -> dict[str, Any]:
    """Parameters that are there, and what part of the base is gone: measured on the live model."""
    count = count_parameters(model)
    dense = model.light_plan.base_parameters if isinstance(model, LightModel) else count.base
    return {
        "base_dense": dense,
        "base": count.base,
        "base_removed_ratio": 1 - count.base / dense,
        "peft": count.peft,
        "head": count.head,
    }


def task_facts(work: Workspace) -> dict[str, Any]:
    """What a light adapter says of its task, so that `predict` needs nothing else."""
    data = work.config.data
    names = ("task", "text", "text_pair", "prompt", "completion", "max_length")
    return {**{name: getattr(data, name) for name in names}, "labels": work.task.labels}


def process_count() -> int:
    """Processes of the run: those that `accelerate launch` or `torchrun` started, 1 without them."""
    return PartialState().num_processes


def _finite(model: PeftModel) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad)
