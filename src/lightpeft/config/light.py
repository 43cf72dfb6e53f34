"""Settings of Light-PEFT: amount to remove, estimation, PEFT modules, learning rates, and the result to keep.

Defaults of unset settings depend on the task, the kind of PEFT and the preset (`config.derived`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from lightpeft.config.validation import Within, check_values, from_dict
from lightpeft.errors import LightPeftError, require

Scope = Literal["layerwise", "global"]
HeadUnit = Literal["group", "balanced"]
UnitCriterion = Literal["mask", "taylor", "fisher", "magnitude", "random"]
ModuleCriterion = Literal["ratio", "taylor", "random"]
RankCriterion = Literal["taylor", "magnitude", "random"]
Keep = Literal["light", "full", "both"]
Tokens = Literal["keep", "task"]
Preset = Literal["fast", "accurate", "paper"]
Train = Literal["peft", "all"]

WIDEST = 2**16
"""Upper bound of ranks and widths; no model has a larger hidden size."""
LARGEST_BATCH = 2**20
"""Upper bound of the rows of a step."""


def _check_shares(section: Any, where: str, *names: str) -> None:
    """Check that settings which are numbers are fractions in [0, 1)."""
    for name in names:
        value = getattr(section, name)
        if isinstance(value, (int, float)):
            require(0 <= value < 1, f"{where}{name} is {value:g}; it must be in [0, 1), for example 0.5")


@dataclass(kw_only=True)
class Remove:
    """The amount to remove from the base, and the units to remove.

    These settings control the masked early pruning of the foundation model in Gu et al. 2024.

    Example:
        LightConfig(remove=Remove(blocks=0.4))  # 40% of the blocks' parameters
    """

    blocks: float | Literal["auto"] | None = None
    """Minimum fraction of all parameters of the blocks to remove, in [0, 1). Heads, neurons and experts of all blocks
    compete, and the lowest score per parameter is removed first. "auto": the largest fraction within `tolerance`,
    measured after estimation. Unset: auto, or 0 for models that generate their answers."""
    heads: float | None = None
    """Instead of `blocks`: fraction of the attention head units to remove, in [0, 1)."""
    neurons: float | None = None
    """Instead of `blocks`: fraction of the FFN neurons to remove; every remaining expert loses equally many."""
    experts: float | None = None
    """Instead of `blocks`: fraction of each layer's routed experts to remove; at least as many stay as a token is
    routed to."""
    depth: float | Literal["auto"] = 0.0
    """Fraction of the blocks to drop whole, from the top, in [0, 1), before estimation, which scores the other blocks.
    `blocks` includes them; shares of heads, neurons and experts refer to the other blocks. "auto" (decoders that
    classify): the blocks above which a linear classifier gains nothing, as far as `blocks` allows."""
    vocabulary: Tokens = "keep"
    """Tokens of the base to keep, decided before estimation. keep: all tokens; task: the tokens of the training rows,
    and those that other texts need to be tokenized at all."""
    tolerance: str | None = None
    """Final loss of quality that `blocks: auto` may cause, compared with no pruning: nats of the loss, as in
    "0.05 nats", or points of the task's main metric, as in "1 point". Unset: 1 point where answers are classes, else
    0.05 nats."""
    scope: Scope | None = None
    """Units that compete: those of each layer (layerwise), or of all layers (global). Unset: with `blocks`, all units
    of all blocks; with shares, heads within layers and neurons over all layers. layerwise with `blocks`: every layer
    loses the same fraction of its heads, neurons and experts."""
    head_unit: HeadUnit | None = None
    """Unit of removal under grouped-query attention. group: whole KV groups; balanced: query heads, equally many of
    every group. Unset: group, or balanced for models that generate their answers."""
    multiple_of: Annotated[int | None, Within(least=1)] = None
    """Round FFN widths to the nearest multiple of this number, because kernels are fast for multiples of 8 (1: exact
    counts). Widths of experts are always multiples of 8. Unset: 8."""

    def __post_init__(self) -> None:
        check_values(self, "light.remove.")
        _check_shares(self, "light.remove.", "blocks", *SHARES, "depth")
        both = next((name for name in SHARES if getattr(self, name) is not None), None)
        one = f"light.remove.blocks and light.remove.{both} both set the amount to remove; give one of them"
        require(self.blocks is None or both is None, one)
        if self.tolerance is not None:
            Tolerance.read(self.tolerance)

    @property
    def has_amount(self) -> bool:
        """True if an amount is given: `blocks` or any share."""
        return any(getattr(self, name) is not None for name in AMOUNTS)


SHARES = ("heads", "neurons", "experts")
"""Settings of `Remove` that give the share of one kind of units to remove."""
AMOUNTS = ("blocks", *SHARES)
"""Settings of `Remove` that give the amount to remove from the blocks."""


@dataclass(kw_only=True)
class Estimate:
    """Length and importance scores of the estimation stage.

    The stage trains masks and PEFT modules together, as in Gu et al. 2024, section 3.2.

    Example:
        LightConfig(estimate=Estimate(length=200, criterion="fisher"))
    """

    length: int | float | Literal["auto"] | None = None
    """Length of the stage in optimizer steps (whole number), or as a fraction of the whole run (in (0, 1)). auto: 7.5%
    of the run, at least 32 steps, and more until the loss has fallen, up to 30% of the run. Unset: auto."""
    criterion: UnitCriterion | None = None
    """Importance score of heads, neurons and experts. Unset: fisher."""
    module_criterion: ModuleCriterion | None = None
    """Importance score of PEFT modules. Unset: ratio."""
    rank_criterion: RankCriterion | None = None
    """Importance score of the ranks inside PEFT modules. Unset: taylor."""
    mask_learning_rate: Annotated[float | None, Within(above=0)] = None
    """Constant Adam learning rate of the masks, which have no weight decay. Unset: 3e-4."""

    def __post_init__(self) -> None:
        check_values(self, "light.estimate.")
        length = self.length
        if isinstance(length, int):
            require(length >= 2, f"light.estimate.length is {length} steps; it must be at least 2")
        elif isinstance(length, float):
            part = f"light.estimate.length is {length:g}; it must be in (0, 1), or a whole number of steps"
            require(0 < length < 1, part)


@dataclass(kw_only=True)
class Modules:
    """The PEFT modules and ranks that train after pruning.

    These settings control the multi-granularity early pruning of PEFT in Gu et al. 2024.

    Example:
        LightConfig(modules=Modules(blocks=0.5, remove_ranks=0.75))
    """

    blocks: float | None = None
    """Fraction of the blocks, counted from the top, that keep PEFT modules, in (0, 1]. Blocks below them need no
    backward pass, and their outputs for a row are the same in every epoch. Unset: by preset and task."""
    remove: float | None = None
    """Fraction of the PEFT modules in these blocks to remove, in [0, 1). Unset: 0."""
    remove_ranks: float | None = None
    """Fraction of the ranks of the remaining modules to remove, in [0, 1). Unset: by preset and task."""

    def __post_init__(self) -> None:
        check_values(self, "light.modules.")
        _check_shares(self, "light.modules.", "remove", "remove_ranks")
        within = f"light.modules.blocks is {self.blocks}; it must be in (0, 1], for example 0.5 for the upper half"
        require(self.blocks is None or 0 < self.blocks <= 1, within)


@dataclass(kw_only=True)
class Rates:
    """Learning rates and dropout of a light run.

    Example:
        LightConfig(rates=Rates(scale=2.0, estimation_scale=1.0))
    """

    scale: Annotated[float | None, Within(above=0)] = None
    """Learning rate of a light run as a multiple of `training.learning_rate`; PEFT with few parameters needs a higher
    one. Unset: by preset and kind of PEFT."""
    estimation_scale: Annotated[float | None, Within(above=0)] = None
    """Learning rate during estimation, before ranks are removed, as a multiple of `training.learning_rate`. Unset:
    `scale`, or 1 for bottleneck adapters."""
    dropout: float | Literal["keep"] | None = None
    """Dropout of the foundation model and its head in a light run; keep: the dropout of the model's config. PEFT keeps
    its own dropout. Unset: 0."""

    def __post_init__(self) -> None:
        check_values(self, "light.rates.")
        dropout = self.base_dropout
        within = f"light.rates.dropout is {dropout}; it must be in [0, 1), or keep"
        require(dropout is None or 0 <= dropout < 1, within)

    @property
    def base_dropout(self) -> float | None:
        """Dropout probability of the base; None: that of the model's config."""
        return None if isinstance(self.dropout, str) else self.dropout


@dataclass(kw_only=True)
class After:
    """Results that a run saves.

    Example:
        LightConfig(after=After(keep="both", full_width_steps=0.1))
    """

    keep: Keep = "light"
    """Result to save and evaluate. light: the pruned model; full: its trained weights as a plain PEFT adapter over the
    unpruned base; both: each of the two."""
    full_width_steps: Annotated[float, Within(least=0, below=1)] = 0.0
    """Fraction of the run's steps, at its end, that train the adapter over the unpruned base (keep: full or both), in
    [0, 1)."""

    def __post_init__(self) -> None:
        check_values(self, "light.after.")
        alone = "light.after.full_width_steps has no effect with keep: light; set keep to full or both"
        require(self.keep != "light" or not self.full_width_steps, alone)


@dataclass(frozen=True)
class Tolerance:
    """Loss of quality that pruning may cause."""

    amount: float
    unit: Literal["nats", "points"]
    """Nats of the mean loss, or hundredths of the task's main metric."""

    @classmethod
    def read(cls, text: str) -> Tolerance:
        """Parse a text such as "0.05 nats" or "1 point".

        Raises:
            LightPeftError: the text is not a positive number with one of these units.
        """
        example = 'for example "1 point" of the metric, or "0.05 nats" of the loss'
        number, _, unit = str(text).strip().partition(" ")
        units: dict[str, Literal["nats", "points"]] = {"nat": "nats", "point": "points"}
        known = unit.strip().removesuffix("s")
        require(known in units, f"light.remove.tolerance is {text}; give a number with its unit, {example}")
        try:
            amount = float(number)
        except ValueError:
            raise LightPeftError(
                f'light.remove.tolerance is "{text}"; give a number of {units[known]}, {example}'
            ) from None
        require(0 < amount < math.inf, f'light.remove.tolerance is "{text}"; it must be positive and finite, {example}')
        return cls(amount, units[known])

    def __str__(self) -> str:
        unit = self.unit.removesuffix("s") if self.amount == 1 else self.unit
        return f"{self.amount:g} {unit}"


READ_BY_PLANS = frozenset(
    {f"remove.{each.name}" for each in dataclasses.fields(Remove)}
    | {"estimate.criterion", "estimate.module_criterion", "estimate.rank_criterion"}
    | {"modules.remove", "modules.remove_ranks"}
) - {"remove.depth", "remove.vocabulary"}
"""Settings of `LightConfig` that only planning reads: estimation does not depend on them. (`modules.blocks` is not one
of them, because no module is made in a block that may not keep one.)"""
READ_AFTERWARDS = frozenset(f"after.{each.name}" for each in dataclasses.fields(After))
"""Other settings of `LightConfig` that are read only after estimation."""


@dataclass(kw_only=True)
class LightConfig:
    """Settings of Light-PEFT; sections may be given as mappings.

    Light-PEFT estimates importance, prunes, and fine-tunes (Gu et al. 2024, https://arxiv.org/abs/2406.03792).

    Example:
        light = LightConfig(preset="accurate", remove={"blocks": 0.4})
        trainer = LightTrainer(model, args, peft_config=lora, light=light, train_dataset=rows)

    Raises:
        LightPeftError: a value is invalid, or two settings exclude each other.
    """

    preset: Preset | None = None
    """Defaults of unset settings. fast: few ranks, in the upper blocks, at a higher learning rate, for the fastest
    training; accurate: all ranks, in all blocks; paper: the settings of Gu et al. 2024. Unset: fast, or accurate for
    models that generate their answers."""
    remove: Remove = field(default_factory=Remove)
    """The amount to remove."""
    estimate: Estimate = field(default_factory=Estimate)
    """The estimation of importance scores."""
    modules: Modules = field(default_factory=Modules)
    """The PEFT modules to keep."""
    train: Train | None = None
    """Weights that train after pruning. peft: those of the PEFT modules; all: PEFT is merged, and all remaining weights
    train except embeddings and the head of a language model. With all, runs that classify smooth labels by 0.1; in
    Python, `TrainingArguments` decide. Unset: peft."""
    rates: Rates = field(default_factory=Rates)
    """Learning rates and dropout."""
    after: After = field(default_factory=After)
    """The results to save."""

    def __post_init__(self) -> None:
        for section in (Remove, Estimate, Modules, Rates, After):
            name = section.__name__.lower()
            given = getattr(self, name)
            if not isinstance(given, section):
                setattr(self, name, from_dict(section, given, f"light.{name}."))
        check_values(self, "light.")
        whole = f"light.after.keep: {self.after.keep} needs all tokens of the base"
        instead = "set light.remove.vocabulary to keep, or light.after.keep to light"
        require(self.after.keep == "light" or self.remove.vocabulary == "keep", f"{whole}; {instead}")
        own = f"light.train: all changes the base, which light.after.keep: {self.after.keep} keeps; set keep to light"
        require(self.after.keep == "light" or self.train != "all", own)

    @property
    def is_auto(self) -> bool:
        """True if the amount to remove is measured after estimation (`remove.blocks: auto`)."""
        return self.remove.blocks == "auto"

    @property
    def uses_scores(self) -> bool:
        """True if scores decide what is removed (units, PEFT modules or ranks); else estimation is not needed."""
        return self.cuts_blocks or bool(self.modules.remove or self.modules.remove_ranks)

    @property
    def cuts_blocks(self) -> bool:
        """True if heads, neurons or experts are to be removed."""
        return any(getattr(self.remove, name) for name in AMOUNTS)

    @property
    def known_blocks(self) -> float | None:
        """`remove.blocks` as a number; None: shares of each kind of units are given instead.

        Raises:
            LightPeftError: `remove.blocks` is auto, and was not measured yet.
        """
        if self.remove.blocks == "auto":
            raise LightPeftError("light.remove.blocks is auto, which is measured after estimation; give a number here")
        return self.remove.blocks

    def with_blocks(self, blocks: float | Literal["auto"]) -> LightConfig:
        """Return a copy that removes this fraction of the blocks, in place of any shares."""
        return replace(self, remove=replace(self.remove, blocks=blocks, heads=None, neurons=None, experts=None))

    def with_shares(self, part: float) -> LightConfig:
        """Return a copy that removes this fraction of the heads, neurons and experts each, in place of `blocks`."""
        return replace(self, remove=replace(self.remove, blocks=None, heads=part, neurons=part, experts=part))

    def with_depth(self, depth: float) -> LightConfig:
        """Return a copy with this `remove.depth`."""
        return replace(self, remove=replace(self.remove, depth=depth))

    def with_all_modules(self) -> LightConfig:
        """Return a copy that keeps all PEFT modules with all ranks, and trains only these (`train: peft`)."""
        return replace(self, modules=replace(self.modules, remove=0.0, remove_ranks=0.0), train="peft")

    def without_pruning(self) -> LightConfig:
        """Return a copy without pruning: PEFT modules in all blocks, with all ranks, at the plain learning rate."""
        whole = replace(self.with_blocks(0.0), modules=Modules(blocks=1.0, remove=0.0, remove_ranks=0.0))
        own = replace(whole, rates=replace(self.rates, scale=1.0, estimation_scale=1.0))
        return whole if self.train == "all" else own

    def blocks_left(self, blocks: int) -> int:
        """Return the number of blocks that `remove.depth` keeps of `blocks`.

        Raises:
            LightPeftError: `remove.depth` is auto, and was not measured yet.
        """
        depth = self.remove.depth
        if depth == "auto":
            raise LightPeftError(
                "light.remove.depth is auto, which only runs and LightTrainer measure; give a number here, such as "
                "that of lightpeft.find_depth"
            )
        return max(1, blocks - int(depth * blocks + 0.5))

    def first_module_block(self, blocks: int) -> int:
        """Return the index of the lowest block that may keep PEFT modules, of `blocks` that remain after `depth`."""
        part = 1.0 if self.modules.blocks is None else self.modules.blocks
        return blocks - max(1, int(part * blocks + 0.5))

    def last_steps(self, steps: int) -> int:
        """Return the number of a run's steps that train at full width (`after.full_width_steps`)."""
        return int(self.after.full_width_steps * steps + 0.5)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of settings that have no effect here: the tolerance, where the amount to remove is given."""
        return () if self.is_auto else ("light.remove.tolerance",)

    @property
    def idle_tolerance(self) -> str | None:
        """Warning about a tolerance that guards nothing, because the amount to remove is given; None: no such."""
        if self.is_auto or self.remove.tolerance is None:
            return None
        return "light.remove.tolerance has no effect on a fixed amount; it limits the cost of light.remove.blocks: auto"
