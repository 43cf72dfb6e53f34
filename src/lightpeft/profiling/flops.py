"""Floating-point operations of a batch, and bytes of the KV cache for a token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightpeft.compat.torch import attention_of_cpus, grouped_product
from lightpeft.compat.transformers import attention_of
from lightpeft.machine import preserve_random_state
from lightpeft.models.batches import without_labels
from lightpeft.models.patching import in_mode
from lightpeft.models.unwrap import transformers_model
from lightpeft.profiling.live import Batch, device_of, loss_of, move_batch, trainable


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one batch; a multiply-add is 2."""

    forward: int
    """Operations of the forward pass, as in inference."""
    training: int | None
    """Operations of the forward and the backward pass; None where no parameter requires a gradient."""

    @property
    def backward(self) -> int | None:
        """Operations of the backward pass alone; None where no parameter requires a gradient."""
        return None if self.training is None else self.training - self.forward


def count_flops(model: nn.Module, batch: Batch) -> Flops:
    """Count the FLOPs of the matrix products of one forward pass, and of one forward and backward pass, over `batch`.

    PyTorch's `FlopCounterMode` does the counting, so frozen weights cost no weight-gradient product, and padding counts
    like tokens. It does not know the fused attention kernel of the CPU, and counts a recomputation in those of CUDA;
    therefore attention runs unfused here, with full (not halved) score matrices under a causal mask, and experts one
    after the other. Thus the numbers depend neither on the device nor on the backends. Recomputation under gradient
    checkpointing is counted. Weights, gradients, mode and random state do not change.

    Raises:
        LightPeftError: parameters require a gradient, but the model returns no loss for the batch.
    """
    batch = move_batch(batch, device_of(model))
    with _countable_attention(model), _countable_experts(model):
        with in_mode(model, training=False), torch.no_grad(), flop_counter() as counter:
            model(**batch)
        forward = counter.get_total_flops()
        if not trainable(model):
            return Flops(forward, None)
        counter = flop_counter()
        with in_mode(model, training=True), _kept_gradients(model), preserve_random_state(device_of(model)), counter:
            torch.autograd.backward(loss_of(model, batch))
        return Flops(forward, counter.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """Return a FLOP counter that also knows in-place and grouped matrix products, and attention on CPUs.

    Attention on CPUs counts with full (not halved) score matrices, and without recomputation in the backward pass.
    """

    def addmm_(_: torch.Size, left: torch.Size, right: torch.Size, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        rows, heads, length, channels = query
        return 2 * rows * heads * length * key[2] * (channels + value[3])

    def attention_backward(_: torch.Size, *shapes: Any, **__: Any) -> int:
        return 2 * attention(*shapes)

    def grouped(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[-1]

    forward, backward = attention_of_cpus()
    known = {
        torch.ops.aten.addmm_: addmm_,
        grouped_product(): grouped,
        forward: attention,
        backward: attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def kv_cache_bytes(model: nn.Module, batch: Batch) -> float | None:
    """Compute the bytes of keys and values that the KV cache keeps for a token, over all layers.

    A layer that lost its attention still caches one channel of zeros for each token.

    Returns:
        None for a model without a KV cache.
    """
    batch = move_batch(without_labels(batch), device_of(model))
    with in_mode(model, training=False), torch.no_grad():
        cache = getattr(model(**batch), "past_key_values", None)
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if not layers:
        return None
    kept = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))
    rows, _, tokens, _ = layers[0].keys.shape
    return kept / (rows * tokens)


@contextlib.contextmanager
def _countable_attention(model: nn.Module) -> Iterator[None]:
    """Run attention as plain matrix products inside the block; backends other than eager and SDPA switch to SDPA."""
    base: Any = transformers_model(model)
    backend = attention_of(getattr(base, "config", None))
    switch = backend not in (None, "eager", "sdpa")
    if switch:
        base.set_attn_implementation("sdpa")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if switch:
            base.set_attn_implementation(backend)


@contextlib.contextmanager
def _countable_experts(model: nn.Module) -> Iterator[None]:
    """Run experts as plain matrix products inside the block, because the counter does not know grouped ones."""
    base: Any = transformers_model(model)
    if not any(getattr(getattr(module, "down_proj", None), "ndim", 0) == 3 for module in base.modules()):
        yield
        return
    before = base.get_experts_implementation()
    base.set_experts_implementation("eager")
    try:
        yield
    finally:
        base.set_experts_implementation(before)


@contextlib.contextmanager
def _kept_gradients(model: nn.Module) -> Iterator[None]:
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
