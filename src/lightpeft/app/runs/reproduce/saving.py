"""Results of a grid on disk: results.json with every number, results.md with the table; and joining such files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lightpeft.app.folders.metrics_file import RunReport
from lightpeft.app.folders.stored_config import differences, flat
from lightpeft.app.runs.reproduce.grid import Cell, Grid, load_grid
from lightpeft.app.runs.reproduce.results import MEASURES, CellReport, Results, results_of
from lightpeft.app.runs.reproduce.tables import markdown_table
from lightpeft.config import run_config_from_dict
from lightpeft.config.validation import from_dict
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, write_json, write_text
from lightpeft.profiling.surroundings import versions

RESULTS_FILE = "results.json"
LINES = 2
"""Nesting levels of results.json with line breaks: each row and each report is one line."""
_FOUND_BY_RUNS = ("training.epochs", "training.learning_rate", "light.remove.depth")
"""Settings for which a report has a number where the grid has "auto"."""


def write_results(out: Path, results: Results) -> None:
    """Write results.json and results.md into a folder, each whole or not at all.

    Raises:
        LightPeftError: a file cannot be written.
    """
    shared, own = factored(results.reports)
    parts = {"shared": shared, "reports": own, "versions": versions()}
    write_json(out / RESULTS_FILE, asdict(results) | parts, LINES)
    write_text(out / "results.md", markdown_table(results))


def read_results(path: str | Path) -> Results:
    """Read the results of a grid, also those of older versions, which measured less.

    Args:
        path: a results.json.

    Returns:
        One row per model, task and method, with the values of all seeds, and the reports of all runs.

    Raises:
        LightPeftError: the file is missing or damaged, or holds something else.

    Example:
        results = read_results("configs/movie_reviews/grid.results.json")
        print({row.method: row.quality for row in results.rows})
    """
    data, names = read_json(path), [each.name for each in fields(Results)]
    try:
        results = from_dict(Results, {name: data[name] for name in names if name in data})
    except LightPeftError as error:
        raise LightPeftError(f"{path} does not hold the results of a grid: {error}") from error
    return replace(
        results,
        rows=[replace(row, measures=dict.fromkeys(MEASURES) | row.measures) for row in results.rows],
        reports={name: _merge_shared(own, data.get("shared", {})) for name, own in results.reports.items()},
    )


# -- entries that all reports share are written once ------------------------------------------------------------------


def factored(records: Mapping[str, CellReport]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split nested mappings into the entries that all share, and the other entries of each."""
    shared = _find_shared([*records.values()])
    return shared, {name: _remove_shared(record, shared) for name, record in records.items()}


def _find_shared(records: Sequence[CellReport]) -> dict[str, Any]:
    """Return the entries that are the same in all nested mappings."""
    first, *others = records or [{}]
    found: dict[str, Any] = {}
    for name, value in first.items():
        if all(name in other and other[name] == value for other in others):
            found[name] = value
        elif isinstance(value, dict) and all(isinstance(other.get(name), dict) for other in others):
            found[name] = _find_shared([each[name] for each in records])
    return found


def _remove_shared(record: CellReport, shared: CellReport) -> dict[str, Any]:
    """Return a nested mapping without the shared entries."""
    nested = {name: value for name, value in record.items() if isinstance(value, dict) and name in shared}
    rest = {name: value for name, value in record.items() if name not in shared}
    return rest | {name: own for name, value in nested.items() if (own := _remove_shared(value, shared[name]))}


def _merge_shared(own: CellReport, shared: CellReport) -> dict[str, Any]:
    """Return a nested mapping with the shared entries added."""
    nested = {
        name: _merge_shared(own.get(name, {}), value) for name, value in shared.items() if isinstance(value, dict)
    }
    return {**shared, **own, **nested}


# -- parts of a grid ---------------------------------------------------------------------------------------------------


def join_results(
    grid: Grid | str | Path, parts: Sequence[Results | str | Path], out: str | Path | None = None
) -> Results:
    """Write the table of a grid from the results of its parts, without running any cell.

    If several parts have the same cell, the first part counts.

    Args:
        grid: a grid, or its YAML file.
        parts: results of each part: `Results`, a results.json, or its folder.
        out: folder of the tables; None: runs/<folder of the file>/<its name>.

    Returns:
        The results of all parts together.

    Raises:
        LightPeftError: a part is no results file, or has a cell that is not in the grid or has other settings; nothing
            was written.

    Example:
        results = join_results("grid.yaml", ["machine1/results.json", "machine2/results.json"])
    """
    grid = grid if isinstance(grid, Grid) else load_grid(grid)
    out = grid.folder(out)
    cells = {cell.name: cell for cell in grid.cells(out)}
    reports: dict[str, CellReport] = {}
    logs: dict[str, str] = {}
    for part in parts:
        results, where = (part, part.command) if isinstance(part, Results) else _read(Path(part))
        for name, report in results.reports.items():
            require(
                name in cells,
                f"{where}: {grid.name} has no cell {name}; remove it from the part, or add it to the grid",
            )
            _check_same(report, cells[name], where)
            if name not in reports:
                reports[name] = report
                logs |= {name: results.logs[name]} if name in results.logs else {}
    found = results_of(grid, list(cells.values()), reports, logs)
    write_results(out, found)
    return found


def _read(part: Path) -> tuple[Results, str]:
    """Return the results in a file or a folder, and the path of the file."""
    file = part / RESULTS_FILE if part.is_dir() else part
    return read_results(file), str(file)


def _check_same(report: CellReport, cell: Cell, where: str) -> None:
    """Require that a report was made with the settings of a cell.

    Raises:
        LightPeftError: the run of the report had other settings.
    """
    try:
        RunReport.of(dict(report))
        config = run_config_from_dict(report.get("config", {}))
    except LightPeftError as error:
        raise LightPeftError(f"{where}: this version of lightpeft cannot read cell {cell.name}: {error}") from error
    own, rows = cell.config, config.training.batch_size
    if own.training.batch_size % rows == 0:  # a cell that was spread over devices has a share of the rows of a step
        own = replace(own, training=replace(own.training, batch_size=rows))
    asked = flat(asdict(own))
    other = [name for name in differences(config, own) if name not in _FOUND_BY_RUNS or asked[name] != "auto"]
    require(
        not other,
        f"{where}: cell {cell.name} was run with another {', '.join(other)} than in the grid; use the same settings",
    )
