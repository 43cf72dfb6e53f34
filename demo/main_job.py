"""The demo: fine-tune a real encoder on real data with plain LoRA and with lightpeft, and show them side by side.

Runs on the model and data that `demo/fetch.py` fetched. A second call goes on from where the first one stopped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lightpeft.app.cli.command import quiet
from lightpeft.app.cli.tables import comparison_table, plan_table
from lightpeft.app.runs.bench import bench
from lightpeft.app.runs.pipeline import run
from lightpeft.config import RunConfig, load_config
from lightpeft.errors import LightPeftError
from lightpeft.plans.records import PrunePlan

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "movie_reviews" / "minilm_default.yaml"


def main() -> None:
    """Run both methods, measure their speed in alternation, and print the plan and the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--epochs", type=float, default=3.0, help="passes over the training rows, for both methods")
    options.add_argument("--output", type=Path, default=ROOT / "runs" / "demo", help="folder of the two runs")
    given = options.parse_args()
    console = Console()
    quiet()
    try:
        reports = {method: run(_config(method, given.epochs, given.output)) for method in ("plain", "light")}
        speeds = bench(_config("light", given.epochs, given.output), rounds=3, steps=10)
    except LightPeftError as error:
        sys.exit(f"lightpeft: {error}")
    console.print(plan_table(PrunePlan.load(given.output / "light" / "plan.json")))
    console.print(comparison_table(reports["plain"], reports["light"], speeds))
    console.print(f"light adapter: {given.output / 'light' / 'adapter'}", markup=False, soft_wrap=True)


def _config(method: str, epochs: float, output: Path) -> RunConfig:
    config = load_config(CONFIG)
    return replace(
        config,
        method=method,  # type: ignore[arg-type]
        output=str(output / method),
        model=replace(config.model, name=str(ROOT / config.model.name)),
        data=replace(config.data, train=str(ROOT / config.data.train), test=str(ROOT / str(config.data.test))),
        training=replace(config.training, epochs=epochs),
    )


if __name__ == "__main__":
    main()
