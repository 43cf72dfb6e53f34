"""Attention whose way back is plain products: PyTorch's result to the last bit, its gradients but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from tiny import LAYOUTS, inputs_for, make, with_lora
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lightpeft.training import attention
from lightpeft.training.acceleration import accelerated
from lightpeft.training.attention import LONGEST, attention_by_products

BFLOAT16 = torch.bfloat16
MASKS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "none": lambda seen: {},
    "causal": lambda seen: {"is_causal": True},
    "true or false": lambda seen: {"attn_mask": seen},
    "one for all rows": lambda seen: {"attn_mask": seen[:1]},
    "one for all tokens": lambda seen: {"attn_mask": seen[:, :, :1]},
    "one by head": lambda seen: {"attn_mask": torch.cat([seen, seen.flip(-1)], 1)},
    "infinite": lambda seen: {"attn_mask": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)},
    "as low as can be": lambda seen: {
        "attn_mask": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(BFLOAT16).min)
    },
    "a bias": lambda seen: {"attn_mask": torch.randn(seen.shape)},
}


def both(states: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """The output, and gradients of queries, keys and values."""
    states = [each.to(dtype, copy=True).requires_grad_() for each in states]
    if (mask := options.get("attn_mask")) is not None and mask.dtype != torch.bool:
        options |= {"attn_mask": mask.to(dtype)}
    output = scaled_dot_product_attention(*states, **options)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    output.float().mul(weights).sum().backward()
    return [output.detach().float(), *(each.grad.float() for each in states if each.grad is not None)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens a row of what went back by products."""
    seen: list[int] = []
    backward = attention._write_gradients

    def counted(given: list[Tensor], *rest: Any) -> None:
        seen.append(given[1].shape[1])
        backward(given, *rest)

    monkeypatch.setattr(attention, "_write_gradients", counted)
    return seen


class TestGradients:
    @settings(max_examples=60, deadline=None)
    @given(
        mask=some.sampled_from(sorted(MASKS)),
        rows=some.integers(1, 3),
        tokens=some.integers(2, 40),
        more=some.integers(0, 9),
        channels=some.sampled_from([4, 8, 32]),
        scale=some.sampled_from([None, 1.0, 0.2]),
        at_once=some.sampled_from([1, 2000, 2**24]),
        seed=some.integers(0, 99),
    )
    def test_as_near_to_the_exact_ones_as_pytorchs(
        self, mask: str, rows: int, tokens: int, more: int, channels: int, scale: float | None, at_once: int, seed: int
    ) -> None:
        """Rows are padded on the left, so that under a causal mask some tokens attend to nothing."""
        torch.manual_seed(seed)
        keys = tokens + more
        states = [torch.randn(rows, 2, length, channels).to(BFLOAT16) for length in (tokens, keys, keys)]
        padding = torch.randint(0, keys, (rows, 1, 1, 1)) <= torch.arange(keys)
        options = MASKS[mask](padding & torch.ones(tokens, keys, dtype=torch.bool).tril()) | {"scale": scale}
        with sdpa_kernel(SDPBackend.MATH):
            exact = both(states, torch.float32, **options)
        own = both(states, BFLOAT16, **options)
        with pytest.MonkeyPatch.context() as patch, attention.ByProducts():
            patch.setattr(attention, "_PROBABILITY_BYTES", at_once)
            found = both(states, BFLOAT16, **options)
        assert found[0].equal(own[0])
        size = max(float(each.norm()) for each in exact[1:])
        for theirs, mine, ideal in zip(own[1:], found[1:], exact[1:], strict=True):
            assert (mine - ideal).norm() <= 3 * (theirs - ideal).norm() + 2 * torch.finfo(BFLOAT16).eps * size

    def test_heads_that_share_keys(self, taken: list[int]) -> None:
        torch.manual_seed(0)
        states = [torch.randn(2, heads, 9, 8).to(BFLOAT16) for heads in (6, 2, 2)]
        exact = both(states, torch.float32, enable_gqa=True, is_causal=True)
        with attention.ByProducts():
            found = both(states, BFLOAT16, enable_gqa=True, is_causal=True)
        assert taken == [9]
        assert all((mine - ideal).norm() < 0.01 * ideal.norm() for mine, ideal in zip(found, exact, strict=True))


class TestModels:
    """Where a model in training takes it."""

    @staticmethod
    def gradients(model: nn.Module, autocast: bool, faster: bool) -> Tensor:
        inputs = inputs_for(model, labels=True)
        model.zero_grad()
        with attention_by_products(model) if faster else nullcontext():
            with torch.autocast("cpu", BFLOAT16, enabled=autocast):
                loss = model(**inputs).loss
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_every_layout_learns_the_same(self, name: str) -> None:
        model = with_lora(make(name))
        exact = self.gradients(model, autocast=False, faster=False)
        errors = [
            float((self.gradients(model, autocast=True, faster=each) - exact).norm() / exact.norm())
            for each in (True, False)
        ]
        assert errors[0] < 1.5 * errors[1] + 1e-3 and errors[1] < 0.2

    @staticmethod
    def train(model: nn.Module, tokens: int = 8, autocast: torch.dtype | None = BFLOAT16, **settings: Any) -> None:
        ids = torch.arange(1, tokens + 1).remainder(40)[None].expand(2, -1)
        with accelerated(model, **settings):
            with torch.autocast("cpu", autocast or BFLOAT16, enabled=autocast is not None):
                loss = model(input_ids=ids, labels=torch.zeros(2, dtype=torch.long)).loss
            loss.backward()

    def bert(self, **settings: Any) -> nn.Module:
        return make("bert", max_position_embeddings=LONGEST + 1, **settings).train()

    @pytest.mark.parametrize(("tokens", "by_products"), [(8, True), (LONGEST, True), (LONGEST + 1, False)])
    def test_up_to_a_length(self, taken: list[int], tokens: int, by_products: bool) -> None:
        model = self.bert()
        self.train(model, tokens, dropout=0.0)
        layers = model.config.num_hidden_layers
        assert taken == [tokens] * layers * by_products

    def test_a_model_in_bfloat16(self, taken: list[int]) -> None:
        self.train(self.bert().bfloat16(), autocast=None, dropout=0.0)
        assert taken

    @pytest.mark.parametrize("autocast", [None, torch.float16])
    def test_not_in_other_types(self, taken: list[int], autocast: torch.dtype | None) -> None:
        self.train(self.bert(), autocast=autocast, dropout=0.0)
        assert not taken

    def test_not_with_dropout_of_attention(self, taken: list[int]) -> None:
        self.train(self.bert(attention_probs_dropout_prob=0.5), dropout=None)
        assert not taken

    def test_a_kernel_that_somebody_chose_stays(self, taken: list[int]) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            self.train(self.bert(), dropout=0.0)
        assert not taken

    def test_nothing_is_changed_where_nothing_trains(self, taken: list[int]) -> None:
        model = self.bert()
        with accelerated(model, dropout=0.0), torch.autocast("cpu", BFLOAT16), torch.no_grad():
            model(input_ids=torch.ones(2, 8, dtype=torch.long))
        assert not taken

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_has_its_own(self, taken: list[int], reentrant: bool) -> None:
        """It computes attention again outside of the model's forward pass, and has to in the same way."""
        model = with_lora(make("llama-gqa")).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        self.gradients(model, autocast=True, faster=True)
        assert not taken

    def test_rows_that_are_no_tokens(self, taken: list[int]) -> None:
        model = with_lora(make("vit")).train()
        with accelerated(model), torch.autocast("cpu", BFLOAT16):
            model(pixel_values=torch.ones(2, 3, 16, 16)).logits.float().sum().backward()
        assert taken
