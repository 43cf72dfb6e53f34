"""What `demo/fetch.py` makes of the rows in the packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset

from lightpeft.tasks import ENTRIES, convert


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch", Path(__file__).parents[1] / "demo" / "fetch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


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
