"""Settings that belong together, by name, and how settings go over one another."""

from __future__ import annotations

from typing import Any, Literal

from lightpeft.config.light import LightConfig
from lightpeft.config.peft import USUAL, Peft, peft_over, peft_type
from lightpeft.errors import require

Preset = Literal["default", "thorough", "auto", "uniform", "fast", "writer", "paper"]


_BY_COST: dict[str, Any] = {
    "head_criterion": "fisher",
    "neuron_criterion": "fisher",
    "mask_learning_rate": 3e-4,
    "multiple_of": 8,
    "length": 0.075,
    "least_steps": 32,
    "least_learned": 0.1,
    "module_blocks": 2 / 3,
    "modules": 0.0,
    "ratio_every": 16,
    "dropout": 0.0,
}


_ONE_RANK: dict[str, Any] = {**_BY_COST, "ranks": 7 / 8, "learning_rate_scale": 2.0}
"""One rank of eight, in the upper blocks, at twice the rate."""


_ALL_RANKS: dict[str, Any] = {**_BY_COST, "ranks": 0.0, "module_blocks": 1.0}
"""All ranks of modules in all blocks: nothing is spared where a step is longer for it."""

PRESETS: dict[str, dict[str, Any]] = {
    # Gu et al. 2024, section 4: masks train with the PEFT learning rate and are themselves the score.
    "paper": {"mask_learning_rate": 3e-4},
    # What of the blocks is worth least for its parameters, by Fisher scores.
    "default": {**_ONE_RANK, "blocks": 0.6},
    # As much goes, and more is trained to make up for it: what larger encoders want.
    "thorough": {**_ALL_RANKS, "blocks": 0.6},
    # As default, with as much of the blocks gone as `tolerance` bears, measured in the run.
    "auto": {**_ONE_RANK, "blocks": "auto"},
    # Half of the heads, of the neurons and of the experts of each layer, by the same scores: layers of equal size.
    "uniform": {
        **_ONE_RANK,
        "heads": 0.5,
        "neurons": 0.5,
        "experts": 0.5,
        "neurons_scope": "layerwise",
    },
    # Less is cut, and modules keep half of their ranks: the best quality.
    "fast": {**_BY_COST, "blocks": 0.4, "ranks": 0.5},
    # Decoders that write: they use all of the model, and modules everywhere. Nothing goes unless `blocks` says so.
    "writer": {**_ALL_RANKS, "blocks": 0.0, "head_unit": "balanced"},
}
"""Values of `LightConfig` fields that differ from its defaults, by preset name."""

NOTHING_REMOVED: dict[str, Any] = {
    "blocks": 0.0,
    "modules": 0.0,
    "ranks": 0.0,
    "module_blocks": 1.0,
    "learning_rate_scale": 1.0,
}
"""Fields of a run without room for an estimation: PEFT modules in all blocks, with all ranks, at PEFT's own rate."""


_OF_KINDS: dict[str, dict[str, dict[str, Any]]] = {
    # adapters take larger steps and lose more by a cut than LoRA
    "bottleneck": {
        "default": {"blocks": 0.5, "learning_rate_scale": 4.0},
        "thorough": {"blocks": 0.5, "learning_rate_scale": 4.0},
        # at that rate whole adapters on the dense model may unlearn the task again, of which a budget says nothing
        "auto": {"learning_rate_scale": 4.0, "estimation_learning_rate_scale": 1.0},
        "uniform": {"learning_rate_scale": 4.0},
        "fast": {"learning_rate_scale": 4.0},
        "writer": {"learning_rate_scale": 4.0},
    },
}
"""PEFT kind -> what presets have of their own for it; all other kinds have what LoRA has."""


WRITTEN = frozenset({"generation", "chat", "causal-lm", "web_questions"})
"""Kinds of tasks, and tasks that ship, whose answers a model writes."""


def usual_preset(written: bool, measured: bool) -> Preset:
    """The preset where none is given.

    Args:
        written: whether the model writes its answers, for which it uses all of itself.
        measured: whether a budget may be measured, for which a task has to say what its points are worth.
    """
    if written:
        return "writer"
    return "auto" if measured else "default"


def cut_of_writer(light: LightConfig) -> str | None:
    """What to say before a model that writes is cut (docs/writers.md); None: it is not, or a whole one is kept, too.

    A budget that is `auto` is measured, and said when it is found.
    """
    if not light.cuts_blocks or light.keep != "light" or light.blocks == "auto":
        return None
    loses = "a model that writes loses far more by a cut than one that classifies"
    return f"{loses}; preset: writer cuts nothing, and light.keep: both keeps a whole one, too"


def preset_light(name: str, peft: Peft = USUAL, **overrides: Any) -> LightConfig:
    """`LightConfig` of a preset (a key of `PRESETS`) for a kind of PEFT, with some fields replaced.

    Raises:
        LightPeftError: no such preset, or a value that a field does not take.
    """
    return LightConfig(**overlaid(preset_settings(name, peft), overrides))


def preset_settings(name: Any, peft: Any) -> dict[str, Any]:
    """What a preset sets."""
    known = isinstance(name, str) and name in PRESETS
    require(known, f'preset "{name}" is unknown; choose one of {", ".join(PRESETS)}')
    kind = peft_type(peft)
    return PRESETS[name] | (_OF_KINDS.get(kind, {}).get(name, {}) if isinstance(kind, str) else {})


_AMOUNTS = ({"heads", "neurons", "experts"}, {"blocks"}, {"target"})
"""Settings that say how much of the base goes, each in its own way."""


def overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with others on top.

    What says how much of the base goes in one way (heads, neurons and experts, blocks, or target) takes the place of
    what said it in another way below.
    """
    result = dict(below)
    said = [ways for ways in _AMOUNTS if any(above.get(name) is not None for name in ways)]
    for name in ("blocks", "target"):
        if said and name in below and not any(name in ways for ways in said):
            result[name] = None
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        if key == "peft" and key in result:
            result[key] = peft_over(result[key], value)
        else:
            result[key] = overlaid(result[key], value) if nested else value
    return result
