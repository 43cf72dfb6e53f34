"""The demo: fine-tune a real encoder on real data with plain LoRA and with lightpeft, and show them side by side.

Runs on the model and data that `demo/fetch.py` fetched. A second call goes on from where the first one stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightpeft.app.cli.command import quiet
from lightpeft.app.cli.tables import plain_name, plan_table
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


def comparison_table(plain: Mapping[str, Any], light: Mapping[str, Any], bench: Mapping[str, Any]) -> Table:
    """The whole comparison of two finished runs: quality, size and speed.

    Args:
        plain: metrics.json of a run with method plain.
        light: metrics.json of a run with method light.
        bench: bench.json.
    """
    kind = plain_name(plain["config"])
    table = Table(title=f"{kind} beside lightpeft", title_justify="left")
    for name in ("", kind, "lightpeft"):
        table.add_column(name, justify="left" if not name else "right")
    for name in ("accuracy", "f1", "loss"):
        if name in plain["metrics"]:
            table.add_row(name, f"{plain['metrics'][name]:.4f}", f"{light['metrics'][name]:.4f}")
    sizes = [report["parameters"] for report in (plain, light)]
    table.add_row("base parameters", *(f"{size['base']:,}" for size in sizes))
    table.add_row("base parameters removed", *(f"{size['base_removed_ratio']:.1%}" for size in sizes))
    table.add_row("trainable PEFT parameters", *(f"{size['peft']:,}" for size in sizes))
    table.add_row("trainable head parameters", *(f"{size['head']:,}" for size in sizes))
    subjects = [bench["subjects"][name] for name in ("plain", "light")]
    for key in ("training", "inference"):
        values = [subject[f"{key}_samples_per_second"]["median"] for subject in subjects]
        ratio = bench["ratios"][f"{key}_throughput"]["median"]
        table.add_row(f"{key} samples/s", f"{values[0]:.0f}", f"{values[1]:.0f} ({ratio:.2f}x)")
    table.add_row("peak training memory, MiB", *(f"{s['peak_memory_bytes'] / 2**20:.0f}" for s in subjects))
    for key, name in (("weights_bytes", "weights served, MiB"), ("peak_memory_bytes", "peak inference memory, MiB")):
        table.add_row(name, *(f"{subject['inference'][key] / 2**20:.0f}" for subject in subjects))
    table.add_row("saved adapter, KiB", *(f"{report['adapter_bytes'] / 1024:.0f}" for report in (plain, light)))
    times = [sum(report["seconds"].values()) for report in (plain, light)]
    table.add_row("training time, s (estimation included)", *(f"{value:.0f}" for value in times))
    return table


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
