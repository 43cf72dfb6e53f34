"""A whole run: model, data, PEFT, training; read from YAML and from the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from lightpeft.config.derived import derived
from lightpeft.config.light import MOST_ROWS, LightConfig
from lightpeft.config.methods import METHODS, Method, MethodName
from lightpeft.config.peft import USUAL, Peft, peft_settings, peft_type, shortest
from lightpeft.config.presets import WRITTEN, light_mapping
from lightpeft.config.validation import Within, check_values, from_dict, load_yaml
from lightpeft.errors import require

Auto = Literal["auto"]
AnswerBy = Literal["auto", "head", "likelihood"]
LikelihoodRule = Literal["sum", "byte"]
PrefixPlace = Literal["file", "memory", "off"]

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
    quantization: Literal["nf4", "int8"] | None = None
    """Keep the frozen weights in 4 bits (nf4) or 8 bits (int8), with bitsandbytes (extra `quantized`)."""
    low_memory: bool = False
    """Leave the weights of the blocks on disk and read each where it is needed, for bases that do not fit; slower."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention backend; unset: what transformers chooses."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Leave off unless you trust its author."""
    allow_pickle: bool = False
    """Read weights from pickle files (.bin) where there are none in safetensors; weights alone are unpickled. Leave off
    unless you trust its author."""

    def __post_init__(self) -> None:
        check_values(self, "model.")
        others = [name for name in ("quantization", "gguf_file") if getattr(self, name) is not None]
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
    """Which score of an option counts (answer: likelihood). sum: its log-probability; byte: the mean over its bytes."""
    path: str | None = None
    """Folder with the task's own splits as files, in the hub's columns, instead of the hub."""
    train: str = ""
    """Training rows: a .csv, .tsv, .json, .jsonl or .parquet file, or a hub data set as `name[/config][:split]`;
    needed for kinds, and instead of the task's own rows for the others."""
    test: str | None = None
    """Rows for evaluation, in the same form; unset: `test_fraction` of the training rows is held out."""
    test_fraction: Annotated[float, Within(above=0, below=1)] = 0.2
    """Part of the training rows held out when `test` is unset; the same rows whatever the run's seed."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column of the kind -> column of the data, or a template such as "{premise} {hypothesis}". Of those that are not
    named, text, label, context, options, answer, question, answers and messages have their own names in the data;
    text_pair, prompt and completion are read if they are named. docs/reference/tasks.md has every kind's columns."""
    max_length: Annotated[int, Within(least=2, most=_LONGEST)] = 128
    """Tokens a row keeps at most; may not exceed what the model allows. Longer contexts are read in windows (span)."""
    null_threshold: float | None = None
    """Give no answer unless the best one scores better than none by more than this (span); unset: as the task says,
    which is to answer always, or 0 where questions without an answer belong to it."""
    answer_tokens: Annotated[int, Within(least=1, most=_LONGEST)] = 30
    """Tokens an answer has at most (span, generation, and what `predict` writes)."""
    limit_train: Annotated[int | None, Within(least=1)] = None
    """Use only so many training rows, after a seeded shuffle."""
    limit_test: Annotated[int | None, Within(least=1)] = None
    """Use only so many test rows, after a seeded shuffle."""

    def __post_init__(self) -> None:
        check_values(self, "data.")


@dataclass(kw_only=True)
class TrainingConfig:
    """The fine-tuning run as a whole; estimation is its first part."""

    epochs: Annotated[float | Auto, Within(above=0, most=_MOST_EPOCHS)] = "auto"
    """Passes over the training rows, estimation included; auto: 3, and as many more as make 200 optimizer steps, up to
    40, of which a run takes no more than lower the loss on rows that it sets aside."""
    batch_size: Annotated[int, Within(least=1, most=MOST_ROWS)] = 32
    """Rows a step and process."""
    eval_batch_size: Annotated[int, Within(least=1, most=MOST_ROWS)] = 64
    """Rows a step in evaluation and prediction."""
    gradient_accumulation: Annotated[int, Within(least=1, most=MOST_ROWS)] = 1
    """Backward passes an optimizer step."""
    learning_rate: Annotated[float | Auto, Within(above=0)] = "auto"
    """Peak learning rate of what trains; linear decay to zero. auto: for PEFT modules and the head by the model's
    width, from 1e-3 (384 and below) to 3e-4 (4,096 and above); 2e-5 where every weight trains (method full), since
    what PEFT needs would destroy pretrained weights."""
    warmup: Annotated[float, Within(least=0, below=1)] = 0.06
    """Part of each stage's steps over which the learning rate rises."""
    precision: Literal["float32", "bf16", "fp16", "auto"] = "float32"
    """What products of matrices are computed in, in training and evaluation: float32, the weights' own precision; bf16,
    bfloat16 autocast; fp16, float16 autocast with a scaled loss, for GPUs that have no bfloat16 arithmetic; auto,
    bf16 on hardware that has bfloat16 arithmetic."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    fast_steps: bool = True
    """Light runs compute a LoRA layer in one step, gradients of attention and of norms on CPUs in fewer, and a language
    model's logits where labels are, and make some activations again in the backward pass; off: as PEFT, PyTorch and
    transformers do."""
    prefix_cache: PrefixPlace = "file"
    """Blocks below the lowest PEFT module compute the same for a row in every epoch. file, memory: compute them once,
    without dropout, and keep their outputs there, if they take no more than 16 GiB; off: compute them every time, with
    dropout."""
    teacher: str | None = None
    """A finished model of the same labels, whose answers to the training rows are learned beside the labels: the folder
    of a run, of an adapter or of a model, or a name on the hub. It reads the texts by its own tokenizer, once, before
    training. For classes, numbers and options that a head answers."""
    teacher_weight: Annotated[float, Within(above=0, most=1)] = 0.5
    """Part of the loss that is the teacher's, in (0, 1]; the rest is the labels'."""
    save_steps: Annotated[int, Within(least=1)] = 200
    """Steps between checkpoints that a killed run resumes from."""

    def __post_init__(self) -> None:
        check_values(self, "training.")


@dataclass(kw_only=True)
class RunConfig:
    """A whole run: model -> estimation -> plan -> surgery -> fine-tuning -> evaluation, into one folder."""

    method: MethodName = "light"
    """light: Light-PEFT; for comparison on the same data, plain: the same PEFT as it is used by habit (no estimation,
    nothing pruned; LoRA sits on q and v), full: full fine-tuning, in which every weight trains."""
    peft: Peft = USUAL
    """PEFT kind: lora, bottleneck (adapters) or ia3; or a mapping with the kind as its `type` (lora if there is none),
    any of PEFT's own settings for it, such as {type: lora, r: 16, use_dora: true}, and `slots`, the projections that
    get a module, of q, k, v, qkv, o, ffn_in, ffn_gate, ffn_gate_in, ffn_out. If they are not given: lora has r: 8,
    lora_alpha: 16, lora_dropout: 0.05, and bottleneck has size: 64, placement: houlsby; modules sit on all projections
    (method light), or where the kind has them by habit, which for LoRA is q and v (method plain)."""
    output: str = "runs/run"
    """Run folder: estimation/, plan.json, pruned/, adapter/, full/, metrics.json, log.jsonl."""
    seed: Annotated[int, Within(least=0, below=2**32)] = 0
    """Seed of weights, order and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The foundation model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The task's data."""
    light: LightConfig = field(default_factory=LightConfig)
    """How much is removed, and how. A part of the blocks such as 0.4, auto, a preset's name, or settings; what is unset
    follows from the task and the kind of PEFT (help shows it for LoRA on a model that classifies)."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The fine-tuning run."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Other fields of transformers' TrainingArguments, such as optim, weight_decay (0 if it is not given),
    max_grad_norm (1), lr_scheduler_type, logging_steps (10), eval_strategy, report_to."""
    tasks: dict[str, TaskEntry] = field(default_factory=dict)
    """Tasks of your own by name, for `data.task`."""

    def __post_init__(self) -> None:
        check_values(self)
        self.peft = shortest(self.peft)
        self.light = derived(self.light, self.peft_type, self.task_kind in WRITTEN)

    @property
    def task_kind(self) -> str:
        """The kind of the task, as far as the settings say so: of a task that ships, its name."""
        own = self.tasks.get(self.data.task)
        return self.data.task if own is None else own.kind

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
    """Read a `RunConfig` from a YAML file.

    Raises:
        LightPeftError: the file is missing or not YAML, or a key or value is not known.
    """
    return run_config_from_dict(load_yaml(path))


def run_config_from_dict(data: dict[str, Any]) -> RunConfig:
    """A `RunConfig` from nested plain data, in which `light` may have a short form."""
    return from_dict(RunConfig, {**data, "light": light_mapping(data.get("light"))})
