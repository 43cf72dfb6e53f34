"""Named tasks: where their rows come from, how rows become the kind's, bad rows, users' own tasks, and who answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from datasets import Dataset
from layouts import LAYOUTS, rows_of, write_rows, write_task
from transformers import (
    BertConfig,
    EsmConfig,
    GemmaConfig,
    LlamaConfig,
    PretrainedConfig,
    T5Config,
)

from lightpeft.app.tasks.entries.task_entries import CONVERTERS, ENTRIES, check_entry, find_entry
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.classification import ClassificationTask, label_names
from lightpeft.app.tasks.kinds.likelihood import LikelihoodTask
from lightpeft.app.tasks.kinds.task_kinds import BY_LIKELIHOOD, TASK_KINDS, task_class
from lightpeft.app.tasks.loading import convert, load_task, restore_task, task_facts
from lightpeft.app.tasks.metrics import METRICS
from lightpeft.config import DataConfig, TaskEntry, load_config, run_config_from_dict
from lightpeft.config.places import HUB_NAME
from lightpeft.errors import LightPeftError


def error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The one line of the error that a call raises."""
    with pytest.raises(LightPeftError) as caught:
        call(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    return line


def converted(task: str, **row: Any) -> dict[str, Any]:
    """One row of a task in the kind's columns."""
    return convert(Dataset.from_list([row]), ENTRIES[task], "rows")[0]


class TestConversions:
    def test_copa_joins_what_it_asks_for(self) -> None:
        row = {"premise": "The man fell. ", "choice1": "He slipped.", "choice2": "He ran.", "label": 1}
        cause, effect = converted("copa", question="cause", **row), converted("copa", question="effect", **row)
        assert (cause["context"], effect["context"]) == ("The man fell because", "The man fell therefore")
        assert cause["options"] == ["he slipped.", "he ran."] and cause["answer"] == 1

    def test_multirc_groups_the_options_of_a_question(self) -> None:
        row = converted(
            "multirc",
            paragraph="P.",
            question="Q?",
            answer="A",
            idx={"paragraph": 3, "question": 7, "answer": 1},
            label=0,
        )
        assert (row["text"], row["text_pair"], row["group"], row["label"]) == ("P.", "Q? A", "3-7", 0)
        assert row["prompt"] == "P.\nQuestion: Q?\nAnswer: A\nIs the answer correct?"

    def test_record_fills_the_gap_with_every_entity_once(self) -> None:
        row = converted(
            "record",
            passage="Text.\n@highlight\nOne\n@highlight\nTwo",
            query="Then @placeholder left",
            entities=["Bob", "Ann", "Bob"],
            answers=["Bob", "Bob"],
        )
        assert row["context"] == "Text.\n\n  - One.\n  - Two."
        assert (row["options"], row["names"]) == (["Then Ann left", "Then Bob left"], ["Ann", "Bob"])
        assert (row["answer"], row["right"]) == (1, ["Bob"])

    def test_wic_marks_the_word_in_both_sentences(self) -> None:
        row = converted(
            "wic",
            word="bank",
            sentence1="A bank.",
            sentence2="The banks.",
            start1=2,
            end1=6,
            start2=4,
            end2=9,
            label=1,
        )
        assert (row["text"], row["text_pair"]) == ("A *bank*.", "The *banks*.")
        assert "Is the word 'bank' used in the same way" in row["prompt"]

    def test_wsc_marks_noun_and_pronoun(self) -> None:
        row = converted(
            "wsc",
            text="Mark told Pete many lies. He lied, he did.",
            span1_index=0,
            span1_text="Mark",
            span2_index=5,
            span2_text="He",
            label=0,
        )
        assert row["text"] == "*Mark* told Pete many lies. *He* lied, he did."
        assert row["prompt"].startswith("Passage: Mark told Pete many lies. *He* lied")
        assert 'does the pronoun "*He*" refer to "*Mark*"?' in row["prompt"]

    def test_letters_and_numbers_of_options(self) -> None:
        choices = {"text": ["a", "b"], "label": ["1", "2"]}
        assert converted("arc_easy", question="Q?", choices=choices, answerKey="2")["answer"] == 1
        row = converted("openbookqa", question_stem="Q", choices=choices, answerKey="1 ")
        assert (row["context"], row["options"], row["answer"]) == ("Q", ["a", "b"], 0)

    def test_hellaswag_without_wikihow_marks(self) -> None:
        endings = ["[substeps] Go.", "Stay."]
        row = converted(
            "hellaswag",
            activity_label="Roof",
            ctx_a="A man [title] He",
            ctx_b="stands [x] up",
            endings=endings,
            label="1",
        )
        assert (row["context"], row["options"]) == ("Roof: A man. He Stands up", ["Go.", "Stay."])
        assert row["answer"] == 1

    def test_winogrande_goes_on_behind_the_gap(self) -> None:
        row = converted("winogrande", sentence="Ann hit Bob, so _ cried.", option1="Ann", option2="Bob", answer="2")
        assert (row["context"], row["options"], row["ending"], row["answer"]) == (
            "Ann hit Bob, so",
            ["Ann", "Bob"],
            "cried.",
            1,
        )

    def test_sciq_hides_the_right_answer_among_the_others(self) -> None:
        wrong = {"distractor1": "c", "distractor2": "a", "distractor3": "d"}
        row = converted("sciq", question="Q?", correct_answer="b", support=" S. ", **wrong)
        assert (row["context"], row["options"], row["answer"]) == ("S.\nQuestion: Q?", ["a", "b", "c", "d"], 1)
        assert converted("sciq", question="Q?", correct_answer="b", support="", **wrong)["context"] == "Question: Q?"

    def test_rows_to_predict_on_need_no_answers(self) -> None:
        for task, entry in ENTRIES.items():
            answers = {"label", "answer", "answerKey", "answers"} - ({"answer"} if task == "multirc" else set())
            rows = [{k: v for k, v in row.items() if k not in answers} for row in rows_of(task, 3)]
            if task != "sciq":  # whose options are told apart by the answer alone
                inputs = convert(Dataset.from_list(rows), entry, "rows", answered=False)
                assert len(inputs) == 3


class TestEntries:
    def test_they_are_well_declared(self) -> None:
        for entry in ENTRIES.values():
            check_entry(entry)
            assert entry.metrics and set(entry.metrics) <= set(METRICS)
            assert entry.hub is not None and entry.hub.count("/") in (1, 2)
            named = HUB_NAME.fullmatch(f"{entry.hub}:{entry.test}")
            assert named is not None and (named["name"].count("/"), named["split"]) == (1, entry.test)
        assert {entry.convert for entry in ENTRIES.values() if entry.convert} == set(CONVERTERS)
        assert not set(ENTRIES) & set(TASK_KINDS)

    @pytest.mark.parametrize("task", list(ENTRIES))
    def test_facts_bring_the_task_back(self, tmp_path: Path, task: str) -> None:
        for answer in ("auto", "likelihood") if ENTRIES[task].kind in BY_LIKELIHOOD else ("auto",):
            path = str(write_task(tmp_path, task, train=6, test=6))
            made = load_task(DataConfig(task=task, path=path, answer=answer, likelihood="byte", max_length=33))
            facts = json.loads(json.dumps(task_facts(made)))
            back = restore_task(facts)
            assert type(back) is type(made)
            assert (back.entry, back.labels, back.main_metric) == (made.entry, made.labels, made.main_metric)
            assert (back.config.max_length, back.config.likelihood) == (33, "byte")

    def test_unknown_names_get_the_nearest(self) -> None:
        assert 'data.task "hella-swag" is neither a kind' in error_of(find_entry, DataConfig(task="hella-swag"))
        assert 'did you mean "hellaswag"?' in error_of(find_entry, DataConfig(task="hella-swag"))
        assert 'did you mean "classification"?' in error_of(find_entry, DataConfig(task="clasification"))
        own = {"my_task": TaskEntry()}
        assert 'did you mean "my_task"?' in error_of(find_entry, DataConfig(task="my-task"), own)


def test_the_table_in_the_documents_is_what_is_there() -> None:
    text = (Path(__file__).parents[1] / "docs" / "reference" / "tasks.md").read_text(encoding="utf-8")
    for name, entry in ENTRIES.items():
        splits = ", ".join(f"`{split}`" for split in (entry.test, *entry.more_tests.values()))
        metrics = ", ".join(f"`{metric}`" for metric in entry.metrics)
        assert f"| `{name}` | {entry.hub} | {splits} | {entry.kind} | {metrics} |" in text.splitlines()
    for kind, task in TASK_KINDS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{kind}` | "))
        assert row.endswith(f"{', '.join(f'`{metric}`' for metric in task.default_metrics)} |")
    for convert_name in CONVERTERS:
        assert f"`{convert_name}`" in text


class TestSources:
    def load(self, folder: Path, task: str = "rte", **settings: Any) -> Task:
        return load_task(DataConfig(task=task, path=str(folder), **settings))

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_a_folder_with_the_configuration_below(self, tmp_path: Path, suffix: str) -> None:
        task = self.load(write_task(tmp_path, "rte", suffix=suffix))
        assert (len(task.train), len(task.test)) == (18, 15)
        assert task.labels == ["entailment", "not_entailment"]
        assert task.train.column_names == ["text", "text_pair", "label"]

    def test_shards_as_they_lie_on_the_hub(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        for number in range(2):
            name = f"train-{number:05d}-of-00002.parquet"
            write_rows(tmp_path / "data" / name, rows_of("piqa", 4, seed=number))
        write_rows(tmp_path / "data" / "validation-00000-of-00001.parquet", rows_of("piqa", 3))
        task = self.load(tmp_path, "piqa")
        assert (len(task.train), len(task.test)) == (8, 3)

    def test_csv_values_are_text(self, tmp_path: Path) -> None:
        lines = ["sentence1,sentence2,label,idx", "a,b,0,0", "c,d,1,1"]
        for split in ("train", "validation"):
            (tmp_path / f"{split}.csv").write_text("\n".join(lines), encoding="utf-8")
        task = self.load(tmp_path)
        assert isinstance(task, TASK_KINDS["classification"])
        assert task.right_options(task.train) == [0, 1]
        (tmp_path / "train.csv").write_text("\n".join([lines[0], "a,b,3.5,0", "c,d,0,1"]), encoding="utf-8")
        stsb = self.load(tmp_path, "stsb")
        assert [float(label) for label in stsb.train["label"]] == [3.5, 0.0]

    def test_missing_splits(self, tmp_path: Path) -> None:
        folder = write_task(tmp_path, "rte")
        (folder / "rte" / "validation.jsonl").unlink()
        line = error_of(self.load, folder)
        assert f"data.path: {folder} has no test file rte/validation{{.csv,.tsv,.json,.jsonl,.parquet}}" in line
        write_task(tmp_path, "rte")
        (folder / "rte" / "train.jsonl").unlink()
        assert f"data.path: {folder} has no training file rte/train" in error_of(self.load, folder)
        assert "does not exist" in error_of(self.load, tmp_path / "nowhere")

    def test_mismatched_rows_are_measured_where_they_are(self, tmp_path: Path) -> None:
        folder = write_task(tmp_path, "mnli", test=9)
        task = self.load(folder, "mnli", limit_test=5)
        assert list(task.more_tests) == ["mismatched"]
        assert (len(task.test), len(task.more_tests["mismatched"])) == (5, 5)
        (folder / "mnli" / "validation_mismatched.jsonl").unlink()
        assert self.load(folder, "mnli").more_tests == {}

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*args: Any, **kwargs: Any) -> Dataset:
            raise ConnectionError("no network")

        monkeypatch.setattr(datasets, "load_dataset", load)
        line = error_of(load_task, DataConfig(task="rte"))
        for said in ("task rte", "nyu-mll/glue/rte", "FOLDER/rte/train{.csv", "FOLDER/rte/validation{.csv"):
            assert said in line
        assert "--data.path FOLDER" in line and "HF_DATASETS_OFFLINE=1" in line


def spoilt(task: str, column: str, value: Any) -> list[dict[str, Any]]:
    """Rows of a task of which the third has another value."""
    rows = rows_of(task, 6)
    rows[2][column] = value
    return rows


@pytest.mark.parametrize(
    ("task", "column", "value", "says"),
    [
        ("rte", "sentence1", " ", "the text is blank"),
        (
            "rte",
            "label",
            -1,
            "the label is missing; fill it in, drop the row, or give a split whose answers are not hidden",
        ),
        ("rte", "label", 2, '2 is not a label; use "entailment", "not_entailment" (0, 1, ...)'),
        ("stsb", "label", None, "None is not a valid number"),
        ("copa", "question", "why", "the row does not have the format of the task (KeyError: 'why')"),
        ("record", "query", "no gap", "the query has no @placeholder"),
        ("wic", "end2", 400, "characters"),
        ("arc_easy", "choices", {"text": ["a"], "label": ["A"]}, "is none of A"),
        ("hellaswag", "label", "", "the right option is missing"),
        ("piqa", "label", 2, "2 is not the index of an option; use 0 to 1"),
        ("winogrande", "sentence", "no gap", "the sentence has no gap _"),
        ("race", "options", ["only one"], "is not a list of two or more options"),
    ],
)
def test_a_malformed_row_names_file_row_and_column(
    tmp_path: Path, task: str, column: str, value: Any, says: str
) -> None:
    folder = write_task(tmp_path, task, train=6, test=6)
    (file,) = folder.rglob("train.jsonl")
    write_rows(file, spoilt(task, column, value))
    line = error_of(load_task, DataConfig(task=task, path=str(folder)))
    assert line.startswith(f"{file} row 3 (the header not counted), column ")
    assert says in line


@pytest.mark.parametrize("task", list(ENTRIES))
def test_a_missing_column_is_named(tmp_path: Path, task: str) -> None:
    folder = write_task(tmp_path, task, train=4, test=4)
    (file,) = folder.rglob("train.jsonl")
    read = list(ENTRIES[task].columns.values()) or list(LAYOUTS[task](0, random.Random(0)))
    texts = [name for name, value in rows_of(task, 1)[0].items() if name in read and isinstance(value, str)]
    gone = next(name for name in texts if name not in ("id", "word", "para", "para_id", "ind", "example_id"))
    write_rows(file, [{k: v for k, v in row.items() if k != gone} for row in rows_of(task, 4)])
    line = error_of(load_task, DataConfig(task=task, path=str(folder)))
    assert f'task {task} reads "{gone}", but {file} has only the columns ' in line


class TestOwnTasks:
    ROWS = tuple({"a": f"word{i}", "b": "x", "c": ("no", "yes")[i % 2], "n": i % 2} for i in range(10))

    def entry(self, **fields: Any) -> TaskEntry:
        columns = {"text": "{a} and {b}", "label": "n"}
        return TaskEntry(**{"name": "mine", "columns": columns, "labels": ["no", "yes"], **fields})

    def test_from_yaml(self, tmp_path: Path) -> None:
        for split in ("train", "dev"):
            write_rows(tmp_path / f"{split}.jsonl", list(self.ROWS))
        settings = {
            "data": {"task": "mine"},
            "tasks": {
                "mine": {
                    "path": str(tmp_path),
                    "test": "dev",
                    "columns": {"text": "{a} and {b}", "label": "n"},
                    "labels": ["no", "yes"],
                    "prompt": "{text}?",
                    "words": ["wrong", "right"],
                    "metrics": ["matthews", "accuracy"],
                }
            },
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        config = load_config(tmp_path / "run.yaml")
        task = load_task(config.data, None, config.tasks)
        assert task.train[1] == {"text": "word1 and x", "label": 1}
        assert (task.labels, task.main_metric, task.entry.name) == (["no", "yes"], "matthews", "mine")
        config = run_config_from_dict({**settings, "data": {"task": "mine", "answer": "likelihood"}})
        task = load_task(config.data, LlamaConfig(), config.tasks)
        assert isinstance(task, LikelihoodTask)
        row = next(task.scored(task.train[0:1]))
        assert (row.prompts[0], row.completions) == ("word0 and x?", [" wrong", " right"])

    def test_settings_that_do_not_exist(self) -> None:
        line = error_of(run_config_from_dict, {"tasks": {"mine": {"colums": {}}}})
        assert line == "unknown key tasks.mine.colums; did you mean tasks.mine.columns?"
        assert "tasks.mine.columns.text is 3; it must be text" in error_of(
            run_config_from_dict, {"tasks": {"mine": {"columns": {"text": 3}}}}
        )
        words = error_of(run_config_from_dict, yaml.safe_load("tasks: {mine: {words: [no, yes]}}"))
        assert words == "tasks.mine.words[0] is False; it must be text (in quotes)"
        assert "tasks is [1]; it must be a mapping" in error_of(run_config_from_dict, {"tasks": [1]})
        assert "tasks.mine.kind is 3; it must be text" in error_of(
            run_config_from_dict, {"tasks": {"mine": {"kind": 3}}}
        )

    @pytest.mark.parametrize("task", ["mine", "rte", "classification"])
    def test_a_kind_that_does_not_exist(self, task: str) -> None:
        """It is refused wherever it is declared, also of a task that the run does not have."""
        config = run_config_from_dict({"data": {"task": task}, "tasks": {"mine": {"kind": "clasification"}}})
        line = error_of(load_task, config.data, None, config.tasks)
        assert line == 'tasks.mine.kind: "clasification" does not exist; did you mean classification?'

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            (
                {"columns": {"text": "a", "lable": "n"}},
                'tasks.mine.columns: column "lable" does not exist; rows of kind classification have text, label',
            ),
            ({"columns": {"text": "{a", "label": "n"}}, '"{a" is malformed'),
            ({"columns": {"text": "{a:>99999999999}", "label": "n"}}, "write only the name of a column in braces"),
            ({"prompt": "{text!r:>{text}}"}, "write only the name of a column in braces"),
            ({"prompt": "{text.__class__}"}, "write only the name of a column in braces"),
            ({"kind": "regresion"}, 'tasks.mine.kind: "regresion" does not exist; did you mean regression?'),
            ({"metrics": ["acuracy"]}, "did you mean accuracy?"),
            ({"columns": {}, "convert": "arc"}, 'tasks.mine.convert: "arc" does not exist'),
            ({"prompt": "{text_pair}?"}, 'tasks.mine.prompt: "text_pair" does not exist; did you mean text?'),
            ({"prompt": "{label}?"}, 'tasks.mine.prompt: "label" does not exist; choose one of text'),
            ({"prompt": "{txt}?"}, 'tasks.mine.prompt: "txt" does not exist; did you mean text?'),
        ],
    )
    def test_badly_declared(self, fields: dict[str, Any], says: str) -> None:
        entry = self.entry(**fields)
        assert says in error_of(find_entry, DataConfig(task="mine"), {"mine": entry})
        stored = {"entry": asdict(replace(entry, name="mine")), "answer": "head", "likelihood": "sum", "labels": []}
        assert says in error_of(restore_task, stored), "nor is it believed of a light adapter"

    def test_a_template_names_the_column_that_is_missing(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "train.jsonl", list(self.ROWS))
        entry = self.entry(columns={"text": "{a} {z}", "label": "n"}, path=str(tmp_path), test=None)
        line = error_of(load_task, DataConfig(task="mine"), None, {"mine": entry})
        assert 'task mine reads "z", but' in line
        spoilt_rows = [*self.ROWS[:2], {**self.ROWS[2], "b": None}, *self.ROWS[3:]]
        write_rows(tmp_path / "train.jsonl", spoilt_rows)
        entry = self.entry(path=str(tmp_path), test=None)
        line = error_of(load_task, DataConfig(task="mine"), None, {"mine": entry})
        assert 'row 3 (the header not counted), column "b": the value is missing' in line

    def test_numbers_that_are_names_are_no_places(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "train.jsonl", [{"text": f"t{i}", "label": 1 + i % 3} for i in range(12)])
        entry = TaskEntry(labels=["1", "2", "3"], path=str(tmp_path), test=None)
        task = load_task(DataConfig(task="stars"), None, {"stars": entry})
        assert isinstance(task, ClassificationTask)
        assert [task.labels[number] for number in task.right_options(task.train)] == [
            str(label) for label in task.train["label"]
        ]
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2"])})
        hub = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
        assert label_names(hub, TaskEntry(labels=["1", "2"]), "rows") == ["1", "2"]  # the hub numbers from 0


class TestWhoAnswers:
    @pytest.mark.parametrize(
        ("kind", "answer", "model", "says"),
        [
            (
                "multiple-choice",
                "head",
                LlamaConfig(),
                "llama has no multiple-choice head, which multiple-choice needs; set data.answer to likelihood",
            ),
            ("classification", "likelihood", BertConfig(), "bert is none: set it to head"),
            ("classification", "likelihood", T5Config(), "t5 is none"),
            (
                "regression",
                "likelihood",
                LlamaConfig(),
                "likelihood cannot answer regression; set it to head, or use classification, multiple-choice",
            ),
            (
                "multiple-choice",
                "auto",
                EsmConfig(),
                "esm has no multiple-choice head and is not a causal language model, and multiple-choice",
            ),
            ("causal-lm", "auto", BertConfig(), "bert is not a causal language model, which causal-lm needs"),
            ("span", "auto", GemmaConfig(), "gemma has no question answering head, which span needs"),
            ("generation", "auto", BertConfig(), "bert is not a causal language model, which generation needs"),
            ("chat", "auto", T5Config(), "t5 is not a causal language model, which chat needs"),
        ],
    )
    def test_what_cannot_be(self, kind: Any, answer: Any, model: PretrainedConfig, says: str) -> None:
        assert says in error_of(task_class, kind, answer, model)
