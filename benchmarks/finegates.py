"""FineGates (Svirsky et al., AISTATS 2026, arXiv 2602.09169) at lightpeft's sizes, as the methods of a grid.

    python benchmarks/finegates.py configs/frontier/finegates.yaml --only task=cola

Every linear layer W of the blocks becomes diag(r) W diag(c) with stochastic gates r and c in [0, 1]. They and the
task's head train, all else is frozen, and a penalty holds the expected part of open gates at a target. In the end
closed rows and columns are removed, with what is dead without them. Written after the paper; no code of the authors is
in it. Two things differ: the target moves on the way until as many parameters are gone as the number in the method's
name says (per cent of the blocks), and in the end the smallest gates make up for what is missing to that.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import publishing
import torch
from peer_cells import report, without_cache
from peer_pruning import goal_of
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import set_seed

from lightpeft.app.cli.command import quiet
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.folders.stored_config import stored_config
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reproduce import Cell, load_grid, markdown_table, reproduce
from lightpeft.app.runs.reproduce.running import run_cell
from lightpeft.app.runs.workspace import Workspace
from lightpeft.config import LightConfig, override_light
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, write_json
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.loading import quiet_libraries
from lightpeft.plans.structure import BlockSpec

NOISE, SPREAD, WEIGHT = 0.1, 0.5, 50.0
"""The paper's: standard deviations of the gates' noise and of the relaxation that counts open gates; of the penalty."""
PACE = 0.002
"""How far a step moves the target, of what is missing to the goal."""
TWINS = (("q", 0, "k", 0), ("v", 0, "o", 1), ("ffn_in", 0, "ffn_out", 1))
"""Two slots, and the side (rows: 0, columns: 1) of each: a unit that is dead on one side has no use on the other."""


class Gated(nn.Module):
    """A frozen linear layer with a gate a row and a gate a column."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.threshold = layer, 0.0
        self.rows, self.columns = (nn.Parameter(torch.empty(size).normal_(1.0, 0.1)) for size in layer.weight.shape)

    def gate(self, logits: Tensor) -> Tensor:
        """Between 0 and 1, with noise in training; up to the threshold it is closed."""
        center = opening(logits)
        noise = NOISE * torch.randn_like(center) if self.training else 0.0
        return (center + noise).clamp(0, 1) * (self.training or center > self.threshold)

    def forward(self, states: Tensor) -> Tensor:
        """[..., columns] -> [..., rows]."""
        found: Tensor = self.layer(states * self.gate(self.columns)) * self.gate(self.rows)
        return found


class Narrow(nn.Module):
    """The rest of a gated layer: it reads the columns that stay, and gives zeros where no row does.

    Args:
        inside: "ffn_in" or "ffn_out" on that side of an FFN, between which only neurons that stay are passed on.
    """

    def __init__(self, gated: Gated, kept: Sequence[Tensor], inside: str) -> None:
        super().__init__()
        rows, columns = kept
        row, column = gated.gate(gated.rows)[rows], gated.gate(gated.columns)[columns]
        self.layer = nn.Linear(len(column), len(row))
        self.layer.weight.copy_(gated.layer.weight[rows][:, columns] * row[:, None] * column)
        self.layer.bias.copy_(gated.layer.bias[rows] * row)
        self.read = None if inside == "ffn_out" else nn.Buffer(columns.nonzero().flatten())
        place = torch.where(rows, rows.cumsum(0) - 1, len(row))  # behind all rows is a zero
        self.give = None if inside == "ffn_in" else nn.Buffer(place)

    def forward(self, states: Tensor) -> Tensor:
        """As of the gated layer."""
        made: Tensor = self.layer(states if self.read is None else states.index_select(-1, self.read))
        return made if self.give is None else functional.pad(made, (0, 1)).index_select(-1, self.give)


def opening(logits: Tensor) -> Tensor:
    """How far gates are open, before that is clamped to [0, 1]."""
    return logits.tanh() + 0.5


def gate(model: Any) -> list[BlockSpec]:
    """Put gates on every linear layer of the blocks, and freeze all but them and the head; in place."""
    specs = list(block_specs(model))
    model.base_model.requires_grad_(False)
    for spec in specs:
        for name in spec.projections.values():
            model.set_submodule(name, Gated(model.get_submodule(name)))
    return specs


def open_parts(model: Any, specs: Sequence[BlockSpec], threshold: float) -> dict[str, list[Tensor]]:
    """By layer: whether its rows, and its columns, stay where gates up to a threshold are closed."""
    kept: dict[str, list[Tensor]] = {}
    for spec in specs:
        layers = {slot: model.get_submodule(name) for slot, name in spec.projections.items()}
        sides = {slot: [opening(of.rows) > threshold, opening(of.columns) > threshold] for slot, of in layers.items()}
        for one, side, other, its_side in TWINS:
            sides[one][side] = sides[other][its_side] = sides[one][side] & sides[other][its_side]
        kept |= {spec.projections[slot]: both for slot, both in sides.items()}
    return kept


@torch.no_grad()
def left(model: Any, specs: Sequence[BlockSpec], threshold: float = 0.0) -> int:
    """Weights and biases of the gated layers that stay."""
    return sum(int(r.sum() * (c.sum() + 1)) for r, c in open_parts(model, specs, threshold).values())


@torch.no_grad()
def threshold_of(model: Any, specs: Sequence[BlockSpec], wanted: int) -> float:
    """The lowest at which no more than so many parameters stay."""
    gated = [module for module in model.modules() if isinstance(module, Gated)]
    levels = torch.cat([opening(side) for each in gated for side in (each.rows, each.columns)]).unique().tolist()
    return float(levels[bisect_left(levels, True, key=lambda level: left(model, specs, level) <= wanted)])


@torch.no_grad()
def remove_closed(model: Any, specs: Sequence[BlockSpec], threshold: float) -> None:
    """Cut closed rows and columns, and what is dead without them, out of the weights; in place."""
    kept = open_parts(model.eval(), specs, threshold)
    for slot, name in (pair for spec in specs for pair in spec.projections.items()):
        gated = model.get_submodule(name)
        gated.threshold = threshold
        model.set_submodule(name, Narrow(gated, kept[name], slot))


def steer(model: Any, specs: Sequence[BlockSpec], wanted: int, whole: int) -> None:
    """Add the penalty to every loss of training, and move its target until so many parameters of the whole stay."""
    gated = [module for module in model.modules() if isinstance(module, Gated)]
    target = (wanted / whole) ** 0.5

    def penalize(module: Any, _: Any, output: Any) -> None:
        nonlocal target
        if module.training and output.loss is not None:
            sides = [opening(side) / SPREAD for each in gated for side in (each.rows, each.columns)]
            expected = torch.stack([(0.5 + 0.5 * torch.erf(side / 2**0.5)).mean() for side in sides])
            output.loss = output.loss + WEIGHT * (expected - target).abs().mean()
            target = min(1.0, max(0.0, target + PACE * (wanted - left(model, specs)) / whole))

    model.register_forward_hook(penalize)


# -- cells -------------------------------------------------------------------------------------------------------------


def train(work: Workspace, blocks: float) -> None:
    """Run the cell, and measure the model that is left, as other runs are measured."""
    shutil.rmtree(work.run.result, ignore_errors=True)
    set_seed(work.config.seed)
    loaded = work.dense_model()
    model: Any = loaded.model
    goal = goal_of(loaded, override_light(LightConfig(), {"remove": {"blocks": blocks}}))
    specs = gate(model)
    whole = left(model, specs, -1.0)
    trained, wanted = sum(p.numel() for p in model.parameters() if p.requires_grad), whole - goal.removed
    steer(model, specs, wanted, whole)
    pipeline.train(without_cache(work), [], model)
    found = {"open": left(model, specs), "wanted": wanted, "threshold": threshold_of(model, specs, wanted)}
    remove_closed(model, specs, found["threshold"])
    numbers = report(work, model, goal)
    numbers["parameters"]["trained"] = trained
    write_json(work.run.metrics, {**numbers, "finegates": found})


def reopened(run: RunFolder, work: Workspace) -> Any:
    """The model of a finished cell."""
    model: Any = work.dense_model().model
    specs = gate(model)
    model.load_state_dict(load_file(run.result / "model.safetensors"))
    remove_closed(model, specs, read_json(run.metrics)["finegates"]["threshold"])
    return model


def per_cent(method: str) -> str:
    """The part of the blocks that a method removes, in per cent, by its name.

    Raises:
        LightPeftError: the name has no part.
    """
    found = next((word.rstrip("%,") for word in method.split() if "%" in word), "")
    require(
        found.isdigit() and 0 < int(found) < 100, f'method "{method}" says no per cent; name it as "FineGates, 60%"'
    )
    return found


def launch(run: Callable[..., str | None], cell: Cell, devices: int, log: Path) -> str | None:
    """Run a cell in a process of its own."""
    return run(cell, devices, log, ["finegates", "--cell", str(cell.run.path), per_cent(cell.method)])


def main(arguments: list[str] | None = None, run: Callable[..., str | None] = run_cell) -> int:
    """Run the cells; 0 if all went well, 1 if one failed, 2 on bad input."""
    words = sys.argv[1:] if arguments is None else arguments
    quiet_libraries()
    try:
        if words[:1] == ["--cell"]:
            train(pipeline.prepare(stored_config(Path(words[1]))), float(words[2]) / 100)
            return 0
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("grid", help='YAML file of a grid whose methods have names as "FineGates, 60%%"')
        parser.add_argument("--only", nargs="+", default=[], help="as of lightpeft reproduce")
        parser.add_argument("--out", help="folder of cells and results, as of lightpeft reproduce")
        given = parser.parse_args(words)
        quiet()
        grid = replace(load_grid(given.grid), command=publishing.command("finegates", words))
        for method in grid.arms:
            per_cent(method)
        results = reproduce(grid, given.out, given.only, devices=1, launch=partial(launch, run))
    except LightPeftError as error:
        publishing.say(f"finegates: {error}")
        return 2
    Console(width=160).print(markdown_table(results), markup=False)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
