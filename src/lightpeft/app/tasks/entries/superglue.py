"""SuperGLUE (Wang et al. 2019): eight harder tasks, as aps/super_glue holds them.

Test labels are hidden, so the validation split is evaluated on. Prompts and label words are lm-evaluation-harness'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightpeft.app.tasks.entries.converting import Convert
from lightpeft.config import TaskEntry

CONNECTORS = {"cause": "because", "effect": "therefore"}
"""COPA's question -> the word that joins a premise and an alternative."""
PLACEHOLDER = "@placeholder"
"""The gap in ReCoRD's queries."""
MARK = "*"
"""Character on both sides of a marked span (WiC, WSC)."""


def copa(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert COPA: the premise with a connector, and two alternatives in lower case that continue it."""
    alternatives = [row["choice1"], row["choice2"]]
    return {
        "context": f"{row['premise'].strip().rstrip('.!?')} {CONNECTORS[row['question']]}",
        "options": [text[:1].lower() + text[1:] for text in alternatives],
        "answer": row.get("label"),
    }


def multirc(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert MultiRC: an answer option to a question, right or wrong; the options of a question form a group."""
    index = row["idx"]
    return {
        "text": row["paragraph"],
        "text_pair": f"{row['question']} {row['answer']}",
        "label": row.get("label"),
        "group": f"{index['paragraph']}-{index['question']}",
        "prompt": f"{row['paragraph']}\nQuestion: {row['question']}\nAnswer: {row['answer']}\nIs the answer correct?",
    }


def record(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert ReCoRD: a passage, and its query with each entity in the gap; any of the right entities counts."""
    text, *highlights = row["passage"].strip().split("\n@highlight\n")
    facts = "".join(f"\n  - {highlight}." for highlight in highlights)
    entities, right = sorted(set(row["entities"])), sorted(set(row.get("answers") or ()))
    query = row["query"]
    if PLACEHOLDER not in query:
        raise ValueError(f"the query has no {PLACEHOLDER}")
    return {
        "context": f"{text}\n{facts}",
        "options": [query.replace(PLACEHOLDER, entity) for entity in entities],
        "names": entities,
        "answer": entities.index(right[0]) if right else None,
        "right": right,
    }


def wic(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert WiC: two sentences with the same word marked; the label says if it has the same meaning."""
    one, two = row["sentence1"], row["sentence2"]
    word = one[row["start1"] : row["end1"]]
    return {
        "text": mark_span(one, row["start1"], row["end1"]),
        "text_pair": mark_span(two, row["start2"], row["end2"]),
        "label": row.get("label"),
        "prompt": f"Sentence 1: {one}\nSentence 2: {two}\nQuestion: Is the word '{word}' used in the same way "
        "in the two sentences above?\nAnswer:",
    }


def wsc(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert WSC: a passage with a noun and a pronoun marked; the label says if the pronoun refers to the noun."""
    noun, pronoun = row["span1_text"], row["span2_text"]
    only_pronoun = mark_words(row["text"], [(row["span2_index"], pronoun)])
    return {
        "text": mark_words(row["text"], [(row["span1_index"], noun), (row["span2_index"], pronoun)]),
        "text_pair": f"{pronoun}: {noun}",
        "label": row.get("label"),
        "prompt": f'Passage: {only_pronoun}\nQuestion: In the passage above, does the pronoun "*{pronoun}*" refer to '
        f'"*{noun}*"?\nAnswer:',
    }


def mark_span(text: str, start: int, end: int) -> str:
    """Return the text with marks around characters `start` to `end` (exclusive)."""
    if not 0 <= start < end <= len(text):
        raise ValueError(f"characters {start} to {end} are outside a text of {len(text)} characters")
    return f"{text[:start]}{MARK}{text[start:end]}{MARK}{text[end:]}"


def mark_words(text: str, spans: list[tuple[int, str]]) -> str:
    """Return the text with marks around spans.

    Args:
        spans: index of the first word, and the span. If the text spells it differently, as many words are marked.
    """
    words = list(re.finditer(r"\S+", text))
    for index, span in sorted(spans, reverse=True):
        start, end = words[index].start(), words[index + len(span.split()) - 1].end()
        end = start + len(span) if text.startswith(span, start) else end
        text = mark_span(text, start, end)
    return text


CONVERTERS: dict[str, Convert] = {"copa": copa, "multirc": multirc, "record": record, "wic": wic, "wsc": wsc}
"""Name in `TaskEntry.convert` -> the function."""


def _entry(config: str, **fields: Any) -> TaskEntry:
    return TaskEntry(hub=f"aps/super_glue/{config}", **fields)


ENTRIES: dict[str, TaskEntry] = {
    "boolq": _entry(
        "boolq",
        columns={"text": "passage", "text_pair": "question", "label": "label"},
        labels=["False", "True"],
        prompt="{text}\nQuestion: {text_pair}?\nAnswer:",
        words=["no", "yes"],
        metrics=["accuracy"],
    ),
    "cb": _entry(
        "cb",
        columns={"text": "premise", "text_pair": "hypothesis", "label": "label"},
        labels=["entailment", "contradiction", "neutral"],
        prompt="{text}\nQuestion: {text_pair}. True, False, or Neither?\nAnswer:",
        words=["True", "False", "Neither"],
        metrics=["accuracy", "f1_macro"],
    ),
    "copa": _entry("copa", kind="multiple-choice", convert="copa", prompt="{context}", metrics=["accuracy"]),
    "multirc": _entry("multirc", convert="multirc", labels=["False", "True"], words=["no", "yes"], metrics=["multirc"]),
    "record": _entry("record", kind="multiple-choice", convert="record", prompt="{context}\n  -", metrics=["record"]),
    "superglue_rte": _entry(
        "rte",
        columns={"text": "premise", "text_pair": "hypothesis", "label": "label"},
        labels=["entailment", "not_entailment"],
        prompt="{text}\nQuestion: {text_pair} True or False?\nAnswer:",
        words=["True", "False"],
        metrics=["accuracy"],
    ),
    "wic": _entry("wic", convert="wic", labels=["False", "True"], words=["no", "yes"], metrics=["accuracy"]),
    "wsc": _entry("wsc.fixed", convert="wsc", labels=["False", "True"], words=["no", "yes"], metrics=["accuracy"]),
}
"""Name of a task -> its entry."""
