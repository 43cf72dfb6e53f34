"""Multiple-choice and cloze questions; prompts are lm-evaluation-harness' where it scores the options' texts, too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightpeft.app.tasks.entries.converting import Convert
from lightpeft.config import TaskEntry

QUESTION = "Question: {context}\nAnswer:"
GAP = "_"
"""The gap for the options in WinoGrande's sentences."""


def lettered(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a question with labeled choices (A, B, ... or 1, 2, ...) and an answer key, as in ARC."""
    return _letter_choices(row, row["question"])


def openbookqa(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert OpenBookQA: a question stem, often the beginning of a sentence, with labeled choices."""
    return _letter_choices(row, row["question_stem"])


def quartz(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert QuaRTz: labeled choices, with the sentence that states the needed relation if the data have one."""
    sentence = (row.get("para") or "").strip()
    question = f"Question: {row['question']}"
    return _letter_choices(row, f"{sentence}\n{question}" if sentence else question)


def piqa(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert PIQA: a goal and two solutions."""
    return {"context": row["goal"], "options": [row["sol1"], row["sol2"]], "answer": _label_number(row.get("label"))}


def sciq(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert SciQ: a question with its supporting text; the options are in alphabetical order."""
    right = row["correct_answer"]
    options = sorted([row["distractor1"], row["distractor2"], row["distractor3"], right])
    support = (row.get("support") or "").strip()
    context = f"{support}\nQuestion: {row['question']}" if support else f"Question: {row['question']}"
    return {"context": context, "options": options, "answer": options.index(right)}


def hellaswag(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert HellaSwag: an activity and the start of a scene; the options continue it."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "context": _without_brackets(context),
        "options": [_without_brackets(ending) for ending in row["endings"]],
        "answer": _label_number(row.get("label")),
    }


def winogrande(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert WinoGrande: the options fill the gap, and the rest of the sentence is scored (Trinh and Le 2018)."""
    before, gap, after = row["sentence"].partition(GAP)
    if not gap:
        raise ValueError(f"the sentence has no gap {GAP}")
    answer = row.get("answer")
    return {
        "context": before.strip(),
        "options": [row["option1"], row["option2"]],
        "ending": after.strip(),
        "answer": int(answer) - 1 if answer else None,
    }


def socialiqa(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert Social IQa: a situation, a question, and three answers numbered from 1."""
    label = row.get("label")
    return {
        "context": f"{row['context']} {row['question']}",
        "options": [row["answerA"], row["answerB"], row["answerC"]],
        "answer": int(label) - 1 if label else None,
    }


def race(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert RACE: an article, a question or a sentence with a gap, and four answers."""
    return {
        "context": f"Article: {row['article']}\n\nQuestion: {row['question']}",
        "options": list(row["options"]),
        "answer": _position(row.get("answer") or "", list("ABCD")),
    }


CONVERTERS: dict[str, Convert] = {
    "lettered": lettered,
    "openbookqa": openbookqa,
    "piqa": piqa,
    "sciq": sciq,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "socialiqa": socialiqa,
    "race": race,
    "quartz": quartz,
}
"""Name in `TaskEntry.convert` -> the function."""


def _entry(hub: str, convert: str, prompt: str = QUESTION, **fields: Any) -> TaskEntry:
    return TaskEntry(kind="multiple-choice", hub=hub, convert=convert, prompt=prompt, metrics=["accuracy"], **fields)


ENTRIES: dict[str, TaskEntry] = {
    "arc_easy": _entry("allenai/ai2_arc/ARC-Easy", "lettered", test="test"),
    "arc_challenge": _entry("allenai/ai2_arc/ARC-Challenge", "lettered", test="test"),
    "openbookqa": _entry("allenai/openbookqa/main", "openbookqa", prompt="{context}", test="test"),
    "piqa": _entry("baber/piqa", "piqa"),
    "sciq": _entry("allenai/sciq", "sciq", prompt="{context}\nAnswer:", test="test"),
    "hellaswag": _entry("Rowan/hellaswag", "hellaswag", prompt="{context}"),
    "winogrande": _entry("allenai/winogrande/winogrande_xl", "winogrande", prompt="{context}"),
    "socialiqa": _entry("lighteval/siqa", "socialiqa", prompt="Q: {context}\nA:"),
    "commonsense_qa": _entry("tau/commonsense_qa", "lettered"),
    "race": _entry("ehovy/race/high", "race", prompt="{context}\nAnswer:", test="test"),
    "quartz": _entry("allenai/quartz", "quartz", prompt="{context}\nAnswer:", test="test"),
}
"""Name of a task -> its entry."""


def _letter_choices(row: Mapping[str, Any], context: str) -> dict[str, Any]:
    choices = row["choices"]
    letters = list(choices["label"])
    return {
        "context": context,
        "options": list(choices["text"]),
        "answer": _position((row.get("answerKey") or "").strip(), letters),
    }


def _position(letter: str, letters: list[str]) -> int | None:
    """Return the index of the right letter; None if it is hidden."""
    if letter and letter not in letters:
        raise ValueError(f"the answer key {letter!r} is none of {', '.join(letters)}")
    return letters.index(letter) if letter else None


def _label_number(label: Any) -> int | None:
    """Return a label (from 0) as an integer; None if it is hidden (-1 or empty)."""
    if label is None or label == "" or int(label) < 0:
        return None
    return int(label)


def _without_brackets(text: str) -> str:
    """Remove WikiHow's marks in brackets; [title] becomes the end of a sentence."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ").strip()
