"""How well a text answers a question that has right answers: exact match and token F1, as SQuAD counts them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import fmean

from lightpeft.tasks.answers import Answers

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=2**16)  # resampled answers are scored many times
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
    right = [answer for answer in answers if normalised(answer)] or [""]
    return max(score(prediction, answer) for answer in right)


def text_match(answers: Answers) -> dict[str, float]:
    """SQuAD 1.1's metrics: f1 and exact_match, in [0, 1], each against the best of an example's references.

    Predictions are texts, references lists of texts. Rajpurkar et al. 2016, arXiv 1606.05250.
    """
    return {name: fmean(_each(score, answers)) for name, score in _SCORES.items()}


def squad_v2(answers: Answers) -> dict[str, float]:
    """SQuAD 2.0's metrics: those of `text_match`, and apart for questions with and without an answer.

    A question without an answer has no reference, and an empty prediction is right. What there is no question for has
    no value. Rajpurkar et al. 2018, arXiv 1806.03822.
    """
    metrics = text_match(answers)
    for kind, answerable in (("has_answer", True), ("no_answer", False)):
        chosen = [index for index, right in enumerate(answers.references) if bool(_texts(right)) is answerable]
        part = text_match(answers.take(chosen)) if chosen else {}
        metrics |= {f"{kind}_{name}": value for name, value in part.items()}
    return metrics


_SCORES: dict[str, Callable[[str, str], float]] = {"f1": token_f1, "exact_match": exact}


def _each(score: Callable[[str, str], float], answers: Answers) -> list[float]:
    return [best(score, *pair) for pair in zip(answers.predictions, answers.references, strict=True)]


def _texts(references: Sequence[str]) -> list[str]:
    return [text for text in references if normalised(text)]
