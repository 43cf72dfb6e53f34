"""Texts against right answers: the numbers that SQuAD's script and the libraries around it publish."""

from __future__ import annotations

import pytest

from lightpeft.app.evaluation.statistics import bootstrap_intervals
from lightpeft.app.tasks.answers import Answers
from lightpeft.app.tasks.text_metrics import best, by_answerability, exact, normalize_answer, text_match, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, a dog & an owl!", "cat dog owl"),
        ("theatre of Athens", "theatre of athens"),  # articles are whole words
        ("U.S.A.", "usa"),
        ("the", ""),
        ("Beyoncé", "beyoncé"),
    ],
)
def test_normalization(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "f1"),
    [
        ("this is the best span", "this is a good span", 3 / 4),
        ("Saint Bernadette", "Saint Bernadette Soubirous", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("ha ha ha", "ha ha", 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # a word counts as often as both have it
        ("Athens", "Sparta", 0.0),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("Athens", "", 0.0),
        ("", "Athens", 0.0),
    ],
)
def test_token_f1(prediction: str, answer: str, f1: float) -> None:
    assert token_f1(prediction, answer) == pytest.approx(f1)
    assert exact(prediction, answer) == float(f1 == 1.0)


def test_the_best_of_several_answers_counts() -> None:
    assert best(token_f1, "this is the best span", ["this is a good span", "something irrelevant"]) == 0.75
    assert best(exact, "1976", ["in 1976", "1976."]) == 1.0
    assert best(exact, "", []) == 1.0
    assert best(exact, "", ["", "the", "1976"]) == 0.0  # answers without a word don't count beside others
    assert best(exact, "something", ["the"]) == 0.0


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [(["1976"], 1.0), (["1999"], 0.0), (["1976", "Beyonce", "climate change"], 2 / 3)],
)
def test_values_of_the_metric_cards(predictions: list[str], expected: float) -> None:
    """The examples on the metric cards of squad and squad_v2 (Hugging Face evaluate), which give percent."""
    references = [["1976"], ["Beyoncé and Bruno Mars"], ["climate change"]][: len(predictions)]
    expected_both = {"f1": expected, "exact_match": expected}
    answers = Answers(predictions, references)
    assert text_match(answers) == pytest.approx(expected_both)
    assert by_answerability(answers) == pytest.approx(
        {"has_answer_f1": expected, "has_answer_exact_match": expected}
    )  # and of questions without an answer nothing is said


def test_unanswerable_questions_are_told_apart() -> None:
    predictions = ["", "Normandy", "in France today", ""]
    references = [[], [""], ["France", "in France"], ["10th century"]]
    answers = Answers(predictions, references)
    assert text_match(answers) == pytest.approx(
        {"f1": (1 + 0 + 0.8 + 0) / 4, "exact_match": 1 / 4}  # against "in France": precision 2/3, recall 1
    )
    assert by_answerability(answers) == pytest.approx(
        {
            "has_answer_f1": 0.8 / 2,
            "has_answer_exact_match": 0.0,
            "no_answer_f1": 1 / 2,
            "no_answer_exact_match": 1 / 2,
        }
    )


def test_intervals_where_a_resample_may_lack_a_kind_of_question() -> None:
    answers = Answers(["", "Normandy", "France", "Rouen"], [[], ["Normandy"], ["France"], ["Paris"]])
    intervals = bootstrap_intervals(answers, by_answerability)
    assert set(intervals) == set(by_answerability(answers))
    assert intervals["no_answer_f1"] == (1.0, 1.0)
    low, high = intervals["has_answer_f1"] or (1.0, 0.0)
    assert low < 2 / 3 < high
