"""How many questions of grade-school mathematics (GSM8K) models solve, and how fast they write the answers.

    python benchmarks/solving.py runs/scale/generation/cells/* --questions demo/cache/gsm8k/test.jsonl --count 200

Greedy answers to the first questions of a file with `question` and `answer`, in the prompt of configs/scale. A question
is solved if the last number of the text is that of the reference. A model is a run, an adapter, a merged model or a
base, in the data type of its checkpoint.
`--write` keeps the solved questions of one model with its own answers, as rows to train on:

    python benchmarks/solving.py demo/cache/qwen2.5_coder_0.5b --questions demo/cache/gsm8k/train.jsonl --count 2560 \
        --write demo/cache/gsm8k_own/train.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from publishing import markdown_table, report
from scipy.stats import binomtest

from lightpeft.app.cli.command import quiet
from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.folders.forms import Wanted
from lightpeft.app.folders.opening import find_model
from lightpeft.app.tasks.kinds.generation import GenerationTask
from lightpeft.app.tasks.rows.inputs import read_inputs
from lightpeft.config import DataConfig, TaskEntry
from lightpeft.errors import require
from lightpeft.files import write_text
from lightpeft.models.tokenizers import ensure_pad_token
from lightpeft.models.unwrap import transformers_model

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
NEXT_QUESTION = "\nQuestion:"
"""How a model goes on that was not trained to stop."""


def result_of(text: str) -> float | None:
    """The last number of an answer; None: it has none."""
    numbers = NUMBER.findall(text.partition(NEXT_QUESTION)[0])
    return float(numbers[-1].replace(",", "")) if numbers else None


def read_questions(path: Path, count: int) -> Dataset:
    """The first rows of a file, with `question` and `answers`."""
    rows = read_inputs(path, None, "the questions")
    rows = rows.select(range(min(count, len(rows))))
    for column in ("question", "answer"):
        require(column in rows.column_names, f'{path} has no column "{column}"; give rows of GSM8K')
    return rows


def written(model: Path, rows: Dataset, longest: int, batch_size: int | None) -> tuple[list[str], float]:
    """A model's answers, and the tokens that it wrote in a second."""
    columns = Dataset.from_dict({"question": rows["question"][:], "answers": rows["answer"][:]})
    config = DataConfig(task="generation", max_length=longest + 512, answer_tokens=longest)
    task = GenerationTask(config, columns, columns, [], TaskEntry(kind="generation"))
    found = find_model(model, settings={"dtype": "auto"})
    opened, tokenizer = found.open(Wanted.of(task)), found.tokenizer()
    ensure_pad_token(tokenizer, transformers_model(opened).config)
    asked = BatchedModel(opened, task.collator(tokenizer), batch_size, found.precision)
    encoded = task.encode_inputs(columns, tokenizer)
    started = time.perf_counter()
    texts = asked.texts(encoded, longest)
    seconds = time.perf_counter() - started
    return texts, sum(map(len, tokenizer(texts)["input_ids"])) / seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """By model: solved questions with a 95% interval, and tokens/s; writes the rows of `--write`."""
    rows, found = read_questions(options.questions, options.count), {}
    for model in options.models:
        texts, speed = written(model, rows, options.answer_tokens, options.batch_size)
        right = [result_of(text) == result_of(answer) for text, answer in zip(texts, rows["answer"], strict=True)]
        low, high = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
        share = sum(right) / len(right)
        found[str(model)] = {
            "solved": share,
            "interval": [low, high],
            "questions": len(right),
            "tokens_per_second": speed,
        }
        if options.write is not None:
            kept = zip(rows["question"], texts, right, strict=True)
            own = [
                {"question": q, "answer": text.partition(NEXT_QUESTION)[0].strip()}
                for q, text, solved in kept
                if solved
            ]
            write_text(options.write, "".join(json.dumps(row) + "\n" for row in own))
    return {"results": found}


def markdown(results: dict[str, Any]) -> str:
    """One row a model."""
    rows = [
        [
            Path(name).name,
            f"{100 * of['solved']:.1f} ({100 * of['interval'][0]:.1f}-{100 * of['interval'][1]:.1f})",
            f"{of['questions']}",
            f"{of['tokens_per_second']:.0f}",
        ]
        for name, of in results.items()
    ]
    return markdown_table(("", "solved, %", "questions", "tokens/s"), rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="solving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", help="folders of runs, adapters, merged models or bases")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--count", type=int, default=200, help="questions, the first ones (default: %(default)s)")
    parser.add_argument(
        "--answer-tokens", type=int, default=256, help="most tokens of an answer (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, help="questions at a time; default: that of the device")
    parser.add_argument("--write", type=Path, help="JSON lines for the solved questions with the model's own answers")
    parser.add_argument("--out", type=Path, help="JSON file for every number")
    options = parser.parse_args(arguments)
    if options.write is not None and len(options.models) > 1:
        parser.error("--write takes one model")
    quiet()
    return report("solving", arguments, options.out, lambda: measure(options), markdown)


if __name__ == "__main__":
    sys.exit(main())
