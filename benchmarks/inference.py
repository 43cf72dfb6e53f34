"""Inference with PEFT merged into the weights and beside them, one row and 32 at a time: plain beside light.

    python benchmarks/inference.py configs/movie_reviews/minilm_default.yaml

In alternation. The run is estimated and pruned first; speed does not depend on what its weights have learned. Prints
and writes samples/s and, of decoders, the size of the KV cache. Paths inside the config are relative to the current
folder.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import subjects
from publishing import markdown_table, spread_text

from lightpeft.app.runs.subject import Subject
from lightpeft.app.runs.workers import Worker
from lightpeft.config import RunConfig
from lightpeft.profiling.comparing import alternate, ratio, summarize
from lightpeft.profiling.surroundings import hardware

BATCHES = (1, 32)
"""Rows at a time."""
KINDS = {
    "plain, merged": ("plain", "merged"),
    "plain, unmerged": ("plain", "beside"),
    "light, merged": ("light", "merged"),
    "light, unmerged": ("light", "beside"),
    "light, unmerged, in few steps": ("light", "fused"),
}
"""By name: the subject, and how it has its PEFT (`Subject.inference`); the first is what the others are compared with.
"""


def subjects_of(config: RunConfig) -> subjects.Subjects:
    """Plain PEFT and the pruned model of one run."""
    run = subjects.pruned(config, Path("runs") / "inference" / Path(config.output).name)
    return {name: (subject, run) for name, (subject, _) in KINDS.items()}


def measure(found: subjects.Subjects, rounds: int, steps: int) -> dict[str, Any]:
    """Inference samples/s by round and rows at a time, and the KV cache, of all subjects."""
    first = next(iter(found))
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(Subject, *what, steps)) for name, what in found.items()}
        caches = {name: worker.measure("fixed")["kv_cache_bytes_per_token"] for name, worker in workers.items()}
        values = {}
        for size in BATCHES:
            calls = {n: partial(worker.measure, "inference", size, KINDS[n][1]) for n, worker in workers.items()}
            values[size] = alternate(calls, rounds)
    return {
        "samples_per_second": {
            size: {n: asdict(summarize(speeds)) for n, speeds in of.items()} for size, of in values.items()
        },
        "speed_ratio": {
            size: {n: asdict(ratio(speeds, of[first])) for n, speeds in of.items()} for size, of in values.items()
        },
        "kv_cache_bytes_per_token": caches,
        "values": values,
        "hardware": hardware(),
        "config": asdict(found[first][1]),
    }


def markdown(results: dict[str, Any]) -> str:
    """One row a subject, beside the first."""
    speeds, ratios, caches = (results[key] for key in ("samples_per_second", "speed_ratio", "kv_cache_bytes_per_token"))
    one, many = BATCHES
    rows = []
    for name in speeds[one]:
        row = [name, f"{1e3 / speeds[one][name]['median']:.1f}", spread_text(ratios[one][name])]
        row += [f"{speeds[many][name]['median']:,.0f}", spread_text(ratios[many][name])]
        rows.append(row if caches[name] is None else [*row, f"{caches[name] / 1024:.1f}"])
    header = ("", "one row, ms", "speed", f"batches of {many}, samples/s", "speed", "KV cache, KiB a token")
    return markdown_table(header[: len(rows[0])], rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    return subjects.main("inference", __doc__ or "", subjects_of, arguments, measure, markdown)


if __name__ == "__main__":
    sys.exit(main())
