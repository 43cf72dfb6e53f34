"""Answers for new rows from a model that was saved with its task: light adapter, merged light model, or run."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from datasets import Dataset
from scipy.special import softmax
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightpeft.console.streams import standard_input, standard_output
from lightpeft.errors import require
from lightpeft.evaluation.answering import Run, likelihoods_of, logits_of, option_logits, spans_of, texts_of
from lightpeft.evaluation.prediction_files import check_predictions_path, read_inputs, write_predictions
from lightpeft.models.unwrap import transformers_model
from lightpeft.saved.forms import Found, Wanted
from lightpeft.saved.opening import find_model
from lightpeft.tasks import (
    Task,
    check_vocabulary,
    convert,
    doubt_of_tokens,
    ensure_pad_token,
    input_columns,
    restore_task,
)
from lightpeft.tasks.kinds.chat import as_chats
from lightpeft.tasks.kinds.span import SpanTask
from lightpeft.tasks.kinds.windows import answer_text

Columns = dict[str, Sequence[Any]]
"""What was found, one value a row."""
Announce = Callable[[str], object]
"""Shows a line to whoever asked."""
DIGITS = 6
"""Decimals of probabilities."""


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
    announce: Announce = warnings.warn,
) -> None:
    """Answer the rows of a file, or one row, and write them with the answers.

    Args:
        model: folder of a light adapter, of a merged light model, or of a finished run.
        source: text lines (.txt), a table (.csv, .tsv, .json, .jsonl, .parquet), or "-" for standard input, which holds
            text lines where a row needs one text alone, and JSON lines where it needs more.
        output: .csv or .jsonl file; None: CSV on standard output.
        base: name or folder of the base, if it is not where it was.
        example: one row instead of `source`: its text, or a JSON object.
        text: column with the text (of tasks that classify); None: as in training.
        text_pair: column with the second text; None: as in training.
        answer_tokens: tokens of an answer at most, where it is a text; None: as in training.
        batch_size: rows a forward pass; None: as many as fit into memory.
        bf16: compute in bfloat16 or, if False, in the precision of the weights; None: as the run evaluated.
        trust_remote_code: run Python code that comes with the base, if it needs any.
        allow_pickle: read the base's weights from pickle files if it has no others; weights alone are unpickled.
        announce: takes a line about input that the model can hardly read.

    Raises:
        LightPeftError: bad input, or a model that does not say what its task is.
    """
    require(batch_size is None or batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1")
    require((source is None) != (example is None), "give a file to predict on (- for standard input), or an example")
    if output is None:
        standard_output()
    else:
        check_predictions_path(Path(output))
    switches = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    found = find_model(model, None if base is None else str(base), switches)
    task = _task(found, {"text": text, "text_pair": text_pair}, answer_tokens)
    rows, what = _read(task, source, example)
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
        announce=announce,
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
    announce: Announce = warnings.warn,
) -> Columns:
    """What a live model answers.

    Args:
        tokenizer: its tokenizer.
        task: says how it answers.
        rows: in the columns of the task's kind; answers are not needed.
        batch_size: rows a forward pass; None: as many as fit into memory.
        autocast: half precision to compute in; None: that of the weights.
        padding: batches are padded to a multiple of so many tokens; None: to their longest row.
        announce: takes a line about rows that are mostly unknown tokens.

    Returns:
        Columns `label` and `p_<label>` of classes, `value` of regression, `answer` and `probability` of options,
        `answer` and `margin` (how much better it scores than no answer) of spans, and `answer` of written texts.

    Raises:
        LightPeftError: tokenizer and model do not fit, or the model's answers are NaN or infinite.
    """
    config = transformers_model(model).config
    check_vocabulary(tokenizer, config)
    ensure_pad_token(tokenizer, config)
    encoded = task.encode_inputs(rows, tokenizer, task.config.max_length)
    doubt = doubt_of_tokens(encoded, tokenizer, config, "the input")
    if doubt is not None:
        announce(doubt)
    run = Run(model, task.collator(tokenizer, padding), batch_size, autocast)
    return PREDICTING[task.answering](run, encoded, task, rows)


def _task(found: Found, columns: dict[str, str | None], answer_tokens: int | None) -> Task:
    """The task that a model was trained for, with some settings changed."""
    require(
        found.facts,
        f"{found.name} is a {found.kind} that does not say what task it was trained for; give a light adapter, a "
        "merged light model or a run",
    )
    task = restore_task(found.facts)
    given = {name: column for name, column in columns.items() if column is not None}
    allowed = (*task.columns, *task.optional)
    for name in given:
        require(name in allowed, f"{name} is no column of task {task.config.task}; leave it out")
    task.entry = replace(task.entry, columns={**task.entry.columns, **given})
    if answer_tokens is not None:
        task.config = replace(task.config, answer_tokens=answer_tokens)
    return task


def _precision(found: Found, bf16: bool | None) -> torch.dtype | None:
    """The half precision to compute in: what was asked for or, if nothing was, what the model's run evaluated in."""
    if bf16 is None:
        return found.precision
    return torch.bfloat16 if bf16 else None


def _read(task: Task, source: str | Path | None, example: str | None) -> tuple[Dataset, str]:
    """The rows as they are, and what they are called in error lines."""
    columns = input_columns(task)
    column = columns[0] if len(columns) == 1 else None
    opened: Path | TextIO
    if example is not None:
        opened, what = io.StringIO(example.replace("\n", " ") if column else example), "the example"
    elif str(source) == "-":
        opened, what = standard_input(), "standard input"
    else:
        opened, what = Path(str(source)), "input"
    rows = read_inputs(opened, column, what)
    return (as_chats(rows, column) if task.entry.kind == "chat" and column else rows), what


# -- how each head's answers are written -------------------------------------------------------------------------


def _classes(run: Run, encoded: Dataset, task: Task, rows: Dataset) -> Columns:
    return _labels(torch.stack(logits_of(run, encoded)).softmax(-1).numpy(), task)


def _numbers(run: Run, encoded: Dataset, task: Task, rows: Dataset) -> Columns:
    return {"value": [round(float(value), DIGITS) for value in torch.stack(logits_of(run, encoded)).squeeze(-1)]}


def _options(run: Run, encoded: Dataset, task: Task, rows: Dataset) -> Columns:
    return _picked([of_row.softmax(-1).numpy() for of_row in option_logits(run, encoded)], rows)


def _likelihood(run: Run, encoded: Dataset, task: Task, rows: Dataset) -> Columns:
    probabilities = [softmax(scores) for scores in likelihoods_of(run, encoded).scores[task.config.likelihood]]
    return _labels(np.stack(probabilities), task) if task.labels else _picked(probabilities, rows)


def _pieces(run: Run, encoded: Dataset, task: Task, rows: Dataset) -> Columns:
    assert isinstance(task, SpanTask)
    spans, _ = spans_of(run, encoded, task.config.answer_tokens)
    pairs = zip(spans, rows["context"], strict=True)
    return {
        "answer": [answer_text(span, context, task.null_threshold) for span, context in pairs],
        "margin": [round(span.margin, DIGITS) for span in spans],
    }


def _texts(run: Run, encoded: Dataset, task: Task, rows: Dataset) -> Columns:
    return {"answer": texts_of(run, encoded, task)}


PREDICTING: dict[str, Callable[[Run, Dataset, Task, Dataset], Columns]] = {
    "classification": _classes,
    "regression": _numbers,
    "multiple-choice": _options,
    "likelihood": _likelihood,
    "span": _pieces,
    "generation": _texts,
    "causal-lm": _texts,
}
"""`Task.answering` -> what is written of the answers."""


def _labels(probabilities: np.ndarray, task: Task) -> Columns:
    """The most probable label, and every label's probability."""
    classes = probabilities.shape[-1]
    named = f"the model tells {classes} classes apart, and its task has {len(task.labels)} labels"
    require(classes == len(task.labels), f"{named}; is it another task's?")
    labels = {"label": [task.labels[best] for best in probabilities.argmax(-1)]}
    of_labels = zip(task.labels, probabilities.T, strict=True)
    return {**labels, **{f"p_{name}": [round(float(p), DIGITS) for p in column] for name, column in of_labels}}


def _picked(probabilities: list[np.ndarray], rows: Dataset) -> Columns:
    """The most probable option, and its probability."""
    best = [int(of_row.argmax(-1)) for of_row in probabilities]
    texts = rows["names" if "names" in rows.column_names else "options"]
    return {
        "answer": [options[index] for options, index in zip(texts, best, strict=True)],
        "probability": [round(float(of_row.max()), DIGITS) for of_row in probabilities],
    }
