"""Questions answered by texts, and chats: from files in the hub's layout to metrics, predictions and refusals."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import cut_to
from questions import Rows, chats, squad, web_questions, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForQuestionAnswering,
)
from workbench import BAD, GOOD, Workbench, lightpeft, read

from lightpeft import load_light
from lightpeft.app.runs import pipeline
from lightpeft.app.tasks.answers import Answers
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.span import SpanTask
from lightpeft.app.tasks.kinds.windows import answer_text, best_of_windows, best_span, make_windows
from lightpeft.app.tasks.loading import load_task, restore_task, task_facts
from lightpeft.app.tasks.text_metrics import text_match
from lightpeft.config import DataConfig, ModelConfig
from lightpeft.errors import LightPeftError
from lightpeft.models import task_heads
from lightpeft.models.loading import load_model
from lightpeft.models.tokenizers import load_tokenizer


class Bench(Workbench):
    """The workbench's bases, with data of a named task."""

    def __init__(self, folder: Path, family: str, task: str, make: Callable[..., Rows], split: str) -> None:
        super().__init__(folder, family)
        self.task = task
        self.rows = make(36, seed=2)
        write_jsonl(folder / "data" / "train.jsonl", make(48, seed=1))
        self.questions = write_jsonl(folder / "data" / f"{split}.jsonl", self.rows)

    def settings(self, name: str = "run", **changes: Any) -> dict[str, Any]:
        settings = super().settings(name, **{"training.epochs": 4, "training.learning_rate": 2e-2, **changes})
        settings["data"] = {"task": self.task, "path": str(self.folder / "data"), "max_length": 36, "answer_tokens": 4}
        settings["data"] |= {path.removeprefix("data."): changes[path] for path in changes if path.startswith("data.")}
        return settings

    def ran(self, **changes: Any) -> Bench:
        """The bench after the run "run"."""
        pipeline.run(self.config("run", **changes))
        return self

    @property
    def metrics(self) -> dict[str, float]:
        """Of the run."""
        result: dict[str, float] = read(self.folder / "run" / "metrics.json")["metrics"]
        return result

    def predictions(self, *arguments: object) -> Rows:
        """What the command predicts."""
        out = self.folder / "predictions.jsonl"
        assert lightpeft("predict", self.folder / "run", *arguments, "--output", out) == 0
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def squad_run(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("squad"), "bert", "squad", squad, "validation").ran()


@pytest.fixture(scope="module")
def squad_v2_run(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A decoder, on data of which a third has no answer."""

    def make(count: int, seed: int) -> Rows:
        return squad(count, seed, unanswerable=1 / 3)

    return Bench(tmp_path_factory.mktemp("squad_v2"), "llama", "squad_v2", make, "validation").ran()


@pytest.fixture(scope="module")
def web_questions_run(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("web_questions"), "llama", "web_questions", web_questions, "test")
    return bench.ran(
        **{"light.remove.heads": 0.0, "light.remove.neurons": 0.25, "light.modules.remove": 0.25, "training.epochs": 6}
    )


def spans_one_by_one(bench: Bench) -> list[tuple[str, float]]:
    """Answers and margins by the loaded model, one window at a time, without padding."""
    model, tokenizer = load_light(bench.folder / "run" / "adapter"), AutoTokenizer.from_pretrained(bench.base)
    task = restore_task(model.light_task)
    assert isinstance(task, SpanTask)
    answers = []
    for row in bench.rows:
        found = []
        for window in make_windows([row["question"]], [row["context"]], tokenizer, 36):
            with torch.no_grad():
                inputs = {name: torch.tensor([values]) for name, values in window.inputs.items()}
                output = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
            found.append(best_span(window, output.start_logits[0], output.end_logits[0], 4))
        span = best_of_windows(found)
        answers.append((answer_text(span, row["context"], task.null_threshold), span.margin))
    return answers


# -- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squad_run", "squad_v2_run"])
def test_predicted_spans_are_those_of_single_windows(name: str, request: pytest.FixtureRequest) -> None:
    bench: Bench = request.getfixturevalue(name)
    predicted = bench.predictions(bench.questions)
    expected = spans_one_by_one(bench)
    assert [row["answer"] for row in predicted] == [answer for answer, _ in expected]
    assert [row["margin"] for row in predicted] == pytest.approx([margin for _, margin in expected], abs=1e-3)
    assert all(row["answer"] in row["context"] for row in predicted)
    assert any(not row["answer"] for row in predicted) == (name == "squad_v2_run")


@pytest.mark.parametrize("name", ["squad_run", "squad_v2_run", "web_questions_run"])
def test_metrics_are_those_of_the_predictions(name: str, request: pytest.FixtureRequest) -> None:
    bench: Bench = request.getfixturevalue(name)
    predicted = bench.predictions(bench.questions, "--batch_size", 5)
    right = [row["answers"]["text"] if name.startswith("squad") else row["answers"] for row in predicted]
    measured = text_match(Answers([row["answer"] for row in predicted], right))
    assert measured == pytest.approx({metric: bench.metrics[metric] for metric in measured})


def test_web_questions(web_questions_run: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert list(web_questions_run.metrics) == ["f1", "exact_match", "examples"]
    (tmp_path / "questions.txt").write_text("\n".join(row["question"] for row in web_questions_run.rows))
    predicted = [row["answer"] for row in web_questions_run.predictions(tmp_path / "questions.txt")]
    telling = [text in (*GOOD, *BAD) for text in predicted]
    assert sum(telling) / len(telling) > 0.6  # one telling word, and then the end
    capsys.readouterr()
    questions = [row["question"] for row in web_questions_run.rows]
    longest = max(questions, key=len)  # the tiny tokenizer does not know the words around it
    assert lightpeft("predict", web_questions_run.folder / "run", "--example", longest) == 0
    written = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert written == [{"question": longest, "answer": predicted[questions.index(longest)]}]


def test_one_example_with_several_columns(
    squad_run: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{name: row[name] for name in ("question", "context")} for row in squad_run.rows[:3]]
    expected = [row["answer"] for row in squad_run.predictions(squad_run.questions)[:3]]
    assert squad_run.predictions("--example", json.dumps(rows[0]))[0]["answer"] == expected[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(json.dumps, rows))))
    assert [row["answer"] for row in squad_run.predictions("-")] == expected
    capsys.readouterr()
    assert lightpeft("predict", squad_run.folder / "run", "--example", "word0") == 2
    assert "the example line 1 is not JSON" in capsys.readouterr().err
    assert lightpeft("predict", squad_run.folder / "run", "--example", '{"question": "word0"}') == 2
    assert "has only the columns question" in capsys.readouterr().err


# -- a decoder's question answering head -------------------------------------------------------------------------


def test_span_head_keeps_the_weights_of_a_decoder(squad_v2_run: Bench, tmp_path: Path) -> None:
    """transformers calls Llama's base otherwise under that head, and would load nothing."""
    loaded = load_model(ModelConfig(name=str(squad_v2_run.base)), task_heads.SPAN)
    assert loaded.new_modules == ["qa_outputs"]
    expected = AutoModelForCausalLM.from_pretrained(squad_v2_run.base).model.state_dict()
    found = loaded.model.transformer.state_dict()
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)
    loaded.model.save_pretrained(tmp_path)
    _, info = LlamaForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    light = load_light(squad_v2_run.folder / "run" / "adapter", low_memory=True)
    assert light.light_task["null_threshold"] is None and light.light_task["entry"]["null_threshold"] == 0.0


# -- rows --------------------------------------------------------------------------------------------------------


def loaded(tmp_path: Path, rows: Rows, **settings: Any) -> Task:
    source = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    return load_task(DataConfig(train=source, test=source, **settings))


def test_kinds_with_columns_of_their_own(tmp_path: Path, squad_run: Bench) -> None:
    rows = [
        {"q": "word0", "c": "word1 good0 word2 good0", "a": ["good0", "word2"]},
        {"q": "word0", "c": "word1", "a": []},
    ]
    columns = {"question": "q", "context": "c", "answers": "a"}
    settings = {"task": "span", "columns": columns, "max_length": 36}
    task = loaded(tmp_path, rows, null_threshold=1.5, answer_tokens=3, **settings)
    tokenizer = load_tokenizer(ModelConfig(name=str(squad_run.base)))
    encoded = cut_to(task, 36).encode(task.train, tokenizer)
    assert encoded["start_positions"][:] == [4, 0] and encoded["end_positions"][:] == [4, 0]
    assert cut_to(task, 36).encode_test(task.test, tokenizer)["right"][:] == [["good0", "word2"], []]
    restored = restore_task(task_facts(task)).config
    assert (restored.null_threshold, restored.answer_tokens) == (1.5, 3)
    answer = loaded(tmp_path, [{"question": "word0", "answers": "good0"}], task="generation")
    assert answer.encode_test(answer.test, tokenizer)["right"][:] == [["good0"]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_move_with_padding(side: str, squad_run: Bench, tmp_path: Path) -> None:
    rows = squad(6, longest=20)
    task = loaded(tmp_path, rows, task="span", max_length=36)
    tokenizer = load_tokenizer(ModelConfig(name=str(squad_run.base)))
    tokenizer.padding_side = side
    encoded = cut_to(task, 36).encode(task.train, tokenizer)
    batch = task.collator(tokenizer, 8)(encoded.to_list())
    assert batch["input_ids"].shape[1] % 8 == 0 and set(batch) == {
        "input_ids",
        "attention_mask",
        "start_positions",
        "end_positions",
    }
    found = [
        tokenizer.decode(ids[first : last + 1])
        for ids, first, last in zip(batch["input_ids"], batch["start_positions"], batch["end_positions"], strict=True)
    ]
    assert found == [row["answers"]["text"][0] for row in rows]


def test_generation_reads_its_own_prompt_and_learns_the_first_answer(tmp_path: Path, web_questions_run: Bench) -> None:
    rows = [{"question": " ".join(["word1"] * 40), "answers": ["good0 good1 good2", "bad0"]}]
    task = loaded(tmp_path, rows, task="generation", answer_tokens=3)
    tokenizer = load_tokenizer(ModelConfig(name=str(web_questions_run.base)))
    (train,) = cut_to(task, 20).encode(task.train, tokenizer).to_list()
    (test,) = cut_to(task, 20).encode_test(task.test, tokenizer).to_list()
    learned = [label for label in train["labels"] if label != -100]
    assert tokenizer.decode(learned) == "good0 good1 good2"  # no room for the end
    assert train["input_ids"] == test["input_ids"] + learned
    assert len(test["input_ids"]) == 17 and test["input_ids"][0] == tokenizer.bos_token_id
    task.config.answer_tokens = 4
    (train,) = cut_to(task, 20).encode(task.train, tokenizer).to_list()
    assert train["labels"][-1] == tokenizer.eos_token_id
    task.config.answer_tokens = 19
    with pytest.raises(LightPeftError, match="data.answer_tokens 19 leaves no room for the question"):
        cut_to(task, 20).encode(task.train, tokenizer)


SPAN = {"question": "word0", "context": "word1 good0"}
GOOD_ROWS: dict[str, dict[str, Any]] = {
    "span": SPAN | {"answers": {"text": ["good0"], "answer_start": [6]}},
    "generation": {"question": "word0", "answers": ["good0"]},
    "chat": chats(1)[0],
}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "span",
            {"answers": {"text": ["good0"], "answer_start": [5]}},
            'answers".* of "good0" is wrong; " good" is there',
        ),
        ("span", {"answers": {"text": ["good0"], "answer_start": [-6]}}, 'answers".* is not a list of texts, or'),
        ("span", {"answers": {"text": ["good0"], "answer_start": []}}, 'answers".* is not a list of texts, or'),
        ("span", {"question": ""}, 'column "question": the text is blank'),
        ("span", {"context": None}, 'column "context": the value is missing'),
        ("generation", {"answers": []}, 'column "answers": the answer is missing; fill it in'),
        ("generation", {"answers": [" "]}, 'column "answers": the text is blank'),
        ("chat", {"messages": [{"role": "user", "content": "word0"}]}, "no assistant message has text"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, task: str, change: dict[str, Any], message: str) -> None:
    good = GOOD_ROWS[task]
    with pytest.raises(LightPeftError, match=f"rows.jsonl: data.train row 2 .*{message}"):
        loaded(tmp_path, [good, good | change], task=task)


def test_questions_without_an_answer_need_a_threshold(tmp_path: Path, squad_run: Bench) -> None:
    task = loaded(tmp_path, [SPAN | {"answers": ["good0"]}, SPAN | {"answers": []}], task="span")
    tokenizer = load_tokenizer(ModelConfig(name=str(squad_run.base)))
    with pytest.raises(LightPeftError, match="row 2 .*the question has no answer; set data.null_threshold"):
        cut_to(task, 36).encode(task.train, tokenizer)
