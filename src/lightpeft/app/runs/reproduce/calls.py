"""Cells that are run by Python functions: what studies beside `lightpeft run` put in its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.config import RunConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, write_json

_FILE = "call.json"
"""Beside the config of a cell's run: the call that it was begun with."""


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
