"""GLUE (Wang et al. 2019): nine tasks on sentences and pairs of them, as nyu-mll/glue holds them.

Test labels are hidden, so the validation split is evaluated on. Prompts and label words are lm-evaluation-harness'.
"""

from __future__ import annotations

from typing import Any

from lightpeft.config import TaskEntry

SENTENCES = {"text": "sentence1", "text_pair": "sentence2", "label": "label"}


def _entry(config: str, columns: dict[str, str], **fields: Any) -> TaskEntry:
    return TaskEntry(hub=f"nyu-mll/glue/{config}", columns=columns, **fields)


ENTRIES: dict[str, TaskEntry] = {
    "cola": _entry(
        "cola",
        {"text": "sentence", "label": "label"},
        labels=["unacceptable", "acceptable"],
        prompt="{text}\nQuestion: Does this sentence make sense?\nAnswer:",
        words=["no", "yes"],
        metrics=["matthews", "accuracy"],
    ),
    "sst2": _entry(
        "sst2",
        {"text": "sentence", "label": "label"},
        labels=["negative", "positive"],
        prompt="{text}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        metrics=["accuracy"],
    ),
    "mrpc": _entry(
        "mrpc",
        SENTENCES,
        labels=["not_equivalent", "equivalent"],
        prompt="Sentence 1: {text}\nSentence 2: {text_pair}\nQuestion: Do both sentences mean the same thing?\nAnswer:",
        words=["no", "yes"],
        metrics=["accuracy", "f1"],
    ),
    "stsb": _entry("stsb", SENTENCES, kind="regression", metrics=["pearson", "spearman"]),
    "qqp": _entry(
        "qqp",
        {"text": "question1", "text_pair": "question2", "label": "label"},
        labels=["not_duplicate", "duplicate"],
        prompt="Question 1: {text}\nQuestion 2: {text_pair}\nQuestion: Do both questions ask the same thing?\nAnswer:",
        words=["no", "yes"],
        metrics=["accuracy", "f1"],
    ),
    "mnli": _entry(
        "mnli",
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        test="validation_matched",
        more_tests={"mismatched": "validation_mismatched"},
        labels=["entailment", "neutral", "contradiction"],
        prompt="{text}\nQuestion: {text_pair} True, False or Neither?\nAnswer:",
        words=["True", "Neither", "False"],
        metrics=["accuracy"],
    ),
    "qnli": _entry(
        "qnli",
        {"text": "question", "text_pair": "sentence", "label": "label"},
        labels=["entailment", "not_entailment"],
        prompt="{text}\n{text_pair}\nQuestion: Does this response answer the question?\nAnswer:",
        words=["yes", "no"],
        metrics=["accuracy"],
    ),
    "rte": _entry(
        "rte",
        SENTENCES,
        labels=["entailment", "not_entailment"],
        prompt="{text}\nQuestion: {text_pair} True or False?\nAnswer:",
        words=["True", "False"],
        metrics=["accuracy"],
    ),
    "wnli": _entry(
        "wnli",
        SENTENCES,
        labels=["not_entailment", "entailment"],
        prompt="{text}\nQuestion: {text_pair} True or False?\nAnswer:",
        words=["False", "True"],
        metrics=["accuracy"],
    ),
}
"""Name of a task -> its entry."""
