"""`lightpeft predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.verbs.verb import Verb
from lightpeft.config.places import check_file
from lightpeft.errors import require

BASE = Option("--base", "Name or folder of the base model, if it moved since the adapter was saved.")
ALLOW_PICKLE = Option("--allow_pickle", "Read pickled weights of the base model (.bin).", flag=True)
SWITCH_OPTIONS = (
    Option("--trust_remote_code", "Run the Python code that comes with the base model.", flag=True),
    ALLOW_PICKLE,
)
"""Options of verbs on results that allow code of other people to run."""


def _check(input: str | None = None, no_bf16: bool = False, **options: Any) -> None:
    require(not (no_bf16 and "bf16" in options), "--bf16 and --no_bf16 exclude each other; give one of them")
    if input is not None and input != "-":
        check_file(Path(input), "input")


def _predict(model: str, input: str | None = None, no_bf16: bool = False, **options: Any) -> None:
    from lightpeft.app.evaluation.predicting import predict

    options |= {"bf16": False} if no_bf16 else {}
    predict(model, input, **options)


PREDICT = Verb(
    "predict",
    "Predict labels, options, spans or texts for text lines, the rows of a table or one row.",
    _predict,
    options=(
        Option("model", "Folder of a light adapter, a merged light model or a finished run, or a name on the hub."),
        Option(
            "input",
            "Text lines (.txt), a table (.csv, .tsv, .json, .jsonl, .parquet), or - for stdin: text lines or, where a "
            "row needs several columns, JSON lines.",
            count="?",
        ),
        Option("--example", "One row instead of a file: its text, or a JSON object with its columns."),
        Option("--output", "File for the predictions, .csv or .jsonl (default: stdout, as CSV)."),
        BASE,
        Option(
            "--batch_size",
            "Rows per forward pass (default: 32 on a CPU, 256 elsewhere; fewer if they are long).",
            type=int,
        ),
        Option(
            "--answer_tokens",
            "Maximum number of tokens of a generated answer (default: as in training).",
            type=int,
        ),
        Option("--text --data.columns.text", "Column with the text (default: as in training)."),
        Option("--text_pair --data.columns.text_pair", "Column with the second text (default: as in training)."),
        Option("--bf16", "Compute in bfloat16 (default: as the run evaluated).", flag=True),
        Option("--no_bf16", "Compute in the precision of the weights.", flag=True),
        *SWITCH_OPTIONS,
    ),
    check=_check,
)
