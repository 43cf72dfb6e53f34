"""`lightpeft reproduce`: grids of runs over models, tasks, methods and seeds, and the table of their results."""

from lightpeft.app.runs.reproduce.arms import ARMS, Arm
from lightpeft.app.runs.reproduce.grid import Cell, Grid, load_grid, selected
from lightpeft.app.runs.reproduce.results import Results, Row, summarize
from lightpeft.app.runs.reproduce.running import reproduce
from lightpeft.app.runs.reproduce.saving import join_results, read_results, write_results
from lightpeft.app.runs.reproduce.tables import markdown_table, rich_table

__all__ = [
    "ARMS",
    "Arm",
    "Cell",
    "Grid",
    "Results",
    "Row",
    "join_results",
    "load_grid",
    "markdown_table",
    "read_results",
    "reproduce",
    "rich_table",
    "selected",
    "summarize",
    "write_results",
]
