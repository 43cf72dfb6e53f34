"""Step time and memory against model size and sequence length: plain LoRA and light, with the line FLOPs promise.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --sizes 10M 100M 1B --lengths 128 512 2048 --at 100M

RoBERTa- and Llama-shaped models with random weights. The dashed line is plain LoRA's time times the part of the FLOPs
that the light model still needs (`profiling.count_flops`). Finished cases are kept in the output folder and not
repeated; one that does not fit into memory is reported and left out. Writes scaling.results.json and scaling.png/.svg.
What was published before (`--write-readme`) stays where it is not measured again; every case names its hardware.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plots
import psutil
from matplotlib.figure import Figure
from publishing import add_option, beside, command, markdown_table, publish, say, spread_text
from rich.console import Console
from synthetic import FAMILIES, Case, Shape, measure

from lightpeft.app.cli.command import quiet
from lightpeft.config import preset_light
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, write_json
from lightpeft.profiling import hardware

SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (32, 2, 4),
    "10M": (384, 6, 6),
    "30M": (512, 10, 8),
    "100M": (768, 14, 12),
    "300M": (1024, 24, 16),
    "1B": (2048, 20, 32),
    "1.5B": (2048, 30, 32),
    "3B": (3072, 27, 48),
    "7B": (4096, 34, 64),
}
"""Parameters of the blocks -> hidden size, layers, heads; a head has 64 channels or fewer."""
RESULTS = "scaling.results.json"
VOCABULARY = 8192
"""Small, so that blocks and not embeddings are what grows."""
NAMES = {"plain": "plain LoRA", "light": "light", "ideal": "ideal, by FLOPs"}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 1 if a case failed, 2 on bad input."""
    given = _parser().parse_args(arguments)
    quiet()
    try:
        require(given.rounds >= 1 and given.steps >= 1, "--rounds and --steps start at 1")
        found, failures = _measure_all(given)
        require(found, f"no case could be measured: {'; '.join(failures.values())}")
        made = command("scaling", arguments)
        write_json(given.out / RESULTS, {"cases": found, "failures": failures, "command": made})
        plots.save(_figure(found, given.at, given.length), given.out / "scaling")
        if given.write_readme:
            _publish(found, given.at, given.length, made)
    except LightPeftError as error:
        say(f"scaling: {error}")
        return 2
    Console(width=160).print(_table(found), markup=False)
    return 1 if failures else 0


def _publish(found: Sequence[dict[str, Any]], at: str, length: int, made: str) -> None:
    """Cases, table and plot beside README.md and in it, with the cases published before that are not among these."""
    published = read_json(beside(RESULTS))["cases"] if beside(RESULTS).is_file() else []
    cases = sorted({_key(case): case for case in (*published, *found)}.values(), key=_key)
    png, svg = plots.save(_figure(cases, at, length), beside("scaling"))
    svg.unlink()
    text = f"![step time and memory against size and length]({png.name})\n\n{_table(cases)}"
    publish("scaling", text, RESULTS, {"cases": cases, "command": made})


def _key(result: dict[str, Any]) -> tuple[str, float, int]:
    """What tells cases apart, and their order: family, size, tokens a row."""
    return result["case"]["shape"]["family"], _blocks(result), result["case"]["length"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["10M", "30M", "100M"], metavar="SIZE")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512], help="tokens a row, at one size")
    parser.add_argument("--at", choices=SIZES, default="30M", help="size for the lengths")
    parser.add_argument("--length", type=int, default=128, help="tokens a row for the sizes")
    parser.add_argument("--batch", type=int, default=8, help="rows a batch")
    parser.add_argument("--rounds", type=int, default=3, help="alternations of plain and light")
    parser.add_argument("--steps", type=int, default=3, help="batches a round")
    parser.add_argument("--preset", default="default", help="lightpeft preset that sets the budget")
    parser.add_argument("--blocks", type=float, help="part of the blocks to cut, in place of the preset's")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights and autocast")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    add_option(parser)
    return parser


def shape_of(family: str, size: str) -> Shape:
    """A shape of about so many parameters in the blocks: 12 hidden² a layer in both families."""
    hidden, layers, heads = SIZES[size]
    llama = family == "llama"
    ffn = hidden * 8 // 3 // 8 * 8 if llama else 4 * hidden
    kv_heads = heads // 2 if llama else heads
    return Shape(f"{family} {size}", "llama" if llama else "roberta", hidden, layers, heads, kv_heads, ffn, VOCABULARY)


def _cases(given: argparse.Namespace) -> list[Case]:
    pairs = dict.fromkeys(
        [(size, given.length) for size in given.sizes] + [(given.at, length) for length in given.lengths]
    )
    part = {} if given.blocks is None else {"blocks": given.blocks}
    light = preset_light(given.preset, length=2, **part)
    return [
        Case(shape_of(family, size), given.batch, length, given.steps, light, bf16=given.bf16)
        for family in given.families
        for size, length in pairs
    ]


def _measure_all(given: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The finished cases, from smaller to larger, and why others are missing."""
    found, failures = [], {}
    for case in sorted(_cases(given), key=lambda case: (case.shape.family, case.shape.parameters, case.length)):
        name = f"{case.shape.name}, {case.length} tokens"
        path = given.out / "cases" / f"{case.shape.name.replace(' ', '-')}-{case.length}.json"
        try:
            found.append(_finished(path, case, given.rounds) or _measure(path, case, given.rounds, name))
        except LightPeftError as error:
            failures[name] = str(error)
            say(f"{name}: {error}")
    return found, failures


def _finished(path: Path, case: Case, rounds: int) -> dict[str, Any] | None:
    """What was measured before with the same settings, or None."""
    if not path.is_file():
        return None
    result = read_json(path)
    same = result["case"] == json.loads(json.dumps(asdict(case))) and result["rounds"] == rounds
    return result if same else None


def _measure(path: Path, case: Case, rounds: int, name: str) -> dict[str, Any]:
    needed = 2 * case.shape.parameters * (2 if case.bf16 else 4)
    there = psutil.virtual_memory().available
    require(needed < there, f"the weights of two models take {needed >> 20:,} MiB of {there >> 20:,} that are free")
    say(f"measuring {name}")
    result = {**measure(case, ("plain", "light"), rounds), "hardware": hardware()}
    write_json(path, result)
    return result


# -- table and plot ------------------------------------------------------------------------------------------------


def _table(found: Sequence[dict[str, Any]]) -> str:
    header = ("model", "tokens a row", "removed", "plain, s a step", "light, s a step", "speed-up", "ideal", "memory")
    return markdown_table(header, [_row(result) for result in found])


def _row(result: dict[str, Any]) -> list[str]:
    plain, light = (result["subjects"][name] for name in ("plain", "light"))
    return [
        result["case"]["shape"]["name"],
        str(result["case"]["length"]),
        f"{light['removed_ratio']:.1%}",
        *(f"{subject['training_seconds']['median']:.3f}" for subject in (plain, light)),
        spread_text(light["training_speedup"]),
        f"{result['ideal']['training']:.2f}",
        f"{light['peak_memory_bytes'] / plain['peak_memory_bytes']:.2f}",
    ]


def _figure(found: Sequence[dict[str, Any]], at: str, length: int) -> Figure:
    rows = []
    for family in FAMILIES:
        of_family = [result for result in found if result["case"]["shape"]["family"] == family]
        by_size = [result for result in of_family if result["case"]["length"] == length]
        by_length = [result for result in of_family if result["case"]["shape"]["name"] == f"{family} {at}"]
        panels = []
        for results, axis in ((by_size, "size"), (by_length, "length")):
            if results:
                where = f"{family}, {length} tokens" if axis == "size" else f"{family}, {at}"
                panels += [_panel(results, axis, what, where) for what in ("time", "memory")]
        if panels:
            rows.append(panels)
    return plots.curves(rows, "plain LoRA and light against model size and sequence length; bands: quartiles")


def _panel(results: Sequence[dict[str, Any]], axis: str, what: str, where: str) -> plots.LinePanel:
    series: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in ("plain", "light")}
    if what == "time":
        series["ideal"] = []
    for result in results:
        x = _blocks(result) if axis == "size" else result["case"]["length"]
        for name, subject in result["subjects"].items():
            time, memory = subject["training_seconds"], subject["peak_memory_bytes"] / 2**20
            values = (time["median"], time["low"], time["high"]) if what == "time" else (memory, memory, memory)
            series[name].append((x, *values))
        if what == "time":
            ideal = result["subjects"]["plain"]["training_seconds"]["median"] / result["ideal"]["training"]
            series["ideal"].append((x, ideal, ideal, ideal))
    return plots.LinePanel(
        title=where,
        x_label="parameters of the dense model" if axis == "size" else "tokens a row",
        y_label="seconds a training step" if what == "time" else "peak training memory, MiB",
        series=series,
        names=NAMES,
        x_text=_millions if axis == "size" else lambda value: f"{value:g}",
    )


def _blocks(result: dict[str, Any]) -> float:
    return float(result["subjects"]["plain"]["base_parameters"])


def _millions(value: float) -> str:
    return f"{value / 1e9:.1f}B" if value >= 1e9 else f"{value / 1e6:.3g}M"


if __name__ == "__main__":
    sys.exit(main())
