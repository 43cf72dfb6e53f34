"""The results of `peers.py` as tables and plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plots
from matplotlib.figure import Figure
from peer_speeds import INFERENCE_BATCHES
from publishing import markdown_table


def markdown(results: dict[str, Any]) -> str:
    """Two tables: quality, sizes and times of the runs, and the alternating measurement of speed."""
    found: dict[str, dict[str, Any]] = results["methods"]
    several = any(method["seeds"] != results["seeds"] for method in found.values())
    runs = markdown_table(
        (
            "method",
            *(["seeds"] if several else []),
            f"{results['metric']}, %",
            "minus plain LoRA, points",
            "trained (head apart)",
            "removed of blocks",
            "of all",
            "end to end, s",
            "to LoRA's quality - 1 point, s",
            "saved, KiB",
        ),
        [_run_row(method, several) for method in found.values()],
    )
    speeds = markdown_table(
        ("method", "training samples/s", *(f"inference, batch {n}" for n in INFERENCE_BATCHES), "peak memory, MiB"),
        [_speed_row(method) for method in found.values() if method["speed"]],
    )
    machine = results["hardware"]
    note = (
        f"{len(results['seeds'])} seed(s), mean ± standard deviation; speeds are medians, in brackets the ratio to "
        "plain LoRA within rounds with its quartiles (methods are measured in groups: compare the ratios); "
        f"{machine['gpu'] or machine['cpu']}, "
        f"{machine['torch_threads']} thread(s)."
    )
    failed = "\n".join(f"- {what}: {why}" for what, why in results["failures"].items())
    return "\n\n".join(part for part in (runs, speeds, note, f"Failed:\n\n{failed}" if failed else "") if part)


def _run_row(method: dict[str, Any], with_seeds: bool) -> list[str]:
    sizes, goal = method["parameters"], method["seconds_to_quality"]
    return [
        method["label"],
        *([str(len(method["seeds"]))] if with_seeds else []),
        _mean(method["quality"], 100, 1),
        _mean(method["difference"], 100, 1, "+"),
        f"{sizes['trained']:,.0f} (+ {sizes['head']:,.0f})",
        f"{sizes['removed_of_blocks']:.1%}",
        f"{sizes['removed_of_all']:.1%}",
        _mean(method["seconds"], 1, 0),
        f"{_mean(goal, 1, 0)} ({goal['reached']}/{goal['of']})" if goal else "-",
        f"{method['adapter_bytes'] / 1024:,.0f}",
    ]


def _speed_row(method: dict[str, Any]) -> list[str]:
    speed = method["speed"]
    cells = [method["label"]]
    for what in ("training", *(f"inference_{size}" for size in INFERENCE_BATCHES)):
        of = speed[what]["ratio"]
        median = speed[what]["samples_per_second"]["median"]
        cells.append(f"{median:,.0f} ({of['median']:.2f}; {of['low']:.2f}-{of['high']:.2f})")
    return [*cells, f"{speed['peak_memory_bytes'] / 2**20:,.0f}"]


def _mean(values: Mapping[str, Any], factor: float, digits: int, sign: str = "") -> str:
    if values["mean"] is None:
        return "-"
    return f"{values['mean'] * factor:{sign}.{digits}f} ± {values['std'] * factor:.{digits}f}"


def plot(results: dict[str, Any]) -> Figure:
    """Quality against the time of a whole run, and against inference speed."""
    found: dict[str, dict[str, Any]] = results["methods"]
    by_time = [_point(method, *_around(method["seconds"])) for method in found.values()]
    size = INFERENCE_BATCHES[-1]
    by_speed = []
    for method in found.values():
        if method["speed"]:
            speed = method["speed"][f"inference_{size}"]["ratio"]
            by_speed.append(_point(method, speed["median"], (speed["low"], speed["high"])))
    quality = f"{results['metric']}, %"
    panels = [plots.Panel("a whole run, estimation included", "seconds (left is better)", quality, by_time)]
    if by_speed:
        label = "samples/s, plain LoRA = 1 (right is better)"
        panels.append(plots.Panel(f"inference, merged weights, batch {size}", label, quality, by_speed))
    seeds = f"{len(results['seeds'])} seed{'s' * (len(results['seeds']) > 1)}"
    meaning = "percent: removed parameters of the blocks\nbars: standard deviation, quartiles"
    title = f"{Path(results['config']).stem}, {seeds}\n{meaning}"
    return plots.scatter(panels, title)


def _around(values: Mapping[str, float]) -> tuple[float, tuple[float, float]]:
    return values["mean"], (values["mean"] - values["std"], values["mean"] + values["std"])


def _point(method: dict[str, Any], x: float, x_range: tuple[float, float]) -> plots.Point:
    y, y_range = _around({name: 100 * value for name, value in method["quality"].items()})
    removed = method["parameters"]["removed_of_blocks"]
    label = f"{method['label']}, {removed:.0%}" if removed else method["label"]
    return plots.Point(label, method["kind"], x, y, x_range, y_range)
