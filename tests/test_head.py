"""A language model's head apart from the rest: the same logits, of a few rows at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import DECODERS, ENCODER_DECODERS, every_family, inputs_for, make, with_lora
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq
from workbench import tokenizer_of_bytes

from lightpeft.app.evaluation import respondent as asking
from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.tasks.respondent import token_sums
from lightpeft.app.tasks.tokens import Collator
from lightpeft.models.batches import IGNORED
from lightpeft.models.head import lone_head, skip_head
from lightpeft.models.unwrap import transformers_model

FOLLOWED = ("gemma2", "granite")
"""A cap or a scale comes behind their head."""


@every_family(DECODERS)
def test_hidden_states_and_head_give_the_logits(name: str) -> None:
    model = with_lora(make(name)).eval()
    batch = inputs_for(model)
    with torch.no_grad():
        usual = model(**batch).logits
        head = lone_head(model)
        with skip_head(head):
            states = model(**batch).logits
        found = states if head is None else head(states)
        assert found.equal(usual)
        assert model(**batch).logits.equal(usual), "all is put back"
    assert (head is None) == (name in FOLLOWED)
    assert head is None or states.shape[-1] == transformers_model(model).config.hidden_size


@pytest.mark.parametrize("name", [*ENCODER_DECODERS, "bert", "vit"])
def test_other_models_are_left_alone(name: str) -> None:
    model = make(name)
    assert lone_head(model) is None
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_who_watches_the_head_sees_logits() -> None:
    model = make("llama-gqa")
    seen: list[Tensor] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    assert lone_head(model) is None
    with skip_head(None):
        model(**inputs_for(model))
    assert seen[-1].shape[-1] == model.config.vocab_size


def test_the_trial_draws_no_random_numbers() -> None:
    model = make("gpt2", resid_pdrop=0.5).train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert lone_head(model) is not None
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2"])
@pytest.mark.parametrize("bf16", [False, True])
def test_logits_of_a_few_rows_at_a_time_are_the_same(name: str, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(make(name)).eval()
    lengths = (9, 7, 7, 5, 3)
    rows = [{"input_ids": [5 + i + k for k in range(n)], "length": n} for i, n in enumerate(lengths)]
    rows = [{**row, "attention_mask": [1] * row["length"]} for row in rows]
    rows = [{**row, "labels": [IGNORED, IGNORED, *row["input_ids"][2:]]} for row in rows]
    pad = DataCollatorForSeq2Seq(tokenizer_of_bytes(), label_pad_token_id=IGNORED)
    asked = BatchedModel(model, Collator(pad), 3, torch.bfloat16 if bf16 else None)
    head = Counted(transformers_model(model).get_output_embeddings())
    found = []
    for at_once in (2**28, 1):
        monkeypatch.setattr(asking, "MOST_LOGIT_BYTES", at_once)
        head.rows.clear()
        found.append(token_sums(asked, Dataset.from_list(rows)))
        whole = [3, 2] if at_once > 1 or name in FOLLOWED else [1] * 5
        assert head.rows[1:] == whole, "the first call finds out whether it can be done"
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    assert found[0][:, 2].tolist() == [length - 2 for length in lengths]


def test_between_batches_the_model_has_its_head() -> None:
    model = make("llama-gqa").eval()
    rows = Dataset.from_list(
        [{"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": [5, 6, 7], "length": 3}] * 3
    )
    pad = DataCollatorForSeq2Seq(tokenizer_of_bytes(), label_pad_token_id=IGNORED)
    asked = BatchedModel(model, Collator(pad), 1)
    for _ in asked.next_logits(rows, "Asking"):
        assert model(**inputs_for(model)).logits.shape[-1] == model.config.vocab_size


class Counted:
    """How many rows each call of a head computed."""

    def __init__(self, head: nn.Module) -> None:
        self.rows: list[int] = []
        self.forward = head.forward
        vars(head)["forward"] = self

    def __call__(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return self.forward(hidden)
