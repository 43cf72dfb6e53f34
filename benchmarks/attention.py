"""Attention in bfloat16 on a CPU, forward and backward: PyTorch's kernel, and the way back by plain products.

    python benchmarks/attention.py

Rows with padding, as in training on sentences, without dropout. Prints and writes milliseconds by heads and length:
what LONGEST comes from.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from publishing import add_option, command, markdown_table, publish, spread_text
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from lightpeft.files import write_json
from lightpeft.profiling import alternate, hardware, ratio, summarize
from lightpeft.training import attention
from lightpeft.training.attention import ByProducts

WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {"PyTorch's": nullcontext, "back by products": ByProducts}
SHAPES = ["4x32", "12x32", "9x64"]
LENGTHS = [16, 32, 64, 128, 256, 512, 1024]
MOST_ROWS, MOST_TOKENS = 32, 4096
"""Of a batch."""


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens a row")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="HEADSxCHANNELS", help="heads and their width")
    parser.add_argument("--rounds", type=int, default=15, help="alternations")
    parser.add_argument("--out", type=Path, default=Path("runs/attention.json"), help="JSON file")
    add_option(parser)
    given = parser.parse_args(arguments)
    shapes = [[int(number) for number in shape.split("x")] for shape in given.shapes]
    attention.LONGEST = max(given.lengths)  # beyond it as well
    cases = [measure(heads, dim, length, given.rounds) for heads, dim in shapes for length in given.lengths]
    results = {"cases": cases, "hardware": hardware(), "command": command("attention", arguments)}
    write_json(given.out, results)
    if given.write_readme:
        publish("attention", markdown(cases), "attention.json", results)
    Console(width=120).print(markdown(cases), markup=False)
    return 0


def measure(heads: int, head_dim: int, length: int, rounds: int) -> dict[str, Any]:
    """Seconds of a forward and backward pass in both ways, in alternation."""
    torch.manual_seed(0)
    rows = min(MOST_ROWS, MOST_TOKENS // length)
    query, key, value = torch.randn(3, rows, length, heads, head_dim, dtype=torch.bfloat16).transpose(2, 3).unbind()
    for states in (query, key, value):
        states.requires_grad_()
    mask = (torch.arange(length) < torch.linspace(length / 2, length, rows)[:, None])[:, None, None, :]
    mask = mask.expand(-1, 1, length, -1)  # as transformers gives it
    gradient = torch.randn_like(query)

    def seconds(way: Callable[[], AbstractContextManager[Any]]) -> float:
        started = time.perf_counter()
        with way():
            scaled_dot_product_attention(query, key, value, mask).backward(gradient)
        return time.perf_counter() - started

    calls = {name: partial(seconds, way) for name, way in WAYS.items()}
    for call in calls.values():  # the first call compiles and allocates
        call()
    values = alternate(calls, rounds)
    own, products = (values[name] for name in WAYS)
    return {
        "heads": heads,
        "head_dim": head_dim,
        "rows": rows,
        "length": length,
        "seconds": {name: asdict(summarize(of)) for name, of in values.items()},
        "ratio": asdict(ratio(products, own)),
    }


def markdown(cases: list[dict[str, Any]]) -> str:
    """One row a case."""
    rows = [
        [
            f"{case['heads']} heads of {case['head_dim']}, {case['rows']} rows of {case['length']} tokens",
            *(f"{case['seconds'][name]['median'] * 1000:.1f}" for name in WAYS),
            spread_text(case["ratio"]),
        ]
        for case in cases
    ]
    return markdown_table(("", *(f"{name}, ms" for name in WAYS), "of PyTorch's"), rows)


if __name__ == "__main__":
    sys.exit(main())
