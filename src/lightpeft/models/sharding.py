"""Sharded parameters (FSDP2): each process holds a part, and a gather needs all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 shards a model, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of a forward pass without a backward pass.

    Otherwise work of a single process on the model, such as saving it, gets it out of step with the others.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def without_graph(model: nn.Module) -> Iterator[None]:
    """Switch gradients off inside the block: by inference mode, or by `no_grad` for a sharded model."""
    sharded = is_sharded(model)
    # training reuses the buffers that FSDP2 gathers weights in, and cannot use tensors of inference mode
    with torch.no_grad() if sharded else torch.inference_mode():
        yield
    if sharded:
        reshard(model)


def whole(tensor: Tensor) -> Tensor:
    """Return the values of a tensor without gradients; a sharded one is gathered, for which all processes must call."""
    values = tensor.detach()
    return values.full_tensor() if isinstance(values, DTensor) else values


def placed_like(values: Tensor, other: Tensor) -> Tensor:
    """Shard values that all processes have like another tensor; return them unchanged if that is not sharded."""
    if not isinstance(other, DTensor):
        return values
    parts = distribute_tensor(values, other.device_mesh, other.placements, src_data_rank=None)
    local = parts.to_local().clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local, other.device_mesh, other.placements, run_check=False, shape=parts.shape, stride=parts.stride()
    )
