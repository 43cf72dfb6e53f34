"""How well ridge regression on a frozen block's states classifies test rows: a rival without training.

    python benchmarks/ridge.py configs/scale/classification.yaml --task sst2

For each model of a grid: its state at the last token of every row, after each block; scikit-learn's `RidgeClassifierCV`
on the standardized states of all training rows. The ridge and the block are those with the least squared error when
one training row at a time is left out, so test rows choose nothing. Prints the accuracy on them with a 95% interval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from publishing import markdown_table, report
from scipy.stats import binomtest
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lightpeft.app.cli.command import quiet
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reproduce import load_grid
from lightpeft.config import RunConfig
from lightpeft.errors import require
from lightpeft.machine import autocast_dtype
from lightpeft.prune.depth_probes import RIDGES, states_by_block


def configs_of(path: Path, task: str, models: Sequence[str] | None) -> dict[str, RunConfig]:
    """By model of a grid: its baseline's run on a task, with the first seed.

    Raises:
        LightPeftError: the grid has no such task or model.
    """
    grid = load_grid(path)
    require(task in grid.tasks, f"{path} has no task {task}; give one of {', '.join(grid.tasks)}")
    for model in models or ():
        require(model in grid.models, f"{path} has no model {model}; give some of {', '.join(grid.models)}")
    cells = [cell for cell in grid.cells(grid.folder()) if (cell.task, cell.method) == (task, grid.baseline)]
    return {c.model: c.config for c in cells if c.seed == grid.seeds[0] and (not models or c.model in models)}


def states_and_labels(config: RunConfig) -> list[tuple[list[Tensor], Tensor]]:
    """States of the training rows and of the test rows, a block, [rows, width], and their classes."""
    work = pipeline.prepare(config)
    model = work.dense_model().model
    halved = autocast_dtype(work.config.training)
    return [states_by_block(model, work.batches(rows), halved) for rows in (work.train_rows, work.test_rows)]


def ridge(config: RunConfig) -> dict[str, Any]:
    """Accuracy on the test rows with the chosen block, and what was measured at every block."""
    (states, labels), (test_states, truth) = states_and_labels(config)
    blocks = []
    for number, (of_block, of_test) in enumerate(zip(states, test_states, strict=True), 1):
        probe = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=RIDGES)).fit(of_block.numpy(), labels.numpy())
        regression = probe[-1]
        right = int((probe.predict(of_test.numpy()) == truth.numpy()).sum())
        error = -float(regression.best_score_)
        blocks.append({"block": number, "left_out_error": error, "ridge": float(regression.alpha_), "right": right})
    chosen = min(blocks, key=lambda block: block["left_out_error"])
    low, high = binomtest(chosen["right"], len(truth)).proportion_ci(method="wilson")
    return {
        "block": chosen["block"],
        "accuracy": chosen["right"] / len(truth),
        "interval": [low, high],
        "training_rows": len(labels),
        "test_rows": len(truth),
        "blocks": blocks,
    }


def markdown(results: dict[str, Any]) -> str:
    """One row a model."""
    rows = [
        [
            model,
            f"{of['block']} of {len(of['blocks'])}",
            f"{100 * of['accuracy']:.1f} ({100 * of['interval'][0]:.1f}-{100 * of['interval'][1]:.1f})",
            f"{of['training_rows']}",
            f"{of['test_rows']}",
        ]
        for model, of in results.items()
    ]
    return markdown_table(("", "block", "accuracy, %", "training rows", "test rows"), rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="ridge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="YAML file of a grid of decoders that classify")
    parser.add_argument("--task", required=True, help="task of the grid")
    parser.add_argument("--models", nargs="+", help="models of the grid; default: all")
    parser.add_argument("--out", type=Path, help="JSON file for every number")
    options = parser.parse_args(arguments)
    quiet()

    def found_all() -> dict[str, Any]:
        configs = configs_of(options.grid, options.task, options.models)
        return {"results": {model: ridge(config) for model, config in configs.items()}}

    return report("ridge", arguments, options.out, found_all, markdown)


if __name__ == "__main__":
    sys.exit(main())
