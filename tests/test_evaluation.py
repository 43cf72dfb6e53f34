"""Answers in the order of rows, and metrics against hand-computed values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from datasets import Dataset
from layouts import cut_to, evaluate
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.tasks.kinds.causal import CausalLMTask
from lightpeft.app.tasks.kinds.classification import ClassificationTask
from lightpeft.app.tasks.respondent import finite_logits
from lightpeft.config import DataConfig
from lightpeft.console import bars
from lightpeft.errors import LightPeftError

T = TypeVar("T")
VOCABULARY = 20
TEXTS = ["w3 w4 w5", "w6", "w7 w8 w9 w10 w11 w12", "w3 w3", "w19 w18 w17 w16", "w5 w6 w7 w8 w9", "w10"]
LABELS = ["no", "yes", "yes", "no", "yes", "no", "yes"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def bert(labels: int = 2) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=labels,
        initializer_range=0.5,
    )
    return BertForSequenceClassification(config)


def llama_config(**settings: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
        initializer_range=0.5,
        **settings,
    )


def classification(labels: list[str] = LABELS) -> ClassificationTask:
    rows = Dataset.from_dict({"text": TEXTS, "label": labels})
    return ClassificationTask(DataConfig(train="unused"), rows, rows, sorted(set(labels)))


def one_by_one(model: nn.Module, encoded: Dataset) -> torch.Tensor:
    """Logits of every row alone, without any padding."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in encoded])


class TestClassification:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
    def test_predictions_keep_the_order_of_rows(self, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
        task, model = classification(), bert()
        encoded = cut_to(task, 16).encode(task.test, tokenizer)
        expected = one_by_one(model, encoded)
        collator = task.collator(tokenizer)
        logits = finite_logits(BatchedModel(model, collator, batch_size), encoded)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert len({round(float(value), 5) for value in logits[:, 0]}) == len(TEXTS)  # rows are told apart

    def test_batches_are_by_length_and_padded_to_their_longest(
        self, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task, shapes = classification(), []
        encoded = cut_to(task, 16).encode(task.test, tokenizer)
        model = bert()
        model.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        seen = []

        def progress(items: Iterable[T], total: int, description: str) -> Iterable[T]:
            seen.append((total, description))
            return items

        monkeypatch.setattr(bars, "progress", progress)
        finite_logits(BatchedModel(model, task.collator(tokenizer), 3), encoded)
        finite_logits(BatchedModel(model, task.collator(tokenizer), 64), encoded)
        assert shapes == [(3, 6), (3, 3), (1, 1), (7, 6)]
        assert seen == [(3, "Predicting"), (1, "Predicting")]

    def test_metrics_of_two_labels(self, tokenizer: PreTrainedTokenizerFast) -> None:
        task, model = classification(), FixedLogits([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
        rows = encoded_rows([0, 1, 1, 0, 1])
        metrics = evaluate(model, rows, task, task.collator(tokenizer), 2)
        # right, right, wrong, wrong, right: precision 2/3 and recall 2/3 of label 1
        margins = [2.0, 1.0, -1.0, -3.0, 1.0]
        assert metrics == pytest.approx(
            {
                "loss": sum(math.log1p(math.exp(-m)) for m in margins) / 5,
                "accuracy": 3 / 5,
                "f1": 2 / 3,
                "examples": 5.0,
            }
        )

    def test_training_mode_comes_back_module_by_module(self, tokenizer: PreTrainedTokenizerFast) -> None:
        task, model = classification(), bert()
        encoded = cut_to(task, 16).encode(task.test, tokenizer)
        model.train()
        model.bert.embeddings.eval()
        before = [module.training for module in model.modules()]
        evaluate(model, encoded, task, task.collator(tokenizer), 4)
        assert [module.training for module in model.modules()] == before
        with pytest.raises(RuntimeError):
            evaluate(model, encoded, task, lambda rows: _fail(), 4)  # type: ignore[arg-type]
        assert [module.training for module in model.modules()] == before


class FixedLogits(nn.Module):
    """Row i, which holds the one token i + 3, gets the i-th logits."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids[:, 0] - 3])


class AllLogits(nn.Module):
    """A language model that cannot be told where logits are wanted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def encoded_rows(labels: list[int]) -> Dataset:
    """One token a row, told apart by its number."""
    ids = [[i + 3] for i in range(len(labels))]
    ones = [1] * len(labels)
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1]] * len(labels), "length": ones, "labels": labels}
    )


def _fail() -> dict[str, Any]:
    raise RuntimeError("collating failed")


class TestCausalLM:
    def task(self) -> CausalLMTask:
        rows = Dataset.from_dict({"prompt": TEXTS, "completion": TEXTS[::-1]})
        config = DataConfig(task="causal-lm", train="unused")
        return CausalLMTask(config, rows, rows, [])

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_metrics_are_weighted_by_token(self, tokenizer: PreTrainedTokenizerFast, side: str) -> None:
        torch.manual_seed(0)
        model, task = LlamaForCausalLM(llama_config()), self.task()
        tokenizer.padding_side = side
        encoded = cut_to(task, 16).encode(task.test, tokenizer)
        losses, right = [], []
        model.eval()
        for row in encoded:
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            for place, label in enumerate(row["labels"]):
                if label != -100 and place > 0:
                    losses.append(-log_p[place - 1, label].item())
                    right.append(log_p[place - 1].argmax().item() == label)
        words = sum(len(text.split()) for text in TEXTS)
        assert len(losses) == words + len(TEXTS)  # every completion word and one end token a row
        metrics = evaluate(model, encoded, task, task.collator(tokenizer), 3)
        mean = sum(losses) / len(losses)
        assert metrics == pytest.approx(
            {
                "loss": mean,
                "perplexity": math.exp(mean),
                "accuracy": sum(right) / len(right),
                "tokens": float(len(losses)),
                "examples": float(len(TEXTS)),
            },
            rel=1e-4,
        )

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_logits_are_computed_where_a_next_token_has_a_label(
        self, tokenizer: PreTrainedTokenizerFast, side: str
    ) -> None:
        torch.manual_seed(0)
        model, task = LlamaForCausalLM(llama_config()), self.task()
        tokenizer.padding_side = side
        encoded = cut_to(task, 16).encode(task.test, tokenizer)
        collator, read, kept = task.collator(tokenizer), 0, []

        def count(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            nonlocal read
            read += args[0].shape[0] * args[0].shape[1]

        model.lm_head.register_forward_hook(count)
        model.register_forward_hook(lambda module, args, output: kept.append(output.past_key_values))
        metrics = evaluate(model, encoded, task, collator, 1)
        assert read == metrics["tokens"]  # of single rows no place is another row's
        read = 0
        assert evaluate(model, encoded, task, collator, 3) == pytest.approx(metrics, rel=1e-5)
        assert metrics["tokens"] < read < sum(encoded["length"])
        assert not any(kept), "keys and values that nobody reads"
        assert evaluate(AllLogits(model), encoded, task, collator, 3) == pytest.approx(metrics, rel=1e-5)

    def test_nothing_to_predict(self, tokenizer: PreTrainedTokenizerFast) -> None:
        task = self.task()
        rows = Dataset.from_dict({"input_ids": [[3]], "attention_mask": [[1]], "labels": [[3]], "length": [1]})
        with pytest.raises(LightPeftError, match="no token to predict"):
            evaluate(LlamaForCausalLM(llama_config()), rows, task, task.collator(tokenizer), 1)
