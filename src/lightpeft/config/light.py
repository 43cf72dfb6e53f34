"""The budget, and how the scores behind it are estimated: all that `EarlyPruner` and `LightTrainer` need."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal, Self

from lightpeft.config.validation import check_most, check_values
from lightpeft.errors import LightPeftError, require

Scope = Literal["layerwise", "global"]
HeadUnit = Literal["group", "balanced"]
UnitCriterion = Literal["mask", "taylor", "fisher", "magnitude", "random"]
ModuleCriterion = Literal["ratio", "taylor", "random"]
ExpertCriterion = Literal["mask", "taylor", "fisher", "magnitude", "frequency", "random"]
RankCriterion = Literal["taylor", "magnitude", "random"]
Keep = Literal["light", "full", "both"]
Tokens = Literal["keep", "task"]

WIDEST = 2**16
"""What ranks and widths may be: no model's hidden size is larger."""

LEAST_EXAMPLES = 256
"""`LightConfig.least_examples` where nothing else is said, read whenever settings are made."""
SEARCH_FRACTION = 0.15
"""`LightConfig.search_fraction` where nothing else is said, read whenever settings are made."""
MOST_ROWS = 2**20
"""Rows that may go into a step."""
_HEAVIEST = 10**6
"""What the weight of a penalty may be: no mask is left far below that."""


@dataclass(kw_only=True)
class Budget:
    """What to remove, as ratios of what is there; with a record it determines a plan."""

    heads: float = 1 / 3
    """Part of the attention head units to remove, in [0, 1)."""
    neurons: float = 1 / 3
    """Part of the FFN neurons to remove, in [0, 1); of those inside experts as many of every expert that stays."""
    experts: float = 1 / 3
    """Part of each layer's routed experts to remove, in [0, 1); at least as many stay as a token is routed to."""
    modules: float = 3 / 4
    """Part of the PEFT modules to remove, in [0, 1); of those that `module_blocks` allows."""
    module_blocks: float = 1.0
    """Part of the blocks, counted from the top, in which PEFT modules may stay, in (0, 1]: no block below needs a
    backward pass, and each gives the same for a row in every epoch."""
    ranks: float = 1 / 2
    """Part of the ranks of the PEFT modules that stay to remove, in [0, 1)."""
    blocks: float | Literal["auto"] | None = None
    """Part to remove, at least, of all parameters that the blocks have, in [0, 1): heads, neurons and experts of all
    blocks compete, and the lowest score per parameter goes first; takes the place of `heads`, `neurons`, `experts` and
    their scopes.
    "auto": the largest part that `tolerance` bears, measured when estimation is over."""
    target: float | None = None
    """Part of all base parameters to remove; sets `heads`, `neurons` and `experts` to the common ratio that reaches it.
    """
    depth: float | Literal["auto"] = 0.0
    """Part of the blocks to leave out whole, from the top, in [0, 1): before estimation, which scores what is left.
    What `blocks` and `target` say includes them; ratios are of what is left.
    "auto": of a decoder that classifies, those above which there is nothing to be gained, as far as `blocks` allows."""

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
    """FFN widths are rounded to the nearest multiple of this (1: exact counts; 8 and more: fast kernels); those of
    experts to one of 8 in any case."""
    head_unit: HeadUnit = "group"
    """Under grouped-query attention: whole KV groups, or query heads removed equally from every group."""

    head_criterion: UnitCriterion = "mask"
    """Which score ranks the heads."""
    neuron_criterion: UnitCriterion = "mask"
    """Which score ranks the neurons."""
    expert_criterion: ExpertCriterion | None = None
    """Which score ranks the experts; none: the same as of neurons."""
    module_criterion: ModuleCriterion = "ratio"
    """Which score ranks the PEFT modules."""
    rank_criterion: RankCriterion = "taylor"
    """Which score ranks the ranks."""

    def __post_init__(self) -> None:
        for name in ("heads", "neurons", "experts", "modules", "ranks", "blocks", "target", "depth"):
            value = getattr(self, name)
            if isinstance(value, str):
                require(value == "auto", f'{name} is "{value}"; give a ratio in [0, 1), for example 0.5, or auto')
            elif value is not None:
                require(0 <= value < 1, f"{name} is {value:g}; a ratio to remove lies in [0, 1), for example 0.5")
        within = f"module_blocks is {self.module_blocks:g}; it lies in (0, 1], for example 0.5 for the upper half"
        require(0 < self.module_blocks <= 1, within)
        require(
            self.blocks is None or self.target is None, "blocks and target both say how much goes; give one of them"
        )
        bound = "depth: auto goes as far as blocks allows, and target counts other parameters; give blocks instead"
        require(self.depth != "auto" or self.target is None, bound)
        for name, least in (("heads", 0), ("neurons", 0), ("modules", 0), ("ranks", 1)):
            value = getattr(self, f"min_{name}")
            require(value >= least, f"min_{name} is {value}; it must be at least {least}")
        require(self.multiple_of >= 1, f"multiple_of is {self.multiple_of}; it must be at least 1")
        check_values(self)

    @property
    def chooses(self) -> bool:
        """Whether anything is to go of which scores say what: else all stays, and nothing has to be estimated."""
        return self.cuts_blocks or self.modules > 0 or self.ranks > 0

    @property
    def cuts_blocks(self) -> bool:
        """Whether heads, neurons or experts are to go."""
        base = self.target if self.blocks is None else self.blocks
        parts = [base] if base is not None else [self.heads, self.neurons, self.experts]
        return any(part == "auto" or part > 0 for part in parts)

    @property
    def known_blocks(self) -> float | None:
        """`blocks` as a number.

        Raises:
            LightPeftError: it is auto, and was not found yet.
        """
        if self.blocks == "auto":
            raise LightPeftError("light.blocks is auto, which estimation has to end for; give a number here")
        return self.blocks

    def with_shares(self, part: float) -> Self:
        """The same, where this part of the heads, of the neurons and of the experts goes, and none competes."""
        return dataclasses.replace(self, heads=part, neurons=part, experts=part, blocks=None, target=None)

    def blocks_left(self, blocks: int) -> int:
        """How many of so many blocks `depth` leaves.

        Raises:
            LightPeftError: it is auto, and was not found yet.
        """
        if self.depth == "auto":
            raise LightPeftError(
                "light.depth is auto, which runs and LightTrainer find; give a number here, such as that of "
                "lightpeft.find_depth"
            )
        return max(1, blocks - int(self.depth * blocks + 0.5))

    def first_module_block(self, blocks: int) -> int:
        """The lowest of so many blocks, those that are left out not counted, in which PEFT modules may stay."""
        return blocks - max(1, int(self.module_blocks * blocks + 0.5))


@dataclass(frozen=True)
class Tolerance:
    """How much worse a task may get by a cut."""

    amount: float
    unit: Literal["nats", "points"]
    """Of the loss (a mean, in nats), or hundredths of the task's main metric."""

    @classmethod
    def read(cls, text: str | float) -> Tolerance:
        """What "0.05 nats" or "1 point" says.

        Raises:
            LightPeftError: it says something else.
        """
        example = 'for example "1 point" of the metric, or "0.05 nats" of the loss'
        number, _, unit = str(text).strip().partition(" ")
        units: dict[str, Literal["nats", "points"]] = {"nat": "nats", "point": "points"}
        known = unit.strip().removesuffix("s")
        require(known in units, f"light.tolerance is {text}; say how much of what, {example}")
        try:
            amount = float(number)
        except ValueError:
            raise LightPeftError(
                f'light.tolerance is "{text}"; it must be a number of {units[known]}, {example}'
            ) from None
        require(0 < amount < math.inf, f'light.tolerance is "{text}"; it must be positive and finite, {example}')
        return cls(amount, units[known])

    def __str__(self) -> str:
        unit = self.unit.removesuffix("s") if self.amount == 1 else self.unit
        return f"{self.amount:g} {unit}"


READ_BY_PLANS = frozenset(f.name for f in dataclasses.fields(Budget)) - {"module_blocks", "depth"}
READ_BY_PLANS |= {"tolerance", "search_fraction"}
"""Settings of a budget that estimation does not depend on. (No module is made in a block where none may stay.)"""


@dataclass(kw_only=True)
class LightConfig(Budget):
    """All that Light-PEFT adds to a PEFT run: the budget and how the scores behind it are estimated."""

    length: int | float = 0.1
    """Estimation stage: optimizer steps (int), or part of the whole run (float in (0, 1)). Where the budget takes
    nothing away there is no such stage."""
    tolerance: str | float = "auto"
    """What `blocks: auto` may cost in the end, against nothing cut: nats of the loss, as in "0.05 nats", or points of
    the task's main metric, as in "1 point"; "auto": 1 point where answers are classes, else 0.05 nats."""
    search_fraction: float = field(default_factory=lambda: SEARCH_FRACTION)
    """Part of the time of plain PEFT's run that `blocks: auto` may take to find a budget, by its count of passes
    through the model; where no search is that short, there is none."""
    lambda_heads: float = 1e-4
    """Weight of the L1 penalty on the head masks (the paper's lambda_A)."""
    lambda_neurons: float = 1e-4
    """Weight of the L1 penalty on the neuron masks (the paper's lambda_F)."""
    mask_learning_rate: float = 2e-2
    """Adam learning rate of the masks, constant over the stage; masks have no weight decay."""
    ratio_every: int = 1
    """Every so many steps the modules' ratios (`module_criterion: ratio`) are measured; in the others the modules are
    computed faster."""
    max_fraction: float = 0.3
    """`least_steps` and `least_learned` stop at this part of the whole run at the latest; only `least_examples` may
    take more."""
    least_learned: float = 0.0
    """Part of the loss of an answer by the frequencies of labels that the stage has to take away, in [0, 1), where the
    model gives a row one of several classes. A stage whose `length` is a part of the run goes on for it."""
    least_steps: int = 2
    """Where `length` is a part of the run: steps of the stage at least, so that a short run has something to score."""
    least_examples: int = field(default_factory=lambda: LEAST_EXAMPLES)
    """Examples, repeated ones included, that the stage's second half scores at least; from fewer no plan is made. A
    stage whose `length` is a part of the run is longer for it, up to half of the run."""
    learning_rate_scale: float = 1.0
    """Learning rate of a light run, as a multiple of `training.learning_rate`: a PEFT of few parameters takes more."""
    estimation_learning_rate_scale: float | None = None
    """The same while estimation lasts, when no rank is gone yet; none: `learning_rate_scale`."""
    dropout: float | None = None
    """Dropout of the foundation model and its head in a light run; none: as the model has it. (PEFT keeps its own.)"""
    vocabulary: Tokens = "keep"
    """Tokens that the base has: all of them (keep), or those of the training rows and what lets every text still be
    tokenised (task): before estimation, which scores what is left. `target` is of what is left."""
    keep: Keep = "light"
    """What a run leaves: the light model; what it has learned as a plain PEFT adapter over the whole base (full); or
    both, each measured."""
    full_width_steps: float = 0.0
    """Part of the run's steps, its last ones, that train at full width (keep: full or both), in [0, 1)."""
    full_width_rate: float = 0.3
    """Learning rate of these, as a multiple of `training.learning_rate`."""
    seed: int = 0
    """Seed of the `random` criteria."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of settings, with that of their section, that it has no use for: how to find a budget that is given."""
        return () if self.blocks == "auto" else ("light.tolerance", "light.search_fraction")

    @property
    def estimation_rate_scale(self) -> float:
        """Learning rate of estimation, as a multiple of `training.learning_rate`."""
        own = self.estimation_learning_rate_scale
        return self.learning_rate_scale if own is None else own

    def last_steps(self, steps: int) -> int:
        """How many of a run's steps `full_width_steps` are."""
        return int(self.full_width_steps * steps + 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance != "auto":
            Tolerance.read(self.tolerance)
        least = f"search_fraction is {self.search_fraction:g}; a part of plain PEFT's time is above 0, for example 0.15"
        require(self.search_fraction > 0, least)
        numeric = isinstance(self.length, (int, float))
        require(numeric, f'length is "{self.length}"; give steps, or a fraction of the run')
        if isinstance(self.length, int):
            require(self.length >= 2, f"length is {self.length} steps; estimation needs at least 2")
        else:
            require(0 < self.length < 1, f"length is {self.length:g}; a fraction of the run lies in (0, 1)")
        require(self.mask_learning_rate > 0, f"mask_learning_rate is {self.mask_learning_rate:g}; it must be positive")
        positive = self.lambda_heads >= 0 and self.lambda_neurons >= 0
        require(positive, "lambda_heads and lambda_neurons cannot be negative")
        require(self.ratio_every >= 1, f"ratio_every is {self.ratio_every}; it starts at 1")
        check_most(self, "", dict.fromkeys(("lambda_heads", "lambda_neurons"), _HEAVIEST))
        scales = {
            "learning_rate_scale": self.learning_rate_scale,
            "estimation_learning_rate_scale": self.estimation_rate_scale,
        }
        for name, scale in scales.items():
            require(0 < scale < math.inf, f"{name} is {scale:g}; it must be positive and finite")
        require(self.dropout is None or 0 <= self.dropout < 1, f"dropout is {self.dropout}; it lies in [0, 1)")
        last = f"full_width_steps is {self.full_width_steps:g}; a part of the run lies in [0, 1), for example 0.1"
        require(0 <= self.full_width_steps < 1, last)
        alone = "full_width_steps train what keep: light would throw away; set keep to full or both, or leave them out"
        require(self.keep != "light" or not self.full_width_steps, alone)
        whole = "keep: full and both are of the whole base, with all of its tokens; set vocabulary: keep or keep: light"
        require(self.keep == "light" or self.vocabulary == "keep", whole)
        rate = f"full_width_rate is {self.full_width_rate:g}; it must be positive and finite"
        require(0 < self.full_width_rate < math.inf, rate)
        require(self.least_steps >= 2, f"least_steps is {self.least_steps}; estimation needs at least 2")
        require(self.least_examples >= 0, f"least_examples is {self.least_examples}; it cannot be negative")
        learned = f"least_learned is {self.least_learned:g}; a part of the loss lies in [0, 1), for example 0.05"
        require(0 <= self.least_learned < 1, learned)
        require(0 < self.max_fraction < 1, f"max_fraction is {self.max_fraction:g}; it lies in (0, 1)")
