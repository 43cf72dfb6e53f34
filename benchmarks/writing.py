"""What writers write: texts that the results of runs give behind held-out prompts, beside their losses.

    python benchmarks/writing.py runs/socialiqa/writers/cells/*/*/*/0 --rows 200

Greedy search. Of the tasks that have prompts and completions (causal-lm): how often a text ends by itself, how long it
is beside the references, how much of it is said before (Welleck et al. 2020, seq-rep-3), and how often it, or its
last line, is the reference's. A run that keeps both is asked for both. Prints a table and writes all texts to --out.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from publishing import markdown_table, report

from lightpeft.errors import require
from lightpeft.evaluation.generating import generate_texts
from lightpeft.evaluation.scores import scores_of
from lightpeft.machine import autocast_dtype
from lightpeft.models.loading import quiet_libraries
from lightpeft.runs import pipeline
from lightpeft.runs.workspace import Workspace
from lightpeft.saved.opening import open_result
from lightpeft.saved.results import Model, open_peft
from lightpeft.saved.run_folder import RunFolder

ROWS = 200
LONGER = 4
"""How many times as long as the longest reference a text may become before it is said not to end."""


def results_of(folder: Path) -> Iterator[tuple[str, Workspace, Model]]:
    """Name, run and model of all that a run keeps."""
    run = RunFolder.at(folder)
    work = pipeline.prepare(run.config)
    yield str(folder), work, open_result(run, work.task)
    if run.keeps_full and run.result != run.full:
        yield f"{folder}, full width", work, open_peft(run.full, work.dense_model().model)


def measure(work: Workspace, model: Model, rows: int) -> dict[str, Any]:
    """Loss on all held-out rows, and the measures of texts behind the first prompts of them."""
    test = work.task.test
    require("completion" in test.column_names, f"{work.run.path} has no prompts and completions to compare with")
    test = test.select(range(min(rows, len(test))))
    tokenizer, autocast = work.tokenizer, autocast_dtype(work.config.training)
    prompts = work.task.encode_inputs(test, tokenizer)["input_ids"]
    references = [text.strip() for text in test["completion"]]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in references]
    most = LONGER * max(lengths)
    texts = generate_texts(model, prompts, tokenizer, max_new_tokens=most, autocast=autocast)
    written = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return {
        "loss": scores_of(pipeline.measure(work, model), work.task).metrics["loss"],
        "exact": statistics.mean(_plain(a) == _plain(b) for a, b in zip(texts, references, strict=True)),
        "last_line": statistics.mean(_last(a) == _last(b) for a, b in zip(texts, references, strict=True)),
        "ended": statistics.mean(len(ids) < most - 1 for ids in written),
        "tokens": statistics.mean(map(len, written)),
        "reference_tokens": statistics.mean(lengths),
        "repeated": statistics.mean(map(repeated, written)),
        "texts": texts,
    }


def repeated(ids: Sequence[int], n: int = 3) -> float:
    """Part of a text's n-grams that it has said before."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _last(text: str) -> str:
    return _plain(next(reversed(text.strip().splitlines()), ""))


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row a model."""
    header = ("", "cross-entropy", "exact, %", "last line, %", "ends, %", "tokens", "of the references", "repeated, %")
    return markdown_table(
        header,
        [
            [
                name,
                f"{found['loss']:.3f}",
                f"{100 * found['exact']:.1f}",
                f"{100 * found['last_line']:.1f}",
                f"{100 * found['ended']:.1f}",
                f"{found['tokens']:.1f}",
                f"{found['reference_tokens']:.1f}",
                f"{100 * found['repeated']:.1f}",
            ]
            for name, found in results.items()
        ],
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="writing", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--rows", type=int, default=ROWS, help="held-out prompts")
    parser.add_argument("--out", type=Path, help="where all numbers and texts go")
    options = parser.parse_args(arguments)
    quiet_libraries()

    def found() -> dict[str, Any]:
        require(options.rows >= 1, f"--rows is {options.rows}; it starts at 1")
        asked = (result for folder in options.runs for result in results_of(folder))
        return {
            "rows": options.rows,
            "results": {name: measure(work, model, options.rows) for name, work, model in asked},
        }

    return report("writing", arguments, options.out, found, markdown)


if __name__ == "__main__":
    sys.exit(main())
