"""A base that does not fit: the weights of its blocks stay on disk, and each is read where it is needed."""

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
from lightpeft.models.linears.on_disk import bring_in, can_be_left, is_on_disk, leave_on_disk, lying_over
from lightpeft.models.tensors import Reading, StoredTensor, check_files, on_disk

_INSTEAD = "load it without low_memory"


@contextmanager
def weights_on_disk() -> Iterator[None]:
    """Inside the block, `from_pretrained` of transformers leaves the weights of a model's blocks on disk.

        with weights_on_disk():
            model = AutoModelForCausalLM.from_pretrained("base", dtype="auto")

    Each linear layer of a block then reads its weight when it computes, once more in the backward pass, and keeps
    nothing of it, so that memory holds one weight at a time beside embeddings, head, norms and biases. The model is as
    any other to PEFT, to `LightTrainer` and to `EarlyPruner`, computes and learns the same, and is in memory once it is
    cut. The files have to stay as they are, and the weights frozen; one process at a time trains.

    Raises (when a model is loaded):
        LightPeftError: its weights are quantised or not in safetensors files, or no layer of its blocks can do so:
            those of classes of their own, and weights that transformers makes of others, stay in memory.
    """

    def read(model: PreTrainedModel, checkpoint: Checkpoint) -> Any:
        check_files(checkpoint, _INSTEAD)
        return _Leaving(model).load(checkpoint)

    with reading(read):
        yield


def has_weights_on_disk(model: nn.Module) -> bool:
    """Whether the weights of some layers are on disk."""
    return any(is_on_disk(layer) for layer in model.modules())


def bring_weights_in(model: nn.Module) -> None:
    """Bring the weights of all layers into memory that are on disk still."""
    for layer in model.modules():
        bring_in(layer)


class _Leaving:
    """One load of a model whose weights stay on disk."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._reading = Reading(None, None)
        self._layers = {layer for layer in _in_blocks(model) if can_be_left(layer)}
        self._stored: dict[nn.Module, tuple[StoredTensor, torch.dtype]] = {}

    def load(self, checkpoint: Checkpoint) -> Any:
        """As transformers does it, but for the weights that stay."""
        hook = register_module_parameter_registration_hook(self._receive)
        try:
            with one_at_a_time():
                result = checkpoint.load(self._model, on_disk(checkpoint.files, self._reading))
        finally:
            hook.remove()
        what = f"no linear layer of the {type(self._model).__name__}'s blocks can have its weight on disk"
        require(self._stored, f"{what}: they are of a class of their own, or not in the files as they are; {_INSTEAD}")
        for layer, (stored, dtype) in self._stored.items():
            leave_on_disk(layer, stored, dtype)
        return result

    def _receive(self, module: nn.Module, name: str, parameter: Any) -> Any:
        """Called when a parameter is set in any module; returns what is set instead, or None."""
        if name != "weight" or parameter is None or parameter.is_meta or module not in self._layers:
            return None
        stored = self._reading.place_of(parameter)
        if stored is None:
            return None
        self._stored[module] = stored, parameter.dtype
        self._reading.forget()
        over_file = lying_over(stored)
        mark_read(over_file)
        return over_file


def _in_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What is in the model's lists of blocks: neither embeddings nor heads."""
    for part in model.modules():
        if isinstance(part, nn.ModuleList):
            yield from part.modules()
