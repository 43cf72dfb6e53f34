"""Short forms of the setting `light`, and the rules for overriding nested settings."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, TypeAlias

from lightpeft.config.light import AMOUNTS, LightConfig, Preset
from lightpeft.config.peft import override_peft
from lightpeft.config.validation import from_dict, short_repr
from lightpeft.errors import LightPeftError

Light: TypeAlias = float | str | Mapping[str, Any] | LightConfig | None
"""A fraction of the blocks to remove, "auto", the name of a preset, or settings; None: every setting is unset."""

PRESETS: tuple[str, ...] = typing.get_args(Preset)
"""Names of presets; `config.derived.TABLE` has their values."""

WRITTEN = frozenset({"generation", "chat", "causal-lm", "web_questions"})
"""Kinds of tasks, and built-in tasks, whose answers a model generates."""


def light_mapping(light: Any) -> dict[str, Any]:
    """Convert any form of `light` to nested plain data with the fields of `LightConfig`.

    Raises:
        LightPeftError: `light` has none of the known forms.
    """
    if light is None:
        return {}
    if isinstance(light, Mapping):
        return dict(light)
    if light == "auto" or (isinstance(light, int | float) and not isinstance(light, bool)):
        return {"remove": {"blocks": light}}
    if isinstance(light, str) and light in PRESETS:
        return {"preset": light}
    forms = f"a fraction of the blocks to remove such as 0.4, auto, a preset ({', '.join(PRESETS)}), or a mapping"
    raise LightPeftError(f"light is {short_repr(light)}; give {forms}")


def light_config(light: Light) -> LightConfig:
    """Convert any form of `light` to a `LightConfig`; settings that are not given stay unset.

    Raises:
        LightPeftError: `light` has an unknown form, setting or value.
    """
    return light if isinstance(light, LightConfig) else from_dict(LightConfig, light_mapping(light), "light.")


def cut_of_writer(light: LightConfig, keeping: str = "set light.after.keep: both") -> str | None:
    """Return a warning for settings that prune a model that generates text (docs/explanation/decoders.md).

    Args:
        keeping: how to get a full-width model as well.

    Returns:
        None where no block is pruned, where a full-width model is kept, and for an `auto` budget, which is measured.
    """
    if not light.cuts_blocks or light.after.keep != "light" or light.is_auto:
        return None
    loses = "pruning costs a model that generates text far more quality than a classifier"
    return f"{loses}; set light: 0 to prune nothing, or {keeping} to get a full-width model as well"


def merge_settings(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Override nested settings of a run, or of `light` alone, with others.

    There are two ways to give the amount to remove: `blocks`, or shares (`heads`, `neurons`, `experts`). An amount in
    `above` replaces an amount that `below` gives in the other way.
    """
    result = dict(below)
    for key, value in above.items():
        if key == "light" and key in result:
            result[key] = merge_settings(light_mapping(result[key]), light_mapping(value))
        elif key == "peft" and key in result:
            result[key] = override_peft(result[key], value)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            kept = _without_other_amounts(result[key], value) if key == "remove" else result[key]
            result[key] = merge_settings(kept, value)
        else:
            result[key] = value
    return result


def _without_other_amounts(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `light.remove` without the amounts that are given in another way than those in `above`."""
    said = {name for name in AMOUNTS if above.get(name) is not None}
    other = set(AMOUNTS) - {"blocks"} if "blocks" in said else {"blocks"} if said else set()
    return {name: value for name, value in below.items() if name not in other}
