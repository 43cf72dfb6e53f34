"""What a live model does on data: its answers, and what is measured of them."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from scipy.special import softmax
from torch import Tensor, nn

from lightpeft.config import LikelihoodRule
from lightpeft.console.bars import Progress, bar
from lightpeft.errors import require
from lightpeft.evaluation.batching import fitting_batch_size, in_batches
from lightpeft.evaluation.generating import generate_texts
from lightpeft.evaluation.statistics import Interval, bootstrap_intervals
from lightpeft.machine import autocasting
from lightpeft.models.patching import in_mode
from lightpeft.models.unwrap import transformers_model
from lightpeft.tasks.answers import BESIDES, Answers, require_finite
from lightpeft.tasks.kinds.base import Task
from lightpeft.tasks.kinds.likelihood import ACCURACIES, option_scores, option_sequences
from lightpeft.tasks.kinds.span import SpanTask, window_of
from lightpeft.tasks.kinds.windows import Span, answer_text, best_of_windows, best_span
from lightpeft.tasks.metrics import accuracy
from lightpeft.tasks.tokens import IGNORED, SPAN_LABELS, Collator, without_labels

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What a model did on encoded test rows."""

    answers: Answers
    measured: dict[str, float] = field(default_factory=dict)
    """What is no mean of numbers of the examples, such as the loss a token, by name."""


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    task: Task,
    collator: Collator,
    batch_size: int | None,
    autocast: torch.dtype | None = None,
    progress: Progress = bar,
) -> dict[str, float]:
    """Metrics of `model` on encoded rows with labels; arguments as for `outcome` and `Run`.

    Returns:
        What `task` measures, the main metric first, then the loss and examples. The loss is a mean in nats: of
        classification and multiple choice the cross-entropy a row, of spans that of a window's first and last token, by
        likelihood that of a token of the right option, of causal-lm that of a labelled token; of regression it is the
        squared error, and of generated texts there is none. Likelihood adds the accuracy of each rule that can pick an
        option.

    Raises:
        LightPeftError: as `outcome`.
    """
    return values_of(outcome(Run(model, collator, batch_size, autocast, progress), dataset, task), task)


def values_of(outcome: Outcome, task: Task) -> dict[str, float]:
    """What `evaluate` returns, of an outcome at hand."""
    beside = BESIDES(outcome.answers)
    return {**task.score(outcome.answers), **beside, **outcome.measured, "examples": float(len(outcome.answers))}


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
        intervals |= prefixed(prefix, bootstrap_intervals(of_split.answers, *task.measures, BESIDES, seed=seed))
    return Scores(metrics, intervals)


def prefixed(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """Values by name, with the prefix of their split; that of the test rows is empty."""
    return {f"{prefix}_{name}" if prefix else name: value for name, value in values.items()}


def outcome(run: Run, dataset: Dataset, task: Task) -> Outcome:
    """Answers of the model on encoded rows with labels, and what was measured on the way.

    Args:
        dataset: what `task.encode_test` returned.
        task: says how the model answers.

    Raises:
        LightPeftError: there is no row or no token to predict, or the model's answers are NaN or infinite.
    """
    return ANSWERING[task.answering](run, dataset, task)


# -- how each head answers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A model and how rows are fed to it."""

    model: nn.Module
    """A transformers or PEFT model; its training mode is restored afterwards."""
    collator: Collator
    """`task.collator(tokenizer)`."""
    batch_size: int | None
    """Rows a forward pass (of likelihood: options, of spans: windows); rows of similar length share one. None: as many
    as fit into memory; where even that is too much, half of them."""
    autocast: torch.dtype | None = None
    """Half precision of the forward pass under autocast; None: that of the weights. Losses are computed in float32."""
    progress: Progress = bar
    """How the loop is shown."""

    def outputs(self, dataset: Dataset, description: str) -> Iterator[tuple[Sequence[int], dict[str, Tensor], Any]]:
        """Row numbers, the batch of them, and what the model gives for it; batch by batch, the longest rows first.

        Longest first: a batch that doesn't fit into memory fails, or is made smaller, at once.
        """
        require(len(dataset) > 0, "there are no rows to evaluate")
        order = np.argsort(-np.asarray(dataset["length"][:]), kind="stable").tolist()
        device = next(self.model.parameters()).device
        accepted = _accepted_inputs(self.model)

        def compute(rows: Sequence[int]) -> tuple[dict[str, Tensor], Any]:
            batch = self.collator(_rows(dataset, rows))
            inputs = {name: value.to(device) for name, value in without_labels(batch).items() if name in accepted}
            with torch.inference_mode(), autocasting(device, self.autocast):
                return batch, self.model(**inputs)

        with in_mode(self.model, training=False):
            size = self.batch_size or fitting_batch_size(self.model, order, compute)
            batches = in_batches(order, compute, size)
            for rows, (batch, output) in self.progress(batches, math.ceil(len(order) / size), description):
                yield rows, batch, output


def logits_of(run: Run, dataset: Dataset) -> list[Tensor]:
    """Every row's logits, float32 [classes] on the CPU.

    Raises:
        LightPeftError: there is no row, or logits are not finite.
    """
    return _finite(_logits(run, dataset))


def _logits(run: Run, dataset: Dataset) -> list[Tensor]:
    result = [torch.empty(0)] * len(dataset)
    for rows, _, output in run.outputs(dataset, "Predicting"):
        for row, of_row in zip(rows, output.logits.float().cpu(), strict=True):
            result[row] = of_row
    return result


def _classes(run: Run, dataset: Dataset, task: Task) -> Outcome:
    logits, labels = torch.stack(logits_of(run, dataset)), dataset["labels"][:]
    answers = _answers(dataset, logits.argmax(-1).tolist(), labels, logits.softmax(-1).numpy())
    losses = nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    return Outcome(replace(answers, scores={"loss": losses.double().numpy()}))


def _numbers(run: Run, dataset: Dataset, task: Task) -> Outcome:
    predicted = torch.stack(logits_of(run, dataset)).squeeze(-1)
    labels = dataset["labels"][:]
    losses = nn.functional.mse_loss(predicted, torch.tensor(labels), reduction="none")
    return Outcome(replace(_answers(dataset, predicted.tolist(), labels), scores={"loss": losses.double().numpy()}))


def option_logits(run: Run, dataset: Dataset) -> list[Tensor]:
    """Every row's logits, float32 [options]; a batch fills rows up to its largest number of options.

    Raises:
        LightPeftError: as `logits_of`.
    """
    counts = [len(options) for options in dataset["input_ids"]]
    return _finite([of_row[:count] for of_row, count in zip(_logits(run, dataset), counts, strict=True)])


def _finite(rows: list[Tensor]) -> list[Tensor]:
    """The logits of all rows, found to be numbers."""
    require_finite([bool(of_row.isfinite().all()) for of_row in rows])
    return rows


def _options(run: Run, dataset: Dataset, task: Task) -> Outcome:
    logits = option_logits(run, dataset)
    losses = [-of_row.log_softmax(-1)[label] for of_row, label in zip(logits, dataset["labels"], strict=True)]
    chosen = [int(of_row.argmax()) for of_row in logits]
    return Outcome(replace(_picked(dataset, chosen), scores={"loss": torch.stack(losses).double().numpy()}))


def _likelihood(run: Run, dataset: Dataset, task: Task) -> Outcome:
    labels = dataset["labels"][:]
    scored = likelihoods_of(run, dataset)
    picked = {rule: _picked(dataset, [int(row.argmax(-1)) for row in rows]) for rule, rows in scored.scores.items()}
    right = [numbers[label] for numbers, label in zip(scored.sequences, labels, strict=True)]
    accuracies = {name: accuracy.scores(picked[rule])["accuracy"] for rule, name in ACCURACIES.items()}
    measured = {"loss": float(scored.losses[right].sum()) / float(scored.tokens[right].sum())}
    rule = task.config.likelihood
    answers = replace(picked[rule], scores=accuracies)
    if task.labels:
        answers = replace(answers, probabilities=softmax(np.stack(scored.scores[rule]), axis=-1).astype(np.float32))
    return Outcome(answers, measured)


def _next_tokens(run: Run, dataset: Dataset, task: Task) -> Outcome:
    sums = _token_sums(run, dataset)
    require_finite(np.isfinite(sums[:, 0]))
    require(
        sums[:, 2].sum() > 0, "there is no token to predict in these rows; raise data.max_length or give longer texts"
    )
    predictions = [tuple(of_row) for of_row in sums.tolist()]
    return Outcome(_answers(dataset, predictions, [None] * len(dataset)), {"tokens": float(sums[:, 2].sum())})


def _pieces(run: Run, dataset: Dataset, task: Task) -> Outcome:
    assert isinstance(task, SpanTask)
    spans, losses = spans_of(run, dataset, task.config.answer_tokens)
    contexts, right = (_by_row(dataset, name) for name in ("context", "right"))
    texts = [answer_text(span, context, task.null_threshold) for span, context in zip(spans, contexts, strict=True)]
    return Outcome(Answers(texts, right), {"loss": float(np.mean(losses))})


def _texts(run: Run, dataset: Dataset, task: Task) -> Outcome:
    return Outcome(_answers(dataset, texts_of(run, dataset, task), dataset["right"][:]), {})


ANSWERING: dict[str, Callable[[Run, Dataset, Task], Outcome]] = {
    "classification": _classes,
    "regression": _numbers,
    "multiple-choice": _options,
    "likelihood": _likelihood,
    "span": _pieces,
    "generation": _texts,
    "causal-lm": _next_tokens,
}
"""`Task.answering` -> how a model answers."""


@dataclass(frozen=True)
class Likelihoods:
    """How probable a model finds the options of rows."""

    scores: dict[LikelihoodRule, list[np.ndarray]]
    """Every rule's scores of every row's options."""
    sequences: list[list[int]]
    """Number of the sequence of every row's every option."""
    losses: np.ndarray
    """Cross-entropy of each sequence's scored tokens, in nats."""
    tokens: np.ndarray
    """Their number."""


def likelihoods_of(run: Run, dataset: Dataset) -> Likelihoods:
    """Scores of every row's options, of what `LikelihoodTask.encode_test` or `encode_inputs` returned.

    Raises:
        LightPeftError: there is no row, or a probability is no number.
    """
    sequences = option_sequences(dataset)
    losses, _, tokens = _token_sums(run, sequences.rows).T
    asked = zip(sequences.asked, sequences.unconditional, strict=True)
    require_finite([bool(np.isfinite(losses[[*options, *plain]]).all()) for options, plain in asked])
    scores = option_scores(sequences, -losses, tokens, dataset["bytes"][:])
    return Likelihoods(scores, sequences.asked, losses, tokens)


def spans_of(run: Run, dataset: Dataset, most_tokens: int) -> tuple[list[Span], list[float]]:
    """Every row's best span, and the cross-entropy of every window, in nats, where windows have labels.

    Args:
        dataset: what `SpanTask.encode_test` or `encode_inputs` returned.
        most_tokens: tokens of an answer at most.

    Raises:
        LightPeftError: there is no row, or logits are not finite.
    """
    spans: dict[int, list[Span]] = defaultdict(list)
    finite: dict[int, bool] = defaultdict(lambda: True)
    losses = []
    for numbers, batch, output in run.outputs(dataset, "Answering"):
        real = batch["attention_mask"].bool()
        logits = torch.stack([output.start_logits, output.end_logits], dim=1).float().cpu()
        for row, of_window, tokens in zip(_rows(dataset, numbers), logits, real, strict=True):
            window, of_tokens = window_of(row), of_window[:, tokens]  # without padding, on whatever side
            finite[window.example] &= bool(of_tokens.isfinite().all())
            spans[window.example].append(best_span(window, of_tokens[0], of_tokens[1], most_tokens))
            if SPAN_LABELS[0] in row:
                targets = torch.tensor([row[name] for name in SPAN_LABELS])
                losses.append(nn.functional.cross_entropy(of_tokens, targets).item())
    require_finite([finite[row] for row in range(len(spans))])
    return [best_of_windows(spans[row]) for row in range(len(spans))], losses


def texts_of(run: Run, dataset: Dataset, task: Task) -> list[str]:
    """What the model writes behind every row's tokens; of `data.task: generation`, one line.

    Raises:
        LightPeftError: there is no row, or logits are not finite.
    """
    require(len(dataset) > 0, "there are no rows to evaluate")
    tokenizer = run.collator.tokenizer
    assert tokenizer is not None
    with in_mode(run.model, training=False):
        return generate_texts(
            run.model,
            dataset["input_ids"][:],
            tokenizer,
            max_new_tokens=task.config.answer_tokens,
            one_line=task.answering == "generation",
            batch_size=run.batch_size,
            autocast=run.autocast,
            progress=run.progress,
        )


def _by_row(dataset: Dataset, column: str) -> list[Any]:
    """A column of windows, one value a row that they come from."""
    values = dict(zip(dataset["row"], dataset[column], strict=True))
    return [values[row] for row in range(len(values))]


def _token_sums(run: Run, dataset: Dataset) -> np.ndarray:
    """Over every row's labelled tokens: cross-entropy in nats, tokens predicted right, tokens. Float64 [rows, 3]."""
    sums = np.zeros((len(dataset), 3))
    for rows, batch, output in run.outputs(dataset, "Evaluating"):
        logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
        # row by row: copies of a batch's logits [rows, tokens, vocabulary] would take more memory than the model did
        of_batch = [_row_sums(*of_row) for of_row in zip(logits, labels, strict=True)]
        sums[list(rows)] = torch.stack(of_batch).cpu().numpy()  # one host copy a batch
    return sums


def _row_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """The same of one row, on the device of its logits [tokens, vocabulary]; labels are on the host."""
    places = (labels != IGNORED).nonzero().flatten()
    picked, targets = logits[places.to(logits.device)].float(), labels[places].to(logits.device)
    losses = nn.functional.cross_entropy(picked, targets, reduction="none")
    right = (picked.argmax(-1) == targets).sum()
    return torch.stack([losses.double().sum(), right.double(), torch.full_like(right, len(targets)).double()])


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


def _rows(dataset: Dataset, numbers: Sequence[int]) -> list[dict[str, Any]]:
    columns = dataset[list(numbers)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _accepted_inputs(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Parameters of the transformers model's forward: not every model takes all that a tokenizer gives."""
    return inspect.signature(transformers_model(model).forward).parameters
