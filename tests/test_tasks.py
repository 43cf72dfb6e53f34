"""Reading rows, checking them, and turning them into tokens and batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from layouts import cut_to
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, LlamaConfig, OPTConfig, PreTrainedTokenizerFast, RobertaConfig

from lightpeft.app.tasks.kinds.causal import CausalLMTask
from lightpeft.app.tasks.kinds.classification import ClassificationTask
from lightpeft.app.tasks.loading import load_task
from lightpeft.app.tasks.rows.reading import read_rows
from lightpeft.app.tasks.tokens import check_max_length
from lightpeft.config import DataConfig, TaskEntry
from lightpeft.config.places import is_local
from lightpeft.errors import LightPeftError
from lightpeft.models.families.family_table import max_positions
from lightpeft.models.tokenizers import ensure_pad_token

TEXTS = ['plain, with "quotes"', "two\nlines\tand a tab", "NA", "1984", "déjà vu 电影"]
WORDS = ["<pad>", "<s>", "</s>", "a", "b", "c", "d", "e", "f", "g", "h"]


def word_tokenizer(pad: bool = True, start: bool = True) -> PreTrainedTokenizerFast:
    """A decoder's tokenizer with one token a word, ids as in `WORDS`."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="h"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if start:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>" if pad else None
    )


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def error_of(call: Any, *args: Any, **kwargs: Any) -> str:
    """The one line of the error that a call raises."""
    with pytest.raises(LightPeftError) as caught:
        call(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    return line


class TestReading:
    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
    def test_formats_round_trip(self, tmp_path: Path, suffix: str) -> None:
        frame = pd.DataFrame({"text": TEXTS, "label": [0, 1, 0, 1, 10]})
        path = tmp_path / f"rows{suffix}"
        match suffix:
            case ".csv" | ".tsv":
                frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
            case ".parquet":
                frame.to_parquet(path)
            case _:
                frame.to_json(path, orient="records", lines=suffix == ".jsonl", force_ascii=False)
        rows = read_rows(str(path), "data.train")
        assert rows["text"][:] == TEXTS
        assert [int(label) for label in rows["label"]] == [0, 1, 0, 1, 10]
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def test_json_file_may_hold_lines_and_gaps(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        path.write_text('{"text": "a"}\n\n{"text": "b", "note": 1}\n', encoding="utf-8-sig")
        rows = read_rows(str(path), "data.train")
        assert rows.to_list() == [{"text": "a", "note": None}, {"text": "b", "note": 1}]

    def test_csv_with_byte_order_mark_blank_lines_and_a_long_field(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        path.write_text(f"text,label\r\n{'x' * 200_000},1\r\n\r\nb,0\r\n", encoding="utf-8-sig")
        rows = read_rows(str(path), "data.train")
        assert rows.column_names == ["text", "label"]
        assert [len(text) for text in rows["text"]] == [200_000, 1]

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("empty.csv", "", "is empty"),
            ("header.csv", "text,label\n", "has no rows"),
            ("list.json", "[]", "has no rows"),
            ("wide.csv", "text,label\na,1\nb,0,9\n", "line 3 has 3 fields, its header 2"),
            ("open.csv", 'text,label\na,1\n"b,0\n', "line 3: unexpected end of data"),
            ("twice.csv", "text,text\na,1\n", 'names column "text" twice'),
            ("wide.tsv", "text\tlabel\na\n", "line 2 has 1 fields, its header 2"),
            ("bad.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
            ("bad.json", '[{"text": "a"},\n{"text": }]', "line 2 is not JSON"),
            ("scalar.jsonl", '{"text": "a"}\n3\n', "line 2 is not a JSON object"),
            ("mixed.jsonl", '{"text": "a"}\n{"text": 3}\n', 'column "text" mixes types'),
            ("bad.parquet", "not parquet at all", "is not a readable Parquet file"),
            ("rows.xlsx", "x", 'has the suffix ".xlsx"; give a .csv, .tsv, .json, .jsonl or .parquet file'),
        ],
    )
    def test_bad_files(self, tmp_path: Path, name: str, content: str, expected: str) -> None:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        line = error_of(read_rows, str(path), "data.train")
        assert line.startswith("data.train: ")
        assert str(path) in line
        assert expected in line

    def test_other_bad_sources(self, tmp_path: Path) -> None:
        latin = tmp_path / "latin.csv"
        latin.write_bytes("text\ncafé\n".encode("latin-1"))
        assert "is not UTF-8" in error_of(read_rows, str(latin), "data.train")
        assert "does not exist" in error_of(read_rows, "no/such/file.csv", "data.test")
        assert "is a folder" in error_of(read_rows, str(tmp_path), "data.train")
        assert "data.train is not set" in error_of(read_rows, "", "data.train")

    def test_local_or_hub(self, tmp_path: Path) -> None:
        assert is_local("rows.csv") and is_local("./rows") and is_local(str(tmp_path / "rows")) and is_local("my rows")
        assert is_local("a/b/c/d")
        assert not is_local("imdb") and not is_local("nyu-mll/glue/sst2:validation") and not is_local("org/set-1.5")


class TestHub:
    @pytest.mark.parametrize(
        ("source", "what", "expected"),
        [
            ("imdb", "data.train", ("imdb", None, "train")),
            ("org/set", "data.test", ("org/set", None, "test")),
            ("nyu-mll/glue/sst2:validation", "data.test", ("nyu-mll/glue", "sst2", "validation")),
            ("org/set:train[:10%]", "data.train", ("org/set", None, "train[:10%]")),
        ],
    )
    def test_names(self, monkeypatch: pytest.MonkeyPatch, source: str, what: str, expected: tuple[str, ...]) -> None:
        asked = []

        def load(name: str, config: str | None, split: str) -> Dataset:
            asked.append((name, config, split))
            return Dataset.from_dict({"text": ["a"]})

        monkeypatch.setattr(datasets, "load_dataset", load)
        assert read_rows(source, what).num_rows == 1
        assert asked == [expected]

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*args: Any, **kwargs: Any) -> Dataset:
            assert datasets.are_progress_bars_disabled()
            raise ConnectionError("Couldn't reach\nthe hub")

        monkeypatch.setattr(datasets, "load_dataset", load)
        before = datasets.are_progress_bars_disabled()
        line = error_of(read_rows, "org/set", "data.train")
        assert '"org/set"' in line and "the hub cannot be reached" in line and "local" in line
        assert datasets.are_progress_bars_disabled() == before


def labeled(tmp_path: Path, labels: list[Any], name: str = "train.jsonl", texts: list[Any] | None = None) -> str:
    texts = texts or [f"text {i}" for i in range(len(labels))]
    return write_jsonl(tmp_path / name, [{"text": t, "label": v} for t, v in zip(texts, labels, strict=True)])


class TestClassification:
    @pytest.mark.parametrize(
        ("labels", "expected"),
        [
            ([10, 2, 2, 1], ["1", "2", "10"]),
            (["b", "a", "b", "c"], ["a", "b", "c"]),
            (["10", "9", "9", "10"], ["9", "10"]),
            ([True, False, True, True], ["False", "True"]),
            ([1.0, 0.0, 1.0, 1.0], ["0", "1"]),
        ],
    )
    def test_label_sets(self, tmp_path: Path, labels: list[Any], expected: list[str]) -> None:
        source = labeled(tmp_path, labels)
        task = load_task(DataConfig(train=source, test=source))
        assert isinstance(task, ClassificationTask)
        assert task.labels == expected
        encoded = cut_to(task, 16).encode(task.train, word_tokenizer())
        names = [str(int(v)) if isinstance(v, float) else str(v) for v in labels]
        assert [task.labels[number] for number in encoded["labels"]] == names

    def test_class_names_keep_their_order(self) -> None:
        features = Features({"text": Value("string"), "label": ClassLabel(names=["not_same", "equivalent"])})
        rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]}, features=features)
        assert ClassificationTask.label_set(rows, TaskEntry()) == ["not_same", "equivalent"]
        hidden = Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
        assert "data.test row 1" in error_of(ClassificationTask.check, hidden, TaskEntry(), "data.test")

    def test_split_is_fixed_and_complete(self, tmp_path: Path) -> None:
        source = labeled(tmp_path, [i % 2 for i in range(50)])
        first, again = load_task(DataConfig(train=source)), load_task(DataConfig(train=source))
        assert first.test["text"][:] == again.test["text"][:]
        assert first.train["text"][:] == again.train["text"][:]
        assert (len(first.train), len(first.test)) == (40, 10)
        assert sorted(first.train["text"][:] + first.test["text"][:]) == sorted(f"text {i}" for i in range(50))

    def test_limits(self, tmp_path: Path) -> None:
        source = labeled(tmp_path, [i % 2 for i in range(50)])
        task = load_task(DataConfig(train=source, test=source, limit_train=20, limit_test=3))
        assert len(task.test) == 3
        assert task.test["text"][:] != ["text 0", "text 1", "text 2"]
        assert len(task.train) == 20
        assert task.train["text"][:] != [f"text {i}" for i in range(20)]
        assert "data.limit_test is 0" in error_of(DataConfig, train=source, limit_test=0)

    def test_bad_rows(self, tmp_path: Path) -> None:
        def line(labels: list[Any], texts: list[Any] | None = None, **settings: Any) -> str:
            return error_of(load_task, DataConfig(train=labeled(tmp_path, labels, texts=texts), **settings))

        wrong = line([0, 1, 0], columns={"text": "txet"})
        assert 'data.columns.text is "txet"' in wrong and "text, label" in wrong and 'did you mean "text"?' in wrong
        assert 'data.columns.label is "class"' in line([0, 1, 0], columns={"label": "class"})
        assert 'data.columns.text_pair is "other"' in line([0, 1, 0], columns={"text_pair": "other"})
        assert 'row 2 (the header not counted), column "label": the label is missing' in line([0, None, 1])
        assert 'row 3 (the header not counted), column "text": the value is missing' in line(
            [0, 1, 1], ["a", "b", None]
        )
        assert 'row 1 (the header not counted), column "text": the text is blank' in line([0, 1, 1], [" ", "b", "c"])
        assert "0.5 is not a label" in line([0, 0.5, 1])
        assert "5 is not a string" in line([0, 1], [5, 6])
        assert 'all 3 training rows have the same label "7"' in line([7, 7, 7, 7], test_fraction=0.25)
        assert "too few to hold out" in line([1])

    def test_unseen_test_labels(self, tmp_path: Path) -> None:
        train, test = labeled(tmp_path, [0, 1, 0]), labeled(tmp_path, [0, 3, 2], "test.jsonl")
        line = error_of(load_task, DataConfig(train=train, test=test))
        assert 'labels that training lacks: "2", "3"' in line and 'training has "0", "1"' in line

    def test_encode_and_collate_for_bert(self, tmp_path: Path, minilm: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(str(minilm))
        source = labeled(tmp_path, ["no", "yes"], texts=["hello world", "a " * 40])
        task = load_task(DataConfig(train=source, test=source))
        encoded = cut_to(task, 12).encode(task.train, tokenizer)
        assert encoded.column_names == ["input_ids", "attention_mask", "length", "labels"]
        assert encoded[0]["input_ids"] == tokenizer("hello world")["input_ids"]
        assert encoded["length"][:] == [4, 12]
        batch = task.collator(tokenizer)(encoded.to_list())
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["input_ids"].shape == (2, 12)
        assert batch["attention_mask"].sum(1).tolist() == [4, 12]
        assert batch["labels"].tolist() == [0, 1]
        assert task.collator(tokenizer, multiple_of=8)(encoded.to_list())["input_ids"].shape == (2, 16)

    def test_pairs(self, tmp_path: Path, minilm: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(str(minilm))
        rows = [{"s1": "good film", "s2": "fine", "label": 1}, {"s1": "a " * 30, "s2": "bad", "label": 0}]
        source = write_jsonl(tmp_path / "pairs.jsonl", rows)
        task = load_task(DataConfig(train=source, test=source, columns={"text": "s1", "text_pair": "s2"}))
        encoded = cut_to(task, 10).encode(task.train, tokenizer)
        assert encoded[0]["input_ids"] == tokenizer("good film", "fine")["input_ids"]
        assert encoded[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
        assert encoded["length"][:] == [6, 10]
        assert tokenizer.decode(encoded[1]["input_ids"]).endswith("bad [SEP]")


class TestCausalLM:
    def completions(self, tmp_path: Path, *pairs: tuple[str, str]) -> CausalLMTask:
        rows = [{"p": prompt, "c": completion} for prompt, completion in pairs]
        source = write_jsonl(tmp_path / "pairs.jsonl", rows)
        columns = {"prompt": "p", "completion": "c"}
        task = load_task(DataConfig(task="causal-lm", train=source, test=source, columns=columns))
        assert isinstance(task, CausalLMTask)
        assert task.labels == []
        return task

    def test_loss_is_on_the_completion(self, tmp_path: Path) -> None:
        task = self.completions(tmp_path, ("a b", "c d"), ("", "e"))
        encoded = cut_to(task, 16).encode(task.train, word_tokenizer())
        assert encoded["input_ids"][:] == [[1, 3, 4, 5, 6, 2], [1, 7, 2]]
        assert encoded["labels"][:] == [[-100, -100, -100, 5, 6, 2], [-100, 7, 2]]
        assert encoded["attention_mask"][:] == [[1] * 6, [1] * 3]
        assert encoded["length"][:] == [6, 3]

    @pytest.mark.parametrize(
        ("max_length", "start", "expected"),
        [
            (7, True, [1, 3, 4, 5, 6, 7, 2]),
            (6, True, [1, 4, 5, 6, 7, 2]),
            (4, True, [1, 6, 7, 2]),
            (3, True, [1, 6, 7]),
            (2, True, [1, 6]),
            (5, False, [4, 5, 6, 7, 2]),
            (3, False, [5, 6, 7]),
        ],
    )
    def test_truncation_keeps_the_completion(
        self, tmp_path: Path, max_length: int, start: bool, expected: list[int]
    ) -> None:
        task = self.completions(tmp_path, ("a b c", "d e"))
        row = cut_to(task, max_length).encode(task.train, word_tokenizer(start=start))[0]
        assert row["input_ids"] == expected
        completion = [i for i in expected if i in (6, 7, 2)]
        assert row["labels"] == [-100] * (len(expected) - len(completion)) + completion

    def test_plain_text(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "text.jsonl", [{"text": "a b"}, {"text": "c d e f"}])
        task = load_task(DataConfig(task="causal-lm", train=source, test=source))
        encoded = cut_to(task, 4).encode(task.train, word_tokenizer())
        assert encoded["input_ids"][:] == [[1, 3, 4, 2], [1, 5, 6, 7]]
        assert encoded["labels"][:] == encoded["input_ids"][:]

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_end_token_as_padding(self, tmp_path: Path, side: str) -> None:
        tokenizer, config = word_tokenizer(pad=False), LlamaConfig(vocab_size=len(WORDS), pad_token_id=None)
        tokenizer.padding_side = side
        ensure_pad_token(tokenizer, config)
        assert tokenizer.pad_token_id == config.pad_token_id == 2
        task = self.completions(tmp_path, ("a", "b"), ("a b", "c d"))
        encoded = cut_to(task, 16).encode(task.train, tokenizer)
        batch = task.collator(tokenizer)(encoded.to_list())
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        filled = {"right": lambda row, pad: row + pad, "left": lambda row, pad: pad + row}[side]
        assert batch["input_ids"][0].tolist() == filled([1, 3, 4, 2], [2, 2])
        assert batch["labels"][0].tolist() == filled([-100, -100, 4, 2], [-100, -100])
        assert batch["attention_mask"][0].tolist() == filled([1, 1, 1, 1], [0, 0])

    def test_bad_rows(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "rows.jsonl", [{"p": "a", "c": "b"}, {"p": "a", "c": " "}])
        config = DataConfig(task="causal-lm", train=source, test=source)
        line = error_of(load_task, replace(config, columns={"prompt": "p", "completion": "c"}))
        assert 'data.train row 2 (the header not counted), column "c": the text is blank' in line
        other = replace(config, columns={"prompt": "q", "completion": "c"})
        assert 'data.columns.prompt is "q"' in error_of(load_task, other)
        assert 'data.columns.text is "text"' in error_of(load_task, config)
        assert "name both" in error_of(load_task, replace(config, columns={"prompt": "p"}))


class TestModelLimits:
    def test_positions(self) -> None:
        assert max_positions(BertConfig(max_position_embeddings=512)) == 512
        assert max_positions(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
        assert max_positions(OPTConfig(max_position_embeddings=2048)) == 2048

    def test_check_max_length(self, minilm: Path) -> None:
        unlimited, bert = word_tokenizer(), AutoTokenizer.from_pretrained(str(minilm))
        check_max_length(32, 32, unlimited)
        check_max_length(10**6, None, unlimited)
        line = error_of(check_max_length, 33, 32, unlimited)
        assert "data.max_length is 33" in line and "at most 32 tokens" in line
        assert "at most 512 tokens" in error_of(check_max_length, 600, 1024, bert)

    def test_pad_token_stays_or_is_replaced(self) -> None:
        tokenizer, config = word_tokenizer(), LlamaConfig(vocab_size=len(WORDS), pad_token_id=None)
        ensure_pad_token(tokenizer, config)
        assert tokenizer.pad_token == "<pad>" and config.pad_token_id == 0
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id == len(WORDS)
        ensure_pad_token(tokenizer, config)
        assert tokenizer.pad_token == "</s>" and config.pad_token_id == 2
