"""Llama and what is built like it, with layers of unequal widths, out of vLLM's own parts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from lightpeft_vllm.configs import FAMILIES, widths_of


class LightForCausalLM(LlamaForCausalLM):
    """A merged light model of one of the families in `configs.FAMILIES`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LightDecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As vLLM does; biases that are all that is left of a sub-layer are put there first."""
        added: set[str] = set()
        loaded = super().load_weights(self._with_a_place(weights, added))
        return loaded | added

    def _with_a_place(self, weights: Iterable[tuple[str, Tensor]], added: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Weights that the model has a place for; `added` gets the names of those that were given one."""
        for name, weight in weights:
            module, _, parameter = name.rpartition(".")
            if weight.numel() == 0:  # of a sub-layer that is gone
                continue
            if parameter == "bias" and module.endswith((".o_proj", ".down_proj")):
                projection = self.get_submodule(module)
                if projection.bias is None:
                    like = self.model.embed_tokens.weight
                    projection.bias = nn.Parameter(weight.to(like.device, like.dtype), requires_grad=False)
                    added.add(name)
                    continue
            yield name, weight


class LightDecoderLayer(LlamaDecoderLayer):
    """A layer of its own widths; a sub-layer that lost all its units adds what is left of its bias."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        config = copy.copy(config or vllm_config.model_config.hf_config)
        settings = FAMILIES[config.model_type] | widths_of(config, extract_layer_index(prefix))
        for setting, value in settings.items():
            setattr(config, setting, value)
        kind: type[nn.Module] = NormedAttention if getattr(config, "qk_norm", False) else LlamaAttention
        if not config.num_attention_heads:
            kind = NoAttention
        super().__init__(vllm_config, prefix, config, attn_layer_type=kind)
        if not config.intermediate_size:
            self.mlp = Nothing("down_proj")


class NormedAttention(LlamaAttention):
    """With a norm over each query's and each key's channels, as Qwen3 has."""

    def __init__(self, config: Any, **settings: Any) -> None:
        super().__init__(config, **settings)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[tokens, width] -> [tokens, width]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class Nothing(nn.Module):
    """A sub-layer without units: it gives the bias of its last projection, or nothing."""

    def __init__(self, projection: str) -> None:
        super().__init__()
        self.projection = projection
        self.add_module(projection, nn.Module())
        self.get_submodule(projection).register_parameter("bias", None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[tokens, width] -> the same, in memory of its own, since what comes next writes into it."""
        nothing: Tensor = torch.zeros_like(hidden_states)
        bias: Any = self.get_submodule(self.projection).bias
        return nothing if bias is None else nothing + bias


class NoAttention(Nothing):
    """Attention without heads, which caches nothing."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("o_proj")

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[tokens, width] -> the same."""
        return super().forward(hidden_states)
