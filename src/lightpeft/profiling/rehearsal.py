"""Memory and FLOPs of training, predicted by a rehearsal with tensors that have no storage.

The rehearsal runs the steps of the real model, optimizer and autocast; nothing is loaded, allocated or computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.compat.stand_ins import StorageWatch
from lightpeft.compat.torch import set_unseen
from lightpeft.profiling.flops import flop_counter
from lightpeft.profiling.live import device_of, trainable
from lightpeft.profiling.speed import OptimizerFactory, measure_inference, measure_training

BatchShapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Input of the model -> shape and data type of a batch."""
# Fitted to the measurements of benchmarks/needs.py with three models in bfloat16 (benchmarks/needs.json).
_LIBRARIES = 40 * 2**20
"""Bytes that PyTorch's CPU kernels take when they are first used."""
_KERNEL, _MOST_KERNELS = 200 * 2**10, 1024
"""Bytes of a kernel, and the number of kernels in the cache: oneDNN compiles one for each shape of a product in half
precision."""
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
_GAPS = 0.15
"""Fraction of the activations' memory that is lost to gaps in the heap."""


@dataclass(frozen=True)
class Holding:
    """Predicted peak memory of a step by its parts in bytes, and FLOPs of the step."""

    weights: int
    """Bytes of frozen weights."""
    trained: int
    """Bytes of trainable weights and their optimizer state."""
    activations: int
    """Bytes of all other tensors: saved activations, gradients, and temporary ones."""
    overhead: int
    """Bytes of kernels' code and buffers, and of gaps between tensors; 0 on a GPU, where it is not predicted."""
    flops: int
    """Floating-point operations of one step."""

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch: frozen and trainable weights, and the optimizer state."""
        return self.weights + self.trained

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.weights + self.trained + self.activations + self.overhead


@contextmanager
def rehearsing(model: nn.Module, device: torch.device | str, share: float = 1.0) -> Iterator[StorageWatch]:
    """Pretend inside the block that a model on the meta device is on `device`; nothing is computed.

    Args:
        share: fraction of the tokens that have a label.
    """
    with StorageWatch(share, flop_counter().flop_registry) as watch, torch.device(device):
        _place_model(model, device, watch)
        yield watch


def rehearse_training(
    model: nn.Module,
    watch: StorageWatch,
    shapes: BatchShapes,
    optimizer: OptimizerFactory,
    around: AbstractContextManager[Any],
    lengths: int = 1,
    **options: Any,
) -> Holding:
    """Predict memory and FLOPs of a training step; call it inside `rehearsing`.

    Args:
        shapes: shapes and types of a batch with labels.
        around: context in which the step runs.
        lengths: number of different lengths of batches, each of which needs kernels of its own.
        options: arguments of `measure_training`.
    """
    batch, made = _make_batch(shapes, watch), optimizer(trainable(model))
    _reset_counters(watch)
    with around:
        measure_training(model, [batch], lambda _: made, steps=1, warmup=0, **options)
    peak = watch.peak
    # the first step ends with it; all others begin with it
    state = _bytes(each for of in made.state.values() for each in of.values() if isinstance(each, Tensor))
    return _split_peak(model, watch, peak + state, state, lengths)


def rehearse_inference(
    model: nn.Module, watch: StorageWatch, shapes: BatchShapes, autocast: torch.dtype | None
) -> Holding:
    """Predict memory and FLOPs of a forward pass in evaluation; call it inside `rehearsing`."""
    batch = _make_batch(shapes, watch)
    _reset_counters(watch)
    measure_inference(model, [batch], steps=1, warmup=0, autocast=autocast)
    return _split_peak(model, watch, watch.peak, 0, 1)


def _reset_counters(watch: StorageWatch) -> None:
    """Reset the peak and the counters of a watch."""
    watch.peak, watch.flops = watch.now, 0
    watch.calls.clear()


def _split_peak(model: nn.Module, watch: StorageWatch, peak: int, state: int, lengths: int) -> Holding:
    """Split a peak into its parts.

    Args:
        state: bytes of the optimizer state.
        lengths: number of different lengths of batches.
    """
    trains = _bytes(trainable(model))
    weights, trained = _bytes([*model.parameters(), *model.buffers()]) - trains, trains + state
    activations = max(0, peak - weights - trained)
    overhead = _predict_overhead(watch, activations, lengths) if device_of(model).type == "cpu" else 0
    return Holding(weights, trained, activations, overhead, watch.flops)


def _predict_overhead(watch: StorageWatch, activations: int, lengths: int) -> int:
    """Predict the overhead on a CPU in bytes."""
    half = (torch.bfloat16, torch.float16)
    compiled = sum(call[0] in _PRODUCTS and call[1][-1] in half for call in watch.calls)
    return _LIBRARIES + min(compiled * lengths, _MOST_KERNELS) * _KERNEL + int(_GAPS * activations)


def _make_batch(shapes: BatchShapes, watch: StorageWatch) -> dict[str, Tensor]:
    return {name: watch.counted(torch.zeros(shape, dtype=dtype)) for name, (shape, dtype) in shapes.items()}


def _bytes(tensors: Iterable[Tensor]) -> int:
    held = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def _place_model(model: nn.Module, device: torch.device | str, watch: StorageWatch) -> None:
    """Give every tensor of the model on the meta device a stand-in; tensors that are tied stay so."""
    placed: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in placed:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            watch.counted(new)
            is_parameter = isinstance(tensor, nn.Parameter)
            placed[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return placed[id(tensor)]

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            set_unseen(module, name, stand_in(parameter))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, stand_in(buffer))
