"""The configuration of bottleneck adapters, saved by PEFT as adapter_config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peft import PeftConfig

from lightpeft.compat.peft import check_saves_other_types, register_prefix
from lightpeft.compat.transformers import ACT2FN
from lightpeft.errors import require
from lightpeft.peft_kinds.bottleneck.registration import BOTTLENECK, PREFIX

PLACEMENTS = ("houlsby", "pfeiffer")
"""Placements that follow from the model family; see `BottleneckConfig.placement`."""

LEARNED = "learned"


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters: `delta(x) = scaling * up(non_linearity(down(dropout(x))))`, added to a layer's output.

    An adapter (Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"; Pfeiffer et al. 2021,
    "AdapterFusion") reads the output `y = base(x)` of the layer, which then returns `y + delta(y)`. `up` starts at 0,
    so that the model starts unchanged. Light-PEFT (Gu et al. 2024) uses the `houlsby` placement.

    Give `placement` or `target_modules`. When adapters are put into a model, `target_modules` and `size_pattern` are
    set to the exact module names, so that a saved configuration has the place and width of every adapter.

    Example:
        model = get_peft_model(base, BottleneckConfig(placement="houlsby", size=64, task_type="SEQ_CLS"))

    Raises:
        LightPeftError: a value is invalid (it is a `ValueError`).
    """

    size: int = 64
    """Width of the bottleneck."""
    size_pattern: dict[str, int] = field(default_factory=dict)
    """Full name of a module -> width of its bottleneck, where that differs from `size`."""
    non_linearity: str = "relu"
    """Activation between the projections, by transformers' name (`transformers.activations.ACT2FN`)."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    scaling: float | str = 1.0
    """Factor on the adapter's output: a number, or "learned" for a trainable scalar per adapter that starts at 1."""
    placement: str | None = None
    """Places of the adapters if `target_modules` is not given. "houlsby": after the attention output projection and
    after the FFN output projection of every block; "pfeiffer": after the FFN output projection only."""
    target_modules: list[str] | str | None = None
    """Linear layers to adapt: endings of module names, or one regular expression for whole names."""
    exclude_modules: list[str] | str | None = None
    """Modules to leave out: endings of module names, or one regular expression for whole names."""
    modules_to_save: list[str] | None = None
    """Other modules to train and to save, such as a classification head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        check_saves_other_types()
        register_prefix(BOTTLENECK, PREFIX)
        self.size_pattern = self.size_pattern or {}
        for names in ("target_modules", "exclude_modules"):
            value = getattr(self, names)
            if isinstance(value, (list, tuple, set)):
                setattr(self, names, sorted(set(value)))  # so that saved files are reproducible
        self._check()

    def _check(self) -> None:
        sizes = {"size": self.size} | {f"size_pattern of {name}": size for name, size in self.size_pattern.items()}
        for name, size in sizes.items():
            whole = isinstance(size, int) and not isinstance(size, bool)
            require(whole and size >= 1, f"{name} is {size!r}; it must be a whole number of at least 1")
        require(
            self.non_linearity in ACT2FN,
            f"non_linearity {self.non_linearity!r} is unknown; choose one of {', '.join(sorted(ACT2FN))}",
        )
        require(0.0 <= self.dropout < 1.0, f"dropout is {self.dropout!r}; it must be in [0, 1)")
        number = math.nan if isinstance(self.scaling, (str, bool)) else self.scaling
        require(
            self.scaling == LEARNED or math.isfinite(number),
            f'scaling is {self.scaling!r}; it must be a number or "{LEARNED}"',
        )
        require(
            self.placement is None or self.placement in PLACEMENTS,
            f"placement is {self.placement!r}; choose one of {', '.join(PLACEMENTS)}, or None with target_modules",
        )
        require(
            self.placement is not None or self.target_modules is not None,
            f"BottleneckConfig lacks places for adapters; give placement ({', '.join(PLACEMENTS)}) or target_modules",
        )
