"""Options of a question share the prompt: it is computed once, and the scores are those of whole sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adapters import light_over
from datasets import Dataset
from tiny import DECODERS, DROPPED, VOCABULARY, every_family, make
from torch import nn
from transformers import DataCollatorForSeq2Seq
from workbench import tokenizer_of_bytes

import lightpeft.app.evaluation.respondent as asking
from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.tasks.kinds.likelihood import likelihoods
from lightpeft.app.tasks.tokens import Collator

PAD = Collator(DataCollatorForSeq2Seq(tokenizer_of_bytes(), label_pad_token_id=-100))


def questions() -> Dataset:
    """Prompts of 3 to 9 tokens, with one to four options of one to five tokens; two options are equal."""
    drawn = torch.Generator().manual_seed(0)

    def text(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=drawn).tolist()

    rows = []
    for prompt, options in ((5, (1, 3, 2)), (9, (4, 1)), (3, (1, 1)), (6, (5,)), (7, (2, 2, 1, 3))):
        asked = text(prompt)
        rows.append({"input_ids": [asked + text(length) for length in options], "start": [prompt] * len(options)})
    rows[-1]["input_ids"][1] = rows[-1]["input_ids"][0]
    return Dataset.from_list([{**row, "bytes": [1] * len(row["start"])} for row in rows])


def scores(model: nn.Module, monkeypatch: pytest.MonkeyPatch, shared: bool, size: int | None = None) -> np.ndarray:
    with monkeypatch.context() as patch:
        if not shared:
            patch.setattr(asking, "can_go_on", lambda model: False)
        return likelihoods(BatchedModel(model, PAD, size), questions()).losses


def count_tokens(model: nn.Module) -> list[int]:
    """Tokens of each forward pass from now on."""
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    return seen


@every_family(DECODERS)
def test_scores_are_those_of_whole_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    expected = scores(model, monkeypatch, shared=False)
    seen = count_tokens(model)
    for size in (1, 5, 64):
        np.testing.assert_allclose(scores(model, monkeypatch, shared=True, size=size), expected, rtol=1e-4)
    shared = sum(seen)
    seen.clear()
    for size in (1, 5, 64):
        scores(model, monkeypatch, shared=False, size=size)
    assert shared < 0.8 * sum(seen), "a prompt is computed once"


@pytest.mark.parametrize(
    "budget", [DROPPED, {"heads": 0.5, "neurons": 0.5, "scope": "layerwise"}], ids=["dropped", "even"]
)
def test_a_light_model_does_the_same(budget: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one with blocks that have no attention, and so no keys and values."""
    light = light_over(make("llama-gqa"), **budget)
    expected = scores(light, monkeypatch, shared=False)
    np.testing.assert_allclose(scores(light, monkeypatch, shared=True), expected, rtol=1e-4)


def test_logits_are_computed_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary times all places of a batch takes more memory than the rest of the pass."""
    model = make("llama-gqa")
    expected = scores(model, monkeypatch, shared=True)
    rows: list[int] = []
    head = model.get_output_embeddings()
    usual = head.forward

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return usual(hidden)

    vars(head)["forward"] = counted
    monkeypatch.setattr(asking, "MOST_LOGIT_BYTES", 1)
    np.testing.assert_allclose(scores(model, monkeypatch, shared=True), expected, rtol=1e-5)
    assert len(rows) > 10 and set(rows) == {1}


def test_a_model_without_a_cache_reads_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does one where no two options share a prompt."""
    model = make("llama-gqa")
    expected = scores(model, monkeypatch, shared=True)
    usual = type(model).forward

    def forward(self: Any, input_ids: Any, attention_mask: Any, logits_to_keep: Any = 0) -> Any:
        return usual(self, input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(type(model), "forward", forward)
    np.testing.assert_allclose(scores(model, monkeypatch, shared=True), expected, rtol=1e-4)
