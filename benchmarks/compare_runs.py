"""Plain PEFT beside lightpeft on one config, over seeds: quality, parameters, speed and memory, in one JSON file.

    python benchmarks/compare_runs.py configs/movie_reviews/minilm_lora.yaml --seeds 0 1 2

Runs both methods for every seed (finished runs are not repeated), then `bench` on the first seed's light run; writes
<config>.results.json and the runs' logs beside the config. Paths inside the config are relative to the current folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lightpeft.bench import bench
from lightpeft.cli import quiet
from lightpeft.config import RunConfig, load_config
from lightpeft.errors import LightPeftError
from lightpeft.pipeline import run
from lightpeft.records import write_json
from lightpeft.tables import comparison_table

METHODS = ("plain", "light")


def main() -> None:
    """Run, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=7, help="alternations of the speed measurement; 0: none")
    parser.add_argument("--steps", type=int, default=12, help="batches a round")
    given = parser.parse_args()
    quiet()
    config = load_config(given.config)
    try:
        reports = {method: [run(seeded(config, method, seed)) for seed in given.seeds] for method in METHODS}
        speeds = bench(seeded(config, "light", given.seeds[0]), given.rounds, given.steps) if given.rounds else None
    except LightPeftError as error:
        sys.exit(f"lightpeft: {error}")
    results = given.config.with_suffix(".results.json")
    write_json(results, summary(reports, speeds))
    keep_logs(config, given.seeds, given.config.with_suffix(".logs"))
    if speeds:
        Console().print(comparison_table(reports["plain"][0], reports["light"][0], speeds))
    Console().print(json.dumps(json.loads(results.read_text())["quality"], indent=1), markup=False)


def seeded(config: RunConfig, method: str, seed: int) -> RunConfig:
    """The run of one method and seed, in a folder of its own."""
    return replace(config, method=method, seed=seed, output=f"{config.output}/{method}-{seed}")  # type: ignore[arg-type]


def summary(reports: dict[str, list[dict[str, Any]]], speeds: dict[str, Any] | None) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each metric, every seed's report, and the speed measurement if any."""
    quality = {
        method: {name: spread([report["metrics"][name] for report in of_method]) for name in of_method[0]["metrics"]}
        for method, of_method in reports.items()
    }
    accuracy = [[report["metrics"]["accuracy"] for report in reports[method]] for method in METHODS]
    differences = [light - plain for plain, light in zip(*accuracy, strict=True)]
    first = reports["light"][0]
    return {
        "quality": {**quality, "accuracy_light_minus_plain": spread(differences)},
        "parameters": {method: [report["parameters"] for report in of_method] for method, of_method in reports.items()},
        "adapter_bytes": {method: [r["adapter_bytes"] for r in of_method] for method, of_method in reports.items()},
        "seconds": {method: [report["seconds"] for report in of_method] for method, of_method in reports.items()},
        "seeds": [report["seed"] for report in reports["light"]],
        "metrics": {method: [report["metrics"] for report in of_method] for method, of_method in reports.items()},
        "bench": {name: value for name, value in (speeds or {}).items() if name not in ("config", "schema_version")},
        "hardware": first["hardware"],
        "config": first["config"],
    }


def spread(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def keep_logs(config: RunConfig, seeds: list[int], folder: Path) -> None:
    """Copy every run's log next to the results."""
    folder.mkdir(exist_ok=True)
    for method in METHODS:
        for seed in seeds:
            shutil.copy(Path(seeded(config, method, seed).output) / "log.jsonl", folder / f"{method}-{seed}.jsonl")


if __name__ == "__main__":
    main()
