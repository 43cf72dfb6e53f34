"""Where the time of a training step goes: products of matrices, which FLOPs count, and all else; plain LoRA and light.

    python benchmarks/products.py --sizes 30M 100M

The models are those of scaling.py, in float32. Times are a profiler's, of operators on the CPU; what Python does
between them is not in it. Prints and writes seconds of a step by part, and how much less the light model needs.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from publishing import add_option, command, markdown_table, publish, spread_text
from rich.console import Console
from scaling import SIZES, shape_of
from synthetic import FAMILIES, Case, Synthetic

from lightpeft.app.cli.command import quiet
from lightpeft.app.runs.workers import Worker
from lightpeft.config import preset_light
from lightpeft.files import write_json
from lightpeft.profiling import alternate, hardware, ratio, summarize

PARTS = {"products": "products", "else": "all else"}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["30M", "100M"], metavar="SIZE")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--batch", type=int, default=8, help="rows a batch")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of plain and light")
    parser.add_argument("--out", type=Path, default=Path("runs/products.json"), help="JSON file")
    add_option(parser)
    given = parser.parse_args(arguments)
    quiet()
    light = preset_light("default", length=2)
    shapes = [shape_of(family, size) for family in given.families for size in given.sizes]
    cases = [measure(Case(shape, given.batch, given.length, 1, light), given.rounds) for shape in shapes]
    results = {"cases": cases, "hardware": hardware(), "command": command("products", arguments)}
    write_json(given.out, results)
    if given.write_readme:
        publish("products", markdown(cases), "products.json", results)
    Console(width=120).print(markdown(cases), markup=False)
    return 0


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of both parts in alternating rounds, and the ratios of plain to light within them."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(Synthetic, name, case)) for name in ("plain", "light")}
        flops = {name: worker.measure("fixed")["flops"]["training"] for name, worker in workers.items()}
        measured = alternate({name: partial(worker.measure, "parts") for name, worker in workers.items()}, rounds)
    values = {part: {name: [of[part] for of in rows] for name, rows in measured.items()} for part in PARTS}
    return {
        "case": asdict(case),
        "ideal": flops["plain"] / flops["light"],
        "seconds": {p: {name: asdict(summarize(v)) for name, v in of.items()} for p, of in values.items()},
        "ratio": {part: asdict(ratio(of["plain"], of["light"])) for part, of in values.items()},
        "values": values,
    }


def markdown(cases: list[dict[str, Any]]) -> str:
    """One row a model."""
    header = ["model"]
    for part, label in PARTS.items():
        header += [f"{label}: plain, s", "light, s", "plain / light", *(["by FLOPs"] if part == "products" else [])]
    return markdown_table(header, [_row(case) for case in cases])


def _row(case: dict[str, Any]) -> list[str]:
    cells = [case["case"]["shape"]["name"]]
    for part in PARTS:
        cells += [f"{case['seconds'][part][name]['median']:.3f}" for name in ("plain", "light")]
        cells += [spread_text(case["ratio"][part]), *([f"{case['ideal']:.2f}"] if part == "products" else [])]
    return cells


if __name__ == "__main__":
    sys.exit(main())
