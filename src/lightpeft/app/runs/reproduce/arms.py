"""The arms of a grid, which its file calls methods: full fine-tuning, PEFT, Light-PEFT, the paper's ablations of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.config import RunConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, write_json

Settings = Mapping[str, Any]
"""Nested settings of a `RunConfig`."""


@dataclass(frozen=True)
class Call:
    """A function of a run's config, which leaves the run's results in its folder, `metrics.json` last."""

    function: str
    """As "module:function"; the module is found where the process of the grid finds its own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the function is given beside the config, by name; plain values that JSON can hold."""

    def __str__(self) -> str:
        named = (f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.function}({', '.join(named)})"

    def __call__(self, config: RunConfig) -> None:
        """Run the cell of a config.

        Raises:
            LightPeftError: there is no such function, or what it raises itself.
        """
        module, _, name = self.function.partition(":")
        try:
            function = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise LightPeftError(f'cannot call {self.function}: {error}; give it as "module:function"') from error
        function(config, **self.arguments)


@dataclass(frozen=True)
class Arm:
    """One way of fine-tuning, as it is compared with others."""

    settings: Settings
    """What it sets of a `RunConfig`; all the rest is the grid's."""
    equal_shares: bool = False
    """Its scores of heads and of neurons do not compare: where they compete (`light.remove.blocks`), that part of the
    heads, of the neurons and of the experts goes instead."""
    call: Call | None = None
    """What runs its cells in place of `lightpeft run`. Python alone can say so, and no file."""

    def config(self, config: RunConfig) -> RunConfig:
        """The run's config with the arm's settings in it, as it really runs."""
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
"""Name -> arm. The ablations are of light-lora; a variant of the grid's own may put them on adapters."""


# -- the call of a cell ------------------------------------------------------------------------------------------------

_FILE = "call.json"
"""Beside the config of a cell's run: the call that it was begun with."""


def note_call(run: RunFolder, call: Call | None) -> None:
    """Write down what runs a cell, which has not begun.

    Raises:
        LightPeftError: it cannot be written.
    """
    if call is not None:
        write_json(run.path / _FILE, {"call": asdict(call)})


def check_call(run: RunFolder, call: Call | None) -> None:
    """Require that a cell, if it has begun, was begun with the same call.

    Raises:
        LightPeftError: it was begun with another one.
    """
    if not run.log.is_file():
        return
    noted = read_json(run.path / _FILE)["call"] if (run.path / _FILE).is_file() else None
    same = noted == (None if call is None else json.loads(json.dumps(asdict(call))))
    ran = call or "lightpeft run"
    require(same, f"{run.path} was not run by {ran}, but otherwise; give another --out, or delete it")
