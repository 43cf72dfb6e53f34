"""A linear probe: what a logistic regression on the untouched base's states gets, where training rows are few."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
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

from lightpeft.app.evaluation.milestones import LOWER_IS_BETTER
from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.evaluation.scores import Scores, scores_of
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.console.progress import exact_duration
from lightpeft.errors import require
from lightpeft.models.task_heads import CLASSIFICATION, is_decoder

FEW = 1000
"""Training rows from which on a run does without."""
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of LogisticRegression's C, of which cross-validation picks one."""
_FOLDS = 5
_SURE = 1e-12
"""The least probability: a class that no training row has still has a finite loss."""


@dataclass(frozen=True)
class LinearProbe:
    """What was measured of one."""

    scores: Scores
    seconds: float
    rows: int
    """It was trained on."""

    def facts(self) -> dict[str, Any]:
        """What metrics.json says of it."""
        return {"metrics": self.scores.metrics, "intervals": self.scores.intervals, "seconds": round(self.seconds, 3)}

    def doubts(self, run: Scores, task: Task) -> Iterator[str]:
        """A line, where the run is no better."""
        name = task.main_metric
        own, trained = self.scores.metrics[name], run.metrics[name]
        if own <= trained if name in LOWER_IS_BETTER else own >= trained:
            what = f"a linear probe of the untouched base is as good: {name} {own:.4f} beside the run's {trained:.4f}"
            yield f"{what}, from {self.rows} training rows in {exact_duration(self.seconds)}; use that, or more rows"


def is_probed(task: Task, config: PretrainedConfig) -> bool:
    """Whether a run has a probe beside it: an encoder with a head tells texts apart that it learned from few rows."""
    encoder = not is_decoder(config) and not config.is_encoder_decoder
    return task.head == CLASSIFICATION and encoder and len(task.train) < FEW


def linear_probe(asked: BatchedModel, base: PreTrainedModel, task: Task, train: Dataset, test: Dataset) -> LinearProbe:
    """Train and measure one.

    Texts are the means of the last hidden states over their tokens; how strongly weights are held small is chosen by
    cross-validation on the training rows, with a fixed seed.

    Args:
        asked: how rows are fed to a model.
        base: the untouched base with any head, which is left out.
        train: what `task.encode` made of the rows to train on.
        test: what `task.encode_test` made of the rows to measure on.

    Raises:
        LightPeftError: the base has no finite state for each token.
    """
    started = time.perf_counter()
    asked = replace(asked, model=base.base_model)
    fitted = _fitted(_embedded(asked, train), train["labels"][:])
    probabilities = np.full((len(test), len(task.labels)), _SURE)
    probabilities[:, fitted.classes_] = np.maximum(fitted.predict_proba(_embedded(asked, test)), _SURE)
    scores = scores_of({"": task.answer(_Told(torch.from_numpy(probabilities).log()), test)}, task)
    return LinearProbe(scores, time.perf_counter() - started, len(train))


def _embedded(asked: BatchedModel, encoded: Dataset) -> np.ndarray:
    """Means of the last hidden states over every row's tokens: float32 [rows, width]."""
    means = [torch.empty(0)] * len(encoded)
    for rows, batch, output in asked.outputs(encoded, "Embedding"):
        states = output[0].float()
        mask = batch["attention_mask"].to(states)
        require(states.shape[:2] == mask.shape, "the base has no state for each token")
        of_rows = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for row, mean in zip(rows, of_rows.cpu(), strict=True):
            means[row] = mean
    embedded: np.ndarray = torch.stack(means).numpy()
    require(np.isfinite(embedded).all(), "states of the base are NaN or infinite")
    return embedded


def _fitted(embedded: np.ndarray, labels: Sequence[int]) -> Any:
    """The regression, with the strength that tells most rows right that it was not fitted to."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    second = Counter(labels).most_common(2)[-1][1]  # so many folds leave two classes in each of the others
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes rarer than folds, and fits that end before they are perfect
        if second < 2:
            return model.fit(embedded, labels)
        folds = StratifiedKFold(min(_FOLDS, second), shuffle=True, random_state=0)
        return GridSearchCV(model, {"logisticregression__C": _STRENGTHS}, cv=folds).fit(embedded, labels)


@dataclass(frozen=True)
class _Told:
    """Logits at hand as a `Respondent`, so that a task makes of them what it makes of a model's."""

    logits: Tensor

    def outputs(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], dict[str, Tensor], Any]]:
        yield range(len(encoded)), {}, SimpleNamespace(logits=self.logits)

    def next_logits(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        raise NotImplementedError

    def texts(self, encoded: Dataset, max_new_tokens: int, *, one_line: bool = False) -> list[str]:
        raise NotImplementedError
