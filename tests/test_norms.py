"""RMS norms as one node: transformers' result to the last bit, its gradients but for the order of rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from single_steps import Watched, applied, gradients
from tiny import LAYOUTS, inputs_for, make, relative_difference, with_lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lightpeft.compat.transformers import is_rms_norm
from lightpeft.peft_kinds.sites.fused import fused_lora
from lightpeft.training import norms
from lightpeft.training.norms import fused_norms
from lightpeft.training.recomputing import recomputed_activations

WITH_LLAMAS = ["llama-gqa", "mistral", "qwen2", "qwen3", "phi3", "granite", "mixtral"]


def both_ways(norm: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """The output, and gradients of what enters and of the weight if that trains."""
    x = x.clone().requires_grad_()
    norm.zero_grad()
    output = norm(x)
    output.backward(gradient)
    of_weight = [] if norm.weight.grad is None else [norm.weight.grad.clone()]
    return [output.detach(), x.grad, *of_weight]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what was normed in one node."""
    return applied(monkeypatch, norms._RmsNorm, lambda x: x.shape)


@settings(max_examples=60, deadline=None)
@given(
    shape=some.sampled_from([(1, 1), (3, 5), (2, 3, 16), (2, 3, 4, 24), (1, 7, 577)]),
    size=some.sampled_from([1e-4, 1.0, 300.0]),
    mean=some.sampled_from([0.0, 2.0]),
    trains=some.booleans(),
    seed=some.integers(0, 99),
)
def test_as_near_to_the_exact_gradients_as_transformers(
    shape: tuple[int, ...], size: float, mean: float, trains: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).requires_grad_(trains)
    nn.init.uniform_(norm.weight, -1, 2)
    x, gradient = size * (torch.randn(shape) + mean), torch.randn(shape)
    own = both_ways(norm, x, gradient)
    with fused_norms(norm):
        found = both_ways(norm, x, gradient)
    exact = exactly(norm, x.double(), gradient.double())
    assert found[0].equal(own[0]) and len(found) == len(own) == 2 + trains
    for theirs, mine, ideal in zip(own[1:], found[1:], exact, strict=False):
        noise = 1e-6 * gradient.norm() / (size if ideal.shape == x.shape else 1)
        assert (mine - ideal).norm() <= 3 * (theirs - ideal).norm() + noise


def exactly(norm: Any, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Gradients in the precision of `x`."""
    weight = norm.weight.detach().to(x.dtype).requires_grad_()
    x.requires_grad_()
    (weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)).backward(gradient)
    return [each.grad for each in (x, weight) if each.grad is not None]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_every_layout_learns_the_same(name: str, half: bool, taken: list[torch.Size]) -> None:
    model = with_lora(make(name))
    inputs = inputs_for(model, labels=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss, expected = gradients(model, inputs)
        with fused_norms(model):
            again, found = gradients(model, inputs)
    assert loss.equal(again)
    joined = [torch.cat([each.flatten() for each in of.values()]) for of in (expected, found)]
    assert relative_difference(*joined) < (0.05 if half else 1e-4)
    assert bool(taken) or name not in WITH_LLAMAS


def test_which_norms_are_llamas() -> None:
    assert is_rms_norm(LlamaRMSNorm(4)) and is_rms_norm(Qwen3RMSNorm(4))
    assert not any(is_rms_norm(each) for each in (GemmaRMSNorm(4), nn.RMSNorm(4), nn.LayerNorm(4), nn.Linear(4, 4)))
    patched = LlamaRMSNorm(4)
    vars(patched)["forward"] = lambda x: x
    assert not is_rms_norm(patched)


def test_a_loaded_model_keeps_them_in_all_modes(tmp_path: Path, taken: list[torch.Size]) -> None:
    """transformers chooses kernels for the layers of loaded models, from 5.25 on again at each change of mode."""
    make("llama-gqa").save_pretrained(tmp_path)
    model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path))
    count = sum(isinstance(module, LlamaRMSNorm) for module in model.modules())
    batch = inputs_for(model, labels=True)
    with fused_norms(model.train()):
        for _ in range(2):
            model.eval()(**batch)
            model.train()
            taken.clear()
            model(**batch)
            assert len(taken) == count - 1, "what enters the first has no graph"
    model.eval().train()
    model(**batch)
    assert len(taken) == count - 1 and not any("forward" in vars(module) for module in model.modules())


def test_what_is_not_float32_or_does_not_train_is_left_alone(taken: list[torch.Size]) -> None:
    norm, x = LlamaRMSNorm(4).requires_grad_(False), torch.randn(2, 4)
    half = LlamaRMSNorm(4).bfloat16()
    with fused_norms(norm), fused_norms(half):
        norm(x)
        half(x.bfloat16().requires_grad_())
        norm(x.bfloat16().requires_grad_())
        with torch.no_grad():
            norm(x.clone().requires_grad_())
        assert not taken
        norm(x.clone().requires_grad_())
    assert len(taken) == 1 and "forward" not in vars(norm)


def test_results_are_made_again_and_not_kept() -> None:
    """As those of transformers' norms are."""
    model = with_lora(make("llama-gqa")).train()
    first, *normed, last = (module for module in model.modules() if isinstance(module, LlamaRMSNorm))
    assert first is not last, "what enters the first has no graph, and the last feeds the head"
    batch = inputs_for(model, labels=True)
    expected = gradients(model, batch)[1]
    watched = Watched(*normed)
    with fused_lora(model), fused_norms(model), recomputed_activations(model):
        loss = model(**batch).loss
        assert watched.alive() == 0
        model.zero_grad()
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(relative_difference(found[name], expected[name]) < 1e-4 for name in expected)
