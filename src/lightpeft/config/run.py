"""Settings of a whole run (model, data, PEFT, training), read from YAML and from the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from lightpeft.config.derived import fill_defaults
from lightpeft.config.light import LARGEST_BATCH, LightConfig
from lightpeft.config.methods import METHODS, Method, MethodName
from lightpeft.config.peft import DEFAULT_KIND, Peft, peft_settings, peft_type, shorten_peft
from lightpeft.config.presets import WRITTEN, light_mapping
from lightpeft.config.validation import Within, check_values, from_dict, load_yaml
from lightpeft.errors import require

Auto = Literal["auto"]
AnswerBy = Literal["auto", "head", "likelihood"]
LikelihoodRule = Literal["sum", "byte"]
PrefixPlace = Literal["file", "memory", "off"]

_MOST_TOKENS = 2**24
"""Upper bound of settings that count tokens of a row; no model reads more."""


_MOST_EPOCHS = 10**6
"""Upper bound of `training.epochs`; steps are counted in 64 bits."""


SWITCHES = ("trust_remote_code", "allow_pickle")
"""Settings of `ModelConfig` that allow foreign code to run; the user's command gives them, never a folder."""


@dataclass(kw_only=True)
class ModelConfig:
    """The foundation model.

    Example:
        RunConfig(model=ModelConfig(name="owner/base", dtype="bfloat16"))
    """

    name: str = ""
    """Hub name or local folder of the pretrained model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    gguf_file: str | None = None
    """File inside the folder to load a GGUF checkpoint from; its weights are unpacked to `dtype`."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Data type of the frozen weights."""
    quantization: Literal["nf4", "int8"] | None = None
    """Keep the frozen weights in 4 bits (nf4) or 8 bits (int8), with bitsandbytes (extra `quantized`)."""
    low_memory: bool = False
    """Leave the weights of the blocks on disk and read each when a step needs it: slower, for bases that do not fit
    into memory."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention backend. Unset: the default of transformers."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Leave off unless you trust its author."""
    allow_pickle: bool = False
    """Read pickled weights (.bin) if the checkpoint has no safetensors; nothing but tensors is unpickled. Leave off
    unless you trust its author."""

    def __post_init__(self) -> None:
        check_values(self, "model.")
        both = "model.quantization and model.gguf_file cannot be combined; leave one of them unset"
        require(self.quantization is None or self.gguf_file is None, both)
        others = [name for name in ("quantization", "gguf_file") if getattr(self, name) is not None]
        clash = f"model.low_memory cannot be combined with model.{' and model.'.join(others)}"
        require(not (self.low_memory and others), f"{clash}; it reads plain safetensors files, so leave these unset")


@dataclass(kw_only=True)
class TaskEntry:
    """A task of your own, with its rows, columns, answers and metrics.

    Built-in tasks are entries in `lightpeft.app.tasks`; your own entries are below `tasks` in the run's YAML.

    Example:
        TaskEntry(name="stars", path="reviews", columns={"text": "review", "label": "stars"}, labels=["bad", "good"])
    """

    name: str = ""
    """Name of the task, for `data.task`; empty for the kinds themselves."""
    kind: str = "classification"
    """Kind of the task, one of those of `data.task`; it determines the columns of the rows and the possible heads."""
    hub: str | None = None
    """Data set on the hub as owner/name[/config]."""
    path: str | None = None
    """Local folder with one file per split, in the hub's columns; it takes precedence over `hub`."""
    train: str = "train"
    """Split to train on."""
    test: str | None = "validation"
    """Split with labels to evaluate on. Unset: a part of the training rows is held out."""
    more_tests: dict[str, str] = field(default_factory=dict)
    """Further splits to evaluate on: prefix of their metrics -> split."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column of the kind (such as text, text_pair, label) -> column of the data, or a template such as
    "{premise} {hypothesis}". Empty: the data have the columns of the kind."""
    convert: str | None = None
    """Instead of `columns`: name of a built-in function that converts a row of the data into a row of the kind."""
    labels: list[str] = field(default_factory=list)
    """Label names in class order, for data that number their labels. Empty: the labels in the data."""
    prompt: str | None = None
    """Prompt of a causal language model before the answer, as a template over the kind's columns."""
    words: list[str] = field(default_factory=list)
    """Answer of the language model for each label. Empty: the labels themselves."""
    null_threshold: float | None = None
    """Default of `data.null_threshold` for this task (span); set it if a question may have no answer in its context."""
    metrics: list[str] = field(default_factory=list)
    """Metrics, the main one first. Empty: those of the kind."""

    def __post_init__(self) -> None:
        check_values(self)
        known = not self.words or len(self.words) == len(self.labels)
        counts = f"words has {len(self.words)} entries for {len(self.labels)} labels"
        require(known, f"{counts}; give one word for each label, or leave words empty")
        require(not (self.columns and self.convert), "columns and convert are both set; give one of them")


@dataclass(kw_only=True)
class DataConfig:
    """Rows of the task, from local files or a hub data set, and the roles of their columns.

    Example:
        DataConfig(train="reviews.csv", columns={"text": "review", "label": "stars"})
    """

    task: str = "classification"
    """A task by name (such as rte, or one of your own below `tasks`), or a kind whose columns you name here.
    classification: one label per text (or pair of texts); regression: one number; multiple-choice: one of several
    options; span: a part of a context; generation: a short text that the model generates; chat: the assistant's
    messages in a list of messages; causal-lm: next-token loss on texts or completions."""
    answer: AnswerBy = "auto"
    """Source of a model's answers. head: a layer trained for the task; likelihood: the causal language model's own
    probabilities of label words or options; auto: a head, but likelihood for multiple choice on decoders."""
    likelihood: LikelihoodRule = "sum"
    """Score of an option (answer: likelihood). sum: its log-probability; byte: the mean over its bytes."""
    path: str | None = None
    """Folder with the task's own splits as files, in the hub's columns, instead of the hub."""
    train: str = ""
    """Training rows: a .csv, .tsv, .json, .jsonl or .parquet file, or a hub data set as `name[/config][:split]`. A
    task by name has rows of its own, which these replace; other tasks need this setting."""
    test: str | None = None
    """Rows for evaluation, in the same form. Unset: `test_fraction` of the training rows is held out."""
    test_fraction: Annotated[float, Within(above=0, below=1)] = 0.2
    """Fraction of the training rows held out when `test` is unset; the same rows for every seed of the run."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column of the task -> its name in the data, such as text: review and label: stars, or a template such as
    "{premise} {hypothesis}". A column without an entry has the same name in the data; text_pair, prompt and completion
    are read only with an entry. docs/reference/tasks.md lists the columns of every kind of task."""
    max_length: Annotated[int, Within(least=2, most=_MOST_TOKENS)] = 128
    """Maximum number of tokens of a row; limited by the model. Longer contexts are read in windows (span)."""
    null_threshold: float | None = None
    """Threshold for giving an answer (span): the best answer must outscore the empty answer by more than this number.
    Unset: always answer, or 0 for tasks that have questions without an answer."""
    answer_tokens: Annotated[int, Within(least=1, most=_MOST_TOKENS)] = 30
    """Maximum number of tokens of an answer (span, generation, and text that `predict` generates)."""
    limit_train: Annotated[int | None, Within(least=1)] = None
    """Maximum number of training rows, taken after a seeded shuffle."""
    limit_test: Annotated[int | None, Within(least=1)] = None
    """Maximum number of test rows, taken after a seeded shuffle."""

    def __post_init__(self) -> None:
        check_values(self, "data.")


@dataclass(kw_only=True)
class TrainingConfig:
    """Training of the whole run; estimation is its first part.

    Example:
        TrainingConfig(epochs=3, batch_size=8, gradient_accumulation=4, precision="auto")
    """

    epochs: Annotated[float | Auto, Within(above=0, most=_MOST_EPOCHS)] = "auto"
    """Passes over the training rows, estimation included. auto: 3, or as many as make 200 optimizer steps, up to 40;
    more than 3 end early when the loss on held-out training rows stops falling."""
    batch_size: Annotated[int, Within(least=1, most=LARGEST_BATCH)] = 32
    """Per-device batch size: rows of one process in one forward pass."""
    eval_batch_size: Annotated[int, Within(least=1, most=LARGEST_BATCH)] = 64
    """Batch size in evaluation and prediction."""
    gradient_accumulation: Annotated[int, Within(least=1, most=LARGEST_BATCH)] = 1
    """Number of backward passes for each optimizer step."""
    learning_rate: Annotated[float | Auto, Within(above=0)] = "auto"
    """Peak learning rate, with linear decay to zero. auto: for PEFT modules and the head by the model's hidden size,
    from 1e-3 (384 and below) to 3e-4 (4,096 and above); 2e-5 if every weight trains (method full), because the higher
    rate of PEFT would destroy pretrained weights."""
    warmup: Annotated[float, Within(least=0, below=1)] = 0.06
    """Fraction of each stage's steps in which the learning rate warms up."""
    precision: Literal["float32", "bf16", "fp16", "auto"] = "float32"
    """Precision of matrix products in training and evaluation. float32: that of the weights; bf16: bfloat16 autocast;
    fp16: float16 autocast with loss scaling, for GPUs without bfloat16 arithmetic; auto: bf16 on hardware with bfloat16
    arithmetic."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    fast_steps: bool = True
    """Use faster kernels in light runs: fused LoRA layers, fewer operations for gradients of attention and norms on
    CPUs, logits of labeled tokens only, and recomputation of some activations. off: the code of PEFT, PyTorch and
    transformers."""
    prefix_cache: PrefixPlace = "file"
    """Cache of the blocks below the lowest PEFT module, whose outputs for a row are the same in every epoch. file,
    memory: compute them once, without dropout, and keep them there if they need at most 16 GiB; off: compute them every
    time, with dropout."""
    padding_free: bool = False
    """Join the rows of a training batch to one sequence without padding, with attention inside each row; for tasks with
    a language-modeling head. Meant for `model.attn_implementation: flash_attention_2`; a CPU takes longer."""
    teacher: str | None = None
    """Teacher for distillation: a trained model with the same labels, as the folder of a run, of an adapter or of a
    model, or a hub name. After the cut, the student learns its logits beside the labels. The teacher reads the training
    texts once, before training, with its own tokenizer. For classification, regression and multiple choice with a
    head."""
    teacher_weight: Annotated[float, Within(above=0, most=1)] = 0.5
    """Weight w of the teacher's loss after the cut, in (0, 1]; the loss of the labels has weight 1 - w. 1: labels do
    not count, and the teacher alone trains before the cut, too."""
    save_steps: Annotated[int, Within(least=1)] = 200
    """Number of steps between checkpoints, from which a killed run resumes."""

    def __post_init__(self) -> None:
        check_values(self, "training.")


@dataclass(kw_only=True)
class RunConfig:
    """A whole run in one folder, from estimation to evaluation.

    Example:
        config = RunConfig(model=ModelConfig(name="base"), data=DataConfig(train="rows.csv"), output="runs/rows")
        lightpeft.run(config)

    Raises:
        LightPeftError: a value is invalid, or two settings exclude each other.
    """

    method: MethodName = "light"
    """light: Light-PEFT. For comparison on the same data, plain: the same PEFT without pruning, on its usual
    projections (LoRA on q and v); full: full fine-tuning of every weight."""
    peft: Peft = DEFAULT_KIND
    """PEFT kind: lora, bottleneck (adapters) or ia3; or a mapping with the kind as its `type` (lora if there is none),
    any of PEFT's own settings for it, such as {type: lora, r: 16, use_dora: true}, and `slots`, the projections that
    get a module, from q, k, v, qkv, o, ffn_in, ffn_gate, ffn_gate_in, ffn_out. Defaults: lora has r: 8, lora_alpha: 16,
    lora_dropout: 0.05, and bottleneck has size: 64, placement: houlsby; modules sit on all projections (method light),
    or on the usual ones of the kind, for LoRA q and v (method plain)."""
    output: str = "runs/run"
    """Run folder: estimation/, plan.json, pruned/, adapter/, full/, metrics.json, log.jsonl."""
    seed: Annotated[int, Within(least=0, below=2**32)] = 0
    """Seed of weights, order and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The foundation model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The task's data."""
    light: LightConfig = field(default_factory=LightConfig)
    """Pruning: a fraction of the blocks to remove such as 0.4, auto, a preset's name, or settings. Defaults depend on
    the task and the PEFT kind (--help shows those for LoRA on a classifier)."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The fine-tuning run."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Other fields of transformers' TrainingArguments, such as optim, weight_decay (default 0), max_grad_norm (1),
    lr_scheduler_type, logging_steps (10), eval_strategy, report_to."""
    tasks: dict[str, TaskEntry] = field(default_factory=dict)
    """Tasks of your own by name, for `data.task`."""

    def __post_init__(self) -> None:
        check_values(self)
        self.peft = shorten_peft(self.peft)
        self.light = fill_defaults(self.light, self.peft_type, self.task_kind in WRITTEN)

    @property
    def task_kind(self) -> str:
        """Kind of the task as far as the settings give it; for a built-in task, the name of the task."""
        own = self.tasks.get(self.data.task)
        return self.data.task if own is None else own.kind

    @property
    def peft_type(self) -> str:
        """Name of the PEFT kind."""
        return str(peft_type(self.peft))

    @property
    def peft_settings(self) -> dict[str, Any]:
        """Settings in `peft` without the kind."""
        return peft_settings(self.peft)

    @property
    def method_spec(self) -> Method:
        """The fine-tuning method, with its properties."""
        return METHODS[self.method]

    @property
    def unused(self) -> tuple[str, ...]:
        """Prefixes of the names of settings that the run ignores."""
        return (*self.method_spec.unused, *self.light.unused)


def load_config(path: str | Path) -> RunConfig:
    """Read the settings of a run from a YAML file.

    Args:
        path: the file. Settings that it does not contain get their defaults.

    Returns:
        The settings.

    Example:
        config = load_config("run.yaml")
        lightpeft.run(config)

    Raises:
        LightPeftError: the file is missing or not YAML, or a key or value is not known.
    """
    return run_config_from_dict(load_yaml(path))


def run_config_from_dict(data: dict[str, Any]) -> RunConfig:
    """Make a `RunConfig` from nested plain data, in which `light` may have a short form."""
    return from_dict(RunConfig, {**data, "light": light_mapping(data.get("light"))})
