"""Multiple-choice and cloze questions; prompts are lm-evaluation-harness' where it scores the options' texts, too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightpeft.app.tasks.entries.converting import Convert
from lightpeft.config import TaskEntry

QUESTION = "Question: {context}\nAnswer:"
GAP = "_"
"""Where WinoGrande's options go."""


def lettered(row: Mapping[str, Any]) -> dict[str, Any]:
    """A question, and choices with texts and the letters (or numbers) that the key names."""
    return _lettered(row, row["question"])


def openbookqa(row: Mapping[str, Any]) -> dict[str, Any]:
    """As `lettered`; the question is often the beginning of a sentence."""
    return _lettered(row, row["question_stem"])


def quartz(row: Mapping[str, Any]) -> dict[str, Any]:
    """As `lettered`, with a sentence that states the relation which the question needs, where the data have one."""
    sentence = (row.get("para") or "").strip()
    question = f"Question: {row['question']}"
    return _lettered(row, f"{sentence}\n{question}" if sentence else question)


def piqa(row: Mapping[str, Any]) -> dict[str, Any]:
    """A goal and two ways to it."""
    return {"context": row["goal"], "options": [row["sol1"], row["sol2"]], "answer": _shown(row.get("label"))}


def sciq(row: Mapping[str, Any]) -> dict[str, Any]:
    """A question with its supporting text; the right answer is put among the wrong ones by alphabet."""
    right = row["correct_answer"]
    options = sorted([row["distractor1"], row["distractor2"], row["distractor3"], right])
    support = (row.get("support") or "").strip()
    context = f"{support}\nQuestion: {row['question']}" if support else f"Question: {row['question']}"
    return {"context": context, "options": options, "answer": options.index(right)}


def hellaswag(row: Mapping[str, Any]) -> dict[str, Any]:
    """An activity and how a scene of it begins; the options go on."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "context": _without_brackets(context),
        "options": [_without_brackets(ending) for ending in row["endings"]],
        "answer": _shown(row.get("label")),
    }


def winogrande(row: Mapping[str, Any]) -> dict[str, Any]:
    """A sentence with a gap for either option; what is scored is the sentence behind it (Trinh and Le 2018)."""
    before, gap, after = row["sentence"].partition(GAP)
    if not gap:
        raise ValueError(f"no {GAP} in it")
    answer = row.get("answer")
    return {
        "context": before.strip(),
        "options": [row["option1"], row["option2"]],
        "ending": after.strip(),
        "answer": int(answer) - 1 if answer else None,
    }


def socialiqa(row: Mapping[str, Any]) -> dict[str, Any]:
    """A situation, a question about it, and three answers numbered from 1."""
    label = row.get("label")
    return {
        "context": f"{row['context']} {row['question']}",
        "options": [row["answerA"], row["answerB"], row["answerC"]],
        "answer": int(label) - 1 if label else None,
    }


def race(row: Mapping[str, Any]) -> dict[str, Any]:
    """An article, a question about it or a sentence with a gap, and four answers."""
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


def _lettered(row: Mapping[str, Any], context: str) -> dict[str, Any]:
    choices = row["choices"]
    letters = list(choices["label"])
    return {
        "context": context,
        "options": list(choices["text"]),
        "answer": _position((row.get("answerKey") or "").strip(), letters),
    }


def _position(letter: str, letters: list[str]) -> int | None:
    """The index of the right letter; None where it is hidden."""
    if letter and letter not in letters:
        raise ValueError(f"{letter!r} is none of {', '.join(letters)}")
    return letters.index(letter) if letter else None


def _shown(label: Any) -> int | None:
    """A label from 0 on, also one that is stored as text; None where it is hidden (-1 or empty)."""
    if label is None or label == "" or int(label) < 0:
        return None
    return int(label)


def _without_brackets(text: str) -> str:
    """Without WikiHow's bracketed marks, of which a title ends a sentence."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ").strip()
