"""PyTorch's attention for CPUs beside plain matrix products, forward and backward: what SHORT_ROWS comes from.

    python benchmarks/attention.py

Rows with padding, as in training on sentences, without dropout. Prints and writes milliseconds by data type and length.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from publishing import add_option, command, markdown_table, publish, spread_text
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lightpeft.files import write_json
from lightpeft.profiling import alternate, hardware, ratio, summarize

KERNELS = {"PyTorch's": SDPBackend.FLASH_ATTENTION, "plain products": SDPBackend.MATH}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 48, 64, 96, 128], help="tokens a row")
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 12], help="attention heads")
    parser.add_argument("--head-dim", type=int, default=32, help="channels a head")
    parser.add_argument("--rows", type=int, default=32, help="rows a batch")
    parser.add_argument("--rounds", type=int, default=15, help="alternations")
    parser.add_argument("--out", type=Path, default=Path("runs/attention.json"), help="JSON file")
    add_option(parser)
    given = parser.parse_args(arguments)
    cases = [
        measure(dtype, heads, length, given.head_dim, given.rows, given.rounds)
        for dtype in (torch.bfloat16, torch.float32)
        for heads in given.heads
        for length in given.lengths
    ]
    results = {"cases": cases, "rows": given.rows, "head_dim": given.head_dim, "hardware": hardware()}
    results |= {"command": command("attention", arguments)}
    write_json(given.out, results)
    if given.write_readme:
        publish("attention", markdown(cases), "attention.json", results)
    Console(width=120).print(markdown(cases), markup=False)
    return 0


def measure(dtype: torch.dtype, heads: int, length: int, head_dim: int, rows: int, rounds: int) -> dict[str, Any]:
    """Seconds of a forward and backward pass of both kernels, in alternation."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, rows, heads, length, head_dim, dtype=dtype).unbind()
    for states in (query, key, value):
        states.requires_grad_()
    mask = (torch.arange(length) < torch.linspace(length / 2, length, rows)[:, None])[:, None, None, :]

    def seconds(kernel: SDPBackend) -> float:
        started = time.perf_counter()
        with sdpa_kernel(kernel):
            scaled_dot_product_attention(query, key, value, mask.expand(-1, 1, length, -1)).sum().backward()
        return time.perf_counter() - started

    calls = {name: partial(seconds, kernel) for name, kernel in KERNELS.items()}
    for call in calls.values():  # the first call compiles and allocates
        call()
    values = alternate(calls, rounds)
    own, plain = (values[name] for name in KERNELS)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "heads": heads,
        "length": length,
        "seconds": {name: asdict(summarize(of)) for name, of in values.items()},
        "ratio": asdict(ratio(plain, own)),
    }


def markdown(cases: list[dict[str, Any]]) -> str:
    """One row a case."""
    rows = [
        [
            f"{case['dtype']}, {case['heads']} heads, {case['length']} tokens",
            *(f"{case['seconds'][name]['median'] * 1000:.2f}" for name in KERNELS),
            spread_text(case["ratio"]),
        ]
        for case in cases
    ]
    return markdown_table(("", *(f"{name}, ms" for name in KERNELS), "plain / PyTorch's"), rows)


if __name__ == "__main__":
    sys.exit(main())
