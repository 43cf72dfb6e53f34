"""One table from a grid whose cells ran in several folders, maybe on several machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightpeft.app.folders.run_folder import Report as RunReport
from lightpeft.app.folders.run_folder import differences
from lightpeft.app.runs.reproduce.documents import read_results, write_results
from lightpeft.app.runs.reproduce.grid import Cell, Grid, load_grid
from lightpeft.app.runs.reproduce.summary import Report, Results, results_of
from lightpeft.config import LightConfig, run_config_from_dict
from lightpeft.errors import LightPeftError, require

FILE = "results.json"


def joined(grid: Grid | str | Path, parts: Sequence[Results | str | Path], out: str | Path | None = None) -> Results:
    """Write the table of a grid from the results of its parts; no cell is run.

    Of a cell that several parts have, the first part's is taken. What a part says of a cell's place (`output`) becomes
    the cell's place in `out`.

    Args:
        grid: a grid, or its YAML file.
        parts: the results of each part, as they are, as results.json, or as the folder that this is in.
        out: folder of the tables; None: as of `reproduce`.

    Raises:
        LightPeftError: a part is no results file, has a cell that the grid has not, or one of other settings; nothing
            was written.
    """
    grid = grid if isinstance(grid, Grid) else load_grid(grid)
    out = grid.folder(out)
    cells = {cell.name: cell for cell in grid.cells(out)}
    reports: dict[str, Report] = {}
    logs: dict[str, str] = {}
    for part in parts:
        results, where = (part, part.command) if isinstance(part, Results) else _read(Path(part))
        for name, report in results.reports.items():
            require(name in cells, f"{where}: {grid.name} has no cell {name}; leave that out, or add it to the grid")
            placed = _placed(report, cells[name], where)
            if name not in reports:
                reports[name] = placed
                logs |= {name: results.logs[name]} if name in results.logs else {}
    found = results_of(grid, list(cells.values()), reports, logs)
    write_results(out, found)
    return found


def _read(part: Path) -> tuple[Results, str]:
    """The results in a file or a folder, and where they are."""
    file = part / FILE if part.is_dir() else part
    return read_results(file), str(file)


def _placed(report: Report, cell: Cell, where: str) -> Report:
    """The report as that of the cell, if it is one.

    Raises:
        LightPeftError: it is of a run with other settings.
    """
    try:
        RunReport.of(dict(report))
        config = run_config_from_dict(_without_gone(dict(report.get("config", {}))))
    except LightPeftError as error:
        raise LightPeftError(f"{where}: cell {cell.name} is not to be read by this version: {error}") from error
    own, rows = cell.config, config.training.batch_size
    if own.training.batch_size % rows == 0:  # a cell that was spread over devices has a share of the rows of a step
        own = dataclasses.replace(own, training=dataclasses.replace(own.training, batch_size=rows))
    other = differences(config, own)
    require(not other, f"{where}: cell {cell.name} was run with another {', '.join(other)} than the grid has")
    return {**report, "config": {**report["config"], "output": cell.config.output}}


def _without_gone(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run without those of `light` that lightpeft had when it ran, and has no more."""
    light, known = config.get("light"), {each.name for each in dataclasses.fields(LightConfig)}
    if not isinstance(light, dict):
        return config
    return {**config, "light": {name: value for name, value in light.items() if name in known}}
