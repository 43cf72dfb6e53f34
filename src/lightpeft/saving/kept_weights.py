"""The file of a light adapter with the weights of the cut base, where these trained (`light.train: all`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lightpeft.errors import require
from lightpeft.files import read_tensors, write_tensors
from lightpeft.models.all_weights import put_weights, trained_weights
from lightpeft.saving.peft_adapter import shapes_in

KEPT_WEIGHTS = "kept_weights.safetensors"


def write_kept(model: nn.Module, folder: Path) -> None:
    """Write the weights of a cut model that trained."""
    tensors = {name: parameter.detach().contiguous() for name, parameter in trained_weights(model).items()}
    write_tensors(folder / KEPT_WEIGHTS, tensors)


def read_kept(model: nn.Module, folder: Path, is_trainable: bool) -> None:
    """Give a cut model the weights that `write_kept` wrote.

    Args:
        is_trainable: whether they train on.

    Raises:
        LightPeftError: the file is missing or damaged, or of a model of another shape.
    """
    check_kept(model, folder)
    put_weights(model, read_tensors(folder / KEPT_WEIGHTS), is_trainable)


def check_kept(model: nn.Module, folder: Path) -> None:
    """Compare the tensors in the file with those of a cut model, whose own may be on the meta device.

    Raises:
        LightPeftError: they are others.
    """
    require((folder / KEPT_WEIGHTS).is_file(), f"{folder} is incomplete: {KEPT_WEIGHTS} is missing")
    expected: Mapping[str, Tensor] = trained_weights(model)
    same = {name: tuple(tensor.shape) for name, tensor in expected.items()} == shapes_in(folder / KEPT_WEIGHTS)
    require(same, f"{folder / KEPT_WEIGHTS} does not fit its base: it has other tensors than the cut model")
