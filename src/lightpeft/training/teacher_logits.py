"""The logits of a teacher as a column of training rows: which models can be taught, and rows with and without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset, Value
from datasets import Sequence as ListOf
from torch import Tensor, nn

from lightpeft.errors import require
from lightpeft.machine import processes
from lightpeft.models.batches import TEACHER_LOGITS
from lightpeft.models.unwrap import transformers_model

OutputKind = Literal["classes", "options", "tokens", "numbers"]
"""Kind of a model's output for a row: one of the classes, one of the row's options, a class per token, or numbers."""
_ROWS_THAT_TELL = 32
"""Fewer rows may well be of one class."""
_SHOWN_ROWS = 5
"""Most rows that an error line names."""


def output_kind_of(model: nn.Module, rows: Any = None) -> OutputKind:
    """Return the kind of a model's output.

    Args:
        rows: training rows, whose labels tell whether a row may have several classes; None: not known.

    Raises:
        LightPeftError: a kind of output that distillation does not support.
    """
    inner = transformers_model(model)
    name, config = type(inner).__name__, inner.config
    if name.endswith("ForMultipleChoice"):
        return "options"
    if name.endswith("ForTokenClassification"):
        return "tokens"
    several = config.num_labels > 1 and config.problem_type is None and _has_fractions(rows)
    several = several or config.problem_type == "multi_label_classification"
    taught = name.endswith("ForSequenceClassification") and not several
    only = "distillation needs a model with one class per row, option or token, or with numbers"
    require(taught, f"teacher: {name} is not supported: {only}; leave the teacher out")
    return "numbers" if config.num_labels == 1 or config.problem_type == "regression" else "classes"


def _has_fractions(rows: Any) -> bool:
    """Return True if the labels of the first row are floats."""
    first = rows[0] if isinstance(rows, Dataset) and len(rows) else {}
    label = next((first[name] for name in ("labels", "label") if name in first), 0)
    return bool(np.asarray(label).dtype.kind == "f")


def has_teacher_logits(rows: Any) -> bool:
    """Return True if training rows have a column of a teacher's logits."""
    return isinstance(rows, Dataset) and TEACHER_LOGITS in rows.column_names


def without_teacher_logits(rows: Any) -> Any:
    """Return the rows without the column of a teacher's logits."""
    return rows.remove_columns(TEACHER_LOGITS) if has_teacher_logits(rows) else rows


def with_teacher_logits(rows: Dataset, logits: Sequence[Tensor]) -> Dataset:
    """Return the rows with a teacher's logits as an additional column, float32.

    Args:
        logits: one tensor per row: [classes], [options], [tokens, classes] or [numbers].

    Raises:
        LightPeftError: some logits are not finite, or the rows have a transform.
    """
    bad = [str(number) for number, of_row in enumerate(logits, 1) if not of_row.isfinite().all()]
    named = ", ".join(bad[:_SHOWN_ROWS]) + (", ..." if bad[_SHOWN_ROWS:] else "")
    wrong = f"the teacher's logits of {len(bad)} of {len(logits)} rows are NaN or infinite (row {named})"
    require(not bad, f"{wrong}; give a teacher whose logits are finite")
    shown = rows.format
    made = "the training rows have a transform, to which the teacher's logits cannot be added; use map instead"
    require(shown["type"] != "custom", made)
    feature: Any = Value("float32")
    for _ in range(logits[0].dim()):
        feature = ListOf(feature)
    column: Any = [of_row.float().tolist() for of_row in logits]
    taught = rows.with_format(None).add_column(TEACHER_LOGITS, column, feature=feature)
    if shown["type"] is None:
        return taught
    columns = [*shown["columns"], TEACHER_LOGITS]
    kept = {"columns": columns, "output_all_columns": shown["output_all_columns"]}
    return taught.with_format(shown["type"], **kept, **shown["format_kwargs"])


def one_class_warning(logits: Sequence[Tensor], output_kind: OutputKind, names: Sequence[str]) -> str | None:
    """Return a warning if a teacher gives all rows one class (or option): it has learned nothing; None: it does not.

    Args:
        logits: one tensor per row, as in `with_teacher_logits`; tokens without a label have zeros.
        names: of the classes.
    """
    if output_kind == "numbers" or len(logits) < _ROWS_THAT_TELL:
        return None
    labeled = (of_row[of_row.any(-1)] if output_kind == "tokens" else of_row for of_row in logits)
    classes = {number for of_row in labeled for number in of_row.argmax(-1).reshape(-1).tolist()}
    if len(classes) != 1:
        return None
    number = classes.pop()
    what = f"option (number {number + 1})" if output_kind == "options" else f'class ("{names[number]}")'
    found = f"the teacher gives all {len(logits)} training rows the same {what}"
    return f"{found}, so there is nothing to learn from it; train the teacher longer, or leave it out"


def split_over_processes(rows: int, answer: Callable[[Sequence[int]], list[Tensor]]) -> list[Tensor]:
    """Compute a teacher's logits of all rows, split over the processes.

    Args:
        rows: number of rows.
        answer: returns the logits of the rows with these numbers, on the CPU.
    """
    state = processes()
    own = range(state.process_index, rows, state.num_processes)
    parts = gather_object([(own, answer(own) if own else [])])
    found = {number: of_row for numbers, logits in parts for number, of_row in zip(numbers, logits, strict=True)}
    return [found[number] for number in range(rows)]
