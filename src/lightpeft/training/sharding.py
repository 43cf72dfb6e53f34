"""Any trainer of a PeftModel under FSDP2, with checkpoints that any number of processes can resume from.

FSDP2 shards the frozen weights, which are nearly all. Trained weights, masks and scores are small; every process holds
them whole, and their gradients are averaged as under DDP.
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
from lightpeft.models.families.family_table import block_lists
from lightpeft.models.patching import override_forward
from lightpeft.models.sharding import is_sharded, reshard
from lightpeft.models.unwrap import transformers_model
from lightpeft.training.arguments import half_precision
from lightpeft.training.host import Host


class Sharding:
    """Support for FSDP2 in training and checkpoints; does nothing if the model is not sharded."""

    def __init__(self, trainer: Host) -> None:
        self._trainer = trainer

    @property
    def fsdp(self) -> bool:
        """True if FSDP shards the model during training."""
        return getattr(self._trainer.accelerator.state, "fsdp_plugin", None) is not None

    @property
    def _half(self) -> torch.dtype | None:
        """Half precision of the sharded weights; None: none, or no FSDP."""
        return half_precision(self._trainer.args) if self.fsdp else None

    def check(self) -> None:
        """Refuse FSDP on CPUs, and settings of FSDP that are not supported.

        Raises:
            LightPeftError: naming the setting and its replacement.
        """
        if self.fsdp:
            _check_plugin(self._trainer.accelerator.state.fsdp_plugin)
        else:
            asked = bool(self._trainer.args.fsdp) or sharding_launched()
            require(
                not asked,
                "fsdp: accelerate shards models over GPUs only, and this process uses a CPU; train without fsdp",
            )

    def before(self, checkpoint: str | None) -> None:
        """Prepare the model for sharding at the start of training, while every process still has all of it.

        Args:
            checkpoint: checkpoint to resume from, whose weights are loaded here; None: none.

        Raises:
            LightPeftError: nothing is frozen, or a layer has both trained and frozen weights.
        """
        trainer = self._trainer
        if not self.fsdp or is_sharded(trainer.model):
            return
        if checkpoint is not None:
            trainer._load_from_checkpoint(checkpoint)
        trains, plugin = list(_trained_modules(trainer.model)), trainer.accelerator.state.fsdp_plugin
        plugin.ignored_modules = trains
        if plugin.transformer_cls_names_to_wrap is None:  # by default accelerate would also shard some embeddings apart
            plugin.transformer_cls_names_to_wrap = _block_classes(trainer.model)
        for parameter in (p for module in trains for p in _own_parameters(module)):
            parameter.data = parameter.data.to(trainer.args.device)
            dist.broadcast(parameter.data, 0)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Inside the block, direct calls of the model compute in the precision of its shards."""
        trainer = self._trainer
        usual = trainer.model.forward

        def forward(*args: Any, **options: Any) -> Any:
            with trainer.autocast_smart_context_manager():
                return usual(*args, **options)

        with nullcontext() if self._half is None else override_forward(trainer.model, forward):
            yield

    # -- called by the trainer's methods -------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any] | None:
        """Return an autocast context under FSDP, whose mixed precision covers sharded weights only; None: use the
        trainer's own."""
        return None if self._half is None else autocasting(self._trainer.args.device, self._half)

    def average(self) -> None:
        """After the last backward pass of a step, average the gradients that FSDP does not shard over all processes."""
        if self.fsdp and self._trainer.accelerator.sync_gradients:
            _average_gradients(self._trainer.model)

    @contextmanager
    def as_one_process(self) -> Iterator[None]:
        """Inside the block the trainer saves and loads as it does without FSDP."""
        trainer = self._trainer
        reshard(trainer.model)
        enabled, trainer.is_fsdp_enabled = trainer.is_fsdp_enabled, False
        try:
            yield
        finally:
            trainer.is_fsdp_enabled = enabled


def _check_plugin(plugin: Any) -> None:
    require(plugin.fsdp_version == 2, "FSDP1 cannot keep trained weights out of the shards; set fsdp_version to 2")
    loading = "fsdp_cpu_ram_efficient_loading loads weights in one process only, and lightpeft needs them in all"
    require(not plugin.cpu_ram_efficient_loading, f"{loading}; set it to false")
    offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    require(
        not offloaded,
        "fsdp_offload_params (cpu_offload) keeps shards on the CPU, where they cannot be gathered; set it to false",
    )
    again = "fsdp_activation_checkpointing wraps the blocks, and lightpeft needs them unwrapped"
    require(not plugin.activation_checkpointing, f"{again}; set gradient_checkpointing instead")


def _trained_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that hold trained weights.

    Raises:
        LightPeftError: nothing is frozen, or a module has both trained and frozen weights.
    """
    require(
        any(not p.requires_grad for p in model.parameters()),
        "FSDP shards frozen weights only, and all weights of this model train; use a PEFT method, or DDP",
    )
    for name, module in model.named_modules():
        trains = {p.requires_grad for p in _own_parameters(module)}
        both = f'{name} has both trained and frozen weights, of which FSDP shards the frozen ones; use bias="none"'
        require(trains != {True, False}, both)
        if True in trains:
            yield module


def _block_classes(model: nn.Module) -> list[str]:
    """Return the class names of the transformers model's blocks."""
    (inner,) = (module for module in model.modules() if isinstance(module, PeftModel))
    return sorted({type(block).__name__ for stack in block_lists(transformers_model(inner)) for block in stack})


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module without those of its children."""
    return list(module.parameters(recurse=False))


@torch.no_grad()
def _average_gradients(model: nn.Module) -> None:
    """Average the gradients of trained parameters over all processes, as DDP does."""
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
