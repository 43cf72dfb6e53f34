"""The arms of a grid, which its file calls methods: full fine-tuning, PEFT, Light-PEFT, the paper's ablations of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightpeft.config import RunConfig

NestedSettings = Mapping[str, Any]
"""Nested settings of a `RunConfig`."""


@dataclass(frozen=True)
class Arm:
    """One method of a grid: a way of fine-tuning that is compared with others.

    Example:
        Arm({"method": "light", "peft": {"type": "lora", "r": 16}, "light": {"remove": {"blocks": 0.4}}})
    """

    settings: NestedSettings
    """Nested settings of a `RunConfig` that the method sets; all others come from the grid."""
    equal_shares: bool = False
    """True: scores of heads and of neurons are not comparable, so `light.remove.blocks` becomes an equal part of the
    heads, of the neurons and of the experts."""

    def config(self, config: RunConfig) -> RunConfig:
        """Return the settings of a cell as it runs: with equal shares if the method needs them."""
        light = config.light
        part = light.known_blocks if self.equal_shares else None
        if part is None:
            return config
        return replace(config, light=light.with_shares(part))


def _light(equal_shares: bool = False, **settings: Any) -> Arm:
    return Arm({"method": "light", "peft": "lora", "light": settings}, equal_shares)


def _criterion(name: str, equal_shares: bool = False) -> Arm:
    return _light(equal_shares, estimate={"criterion": name})


_RANDOM = {"criterion": "random", "module_criterion": "random", "rank_criterion": "random"}

ARMS: dict[str, Arm] = {
    "full": Arm({"method": "full", "training": {"learning_rate": "auto"}}),
    "lora": Arm({"method": "plain", "peft": "lora"}),
    "adapter": Arm({"method": "plain", "peft": "bottleneck"}),
    "light-lora": _light(),
    "light-adapter": Arm({"method": "light", "peft": "bottleneck"}),
    # one of the two prunings, and each half of the second
    "foundation-only": _light(modules={"blocks": 1.0, "remove": 0.0, "remove_ranks": 0.0}),
    "peft-only": _light(remove={"blocks": 0.0}),
    "modules-only": _light(remove={"blocks": 0.0}, modules={"remove_ranks": 0.0}),
    "ranks-only": _light(remove={"blocks": 0.0}, modules={"blocks": 1.0, "remove": 0.0}),
    # what ranks the units; random scores also rank modules and ranks
    "random": _light(True, estimate=_RANDOM),
    "mask": _criterion("mask", equal_shares=True),
    "taylor": _criterion("taylor"),
    "fisher": _criterion("fisher"),
    "magnitude": _criterion("magnitude"),
    # how long estimation takes, of the whole run
    "length-0.05": _light(estimate={"length": 0.05}),
    "length-0.1": _light(estimate={"length": 0.1}),
    "length-0.2": _light(estimate={"length": 0.2}),
}
"""Name -> arm. The ablations are of light-lora; a variant in a grid file can put them on adapters."""
