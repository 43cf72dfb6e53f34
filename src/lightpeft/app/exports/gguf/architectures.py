"""The llama.cpp architecture for a pruned model, and its metadata and tensors in a GGUF file.

Architectures with heads, KV heads and neurons per layer support any widths: `deci`, made for NVIDIA's models from
architecture search, computes like Llama, and `openelm` like Qwen3. If all layers are equally wide, the family's own
architecture is used, which every program supports.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightpeft.errors import require
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import FFN_SLOTS, BlockSpec

_ZERO_NEURONS = 32
"""Zero neurons that replace an FFN without neurons: without an FFN, llama.cpp drops the output of attention."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of llama.cpp, with its limits."""

    name: str
    """Name in GGUF files."""
    interleaved: bool = False
    """True if rotary embeddings rotate adjacent channels; in transformers the pairs are half a head apart."""
    by_layer: bool = False
    """True if heads, KV heads and neurons are counts per layer."""
    full: bool = False
    """True if heads times head size must equal the hidden size."""
    fused: bool = False
    """True if q, k and v are one projection."""
    bare: bool = False
    """True if it supports no biases, no untied head, and no blocks without attention."""


_LLAMA, _DECI = Architecture(name="llama", interleaved=True), Architecture(name="deci", interleaved=True, by_layer=True)
_QWEN2, _QWEN3 = Architecture(name="qwen2", full=True), Architecture(name="qwen3")
_OPENELM = Architecture(name="openelm", by_layer=True, fused=True, bare=True)
_FAMILIES = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "qwen2": (_QWEN2, _DECI),
    "qwen3": (_QWEN3, _OPENELM),
}
"""Family -> its architecture if all layers are equally wide, and if they are not."""
GGUF_FAMILIES = tuple(_FAMILIES)


def check_family(model: PreTrainedModel) -> None:
    """Raise `LightPeftError` if llama.cpp cannot run models of this kind, pruned or not."""
    config: Any = model.config
    known = f"{', '.join(GGUF_FAMILIES[:-1])} and {GGUF_FAMILIES[-1]}"
    require(config.model_type in _FAMILIES, f"family {config.model_type} has no GGUF export; use {known}")
    require(hasattr(model, "lm_head"), "GGUF export needs a causal language model; this model has another head")
    require(
        config.hidden_act == "silu",
        f"llama.cpp supports only silu in FFNs; this model has {config.hidden_act}; use form merged",
    )
    _rope(config)


def choose_architecture(model: PreTrainedModel, plan: PrunePlan) -> Architecture:
    """Return the architecture for a pruned model.

    Raises:
        LightPeftError: llama.cpp cannot run this model.
    """
    check_family(model)
    config: Any = model.config
    even, uneven = _FAMILIES[config.model_type]
    widths = {(len(kept.heads), len(kept.kv_heads), len(kept.neurons)) for kept in plan.blocks}
    channels = len(plan.blocks[0].heads) * plan.specs[0].head_dim
    if len(widths) == 1 and all(map(all, widths)) and (not even.full or channels == config.hidden_size):
        return even
    if uneven.bare:
        _check_bare(model, plan, uneven)
    _check_attention(model, plan)
    return uneven


def _check_bare(model: PreTrainedModel, plan: PrunePlan, architecture: Architecture) -> None:
    """Raise `LightPeftError` if the model has parts that a bare architecture does not support."""
    instead = f"which llama.cpp's {architecture.name}, used for unequal layers of this family, does not support"
    gone = [spec.index for spec, kept in plan.parts if not kept.heads]
    require(not gone, f"block {min(gone, default=0)} has no attention, {instead}")
    biases = [name for name in model.state_dict() if name.endswith(".bias")]
    require(not biases, f"{' '.join(biases[:1])} is a bias, {instead}; leave out trained biases")
    require(model.config.tie_word_embeddings, f"the head is not tied to the embeddings, {instead}")
    require(_rope(model.config)["rope_type"] != "llama3", f"rotary embeddings are of type llama3, {instead}")


def _check_attention(model: PreTrainedModel, plan: PrunePlan) -> None:
    """Raise `LightPeftError` if attention is removed in the first block, or where its output bias is left."""
    gone = [(spec, kept) for spec, kept in plan.parts if not kept.heads]
    require(
        all(spec.index for spec, _ in gone),
        "the first block has no attention, which llama.cpp requires; cut less (light.remove)",
    )
    for spec, _ in gone:
        biased = getattr(model.get_submodule(spec.projections["o"]), "bias", None) is not None
        require(
            not biased,
            f"attention of block {spec.index} is only a bias, unsupported by llama.cpp; cut less (light.remove)",
        )


def metadata(model: PreTrainedModel, plan: PrunePlan, architecture: Architecture) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the metadata: `gguf.GGUFWriter` writes each with its method `add_<name>`."""
    config: Any = model.config
    head_dim = plan.specs[0].head_dim
    widths = {
        "head_count": [len(kept.heads) for kept in plan.blocks],
        "head_count_kv": [len(kept.kv_heads) for kept in plan.blocks],
        "feed_forward_length": [len(kept.neurons) or _ZERO_NEURONS for kept in plan.blocks],
    }
    how = "pruned" if plan.cuts_blocks else "fine-tuned"
    yield "name", f"{Path(config.name_or_path).name or config.model_type}, {how}"
    yield "context_length", context_length(config)
    yield "embedding_length", config.hidden_size
    yield "block_count", len(plan.blocks)
    yield "vocab_size", config.vocab_size
    for name, values in widths.items():
        yield name, values if architecture.by_layer else values[0]
    for name in ("key_length", "value_length", "rope_dimension_count"):
        yield name, head_dim
    yield "layer_norm_rms_eps", config.rms_norm_eps
    rope = _rope(config)
    yield "rope_freq_base", float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        yield "rope_scaling_type", "linear"
        yield "rope_scaling_factor", float(rope["factor"])


def context_length(config: Any) -> int:
    """Return the longest context, in tokens, that llama.cpp computes exactly: it ignores sliding windows here."""
    positions = int(config.max_position_embeddings)
    return min(positions, getattr(config, "sliding_window", None) or positions)


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    rope.setdefault("rope_type", "default")
    known = rope["rope_type"] in ("default", "linear", "llama3") and rope.get("partial_rotary_factor", 1.0) == 1.0
    require(known, f"GGUF export does not support rotary embeddings of type {rope['rope_type']}; use form merged")
    return rope


def tensors(model: PreTrainedModel, plan: PrunePlan, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor): names of transformers or of GGUF files, and weights in llama.cpp's layout."""
    own = {name: (spec, kept, slot) for spec, kept in plan.parts for slot, name in spec.projections.items()}
    norms = {f"{spec.attention.rpartition('.')[0]}.input_layernorm" for spec, kept in plan.parts if not kept.heads}
    without = norms | ({"lm_head"} if model.config.tie_word_embeddings else set())
    for name, tensor in model.state_dict().items():
        module = name.rpartition(".")[0]
        if module in own:
            yield from _projection_tensors(model, name, tensor, architecture, *own[module])
        elif module not in without:
            yield name, tensor
    factors = _llama3_factors(model.config, plan.specs[0].head_dim)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _projection_tensors(
    model: PreTrainedModel,
    name: str,
    tensor: Tensor,
    architecture: Architecture,
    spec: BlockSpec,
    kept: BlockPlan,
    slot: str,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors for a weight or bias of a block's projection; none if attention was removed."""
    if slot in FFN_SLOTS:
        yield name, tensor if kept.neurons else _zero_projection(tensor, slot)
    elif not kept.heads:
        return
    elif architecture.fused and slot == "q":
        parts = [model.get_submodule(spec.projections[part]).weight for part in ("q", "k", "v")]
        yield f"blk.{spec.index}.attn_qkv.weight", torch.cat(parts)
    elif not (architecture.fused and slot in ("k", "v")):  # they are in q's tensor
        turned = architecture.interleaved and slot in ("q", "k")
        yield name, interleave_channels(tensor, spec.head_dim) if turned else tensor


def _zero_projection(tensor: Tensor, slot: str) -> Tensor:
    """Return the projection of `_ZERO_NEURONS` zero neurons, in place of one without neurons."""
    shape: Sequence[int] = (tensor.shape[0], _ZERO_NEURONS) if slot == "ffn_out" else (_ZERO_NEURONS, *tensor.shape[1:])
    return tensor if slot == "ffn_out" and tensor.dim() == 1 else tensor.new_zeros(shape)


def interleave_channels(tensor: Tensor, head_dim: int) -> Tensor:
    """Return q or k, [heads * head_dim, ...], with channels i and i + head_dim / 2 of each head adjacent."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(tensor.shape)


def _llama3_factors(config: Any, head_dim: int) -> Tensor | None:
    """Return Llama 3.1's divisors of the rotary frequencies, float32 [head_dim / 2]; None for other types."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    context = rope["original_max_position_embeddings"]
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((context / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
