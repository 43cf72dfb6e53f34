"""A tokenizer that is not the model's own is told before anything is trained, measured or predicted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny import refusal
from transformers import AutoModel, BertConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase, T5Config
from workbench import Workbench, lightpeft

from lightpeft.app.tasks.tokens import check_tokens
from lightpeft.config import ModelConfig
from lightpeft.models.tokenizers import check_vocabulary, load_tokenizer

EMBEDDINGS, UNKNOWN = 36, 1
"""Of the tiny bases."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def tokenizer(bench: Workbench) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelConfig(name=str(bench.base)))


def encoded(*rows: Any) -> Dataset:
    return Dataset.from_dict({"input_ids": list(rows)})


def without_tokenizer(base: Path, target: Path, embeddings: int) -> Path:
    """The base without its tokenizer's files, with more embeddings."""
    shutil.copytree(base, target, ignore=lambda _, names: [name for name in names if "token" in name])
    model = AutoModel.from_pretrained(target)
    model.resize_token_embeddings(embeddings, mean_resizing=False)
    model.save_pretrained(target)
    return target


class TestVocabulary:
    @pytest.mark.parametrize("embeddings", [EMBEDDINGS, EMBEDDINGS + 28, 10 * EMBEDDINGS])
    def test_padding_is_no_fault(self, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
        check_vocabulary(tokenizer, BertConfig(vocab_size=embeddings))

    def test_a_tokenizer_of_next_to_nothing(self, tokenizer: PreTrainedTokenizerBase) -> None:
        text = refusal(lambda: check_vocabulary(tokenizer, LlamaConfig(vocab_size=32_000)))
        assert text.startswith("the tokenizer knows 36 tokens, and the model has 32,000 embeddings:")
        check_vocabulary(tokenizer, PretrainedConfig())  # a model that does not say

    def test_what_transformers_makes_up(self, tmp_path: Path) -> None:
        """The largest of them: a hundred sentinels."""
        T5Config().save_pretrained(tmp_path)
        made_up = load_tokenizer(ModelConfig(name=str(tmp_path)))
        assert "tokenizer files are missing" in refusal(lambda: check_vocabulary(made_up, T5Config()))


class TestTokens:
    def test_rows_that_are_mostly_unknown(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Special tokens do not count; more than half of the rows must be so, and each by more than half."""
        config = BertConfig(vocab_size=EMBEDDINGS)
        known, half, unknown = [2, 5, 6, 3], [2, UNKNOWN, 6, 3], [2, UNKNOWN, UNKNOWN, 6, 3]
        for rows in ([known, half, half, half], [known, unknown], [[2, 3], []]):
            check_tokens(encoded(*rows), config, "rows", tokenizer)
        for rows in ([known, unknown, unknown], [[unknown, unknown]]):
            text = refusal(lambda rows=rows: check_tokens(encoded(*rows), config, "the test rows", tokenizer))
            assert text.startswith("the test rows: ") and "mostly unknown tokens" in text

    def test_tokens_beyond_the_embeddings(self) -> None:
        check_tokens(encoded([2, 29, 3]), BertConfig(vocab_size=30), "rows")
        for rows in ([[5], [2, 30, 3]], [[[5], [2, 30]]]):
            text = refusal(lambda rows=rows: check_tokens(encoded(*rows), BertConfig(vocab_size=30), "rows"))
            assert "gives token id 30, but the model has embeddings for ids 0 to 29" in text


def test_a_base_without_tokenizer_files_is_not_trained(
    bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = without_tokenizer(bench.base, tmp_path / "base", 400)
    settings = {"model.name": str(base), "output": str(tmp_path / "run")}
    capsys.readouterr()
    assert lightpeft("run", "--config", bench.yaml("bare", **settings)) == 2
    written = capsys.readouterr()
    assert "the tokenizer knows 5 tokens, and the model has 400 embeddings" in written.err
    assert written.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
