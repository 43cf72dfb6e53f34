"""Which of llama.cpp's architectures holds a pruned model, and what it wants to be told of it.

Architectures that count heads, KV heads and neurons layer by layer hold any widths: `deci`, which was made for models
of NVIDIA that a search had cut, computes as Llama does, and `openelm` as Qwen3. Where all layers are equally wide, the
family's own architecture serves, which every program knows.
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
from lightpeft.plans.records import BlockPlan, PrunePlan
from lightpeft.plans.structure import FFN_SLOTS, BlockSpec

_NOTHING = 32
"""Neurons of zeros that stand for an FFN without neurons: without one llama.cpp drops what attention adds."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One of llama.cpp's."""

    name: str
    """In GGUF files."""
    interleaved: bool = False
    """Whether rotary embeddings turn neighbouring channels, and not those half a head apart, as in transformers."""
    by_layer: bool = False
    """Whether it counts heads, KV heads and neurons layer by layer."""
    full: bool = False
    """Whether the channels of all heads have to be as many as the model is wide."""
    fused: bool = False
    """Whether q, k and v are one projection."""
    bare: bool = False
    """Whether it has no place for biases, for a head apart from the embeddings, or for blocks without attention."""


_LLAMA, _DECI = Architecture(name="llama", interleaved=True), Architecture(name="deci", interleaved=True, by_layer=True)
_QWEN2, _QWEN3 = Architecture(name="qwen2", full=True), Architecture(name="qwen3")
_OPENELM = Architecture(name="openelm", by_layer=True, fused=True, bare=True)
_FAMILIES = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "qwen2": (_QWEN2, _DECI),
    "qwen3": (_QWEN3, _OPENELM),
}
"""Family -> what holds it where all layers are equally wide, and where they are not."""
FAMILIES = tuple(_FAMILIES)


def check_family(model: PreTrainedModel) -> None:
    """Raise `LightPeftError` where llama.cpp cannot compute what models of this kind do, pruned or not."""
    config: Any = model.config
    known = f"{', '.join(FAMILIES[:-1])} and {FAMILIES[-1]}"
    require(config.model_type in _FAMILIES, f"a GGUF file holds models of {known}; this one is of {config.model_type}")
    require(hasattr(model, "lm_head"), "a GGUF file holds models that write; this one has another head")
    require(
        config.hidden_act == "silu", f"llama.cpp computes FFNs with silu; those of this model have {config.hidden_act}"
    )
    _rope(config)


def choose(model: PreTrainedModel, plan: PrunePlan) -> Architecture:
    """The architecture for a pruned model.

    Raises:
        LightPeftError: llama.cpp cannot compute what this model does.
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
    """Refuse what an architecture that is bare has no place for."""
    instead = f"for which {architecture.name} of llama.cpp, which holds unequal layers of this family, has no place"
    gone = [spec.index for spec, kept in plan.parts if not kept.heads]
    require(not gone, f"block {min(gone, default=0)} has no attention, {instead}")
    biases = [name for name in model.state_dict() if name.endswith(".bias")]
    require(not biases, f"{' '.join(biases[:1])} is a bias, {instead}; leave out trained biases")
    require(model.config.tie_word_embeddings, f"the head is none of the embeddings, {instead}")
    require(_rope(model.config)["rope_type"] != "llama3", f"rotary embeddings are of type llama3, {instead}")


def _check_attention(model: PreTrainedModel, plan: PrunePlan) -> None:
    """Attention may be gone but in the first block, and where nothing of it adds a bias."""
    gone = [(spec, kept) for spec, kept in plan.parts if not kept.heads]
    require(
        all(spec.index for spec, _ in gone),
        "the first block has no attention, which llama.cpp needs there",
    )
    for spec, _ in gone:
        biased = getattr(model.get_submodule(spec.projections["o"]), "bias", None) is not None
        require(not biased, f"the attention of block {spec.index} is a bias alone, for which llama.cpp has no place")


def facts(model: PreTrainedModel, plan: PrunePlan, architecture: Architecture) -> Iterator[tuple[str, Any]]:
    """What `gguf.GGUFWriter` is told by its methods `add_...`: name and value."""
    config: Any = model.config
    head_dim = plan.specs[0].head_dim
    widths = {
        "head_count": [len(kept.heads) for kept in plan.blocks],
        "head_count_kv": [len(kept.kv_heads) for kept in plan.blocks],
        "feed_forward_length": [len(kept.neurons) or _NOTHING for kept in plan.blocks],
    }
    how = "pruned" if plan.cuts_blocks else "fine-tuned"
    yield "name", f"{Path(config.name_or_path).name or config.model_type}, {how}"
    yield "context_length", reach(config)
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


def reach(config: Any) -> int:
    """Tokens of a text that llama.cpp, which knows no windows here, sees as the model does."""
    positions = int(config.max_position_embeddings)
    return min(positions, getattr(config, "sliding_window", None) or positions)


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    rope.setdefault("rope_type", "default")
    known = rope["rope_type"] in ("default", "linear", "llama3") and rope.get("partial_rotary_factor", 1.0) == 1.0
    require(known, f"rotary embeddings of type {rope['rope_type']} are not written to GGUF files here")
    return rope


def tensors(model: PreTrainedModel, plan: PrunePlan, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Names, as transformers or as GGUF files have them, and weights as llama.cpp wants them."""
    own = {name: (spec, kept, slot) for spec, kept in plan.parts for slot, name in spec.projections.items()}
    norms = {f"{spec.attention.rpartition('.')[0]}.input_layernorm" for spec, kept in plan.parts if not kept.heads}
    without = norms | ({"lm_head"} if model.config.tie_word_embeddings else set())
    for name, tensor in model.state_dict().items():
        module = name.rpartition(".")[0]
        if module in own:
            yield from _of_projection(model, name, tensor, architecture, *own[module])
        elif module not in without:
            yield name, tensor
    factors = _llama3_factors(model.config, plan.specs[0].head_dim)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _of_projection(
    model: PreTrainedModel,
    name: str,
    tensor: Tensor,
    architecture: Architecture,
    spec: BlockSpec,
    kept: BlockPlan,
    slot: str,
) -> Iterator[tuple[str, Tensor]]:
    """What is written of a weight or a bias of a block's projection: nothing, where attention is gone."""
    if slot in FFN_SLOTS:
        yield name, tensor if kept.neurons else _nothing(tensor, slot)
    elif not kept.heads:
        return
    elif architecture.fused and slot == "q":
        parts = [model.get_submodule(spec.projections[part]).weight for part in ("q", "k", "v")]
        yield f"blk.{spec.index}.attn_qkv.weight", torch.cat(parts)
    elif not (architecture.fused and slot in ("k", "v")):  # which went with q
        turned = architecture.interleaved and slot in ("q", "k")
        yield name, neighbouring(tensor, spec.head_dim) if turned else tensor


def _nothing(tensor: Tensor, slot: str) -> Tensor:
    """A projection of neurons that give zero, for one of none."""
    shape: Sequence[int] = (tensor.shape[0], _NOTHING) if slot == "ffn_out" else (_NOTHING, *tensor.shape[1:])
    return tensor if slot == "ffn_out" and tensor.dim() == 1 else tensor.new_zeros(shape)


def neighbouring(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k whose channels i and i + head_dim / 2 of each head become neighbours: [heads * head_dim, ...]."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(tensor.shape)


def _llama3_factors(config: Any, head_dim: int) -> Tensor | None:
    """What Llama 3.1 divides the frequency of each pair of channels by, [head_dim / 2]; None: another kind."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    context = rope["original_max_position_embeddings"]
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((context / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
