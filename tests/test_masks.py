"""Masks: what they compute, what their gradients are, and that nothing of them stays behind."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from lanes import telling
from lights import light_of
from peft import PeftModel
from tiny import LAYOUTS, MODELS, every_family, inputs_for, make, with_lora
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import estimate, inputs, student

from lightpeft.models.families.family_table import block_specs
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.fused import fused_lora
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.masks import UnitMasks


def masks_on(model: PeftModel) -> UnitMasks:
    masks = UnitMasks(block_specs(transformers_model(model)))
    masks.attach(model)
    return masks


@every_family(MODELS)
def test_masks_of_one_change_nothing(name: str) -> None:
    model = with_lora(make(name))
    before = model(**inputs_for(model)).logits
    masks_on(model)
    assert model(**inputs_for(model)).logits.equal(before)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama-gqa", "llama-mqa", "opt", "vit"])
def test_a_head_mask_scales_what_the_head_adds(name: str) -> None:
    """`attn(x) = sum_i m[i] * head_i(x) W_O[i]`: scaling the columns of W_O and A does the same."""
    model = with_lora(make(name))
    masks = masks_on(model)
    factors = torch.tensor([0.5, 0.0, 1.0, -2.0])
    with torch.no_grad():
        masks.heads[1].copy_(factors)
    masked = model(**inputs_for(model)).logits
    masks.detach()
    spec = masks.blocks[1]
    layer = transformers_model(model).get_submodule(spec.projections["o"])
    with torch.no_grad():
        for weight in (layer.get_base_layer().weight, layer.lora_A["default"].weight):
            weight.mul_(factors.repeat_interleave(spec.head_dim))
    torch.testing.assert_close(model(**inputs_for(model)).logits, masked, rtol=1e-4, atol=1e-5)


class PlainMasks:
    """The masks as autograd alone would have them."""

    def __init__(self, like: UnitMasks, model: PeftModel) -> None:
        self.leaves = [leaf.detach().clone().requires_grad_() for leaf in (*like.heads, *like.neurons)]
        self.handles = []
        for index, block in enumerate(like.blocks):
            for slot, leaf in (("o", self.leaves[index]), ("ffn_out", self.leaves[len(like.blocks) + index])):
                if slot in block.projections:
                    layer = transformers_model(model).get_submodule(block.projections[slot])
                    self.handles.append(layer.register_forward_pre_hook(partial(self.scale, leaf)))

    @staticmethod
    def scale(mask: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].unflatten(-1, (len(mask), -1))
        return (x * mask.to(x).unsqueeze(-1)).flatten(-2), *args[1:]

    def take_gradients(self) -> Tensor:
        for handle in self.handles:
            handle.remove()
        return torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves])


@pytest.mark.parametrize("name", LAYOUTS)
@telling(("bf16", "fused"), product([False, True], repeat=2), [(False, False), (True, True)])
def test_gradients_equal_plain_autograd(name: str, bf16: bool, fused: bool) -> None:
    """What is computed again in the backward pass gives weights the very gradient that a saved one gives."""
    model, data = student(name), inputs(name)

    def gradients(masks: UnitMasks | PlainMasks) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), fused_lora(model) if fused else nullcontext():
            loss = model(**data).loss
        loss.backward()
        taken = masks.take_gradients()
        of_masks = taken if isinstance(taken, Tensor) else taken.mean
        return [of_masks, *(p.grad for p in model.parameters() if p.grad is not None)]

    masks = masks_on(model)
    with torch.no_grad():
        masks.values.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    (of_masks, *weights) = gradients(masks)
    masks.detach()
    (plain_of_masks, *plain_weights) = gradients(PlainMasks(masks, model))
    assert of_masks.abs().max() > 0
    tolerance = 0.05 if bf16 else 1e-4
    torch.testing.assert_close(of_masks, plain_of_masks, rtol=tolerance, atol=tolerance * float(of_masks.abs().max()))
    assert all(a.equal(b) for a, b in zip(weights, plain_weights, strict=True))


class Live(TorchDispatchMode):
    """Bytes of all tensors that were made inside the block and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return output

    @property
    def bytes(self) -> int:
        return sum(size for storage, size in self.made.items() if not storage.expired())


@pytest.mark.parametrize("name", LAYOUTS)
@telling(("fused", "lora_dropout"), product([False, True], [0.0, 0.05]), [(True, 0.0), (False, 0.05)])
def test_masks_keep_no_activation(name: str, fused: bool, lora_dropout: float) -> None:
    """LoRA without dropout keeps the inputs of the output projections; masks compute them again instead.

    With dropout LoRA keeps copies, which nobody can compute again; masks add, at most, the input of attention's output.
    """
    model, data = student(name, lora_dropout=lora_dropout), inputs(name)

    def kept() -> int:
        with Live() as live, fused_lora(model) if fused else nullcontext():
            output = model(**data)
            gc.collect()
            assert output.loss.requires_grad
            return live.bytes

    plain = kept()
    masks = masks_on(model)
    attention_inputs: list[int] = []
    for block in masks.blocks:
        output = transformers_model(model).get_submodule(block.projections["o"])
        output.register_forward_hook(lambda module, args, out: attention_inputs.append(4 * args[0].numel()))
    kept()  # learns whether activations can be computed again
    attention_inputs.clear()
    added, of_masks = kept() - plain, 4 * len(masks.values)
    if lora_dropout:
        assert added <= sum(attention_inputs) + of_masks
    elif {block.activation for block in masks.blocks} == {"relu"}:
        assert added <= of_masks
    else:
        assert added < 0


def test_base_weights_get_no_gradient() -> None:
    model = student()
    estimate(model)
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in name or "classifier" in name for name in with_gradient)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base_layer" in name)


def start() -> Estimator:
    estimator = Estimator(student(), light_of(length=20, mask_learning_rate=0.01))
    estimator.start(total_steps=None)
    return estimator


def test_masks_follow_the_task_gradient_plus_l1(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step equals one step of Adam on the sum of both gradients."""
    monkeypatch.setattr("lightpeft.prune.estimation.MASK_PENALTY", 1e-2)
    estimator = start()
    estimator.model(**inputs()).loss.backward()
    heads = [leaf.grad + 1e-2 for leaf in estimator.masks.heads]
    neurons = [leaf.grad + 1e-2 for leaf in estimator.masks.neurons]
    reference = torch.ones_like(estimator.masks.values)
    reference.grad = torch.cat([*heads, *neurons])
    torch.optim.Adam([reference], lr=0.01).step()
    estimator.step()
    assert estimator.masks.values.equal(reference)
    assert torch.cat([*estimator.masks.heads, *estimator.masks.neurons]).equal(reference)


def test_products_beyond_the_range_of_float16() -> None:
    """A scaled loss's gradients and the activations are in the range, and what they give multiplied is not."""
    model = student().half()
    masks = masks_on(model)
    block = masks.blocks[0]
    projection = transformers_model(model).get_submodule(block.projections["o"])
    x = torch.full((1, 2, block.heads * block.head_dim), 1e3, dtype=torch.float16, requires_grad=True)
    output = projection(x)
    output.backward(torch.full_like(output, 1e4))
    assert x.grad is not None and x.grad.isfinite().all()
    assert (x.grad.abs() * 1e3).gt(torch.finfo(torch.float16).max).any()
    expected = (x.grad.float() * 1e3).sum((0, 1)).unflatten(0, (block.heads, -1)).sum(-1)
    assert masks.heads[0].grad is not None
    torch.testing.assert_close(masks.heads[0].grad, expected, rtol=1e-3, atol=1e3)
