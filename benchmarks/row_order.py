"""How much faster does a model answer rows that are sorted by length (as `predict` and `evaluate` do)?

    OMP_NUM_THREADS=1 python benchmarks/row_order.py configs/movie_reviews/minilm_default.yaml

The dense model of a run answers test rows in batches of 32, each padded to its longest row: sorted by length, and in
their own order. Both in one process, in alternation; seconds are the processor's, of one thread, so that other programs
hardly count. Texts are the run's own, and uneven ones, where each eighth is twelve of them in one. What the weights
have learned does not change the speed.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from publishing import markdown_table, report, spread_text
from torch import Tensor

from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.runs import pipeline
from lightpeft.config import RunConfig, load_config
from lightpeft.errors import require
from lightpeft.models.loading import quiet_libraries
from lightpeft.profiling.comparing import alternate, ratio, summarize

BATCH = 32
EVERY, JOINED = 8, 12
"""Each eighth text is twelve in one."""
ORDERS = ("sorted", "as they are")


def measure(config: RunConfig, rows: int, longest: int, rounds: int) -> dict[str, Any]:
    """Rows/s by kind of texts and order."""
    torch.set_num_threads(1)
    texts = [str(text) for text in pipeline.prepare(config).task.test["text"]]
    require(len(texts) >= rows, f"{config.output} has {len(texts)} test rows; ask for no more: --rows")
    kinds = {"the run's own": texts[:rows], "uneven": list(uneven(texts, rows))}
    return {name: compare(config, kind, longest, rounds) for name, kind in kinds.items()}


def uneven(texts: Sequence[str], rows: int) -> Iterator[str]:
    """As many texts, of which some are several in one."""
    for place in range(rows):
        many = JOINED if place % EVERY == EVERY - 1 else 1
        yield " ".join(texts[(place + more) % len(texts)] for more in range(many))


def compare(config: RunConfig, texts: Sequence[str], longest: int, rounds: int) -> dict[str, Any]:
    """Rows/s in both orders, tokens in a batch, and how far the answers differ."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "texts.csv"
        label = next(iter(pipeline.prepare(config).task.test["label"]))
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *((text, label) for text in texts)])
        work = pipeline.prepare(replace(config, data=replace(config.data, test=str(path), max_length=longest)))
        model = work.dense_model().model
        encoded = work.test_rows
        # Rows of equal lengths stay in their order.
        orders = {ORDERS[0]: encoded, ORDERS[1]: as_equals(encoded)}
        respondent = BatchedModel(model, work.collator, BATCH)
        answers = {name: logits(respondent, of) for name, of in orders.items()}
        values = alternate({name: partial(speed, respondent, of) for name, of in orders.items()}, rounds)
    first, second = (answers[name] for name in ORDERS)
    lengths = torch.tensor(encoded["length"][:], dtype=torch.float64)
    return {
        "rows": len(texts),
        "tokens": {"median": float(lengths.median()), "mean": float(lengths.mean()), "most": int(lengths.max())},
        "rows_per_second": {name: asdict(summarize(of)) for name, of in values.items()},
        "speed_ratio": asdict(ratio(*(values[name] for name in ORDERS))),
        "largest_difference": float((first - second).abs().max()),
        "same_classes": int((first.argmax(-1) == second.argmax(-1)).sum()),
        "values": values,
    }


def as_equals(encoded: Dataset) -> Dataset:
    """The same rows, whose lengths are said to be equal: the longest."""
    longest = max(encoded["length"][:])
    return encoded.remove_columns("length").add_column("length", [longest] * len(encoded))


def logits(respondent: BatchedModel, encoded: Dataset) -> Tensor:
    """Logits of all rows, in their order."""
    found = [(list(rows), output.logits) for rows, _, output in respondent.outputs(encoded, "answers")]
    order = torch.tensor([row for rows, _ in found for row in rows])
    answers = torch.cat([output for _, output in found])
    return torch.empty_like(answers).index_copy_(0, order, answers)


def speed(respondent: BatchedModel, encoded: Dataset) -> float:
    """Rows a second of the processor."""
    started = time.process_time()
    logits(respondent, encoded)
    return len(encoded) / (time.process_time() - started)


def markdown(results: dict[str, Any]) -> str:
    """One row a kind of texts."""
    header = ["texts", "tokens: median, mean, most", *(f"rows/s, {name}" for name in ORDERS), "speed", "same classes"]
    rows = []
    for name, found in results.items():
        tokens = ", ".join(f"{found['tokens'][key]:.0f}" for key in ("median", "mean", "most"))
        speeds = [f"{found['rows_per_second'][order]['median']:.1f}" for order in ORDERS]
        same = f"{found['same_classes']} of {found['rows']}"
        rows.append([name, tokens, *speeds, spread_text(found["speed_ratio"]), same])
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="row_order", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file of a run that classifies")
    parser.add_argument("--rows", type=int, default=256, help="texts of each kind (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=512, help="tokens that a text is cut to (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="alternations (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where all numbers go")
    options = parser.parse_args(arguments)
    quiet_libraries()

    def found() -> dict[str, Any]:
        results = measure(load_config(options.config), options.rows, options.longest, options.rounds)
        return {"rows": options.rows, "rounds": options.rounds, "results": results}

    return report("row_order", arguments, options.out, found, markdown)


if __name__ == "__main__":
    sys.exit(main())
