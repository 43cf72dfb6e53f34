"""What `lightpeft bench` left in a run's folder, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightpeft.app.runs.report.words import duration, size
from lightpeft.config.validation import from_dict
from lightpeft.files import read_json, understandable


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One measure of plain PEFT, and of the light model beside it."""

    name: str
    plain: str
    light: str
    ratio: float
    """Light over plain."""
    quartiles: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """All of them."""

    rounds: int
    """Alternations that the medians and quartiles are over."""
    of_rounds: int
    """That were asked for."""
    rows: list[SpeedRow]


def read_speeds(path: Path) -> Speeds:
    """Those of a bench.json.

    Raises:
        LightPeftError: it is damaged, or says something else.
    """
    found = read_json(path)
    with understandable(path):
        rounds = {name: found[name] for name in ("rounds", "of_rounds")}
        return from_dict(Speeds, rounds | {"rows": speed_rows(found)})


def speed_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Fields of `SpeedRow`, measure by measure, of what `bench` gives."""
    subjects, ratios, whole = found["subjects"], found["ratios"], found["end_to_end"]
    both = [subjects[name] for name in ("plain", "light")]
    rows: list[dict[str, Any]] = []

    def add(name: str, values: Iterable[float], form: Callable[[float], str], ratio: float, **more: Any) -> None:
        plain, light = map(form, values)
        rows.append({"name": name, "plain": plain, "light": light, "ratio": ratio, **more})

    for what in ("training", "inference"):
        spread, medians = ratios[f"{what}_throughput"], [of[f"{what}_samples_per_second"]["median"] for of in both]
        add(f"{what} samples/s", medians, _fine, spread["median"], quartiles=[spread["low"], spread["high"]])
    add("training memory", [of["peak_memory_bytes"] for of in both], size, ratios["peak_memory"])
    for name, key in (("weights served", "weights_bytes"), ("inference memory", "peak_memory_bytes")):
        served = [of["inference"][key] for of in both]
        add(name, served, size, served[1] / served[0])
    for what, key in (("training", "training"), ("inference", "forward")):
        flops = [of["flops"][key] / 1e9 for of in both]
        add(f"{what} GFLOP", flops, _fine, flops[1] / flops[0])
    caches = [of.get("kv_cache_bytes_per_token") for of in both]
    if None not in caches:
        add("KV cache a token", caches, size, caches[1] / caches[0])
    seconds = [whole[f"{name}_seconds"] for name in ("plain", "light")]
    add("whole run", seconds, duration, whole["light_over_plain"])
    return rows


def _fine(value: float) -> str:
    return f"{value:,.1f}"
