"""The file with the trained weights of a base (`light.train: all`), after the cut or, in checkpoints, before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightpeft.errors import require
from lightpeft.files import read_tensors, write_tensors
from lightpeft.models.all_weights import put_weights, trained_weights
from lightpeft.saving.peft_adapter import shapes_in

KEPT_WEIGHTS = "kept_weights.safetensors"


def write_kept(model: nn.Module, folder: Path) -> None:
    """Write the trained base weights of a model."""
    tensors = {name: parameter.detach().contiguous() for name, parameter in trained_weights(model).items()}
    write_tensors(folder / KEPT_WEIGHTS, tensors)


def read_kept(model: nn.Module, folder: Path, is_trainable: bool) -> None:
    """Load the weights from `write_kept` into a cut model.

    Args:
        is_trainable: True: they stay trainable; False: they are frozen.

    Raises:
        LightPeftError: the file is missing or damaged, or its tensors do not fit.
    """
    check_kept(model, folder)
    put_weights(model, read_tensors(folder / KEPT_WEIGHTS), is_trainable)


@torch.no_grad()
def copy_kept(model: nn.Module, folder: Path) -> None:
    """Copy the weights from `write_kept` into the parameters of a model, which an optimizer may hold already.

    Raises:
        LightPeftError: the file is missing or damaged, or its tensors do not fit.
    """
    check_kept(model, folder)
    weights = read_tensors(folder / KEPT_WEIGHTS)
    for name, parameter in trained_weights(model).items():
        parameter.copy_(weights[name])


def check_kept(model: nn.Module, folder: Path) -> None:
    """Compare names and shapes of the tensors in the file with those of a model, which may be on the meta device.

    Raises:
        LightPeftError: the file is missing, or has other tensors.
    """
    require((folder / KEPT_WEIGHTS).is_file(), f"{folder} is incomplete: {KEPT_WEIGHTS} is missing; copy it again")
    expected: Mapping[str, Tensor] = trained_weights(model)
    same = {name: tuple(tensor.shape) for name, tensor in expected.items()} == shapes_in(folder / KEPT_WEIGHTS)
    require(same, f"{folder / KEPT_WEIGHTS} does not fit its base: it has other tensors than the model")
