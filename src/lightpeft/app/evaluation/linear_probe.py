"""A linear probe: logistic regression on the base model's hidden states, a baseline for runs with few rows."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.evaluation.scores import LOWER_IS_BETTER, Scores, scores_of
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.respondent import OutputsOnly
from lightpeft.console.progress import exact_duration
from lightpeft.errors import require
from lightpeft.models.task_heads import CLASSIFICATION, is_decoder

FEW_ROWS = 1000
"""Runs with this many training rows or more have no linear probe."""
_C_VALUES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for C of LogisticRegression; cross-validation chooses one."""
_FOLDS = 5
_LEAST_PROBABILITY = 1e-12
"""Lower bound of probabilities, so that a class without training rows has a finite loss."""


@dataclass(frozen=True)
class LinearProbe:
    """Scores of a linear probe."""

    scores: Scores
    seconds: float
    rows: int
    """Number of its training rows."""

    def facts(self) -> dict[str, Any]:
        """Return the entry `linear_probe` of metrics.json."""
        return {"metrics": self.scores.metrics, "intervals": self.scores.intervals, "seconds": round(self.seconds, 3)}

    def doubts(self, run: Scores, task: Task, majority: Mapping[str, float]) -> Iterator[str]:
        """Yield a warning if the run's main metric is no better than the probe's, and the probe learned something.

        Args:
            run: scores of the run.
            task: the task.
            majority: main metric of the majority baseline; empty: not known.
        """
        name = task.main_metric
        own, trained = self.scores.metrics[name], run.metrics[name]
        sign = -1 if name in LOWER_IS_BETTER else 1
        learned = name not in majority or sign * own > sign * majority[name]
        if learned and sign * own >= sign * trained:
            what = f"a linear probe of the base model is as good: {name} {own:.4f}, the run {trained:.4f}"
            yield f"{what}, from {self.rows} rows in {exact_duration(self.seconds)}; use it, or label more rows"


def doubts_by_depth(depth: Mapping[str, Any], run: Scores) -> Iterator[str]:
    """Yield a warning if ridge regression on one block of the untouched decoder is as accurate as the run's model.

    The search for a depth has measured it already, by leaving out one training row at a time.

    Args:
        depth: facts of `FoundDepth`; without `accuracy`, nothing was measured.
        run: scores of the run, of which the interval of `accuracy` counts.
    """
    interval = run.intervals.get("accuracy")
    if interval is None or not depth.get("accuracy"):
        return
    best = min(range(len(depth["error"])), key=depth["error"].__getitem__)
    ridge, trained, (low, high) = depth["accuracy"][best], run.metrics["accuracy"], interval
    if ridge >= low:
        what = f"ridge regression on block {best + 1} of the base is as good: leave-one-out accuracy {ridge:.4f}"
        of_run = f"the run has {trained:.4f} (95% interval {low:.4f} to {high:.4f}) on the test rows"
        yield f"{what} on {depth['rows']} training rows, and {of_run}; it needs no training"


def is_probed(task: Task, config: PretrainedConfig) -> bool:
    """Return True if a run gets a linear probe: an encoder that classifies, with fewer than `FEW_ROWS` rows."""
    encoder = not is_decoder(config) and not config.is_encoder_decoder
    return task.head == CLASSIFICATION and encoder and len(task.train) < FEW_ROWS


def linear_probe(asked: BatchedModel, base: PreTrainedModel, task: Task, train: Dataset, test: Dataset) -> LinearProbe:
    """Train and measure a linear probe.

    The features of a text are the mean of its last hidden states over tokens; cross-validation on the training rows,
    with a fixed seed, chooses the regularization C.

    Args:
        asked: a batched model, with the collator and batch size to use.
        base: the base model; its head is left out.
        train: training rows, encoded by `task.encode`.
        test: test rows, encoded by `task.encode_test`.

    Raises:
        LightPeftError: the hidden states do not match the tokens, or are NaN or infinite.
    """
    started = time.perf_counter()
    asked = replace(asked, model=base.base_model)
    fitted = _fit_regression(_embed(asked, train), train["labels"][:])
    probabilities = np.full((len(test), len(task.labels)), _LEAST_PROBABILITY)
    probabilities[:, fitted.classes_] = np.maximum(fitted.predict_proba(_embed(asked, test)), _LEAST_PROBABILITY)
    scores = scores_of({"": task.answer(_FixedLogits(torch.from_numpy(probabilities).log()), test)}, task)
    return LinearProbe(scores, time.perf_counter() - started, len(train))


def _embed(asked: BatchedModel, encoded: Dataset) -> np.ndarray:
    """Return the mean of the last hidden states over each row's tokens: float32 [rows, width]."""
    means = [torch.empty(0)] * len(encoded)
    for rows, batch, output in asked.outputs(encoded, "Embedding"):
        states = output[0].float()
        mask = batch["attention_mask"].to(states)
        require(states.shape[:2] == mask.shape, "the base model does not return one hidden state per token")
        of_rows = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for row, mean in zip(rows, of_rows.cpu(), strict=True):
            means[row] = mean
    embedded: np.ndarray = torch.stack(means).numpy()
    require(
        np.isfinite(embedded).all(),
        "hidden states of the base model are NaN or infinite; use model.dtype float32",
    )
    return embedded


def _fit_regression(embedded: np.ndarray, labels: Sequence[int]) -> Any:
    """Return the logistic regression with the C of the best cross-validated accuracy."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    second = Counter(labels).most_common(2)[-1][1]  # with at most so many folds, every training part has two classes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes rarer than folds, and fits that do not converge
        if second < 2:
            return model.fit(embedded, labels)
        folds = StratifiedKFold(min(_FOLDS, second), shuffle=True, random_state=0)
        return GridSearchCV(model, {"logisticregression__C": _C_VALUES}, cv=folds).fit(embedded, labels)


@dataclass(frozen=True)
class _FixedLogits(OutputsOnly):
    """A `Respondent` that returns fixed logits, so that a task scores them like those of a model."""

    logits: Tensor

    def outputs(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], dict[str, Tensor], Any]]:
        yield range(len(encoded)), {}, SimpleNamespace(logits=self.logits)
