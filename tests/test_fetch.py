"""What `demo/fetch.py` makes of the rows in the packages, and `demo/chats.py` of instructions."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset

from lightpeft.app.tasks import ENTRIES, convert


def loaded(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, Path(__file__).parents[1] / "demo" / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module  # dataclasses look themselves up there, and scripts each other
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    return loaded("fetch")


@pytest.fixture(scope="module")
def chats(fetch: ModuleType) -> ModuleType:
    return loaded("chats")


def item(text: str, ideal: str) -> dict[str, Any]:
    return {"input": [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}], "ideal": ideal}


def test_quartz_in_the_hubs_columns(fetch: ModuleType) -> None:
    row = fetch.quartz_row(item("More rain. The river\n\n A: rises \n B: falls", "B"))
    assert row == {
        "question": "More rain. The river",
        "choices": {"text": ["rises", "falls"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    converted = convert(Dataset.from_list([row]), ENTRIES["quartz"], "rows")[0]
    assert (converted["context"], converted["answer"]) == ("Question: More rain. The river", 1)


def test_socialiqa(fetch: ModuleType) -> None:
    row = fetch.socialiqa_row(item("Ann left. Why? A: to eat; B: to sleep; C: no reason.", "C"))
    assert (row["question"], row["options"]) == ("Ann left. Why?", ["to eat", "to sleep", "no reason"])
    assert (row["answer"], row["completion"]) == (2, " no reason")


@pytest.mark.parametrize("make", ["quartz_row", "socialiqa_row"])
def test_other_texts_are_refused(fetch: ModuleType, make: str) -> None:
    with pytest.raises(ValueError, match="lettered options"):
        getattr(fetch, make)(item("no options", "A"))


def test_the_split_hangs_on_the_text_alone(fetch: ModuleType) -> None:
    rows = [{"question": f"q{index % 50}", "index": index} for index in range(100)]
    parts = fetch.split(rows, "question")
    assert len(parts["train"]) + len(parts["test"]) == 100
    assert not {row["question"] for row in parts["train"]} & {row["question"] for row in parts["test"]}


def instruction(index: int, **answer: Any) -> dict[str, Any]:
    return {
        "instruction": f"Say {index}.",
        "input": "Loudly." if index % 2 else "",
        **(answer or {"output": f"{index}!"}),
    }


def test_instructions_as_chats(chats: ModuleType, tmp_path: Path) -> None:
    items = (
        [{**instruction(0), "input": None}]
        + [instruction(index) for index in range(1, 40)]
        + [
            instruction(40, response=" 40? "),
            instruction(41, output=" "),
        ]
    )
    (tmp_path / "all.json").write_text(json.dumps(items))
    assert chats.main([str(tmp_path / "all.json"), str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for part in ("train", "test") for line in (tmp_path / "out" / f"{part}.jsonl").open()]
    assert (tmp_path / "out" / "test.jsonl").stat().st_size > 0
    found = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    wanted = {f"Say {index}." + ("\n\nLoudly." if index % 2 else ""): f"{index}!" for index in range(40)}
    assert found == {**wanted, "Say 40.": "40?"}  # the last one has no answer
    assert {tuple(message["role"] for message in row["messages"]) for row in rows} == {("user", "assistant")}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '[{"instruction": "Say it."}]',
        '[{"instruction": "A", "input": 1, "output": "B"}]',
        '[["Say it.", "It."]]',
    ],
)
def test_no_instructions(chats: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (tmp_path / "all.json").write_text(text)
    with caplog.at_level(logging.ERROR):
        assert chats.main([str(tmp_path / "all.json"), str(tmp_path / "out")]) == 1
    assert "all.json" in caplog.text and not (tmp_path / "out").exists()
