"""The short forms of `light`, and how settings go over one another."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, TypeAlias

from lightpeft.config.light import AMOUNTS, LightConfig, Preset
from lightpeft.config.peft import peft_over
from lightpeft.config.validation import from_dict, shown
from lightpeft.errors import LightPeftError

Light: TypeAlias = float | str | Mapping[str, Any] | LightConfig | None
"""A part of the blocks to remove, "auto", a preset's name, or settings; None: nothing is said."""

PRESETS: tuple[str, ...] = typing.get_args(Preset)
"""Names of presets; `config.derived` has what they stand for."""

WRITTEN = frozenset({"generation", "chat", "causal-lm", "web_questions"})
"""Kinds of tasks, and tasks that ship, whose answers a model writes."""


def light_mapping(light: Any) -> dict[str, Any]:
    """Settings of `LightConfig` as nested plain data, from whichever short form they come in.

    Raises:
        LightPeftError: it is none.
    """
    if light is None:
        return {}
    if isinstance(light, Mapping):
        return dict(light)
    if light == "auto" or (isinstance(light, int | float) and not isinstance(light, bool)):
        return {"remove": {"blocks": light}}
    if isinstance(light, str) and light in PRESETS:
        return {"preset": light}
    forms = f"a part of the blocks to remove such as 0.4, auto, a preset ({', '.join(PRESETS)}), or a mapping"
    raise LightPeftError(f"light is {shown(light)}; give {forms}")


def light_config(light: Light) -> LightConfig:
    """`LightConfig` from whichever form it is given in; what is not said stays unset.

    Raises:
        LightPeftError: an unknown form, setting or value.
    """
    return light if isinstance(light, LightConfig) else from_dict(LightConfig, light_mapping(light), "light.")


def cut_of_writer(light: LightConfig) -> str | None:
    """What to say before a model that writes is cut (docs/explanation/decoders.md).

    None: it is not cut, or a whole one is kept, too. A budget that is `auto` is measured, and said when it is found.
    """
    if not light.cuts_blocks or light.after.keep != "light" or light.is_auto:
        return None
    loses = "a model that writes loses far more by a cut than one that classifies"
    return f"{loses}; light: 0 cuts nothing, and light.after.keep: both keeps a whole one, too"


def overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with others on top: of a run, or of `light` alone.

    What says how much of the base goes in one way (heads, neurons and experts, or blocks) takes the place of what said
    it in the other way below.
    """
    result = dict(below)
    for key, value in above.items():
        if key == "light" and key in result:
            result[key] = overlaid(light_mapping(result[key]), light_mapping(value))
        elif key == "peft" and key in result:
            result[key] = peft_over(result[key], value)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            kept = _without_other_amounts(result[key], value) if key == "remove" else result[key]
            result[key] = overlaid(kept, value)
        else:
            result[key] = value
    return result


def _without_other_amounts(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`light.remove` without what says an amount in another way than the settings that go on top."""
    said = {name for name in AMOUNTS if above.get(name) is not None}
    other = set(AMOUNTS) - {"blocks"} if "blocks" in said else {"blocks"} if said else set()
    return {name: value for name, value in below.items() if name not in other}
