"""`peft` of a run: a PEFT kind by name, or PEFT's own settings as a mapping, with the kind as its `type`."""

from __future__ import annotations

from typing import Any, TypeAlias

from lightpeft.errors import require

Peft: TypeAlias = str | dict[str, Any]
"""The name of a PEFT kind, or a mapping with its type and settings."""

DEFAULT_KIND = "lora"
"""The default PEFT kind."""
TYPE = "type"
"""Key of the PEFT kind in a mapping."""
SLOTS_KEY = "slots"
"""Key of the projections that get a module; it is lightpeft's own, and no field of PEFT's configurations."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
    "bottleneck": {"size": 64, "placement": "houlsby", "non_linearity": "relu", "dropout": 0.0, "scaling": 1.0},
}
"""PEFT kind -> the defaults of lightpeft that differ from PEFT's own."""


def peft_type(peft: Any) -> Any:
    """Return the PEFT kind that the setting `peft` names, in lower case; it may be unknown, or no text at all."""
    kind = peft.get(TYPE, DEFAULT_KIND) if isinstance(peft, dict) else peft
    return kind.lower() if isinstance(kind, str) else kind


def peft_settings(peft: Peft) -> dict[str, Any]:
    """Return the settings in `peft` without the kind."""
    return {name: value for name, value in peft.items() if name != TYPE} if isinstance(peft, dict) else {}


def shorten_peft(peft: Peft) -> Peft:
    """Return `peft` in its shortest form: the kind alone, or a mapping of the kind and the values that are no defaults.

    Raises:
        LightPeftError: the kind is not text.
    """
    kind, settings = peft_type(peft), peft_settings(peft)
    require(isinstance(kind, str), f"peft.type is {kind!r}; it must be text, such as {DEFAULT_KIND}")
    defaults = {SLOTS_KEY: None, "target_modules": None, **DEFAULTS.get(kind, {})}
    said = {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}
    return {TYPE: kind, **said} if said else kind


def override_peft(below: Any, above: Any) -> Any:
    """Override one `peft` with another: settings of the same kind are merged, and another kind replaces them all."""
    named = not isinstance(above, dict) or TYPE in above
    if (named and peft_type(above) != peft_type(below)) or not isinstance(below, str | dict):
        return above
    settings = {**peft_settings(below), **(peft_settings(above))}
    return {TYPE: peft_type(below), **settings} if settings else peft_type(below)
