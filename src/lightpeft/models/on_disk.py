"""Bases that do not fit in memory: the weights of their blocks stay on disk, and each is read when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from lightpeft.compat.transformers import Checkpoint, mark_read, one_at_a_time, reading
from lightpeft.errors import require
from lightpeft.models.linears.on_disk import can_be_left, is_on_disk, leave_on_disk, load_weight, map_parameter
from lightpeft.models.tensors import Reading, StoredTensor, check_files, on_disk

_LOAD_IN_MEMORY = "load it without low_memory"


@contextmanager
def weights_on_disk() -> Iterator[None]:
    """Make transformers' `from_pretrained` leave the weights of a model's blocks on disk inside the block.

    Each linear layer of a block then reads its weight for the forward and again for the backward pass, and does not
    keep it, so that memory holds one weight at a time beside embeddings, head, norms and biases. PEFT, `LightTrainer`
    and `EarlyPruner` can use the model like any other, with the same results; a cut brings it into memory. The files
    must not change, the weights must stay frozen, and training needs a single process.

    Example:
        with weights_on_disk():
            model = AutoModelForCausalLM.from_pretrained("base", dtype="auto")

    Raises (when a model is loaded):
        LightPeftError: its weights are quantized or not in safetensors files, or no layer of its blocks can have its
            weight on disk. Layers of unknown classes, and weights that transformers converts, stay in memory.
    """

    def read(model: PreTrainedModel, checkpoint: Checkpoint) -> Any:
        check_files(checkpoint, _LOAD_IN_MEMORY)
        return _OnDiskLoad(model).load(checkpoint)

    with reading(read):
        yield


def has_weights_on_disk(model: nn.Module) -> bool:
    """Return whether the weights of some layers are on disk."""
    return any(is_on_disk(layer) for layer in model.modules())


def bring_weights_in(model: nn.Module) -> None:
    """Load all weights into memory that are still on disk."""
    for layer in model.modules():
        load_weight(layer)


class _OnDiskLoad:
    """State of one load of a model whose weights stay on disk."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._reading = Reading(None, None)
        self._layers = {layer for layer in _block_modules(model) if can_be_left(layer)}
        self._stored: dict[nn.Module, tuple[StoredTensor, torch.dtype]] = {}

    def load(self, checkpoint: Checkpoint) -> Any:
        """Load the checkpoint with transformers, and leave the weights of blocks on disk."""
        hook = register_module_parameter_registration_hook(self._replace_parameter)
        try:
            with one_at_a_time():
                result = checkpoint.load(self._model, on_disk(checkpoint.files, self._reading))
        finally:
            hook.remove()
        what = f"no linear layer in the blocks of {type(self._model).__name__} can have its weight on disk"
        require(self._stored, f"{what}: its class is unknown, or its weight is converted on loading; {_LOAD_IN_MEMORY}")
        for layer, (stored, dtype) in self._stored.items():
            leave_on_disk(layer, stored, dtype)
        return result

    def _replace_parameter(self, module: nn.Module, name: str, parameter: Any) -> Any:
        """Replace a parameter that is set in a module, as a registration hook; None: keep it."""
        if name != "weight" or parameter is None or parameter.is_meta or module not in self._layers:
            return None
        stored = self._reading.place_of(parameter)
        if stored is None:
            return None
        self._stored[module] = stored, parameter.dtype
        self._reading.forget()
        over_file = map_parameter(stored)
        mark_read(over_file)
        return over_file


def _block_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules inside the model's lists of blocks, without embeddings and heads."""
    for part in model.modules():
        if isinstance(part, nn.ModuleList):
            yield from part.modules()
