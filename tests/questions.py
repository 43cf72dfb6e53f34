"""Plainly synthetic questions, contexts, answers and chats over the workbench's words, in the layouts of the hub."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from workbench import BAD, GOOD, NEUTRAL

Rows = list[dict[str, Any]]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}bad0 {{ message.content }} [SEP]"
    "{% else %}good0 {{ message.content }} [SEP]{% endif %} {% endfor %}{% if add_generation_prompt %}bad0 {% endif %}"
)
"""good0 stands for the user, bad0 for the assistant."""


def squad(count: int, seed: int = 0, longest: int = 60, unanswerable: float = 0.0) -> Rows:
    """Contexts of neutral words; the answer is the good word and the bad word behind it, wherever they are."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = draw.choices(NEUTRAL, k=draw.randint(8, longest))
        answered = draw.random() >= unanswerable
        answer = f"{draw.choice(GOOD)} {draw.choice(BAD)}"
        before = words[: draw.randint(1, len(words) - 1)]
        pieces = [*before, *([answer] if answered else []), *words[len(before) :]]
        start = len(" ".join(before)) + 1
        rows.append(
            {
                "id": f"{seed:04x}{number:04x}",
                "title": "Synthetic",
                "context": " ".join(pieces),
                "question": " ".join(draw.choices(NEUTRAL[:4], k=3)),
                "answers": {"text": [answer] * answered, "answer_start": [start] * answered},
            }
        )
    return rows


def web_questions(count: int, seed: int = 0) -> Rows:
    """Questions with one telling word, which is the answer, or what else would do."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        word = draw.choice(GOOD[:3] if number % 2 else BAD[:3])
        question = [*draw.choices(NEUTRAL, k=draw.randint(2, 5)), word]
        rows.append({"url": f"synthetic/{number}", "question": " ".join(question), "answers": [word, f"{word} {word}"]})
    return rows


def chats(count: int, seed: int = 0) -> Rows:
    """The assistant says the user's telling word; half of the chats have a second turn."""
    rows = []
    for number, row in enumerate(web_questions(2 * count, seed)[::2]):
        turn = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answers"][0]}]
        rows.append({"messages": turn * (1 + number % 2)})
    return rows


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
