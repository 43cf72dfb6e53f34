"""Several processes: one decision for all, and wrappers that learn of the parameters that a cut model has.

FSDP2 shards what is frozen, which is nearly all. What trains is small and whole in every process, as masks and scores
are: gradients are averaged as under DDP, checkpoints are those of one process, and any number goes on from them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from lightpeft.config import LightConfig
from lightpeft.errors import require
from lightpeft.models.linears import is_linear

T = TypeVar("T")


def agreed(value: T) -> T:
    """The value of the main process, in all: what they measured may differ in the last digit."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def rewrap(trainer: Any) -> None:
    """Let a trainer's wrapper for several processes, if there is one, know the parameters that the model has now.

    The training loop holds the wrapper itself, so it has to stay the same object.
    """
    wrapper = trainer.model_wrapped
    if not isinstance(wrapper, DistributedDataParallel):
        return
    fresh = DistributedDataParallel(
        wrapper.module,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        broadcast_buffers=wrapper.broadcast_buffers,
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
    )
    vars(wrapper).clear()
    vars(wrapper).update(vars(fresh))


# -- FSDP2 -----------------------------------------------------------------------------------------------------------


def asks_for_sharding(args: TrainingArguments) -> bool:
    """Whether training arguments, or the launcher in the environment, want FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shards(trainer: Any) -> bool:
    """Whether a trainer shards its model: FSDP."""
    return bool(trainer.is_fsdp_enabled)


def check_sharding(trainer: Any, light: LightConfig) -> None:
    """Refuse what cannot be done with a model that is sharded.

    Raises:
        LightPeftError: naming the setting, and what to set instead.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    require(plugin.fsdp_version == 2, "FSDP1 cannot follow a model that is cut on the way; set fsdp_version to 2")
    loading = "fsdp_cpu_ram_efficient_loading leaves all processes but one without weights to estimate on"
    require(not plugin.cpu_ram_efficient_loading, f"{loading}; set it to false")
    offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    require(not offloaded, "fsdp_offload_params keeps weights where they cannot be cut; set it to false")
    again = "fsdp_activation_checkpointing wraps the blocks that are cut"
    require(not plugin.activation_checkpointing, f"{again}; use gradient_checkpointing of the training arguments")
    probes = "light.blocks: auto probes copies of the model, which cannot be made of one that FSDP shards"
    require(light.blocks != "auto", f"{probes}; give light.blocks as a number")
    quantised = getattr(trainer.model, "is_quantized", False)
    require(not quantised, "a base in 4 or 8 bits cannot be cut where FSDP shards it; give it unquantised")


def replicate_what_trains(trainer: Any) -> None:
    """Keep FSDP from sharding what trains, and let all processes begin with the same values of it.

    Raises:
        LightPeftError: a module has weights that train and frozen ones, which FSDP would not shard then.
    """
    modules = [module for module in trainer.model.modules() if any(p.requires_grad for p in _own(module))]
    for module in modules:
        both = is_linear(module) and not all(p.requires_grad for p in _own(module))
        require(not both, 'LoRA bias="lora_only" trains biases of layers that FSDP shards; use bias="none"')
    trainer.accelerator.state.fsdp_plugin.ignored_modules = modules
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trainer.args.device)
            if dist.is_initialized():
                dist.broadcast(parameter.data, 0)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Gradients of what trains become their mean over all processes, as DDP makes it."""
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    if not gradients or not dist.is_initialized():
        return
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@contextmanager
def as_one_process_saves(trainer: Any) -> Iterator[None]:
    """Inside the block a trainer saves and loads as without FSDP: all that trains is whole in every process."""
    sharding = trainer.is_fsdp_enabled
    trainer.is_fsdp_enabled = False
    try:
        yield
    finally:
        trainer.is_fsdp_enabled = sharding
