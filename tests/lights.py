"""Settings of `light` for tests, by the short names of their leaves."""

from __future__ import annotations

from typing import Any

from lightpeft.config import LightConfig, fill_defaults, light_config, override_light
from lightpeft.prune import length

PLACES = {
    **dict.fromkeys(("blocks", "heads", "neurons", "experts", "depth", "vocabulary", "tolerance"), "remove"),
    **dict.fromkeys(("scope", "head_unit", "multiple_of"), "remove"),
    **dict.fromkeys(("length", "criterion", "module_criterion", "rank_criterion", "mask_learning_rate"), "estimate"),
    **dict.fromkeys(("module_blocks", "modules", "ranks"), "modules"),
    **dict.fromkeys(("scale", "estimation_scale", "dropout"), "rates"),
    **dict.fromkeys(("keep", "full_width_steps"), "after"),
}
"""Short name of a setting -> its section."""
NAMES = {"module_blocks": "blocks", "modules": "remove", "ranks": "remove_ranks"}
"""Short names that are other ones in their section."""


def few_examples_are_enough() -> None:
    """Let tiny models be estimated on a handful of rows, in a process of its own, which has no fixtures."""
    length.LEAST_EXAMPLES = 0


def nested(**leaves: Any) -> dict[str, Any]:
    """Settings by their short names, nested as files have them."""
    found: dict[str, Any] = {}
    for name, value in leaves.items():
        if name in PLACES:
            found.setdefault(PLACES[name], {})[NAMES.get(name, name)] = value
        else:
            found[name] = value
    return found


def light_of(**leaves: Any) -> LightConfig:
    """The paper's settings, with masks that move, and some others on top."""
    return but(fill_defaults(light_config("paper")), **{"mask_learning_rate": 2e-2, **leaves})


def but(light: LightConfig, **leaves: Any) -> LightConfig:
    """Settings with some others on top."""
    return override_light(light, nested(**leaves))


def preset(name: str, peft: str = "lora", writes: bool = False, **leaves: Any) -> LightConfig:
    """The settings of a preset, with some others on top."""
    return fill_defaults(override_light(light_config(name), nested(**leaves)), peft, writes)
