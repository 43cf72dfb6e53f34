"""A whole run: model, data, PEFT, training; read from YAML and from the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightpeft.config.light import MOST_ROWS, WIDEST, LightConfig
from lightpeft.config.methods import METHODS, Method, MethodName
from lightpeft.config.peft import USUAL, Peft, peft_settings, peft_type, shortest
from lightpeft.config.presets import WRITTEN, Preset, overlaid, preset_settings, usual_preset
from lightpeft.config.validation import check_most, check_values, from_dict, load_yaml
from lightpeft.errors import require

Auto = Literal["auto"]
AnswerBy = Literal["auto", "head", "likelihood"]
LikelihoodRule = Literal["sum", "token", "byte", "unconditional"]
Placement = Literal["houlsby", "pfeiffer"]
PrefixPlace = Literal["file", "memory", "off"]
PrefixDtype = Literal["auto", "float32", "bfloat16", "float16"]

_LONGEST = 2**24
"""Tokens that a row may have: no model reads more."""


_MOST_EPOCHS = 10**6
"""Passes over the rows; steps are counted in 64 bits."""


SWITCHES = ("trust_remote_code", "allow_pickle")
"""Settings of `ModelConfig` that let somebody else's code in: whoever runs a command gives them, never a folder."""


@dataclass(kw_only=True)
class ModelConfig:
    """The foundation model."""

    name: str = ""
    """Hub name or local folder of the pretrained model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    gguf_file: str | None = None
    """File inside the folder to load a GGUF checkpoint from."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Data type of the frozen weights."""
    quantise: Literal["nf4", "int8"] | None = None
    """Keep the frozen weights in 4 bits (nf4) or 8 bits (int8), with bitsandbytes (extra `quantised`)."""
    low_memory: bool = False
    """Leave the weights of the blocks on disk and read each where it is needed, for bases that do not fit; slower."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention backend; unset: what transformers chooses."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Leave off unless you trust its author."""
    allow_pickle: bool = False
    """Read weights from pickle files (.bin) where there are none in safetensors; weights alone are unpickled. Leave off
    unless you trust its author."""

    def __post_init__(self) -> None:
        check_values(self)
        others = [name for name in ("quantise", "gguf_file") if getattr(self, name) is not None]
        alone = "model.low_memory reads weights as they are in safetensors files; leave model."
        require(not (self.low_memory and others), f"{alone}{' and model.'.join(others)} unset")


@dataclass(kw_only=True)
class TaskEntry:
    """One task, declared: where its rows are, how a row becomes text, how it is answered and measured.

    The tasks that ship are entries in `lightpeft.app.tasks`; those of a user are below `tasks` in the run's YAML.
    """

    name: str = ""
    """The task's name, as `data.task` gives it; empty for the kinds themselves."""
    kind: str = "classification"
    """Name of a kind, as `data.task` knows them: which columns the task's rows have in the end, and who can answer."""
    hub: str | None = None
    """Data set on the hub as owner/name[/config]."""
    path: str | None = None
    """Local folder with one file a split, in the hub's columns; comes before `hub`."""
    train: str = "train"
    """Split to train on."""
    test: str | None = "validation"
    """Split to evaluate on, one with labels; unset: a part of the training rows is held out."""
    more_tests: dict[str, str] = field(default_factory=dict)
    """Further splits to evaluate on, as prefix of their metrics -> split."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column of the kind (such as text, text_pair, label) -> column of the data, or a template such as
    "{premise} {hypothesis}"; empty: the data have the kind's own columns."""
    convert: str | None = None
    """Instead of `columns`: name of the function that turns a row of the data into one of the kind's."""
    labels: list[str] = field(default_factory=list)
    """Label names in class order, where the data number their labels; empty: the labels that the data have."""
    prompt: str | None = None
    """What a causal language model reads before the answer, as a template over the kind's columns."""
    words: list[str] = field(default_factory=list)
    """What it answers for each label; empty: the labels themselves."""
    null_threshold: float | None = None
    """Questions may have no answer in their context (span): what `data.null_threshold` is unless it is set."""
    metrics: list[str] = field(default_factory=list)
    """What is measured, the main metric first; empty: what the kind measures."""

    def __post_init__(self) -> None:
        check_values(self)
        known = not self.words or len(self.words) == len(self.labels)
        require(known, f"words are {len(self.words)} for {len(self.labels)} labels; give one a label, or none")
        require(not (self.columns and self.convert), "columns and convert both say what a row is; give one of them")


@dataclass(kw_only=True)
class DataConfig:
    """The task's data: local files or a hub data set, and which columns mean what."""

    task: str = "classification"
    """A task by name (such as rte, or one of your own below `tasks`), or a kind whose columns you name here.
    classification: one label a text (or pair of texts); regression: one number; multiple-choice: one of several
    options; span: a piece of a context; generation: a short text that the model writes; chat: what the assistant says
    in a list of messages; causal-lm: next-token loss on text or completions."""
    answer: AnswerBy = "auto"
    """How a model answers. head: a layer trained for the task; likelihood: the causal language model's own
    probabilities of label words or options; auto: a head, but likelihood for multiple choice on decoders."""
    likelihood: LikelihoodRule = "sum"
    """Which score of an option counts (answer: likelihood). sum: its log-probability; token, byte: the mean over its
    tokens or bytes; unconditional: how much the prompt raises it over a prompt without the question."""
    path: str | None = None
    """Folder with the task's own splits as files, in the hub's columns, instead of the hub."""
    train: str = ""
    """Training rows: a .csv, .tsv, .json, .jsonl or .parquet file, or a hub data set as `name[/config][:split]`;
    needed for kinds, and instead of the task's own rows for the others."""
    test: str | None = None
    """Rows for evaluation, in the same form; unset: `test_fraction` of the training rows is held out."""
    test_fraction: float = 0.2
    """Part of the training rows held out when `test` is unset, chosen by `split_seed`."""
    split_seed: int = 0
    """Seed of the hold-out split: independent of the run's seed, so that seeds share one test set."""
    text: str = "text"
    """Column with the text (classification, regression, plain causal-lm) or the question (multiple-choice)."""
    text_pair: str | None = None
    """Column with the second text of a pair."""
    label: str = "label"
    """Column with the label: an integer or a string, a number (regression), or the right option's index, from 0
    (multiple-choice)."""
    options: str = "options"
    """Column with the list of options (multiple-choice)."""
    prompt: str | None = None
    """Column with the prompt (causal-lm): the loss is on the completion only."""
    completion: str | None = None
    """Column with the completion that follows the prompt."""
    question: str = "question"
    """Column with the question (span, generation)."""
    context: str = "context"
    """Column with the text that the answer is a piece of (span)."""
    answers: str = "answers"
    """Column with the right answers: texts, or {"text": [...], "answer_start": [...]} with the number of the first
    character of each in the context (span, where texts alone are looked for); a list of texts (generation)."""
    messages: str = "messages"
    """Column with a chat, a list of {"role": ..., "content": ...} (chat)."""
    max_length: int = 128
    """Tokens a row keeps at most; may not exceed what the model allows. Longer contexts are read in windows (span)."""
    stride: int | None = None
    """Context tokens that a window shares with the next one (span); unset: a third of `max_length`."""
    null_threshold: float | None = None
    """Give no answer unless the best one scores better than none by more than this (span); unset: as the task says,
    which is to answer always, or 0 where questions without an answer belong to it."""
    answer_tokens: int = 30
    """Tokens an answer has at most (span, generation, and what `predict` writes)."""
    limit_train: int | None = None
    """Use only so many training rows, after a seeded shuffle."""
    limit_test: int | None = None
    """Use only so many test rows, after a seeded shuffle."""

    def __post_init__(self) -> None:
        check_values(self)
        require(self.max_length >= 2, f"data.max_length is {self.max_length}; it must be at least 2")
        require(self.answer_tokens >= 1, f"data.answer_tokens is {self.answer_tokens}; it must be at least 1")
        check_most(self, "data.", dict.fromkeys(("max_length", "answer_tokens", "stride"), _LONGEST))
        require(0 <= self.split_seed < 2**32, f"data.split_seed is {self.split_seed}; it lies in [0, 2**32)")
        for name, least in (("stride", 0), ("limit_train", 1), ("limit_test", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"data.{name} is {value}; it must be at least {least}")
        require(0 < self.test_fraction < 1, f"data.test_fraction is {self.test_fraction:g}; it lies in (0, 1)")
        paired = (self.prompt is None) == (self.completion is None)
        require(paired, "data.prompt and data.completion go together; give both columns or neither")


@dataclass(kw_only=True)
class LoraSettings:
    """The LoRA that estimation starts with."""

    r: int = 8
    """Rank."""
    alpha: int = 16
    """Scaling numerator: the update is multiplied by alpha / r."""
    dropout: float = 0.05
    """Dropout on the input of the low-rank branch."""
    slots: list[str] | None = None
    """Which projections get a module, of q, k, v, qkv, o, ffn_in, ffn_gate, ffn_gate_in, ffn_out; unset: all that the
    model has (method light), or q and v, in models that fuse them qkv (method plain)."""
    target_modules: list[str] | None = None
    """Names of target modules as PEFT takes them; overrides `slots`."""

    def __post_init__(self) -> None:
        check_values(self)
        require(self.r >= 1, f"lora.r is {self.r}; it must be at least 1")
        check_most(self, "lora.", {"r": WIDEST})
        require(self.alpha > 0, f"lora.alpha is {self.alpha}; it must be positive")
        require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout:g}; it lies in [0, 1)")


@dataclass(kw_only=True)
class BottleneckSettings:
    """The bottleneck adapters that estimation starts with."""

    size: int = 64
    """Units of the bottleneck."""
    placement: Placement = "houlsby"
    """houlsby: after attention and after the FFN of every block; pfeiffer: after the FFN; parallel: beside the FFN."""
    non_linearity: str = "relu"
    """Activation between the projections, by transformers' name."""
    dropout: float = 0.0
    """Dropout on what the adapter reads."""
    scaling: float | Literal["learned"] = 1.0
    """Factor on the adapter's output; learned: one trainable scalar an adapter."""

    def __post_init__(self) -> None:
        check_values(self)
        require(self.size >= 1, f"bottleneck.size is {self.size}; it must be at least 1")
        check_most(self, "bottleneck.", {"size": WIDEST})
        require(0 <= self.dropout < 1, f"bottleneck.dropout is {self.dropout:g}; it lies in [0, 1)")


@dataclass(kw_only=True)
class TrainingConfig:
    """The fine-tuning run as a whole; estimation is its first part."""

    epochs: float | Auto = "auto"
    """Passes over the training rows, estimation included; auto: 3, and as many more as make 200 optimizer steps, up to
    40, of which a run takes no more than lower the loss on rows that it sets aside."""
    batch_size: int = 32
    """Rows a step and process."""
    eval_batch_size: int = 64
    """Rows a step in evaluation and prediction."""
    gradient_accumulation: int = 1
    """Backward passes an optimizer step."""
    learning_rate: float | Auto = "auto"
    """Peak learning rate of the PEFT modules and the head; linear decay to zero. auto: by the model's width, from 1e-3
    (384 and below) to 3e-4 (4,096 and above)."""
    full_learning_rate: float = 2e-5
    """Peak learning rate where every weight trains (method full): what PEFT needs would destroy pretrained weights."""
    warmup: float = 0.06
    """Part of each stage's steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW weight decay of the PEFT modules and the head."""
    max_grad_norm: float = 1.0
    """Gradient norm clipping; 0 switches it off."""
    bf16: bool | Literal["auto"] = False
    """bfloat16 autocast in training and evaluation; auto: on hardware that has bfloat16 arithmetic."""
    fp16: bool = False
    """float16 autocast instead, with a scaled loss, for GPUs that have no bfloat16 arithmetic."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    by_length: bool = True
    """Batches of rows of similar length; off: random batches. Padding is dynamic either way."""
    pad_to_multiple_of: int = 8
    """Batches are padded to a multiple of so many tokens (where the model takes as many): few different shapes are
    faster than a few tokens less."""
    fast_steps: bool = True
    """Light runs compute a LoRA layer in one step, gradients of attention and of norms on CPUs in fewer, and a language
    model's logits where labels are, and make some activations again in the backward pass; off: as PEFT, PyTorch and
    transformers do."""
    prefix_cache: PrefixPlace = "file"
    """Blocks below the lowest PEFT module compute the same for a row in every epoch. file, memory: compute them once,
    without dropout, and keep their outputs there; off: compute them every time, with dropout."""
    prefix_dtype: PrefixDtype = "auto"
    """Data type of those outputs; auto: as they are computed, so that nothing is rounded."""
    prefix_limit: float = 16.0
    """GiB that they may take; beyond that there is no cache."""
    save_steps: int = 200
    """Steps between checkpoints that a killed run resumes from."""
    logging_steps: int = 10
    """Steps between lines in log.jsonl."""

    def __post_init__(self) -> None:
        rates = ("learning_rate", "full_learning_rate")
        for name in ("epochs", "batch_size", "eval_batch_size", "gradient_accumulation", *rates):
            value = getattr(self, name)
            if not isinstance(value, str):
                require(0 < value < math.inf, f"training.{name} is {value:g}; it must be positive and finite")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"training.{name} is {value:g}; it cannot be negative or infinite")
        check_values(self)
        rows = ("batch_size", "eval_batch_size", "gradient_accumulation")
        check_most(self, "training.", {"epochs": _MOST_EPOCHS, **dict.fromkeys(rows, MOST_ROWS)})
        require(not (self.fp16 and self.bf16), "training.fp16 and training.bf16 exclude each other; set one of them")
        require(self.prefix_limit > 0, f"training.prefix_limit is {self.prefix_limit:g}; it must be positive")
        require(0 <= self.warmup < 1, f"training.warmup is {self.warmup:g}; it lies in [0, 1)")
        for name in ("save_steps", "logging_steps", "pad_to_multiple_of"):
            require(getattr(self, name) >= 1, f"training.{name} is {getattr(self, name)}; it starts at 1")


@dataclass(kw_only=True)
class RunConfig:
    """A whole run: model -> estimation -> plan -> surgery -> fine-tuning -> evaluation, into one folder."""

    preset: Preset | None = None
    """Starting values of `light`: auto (of the blocks goes what light.tolerance bears, which is measured), default
    (half of them or more), thorough (as much, and all modules stay), uniform (half of each layer), fast (less goes),
    writer (nothing goes: decoders that write), or paper (Gu et al. 2024). If none is given (null): writer for tasks
    whose answers are written (generation, chat, causal-lm), and auto for all others, which has a fixed budget where
    rows are too few to measure with."""
    method: MethodName = "light"
    """light: Light-PEFT; for comparison on the same data, plain: the same PEFT as it is used by habit (no estimation,
    nothing pruned; LoRA sits on q and v), full: full fine-tuning, in which every weight trains."""
    peft: Peft = USUAL
    """PEFT kind: lora, bottleneck (adapters) or ia3. For all that PEFT can set: a mapping of PEFT's own settings with
    the kind as its `type`, such as {type: lora, use_dora: true}."""
    output: str = "runs/run"
    """Run folder: estimation/, plan.json, pruned/, adapter/, full/, metrics.json, log.jsonl."""
    seed: int = 0
    """Seed of weights, order and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The foundation model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The task's data."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The LoRA that the run starts with (peft: lora); settings in `peft` go over it."""
    bottleneck: BottleneckSettings = field(default_factory=BottleneckSettings)
    """The adapters that the run starts with (peft: bottleneck); settings in `peft` go over it."""
    light: LightConfig = field(default_factory=LightConfig)
    """Estimation and budget. (Help shows the values of preset `auto`; --print_config those of a run.)"""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The fine-tuning run."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Other fields of transformers' TrainingArguments, such as optim, lr_scheduler_type, eval_strategy, report_to."""
    tasks: dict[str, TaskEntry] = field(default_factory=dict)
    """Tasks of your own by name, for `data.task`."""

    def __post_init__(self) -> None:
        check_values(self)
        require(0 <= self.seed < 2**32, f"seed is {self.seed}; it lies in [0, 2**32)")
        self.peft = shortest(self.peft)

    @property
    def peft_type(self) -> str:
        """The PEFT kind."""
        return str(peft_type(self.peft))

    @property
    def peft_settings(self) -> dict[str, Any]:
        """PEFT's own settings that were given for it in `peft`."""
        return peft_settings(self.peft)

    @property
    def way(self) -> Method:
        """What the method is."""
        return METHODS[self.method]

    @property
    def unused(self) -> tuple[str, ...]:
        """Beginnings of the names of settings that the run has no use for."""
        return (*self.way.unused, *self.light.unused)


def load_config(path: str | Path) -> RunConfig:
    """Read a `RunConfig` from a YAML file; `preset` sets what the file leaves open.

    Raises:
        LightPeftError: the file is missing or not YAML, or a key or value is not known.
    """
    return run_config_from_dict(load_yaml(path))


def run_config_from_dict(data: dict[str, Any], measured: bool = True) -> RunConfig:
    """A `RunConfig` from nested plain data, with a preset below the given values: the usual one where none is given.

    Args:
        measured: whether the run may find its own budget where nothing says one.
    """
    usual = usual_preset(_kind(data) in WRITTEN, measured)
    given = data.get("light") or {}
    # who asks for a budget to be found has the preset that does it; null stands in files of runs that had the usual one
    asked = isinstance(given, dict) and given.get("blocks") == "auto"
    name = data.get("preset", usual if asked else None)
    preset = preset_settings(usual if name is None else name, data.get("peft", USUAL))
    light = overlaid(preset, given) if isinstance(given, dict) else given
    return from_dict(RunConfig, {**data, "preset": name, "light": light})


def _kind(data: dict[str, Any]) -> str:
    """The kind of the task that the data are about, as far as they say so: of a task that ships its name."""
    section, own = data.get("data"), data.get("tasks")
    task = section.get("task") if isinstance(section, dict) else None
    entry = own.get(task) if isinstance(own, dict) and isinstance(task, str) else None
    kind = entry.get("kind") if isinstance(entry, dict) else task
    return kind if isinstance(kind, str) else DataConfig.task
