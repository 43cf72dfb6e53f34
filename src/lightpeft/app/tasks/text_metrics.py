"""How well a text answers a question that has right answers: exact match and token F1, as SQuAD counts them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from lightpeft.app.tasks.answers import Answers, MeanMetric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case without ASCII punctuation, articles and surplus space (the official script of SQuAD 2.0)."""
    words = _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION))
    return " ".join(words.split())


def exact(prediction: str, answer: str) -> float:
    """1 if both are the same after normalisation, else 0."""
    return float(normalised(prediction) == normalised(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words, counted as often as they occur; of no words: `exact`."""
    predicted, right = normalised(prediction).split(), normalised(answer).split()
    if not predicted or not right:
        return float(predicted == right)
    common = (Counter(predicted) & Counter(right)).total()
    return 2 * common / (len(predicted) + len(right))


def best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """The score against the right answer that fits best; where there is none, the right answer is no text at all."""
    return max(score(prediction, answer) for answer in _with_words(answers) or [""])


def _with_words(answers: Sequence[str]) -> list[str]:
    return [answer for answer in answers if normalised(answer)]


@lru_cache(maxsize=2**16)  # resampled answers are scored many times
def _f1_and_exact(prediction: str, answers: tuple[str, ...]) -> tuple[float, float]:
    return best(token_f1, prediction, answers), best(exact, prediction, answers)


def _scores(answers: Answers) -> dict[str, np.ndarray]:
    """Name of the metric -> float [examples]."""
    pairs = zip(answers.predictions, answers.references, strict=True)
    scores = np.array([_f1_and_exact(prediction, tuple(right)) for prediction, right in pairs])
    return {"f1": scores[:, 0], "exact_match": scores[:, 1]}


text_match = MeanMetric(_scores)
"""SQuAD's f1 and exact_match, in [0, 1]: of predicted texts, each against the reference (a list of texts an example)
that it fits best. Rajpurkar et al. 2016, arXiv 1606.05250."""


def by_answerability(answers: Answers) -> dict[str, float]:
    """What SQuAD 2.0 measures besides: `text_match` of the questions that have an answer, and of those that have none.

    Without a reference an empty prediction is right. What there is no question for has no value.
    Rajpurkar et al. 2018, arXiv 1806.03822.
    """
    answerable, of_all = np.array([bool(_with_words(right)) for right in answers.references]), _scores(answers)
    parts = {"has_answer": answerable, "no_answer": ~answerable}
    return {
        f"{part}_{name}": float(np.mean(scores[chosen]))
        for part, chosen in parts.items()
        if chosen.any()
        for name, scores in of_all.items()
    }
