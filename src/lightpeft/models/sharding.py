"""Parameters that processes share (FSDP2): each holds a part, and all have to ask for the whole at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards a model, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass has put together and no backward pass has let go of.

    Otherwise what one process alone does to the model, such as saving it, puts it out of step with the others.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def without_graph(model: nn.Module) -> Iterator[None]:
    """Inside the block a model answers without a graph: in inference mode, unless it is sharded."""
    sharded = is_sharded(model)
    # the memory that FSDP2 gathers weights in is used in training, too, which takes no tensors of inference mode
    with torch.no_grad() if sharded else torch.inference_mode():
        yield
    if sharded:
        reshard(model)


def whole(tensor: Tensor) -> Tensor:
    """The values, or what all processes hold of them, put together; where it is sharded, all have to call this."""
    values = tensor.detach()
    return values.full_tensor() if isinstance(values, DTensor) else values


def placed_like(values: Tensor, other: Tensor) -> Tensor:
    """Values that all processes have: as they are or, beside a sharded tensor, a part in each, which is a copy."""
    if not isinstance(other, DTensor):
        return values
    parts = distribute_tensor(values, other.device_mesh, other.placements, src_data_rank=None)
    local = parts.to_local().clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local, other.device_mesh, other.placements, run_check=False, shape=parts.shape, stride=parts.stride()
    )
