"""A run with its data at hand."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, PretrainedConfig, PreTrainedTokenizerBase

from lightpeft.app.evaluation.milestones import Watcher, sample
from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.folders.forms import Wanted
from lightpeft.app.folders.opening import open_base
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs.teacher import RunTeacher, check_teachable
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.loading import load_task
from lightpeft.app.tasks.tokens import Collator, check_max_length, check_tokens, padding_within, share_at_limit
from lightpeft.app.tasks.vocabulary import task_tokens
from lightpeft.app.tasks.worth import answers_are_classes
from lightpeft.config import WRITTEN, RunConfig, Tolerance, TrainingConfig, cut_of_writer, tolerance_of
from lightpeft.errors import require
from lightpeft.files import explain_content_errors, read_json
from lightpeft.machine import autocast_dtype, check_precision, has_bf16, processes, sharding_launched
from lightpeft.models.families.family_table import max_positions
from lightpeft.models.loading import LoadedModel, load_model_config, supports_checkpointing
from lightpeft.models.task_heads import CAUSAL_LM
from lightpeft.models.tokenizers import check_vocabulary, ensure_pad_token, load_tokenizer
from lightpeft.models.vocabulary.closure import kept_tokens
from lightpeft.models.vocabulary.cutting import config_tokens, cut_config
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.models.vocabulary.tokenizer import cut_tokenizer
from lightpeft.peft_kinds.kinds import check_peft_settings
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.prune.length import StageLength, few_examples, fit_stage, remove_nothing_if_short
from lightpeft.training.arguments import TRAINER_DEFAULTS, check_trainer_fields, training_arguments
from lightpeft.training.prefix import PrefixCache
from lightpeft.training.schedule import Pace, resolve_auto, rows_held, scored_steps

STOPPING = frozenset({"eval_strategy", "load_best_model_at_end", "metric_for_best_model"})
"""Fields of `TrainingArguments` with which users control stopping or checkpoints themselves."""
NOTABLE_CUTS = 0.05
"""Part of truncated training rows from which a run says so."""


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
    """Number of positions of the model; None: unlimited."""
    config: RunConfig
    """The run's settings, with numbers in place of auto in `training` and of a depth that was found."""
    vocabulary: Vocabulary | None = None
    """Tokens that base and `tokenizer` keep (`light.remove.vocabulary: task`); None: all."""
    unable: str | None = None
    """Why a run with `light: auto` is too short for an estimation, so that it cuts nothing; None: long enough."""
    held_rows: Dataset | None = None
    """Held-out training rows, not in `train_rows`: training stops where the loss on them rises. None: it runs to its
    end."""
    teacher: RunTeacher | None = None
    """Teacher whose logits the run learns beside the labels; None: no teacher, or training is over."""

    @property
    def collator(self) -> Collator:
        """The collator, which pads rows to batches."""
        return self.task.collator(self.tokenizer, padding_within(self.config.data.max_length, self.positions))

    @property
    def training_collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """The collator of training batches: that of all batches, or one without padding."""
        return DataCollatorWithFlattening() if self.config.training.padding_free else self.collator

    @property
    def pace(self) -> Pace:
        """Rows, batch size, gradient accumulation and processes, from which the number of steps follows."""
        return Pace.of(len(self.train_rows), self.config.training, processes().num_processes)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, estimation included."""
        return self.pace.steps(float(self.config.training.epochs))

    @property
    def stage(self) -> StageLength:
        """The steps of estimation.

        Raises:
            LightPeftError: estimation would leave no steps for training, or score too few rows.
        """
        if not self.config.method_spec.prunes:
            return StageLength(0, 0)
        return fit_stage(self.config.light, self.pace, self.steps, self.last_steps)

    @property
    def tolerance(self) -> Tolerance:
        """`light.remove.tolerance`, or its default: in points where answers are classes, else in nats.

        Raises:
            LightPeftError: the tolerance is in points, and answers are no classes.
        """
        classes = answers_are_classes(self.task)
        asked = tolerance_of(self.config.light, classes)
        what = f'light.remove.tolerance is "{asked}", but points need classes and the metric is {self.task.main_metric}'
        require(classes or asked.unit == "nats", f"{what}; give a tolerance in nats of the loss")
        return asked

    @property
    def stops_early(self) -> bool:
        """True if the loss on held-out rows stops training. False where an engine shards the model, because `Trainer`
        keeps the best checkpoint in a form of its own then; the rows are held out there, too, so that a run can
        continue without the engine."""
        return self.held_rows is not None and not sharding_launched()

    def held_batches(self) -> list[dict[str, Tensor]]:
        """Make batches of the held-out rows, each of rows of similar length."""
        assert self.held_rows is not None
        return self.batches(self.held_rows)

    def taught_rows(self) -> Dataset:
        """Return the training rows, with the logits of the teacher if there is one; compute missing logits.

        Raises:
            LightPeftError: the teacher cannot be loaded, or its logits are NaN or infinite; nothing is written then.
        """
        if self.teacher is None:
            return self.train_rows
        return self.teacher.add_logits(self.run, self.train_rows, self.config.training.eval_batch_size)

    @property
    def last_steps(self) -> int:
        """Optimizer steps at the end of the run that train at full width."""
        return self.config.light.last_steps(self.steps) if self.run.keeps_full else 0

    @property
    def rate(self) -> float:
        """Peak learning rate of the run's method, before `light.rates` scale it."""
        return float(self.config.training.learning_rate)

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """How to store the outputs of frozen blocks; None: not at all."""
        training = self.config.training
        return None if training.prefix_cache == "off" or training.padding_free else PrefixCache(training.prefix_cache)

    @property
    def step_options(self) -> dict[str, Any]:
        """Autocast type and gradient clipping of a training step, the options of `measure_training`."""
        clipped = self.config.trainer.get("max_grad_norm", TRAINER_DEFAULTS["max_grad_norm"])
        return {"autocast": autocast_dtype(self.config.training), "max_grad_norm": clipped}

    def dense_model(self, to_train: bool = False) -> LoadedModel:
        """Load the unpruned base model with the task's head onto the device that training uses.

        Its vocabulary is reduced if the run keeps only the tokens of its task.

        Args:
            to_train: if training shards the model, leave it in host memory until then.
        """
        waits = to_train and sharding_launched()
        return open_base(self.config.model, Wanted.of(self.task), self.tokenizer, self.vocabulary, waits)

    def respondent(self, model: nn.Module) -> BatchedModel:
        """Wrap a model to answer padded batches in the run's evaluation batch size and precision."""
        training = self.config.training
        return BatchedModel(model, self.collator, training.eval_batch_size, autocast_dtype(training))

    def drawn_batches(self, rows: int, size: int | None = None) -> list[dict[str, Tensor]]:
        """Draw training rows by the run's seed, and make batches of rows of similar length.

        Args:
            size: rows per batch; None: the evaluation batch size.
        """
        generator = torch.Generator().manual_seed(self.config.seed)
        drawn = torch.randperm(len(self.train_rows), generator=generator)[:rows].tolist()
        return self.batches(self.train_rows.select(drawn), size)

    def batches(self, rows: Dataset, size: int | None = None) -> list[dict[str, Tensor]]:
        """Make batches of rows of similar length.

        Args:
            rows: encoded rows of the task.
            size: rows per batch; None: the evaluation batch size.
        """
        size = size or self.config.training.eval_batch_size
        lengths = rows["length"][:]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        starts = range(0, len(order), size)
        return [self.collator(rows.select(order[start : start + size]).to_list()) for start in starts]

    def watcher(self) -> Watcher:
        """Make the watcher that measures the model between stages on a sample of test rows."""
        chosen = sample(self.task, len(self.train_rows) * float(self.config.training.epochs))
        rows = self.task.encode_test(chosen, self.tokenizer)
        return Watcher(self.task, rows, len(chosen), self.respondent)

    def announce_settings(self) -> None:
        """Announce, when training begins, the values of auto and the settings with a cost that users may not expect."""
        stage = "estimate" if self.config.method_spec.prunes else "train"
        asked, training = self.run.config.training, self.config.training
        if self.unable is not None:
            self.run.announce(stage, f"nothing of the base is removed: {self.unable}")
        if "auto" in (asked.epochs, asked.learning_rate):
            scale = (self.config.light.rates.scale or 1.0) if self.config.method_spec.prunes else 1.0
            length = f"{self.steps} steps (training.epochs: {training.epochs:g})"
            self.run.announce(stage, f"training takes {length} at learning rate {self.rate * scale:.2g}")
        if self.held_rows is not None and self.stops_early:
            held = f"{len(self.held_rows)} training rows are held out"
            self.run.announce(stage, f"{held}: training stops early where the loss on them rises")
        light, writes = self.config.light, self.config.method_spec.prunes and self.task.entry.kind in WRITTEN
        if writes and not light.cuts_blocks:
            nothing = "nothing of the base is removed, because a cut costs a model that generates text much quality"
            self.run.announce(stage, f"{nothing}; give a number, such as light: 0.2, to cut it all the same")
        elif writes and (line := cut_of_writer(light)) is not None:
            self.run.announce(stage, line)
        if self.config.method_spec.prunes and self.unable is None and light.idle_tolerance is not None:
            self.run.announce(stage, f"warning: {light.idle_tolerance}")
        scored = self.pace.least_examples(scored_steps(self.stage.steps))
        if self.config.method_spec.prunes and (few := few_examples(light, scored)) is not None:
            self.run.announce(stage, f"warning: {few}")
        limit = self.config.data.max_length
        share = share_at_limit(self.train_rows, limit) if self.task.cuts else 0.0
        if share >= NOTABLE_CUTS:
            self.run.announce(
                stage, f"{share:.0%} of the training rows are truncated to data.max_length: {limit} tokens"
            )
        if self.vocabulary is not None:
            tokens = (
                f"{len(self.vocabulary):,} of {self.vocabulary.size:,} tokens are kept (light.remove.vocabulary: task)"
            )
            self.run.announce(stage, tokens)
        if autocast_dtype(training) is torch.bfloat16 and not has_bf16():
            slow = "training.precision: bf16 is slow on this CPU, which has no bfloat16 arithmetic; set auto or float32"
            self.run.announce(stage, slow)


def with_found_depth(config: RunConfig, run: RunFolder) -> RunConfig:
    """Return the settings of a run with the depth that was found in place of `light.remove.depth: auto`.

    Raises:
        LightPeftError: the file is damaged.
    """
    if config.light.remove.depth != "auto":
        return config
    found = read_json(run.depth)
    with explain_content_errors(run.depth):
        return replace(config, light=config.light.with_depth(float(found["depth"])))


def prepare(config: RunConfig, *, overwrite: bool = False, replan: bool = False) -> Workspace:
    """Read and check the data, the tokenizer and the run folder; nothing is written yet.

    Args:
        overwrite: the output folder may hold a run with other settings.
        replan: the output folder may hold a run with another budget that was not pruned yet.

    Raises:
        LightPeftError: bad input.
    """
    check_precision(config.training)
    check_trainer_fields(config.trainer)
    check_peft_settings(config)
    model_config = load_model_config(config.model)
    task = load_task(config.data, model_config, config.tasks)
    check_teachable(config, task)
    headed = not config.training.padding_free or task.head == CAUSAL_LM
    no_writer = f"training.padding_free: task {config.data.task} has head {task.head}"
    require(headed, f"{no_writer}; leave it out, or give a task with a language-modeling head, such as generation")
    if config.training.gradient_checkpointing:
        supported = supports_checkpointing(config.model, task.head, task.labels, to_prune=config.method_spec.prunes)
        cannot = f"{config.model.name} ({model_config.model_type}) has no gradient checkpointing in transformers"
        require(supported, f"training.gradient_checkpointing: {cannot}; set it to false")
    tokenizer = load_tokenizer(config.model)
    positions = max_positions(model_config)
    check_max_length(config.data.max_length, positions, tokenizer)
    check_vocabulary(tokenizer, model_config)
    ensure_pad_token(tokenizer, model_config)
    vocabulary = _vocabulary(config, task, tokenizer, model_config)
    if vocabulary is not None:
        tokenizer, model_config = cut_tokenizer(tokenizer, vocabulary), cut_config(model_config, vocabulary)
    train_rows = task.encode(task.train, tokenizer)
    test_rows = task.encode_test(task.test, tokenizer)
    more = {prefix: task.encode_test(rows, tokenizer) for prefix, rows in task.more_tests.items()}
    for what, rows in {"the training rows": train_rows, "the test rows": test_rows, **more}.items():
        check_tokens(rows, model_config, what, tokenizer)
    width = getattr(model_config.get_text_config(), "hidden_size", None)
    train_rows, held_rows = _split_held_out(config, train_rows, width)
    texts, _ = _split_held_out(config, task.train, width)
    asked, (config, unable) = config, _cut_nothing_if_short(config, train_rows, width)
    run = RunFolder.open(config, replan=replan, overwrite=overwrite, asked=asked)
    training: TrainingConfig = resolve_auto(
        config.training, len(train_rows), width, processes().num_processes, has_peft=config.method_spec.has_peft
    )
    config = replace(config, training=training)
    training_arguments(training, Path(tempfile.gettempdir()), 1, config.seed, config.trainer)  # raises for bad values
    if run.has("depth") and run.has_same_config:
        config = with_found_depth(config, run)
    # once trained, a run does not need its teacher any more, which may be deleted
    trained = run.has_same_config and run.has(run.last_training)
    work = Workspace(
        run,
        task,
        tokenizer,
        train_rows,
        test_rows,
        more,
        positions,
        config,
        vocabulary,
        unable=unable,
        held_rows=held_rows,
        teacher=None if trained else RunTeacher.of(config, task, texts),
    )
    if config.method_spec.prunes and run.has_same_config and run.has("estimate") and not run.has(run.last_training):
        check_steps(config, run, EstimationRecord.load(run.estimation))
    if config.method_spec.prunes and (overwrite or not run.has("estimate")):
        _ = work.stage  # raises if estimation leaves no steps for training, or scores too few rows
    return work


def _split_held_out(config: RunConfig, rows: Dataset, width: int | None) -> tuple[Dataset, Dataset | None]:
    """Split rows by the seed into rows to train on and held-out rows for early stopping.

    The latter are None where the user sets the epochs or controls evaluation: training runs to its end then.
    """
    if config.training.epochs != "auto" or config.trainer.keys() & STOPPING:
        return rows, None
    count = rows_held(len(rows), float(resolve_auto(config.training, len(rows), width).epochs))
    if not count:
        return rows, None
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return rows.select(sorted(drawn[count:])), rows.select(sorted(drawn[:count]))


def _cut_nothing_if_short(config: RunConfig, rows: Dataset, width: int | None) -> tuple[RunConfig, str | None]:
    """Return the settings, with nothing to cut where `light: auto` has too few steps to estimate, and the reason."""
    if not config.method_spec.prunes:
        return config, None
    training = resolve_auto(config.training, len(rows), width)
    pace = Pace.of(len(rows), training)
    light, unable = remove_nothing_if_short(config.light, pace, pace.steps(float(training.epochs)))
    return replace(config, light=light), unable


def check_steps(config: RunConfig, donor: RunFolder, record: EstimationRecord) -> None:
    """Require that an estimation took as many rows per step as the run that continues it, because a step number must
    mean the same position in the data.

    Raises:
        LightPeftError: the estimation took more or fewer rows per step.
    """
    rows = config.training.batch_size * config.training.gradient_accumulation * processes().num_processes
    there = record.meta.get("rows_per_step", rows)
    require(
        there == rows,
        f"the estimation of {donor.path} used a global batch of {there} rows, and this run uses {rows}; start as "
        "many processes as that run",
    )


def _vocabulary(
    config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig
) -> Vocabulary | None:
    """Return the tokens that the run keeps (`light.remove.vocabulary: task`); None: all."""
    if not config.method_spec.prunes or config.light.remove.vocabulary == "keep":
        return None
    needed = task_tokens(task, tokenizer) | config_tokens(model_config)
    return Vocabulary(kept_tokens(tokenizer, needed), model_config.get_text_config().vocab_size)
