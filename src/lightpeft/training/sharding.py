"""Any trainer of a PeftModel under FSDP2, with checkpoints of one process, from which any number goes on.

FSDP2 shards what is frozen, nearly all; what trains is whole everywhere, small as masks and scores are, and its
gradients are averaged as under DDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from lightpeft.errors import require
from lightpeft.machine import autocasting, sharding_launched
from lightpeft.models.families.registry import block_lists
from lightpeft.models.patching import override_forward
from lightpeft.models.sharding import is_sharded, reshard
from lightpeft.models.unwrap import transformers_model
from lightpeft.training.arguments import half_precision
from lightpeft.training.host import Host


class Sharding:
    """What FSDP2 asks of training and of checkpoints, where it shards a trainer's model."""

    def __init__(self, trainer: Host) -> None:
        self._trainer = trainer

    @property
    def fsdp(self) -> bool:
        """Whether FSDP shards the model while it trains."""
        return getattr(self._trainer.accelerator.state, "fsdp_plugin", None) is not None

    @property
    def _half(self) -> torch.dtype | None:
        """The half precision that FSDP shards in."""
        return half_precision(self._trainer.args) if self.fsdp else None

    def check(self) -> None:
        """Refuse sharding that is asked for where it cannot be had, or in such a way.

        Raises:
            LightPeftError: saying what to set instead.
        """
        if self.fsdp:
            _check_plugin(self._trainer.accelerator.state.fsdp_plugin)
        else:
            asked = bool(self._trainer.args.fsdp) or sharding_launched()
            require(not asked, "accelerate shards over accelerators alone, and not over CPUs; train without fsdp here")

    def before(self, checkpoint: str | None) -> None:
        """Get the model ready to be sharded where training begins; every process still has all of it.

        Args:
            checkpoint: to go on from; its weights are loaded here.

        Raises:
            LightPeftError: nothing is frozen, or a layer has both weights that train and frozen ones.
        """
        trainer = self._trainer
        if not self.fsdp or is_sharded(trainer.model):
            return
        if checkpoint is not None:
            trainer._load_from_checkpoint(checkpoint)
        trains, plugin = list(_trains(trainer.model)), trainer.accelerator.state.fsdp_plugin
        plugin.ignored_modules = trains
        if plugin.transformer_cls_names_to_wrap is None:  # else embeddings of some, which accelerate shards apart
            plugin.transformer_cls_names_to_wrap = _blocks(trainer.model)
        for parameter in (p for module in trains for p in _own(module)):
            parameter.data = parameter.data.to(trainer.args.device)
            dist.broadcast(parameter.data, 0)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Inside the block the model, called by itself, computes in the precision in which it is sharded."""
        trainer = self._trainer
        usual = trainer.model.forward

        def forward(*args: Any, **options: Any) -> Any:
            with trainer.autocast_smart_context_manager():
                return usual(*args, **options)

        with nullcontext() if self._half is None else override_forward(trainer.model, forward):
            yield

    # -- what the trainer's methods hand on ----------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any] | None:
        """Under FSDP, autocast: half precision is for what it shards, and what trains is not; None: the trainer's."""
        return None if self._half is None else autocasting(self._trainer.args.device, self._half)

    def average(self) -> None:
        """Behind the last backward pass of a step, let gradients of what FSDP does not shard be those of all."""
        if self.fsdp and self._trainer.accelerator.sync_gradients:
            _average_gradients(self._trainer.model)

    @contextmanager
    def as_one_process(self) -> Iterator[None]:
        """Inside the block the trainer saves and loads as without FSDP."""
        trainer = self._trainer
        reshard(trainer.model)
        enabled, trainer.is_fsdp_enabled = trainer.is_fsdp_enabled, False
        try:
            yield
        finally:
            trainer.is_fsdp_enabled = enabled


def _check_plugin(plugin: Any) -> None:
    require(plugin.fsdp_version == 2, "FSDP1 cannot leave out of the shards what trains; set fsdp_version to 2")
    loading = "fsdp_cpu_ram_efficient_loading leaves all processes but one without weights"
    require(not plugin.cpu_ram_efficient_loading, f"{loading}; set it to false")
    offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    require(
        not offloaded,
        "fsdp_offload_params (cpu_offload) keeps shards where they cannot be put together; set it to false",
    )
    again = "fsdp_activation_checkpointing wraps the blocks, which have to stay as they are"
    require(not plugin.activation_checkpointing, f"{again}; set gradient_checkpointing instead")


def _trains(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that have what trains."""
    require(
        any(not p.requires_grad for p in model.parameters()),
        "FSDP shards what is frozen, and of a model whose every weight trains nothing is; use a PEFT method, or DDP",
    )
    for name, module in model.named_modules():
        trains = {p.requires_grad for p in _own(module)}
        both = f'{name} has weights that train beside frozen ones, and FSDP shards the frozen ones; use bias="none"'
        require(trains != {True, False}, both)
        if True in trains:
            yield module


def _blocks(model: nn.Module) -> list[str]:
    """Names of the classes that the blocks of the transformers model are of."""
    (inner,) = (module for module in model.modules() if isinstance(module, PeftModel))
    return sorted({type(block).__name__ for stack in block_lists(transformers_model(inner)) for block in stack})


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


@torch.no_grad()
def _average_gradients(model: nn.Module) -> None:
    """Gradients of what trains become their mean over all processes, as DDP makes it."""
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
