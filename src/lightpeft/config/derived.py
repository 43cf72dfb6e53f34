"""What unset settings of `light` stand for: one table, with the measurement behind each entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightpeft.config.light import SHARES, LightConfig, Tolerance, Train
from lightpeft.config.peft import USUAL
from lightpeft.config.presets import Light, light_config, overlaid
from lightpeft.config.validation import from_dict


@dataclass(frozen=True)
class Rule:
    """Values of some settings, and when they hold; later rules go over earlier ones."""

    sets: dict[str, Any]
    """Nested settings of `LightConfig`."""
    because: str
    """Where it was measured."""
    presets: Sequence[str] = ("fast", "accurate")
    """With which presets it holds."""
    peft: str | None = None
    """With which kind of PEFT; None: with all."""
    writes: bool | None = None
    """Whether for models that write their answers, or for others; None: for both."""
    train: Train | None = None
    """With which weights behind the cut; None: with either."""

    def holds(self, preset: str, peft: str, writes: bool, train: Train) -> bool:
        """Whether it holds for a run."""
        who = self.peft in (None, peft) and self.writes in (None, writes) and self.train in (None, train)
        return preset in self.presets and who


TABLE = (
    Rule(
        {
            "remove": {"blocks": "auto", "head_unit": "group", "multiple_of": 8},
            "estimate": {"length": "auto", "criterion": "fisher", "mask_learning_rate": 3e-4},
        },
        "docs/explanation/results.md#defaults and #length-of-estimation",
    ),
    Rule(
        {"estimate": {"module_criterion": "ratio", "rank_criterion": "taylor"}},
        "configs/movie_reviews/scores.results.json; Gu et al. 2024, section 3.2",
        presets=("fast", "accurate", "paper"),
    ),
    Rule(
        {"modules": {"remove": 0.0}, "rates": {"dropout": 0.0}},
        "configs/movie_reviews/scores.results.json and ablations.results.json",
    ),
    Rule(
        {"modules": {"blocks": 2 / 3, "remove_ranks": 7 / 8}, "rates": {"scale": 2.0}},
        "docs/explanation/results.md#defaults",
        presets=("fast",),
    ),
    Rule(
        {"modules": {"blocks": 1.0, "remove_ranks": 0.0}, "rates": {"scale": 1.0}},
        "docs/explanation/results.md#base-size-encoders",
        presets=("accurate",),
    ),
    Rule(
        {"rates": {"scale": 4.0, "estimation_scale": 1.0}},
        "docs/explanation/results.md#bottleneck-adapters",
        peft="bottleneck",
    ),
    Rule({"remove": {"blocks": 0.0, "head_unit": "balanced"}}, "docs/explanation/decoders.md", writes=True),
    Rule(
        {
            "remove": {"heads": 1 / 3, "neurons": 1 / 3, "experts": 1 / 3, "head_unit": "group", "multiple_of": 1},
            "estimate": {"length": 0.1, "criterion": "mask", "mask_learning_rate": 3e-4},
            "modules": {"blocks": 1.0, "remove": 3 / 4, "remove_ranks": 1 / 2},
            "rates": {"scale": 1.0, "dropout": "keep"},
        },
        "Gu et al. 2024, section 4: masks train with the PEFT learning rate and are themselves the score",
        presets=("paper",),
    ),
    Rule(
        {"modules": {"remove": 0.0, "remove_ranks": 0.0}, "rates": {"scale": 0.1, "estimation_scale": 2.0}},
        "docs/how-to/train_all.md",
        train="all",
    ),
    Rule(
        {"rates": {"estimation_scale": 1.0}},
        "as for PEFT alone",
        presets=("accurate", "paper"),
        train="all",
    ),
)
"""What holds where nothing is said."""


def derived(light: LightConfig, peft: str = USUAL, writes: bool = False) -> LightConfig:
    """The settings with a value for all that is unset, but for `tolerance` and `scope`; given values stay.

    Args:
        peft: the kind of PEFT.
        writes: whether the model writes its answers.
    """
    preset = light.preset or ("accurate" if writes else "fast")
    train = light.train or "peft"
    filled: dict[str, Any] = {}
    for rule in TABLE:
        if rule.holds(preset, peft, writes, train):
            filled = overlaid(filled, rule.sets)
    filled = overlaid(filled, _given(dataclasses.asdict(light)))
    remove, rates = filled["remove"], filled["rates"]
    if any(name in remove for name in SHARES):
        filled["remove"] = {**dict.fromkeys(SHARES, 0.0), **remove}
    filled["rates"] = {"estimation_scale": rates["scale"], **rates}
    return from_dict(LightConfig, {**filled, "preset": preset, "train": train}, "light.")


def changed(light: LightConfig, by: Light) -> LightConfig:
    """Settings with others on top, in any form; what these leave unset stays.

    Raises:
        LightPeftError: an unknown form, setting or value.
    """
    above = _given(dataclasses.asdict(light_config(by)))
    return from_dict(LightConfig, overlaid(_given(dataclasses.asdict(light)), above), "light.")


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings without those that are unset."""
    parts = {name: _given(value) if isinstance(value, dict) else value for name, value in settings.items()}
    return {name: value for name, value in parts.items() if value is not None}


def tolerance_of(light: LightConfig, classes: bool) -> Tolerance:
    """`remove.tolerance`, or the usual one (docs/explanation/results.md#what-a-budget-costs).

    Args:
        classes: whether answers are classes, of which points can be counted.
    """
    return Tolerance.read(light.remove.tolerance or ("1 point" if classes else "0.05 nats"))
