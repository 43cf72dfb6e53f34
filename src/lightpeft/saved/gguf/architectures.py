"""Which of llama.cpp's architectures holds a pruned model, and what it wants to be told of it.

An architecture that counts heads, KV heads and neurons layer by layer holds any widths: `deci`, which was made for
models of NVIDIA that a search had cut, computes as Llama does. Where all layers are equally wide, the family's own
architecture serves, which every program knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightpeft.errors import require
from lightpeft.plans.records import PrunePlan

_NOTHING = 32
"""Neurons of zeros that stand for an FFN without neurons: without one llama.cpp drops what attention adds."""


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's, by its name in GGUF files."""

    name: str
    interleaved: bool
    """Whether rotary embeddings turn neighbouring channels, and not those half a head apart, as in transformers."""
    full: bool = False
    """Whether the channels of all heads have to be as many as the model is wide."""


_LLAMA, _QWEN2 = Architecture("llama", interleaved=True), Architecture("qwen2", interleaved=False, full=True)
_DECI = Architecture("deci", interleaved=True)
_FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _QWEN2}
"""Family -> what holds it where all layers are equally wide."""
FAMILIES = tuple(_FAMILIES)


def choose(model: PreTrainedModel, plan: PrunePlan) -> Architecture:
    """The architecture for a pruned model.

    Raises:
        LightPeftError: llama.cpp cannot compute what this model does.
    """
    config: Any = model.config
    known = f"{', '.join(FAMILIES[:-1])} and {FAMILIES[-1]}"
    require(config.model_type in _FAMILIES, f"a GGUF file holds models of {known}; this one is of {config.model_type}")
    family = _FAMILIES[config.model_type]
    require(hasattr(model, "lm_head"), "a GGUF file holds models that write; this one has another head")
    require(
        config.hidden_act == "silu", f"llama.cpp computes FFNs with silu; those of this model have {config.hidden_act}"
    )
    widths = {(len(kept.heads), len(kept.kv_heads), len(kept.neurons)) for kept in plan.blocks}
    channels = len(plan.blocks[0].heads) * plan.specs[0].head_dim
    if len(widths) == 1 and all(map(all, widths)) and (not family.full or channels == config.hidden_size):
        return family
    _check_attention(model, plan)
    return _DECI


def _check_attention(model: PreTrainedModel, plan: PrunePlan) -> None:
    """Attention may be gone but in the first block, and where nothing of it adds a bias."""
    gone = [(spec, kept) for spec, kept in plan.parts if not kept.heads]
    require(
        all(spec.index for spec, _ in gone),
        "the first block has no attention, which llama.cpp needs there; prune with light.min_heads: 1",
    )
    for spec, _ in gone:
        biased = getattr(model.get_submodule(spec.projections["o"]), "bias", None) is not None
        require(not biased, f"the attention of block {spec.index} is a bias alone, for which llama.cpp has no place")


def facts(model: PreTrainedModel, plan: PrunePlan, architecture: Architecture) -> Iterator[tuple[str, Any]]:
    """What `gguf.GGUFWriter` is told by its methods `add_...`: name and value.

    Raises:
        LightPeftError: a rotary embedding that is written nowhere here.
    """
    config: Any = model.config
    head_dim = plan.specs[0].head_dim
    positions, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    widths = {
        "head_count": [len(kept.heads) for kept in plan.blocks],
        "head_count_kv": [len(kept.kv_heads) for kept in plan.blocks],
        "feed_forward_length": [len(kept.neurons) or _NOTHING for kept in plan.blocks],
    }
    yield "context_length", min(positions, window) if window else positions  # all tokens are seen as far as that
    yield "embedding_length", config.hidden_size
    yield "block_count", len(plan.blocks)
    yield "vocab_size", config.vocab_size
    for name, values in widths.items():
        yield name, values if architecture is _DECI else values[0]
    for name in ("key_length", "value_length", "rope_dimension_count"):
        yield name, head_dim
    yield "layer_norm_rms_eps", config.rms_norm_eps
    rope = _rope(config)
    yield "rope_freq_base", float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        yield "rope_scaling_type", "linear"
        yield "rope_scaling_factor", float(rope["factor"])


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    rope.setdefault("rope_type", "default")
    known = rope["rope_type"] in ("default", "linear", "llama3") and rope.get("partial_rotary_factor", 1.0) == 1.0
    require(known, f"rotary embeddings of type {rope['rope_type']} are not written to GGUF files here")
    return rope


def tensors(model: PreTrainedModel, plan: PrunePlan, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Names as transformers has them, and weights as llama.cpp wants them, block by block."""
    own = {name: (spec, kept, slot) for spec, kept in plan.parts for slot, name in spec.projections.items()}
    norms = {f"{spec.attention.rpartition('.')[0]}.input_layernorm" for spec, kept in plan.parts if not kept.heads}
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        module = name.rpartition(".")[0]
        if (tied and module == "lm_head") or module in norms:  # of attention that is gone
            continue
        if module in own:
            spec, kept, slot = own[module]
            of_attention = not slot.startswith("ffn")
            if of_attention and not kept.heads:
                continue
            if not of_attention and not kept.neurons:
                tensor = _nothing(tensor, slot)
            elif architecture.interleaved and slot in ("q", "k"):
                tensor = neighbouring(tensor, spec.head_dim)
        yield name, tensor
    factors = _llama3_factors(model.config, plan.specs[0].head_dim)
    if factors is not None:
        yield "rope_freqs.weight", factors


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
