"""Predict new rows with a model that was saved with its task: a light adapter, a merged light model, or a run."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightpeft.app.evaluation.batching import check_batch_size
from lightpeft.app.evaluation.prediction_files import check_predictions_path, write_predictions
from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.folders.forms import Found, Wanted
from lightpeft.app.folders.opening import find_model
from lightpeft.app.tasks.answers import Columns
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.loading import convert, input_columns, restore_task
from lightpeft.app.tasks.rows.inputs import read_inputs
from lightpeft.app.tasks.tokens import check_tokens
from lightpeft.errors import require
from lightpeft.models.tokenizers import check_vocabulary, ensure_pad_token
from lightpeft.models.unwrap import transformers_model


def predict(
    model: str | Path,
    source: str | Path | None = None,
    output: str | Path | None = None,
    base: str | Path | None = None,
    *,
    example: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    answer_tokens: int | None = None,
    batch_size: int | None = None,
    bf16: bool | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Predict the rows of a file, or one row, and write them with the answers.

    Args:
        model: folder of a light adapter, of a merged light model, or of a finished run.
        source: lines of text (.txt), a table (.csv, .tsv, .json, .jsonl, .parquet), or "-" for standard input: lines
            of text if a row needs only one text, else JSON lines.
        output: .csv or .jsonl file; None: CSV on standard output.
        base: name or folder of the base model, if it is not where the adapter says.
        example: one row in place of `source`: its text, or a JSON object.
        text: column with the text, for classification and regression; None: as in training.
        text_pair: column with the second text; None: as in training.
        answer_tokens: most tokens of an answer, for spans and generated texts; None: as in training.
        batch_size: rows per forward pass; None: the default of the device.
        bf16: True to compute in bfloat16, False in the dtype of the weights; None: as the run evaluated.
        trust_remote_code: run Python code that comes with the base, if it needs any.
        allow_pickle: read the base's weights from pickle files if it has no others; only weights are unpickled.

    Raises:
        LightPeftError: the input is invalid, or the model does not name its task.

    Example:
        ```python
        predict("out/run", "new.csv", "answers.csv")  # columns of new.csv, label, and p_<label> of each label
        ```
    """
    check_batch_size(batch_size)
    require(
        (source is None) != (example is None),
        "predict needs either a file (- for standard input) or an example; give one of them",
    )
    if output is not None:
        check_predictions_path(Path(output))
    switches = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    found = find_model(model, None if base is None else str(base), switches)
    task = _restore_trained_task(found, {"text": text, "text_pair": text_pair}, answer_tokens)
    rows, what = _read_rows(task, source, example)
    canonical = convert(rows, task.entry, what, answered=False)
    task.check_inputs(canonical, task.entry, what)
    opened = found.open(Wanted.of(task))
    columns = answer_rows(
        opened,
        found.tokenizer(),
        task,
        canonical,
        batch_size=batch_size,
        autocast=_precision(found, bf16),
        padding=found.padding(task.config.max_length),
    )
    write_predictions(None if output is None else Path(output), rows, columns)


def answer_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Dataset,
    *,
    batch_size: int | None = None,
    autocast: torch.dtype | None = None,
    padding: int | None = None,
) -> Columns:
    """Return the answers of a live model to new rows.

    Args:
        tokenizer: the model's tokenizer.
        task: the task, which encodes rows and formats answers.
        rows: rows in the columns of the task's kind; answers are not needed.
        batch_size: rows per forward pass; None: the default of the device.
        autocast: half precision to compute in; None: the dtype of the weights.
        padding: pad batches to a multiple of this many tokens; None: to their longest row.

    Returns:
        Columns `label` and `p_<label>` for classes, `value` for regression, `answer` and `probability` for options,
        `answer` and `margin` (its score minus that of no answer) for spans, and `answer` for generated texts.

    Raises:
        LightPeftError: tokenizer and model do not match, or the outputs are NaN or infinite.
    """
    config = transformers_model(model).config
    check_vocabulary(tokenizer, config)
    ensure_pad_token(tokenizer, config)
    encoded = task.encode_inputs(rows, tokenizer)
    check_tokens(encoded, config, "the input")
    return task.predict(BatchedModel(model, task.collator(tokenizer, padding), batch_size, autocast), encoded, rows)


def _restore_trained_task(found: Found, columns: dict[str, str | None], answer_tokens: int | None) -> Task:
    """Return the task that a model was trained for, with the given columns and answer length."""
    require(
        found.facts,
        f"{found.name} is a {found.kind} that does not name its task; give a light adapter, a "
        "merged light model or a run",
    )
    task = restore_task(found.facts)
    given = {name: column for name, column in columns.items() if column is not None}
    allowed = () if task.entry.convert else (*task.columns, *task.optional)
    for name in given:
        require(name in allowed, f"{name}: task {task.config.task} has no such column; leave it out")
    task.entry = replace(task.entry, columns={**task.entry.columns, **given})
    if answer_tokens is not None:
        task.config = replace(task.config, answer_tokens=answer_tokens)
    return task


def _precision(found: Found, bf16: bool | None) -> torch.dtype | None:
    """Return the half precision to compute in: as `bf16` says or, if it is None, as the model's run evaluated."""
    if bf16 is None:
        return found.precision
    return torch.bfloat16 if bf16 else None


def _is_object(example: str | None) -> bool:
    """True if an example is a row as a JSON object, not a text."""
    try:
        return isinstance(json.loads(example or ""), dict)
    except (ValueError, RecursionError):
        return False


def _read_rows(task: Task, source: str | Path | None, example: str | None) -> tuple[Dataset, str]:
    """Return the rows as read, and their name for error messages."""
    columns = input_columns(task)
    column = columns[0] if len(columns) == 1 and not _is_object(example) else None
    opened: Path | TextIO
    if example is not None:
        require(
            not any("\ud800" <= letter <= "\udfff" for letter in example),
            "the example is not UTF-8 text; convert it to UTF-8",
        )
        opened, what = io.StringIO(example.replace("\n", " ") if column else example), "the example"
    elif str(source) == "-":
        opened, what = sys.stdin, "standard input"
    else:
        opened, what = Path(str(source)), "input"
    rows = read_inputs(opened, column, what)
    return (rows if column is None else task.from_texts(rows, column)), what
