"""How deep a task has to be read: what a linear classifier makes of each block's output, before anything is trained.

    python benchmarks/depth_probe.py configs/movie_reviews/smollm2_depth.yaml

A hint for `light.depth`: blocks above the one from which on a classifier gains nothing may do nothing for the task. Of
some training rows, each block's output at the place that a head reads (decoders: the last token; encoders: the first)
goes into ridge regression on the labels; every row is judged by the classifier of all others, which has a closed form.
Prints and writes accuracy and squared error by block. Paths inside the config are relative to the current folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import publishing
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import set_seed

from lightpeft.cli.command import quiet
from lightpeft.config import load_config
from lightpeft.errors import LightPeftError, require
from lightpeft.files import write_json
from lightpeft.models.families import block_lists
from lightpeft.models.families.decoders import DECODERS
from lightpeft.models.task_heads import CLASSIFICATION
from lightpeft.profiling import hardware
from lightpeft.runs import pipeline
from lightpeft.runs.pipeline import Workspace

RIDGES = (1e1, 1e2, 1e3, 1e4, 1e5)
"""Strengths of the penalty that are tried on standardised states; each block has its best."""


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of a run that classifies")
    parser.add_argument("--rows", type=int, default=512, help="training rows that are looked at")
    publishing.add_option(parser)
    given = parser.parse_args(arguments)
    quiet()
    try:
        results = {**measure(given.config, given.rows), "command": publishing.command("depth_probe", arguments)}
        numbers = f"{given.config.stem}.depth_probe.json"
        write_json(Path("runs") / "depth_probe" / numbers, results)
        if given.write_readme:
            publishing.publish(f"depth_probe {given.config.stem}", markdown(results), numbers, results)
    except LightPeftError as error:
        publishing.say(f"depth_probe: {error}")
        return 2
    Console(width=200).print(markdown(results), markup=False)
    return 0


def measure(path: Path, count: int) -> dict[str, Any]:
    """What every block's output says about the labels of so many training rows."""
    config = load_config(path)
    set_seed(config.seed)
    work = pipeline.prepare(config)
    require(
        work.task.head == CLASSIFICATION,
        f"{path} does not classify; a linear classifier cannot say how deep it reads",
    )
    require(2 <= count <= len(work.train_rows), f"--rows is {count}; there are {len(work.train_rows)} training rows")
    states, labels = states_by_block(work, count)
    found = [probe(of_block, labels) for of_block in states]
    return {
        "config": str(path),
        "rows": count,
        "blocks": [{name: value for name, value in of_block.items() if name != "errors"} for of_block in found],
        "enough": enough([of_block["errors"] for of_block in found]),
        "hardware": hardware(),
        "settings": asdict(config),
    }


@torch.no_grad()
def states_by_block(work: Workspace, count: int) -> tuple[list[Tensor], Tensor]:
    """What a head would read after each block, [rows, width] each, and the labels, [rows]."""
    model = work.dense_model().model.eval()
    first = model.config.model_type not in {family.model_type for family in DECODERS}
    blocks = block_lists(model)[0]
    seen: list[list[Tensor]] = [[] for _ in blocks]
    labels = []
    chosen = torch.randperm(len(work.train_rows), generator=torch.Generator().manual_seed(work.config.seed))[:count]
    size = work.config.training.eval_batch_size
    for start in range(0, count, size):
        batch = work.collator(work.train_rows.select(chosen[start : start + size].tolist()).to_list())
        labels.append(batch.pop("labels"))
        places = place_of_head(batch["attention_mask"], first)
        handles = [block.register_forward_hook(_keep(at, places)) for block, at in zip(blocks, seen, strict=True)]
        model(**{name: values.to(model.device) for name, values in batch.items()})
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in seen], torch.cat(labels)


def place_of_head(mask: Tensor, first: bool) -> Tensor:
    """The first or the last real token of every row: [rows]."""
    order = torch.arange(mask.shape[1])
    return torch.where(mask.bool(), order, mask.shape[1]).amin(1) if first else (mask * order).amax(1)


def _keep(seen: list[Tensor], places: Tensor) -> Any:
    """Forward hook that keeps a block's output at one place a row; all of every block's would not fit into memory."""

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        seen.append(states[torch.arange(len(places)), places.to(states.device)].float().cpu())

    return hook


def probe(states: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy and squared errors of rows by classifiers that have not seen them.

    With K = X X^T of the standardised states, the fit is H Y, H = K (K + lambda I)^-1 + 1/n (a free intercept), and the
    error of row i without itself in the data is (Y - H Y)_i / (1 - H_ii).

    Args:
        states: [rows, width].
        labels: [rows], class numbers.
    """
    scaled = (states.double() - states.double().mean(0)) / states.double().std(0).clamp_min(1e-6)
    targets = nn.functional.one_hot(labels).double()
    products, identity, best = scaled @ scaled.T, torch.eye(len(scaled), dtype=torch.float64), None
    for ridge in RIDGES:
        fit = torch.linalg.solve(products + ridge * identity, products) + 1 / len(scaled)
        left = (targets - fit @ targets) / (1 - fit.diagonal()).unsqueeze(1)
        errors = left.square().sum(1)
        if best is None or errors.mean() < best["error"]:
            right = (targets - left).argmax(1) == labels
            best = {"accuracy": float(right.double().mean()), "error": float(errors.mean()), "errors": errors}
    assert best is not None
    return best


def enough(errors: list[Tensor]) -> int:
    """The least number of blocks whose squared error is within a standard error of the best one's, row by row."""
    best = min(range(len(errors)), key=lambda block: float(errors[block].mean()))
    for block, of_block in enumerate(errors[:best]):
        more = of_block - errors[best]
        if float(more.mean()) <= float(more.std()) / len(more) ** 0.5:
            return block + 1
    return best + 1


def markdown(results: Mapping[str, Any]) -> str:
    """One row a depth."""
    rows = [
        [str(number), f"{100 * block['accuracy']:.1f}", f"{block['error']:.3f}"]
        for number, block in enumerate(results["blocks"], 1)
    ]
    table = publishing.markdown_table(("blocks", "accuracy, %", "squared error"), rows)
    note = f"{results['rows']} training rows; within a standard error of the best from {results['enough']} blocks on."
    return f"{table}\n\n{note}"


if __name__ == "__main__":
    sys.exit(main())
