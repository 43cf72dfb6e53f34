"""Defaults of unset `light` settings: one table, with the measurement behind each entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightpeft.config.light import SHARES, LightConfig, Tolerance, Train
from lightpeft.config.peft import DEFAULT_KIND
from lightpeft.config.presets import Light, light_config, merge_settings
from lightpeft.config.validation import from_dict


@dataclass(frozen=True)
class Rule:
    """Default values of some settings, and the runs that they apply to; later rules override earlier ones."""

    sets: dict[str, Any]
    """Nested settings of `LightConfig`."""
    because: str
    """Page or results file with the measurement behind the values."""
    presets: Sequence[str] = ("fast", "accurate")
    """Presets that the rule applies to."""
    peft: str | None = None
    """Kind of PEFT that the rule applies to; None: every kind."""
    writes: bool | None = None
    """True: the rule applies to models that generate their answers; False: to all other models; None: to both."""
    train: Train | None = None
    """`light.train` that the rule applies to; None: either."""

    def holds(self, preset: str, peft: str, writes: bool, train: Train) -> bool:
        """Return whether the rule applies to a run with this preset, PEFT kind, way of answering and `light.train`."""
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
"""The rules that fill in unset settings, in order of increasing priority."""


def fill_defaults(light: LightConfig, peft: str = DEFAULT_KIND, writes: bool = False) -> LightConfig:
    """Fill in every unset setting except `tolerance` and `scope`; keep the values that are given.

    Args:
        peft: name of the PEFT kind.
        writes: whether the model generates its answers.
    """
    preset = light.preset or ("accurate" if writes else "fast")
    train = light.train or "peft"
    filled: dict[str, Any] = {}
    for rule in TABLE:
        if rule.holds(preset, peft, writes, train):
            filled = merge_settings(filled, rule.sets)
    filled = merge_settings(filled, _without_unset(dataclasses.asdict(light)))
    remove, rates = filled["remove"], filled["rates"]
    if any(name in remove for name in SHARES):
        filled["remove"] = {**dict.fromkeys(SHARES, 0.0), **remove}
    filled["rates"] = {"estimation_scale": rates["scale"], **rates}
    return from_dict(LightConfig, {**filled, "preset": preset, "train": train}, "light.")


def override_light(light: LightConfig, by: Light) -> LightConfig:
    """Override settings with others, given in any form; settings that the others leave unset keep their values.

    Raises:
        LightPeftError: `by` has an unknown form, setting or value.
    """
    above = _without_unset(dataclasses.asdict(light_config(by)))
    return from_dict(LightConfig, merge_settings(_without_unset(dataclasses.asdict(light)), above), "light.")


def _without_unset(settings: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings without the entries that are None."""
    parts = {name: _without_unset(value) if isinstance(value, dict) else value for name, value in settings.items()}
    return {name: value for name, value in parts.items() if value is not None}


def tolerance_of(light: LightConfig, classes: bool) -> Tolerance:
    """Return `remove.tolerance`, or the default tolerance (docs/explanation/results.md#what-a-budget-costs).

    Args:
        classes: whether answers are classes, so that points of accuracy can be counted.
    """
    return Tolerance.read(light.remove.tolerance or ("1 point" if classes else "0.05 nats"))
