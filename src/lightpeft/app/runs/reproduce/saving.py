"""A grid's results on disk, every number as JSON and CSV beside the tables; and one table of several such files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lightpeft.app.folders.run_folder import RunReport, differences
from lightpeft.app.runs.reproduce.grid import Cell, Grid, load_grid
from lightpeft.app.runs.reproduce.results import MEASURES, Report, Results, results_of
from lightpeft.app.runs.reproduce.tables import markdown_table
from lightpeft.config import run_config_from_dict
from lightpeft.config.validation import from_dict
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, write_json, write_text
from lightpeft.profiling.surroundings import versions

FILE = "results.json"
LINES = 2
"""Its depth in lines: one for each row and each report."""


def write_results(out: Path, results: Results) -> None:
    """Write results.json and results.md into a folder, each whole or not at all.

    Raises:
        LightPeftError: one cannot be written.
    """
    shared, own = factored(results.reports)
    parts = {"shared": shared, "reports": own, "versions": versions()}
    write_json(out / FILE, asdict(results) | parts, LINES)
    write_text(out / "results.md", markdown_table(results))


def read_results(path: str | Path) -> Results:
    """What `write_results` wrote as results.json, also by versions that measured less.

    Raises:
        LightPeftError: the file is missing, damaged, or no such file.
    """
    data, names = read_json(path), [each.name for each in fields(Results)]
    try:
        results = from_dict(Results, {name: data[name] for name in names if name in data})
    except LightPeftError as error:
        raise LightPeftError(f"{path} does not hold the results of a grid: {error}") from error
    return replace(
        results,
        rows=[replace(row, measures=dict.fromkeys(MEASURES) | row.measures) for row in results.rows],
        reports={name: _whole(own, data.get("shared", {})) for name, own in results.reports.items()},
    )


# -- what runs share is written once -----------------------------------------------------------------------------------


def factored(records: Mapping[str, Report]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What some nested mappings share, and what each of them has of its own."""
    shared = _shared([*records.values()])
    return shared, {name: _own(record, shared) for name, record in records.items()}


def _shared(records: Sequence[Report]) -> dict[str, Any]:
    """The part of some nested mappings that is the same in all of them."""
    first, *others = records or [{}]
    found: dict[str, Any] = {}
    for name, value in first.items():
        if all(name in other and other[name] == value for other in others):
            found[name] = value
        elif isinstance(value, dict) and all(isinstance(other.get(name), dict) for other in others):
            found[name] = _shared([each[name] for each in records])
    return found


def _own(record: Report, shared: Report) -> dict[str, Any]:
    """A nested mapping without what is shared."""
    nested = {name: value for name, value in record.items() if isinstance(value, dict) and name in shared}
    rest = {name: value for name, value in record.items() if name not in shared}
    return rest | {name: own for name, value in nested.items() if (own := _own(value, shared[name]))}


def _whole(own: Report, shared: Report) -> dict[str, Any]:
    """A nested mapping with what is shared."""
    nested = {name: _whole(own.get(name, {}), value) for name, value in shared.items() if isinstance(value, dict)}
    return {**shared, **own, **nested}


# -- parts of a grid ---------------------------------------------------------------------------------------------------


def joined(grid: Grid | str | Path, parts: Sequence[Results | str | Path], out: str | Path | None = None) -> Results:
    """Write the table of a grid from the results of its parts; no cell is run.

    Of a cell that several parts have, the first part's is taken.

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
            _check_same(report, cells[name], where)
            if name not in reports:
                reports[name] = report
                logs |= {name: results.logs[name]} if name in results.logs else {}
    found = results_of(grid, list(cells.values()), reports, logs)
    write_results(out, found)
    return found


def _read(part: Path) -> tuple[Results, str]:
    """The results in a file or a folder, and where they are."""
    file = part / FILE if part.is_dir() else part
    return read_results(file), str(file)


def _check_same(report: Report, cell: Cell, where: str) -> None:
    """Require that a report is that of a cell.

    Raises:
        LightPeftError: it is of a run with other settings.
    """
    try:
        RunReport.of(dict(report))
        config = run_config_from_dict(report.get("config", {}))
    except LightPeftError as error:
        raise LightPeftError(f"{where}: cell {cell.name} is not to be read by this version: {error}") from error
    own, rows = cell.config, config.training.batch_size
    if own.training.batch_size % rows == 0:  # a cell that was spread over devices has a share of the rows of a step
        own = replace(own, training=replace(own.training, batch_size=rows))
    other = differences(config, own)
    require(not other, f"{where}: cell {cell.name} was run with another {', '.join(other)} than the grid has")
