"""`peft` of a run: a PEFT kind by name, or PEFT's own settings as a mapping, with the kind as its `type`."""

from __future__ import annotations

from typing import Any, TypeAlias

from lightpeft.errors import require

Peft: TypeAlias = str | dict[str, Any]
"""The name of a kind, or its type and settings."""

USUAL = "lora"
"""The kind, where nothing is said."""
TYPE = "type"
"""Key of the kind in a mapping."""
SLOTS_KEY = "slots"
"""Key that is no field of PEFT's: the projections that get a module."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
    "bottleneck": {"size": 64, "placement": "houlsby", "non_linearity": "relu", "dropout": 0.0, "scaling": 1.0},
}
"""Kind -> the settings that it has where nothing is said, if they are not PEFT's own."""


def peft_type(peft: Any) -> Any:
    """The kind that `peft` names, whatever that is."""
    kind = peft.get(TYPE, USUAL) if isinstance(peft, dict) else peft
    return kind.lower() if isinstance(kind, str) else kind


def peft_settings(peft: Peft) -> dict[str, Any]:
    """PEFT's own settings in it, without the kind."""
    return {name: value for name, value in peft.items() if name != TYPE} if isinstance(peft, dict) else {}


def shortest(peft: Peft) -> Peft:
    """The same in one form: without defaults, the name alone where that says all, and else the type first.

    Raises:
        LightPeftError: the type is no name.
    """
    kind, settings = peft_type(peft), peft_settings(peft)
    require(isinstance(kind, str), f"peft.type is {kind!r}; it must be text, such as {USUAL}")
    defaults = {SLOTS_KEY: None, "target_modules": None, **DEFAULTS.get(kind, {})}
    said = {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}
    return {TYPE: kind, **said} if said else kind


def peft_over(below: Any, above: Any) -> Any:
    """One `peft` with another on top: settings go over those of the same kind, and another kind takes their place."""
    named = not isinstance(above, dict) or TYPE in above
    if (named and peft_type(above) != peft_type(below)) or not isinstance(below, str | dict):
        return above
    settings = {**peft_settings(below), **(peft_settings(above))}
    return {TYPE: peft_type(below), **settings} if settings else peft_type(below)
