"""Activations that the backward pass makes again: the same gradients, and less in memory until then."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lights import light_of
from single_steps import Watched, gradients
from tiny import LAYOUTS, inputs_for, make, with_lora
from torch import Tensor, nn
from training import inputs, student

from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.fused import fused_lora
from lightpeft.prune.estimation import Estimator
from lightpeft.training.attention import attention_by_products
from lightpeft.training.recomputing import recomputed_activations


def same_to_the_last_bit(model: nn.Module, batch: dict[str, Tensor]) -> None:
    loss, of_kept = gradients(model, batch)
    with recomputed_activations(model):
        again, of_recomputed = gradients(model, batch)
    assert again.equal(loss) and of_recomputed.keys() == of_kept.keys() and of_kept
    unequal = [name for name, gradient in of_kept.items() if not of_recomputed[name].equal(gradient)]
    assert not unequal, unequal


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_gradients_are_the_same_to_the_last_bit(name: str, half: bool) -> None:
    model = with_lora(make(name)).train()  # dropout among what is computed
    with fused_lora(model), torch.autocast("cpu", torch.bfloat16, enabled=half):
        same_to_the_last_bit(model, inputs_for(model, labels=True))


@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_scores_are_the_same_to_the_last_bit(name: str) -> None:
    found = []
    for recomputed in (False, True):
        model, batch = student(name), inputs(name)
        estimator = Estimator(model, light_of(length=2))
        estimator.start(None)
        for _ in range(2):
            with fused_lora(model), recomputed_activations(model) if recomputed else torch.enable_grad():
                model(**batch).loss.backward()
            estimator.step()
        found.append(estimator.record().scores)
    assert all(found[0][key].equal(found[1][key]) for key in found[0])


@pytest.mark.parametrize(("name", "slot"), [("bert", "intermediate_act_fn"), ("llama-gqa", "act_fn")])
def test_activations_are_not_kept_for_the_backward_pass(name: str, slot: str) -> None:
    model = with_lora(make(name)).train()
    modules = [module for path, module in model.named_modules() if path.rpartition(".")[2] == slot]
    alive = []
    for recomputed in (False, True):
        watched = Watched(*modules)
        with fused_lora(model), recomputed_activations(model) if recomputed else torch.enable_grad():
            loss = model(**inputs_for(model, labels=True)).loss
        alive.append(watched.alive())
        loss.backward()
    assert alive == [len(modules), 0]


@pytest.mark.parametrize("faster", [recomputed_activations, attention_by_products])
def test_nothing_is_asked_in_a_way_that_is_going_away(faster: Callable[..., Any]) -> None:
    model = with_lora(make("llama-gqa")).train()
    with warnings.catch_warnings(), faster(model):
        warnings.simplefilter("error")
        assert model(**inputs_for(model, labels=True)).loss.grad_fn is not None


def test_the_model_is_as_before_and_checkpointing_is_left_alone() -> None:
    model = with_lora(make("llama-gqa")).train()
    inner, batch = transformers_model(model), inputs_for(model, labels=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same_to_the_last_bit(model, batch)
    model.gradient_checkpointing_disable()
    with pytest.raises(RuntimeError), recomputed_activations(model):
        raise RuntimeError
    assert "forward" not in vars(inner)
    with recomputed_activations(model), torch.no_grad():
        assert model(**batch).loss.grad_fn is None
