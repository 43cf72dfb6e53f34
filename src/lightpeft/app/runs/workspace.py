"""A run with its data at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

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
from lightpeft.models.families.registry import max_positions
from lightpeft.models.loading import LoadedModel, load_model_config, load_tokenizer, supports_checkpointing
from lightpeft.models.tokenizers import check_vocabulary, ensure_pad_token
from lightpeft.models.vocabulary.closure import kept_tokens
from lightpeft.models.vocabulary.cutting import config_tokens, cut_config
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.models.vocabulary.tokenizer import cut_tokenizer
from lightpeft.peft_kinds.kinds import check_peft_settings
from lightpeft.plans.records import EstimationRecord
from lightpeft.prune.length import StageLength, few_examples, fit_stage, remove_nothing_if_short
from lightpeft.training.arguments import USUAL, check_given
from lightpeft.training.prefix import PrefixCache
from lightpeft.training.schedule import Pace, rows_held, scored_steps, settled

STOPPING = frozenset({"eval_strategy", "load_best_model_at_end", "metric_for_best_model"})
"""Fields of `TrainingArguments` by which somebody says himself what training is stopped by, or kept of it."""
NOTABLE_CUTS = 0.05
"""Part of the training rows that may be cut without a word."""


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
    """The run's settings, with numbers for what is auto in `training`, and for a depth that was found."""
    vocabulary: Vocabulary | None = None
    """Tokens that the base has alone, and `tokenizer` knows; None: all."""
    unable: str | None = None
    """Why the run, which was told nothing about what to remove, has no room for an estimation; None: it has."""
    held_rows: Dataset | None = None
    """Training rows set aside, not in `train_rows`: where the loss on them turns, training stops. None: it runs to its
    end."""
    teacher: RunTeacher | None = None
    """Whose answers the run learns beside the labels; None: nobody's, or training is over."""

    @property
    def collator(self) -> Collator:
        """Rows to padded batches."""
        return self.task.collator(self.tokenizer, padding_within(self.config.data.max_length, self.positions))

    @property
    def pace(self) -> Pace:
        """How fast the run goes through its rows."""
        return Pace.of(len(self.train_rows), self.config.training, processes().num_processes)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, estimation included."""
        return self.pace.steps(float(self.config.training.epochs))

    @property
    def stage(self) -> StageLength:
        """How long estimation takes.

        Raises:
            LightPeftError: it would leave no steps to train with, or see too little.
        """
        if not self.config.way.prunes:
            return StageLength(0, 0)
        return fit_stage(self.config.light, self.pace, self.steps, self.last_steps)

    @property
    def tolerance(self) -> Tolerance:
        """`light.remove.tolerance`, or the usual one: of points where answers are classes.

        Raises:
            LightPeftError: it is of points, and answers are no classes.
        """
        classes = answers_are_classes(self.task)
        asked = tolerance_of(self.config.light, classes)
        what = f'light.remove.tolerance is "{asked}", and {self.task.main_metric} is no metric of classes'
        require(classes or asked.unit == "nats", f"{what}; give nats of the loss")
        return asked

    @property
    def stops_early(self) -> bool:
        """Whether the loss on rows that are set aside stops training: not where an engine shards the model, of which
        `Trainer` keeps the best in a form of its own. The rows are set aside there, too, so that a run may go on
        without the engine."""
        return self.held_rows is not None and not sharding_launched()

    def held_batches(self) -> list[dict[str, Tensor]]:
        """Batches of the rows set aside, each of similar length."""
        assert self.held_rows is not None
        size, lengths = self.config.training.eval_batch_size, self.held_rows["length"][:]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        starts = range(0, len(order), size)
        return [self.collator(self.held_rows.select(order[start : start + size]).to_list()) for start in starts]

    def taught_rows(self) -> Dataset:
        """The training rows, with the logits of the teacher if there is one; it is asked unless it has answered.

        Raises:
            LightPeftError: it cannot answer; nothing is written then.
        """
        if self.teacher is None:
            return self.train_rows
        return self.teacher.taught(self.run, self.train_rows, self.config.training.eval_batch_size)

    @property
    def last_steps(self) -> int:
        """How many of these train at full width."""
        return self.config.light.last_steps(self.steps) if self.run.keeps_full else 0

    @property
    def rate(self) -> float:
        """Peak learning rate of the run's method, before `light.rates` scale it."""
        return float(self.config.training.learning_rate)

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """How the outputs of frozen blocks are kept; None: not at all."""
        place = self.config.training.prefix_cache
        return None if place == "off" else PrefixCache(place)

    @property
    def step_options(self) -> dict[str, Any]:
        """How steps are made, as `measure_training` takes it."""
        clipped = self.config.trainer.get("max_grad_norm", USUAL["max_grad_norm"])
        return {"autocast": autocast_dtype(self.config.training), "max_grad_norm": clipped}

    def dense_model(self, to_train: bool = False) -> LoadedModel:
        """The untouched foundation model with the task's head, on the device that training uses.

        Where the run keeps the tokens of its task alone, it has no others.

        Args:
            to_train: where training shards it, it stays in host memory until then.
        """
        waits = to_train and sharding_launched()
        return open_base(self.config.model, Wanted.of(self.task), self.tokenizer, self.vocabulary, waits)

    def asking(self, model: nn.Module) -> BatchedModel:
        """How test rows are fed to a model."""
        training = self.config.training
        return BatchedModel(model, self.collator, training.eval_batch_size, autocast_dtype(training))

    def drawn_batches(self, rows: int, size: int | None = None) -> list[dict[str, Tensor]]:
        """Batches of so many training rows, drawn by the run's seed: each of rows of similar length.

        Args:
            size: rows a batch; None: as many as are asked at once.
        """
        size = size or self.config.training.eval_batch_size
        generator = torch.Generator().manual_seed(self.config.seed)
        drawn = torch.randperm(len(self.train_rows), generator=generator)[:rows].tolist()
        lengths = self.train_rows["length"][:]
        order = sorted(drawn, key=lengths.__getitem__)
        starts = range(0, len(order), size)
        return [self.collator(self.train_rows.select(order[start : start + size]).to_list()) for start in starts]

    def watcher(self) -> Watcher:
        """What looks at the model between stages, on a few test rows."""
        chosen = sample(self.task)
        rows = self.task.encode_test(chosen, self.tokenizer)
        return Watcher(self.task, rows, len(chosen), self.asking)

    def announce_settings(self) -> None:
        """Say, where training begins, which settings cost more than a user may know of."""
        stage = "estimate" if self.config.way.prunes else "train"
        asked, training = self.run.config.training, self.config.training
        if self.unable is not None:
            self.run.announce(stage, f"nothing of the base goes: {self.unable}")
        if "auto" in (asked.epochs, asked.learning_rate):
            scale = (self.config.light.rates.scale or 1.0) if self.config.way.prunes else 1.0
            length = f"{self.steps} steps (epochs: {training.epochs:g})"
            self.run.announce(stage, f"training takes {length} at a learning rate of {self.rate * scale:.2g}")
        if self.held_rows is not None and self.stops_early:
            held = f"{len(self.held_rows)} of the training rows are set aside"
            self.run.announce(stage, f"{held}: training stops early where the loss on them turns")
        light, writes = self.config.light, self.config.way.prunes and self.task.entry.kind in WRITTEN
        if writes and not light.cuts_blocks:
            nothing = "nothing of the base goes: a model that writes uses all of itself"
            self.run.announce(stage, f"{nothing}; a number, such as light: 0.2, cuts it all the same")
        elif writes and (line := cut_of_writer(light)) is not None:
            self.run.announce(stage, line)
        scored = self.pace.least_examples(scored_steps(self.stage.steps))
        if self.config.way.prunes and (few := few_examples(light, scored)) is not None:
            self.run.announce(stage, f"warning: {few}")
        limit = self.config.data.max_length
        share = share_at_limit(self.train_rows, limit) if self.task.cuts else 0.0
        if share >= NOTABLE_CUTS:
            self.run.announce(stage, f"{share:.0%} of the training rows are cut to data.max_length: {limit} tokens")
        if self.vocabulary is not None:
            tokens = f"{len(self.vocabulary):,} of {self.vocabulary.size:,} tokens stay (light.remove.vocabulary: task)"
            self.run.announce(stage, tokens)
        if autocast_dtype(training) is torch.bfloat16 and not has_bf16():
            slow = "training.precision: bf16 is slow here, without bfloat16 arithmetic; auto takes float32 instead"
            self.run.announce(stage, slow)


def with_found_depth(config: RunConfig, run: RunFolder) -> RunConfig:
    """The settings of a run with the depth that was found.

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
        overwrite: the output folder may hold the run of another config.
        replan: it may hold one of another budget, as long as nothing was pruned by that one.

    Raises:
        LightPeftError: bad input.
    """
    check_precision(config.training)
    check_given(config.trainer)
    check_peft_settings(config)
    model_config = load_model_config(config.model)
    task = load_task(config.data, model_config, config.tasks)
    check_teachable(config, task)
    if config.training.gradient_checkpointing:
        supported = supports_checkpointing(config.model, task.head, task.labels, to_prune=config.way.prunes)
        cannot = f"{config.model.name} ({model_config.model_type}) has no gradient checkpointing in transformers"
        require(supported, f"training.gradient_checkpointing: {cannot}; leave it off")
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
    train_rows, held_rows = _set_aside(config, train_rows, width)
    texts, _ = _set_aside(config, task.train, width)
    config, unable = _able(config, train_rows, width)
    run = RunFolder.open(config, replan=replan, overwrite=overwrite)
    training: TrainingConfig = settled(
        config.training, len(train_rows), width, processes().num_processes, has_peft=config.way.has_peft
    )
    config = replace(config, training=training)
    if run.has("depth") and run.goes_on:
        config = with_found_depth(config, run)
    trained = run.goes_on and run.has(run.last_training)  # a teacher is of no more use then, and may be gone
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
    if config.way.prunes and run.goes_on and run.has("estimate") and not run.has(run.last_training):
        check_steps(config, run, EstimationRecord.load(run.estimation))
    if config.way.prunes and (overwrite or not run.has("estimate")):
        _ = work.stage  # whether estimation leaves steps to train with, and sees enough
    return work


def _set_aside(config: RunConfig, rows: Dataset, width: int | None) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those that tell when to stop, drawn by the seed; None: training runs to its end.

    So it does where somebody says how long it is, or has it evaluated otherwise.
    """
    if config.training.epochs != "auto" or config.trainer.keys() & STOPPING:
        return rows, None
    count = rows_held(len(rows), float(settled(config.training, len(rows), width).epochs))
    if not count:
        return rows, None
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return rows.select(sorted(drawn[count:])), rows.select(sorted(drawn[:count]))


def _able(config: RunConfig, rows: Dataset, width: int | None) -> tuple[RunConfig, str | None]:
    """The settings of a run whose amount is to be found: without a cut where it is too short to estimate, and why."""
    if not config.way.prunes:
        return config, None
    training = settled(config.training, len(rows), width)
    pace = Pace.of(len(rows), training)
    light, unable = remove_nothing_if_short(config.light, pace, pace.steps(float(training.epochs)))
    return replace(config, light=light), unable


def check_steps(config: RunConfig, donor: RunFolder, record: EstimationRecord) -> None:
    """Refuse to go on from an estimation by steps of other rows: what it has seen would be wrong.

    Args:
        config: of the run that goes on.
        donor: has the estimation.

    Raises:
        LightPeftError: its steps took more or fewer rows.
    """
    rows = config.training.batch_size * config.training.gradient_accumulation * processes().num_processes
    there = record.meta.get("rows_a_step", rows)
    require(
        there == rows,
        f"the estimation of {donor.path} took {there} rows a step, and this run takes {rows}; start as many processes "
        "as that run was begun by",
    )


def _vocabulary(
    config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig
) -> Vocabulary | None:
    """The tokens that the run keeps; None: all."""
    if not config.way.prunes or config.light.remove.vocabulary == "keep":
        return None
    needed = task_tokens(task, tokenizer) | config_tokens(model_config)
    return Vocabulary(kept_tokens(tokenizer, needed), model_config.get_text_config().vocab_size)
