"""Grids of runs, read from YAML: one cell for every combination of model, task, method and seed."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs.reproduce.arms import ARMS, Arm, NestedSettings
from lightpeft.app.tasks.entries.task_entries import find_entry
from lightpeft.config import RunConfig, merge_settings, run_config_from_dict
from lightpeft.config.validation import load_yaml, short_repr, unknown_key
from lightpeft.errors import LightPeftError, require
from lightpeft.peft_kinds.kinds import check_peft_settings

AXES = ("model", "task", "method", "seed")
"""The axes of a grid, which identify a cell."""
FROM = "from"
"""Key of a variant for the known method it starts from."""
START = "light-lora"
"""Method that a variant starts from by default."""
_NAMED_AXES = ("models", "tasks", "methods")
_SET_BY_THE_GRID = ("output", "seed")
"""Settings that the grid sets for each cell."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    model: str
    task: str
    method: str
    seed: int
    config: RunConfig
    """Settings of the run; `output` is the cell's own folder."""

    @property
    def name(self) -> str:
        """Name of the cell in messages and tables: model/task/method/seed."""
        return cell_name(self.model, self.task, self.method, self.seed)

    @property
    def run(self) -> RunFolder:
        """The run folder of the cell, finished or not."""
        return RunFolder(Path(self.config.output), self.config)


def cell_name(model: str, task: str, method: str, seed: int) -> str:
    """Return the name of a cell: model/task/method/seed."""
    return f"{model}/{task}/{method}/{seed}"


@dataclass(frozen=True)
class Grid:
    """Models, tasks, methods and seeds, each with its settings."""

    name: str
    """Path of the grid's file."""
    models: Mapping[str, NestedSettings]
    tasks: Mapping[str, NestedSettings]
    arms: Mapping[str, Arm]
    """Name of the method -> arm."""
    seeds: Sequence[int]
    baseline: str
    """The method that all others are compared with."""
    command: str
    """Command line that runs the grid, written into its results."""
    run: NestedSettings = dataclasses.field(default_factory=dict)
    """Settings that all cells share, below those of model, task and method."""

    def folder(self, out: str | Path | None = None) -> Path:
        """Return the folder of cells and tables: `out`, or by default runs/<folder of the file>/<its name>."""
        return Path(out) if out is not None else Path("runs") / Path(self.name).parent.name / Path(self.name).stem

    def cells(self, out: Path) -> list[Cell]:
        """List all cells, seed by seed, so that the finished cells of an unfinished grid can be compared.

        Raises:
            LightPeftError: a setting is unknown or invalid, or a task does not exist.
        """
        return [
            Cell(model, task, method, seed, self._config(out, model, task, method, seed))
            for seed in self.seeds
            for model in self.models
            for task in self.tasks
            for method in self.arms
        ]

    def _config(self, out: Path, model: str, task: str, method: str, seed: int) -> RunConfig:
        data: dict[str, Any] = {}
        for settings in (self.run, self.models[model], self.tasks[task], self.arms[method].settings):
            data = merge_settings(data, dict(settings))
        folder = out.joinpath("cells", *(slug(str(part)) for part in (model, task, method, seed)))
        try:
            config = run_config_from_dict({**data, "seed": seed, "output": str(folder)})
            find_entry(config.data, config.tasks)
            check_peft_settings(config)
            return self.arms[method].config(config)
        except LightPeftError as error:
            raise LightPeftError(f"{self.name}: cell {cell_name(model, task, method, seed)}: {error}") from error


def slug(name: str) -> str:
    """Turn a name into a valid part of a path."""
    return re.sub(r"[^\w.=-]+", "_", name).strip("_") or "_"


def load_grid(path: str | Path) -> Grid:
    """Read a grid of runs from a YAML file.

    Args:
        path: the file, as in `configs/`.

    Returns:
        The grid, whose cells `reproduce` runs.

    Raises:
        LightPeftError: the file is missing or not YAML, a key is unknown, or an axis is empty or names something twice.

    Example:
        grid = load_grid("configs/movie_reviews/grid.yaml")
        print([cell.name for cell in grid.cells(grid.folder())])
    """
    path, data = Path(path), load_yaml(path)
    known = [*_NAMED_AXES, "seeds", "run", "baseline"]
    for key in data:
        if key not in known:
            raise LightPeftError(f"{path}: {unknown_key(str(key), known)}")
    models, tasks, methods = (_read_axis(path, key, data.get(key)) for key in _NAMED_AXES)
    baseline = data.get("baseline", next(iter(methods)))
    among = isinstance(baseline, str) and baseline in methods
    require(
        among, f"{path}: baseline {short_repr(baseline)} is not a method of the grid; give one of {', '.join(methods)}"
    )
    return Grid(
        name=str(path),
        # a bare name is that of a model on the hub or in a folder, and of a known task
        models={name: {"model": {"name": name}} | given for name, given in models.items()},
        tasks={name: {"data": {"task": name}} | given for name, given in tasks.items()},
        arms={name: _read_arm(path, name, given) for name, given in methods.items()},
        seeds=_read_seeds(path, data.get("seeds")),
        baseline=baseline,
        command=shlex.join(["lightpeft", "reproduce", str(path)]),
        run=_read_settings(path, "run", data.get("run")),
    )


def _read_axis(path: Path, axis: str, given: Any) -> dict[str, dict[str, Any]]:
    """Read an axis: a list of names, or a mapping from names to settings."""
    if isinstance(given, list):
        names = [str(name) for name in given]
        require(len(set(names)) == len(names), f"{path}: {axis} has a name twice; remove one")
        given = dict.fromkeys(names)
    require(
        isinstance(given, dict) and given,
        f"{path}: {axis} is empty or missing; give a list of names, or a mapping from names to settings",
    )
    slugs = [slug(str(name)) for name in given]
    twice = next((name for name in slugs if slugs.count(name) > 1), None)
    require(twice is None, f"{path}: {axis} has two names whose folder would be {twice}; rename one")
    return {str(name): _read_settings(path, f"{axis}.{name}", settings) for name, settings in given.items()}


def _read_settings(path: Path, where: str, given: Any) -> dict[str, Any]:
    require(
        given is None or isinstance(given, dict),
        f"{path}: {where} must be a mapping of settings, not {short_repr(given)}",
    )
    settings = {key: value for key, value in (given or {}).items() if value is not None}
    taken = [key for key in _SET_BY_THE_GRID if key in settings]
    require(not taken, f"{path}: {where} sets {', '.join(taken)}, which the grid sets for each cell; remove it")
    return settings


def _read_seeds(path: Path, given: Any) -> list[int]:
    whole = isinstance(given, list) and given and all(type(seed) is int for seed in given)
    require(whole, f"{path}: seeds must be a list of whole numbers, not {short_repr(given)}")
    require(len(set(given)) == len(given), f"{path}: seeds has {max(given, key=given.count)} twice; remove one")
    return list(given)


def _read_arm(path: Path, name: str, settings: dict[str, Any]) -> Arm:
    """Read a method: a known one, or a variant of a known one with other settings."""
    if name not in ARMS and not settings:
        raise LightPeftError(f"{path}: {unknown_key(name, list(ARMS), noun='method')}")
    start = settings.pop(FROM, name if name in ARMS else START)
    known = isinstance(start, str) and start in ARMS
    require(
        known, f"{path}: methods.{name}.from is {short_repr(start)}, not a known method; give one of {', '.join(ARMS)}"
    )
    base = ARMS[start]
    return replace(base, settings=merge_settings(dict(base.settings), settings))


def selected(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """Select the cells that meet conditions.

    Args:
        only: conditions such as "method=lora"; several of one axis are alternatives.

    Raises:
        LightPeftError: no cell meets a condition.
    """
    wanted: dict[str, set[str]] = {}
    for condition in only:
        axis, equals, value = condition.partition("=")
        require(bool(equals) and axis in AXES, f'--only {condition}: give one of {", ".join(AXES)} as in "method=lora"')
        values = {str(getattr(cell, axis)): None for cell in cells}
        if value not in values:
            raise LightPeftError(f"--only {condition}: {unknown_key(value, list(values), noun=axis)}")
        wanted.setdefault(axis, set()).add(value)
    return [cell for cell in cells if all(str(getattr(cell, axis)) in some for axis, some in wanted.items())]
