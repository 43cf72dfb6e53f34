"""Pruning before training, by other criteria and other libraries, on the models and tasks of a grid.

    python benchmarks/grid_peers.py configs/glue/presets.yaml --peers tp_taylor random --only model=minilm

Peers are those of `peers.py` that cut a model once before training and then train LoRA on q and v. They remove what the
grid's method `--as` plans to remove, and are compared with its baseline, which is taken from the published results
beside the file. Cells that are done are kept. Writes the table of `lightpeft reproduce` into the output folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import publishing
from peer_methods import LORA, PEERS
from publishing import say
from rich.console import Console

from lightpeft.app.cli.command import quiet
from lightpeft.app.runs.reproduce import Arm, Call, Grid, joined, load_grid, markdown_table, read_results, reproduce
from lightpeft.app.runs.reproduce.running import Launch
from lightpeft.config import overlaid
from lightpeft.errors import LightPeftError, require

PRUNED = [name for name, peer in PEERS.items() if peer.kind == "pruned"]


def main(arguments: list[str] | None = None, launch: Launch | None = None) -> int:
    """Run and write; 0 if all went well, 1 if a cell failed, 2 on bad input.

    Args:
        launch: how a cell is run, as for `reproduce`.
    """
    given = parser().parse_args(arguments)
    quiet()
    try:
        grid = with_peers(load_grid(given.grid), given.peers, given.as_method)
        grid = replace(grid, command=publishing.command("grid_peers", arguments))
        out = given.out or Path("runs") / "grid_peers" / given.grid.stem
        published = read_results(given.grid.with_suffix(".results.json"))
        named = {cell.name for cell in grid.cells(out) if cell.method == grid.baseline}
        of_baseline = {name: report for name, report in published.reports.items() if name in named}
        only = [*given.only, *(f"method={PEERS[peer].label}" for peer in given.peers)]
        ran = reproduce(grid, out, only, devices=1, launch=launch)
        results = joined(grid, [ran, replace(published, reports=of_baseline)], out)
    except LightPeftError as error:
        say(f"grid_peers: {error}")
        return 2
    Console(width=200).print(markdown_table(results), markup=False)
    return 1 if ran.failures else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML file of a grid, with its .results.json beside it")
    parser.add_argument("--peers", nargs="+", choices=PRUNED, default=["tp_taylor"], metavar="PEER")
    parser.add_argument("--as", dest="as_method", default="default", metavar="METHOD", help="whose budget to keep to")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="AXIS=NAME", help="a part of the grid, as in model=minilm"
    )
    parser.add_argument("--out", type=Path, help="folder of cells and results (default: runs/grid_peers/<grid's name>)")
    return parser


def with_peers(grid: Grid, peers: Sequence[str], as_method: str) -> Grid:
    """The grid with the baseline and the peers as its methods.

    Raises:
        LightPeftError: the grid has no such method.
    """
    require(as_method in grid.arms, f"{grid.name} has no method {as_method}; it has {', '.join(grid.arms)}")
    settings = overlaid(dict(grid.arms[as_method].settings), LORA)
    calls = {PEERS[peer].label: Arm(settings, call=Call("peer_cells:run", {"peer": peer})) for peer in peers}
    return replace(grid, arms={grid.baseline: grid.arms[grid.baseline], **calls})


if __name__ == "__main__":
    sys.exit(main())
