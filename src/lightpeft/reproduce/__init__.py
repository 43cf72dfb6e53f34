"""Grids of runs over models, tasks, methods and seeds, and the one table of them: `lightpeft reproduce`."""

from lightpeft.reproduce.grid import Cell, Grid, load_grid, selected
from lightpeft.reproduce.methods import METHODS, Method
from lightpeft.reproduce.running import reproduce
from lightpeft.reproduce.summary import Results, Row, summarize
from lightpeft.reproduce.tables import csv_table, latex_table, markdown_table, rich_table, write_results

__all__ = [
    "METHODS",
    "Cell",
    "Grid",
    "Method",
    "Results",
    "Row",
    "csv_table",
    "latex_table",
    "load_grid",
    "markdown_table",
    "reproduce",
    "rich_table",
    "selected",
    "summarize",
    "write_results",
]
