"""`lightpeft trim`: a smaller vocabulary without a run, in a folder that transformers reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import workbench
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)
from workbench import lightpeft, save_base, tokenizer_of_bytes, tokenizer_of_word_pieces, write_rows

from lightpeft.app.exports.trimming import trim

TEXTS = ["good1 word3 good2", "bad4 word1"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("trim") / "encoder", tokenizer=tokenizer_of_word_pieces())


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.csv", [{"text": text, "label": "positive"} for text in TEXTS])
    return tmp_path / "rows.csv"


def answers(folder: Path, texts: list[str], auto: type = AutoModel) -> torch.Tensor:
    """What a folder answers, read by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), auto.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt"))[0]


def tokens_of(folder: Path) -> list[list[str]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.convert_ids_to_tokens(row) for row in tokenizer(TEXTS)["input_ids"]]


def test_the_same_answers_from_fewer_tokens(
    encoder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lightpeft("trim", encoder, tmp_path / "small", "--data", rows, "--data.columns.text", "text") == 0
    small = tmp_path / "small"
    before, after = (json.loads((folder / "config.json").read_text())["vocab_size"] for folder in (encoder, small))
    table = capsys.readouterr().out
    assert after < before and f"{before:,}" in table and f"{after:,}" in table and f"{1 - after / before:.1%}" in table
    assert len(AutoTokenizer.from_pretrained(small)) == after
    assert torch.equal(answers(small, TEXTS), answers(encoder, TEXTS)) and tokens_of(small) == tokens_of(encoder)
    rows_of = AutoModel.from_pretrained(small).get_input_embeddings().weight
    assert len(rows_of) == after
    other = AutoTokenizer.from_pretrained(small)("neutral words that no row had")["input_ids"]
    assert max(other) < after, "other texts are still tokenized"


def test_every_text_of_a_row_counts_unless_a_column_is_named(encoder: Path, tmp_path: Path) -> None:
    said = [{"role": "user", "content": TEXTS[0]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": said, "more": TEXTS[1]}) + "\n")
    whole = trim(str(encoder), tmp_path / "whole", str(tmp_path / "rows.jsonl"))
    part = trim(str(encoder), tmp_path / "part", str(tmp_path / "rows.jsonl"), "more")
    assert part.after.tokens < whole.after.tokens < whole.before.tokens
    assert torch.equal(answers(tmp_path / "whole", TEXTS), answers(encoder, TEXTS))
    (tmp_path / "rows.txt").write_text(TEXTS[1])
    lines = trim(str(encoder), tmp_path / "lines", str(tmp_path / "rows.txt"))
    assert lines.after == part.after


def test_a_model_keeps_its_head_and_its_precision(encoder: Path, rows: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    config = BertConfig(vocab_size=len(tokenizer), num_labels=3, **workbench.SIZES)
    torch.manual_seed(0)
    BertForSequenceClassification(config).bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trimmed = trim(str(tmp_path / "model"), tmp_path / "small", str(rows))
    auto = AutoModelForSequenceClassification
    assert torch.equal(answers(tmp_path / "small", TEXTS, auto), answers(tmp_path / "model", TEXTS, auto))
    assert trimmed.after.weights_bytes == 2 * trimmed.after.parameters and not trimmed.untrained


def test_a_decoder_writes_the_same(rows: Path, tmp_path: Path) -> None:
    decoder = save_base(tmp_path / "decoder", "llama", tokenizer=tokenizer_of_bytes(texts=[*TEXTS, "other words"] * 9))
    trimmed = trim(str(decoder), tmp_path / "small", str(rows), "text")
    assert trimmed.after.tokens < trimmed.before.tokens
    kept = AutoTokenizer.from_pretrained(tmp_path / "small").get_vocab()
    ids = AutoTokenizer.from_pretrained(decoder).get_vocab()
    old = torch.tensor([ids[token] for token in sorted(kept, key=kept.__getitem__)])
    both = [answers(folder, TEXTS[:1], AutoModelForCausalLM) for folder in (decoder, tmp_path / "small")]
    assert torch.allclose(both[0][..., old], both[1], atol=1e-6)


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("日本語", [], "no text of rows.txt has a token that the model knows"),
        (TEXTS[0], ["--text", "review"], 'has no column "review"; its columns are text'),
    ],
    ids=["unknown", "column"],
)
def test_rows_that_say_nothing_are_refused(
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if options:
        write_rows(Path("rows.csv"), [{"text": text}])
    Path("rows.txt").write_text(text)
    assert lightpeft("trim", encoder, "out", "--data", "rows.csv" if options else "rows.txt", *options) == 2
    written = capsys.readouterr().err
    assert said in written and written.count("\n") == 1 and not Path("out").exists()


def test_what_cannot_be_trimmed_is_refused(
    encoder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(model: object, output: Path = tmp_path / "out", *data: object) -> str:
        assert lightpeft("trim", model, output, *(data or ("--data", rows))) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and not (tmp_path / "out").exists()
        return said

    assert "out is not empty; give a new folder" in refusal(encoder, rows.parent).replace(rows.parent.name, "out")
    assert "rows.csv is not empty" not in refusal(encoder, rows) and rows.is_file()
    shutil.copytree(encoder, tmp_path / "words")
    words = Tokenizer(
        models.WordLevel({"[UNK]": 0, **{word: n for n, word in enumerate(TEXTS[0].split(), 1)}}, "[UNK]")
    )
    words.pre_tokenizer = AutoTokenizer.from_pretrained(encoder).backend_tokenizer.pre_tokenizer
    for file in (tmp_path / "words").glob("*token*"):
        file.unlink()
    many = json.loads((tmp_path / "words/config.json").read_text())["vocab_size"]
    words.add_tokens([f"word{n}" for n in range(many)][: many - 4])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    assert "its kind is WordLevel" in refusal(tmp_path / "words")
    assert "--data rows.csv" in refusal(encoder, tmp_path / "out", "--text", "text")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(encoder)})
    )
    assert "adapter" in refusal(tmp_path / "adapter")


def test_minilm_gives_the_same_embeddings(minilm: Path, movie_reviews: Path, tmp_path: Path) -> None:
    trimmed = trim(str(minilm), tmp_path / "small", str(movie_reviews / "test.csv"), "text")
    texts = (movie_reviews / "test.csv").read_text().splitlines()[1:5]
    texts = [text.rpartition(",")[0].strip('"').replace('""', '"') for text in texts]
    assert trimmed.after.parameters < 0.8 * trimmed.before.parameters
    assert torch.allclose(answers(tmp_path / "small", texts), answers(minilm, texts), atol=1e-6)
