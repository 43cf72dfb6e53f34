"""Fingerprint of a base: a hash that connects plans and adapters to the base that they were made for."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft.compat.stand_ins import StandIn
from lightpeft.errors import require
from lightpeft.models.experts import ExpertLayer
from lightpeft.models.linears.linear_kinds import stored_weight
from lightpeft.models.unwrap import base_layer, base_linear, transformers_model
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.plans.structure import BlockSpec


def fingerprint(model: nn.Module, blocks: Sequence[BlockSpec], vocabulary: Vocabulary | None = None) -> str:
    """Hash names, shapes and a sample of every prunable weight and of the input embeddings of a base.

    Values are sampled at fixed strides and rounded to bfloat16, so that a base in float32 and in bfloat16 agree, and a
    large model takes milliseconds. Of quantized weights the integers are hashed, so a base in 4 bits differs.

    Args:
        vocabulary: hash the embeddings of these tokens only, whether the model still has others or not.

    Returns:
        The hash; "" for a model whose tensors have no storage.
    """
    if isinstance(_input_embeddings(transformers_model(model)), StandIn):
        return ""
    check_stored(model)
    weights = (weight for block in blocks for weight in _weights(model, block))
    return digest_of(model, ((name, sample(weight)) for name, weight in weights), vocabulary)


def check_stored(model: nn.Module) -> None:
    """Check that all parameters of a model have storage.

    Raises:
        LightPeftError: a parameter is on the meta device.
    """
    tensors = model.named_parameters()
    empty = next((name for name, tensor in tensors if tensor.is_meta and not isinstance(tensor, StandIn)), None)
    require(
        empty is None,
        f"{empty} of this model is on the meta device, without values; load the model with its weights "
        "(from_pretrained without a device_map that offloads)",
    )


def _weights(model: nn.Module, block: BlockSpec) -> Iterator[tuple[str, Tensor]]:
    for name in block.projections.values():
        yield name, stored_weight(base_linear(model, name))
    if block.experts:
        for name, weight in ExpertLayer.of(transformers_model(model), block.expert_modules).weights():
            yield expert_weight(block, name), weight


def weight_names(model: nn.Module, block: BlockSpec) -> list[str]:
    """Return the names of the weights of a block that the fingerprint reads, in order; the model needs no storage."""
    return [name for name, _ in _weights(model, block)]


def expert_weight(block: BlockSpec, name: str) -> str:
    """Return the name in the model of a weight of `ExpertLayer.weights`."""
    part, _, own = name.partition(".")
    return f"{block.expert_modules[part]}.{own}"


@dataclass(frozen=True)
class Sample:
    """Shape and sampled values of a weight, for the fingerprint."""

    shape: torch.Size
    values: Tensor
    """[about 1024], bfloat16."""


def sample(weight: Tensor) -> Sample:
    """Copy the shape and sampled values of a weight for the fingerprint; the copy does not keep the weight alive."""
    values = weight.flatten()[:: max(1, weight.numel() // 1024)].to(torch.bfloat16).cpu()
    return Sample(weight.shape, values.clone())


def digest_of(model: nn.Module, projections: Iterable[tuple[str, Sample]], vocabulary: Vocabulary | None = None) -> str:
    """Compute the fingerprint from samples of the prunable weights; the input embeddings are sampled here."""
    digest = hashlib.sha256()
    embeddings = _input_embeddings(transformers_model(model)).detach()
    if vocabulary is not None:
        embeddings = vocabulary.rows(embeddings)
    for name, taken in itertools.chain(projections, [("input_embeddings", sample(embeddings))]):
        digest.update(f"{name} {tuple(taken.shape)}".encode())
        digest.update(taken.values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _input_embeddings(model: PreTrainedModel) -> Tensor:
    """Return the weights that read the input: embeddings of tokens, of image patches or of sound frames."""
    try:
        return next(base_layer(model.get_input_embeddings()).parameters())
    except NotImplementedError:  # models that read raw sound
        return next(model.parameters())
