"""Extractive and generative question answering and chats, from files in the hub's layout to the metrics of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from questions import CHAT_TEMPLATE, Rows, chats, squad, web_questions, write_jsonl
from transformers import AutoTokenizer, BertForQuestionAnswering, LlamaForQuestionAnswering
from workbench import Workbench, read, save_base

from lightpeft import load_light, pipeline
from lightpeft.config import DataConfig, ModelConfig
from lightpeft.errors import LightPeftError
from lightpeft.evaluation import Run, evaluate, spans_of
from lightpeft.loading import load_model
from lightpeft.tasks import Task, load_task, restore_task, silent, task_facts
from lightpeft.tasks.matching import normalised
from lightpeft.tasks.span import answer_places
from lightpeft.tasks.windows import answer_text, best_of_windows, best_span, make_windows

FORMS = {"context", "question", "answers"}


class Bench(Workbench):
    """The workbench's bases, with data of a named task."""

    def __init__(self, folder: Path, family: str, task: str, make: Callable[..., Rows]) -> None:
        super().__init__(folder, family)
        self.task = task
        for split, seed in (("train", 1), ("validation", 2), ("test", 2)):
            write_jsonl(folder / "data" / f"{split}.jsonl", make(36, seed=seed))

    def settings(self, name: str = "run", **changes: Any) -> dict[str, Any]:
        settings = super().settings(name)
        settings["data"] = {"task": self.task, "path": str(self.folder / "data"), "max_length": 36, "answer_tokens": 4}
        settings["training"]["epochs"] = 6
        for path, value in changes.items():
            section, key = path.split(".")
            settings[section][key] = value
        return settings


@pytest.fixture(scope="module")
def squad_run(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("squad"), "bert", "squad", squad)
    pipeline.run(bench.config("run"))
    return bench


def metrics(bench: Bench, name: str = "run") -> dict[str, float]:
    return read(bench.folder / name / "metrics.json")["metrics"]


def test_squad_on_an_encoder(squad_run: Bench) -> None:
    result = metrics(squad_run)
    assert list(result) == ["f1", "exact_match", "loss", "examples"]
    print(result)
