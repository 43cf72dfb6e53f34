"""What a user can set: typed, documented dataclasses, checked when they are made.

`LightConfig` is all that `EarlyPruner` needs. `RunConfig` adds the model, the data and the training of a whole
`lightpeft run`; it is read from YAML and from the command line, and an unknown key names its nearest neighbour.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightpeft.errors import require
from lightpeft.plain_data import check_values, from_dict, load_yaml, shown

Scope = Literal["layerwise", "global"]
HeadUnit = Literal["group", "balanced"]
UnitCriterion = Literal["mask", "taylor", "fisher", "magnitude", "random"]
ModuleCriterion = Literal["ratio", "taylor", "random"]
RankCriterion = Literal["taylor", "magnitude", "random"]
TaskKind = Literal["classification", "regression", "multiple-choice", "span", "generation", "chat", "causal-lm"]
Head = Literal["classification", "regression", "multiple-choice", "span", "causal-lm"]
AnswerBy = Literal["auto", "head", "likelihood"]
LikelihoodRule = Literal["sum", "token", "byte", "unconditional"]
Method = Literal["light", "plain", "full"]
PeftKind = Literal["lora", "bottleneck"]
Placement = Literal["houlsby", "pfeiffer", "parallel"]
RefitForm = Literal["none", "bias", "low_rank"]
PrefixPlace = Literal["file", "memory", "off"]
PrefixDtype = Literal["auto", "float32", "bfloat16", "float16"]
Preset = Literal["default", "uniform", "fast", "paper"]
Auto = Literal["auto"]


_WIDEST = 2**16
"""What ranks and widths may be: no model's hidden size is larger."""
_LONGEST = 2**24
"""Tokens that a row may have: no model reads more."""
_MOST_ROWS = 2**20
"""Rows that may go into a step."""
_HEAVIEST = 10**6
"""What the weight of a penalty may be: no mask is left far below that."""
_MOST_EPOCHS = 10**6
"""Passes over the rows; steps are counted in 64 bits."""


def _check_most(config: Any, section: str, limits: dict[str, int]) -> None:
    """Refuse values that could only end in a lack of memory, or in an overflow."""
    for name, limit in limits.items():
        value = getattr(config, name)
        fits = not isinstance(value, (int, float)) or value <= limit
        require(fits, f"{section}{name} is {shown(value)}; it can be at most {limit:,}")


@dataclass(kw_only=True)
class Budget:
    """What to remove, as ratios of what is there; with a record it determines a plan."""

    heads: float = 1 / 3
    """Part of the attention head units to remove, in [0, 1)."""
    neurons: float = 1 / 3
    """Part of the FFN neurons to remove, in [0, 1)."""
    modules: float = 3 / 4
    """Part of the PEFT modules to remove, in [0, 1); of those that `module_blocks` allows."""
    module_blocks: float = 1.0
    """Part of the blocks, counted from the top, in which PEFT modules may stay, in (0, 1]: no block below needs a
    backward pass, and each gives the same for a row in every epoch."""
    ranks: float = 1 / 2
    """Part of the ranks of the PEFT modules that stay to remove, in [0, 1)."""
    blocks: float | None = None
    """Part to remove, at least, of all parameters that the blocks have, in [0, 1): heads and neurons of all blocks
    compete, and the lowest score per parameter goes first; takes the place of `heads`, `neurons` and their scopes."""
    target: float | None = None
    """Part of all base parameters to remove; sets `heads` and `neurons` to the common ratio that reaches it."""
    depth: float = 0.0
    """Part of the blocks to leave out whole, from the top, in [0, 1): before estimation, which scores what is left.
    What `blocks` and `target` say includes them; ratios are of what is left."""

    heads_scope: Scope = "layerwise"
    """Rank heads within each layer or over all layers together."""
    neurons_scope: Scope = "global"
    """Rank neurons within each layer or over all layers together."""
    modules_scope: Scope = "global"
    """Rank PEFT modules within each layer or over all layers together."""
    ranks_scope: Scope = "layerwise"
    """Rank the ranks within each PEFT module or over all modules together."""

    min_heads: int = 1
    """Head units that stay in every layer; 0 lets a layer lose its attention."""
    min_neurons: int = 1
    """Neurons that stay in every layer; 0 lets a layer lose its FFN."""
    min_modules: int = 0
    """PEFT modules that stay in every layer."""
    min_ranks: int = 1
    """Ranks that stay in every PEFT module that stays (at least 1)."""
    multiple_of: int = 1
    """FFN widths are rounded to the nearest multiple of this (1: exact counts; 8 and more: fast kernels)."""
    head_unit: HeadUnit = "group"
    """Under grouped-query attention: whole KV groups, or query heads removed equally from every group."""

    head_criterion: UnitCriterion = "mask"
    """Which score ranks the heads."""
    neuron_criterion: UnitCriterion = "mask"
    """Which score ranks the neurons."""
    module_criterion: ModuleCriterion = "ratio"
    """Which score ranks the PEFT modules."""
    rank_criterion: RankCriterion = "taylor"
    """Which score ranks the ranks."""

    def __post_init__(self) -> None:
        for name in ("heads", "neurons", "modules", "ranks", "blocks", "target", "depth"):
            value = getattr(self, name)
            if value is not None:
                require(0 <= value < 1, f"{name} is {value:g}; a ratio to remove lies in [0, 1), for example 0.5")
        within = f"module_blocks is {self.module_blocks:g}; it lies in (0, 1], for example 0.5 for the upper half"
        require(0 < self.module_blocks <= 1, within)
        require(
            self.blocks is None or self.target is None, "blocks and target both say how much goes; give one of them"
        )
        for name, least in (("heads", 0), ("neurons", 0), ("modules", 0), ("ranks", 1)):
            value = getattr(self, f"min_{name}")
            require(value >= least, f"min_{name} is {value}; it must be at least {least}")
        require(self.multiple_of >= 1, f"multiple_of is {self.multiple_of}; it must be at least 1")
        check_values(self)

    def blocks_left(self, blocks: int) -> int:
        """How many of so many blocks `depth` leaves."""
        return max(1, blocks - int(self.depth * blocks + 0.5))

    def first_module_block(self, blocks: int) -> int:
        """The lowest of so many blocks, those that are left out not counted, in which PEFT modules may stay."""
        return blocks - max(1, int(self.module_blocks * blocks + 0.5))


READ_BY_PLANS = frozenset(f.name for f in dataclasses.fields(Budget)) - {"module_blocks", "depth"}
"""Settings of a budget that estimation does not depend on. (No module is made in a block where none may stay.)"""


@dataclass(kw_only=True)
class LightConfig(Budget):
    """All that Light-PEFT adds to a PEFT run: the budget and how the scores behind it are estimated."""

    length: int | float | Literal["auto"] = 0.1
    """Estimation stage: optimizer steps (int), part of the whole run (float in (0, 1)), or "auto": until settled."""
    lambda_heads: float = 1e-4
    """Weight of the L1 penalty on the head masks (the paper's lambda_A)."""
    lambda_neurons: float = 1e-4
    """Weight of the L1 penalty on the neuron masks (the paper's lambda_F)."""
    mask_learning_rate: float = 2e-2
    """Adam learning rate of the masks, constant over the stage; masks have no weight decay."""
    ratio_every: int = 1
    """Every so many steps the modules' ratios (`module_criterion: ratio`) are measured; in the others the modules are
    computed faster."""
    check_every: int = 10
    """`length: auto` compares the sets that would be kept every so many steps."""
    settled_overlap: float = 0.95
    """`length: auto` calls two consecutive sets equal from this overlap (0 to 1) on."""
    settled_checks: int = 3
    """`length: auto` stops after so many equal comparisons in a row."""
    max_fraction: float = 0.3
    """`length: auto` and `least_steps` stop at this part of the whole run at the latest."""
    least_steps: int = 2
    """Where `length` is a part of the run: steps of the stage at least, so that a short run has something to score."""
    least_examples: int = 256
    """Examples, repeated ones included, that the stage's second half scores at least; from fewer no plan is made. A
    stage whose `length` is a part of the run is longer for it, up to `max_fraction`."""
    refit: RefitForm = "none"
    """After the cut, correct attention and FFN outputs by least squares on training rows: by a bias, or by a bias and a
    low-rank matrix; the corrections become part of the light adapter."""
    refit_rank: int = 16
    """Rank of the correction (refit: low_rank)."""
    refit_rows: int = 256
    """Training rows that the correction is fitted on."""
    learning_rate_scale: float = 1.0
    """Learning rate of a light run, as a multiple of `training.learning_rate`: a PEFT of few parameters takes more."""
    dropout: float | None = None
    """Dropout of the foundation model and its head in a light run; none: as the model has it. (PEFT keeps its own.)"""
    restart: bool = False
    """Re-initialise the PEFT modules after pruning instead of going on from what estimation learned."""
    seed: int = 0
    """Seed of the `random` criteria."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.length, str):
            require(self.length == "auto", f'length is "{self.length}"; give steps, a fraction of the run, or auto')
        elif isinstance(self.length, int):
            require(self.length >= 2, f"length is {self.length} steps; estimation needs at least 2")
        else:
            require(0 < self.length < 1, f"length is {self.length:g}; a fraction of the run lies in (0, 1)")
        require(self.mask_learning_rate > 0, f"mask_learning_rate is {self.mask_learning_rate:g}; it must be positive")
        positive = self.lambda_heads >= 0 and self.lambda_neurons >= 0
        require(positive, "lambda_heads and lambda_neurons cannot be negative")
        counts = ("ratio_every", "check_every", "settled_checks")
        require(all(getattr(self, name) >= 1 for name in counts), f"{', '.join(counts)} start at 1")
        require(0 < self.settled_overlap <= 1, f"settled_overlap is {self.settled_overlap:g}; it lies in (0, 1]")
        require(self.refit_rank >= 1 and self.refit_rows >= 1, "refit_rank and refit_rows start at 1")
        _check_most(self, "", {"refit_rank": _WIDEST, "refit_rows": _MOST_ROWS})
        _check_most(self, "", dict.fromkeys(("lambda_heads", "lambda_neurons"), _HEAVIEST))
        scale = f"learning_rate_scale is {self.learning_rate_scale:g}; it must be positive and finite"
        require(0 < self.learning_rate_scale < math.inf, scale)
        require(self.dropout is None or 0 <= self.dropout < 1, f"dropout is {self.dropout}; it lies in [0, 1)")
        require(self.least_steps >= 2, f"least_steps is {self.least_steps}; estimation needs at least 2")
        require(self.least_examples >= 0, f"least_examples is {self.least_examples}; it cannot be negative")
        require(0 < self.max_fraction < 1, f"max_fraction is {self.max_fraction:g}; it lies in (0, 1)")


_BY_COST: dict[str, Any] = {
    "head_criterion": "fisher",
    "neuron_criterion": "fisher",
    "mask_learning_rate": 3e-4,
    "multiple_of": 8,
    "length": 0.075,
    "least_steps": 32,
    "module_blocks": 2 / 3,
    "modules": 0.0,
    "ratio_every": 16,
    "dropout": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    # Gu et al. 2024, section 4: masks train with the PEFT learning rate and are themselves the score.
    "paper": {"mask_learning_rate": 3e-4},
    # What of the blocks is worth least for its parameters, by Fisher scores; one rank of eight, in the upper blocks.
    "default": {**_BY_COST, "blocks": 0.6, "ranks": 7 / 8, "learning_rate_scale": 2.0},
    # Half of the heads and of the neurons of each layer, by the same scores: layers of equal size.
    "uniform": {
        **_BY_COST,
        "heads": 0.5,
        "neurons": 0.5,
        "neurons_scope": "layerwise",
        "ranks": 7 / 8,
        "learning_rate_scale": 2.0,
    },
    # Less is cut, and modules keep half of their ranks: the best quality.
    "fast": {**_BY_COST, "blocks": 0.4, "ranks": 0.5},
}
"""Values of `LightConfig` fields that differ from its defaults, by preset name."""
_WITH_ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {"blocks": 0.5, "learning_rate_scale": 4.0},
    "uniform": {"learning_rate_scale": 4.0},
    "fast": {"learning_rate_scale": 4.0},
}
"""What presets have of their own for bottleneck adapters, which take larger steps and lose more by a cut than LoRA."""


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
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention backend; unset: what transformers chooses."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Leave off unless you trust its author."""
    allow_pickle: bool = False
    """Read weights from pickle files (.bin) where there are none in safetensors; weights alone are unpickled. Leave off
    unless you trust its author."""

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(kw_only=True)
class TaskEntry:
    """One task, declared: where its rows are, how a row becomes text, how it is answered and measured.

    The tasks that ship with lightpeft are entries in `lightpeft.tasks`; those of a user are below `tasks` in the run's
    YAML.
    """

    name: str = ""
    """The task's name, as `data.task` gives it; empty for the kinds themselves."""
    kind: TaskKind = "classification"
    """Which columns the task's rows have in the end, and so which heads can answer it."""
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
    """Training rows: a .csv, .tsv, .json, .jsonl or .parquet file, or a hub data set as name[/config][:split]; needed
    for kinds, and instead of the task's own rows for the others."""
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
        _check_most(self, "data.", dict.fromkeys(("max_length", "answer_tokens", "stride"), _LONGEST))
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
        _check_most(self, "lora.", {"r": _WIDEST})
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
        _check_most(self, "bottleneck.", {"size": _WIDEST})
        require(0 <= self.dropout < 1, f"bottleneck.dropout is {self.dropout:g}; it lies in [0, 1)")


@dataclass(kw_only=True)
class TrainingConfig:
    """The fine-tuning run as a whole; estimation is its first part."""

    epochs: float | Auto = "auto"
    """Passes over the training rows, estimation included; auto: 3, and as many more as make 200 optimizer steps, up to
    40."""
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
    """Light runs compute a LoRA layer in one step, attention of short rows on CPUs by plain products, and a language
    model's logits where labels are; off: as PEFT, PyTorch and transformers do."""
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
        _check_most(self, "training.", {"epochs": _MOST_EPOCHS, **dict.fromkeys(rows, _MOST_ROWS)})
        require(not (self.fp16 and self.bf16), "training.fp16 and training.bf16 exclude each other; set one of them")
        require(self.prefix_limit > 0, f"training.prefix_limit is {self.prefix_limit:g}; it must be positive")
        require(0 <= self.warmup < 1, f"training.warmup is {self.warmup:g}; it lies in [0, 1)")
        for name in ("save_steps", "logging_steps", "pad_to_multiple_of"):
            require(getattr(self, name) >= 1, f"training.{name} is {getattr(self, name)}; it starts at 1")


@dataclass(kw_only=True)
class RunConfig:
    """A whole run: model -> estimation -> plan -> surgery -> fine-tuning -> evaluation, into one folder."""

    preset: Preset = "default"
    """Starting values of `light`: default (half of the blocks or more goes), uniform (half of each layer), fast (less
    goes), or paper (Gu et al. 2024)."""
    method: Method = "light"
    """light: Light-PEFT; for comparison on the same data, plain: the same PEFT as it is used by habit (no estimation,
    nothing pruned; LoRA sits on q and v), full: full fine-tuning, in which every weight trains."""
    peft: PeftKind = "lora"
    """lora, or bottleneck adapters."""
    output: str = "runs/run"
    """Run folder: estimation/, plan.json, pruned/, adapter/, metrics.json, log.jsonl."""
    seed: int = 0
    """Seed of weights, order and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The foundation model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The task's data."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The LoRA that the run starts with (peft: lora)."""
    bottleneck: BottleneckSettings = field(default_factory=BottleneckSettings)
    """The adapters that the run starts with (peft: bottleneck)."""
    light: LightConfig = field(default_factory=LightConfig)
    """Estimation and budget. (Help shows the values of preset `default`; --print_config those of a run.)"""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The fine-tuning run."""
    tasks: dict[str, TaskEntry] = field(default_factory=dict)
    """Tasks of your own by name, for `data.task`."""

    def __post_init__(self) -> None:
        check_values(self)
        require(0 <= self.seed < 2**32, f"seed is {self.seed}; it lies in [0, 2**32)")


def preset_light(name: str, peft: PeftKind = "lora", **overrides: Any) -> LightConfig:
    """`LightConfig` of a preset (a key of `PRESETS`) for a kind of PEFT, with some fields replaced.

    Raises:
        LightPeftError: no such preset, or a value that a field does not take.
    """
    return LightConfig(**merged(_preset(name, peft), overrides))


def _preset(name: Any, peft: Any) -> dict[str, Any]:
    """What a preset sets."""
    known = isinstance(name, str) and name in PRESETS
    require(known, f'preset "{name}" is unknown; choose one of {", ".join(PRESETS)}')
    return PRESETS[name] | (_WITH_ADAPTERS.get(name, {}) if peft == "bottleneck" else {})


_AMOUNTS = ({"heads", "neurons"}, {"blocks"}, {"target"})
"""Settings that say how much of the base goes, each in its own way."""


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with others on top.

    What says how much of the base goes in one way (heads and neurons, blocks, or target) takes the place of what said
    it in another way below.
    """
    result = dict(below)
    said = [ways for ways in _AMOUNTS if any(above.get(name) is not None for name in ways)]
    for name in ("blocks", "target"):
        if said and name in below and not any(name in ways for ways in said):
            result[name] = None
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def load_config(path: str | Path) -> RunConfig:
    """Read a `RunConfig` from a YAML file; `preset` sets what the file leaves open.

    Raises:
        LightPeftError: the file is missing or not YAML, or a key or value is not known.
    """
    return run_config_from_dict(load_yaml(path))


def run_config_from_dict(data: dict[str, Any]) -> RunConfig:
    """A `RunConfig` from nested plain data, with the preset below the given values."""
    preset = _preset(data.get("preset", "default"), data.get("peft"))
    given = data.get("light") or {}
    light = merged(preset, given) if isinstance(given, dict) else given
    return from_dict(RunConfig, {**data, "light": light})
