"""Synthetic rows of every task that ships, in the columns that its data set has on the hub.

The texts are plain words; a telling word gives the answer away, so that they can be learned.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset
from torch import nn

from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.evaluation.scores import values_of
from lightpeft.app.tasks.entries.task_entries import ENTRIES
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.tokens import Collator

WORDS = tuple(f"word{index}" for index in range(12))
TELLING = ("red", "green", "blue", "black", "white")
Row = dict[str, Any]


def cut_to(task: Task, length: int) -> Task:
    """The task with rows of at most so many tokens."""
    return replace(task, config=replace(task.config, max_length=length))


def sentence(draw: random.Random, *inside: str, words: int = 4) -> str:
    """Some words with others among them, and a full stop."""
    chosen = [*draw.choices(WORDS, k=words), *inside]
    draw.shuffle(chosen)
    return " ".join(chosen) + "."


def labeled(*texts: str, classes: int = 2) -> Callable[[int, random.Random], Row]:
    """Rows of GLUE's form: text columns, a label of so many classes, and a number."""

    def row(index: int, draw: random.Random) -> Row:
        label = index % classes
        columns = {text: sentence(draw, TELLING[label]) for text in texts}
        return {**columns, "label": label, "idx": index}

    return row


def stsb(index: int, draw: random.Random) -> Row:
    alike = index % 6
    return {
        "sentence1": sentence(draw, *["red"] * alike),
        "sentence2": sentence(draw, *["red"] * alike),
        "label": float(alike),
        "idx": index,
    }


def copa(index: int, draw: random.Random) -> Row:
    label = index % 2
    choices = [sentence(draw, TELLING[right]).capitalize() for right in (label == 0, label == 1)]
    return {
        "premise": sentence(draw).capitalize(),
        "choice1": choices[0],
        "choice2": choices[1],
        "question": ("cause", "effect")[index // 2 % 2],
        "idx": index,
        "label": label,
    }


def multirc(index: int, draw: random.Random) -> Row:
    label = index % 2
    return {
        "paragraph": sentence(draw, words=10),
        "question": f"{sentence(draw)[:-1]}?",
        "answer": sentence(draw, TELLING[label]),
        "idx": {"paragraph": index // 6, "question": index // 3, "answer": index},
        "label": label,
    }


def record(index: int, draw: random.Random) -> Row:
    entities = [f"Name{number}" for number in draw.sample(range(9), 3 + index % 2)]
    right = entities[:1] if index % 3 else entities[:2]
    highlights = "".join(f"\n@highlight\n{sentence(draw)[:-1]}" for _ in range(2))
    return {
        "passage": f"{entities[0]} {sentence(draw)} {' '.join(entities[1:])}.{highlights}",
        "query": f"{sentence(draw, words=2)[:-1]} @placeholder {sentence(draw, words=2)}",
        "entities": entities + entities[-1:],
        "answers": right,
        "idx": {"passage": index, "query": 0},
    }


def wic(index: int, draw: random.Random) -> Row:
    label, word = index % 2, "green"
    row: Row = {"word": word, "idx": index, "label": label}
    for number in (1, 2):
        text = f"{sentence(draw, words=2)[:-1]} {word} {sentence(draw, *['red'] * label, words=1)}"
        row |= {f"sentence{number}": text, f"start{number}": text.index(word)}
        row[f"end{number}"] = row[f"start{number}"] + len(word)
    return row


def wsc(index: int, draw: random.Random) -> Row:
    label = index % 2
    noun = "the red word1" if label else "the blue word2"
    return {
        "text": f"Then {noun} met word3 because it was {' '.join(WORDS)}.",
        "span1_index": 1,
        "span2_index": 7,
        "span1_text": noun,
        "span2_text": "it",
        "idx": index,
        "label": label,
    }


def options(index: int, draw: random.Random, count: int) -> tuple[list[str], int]:
    """Options of one word, of which "red" is right, and its place."""
    right = index % count
    wrong = draw.sample(TELLING[1:], count - 1)
    return [*wrong[:right], TELLING[0], *wrong[right:]], right


def lettered(stem: str = "question", count: int = 4, letters: str = "ABCDE") -> Callable[[int, random.Random], Row]:
    """Rows of the form that ARC, OpenBookQA, CommonsenseQA and QuaRTz share."""

    def row(index: int, draw: random.Random) -> Row:
        texts, right = options(index, draw, count)
        labels = list(letters[:count])
        return {
            "id": f"row-{index}",
            stem: f"{sentence(draw)[:-1]}?",
            "choices": {"text": texts, "label": labels},
            "answerKey": labels[right],
        }

    return row


def arc(index: int, draw: random.Random) -> Row:
    """Most questions have four options, some three, and some number them."""
    return lettered(count=3 if index % 5 == 0 else 4, letters="1234" if index % 4 == 0 else "ABCD")(index, draw)


def quartz(index: int, draw: random.Random) -> Row:
    return {**lettered(count=2)(index, draw), "para": sentence(draw), "para_id": f"QRSent-{index}", "para_anno": {}}


def piqa(index: int, draw: random.Random) -> Row:
    texts, right = options(index, draw, 2)
    return {"goal": sentence(draw), "sol1": texts[0], "sol2": texts[1], "label": right}


def sciq(index: int, draw: random.Random) -> Row:
    wrong = draw.sample(TELLING[1:], 3)
    return {
        "question": f"{sentence(draw)[:-1]}?",
        "distractor3": wrong[2],
        "distractor1": wrong[0],
        "distractor2": wrong[1],
        "correct_answer": "red",
        "support": sentence(draw, words=8) if index % 3 else "",
    }


def hellaswag(index: int, draw: random.Random) -> Row:
    texts, right = options(index, draw, 4)
    first, second = sentence(draw), sentence(draw, words=2)[:-1]
    return {
        "ind": index,
        "activity_label": "Word1",
        "ctx_a": first,
        "ctx_b": second,
        "ctx": f"{first} {second.capitalize()}",
        "endings": [f"[substeps] {sentence(draw, text)}" for text in texts],
        "source_id": f"wikihow~{index}",
        "split": "train",
        "split_type": "indomain",
        "label": str(right),
    }


def winogrande(index: int, draw: random.Random) -> Row:
    right = index % 2
    names = ["red", "blue"] if right == 0 else ["blue", "red"]
    text = f"{sentence(draw, *names)[:-1]} because the _ is {sentence(draw, words=2)}"
    return {"sentence": text, "option1": names[0], "option2": names[1], "answer": str(right + 1)}


def socialiqa(index: int, draw: random.Random) -> Row:
    texts, right = options(index, draw, 3)
    answers = dict(zip(("answerA", "answerB", "answerC"), texts, strict=True))
    return {"context": sentence(draw), "question": f"{sentence(draw)[:-1]}?", **answers, "label": str(right + 1)}


def race(index: int, draw: random.Random) -> Row:
    texts, right = options(index, draw, 4)
    return {
        "example_id": f"high{index}.txt",
        "article": sentence(draw, words=12),
        "answer": "ABCD"[right],
        "question": f"{sentence(draw)[:-1]} _ .",
        "options": texts,
    }


def squad(index: int, draw: random.Random) -> Row:
    """A context with one telling word, which is the answer."""
    answer, context = TELLING[index % 5], sentence(draw, TELLING[index % 5], words=12)
    return {
        "id": f"{index:024x}",
        "title": "Words",
        "context": context,
        "question": sentence(draw),
        "answers": {"text": [answer], "answer_start": [context.index(answer)]},
    }


def squad_v2(index: int, draw: random.Random) -> Row:
    """Every third question has no answer."""
    row = squad(index, draw)
    if index % 3:
        return row
    return {**row, "context": sentence(draw, words=12), "answers": {"text": [], "answer_start": []}}


def web_questions(index: int, draw: random.Random) -> Row:
    answer = TELLING[index % 5]
    return {"url": f"http://{index}", "question": sentence(draw, answer), "answers": [answer, f"{answer} {answer}"]}


LAYOUTS: dict[str, Callable[[int, random.Random], Row]] = {
    "cola": labeled("sentence"),
    "sst2": labeled("sentence"),
    "mrpc": labeled("sentence1", "sentence2"),
    "stsb": stsb,
    "qqp": labeled("question1", "question2"),
    "mnli": labeled("premise", "hypothesis", classes=3),
    "qnli": labeled("question", "sentence"),
    "rte": labeled("sentence1", "sentence2"),
    "wnli": labeled("sentence1", "sentence2"),
    "boolq": labeled("question", "passage"),
    "cb": labeled("premise", "hypothesis", classes=3),
    "copa": copa,
    "multirc": multirc,
    "record": record,
    "superglue_rte": labeled("premise", "hypothesis"),
    "wic": wic,
    "wsc": wsc,
    "arc_easy": arc,
    "arc_challenge": arc,
    "openbookqa": lettered("question_stem"),
    "piqa": piqa,
    "sciq": sciq,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "socialiqa": socialiqa,
    "commonsense_qa": lettered(count=5),
    "race": race,
    "quartz": quartz,
    "squad": squad,
    "squad_v2": squad_v2,
    "web_questions": web_questions,
}
"""Name of a task -> a row in its columns, by number."""


def rows_of(task: str, count: int, seed: int = 0) -> list[Row]:
    """So many rows of a task."""
    draw = random.Random(seed)
    return [LAYOUTS[task](index, draw) for index in range(count)]


def write_task(folder: Path, task: str, train: int = 18, test: int = 15, suffix: str = ".jsonl") -> Path:
    """The splits that a task reads, as files in the layout of the hub: [configuration/]split.suffix."""
    entry = ENTRIES[task]
    configuration = "/".join((entry.hub or "").split("/")[2:])
    place = folder / configuration
    place.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(filter(None, (entry.train, entry.test, *entry.more_tests.values()))):
        write_rows(place / f"{split}{suffix}", rows_of(task, train if split == entry.train else test, seed))
    return folder


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Rows as a .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluate(model: nn.Module, encoded: Dataset, task: Task, collator: Collator, batch_size: int) -> dict[str, float]:
    """The metrics of a model on encoded test rows."""
    return values_of(task.answer(BatchedModel(model, collator, batch_size), encoded), task)
