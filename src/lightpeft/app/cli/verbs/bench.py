"""`lightpeft bench`."""

from __future__ import annotations

from typing import Any

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.settings import run_config
from lightpeft.app.cli.verbs.verb import Verb


def _bench(given: dict[str, Any], **options: Any) -> None:
    from lightpeft.app.cli.tables import bench_table
    from lightpeft.app.runs.bench import bench

    screen.print(bench_table(bench(run_config(given), **options)))


BENCH = Verb(
    "bench",
    "Measure plain LoRA beside the light model: speed, memory, FLOPs; alternating, with spread.",
    _bench,
    options=(
        Option("--rounds", "Alternations of plain LoRA and light.", type=int, default=3),
        Option("--steps", "Batches a round, training and inference each.", type=int, default=10),
        Option("--json", "Where the result goes (default: bench.json in the run folder)."),
    ),
    on_runs=True,
)
