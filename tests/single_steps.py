"""Single training steps: their gradients, and what watches them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lights import light_of
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from tiny import LAYOUTS, inputs_for
from torch import Tensor, nn

from lightpeft import EarlyPruner

LINEAR = [name for name in LAYOUTS if name not in ("gpt2", "falcon")]
"""Layouts whose projections are plain `nn.Linear`; those of GPT-2 (`Conv1D`) and Falcon are left to PEFT."""


def gradients(model: nn.Module, inputs: dict[str, Tensor], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and the gradient of every trained parameter, with the same random numbers each time."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def applied(monkeypatch: pytest.MonkeyPatch, function: Any, what: Callable[[Tensor], Any]) -> list[Any]:
    """What can be said of the first tensor of each call of a function of the autograd graph, from now on."""
    seen: list[Any] = []
    apply = function.apply

    def counted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(what(x))
        return apply(x, *rest)

    monkeypatch.setattr(function, "apply", counted)
    return seen


def count_layers(model: PeftModel) -> int:
    return sum(isinstance(layer, LoraLayer) for layer in model.modules())


def watch(model: PeftModel, part: str) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            watched = layer.get_base_layer() if part == "base_layer" else getattr(layer, part)["default"]
            watched.register_forward_hook(lambda *_: None)


def two_adapters(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=model.peft_config["default"].target_modules))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(["default", "other"])


def mix(model: PeftModel) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.double()
            layer.lora_B.double()


class Watched:
    """Which of the outputs of some modules are in memory still."""

    def __init__(self, *modules: nn.Module) -> None:
        self._refs: list[weakref.ref[Tensor]] = []
        self._handles = [module.register_forward_hook(self._see) for module in modules]

    def _see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._refs.append(weakref.ref(output))

    def alive(self) -> int:
        for handle in self._handles:
            handle.remove()
        return sum(ref() is not None for ref in self._refs)


HALF = {"heads": 0.5, "neurons": 0.5, "modules": 0.5, "ranks": 0.5}


def stage(model: PeftModel, total_steps: int = 4, **config: float | str | bool) -> EarlyPruner:
    """The loop of `EarlyPruner`'s docstring."""
    pruner = EarlyPruner(model, light_of(**{"length": 4, **HALF, **config}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pruner.start(total_steps)
    while not pruner.finished:
        model(**inputs_for(model, labels=True, rows=4)).loss.backward()
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()
    return pruner


def losses(model: PeftModel, steps: int = 8) -> list[float]:
    """Train on with a new optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(steps):
        loss = model(**inputs_for(model, labels=True, rows=4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values
