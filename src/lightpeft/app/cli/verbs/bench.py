"""`lightpeft bench`."""

from __future__ import annotations

from typing import Any

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.settings import run_config
from lightpeft.app.cli.verbs.verb import Verb


def _bench(given: dict[str, Any], **options: Any) -> None:
    from lightpeft.app.cli.tables import bench_table
    from lightpeft.app.runs.bench import Stopped, bench

    try:
        report = bench(run_config(given), **options)
    except Stopped as stop:
        if stop.report:
            screen.print(bench_table(stop.report))
        raise
    screen.print(bench_table(report))


BENCH = Verb(
    "bench",
    "Measure speed, memory and FLOPs of plain LoRA and the light model in alternating rounds.",
    _bench,
    options=(
        Option("--rounds", "Rounds: each measures plain LoRA, then light.", type=int, default=3),
        Option("--steps", "Training batches, and inference batches, of each round.", type=int, default=10),
        Option("--json", "JSON file for the result (default: bench.json in the run folder)."),
    ),
    on_runs=True,
)
