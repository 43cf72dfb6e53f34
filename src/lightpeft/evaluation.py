"""What a live model does on data: answers, metrics, and the files that predictions are read from and written to."""

from __future__ import annotations

import csv
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
from datasets import Dataset
from scipy.special import softmax
from torch import Tensor, nn

from lightpeft.batching import fitting_batch_size, in_batches
from lightpeft.config import TaskEntry
from lightpeft.errors import LightPeftError, require
from lightpeft.statistics import Interval, bootstrap_intervals
from lightpeft.tasks.answers import Answers
from lightpeft.tasks.base import Task, check_strings
from lightpeft.tasks.converting import check_column
from lightpeft.tasks.likelihood import ACCURACIES, option_scores, option_sequences
from lightpeft.tasks.metrics import accuracy
from lightpeft.tasks.progress import Progress, bar
from lightpeft.tasks.reading import read_file
from lightpeft.tasks.tokens import IGNORED, Collator

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What a model did on encoded test rows."""

    answers: Answers
    measured: dict[str, float]
    """What the model gives beside its answers, such as the loss, by name."""


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    task: Task,
    collator: Collator,
    batch_size: int | None,
    bf16: bool = False,
    progress: Progress = bar,
) -> dict[str, float]:
    """Metrics of `model` on encoded rows with labels; arguments as for `outcome`.

    Returns:
        What `task` measures, the main metric first, then the loss and examples. The loss is a mean in nats: of
        classification and multiple choice the cross-entropy a row, by likelihood that of a token of the right option,
        of causal-lm that of a labelled token; of regression it is the squared error. Likelihood adds the accuracy
        of each rule that can pick an option.

    Raises:
        LightPeftError: there is no row, or no token to predict.
    """
    return values_of(outcome(model, dataset, task, collator, batch_size, bf16, progress), task)


def values_of(outcome: Outcome, task: Task) -> dict[str, float]:
    """What `evaluate` returns, of an outcome at hand."""
    return {**task.score(outcome.answers), **outcome.measured, "examples": float(len(outcome.answers))}


@dataclass(frozen=True)
class Scores:
    """What is measured of a model, by name; of a further split the names begin with its prefix."""

    metrics: dict[str, float]
    intervals: dict[str, Interval | None]
    """95% confidence intervals of those that are functions of the answers."""


def scores_of(outcomes: Mapping[str, Outcome], task: Task, seed: int = 0) -> Scores:
    """Metrics with bootstrap intervals.

    Args:
        outcomes: by prefix; "" for the test rows.
        task: says what is measured.
        seed: of the bootstrap.
    """
    metrics: dict[str, float] = {}
    intervals: dict[str, Interval | None] = {}
    for prefix, of_split in outcomes.items():
        metrics |= prefixed(prefix, values_of(of_split, task))
        intervals |= prefixed(prefix, bootstrap_intervals(of_split.answers, *task.measures, seed=seed))
    return Scores(metrics, intervals)


def prefixed(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """Values by name, with the prefix of their split; that of the test rows is empty."""
    return {f"{prefix}_{name}" if prefix else name: value for name, value in values.items()}


def answer(
    model: nn.Module,
    dataset: Dataset,
    task: Task,
    collator: Collator,
    batch_size: int | None,
    bf16: bool = False,
    progress: Progress = bar,
) -> Answers:
    """What `model` answers on encoded rows with labels; arguments as for `outcome`."""
    return outcome(model, dataset, task, collator, batch_size, bf16, progress).answers


def outcome(
    model: nn.Module,
    dataset: Dataset,
    task: Task,
    collator: Collator,
    batch_size: int | None,
    bf16: bool = False,
    progress: Progress = bar,
) -> Outcome:
    """Answers of `model` on encoded rows with labels, and what was measured on the way.

    Args:
        model: a transformers or PEFT model; its training mode is restored afterwards.
        dataset: what `task.encode_test` returned.
        task: says how the model answers.
        collator: `task.collator(tokenizer)`.
        batch_size: rows a forward pass (of likelihood: options), of similar length; None: as many as fit into memory.
        bf16: forward under bfloat16 autocast; losses are computed in float32 either way.
        progress: how the loop is shown.

    Raises:
        LightPeftError: there is no row, or no token to predict.
    """
    run = _Run(model, collator, batch_size, bf16, progress)
    return ANSWERING[task.answering](run, dataset, task)


def predict_logits(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    bf16: bool = False,
    progress: Progress = bar,
) -> Tensor:
    """Class logits, float32 [rows, labels] on the CPU, in the order of the rows."""
    return torch.stack(_logits(_Run(model, collator, batch_size, bf16, progress), dataset))


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


# -- how each head answers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A model and how rows are fed to it."""

    model: nn.Module
    collator: Collator
    batch_size: int | None
    bf16: bool
    progress: Progress

    def batches(self, dataset: Dataset, description: str) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Row numbers, labels (empty if there are none) and logits, batch by batch, the longest rows first.

        Longest first: a batch that doesn't fit into memory fails at once.
        """
        require(len(dataset) > 0, "there are no rows to evaluate")
        order = np.argsort(-np.asarray(dataset["length"][:]), kind="stable").tolist()
        device = next(self.model.parameters()).device
        accepted = _accepted_inputs(self.model)

        def compute(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
            batch = self.collator(_rows(dataset, list(rows)))
            labels = batch.pop("labels", None)
            inputs = {name: value.to(device) for name, value in batch.items() if name in accepted}
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.model(**inputs).logits
            return torch.empty(0) if labels is None else labels, logits

        with _eval_mode(self.model):
            size = self.batch_size or fitting_batch_size(self.model, order, compute)
            batches = in_batches(order, compute, size)
            for rows, (labels, logits) in self.progress(batches, math.ceil(len(order) / size), description):
                yield list(rows), labels, logits


def _logits(run: _Run, dataset: Dataset) -> list[Tensor]:
    """Every row's logits, float32 [classes or options] on the CPU."""
    result = [torch.empty(0)] * len(dataset)
    for rows, _, logits in run.batches(dataset, "Predicting"):
        for row, of_row in zip(rows, logits.float().cpu(), strict=True):
            result[row] = of_row
    return result


def _classes(run: _Run, dataset: Dataset, task: Task) -> Outcome:
    logits, labels = torch.stack(_logits(run, dataset)), dataset["labels"][:]
    answers = _answers(dataset, logits.argmax(-1).tolist(), labels, logits.softmax(-1).numpy())
    return Outcome(answers, {"loss": nn.functional.cross_entropy(logits, torch.tensor(labels)).item()})


def _numbers(run: _Run, dataset: Dataset, task: Task) -> Outcome:
    predicted = torch.stack(_logits(run, dataset)).squeeze(-1)
    labels = dataset["labels"][:]
    answers = _answers(dataset, predicted.tolist(), labels)
    return Outcome(answers, {"loss": nn.functional.mse_loss(predicted, torch.tensor(labels)).item()})


def _options(run: _Run, dataset: Dataset, task: Task) -> Outcome:
    counts = [len(options) for options in dataset["input_ids"]]
    # a batch fills rows up to its largest number of options
    logits = [of_row[:count] for of_row, count in zip(_logits(run, dataset), counts, strict=True)]
    losses = [-of_row.log_softmax(-1)[label] for of_row, label in zip(logits, dataset["labels"], strict=True)]
    chosen = [int(of_row.argmax()) for of_row in logits]
    return Outcome(_picked(dataset, chosen), {"loss": torch.stack(losses).mean().item()})


def _likelihood(run: _Run, dataset: Dataset, task: Task) -> Outcome:
    sequences, labels = option_sequences(dataset), dataset["labels"][:]
    loss, _, tokens = _token_sums(run, sequences.rows).T
    scores = option_scores(sequences, -loss, tokens, dataset["bytes"][:])
    picked = {rule: _picked(dataset, [int(row.argmax()) for row in rows]) for rule, rows in scores.items()}
    right = [numbers[label] for numbers, label in zip(sequences.asked, labels, strict=True)]
    measured = {name: accuracy(picked[rule])["accuracy"] for rule, name in ACCURACIES.items()}
    measured["loss"] = float(loss[right].sum() / tokens[right].sum())
    rule = task.config.likelihood
    answers = picked[rule]
    if task.labels:
        answers = replace(answers, probabilities=softmax(np.stack(scores[rule]), axis=-1).astype(np.float32))
    return Outcome(answers, measured)


def _next_tokens(run: _Run, dataset: Dataset, task: Task) -> Outcome:
    sums = _token_sums(run, dataset)
    require(
        sums[:, 2].sum() > 0, "there is no token to predict in these rows; raise data.max_length or give longer texts"
    )
    predictions = [tuple(of_row) for of_row in sums.tolist()]
    return Outcome(_answers(dataset, predictions, [None] * len(dataset)), {"tokens": float(sums[:, 2].sum())})


ANSWERING: dict[str, Callable[[_Run, Dataset, Task], Outcome]] = {
    "classification": _classes,
    "regression": _numbers,
    "multiple-choice": _options,
    "likelihood": _likelihood,
    "causal-lm": _next_tokens,
}
"""`Task.answering` -> how a model answers."""


def _token_sums(run: _Run, dataset: Dataset) -> np.ndarray:
    """Over every row's labelled tokens: cross-entropy in nats, tokens predicted right, tokens. Float64 [rows, 3]."""
    sums = np.zeros((len(dataset), 3))
    for rows, labels, logits in run.batches(dataset, "Evaluating"):
        # row by row: copies of a batch's logits [rows, tokens, vocabulary] would take more memory than the model did
        for row, of_row, targets in zip(rows, logits[:, :-1], labels[:, 1:].to(logits.device), strict=True):
            sums[row] = _row_sums(of_row, targets)
    return sums


def _row_sums(logits: Tensor, targets: Tensor) -> tuple[float, float, float]:
    counted = targets != IGNORED
    picked, targets = logits[counted].float(), targets[counted]
    losses = nn.functional.cross_entropy(picked, targets, reduction="none")
    right = (picked.argmax(-1) == targets).sum()
    return losses.double().sum().item(), right.item(), float(len(targets))


def _picked(dataset: Dataset, chosen: list[int]) -> Answers:
    """Answers by option: its number or, where several may be right, its name."""
    if "right" not in dataset.column_names:
        return _answers(dataset, chosen, dataset["labels"][:])
    texts = [names[index] for names, index in zip(dataset["names"], chosen, strict=True)]
    return _answers(dataset, texts, dataset["right"][:])


def _answers(
    dataset: Dataset, predictions: list[Any], references: list[Any], probabilities: np.ndarray | None = None
) -> Answers:
    groups = dataset["group"][:] if "group" in dataset.column_names else None
    return Answers(predictions, references, groups, probabilities)


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


# -- files of inputs and predictions -----------------------------------------------------------------------------


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
            check_column(rows, column, setting, "input")
            check_strings(rows, column, TaskEntry(), "input")
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
    write_table(path, [*renamed.values(), *new], table)


def write_table(path: Path | None, header: list[str], table: Iterable[dict[str, Any]]) -> None:
    """Write rows with the columns of `header`; the file appears only when it is complete.

    Args:
        path: .csv or .jsonl file, replaced if it is there; None: CSV on standard output.

    Raises:
        LightPeftError: another suffix, or the file cannot be written.
    """
    write = _write_csv if path is None else check_predictions_path(path)
    if path is None:
        write(sys.stdout, header, table)
        return
    try:
        with _replacing(path) as file:
            write(file, header, table)
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
