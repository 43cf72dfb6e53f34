"""LoRA beside the weights of a model that answers: what PEFT gives, in fewer steps, and nothing is left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from single_steps import LINEAR, count_layers, mix, two_adapters, watch
from tiny import GENERATORS, LAYOUTS, inputs_for, make, relative_difference, with_lora, without_dropout
from torch import Tensor, nn

from lightpeft import fused_inference
from lightpeft.peft_kinds.sites import inference

RANKS = {"rank 1": {"r": 1, "lora_alpha": 3}, "rank 3": {"r": 3, "lora_alpha": 7}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Data types of the inputs of the layers that were computed in few steps."""
    seen: list[torch.dtype] = []
    inner = inference._Inner.of

    def counted(self: Any, x: Tensor, dtype: torch.dtype, place: int) -> Any:
        seen.append(dtype)
        return inner(self, x, dtype, place)

    monkeypatch.setattr(inference._Inner, "of", counted)
    return seen


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    values: Tensor = model(**inputs).logits
    return values


@pytest.mark.parametrize("settings", RANKS.values(), ids=RANKS.keys())
@pytest.mark.parametrize("name", LINEAR)
def test_answers_are_those_of_peft(name: str, settings: dict[str, Any], calls: list[torch.dtype]) -> None:
    model = with_lora(make(name), **settings)
    inputs = inputs_for(model)
    with torch.no_grad():
        expected = logits(model, inputs)
        with fused_inference(model):
            found = logits(model, inputs)
            with torch.inference_mode():
                assert logits(model, inputs).equal(found)
        assert len(calls) == 2 * count_layers(model) > 0
        assert relative_difference(found, expected) < 1e-5
        with model.disable_adapter():
            assert relative_difference(found, logits(model, inputs)) > 1e-3


def two_layers(size: int, **settings: Any) -> tuple[PeftModel, nn.Module, nn.Module]:
    """A model of two layers side by side with LoRA on them, and both."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(size, size) for name in ("query", "key")})
    config = LoraConfig(target_modules=["query", "key"], init_lora_weights=False, **settings)
    model = get_peft_model(layers, config).eval()
    return model, model.base_model.model["query"], model.base_model.model["key"]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("settings", RANKS.values(), ids=RANKS.keys())
def test_half_precision(autocast: bool, settings: dict[str, Any], calls: list[torch.dtype]) -> None:
    """Nearer to what float32 gives than PEFT is, which rounds a layer's parts before it adds them."""
    model, query, key = two_layers(64, **settings)
    x = torch.randn(200, 64)
    with torch.no_grad():
        exact = torch.stack([query(x), key(x)])
        if not autocast:
            model.to(torch.bfloat16)
            x = x.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            peft = torch.stack([query(x), key(x)])
            with fused_inference(model):
                found = torch.stack([query(x), key(x)])
    assert calls == [torch.bfloat16] * 2 and found.dtype == peft.dtype
    assert (found.float() - exact).norm() <= (peft.float() - exact).norm()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name in GENERATORS])
def test_writes_what_peft_writes(name: str) -> None:
    model = with_lora(make(name))
    inputs = inputs_for(model, "left", generate=True)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    with fused_inference(model):
        assert model.generate(**inputs, **settings).equal(expected)


def left_to_peft(model: PeftModel, change: Callable[[PeftModel], Any]) -> bool:
    """Whether a model gives inside a block what it gives outside, to the last bit, when it was changed inside."""
    inputs = inputs_for(model)
    with torch.no_grad():
        with fused_inference(model):
            change(model)
            found = logits(model, inputs)
        return found.equal(logits(model, inputs))


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        pytest.param(None, {"use_dora": True}, id="DoRA"),
        pytest.param(None, {"lora_bias": True}, id="bias of B"),
        pytest.param(lambda model: watch(model, "base_layer"), {}, id="watched base layer"),
        pytest.param(lambda model: watch(model, "lora_B"), {}, id="watched B"),
        pytest.param(lambda model: two_adapters(model), {}, id="two adapters"),
        pytest.param(lambda model: mix(model), {}, id="two data types"),
    ],
)
def test_what_has_more_to_it_is_left_to_peft(
    change: Callable[[PeftModel], Any] | None, settings: dict[str, Any], calls: list[torch.dtype]
) -> None:
    model = with_lora(make("bert"), **settings)
    if change is not None:
        change(model)
    assert left_to_peft(model, lambda model: None) and not calls


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: model.base_model.disable_adapter_layers(), id="disabled"),
        pytest.param(lambda model: model.merge_adapter(), id="merged"),
        pytest.param(lambda model: two_adapters(model), id="two adapters"),
        pytest.param(lambda model: without_dropout(model.train()), id="training"),
    ],
)
def test_a_model_may_be_switched_inside(change: Callable[[PeftModel], Any], calls: list[torch.dtype]) -> None:
    assert left_to_peft(with_lora(make("bert")), change) and not calls


def test_gradients_are_left_to_peft(calls: list[torch.dtype]) -> None:
    model = with_lora(make("bert"))
    inputs = inputs_for(model)
    expected = logits(model, inputs)
    with fused_inference(model):
        found = logits(model, inputs)
    assert found.equal(expected) and found.requires_grad and not calls


@pytest.mark.parametrize("autocast", [True, False])
def test_an_input_that_has_changed_is_another(autocast: bool) -> None:
    """Queries and keys may be asked for one tensor, and it may have been written to in between."""
    model, query, key = two_layers(8, r=2)

    def asked() -> Tensor:
        x = torch.ones(3, 8)
        first = query(x)
        return torch.stack([first, key(x.mul_(2)), query(x + 1)])

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = asked()
        with fused_inference(model):
            assert relative_difference(asked().float(), expected.float()) < (0.02 if autocast else 1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_nothing_is_left(autocast: bool) -> None:
    """Neither of the block nor, behind a pass, of what went through the layers."""
    model = with_lora(make("bert"))
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    seen: list[weakref.ref[Tensor]] = []
    query = next(module for name, module in model.named_modules() if name.endswith("layer.1.attention.self"))
    query.register_forward_pre_hook(lambda module, given: seen.append(weakref.ref(given[0])))
    gc.disable()
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), fused_inference(model):
            logits(model, inputs_for(model))
            assert seen and all(reference() is None for reference in seen)
    finally:
        gc.enable()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_threads_ask_one_model() -> None:
    model = with_lora(make("llama-gqa"))
    batches = [inputs_for(model, rows=rows, length=4 + rows) for rows in (1, 2, 3, 4)]
    with torch.no_grad():
        expected = [logits(model, batch) for batch in batches]
    wrong: list[int] = []

    def ask(place: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if relative_difference(logits(model, batches[place]), expected[place]) > 1e-5:
                    wrong.append(place)

    with fused_inference(model):
        threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
