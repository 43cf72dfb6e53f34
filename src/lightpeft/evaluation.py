"""What a live model does on data: predictions, metrics, and the files they are read from and written to."""

from __future__ import annotations

import csv
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn

from lightpeft.config import TaskKind
from lightpeft.errors import LightPeftError, require
from lightpeft.tasks.base import Task, check_strings
from lightpeft.tasks.progress import Progress, bar
from lightpeft.tasks.reading import read_file
from lightpeft.tasks.tokens import IGNORED, Collator


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    task: Task,
    collator: Collator,
    batch_size: int,
    bf16: bool = False,
    progress: Progress = bar,
) -> dict[str, float]:
    """Metrics of `model` on encoded rows with labels.

    Args:
        model: a transformers or PEFT model; its training mode is restored afterwards.
        dataset: what `task.encode` returned.
        task: says which metrics apply.
        collator: `task.collator(tokenizer)`.
        batch_size: rows a forward pass; rows of similar length share one.
        bf16: forward under bfloat16 autocast; losses are computed in float32 either way.
        progress: how the loop is shown.

    Returns:
        classification: loss (mean cross-entropy a row, nats), accuracy, f1 (two labels: that of the second one;
        more: macro average) and examples. causal-lm: loss (mean cross-entropy a labelled token, nats), perplexity,
        accuracy (of the next token), tokens and examples.

    Raises:
        LightPeftError: there is no row, or no token to predict.
    """
    return METRICS[task.head](model, dataset, collator, batch_size, bf16, progress)


def predict_logits(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    bf16: bool = False,
    progress: Progress = bar,
) -> Tensor:
    """Class logits, float32 [rows, labels] on the CPU, in the order of the rows."""
    places: list[int] = []
    parts: list[Tensor] = []
    with _eval_mode(model):
        for rows, _, logits in _forward(model, dataset, collator, batch_size, bf16, progress, "Predicting"):
            places.extend(rows)
            parts.append(logits.float().cpu())
    by_length = torch.cat(parts)
    return torch.empty_like(by_length).index_copy_(0, torch.tensor(places), by_length)


def predict_proba(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    bf16: bool = False,
    progress: Progress = bar,
) -> np.ndarray:
    """Class probabilities, float32 [rows, labels]; arguments as for `evaluate`."""
    logits = predict_logits(model, dataset, collator, batch_size, bf16, progress)
    return logits.softmax(-1).numpy()


def predict(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    bf16: bool = False,
    progress: Progress = bar,
) -> np.ndarray:
    """Number of the most probable class, int64 [rows]; arguments as for `evaluate`."""
    return predict_logits(model, dataset, collator, batch_size, bf16, progress).argmax(-1).numpy()


def _classification_metrics(
    model: nn.Module, dataset: Dataset, collator: Collator, batch_size: int, bf16: bool, progress: Progress
) -> dict[str, float]:
    logits = predict_logits(model, dataset, collator, batch_size, bf16, progress)
    labels = torch.tensor(dataset["labels"][:])
    predicted = logits.argmax(-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "loss": nn.functional.cross_entropy(logits, labels).item(),
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0)),
        "examples": float(len(dataset)),
    }


def _causal_lm_metrics(
    model: nn.Module, dataset: Dataset, collator: Collator, batch_size: int, bf16: bool, progress: Progress
) -> dict[str, float]:
    loss, right, tokens = 0.0, 0, 0
    with _eval_mode(model):
        for _, labels, logits in _forward(model, dataset, collator, batch_size, bf16, progress, "Evaluating"):
            targets = labels[:, 1:].to(logits.device)
            counted = targets != IGNORED
            # Picking the counted positions first keeps the float32 copy small: [tokens, vocabulary].
            picked, targets = logits[:, :-1][counted].float(), targets[counted]
            loss += nn.functional.cross_entropy(picked, targets, reduction="sum").item()
            right += int((picked.argmax(-1) == targets).sum())
            tokens += targets.numel()
    require(tokens > 0, "there is no token to predict in these rows; raise data.max_length or give longer texts")
    mean = loss / tokens
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "accuracy": right / tokens,
        "tokens": float(tokens),
        "examples": float(len(dataset)),
    }


METRICS: dict[TaskKind, Callable[..., dict[str, float]]] = {
    "classification": _classification_metrics,
    "causal-lm": _causal_lm_metrics,
}
"""Head of a task -> its metrics."""


def _forward(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    bf16: bool,
    progress: Progress,
    description: str,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Row numbers, labels (empty if there are none) and logits, batch by batch, the longest rows first.

    Longest first: a batch that doesn't fit into memory fails at once.
    """
    require(len(dataset) > 0, "there are no rows to evaluate")
    order = np.argsort(-np.asarray(dataset["length"][:]), kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    device = next(model.parameters()).device
    accepted = _accepted_inputs(model)
    for rows in progress(batches, len(batches), description):
        batch = collator(_rows(dataset, rows))
        labels = batch.pop("labels", None)
        inputs = {name: value.to(device) for name, value in batch.items() if name in accepted}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(**inputs).logits
        yield rows, torch.empty(0) if labels is None else labels, logits


def _rows(dataset: Dataset, numbers: list[int]) -> list[dict[str, Any]]:
    columns = dataset[numbers]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _accepted_inputs(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Parameters of the transformers model's forward: not every model takes all that a tokenizer gives."""
    get_base_model = getattr(model, "get_base_model", None)
    base = model if get_base_model is None else get_base_model()
    return inspect.signature(base.forward).parameters


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def read_inputs(source: Path | TextIO, text: str, text_pair: str | None = None) -> Dataset:
    """Rows to predict on.

    Args:
        source: a .txt file or an open text stream with one text a line (blank lines are skipped; column `text`), or
            a .csv, .tsv, .json, .jsonl or .parquet file.
        text: column with the text.
        text_pair: column with the second text; unset for single texts.

    Raises:
        LightPeftError: missing, empty or malformed, a column is not there, or a text is.
    """
    if isinstance(source, Path) and source.suffix.lower() != ".txt":
        rows = read_file(source, "input")
    else:
        require(text_pair is None, "pairs of texts cannot be read from text lines; give a table with both columns")
        lines = [line for line in _lines(source) if line.strip()]
        require(lines, "input has no text: every line is blank")
        rows = Dataset.from_dict({text: lines})
    for column, setting in ((text, "data.text"), (text_pair, "data.text_pair")):
        if column is not None:
            check_strings(rows, column, setting, "input")
    return rows


def _lines(source: Path | TextIO) -> list[str]:
    try:
        content = source.read_text(encoding="utf-8-sig") if isinstance(source, Path) else source.read()
    except UnicodeDecodeError as error:
        raise LightPeftError(f"input is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise LightPeftError(f"input {source} cannot be read: {error.strerror}") from error
    return [line.rstrip("\r") for line in content.split("\n")]


def write_predictions(path: Path | None, rows: Dataset, labels: list[str], probabilities: np.ndarray) -> None:
    """Write rows with their most probable label and every label's probability to a .csv or .jsonl file.

    Columns: those of `rows` (one that is named like a new one becomes `input_<name>`), `label`, `p_<label>`. The
    file appears only when it is complete.

    Args:
        path: the file, replaced if it is there; None: CSV on standard output.
        rows: what was predicted on.
        labels: label names in class order.
        probabilities: [rows, labels].

    Raises:
        LightPeftError: another suffix, or the file cannot be written.
    """
    write = _write_csv if path is None else check_predictions_path(path)
    new = ["label", *(f"p_{name}" for name in labels)]
    renamed = {name: f"input_{name}" if name in new else name for name in rows.column_names}
    best = probabilities.argmax(-1)
    table = (
        {
            **{renamed[name]: value for name, value in row.items()},
            "label": labels[best[i]],
            **{name: round(float(p), 6) for name, p in zip(new[1:], probabilities[i], strict=True)},
        }
        for i, row in enumerate(rows)
    )
    if path is None:
        write(sys.stdout, [*renamed.values(), *new], table)
        return
    try:
        with _replacing(path) as file:
            write(file, [*renamed.values(), *new], table)
    except OSError as error:
        raise LightPeftError(f"predictions cannot be written to {path}: {error.strerror or error}") from error


def check_predictions_path(path: Path) -> Callable[[TextIO, list[str], Iterable[dict[str, Any]]], None]:
    """The writer for a file of predictions, by suffix; to be called before work is spent on them."""
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise LightPeftError(f'predictions go to a {" or ".join(WRITERS)} file, not "{path}"')
    return writer


def _write_csv(file: TextIO, header: list[str], table: Iterable[dict[str, Any]]) -> None:
    writer = csv.DictWriter(file, header)
    writer.writeheader()
    writer.writerows(table)


def _write_jsonl(file: TextIO, header: list[str], table: Iterable[dict[str, Any]]) -> None:
    file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table)


WRITERS: dict[str, Callable[[TextIO, list[str], Iterable[dict[str, Any]]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}
"""File suffix -> writer of predictions."""


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of `path` once it is written, and vanishes if writing fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
