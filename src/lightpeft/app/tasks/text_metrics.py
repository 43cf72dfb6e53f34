"""Exact match and token F1 of predicted texts, as SQuAD defines them."""

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


def normalize_answer(text: str) -> str:
    """Return the text in lower case without ASCII punctuation, articles and surplus space (SQuAD 2.0's script)."""
    words = _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION))
    return " ".join(words.split())


def exact(prediction: str, answer: str) -> float:
    """Return 1 if both texts are equal after `normalize_answer`, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Return the F1 of the predicted words, with repetitions; if one side has no words, 1 if both have none, else 0."""
    predicted, right = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not predicted or not right:
        return float(predicted == right)
    common = (Counter(predicted) & Counter(right)).total()
    return 2 * common / (len(predicted) + len(right))


def best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """Return the highest score over the right answers; without right answers, an empty prediction is right."""
    return max(score(prediction, answer) for answer in _nonempty_answers(answers) or [""])


def _nonempty_answers(answers: Sequence[str]) -> list[str]:
    return [answer for answer in answers if normalize_answer(answer)]


@lru_cache(maxsize=2**16)  # resampled answers are scored many times
def _f1_and_exact(prediction: str, answers: tuple[str, ...]) -> tuple[float, float]:
    return best(token_f1, prediction, answers), best(exact, prediction, answers)


def _scores(answers: Answers) -> dict[str, np.ndarray]:
    """Return f1 and exact_match of every example: float [examples] each."""
    pairs = zip(answers.predictions, answers.references, strict=True)
    scores = np.array([_f1_and_exact(prediction, tuple(right)) for prediction, right in pairs])
    return {"f1": scores[:, 0], "exact_match": scores[:, 1]}


text_match = MeanMetric(_scores)
"""SQuAD's f1 and exact_match in [0, 1] (Rajpurkar et al. 2016, arXiv 1606.05250). An example has a list of right texts,
and the best score counts."""


def by_answerability(answers: Answers) -> dict[str, float]:
    """Return `text_match` of questions with an answer and of those without (SQuAD 2.0).

    Without a right answer an empty prediction is right. If there are no questions of one sort, its values are missing.
    Rajpurkar et al. 2018, arXiv 1806.03822.
    """
    answerable, of_all = np.array([bool(_nonempty_answers(right)) for right in answers.references]), _scores(answers)
    parts = {"has_answer": answerable, "no_answer": ~answerable}
    return {
        f"{part}_{name}": float(np.mean(scores[chosen]))
        for part, chosen in parts.items()
        if chosen.any()
        for name, scores in of_all.items()
    }
