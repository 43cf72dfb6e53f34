"""What training would hold in memory and compute, found by going through it with tensors that have no storage.

The steps are the real ones, of the real model, optimizer and autocast; nothing is loaded, allocated or computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.compat.stand_ins import StorageWatch
from lightpeft.compat.torch import set_without_hooks
from lightpeft.profiling.flops import flop_counter
from lightpeft.profiling.live import device_of, trainable
from lightpeft.profiling.speed import OptimizerFactory, measure_inference, measure_training

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Of a batch: input of the model -> shape and type."""
# Fitted to what benchmarks/needs.py measures of three models in bfloat16 (benchmarks/needs.json).
_LIBRARIES = 40 * 2**20
"""Bytes that PyTorch's kernels for CPUs take when they are first used."""
_KERNEL, _MOST_KERNELS = 200 * 2**10, 1024
"""oneDNN compiles a kernel for each shape of a product in half precision: bytes of one, and how many it keeps."""
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
_GAPS = 0.15
"""The part of the activations that lies idle between them in the heap."""


@dataclass(frozen=True)
class Holding:
    """What is in memory at the peak of a piece of work, in bytes."""

    weights: int
    """Frozen ones."""
    trained: int
    """Weights that train, and what the optimizer keeps of them."""
    activations: int
    """All else: what the backward pass needs, gradients, and what comes and goes."""
    overhead: int
    """What is not the model's: code and buffers of kernels, and gaps between tensors. On a GPU nothing is known of it
    here."""
    flops: int
    """Floating-point operations of one step."""

    @property
    def fixed(self) -> int:
        """What no other batch makes smaller."""
        return self.weights + self.trained

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.trained + self.activations + self.overhead


@contextmanager
def rehearsing(model: nn.Module, device: torch.device | str, share: float = 1.0) -> Iterator[StorageWatch]:
    """Inside the block, a model that was made on the meta device stands on another one, and nothing is computed.

    Args:
        share: part of the tokens that have a label.
    """
    with StorageWatch(share, flop_counter().flop_registry) as watch, torch.device(device):
        _place(model, device, watch)
        yield watch


def rehearse_training(
    model: nn.Module,
    watch: StorageWatch,
    shapes: Shapes,
    optimizer: OptimizerFactory,
    around: AbstractContextManager[Any],
    lengths: int = 1,
    **options: Any,
) -> Holding:
    """Go through a training step inside `rehearsing`.

    Args:
        shapes: of a batch with labels.
        around: what it runs in.
        lengths: how many lengths the rows of batches have, each with kernels of its own.
        options: of `measure_training`.
    """
    batch, made = _batch(shapes, watch), optimizer(trainable(model))
    _begin(watch)
    with around:
        measure_training(model, [batch], lambda _: made, steps=1, warmup=0, **options)
    peak = watch.peak
    # the first step ends with it; all others begin with it
    state = _bytes(each for of in made.state.values() for each in of.values() if isinstance(each, Tensor))
    return _holding(model, watch, peak + state, state, lengths)


def rehearse_inference(model: nn.Module, watch: StorageWatch, shapes: Shapes, autocast: torch.dtype | None) -> Holding:
    """Go through a forward pass of evaluation inside `rehearsing`; nothing trains, whatever may."""
    batch = _batch(shapes, watch)
    _begin(watch)
    measure_inference(model, [batch], steps=1, warmup=0, autocast=autocast)
    return _holding(model, watch, watch.peak, 0, 1)


def _begin(watch: StorageWatch) -> None:
    """All that is counted counts from now on."""
    watch.peak, watch.flops = watch.now, 0
    watch.calls.clear()


def _holding(model: nn.Module, watch: StorageWatch, peak: int, state: int, lengths: int) -> Holding:
    """
    Args:
        state: bytes of the optimizer's.
        lengths: as for `rehearse_training`.
    """
    trains = _bytes(trainable(model))
    weights, trained = _bytes([*model.parameters(), *model.buffers()]) - trains, trains + state
    activations = max(0, peak - weights - trained)
    overhead = _overhead(watch, activations, lengths) if device_of(model).type == "cpu" else 0
    return Holding(weights, trained, activations, overhead, watch.flops)


def _overhead(watch: StorageWatch, activations: int, lengths: int) -> int:
    """On a CPU, in bytes."""
    half = (torch.bfloat16, torch.float16)
    compiled = sum(call[0] in _PRODUCTS and call[1][-1] in half for call in watch.calls)
    return _LIBRARIES + min(compiled * lengths, _MOST_KERNELS) * _KERNEL + int(_GAPS * activations)


def _batch(shapes: Shapes, watch: StorageWatch) -> dict[str, Tensor]:
    return {name: watch.count_storage(torch.zeros(shape, dtype=dtype)) for name, (shape, dtype) in shapes.items()}


def _bytes(tensors: Iterable[Tensor]) -> int:
    held = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def _place(model: nn.Module, device: torch.device | str, watch: StorageWatch) -> None:
    """Give every tensor of the model on the meta device a stand-in; tensors that are tied stay so."""
    placed: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in placed:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            watch.count_storage(new)
            is_parameter = isinstance(tensor, nn.Parameter)
            placed[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return placed[id(tensor)]

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            set_without_hooks(module, name, stand_in(parameter))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, stand_in(buffer))
