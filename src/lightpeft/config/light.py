"""What Light-PEFT is told: how much to remove, how to estimate, where modules stay, at which rates, and what is kept.

A setting that is unset is derived from the task, the kind of PEFT and the preset (`config.derived`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightpeft.config.validation import check_values, from_dict
from lightpeft.errors import LightPeftError, require

Scope = Literal["layerwise", "global"]
HeadUnit = Literal["group", "balanced"]
Criterion = Literal["mask", "taylor", "fisher", "magnitude", "random"]
ModuleCriterion = Literal["ratio", "taylor", "random"]
RankCriterion = Literal["taylor", "magnitude", "random"]
Keep = Literal["light", "full", "both"]
Tokens = Literal["keep", "task"]
Preset = Literal["fast", "accurate", "paper"]
Train = Literal["peft", "all"]

WIDEST = 2**16
"""What ranks and widths may be: no model's hidden size is larger."""
MOST_ROWS = 2**20
"""Rows that may go into a step."""


def _check_shares(section: Any, where: str, *names: str) -> None:
    """Refuse numbers that are no part to remove."""
    for name in names:
        value = getattr(section, name)
        if isinstance(value, str):
            require(value == "auto", f'{where}{name} is "{value}"; give a part to remove, for example 0.5, or auto')
        elif value is not None:
            require(0 <= value < 1, f"{where}{name} is {value:g}; a part to remove lies in [0, 1), for example 0.5")


def _check_rate(value: float | None, name: str) -> None:
    require(value is None or 0 < value < math.inf, f"{name} is {value}; it must be positive and finite")


@dataclass(kw_only=True)
class Remove:
    """How much of the base goes, and in which units."""

    blocks: float | Literal["auto"] | None = None
    """Part of all parameters of the blocks to remove, at least, in [0, 1): heads, neurons and experts of all blocks
    compete, and the lowest score per parameter goes first. "auto": the largest part that `tolerance` bears, measured
    when estimation is over. Unset: auto, or 0 for models that write their answers."""
    heads: float | None = None
    """In place of `blocks`: part of the attention head units to remove, in [0, 1)."""
    neurons: float | None = None
    """In place of `blocks`: part of the FFN neurons to remove; of those inside experts as many of every expert that
    stays."""
    experts: float | None = None
    """In place of `blocks`: part of each layer's routed experts to remove; at least as many stay as a token is routed
    to."""
    depth: float | Literal["auto"] = 0.0
    """Part of the blocks to leave out whole, from the top, in [0, 1): before estimation, which scores what is left.
    What `blocks` says includes them; shares of heads, neurons and experts are of what is left.
    "auto": of a decoder that classifies, those above which there is nothing to be gained, as far as `blocks` allows."""
    vocabulary: Tokens = "keep"
    """Tokens that the base has: all of them (keep), or those of the training rows and what lets every text still be
    tokenised (task): before estimation, which scores what is left."""
    tolerance: str | None = None
    """What `blocks: auto` may cost in the end, against nothing cut: nats of the loss, as in "0.05 nats", or points of
    the task's main metric, as in "1 point". Unset: 1 point where answers are classes, else 0.05 nats."""
    scope: Scope | None = None
    """What competes: units of each layer (layerwise), or of all layers (global). Unset: of `blocks` all units of all
    blocks, of shares heads within layers and neurons over all. With `blocks`, layerwise: the same part of the heads,
    neurons and experts leaves every layer."""
    head_unit: HeadUnit | None = None
    """Under grouped-query attention: whole KV groups, or query heads removed equally from every group (balanced).
    Unset: group, or balanced for models that write their answers."""
    multiple_of: int | None = None
    """FFN widths are rounded to the nearest multiple of this (1: exact counts; 8 and more: fast kernels); those of
    experts to one of 8 in any case. Unset: 8."""

    def __post_init__(self) -> None:
        _check_shares(self, "light.remove.", "blocks", *SHARES, "depth")
        both = next((name for name in SHARES if getattr(self, name) is not None), None)
        one = f"light.remove.blocks and light.remove.{both} both say how much goes; give one of them"
        require(self.blocks is None or both is None, one)
        if self.multiple_of is not None:
            least = f"light.remove.multiple_of is {self.multiple_of}; it must be at least 1"
            require(self.multiple_of >= 1, least)
        check_values(self)
        if self.tolerance is not None:
            Tolerance.read(self.tolerance)

    @property
    def says_how_much(self) -> bool:
        """Whether it says an amount, in whichever way."""
        return any(getattr(self, name) is not None for name in AMOUNTS)


SHARES = ("heads", "neurons", "experts")
"""Settings of `Remove` that are shares of one kind of units each."""
AMOUNTS = ("blocks", *SHARES)
"""Settings of `Remove` that say how much of the blocks goes."""


@dataclass(kw_only=True)
class Estimate:
    """How units are scored before anything goes."""

    length: int | float | Literal["auto"] | None = None
    """Optimizer steps (whole number), or part of the whole run (in (0, 1)); auto: 7.5% of the run, 32 steps at least,
    and longer until the model has learned something of its task, up to 30% of the run. Unset: auto."""
    criterion: Criterion | None = None
    """Which score ranks heads, neurons and experts. Unset: fisher."""
    module_criterion: ModuleCriterion | None = None
    """Which score ranks PEFT modules. Unset: ratio."""
    rank_criterion: RankCriterion | None = None
    """Which score ranks their ranks. Unset: taylor."""
    mask_learning_rate: float | None = None
    """Adam learning rate of the masks, constant over the stage; masks have no weight decay. Unset: 3e-4."""

    def __post_init__(self) -> None:
        length = self.length
        if isinstance(length, str):
            require(length == "auto", f'light.estimate.length is "{length}"; give steps, a part of the run, or auto')
        elif isinstance(length, int):
            require(length >= 2, f"light.estimate.length is {length} steps; estimation needs at least 2")
        elif length is not None:
            require(0 < length < 1, f"light.estimate.length is {length:g}; a part of the run lies in (0, 1)")
        _check_rate(self.mask_learning_rate, "light.estimate.mask_learning_rate")
        check_values(self)


@dataclass(kw_only=True)
class Modules:
    """Which PEFT modules, and how many of their ranks, train behind the cut."""

    blocks: float | None = None
    """Part of the blocks, counted from the top, in which PEFT modules stay, in (0, 1]: no block below needs a backward
    pass, and each gives the same for a row in every epoch. Unset: by preset and task."""
    remove: float | None = None
    """Part of the PEFT modules in these blocks to remove, in [0, 1). Unset: 0."""
    remove_ranks: float | None = None
    """Part of the ranks of the modules that stay to remove, in [0, 1). Unset: by preset and task."""

    def __post_init__(self) -> None:
        _check_shares(self, "light.modules.", "remove", "remove_ranks")
        within = f"light.modules.blocks is {self.blocks}; it lies in (0, 1], for example 0.5 for the upper half"
        require(self.blocks is None or 0 < self.blocks <= 1, within)
        check_values(self)


@dataclass(kw_only=True)
class Rates:
    """How fast a light run learns."""

    scale: float | None = None
    """Learning rate of a light run, as a multiple of `training.learning_rate`: a PEFT of few parameters takes more.
    Unset: by preset and kind of PEFT."""
    estimation_scale: float | None = None
    """The same while estimation lasts, when no rank is gone yet. Unset: `scale`, or 1 for bottleneck adapters."""
    dropout: float | Literal["keep"] | None = None
    """Dropout of the foundation model and its head in a light run; keep: as the model has it. (PEFT keeps its own.)
    Unset: 0."""

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("scale", "estimation_scale"):
            _check_rate(getattr(self, name), f"light.rates.{name}")
        dropout = self.dropout
        if isinstance(dropout, str):
            require(dropout == "keep", f'light.rates.dropout is "{dropout}"; give a number in [0, 1), or keep')
        elif dropout is not None:
            require(0 <= dropout < 1, f"light.rates.dropout is {dropout}; it lies in [0, 1)")

    @property
    def base_dropout(self) -> float | None:
        """`dropout` as a number; None: the base's own."""
        return None if isinstance(self.dropout, str) else self.dropout


@dataclass(kw_only=True)
class After:
    """What a run leaves."""

    keep: Keep = "light"
    """The light model; what it has learned as a plain PEFT adapter over the whole base (full); or both, each measured.
    """
    full_width_steps: float = 0.0
    """Part of the run's steps, its last ones, that train at full width (keep: full or both), in [0, 1)."""

    def __post_init__(self) -> None:
        check_values(self)
        last = f"light.after.full_width_steps is {self.full_width_steps:g}; a part of the run lies in [0, 1)"
        require(0 <= self.full_width_steps < 1, last)
        alone = "light.after.full_width_steps train what keep: light would throw away; set keep to full or both"
        require(self.keep != "light" or not self.full_width_steps, alone)


@dataclass(frozen=True)
class Tolerance:
    """How much worse a task may get by a cut."""

    amount: float
    unit: Literal["nats", "points"]
    """Of the loss (a mean, in nats), or hundredths of the task's main metric."""

    @classmethod
    def read(cls, text: str) -> Tolerance:
        """What "0.05 nats" or "1 point" says.

        Raises:
            LightPeftError: it says something else.
        """
        example = 'for example "1 point" of the metric, or "0.05 nats" of the loss'
        number, _, unit = str(text).strip().partition(" ")
        units: dict[str, Literal["nats", "points"]] = {"nat": "nats", "point": "points"}
        known = unit.strip().removesuffix("s")
        require(known in units, f"light.remove.tolerance is {text}; say how much of what, {example}")
        try:
            amount = float(number)
        except ValueError:
            raise LightPeftError(
                f'light.remove.tolerance is "{text}"; it must be a number of {units[known]}, {example}'
            ) from None
        require(0 < amount < math.inf, f'light.remove.tolerance is "{text}"; it must be positive and finite, {example}')
        return cls(amount, units[known])

    def __str__(self) -> str:
        unit = self.unit.removesuffix("s") if self.amount == 1 else self.unit
        return f"{self.amount:g} {unit}"


READ_BY_PLANS = frozenset(
    {f"remove.{each.name}" for each in dataclasses.fields(Remove)}
    | {"estimate.criterion", "estimate.module_criterion", "estimate.rank_criterion"}
    | {"modules.remove", "modules.remove_ranks", "train"}
) - {"remove.depth", "remove.vocabulary"}
"""Settings of `LightConfig` that estimation does not depend on. (No module is made in a block where none may stay.)"""
READ_AFTERWARDS = frozenset(f"after.{each.name}" for each in dataclasses.fields(After))
"""Those, beside plans' ones, that are read when estimation is over."""


@dataclass(kw_only=True)
class LightConfig:
    """All that Light-PEFT adds to a PEFT run. Sections may be given as mappings."""

    preset: Preset | None = None
    """What unset settings stand for. fast: few ranks, in the upper blocks, at a higher rate: the fastest training;
    accurate: all ranks, in all blocks; paper: as in Gu et al. 2024. Unset: fast, or accurate for models that write
    their answers."""
    remove: Remove = field(default_factory=Remove)
    """How much goes."""
    estimate: Estimate = field(default_factory=Estimate)
    """How units are scored."""
    modules: Modules = field(default_factory=Modules)
    """Which PEFT modules stay."""
    train: Train | None = None
    """Which weights train behind the cut. peft: those of the PEFT modules; all: PEFT is merged, and all weights that
    are left train, but for embeddings and the head of a language model. Unset: peft."""
    rates: Rates = field(default_factory=Rates)
    """How fast it learns."""
    after: After = field(default_factory=After)
    """What is left."""

    def __post_init__(self) -> None:
        for section in (Remove, Estimate, Modules, Rates, After):
            name = section.__name__.lower()
            given = getattr(self, name)
            if not isinstance(given, section):
                setattr(self, name, from_dict(section, given, f"light.{name}."))
        check_values(self)
        whole = "full and both are of the whole base, with all of its tokens; keep the vocabulary, or only light"
        require(self.after.keep == "light" or self.remove.vocabulary == "keep", f"light.after.keep: {whole}")
        own = f"light.train: all changes the base, which light.after.keep: {self.after.keep} is over; set keep to light"
        require(self.after.keep == "light" or self.train != "all", own)

    @property
    def is_auto(self) -> bool:
        """Whether the amount is to be found."""
        return self.remove.blocks == "auto"

    @property
    def chooses(self) -> bool:
        """Whether anything is to go of which scores say what: else all stays, and nothing has to be estimated."""
        return self.cuts_blocks or bool(self.modules.remove or self.modules.remove_ranks)

    @property
    def cuts_blocks(self) -> bool:
        """Whether heads, neurons or experts are to go."""
        return any(getattr(self.remove, name) for name in AMOUNTS)

    @property
    def known_blocks(self) -> float | None:
        """`remove.blocks` as a number; None: shares of each kind are given instead.

        Raises:
            LightPeftError: it is auto, and was not found yet.
        """
        if self.remove.blocks == "auto":
            raise LightPeftError("light.remove.blocks is auto, which estimation has to end for; give a number here")
        return self.remove.blocks

    def removing(self, blocks: float | Literal["auto"]) -> LightConfig:
        """The same, where this part of the blocks goes."""
        return replace(self, remove=replace(self.remove, blocks=blocks, heads=None, neurons=None, experts=None))

    def with_shares(self, part: float) -> LightConfig:
        """The same, where this part of the heads, of the neurons and of the experts goes, and none competes."""
        return replace(self, remove=replace(self.remove, blocks=None, heads=part, neurons=part, experts=part))

    def with_depth(self, depth: float) -> LightConfig:
        """The same with this depth."""
        return replace(self, remove=replace(self.remove, depth=depth))

    def with_whole_modules(self) -> LightConfig:
        """The same, where all PEFT modules and all of their ranks stay, and train alone."""
        return replace(self, modules=replace(self.modules, remove=0.0, remove_ranks=0.0), train="peft")

    def removing_nothing(self) -> LightConfig:
        """The same without a cut: PEFT modules in all blocks, with all ranks, at PEFT's own rate."""
        whole = replace(self.removing(0.0), modules=Modules(blocks=1.0, remove=0.0, remove_ranks=0.0))
        own = replace(whole, rates=replace(self.rates, scale=1.0, estimation_scale=1.0))
        return whole if self.train == "all" else own

    def blocks_left(self, blocks: int) -> int:
        """How many of so many blocks `remove.depth` leaves.

        Raises:
            LightPeftError: it is auto, and was not found yet.
        """
        depth = self.remove.depth
        if depth == "auto":
            raise LightPeftError(
                "light.remove.depth is auto, which runs and LightTrainer find; give a number here, such as that of "
                "lightpeft.find_depth"
            )
        return max(1, blocks - int(depth * blocks + 0.5))

    def first_module_block(self, blocks: int) -> int:
        """The lowest of so many blocks, those that are left out not counted, in which PEFT modules may stay."""
        part = 1.0 if self.modules.blocks is None else self.modules.blocks
        return blocks - max(1, int(part * blocks + 0.5))

    def last_steps(self, steps: int) -> int:
        """How many of a run's steps `after.full_width_steps` are."""
        return int(self.after.full_width_steps * steps + 0.5)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of settings, with that of their section, that it has no use for: how to find a budget that is given."""
        return () if self.is_auto else ("light.remove.tolerance",)
