"""Decoder families."""

from dataclasses import replace

from lightpeft.models.families.spec import Experts, Family, Stack

_SEPARATE_ATTENTION = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
}
_GATED_FFN = {"ffn_in": "mlp.up_proj", "ffn_gate": "mlp.gate_proj", "ffn_out": "mlp.down_proj"}
_LLAMA = Stack(
    layers="layers",
    attention="self_attn",
    projections=_SEPARATE_ATTENTION | _GATED_FFN,
    head_attributes={"num_key_value_groups": "heads_per_kv"},
)

LLAMA = Family("llama", (_LLAMA,))
MISTRAL = Family("mistral", (_LLAMA,))
QWEN2 = Family("qwen2", (_LLAMA,))
QWEN3 = Family("qwen3", (_LLAMA,))
GRANITE = Family("granite", (_LLAMA,))
_GEMMA = replace(_LLAMA, activation_key="hidden_activation")
GEMMA = Family("gemma", (_LLAMA,))
GEMMA2 = Family("gemma2", (_GEMMA,))
GEMMA3 = Family("gemma3_text", (_GEMMA,))

STARCODER2 = Family(
    "starcoder2",
    (replace(_LLAMA, projections=_SEPARATE_ATTENTION | {"ffn_in": "mlp.c_fc", "ffn_out": "mlp.c_proj"}),),
)

OLMO2 = Family("olmo2", (replace(_LLAMA, wide_norms={"q": "self_attn.q_norm", "k": "self_attn.k_norm"}),))

PHI3 = Family(
    "phi3",
    (
        replace(
            _LLAMA,
            projections={
                "qkv": "self_attn.qkv_proj",
                "o": "self_attn.o_proj",
                "ffn_gate_in": "mlp.gate_up_proj",
                "ffn_out": "mlp.down_proj",
            },
            head_attributes={
                "num_key_value_groups": "heads_per_kv",
                "num_key_value_heads": "kv_heads",
                "config.num_attention_heads": "heads",
            },
        ),
    ),
)

GPT2 = Family(
    "gpt2",
    (
        Stack(
            layers="h",
            attention="attn",
            projections={"qkv": "attn.c_attn", "o": "attn.c_proj", "ffn_in": "mlp.c_fc", "ffn_out": "mlp.c_proj"},
            head_attributes={"num_heads": "heads", "split_size": "width"},
            width_key="n_inner",
            activation_key="activation_function",
        ),
    ),
)

GPT_NEOX = Family(
    "gpt_neox",
    (
        Stack(
            layers="layers",
            attention="attention",
            projections={
                "qkv": "attention.query_key_value",
                "o": "attention.dense",
                "ffn_in": "mlp.dense_h_to_4h",
                "ffn_out": "mlp.dense_4h_to_h",
            },
            interleaved=True,
        ),
    ),
)

FALCON = Family(
    "falcon",
    (
        Stack(
            layers="h",
            attention="self_attention",
            projections={
                "qkv": "self_attention.query_key_value",
                "o": "self_attention.dense",
                "ffn_in": "mlp.dense_h_to_4h",
                "ffn_out": "mlp.dense_4h_to_h",
            },
            # num_key_value_groups since transformers 5.25
            head_attributes={
                "num_heads": "heads",
                "num_kv_heads": "kv_heads",
                "num_key_value_groups": "heads_per_kv",
            },
            width_key="ffn_hidden_size",
            activation_key="activation",
            interleaved=True,
        ),
    ),
    needs={"alibi": False},
)

OPT = Family(
    "opt",
    (
        Stack(
            layers="decoder.layers",
            attention="self_attn",
            projections={
                "q": "self_attn.q_proj",
                "k": "self_attn.k_proj",
                "v": "self_attn.v_proj",
                "o": "self_attn.out_proj",
                "ffn_in": "fc1",
                "ffn_out": "fc2",
            },
            head_attributes={"num_heads": "heads"},
            width_key="ffn_dim",
            activation_key="activation_function",
        ),
    ),
)

# Mixtures of experts: layers without an FFN of their own, or with one that all tokens pass

MIXTRAL = Family(
    "mixtral",
    (
        replace(
            _LLAMA,
            projections=_SEPARATE_ATTENTION,
            width_key=None,
            experts=Experts(count_key="num_local_experts", width_key="intermediate_size"),
        ),
    ),
)
_EXPERTS_OR_FFN = replace(
    _LLAMA, projections=(_SEPARATE_ATTENTION | _GATED_FFN, _SEPARATE_ATTENTION), experts=Experts()
)
QWEN3_MOE = Family("qwen3_moe", (_EXPERTS_OR_FFN,))
_SHARED_EXPERT = {slot: name.replace("mlp.", "mlp.shared_expert.") for slot, name in _GATED_FFN.items()}
QWEN2_MOE = Family(
    "qwen2_moe",
    (
        replace(
            _LLAMA,
            projections=(_SEPARATE_ATTENTION | _SHARED_EXPERT, _SEPARATE_ATTENTION | _GATED_FFN),
            width_key=("shared_expert_intermediate_size", "intermediate_size"),
            experts=Experts(),
            whole=("mlp.shared_expert_gate",),
        ),
    ),
)
OLMOE = Family(
    "olmoe",
    (
        replace(
            _LLAMA,
            projections=_SEPARATE_ATTENTION,
            width_key=None,
            experts=Experts(width_key="intermediate_size"),
            wide_norms={"q": "self_attn.q_norm", "k": "self_attn.k_norm"},
        ),
    ),
)
GPT_OSS = Family(
    "gpt_oss",
    (
        replace(
            _LLAMA,
            projections=_SEPARATE_ATTENTION,
            width_key=None,
            experts=Experts(router="mlp.router", count_key="num_local_experts", width_key="intermediate_size"),
            head_tensors=("sinks",),
        ),
    ),
)

# Multi-head latent attention: one latent of all heads is stored, from which each makes keys and values of its own

_LATENT_ATTENTION = {"q": "self_attn.q_b_proj", "kv": "self_attn.kv_b_proj", "o": "self_attn.o_proj"}
_LATENT_KEYS = _LATENT_ATTENTION | {"q": "self_attn.q_proj"}  # of which queries have no part
_SHARED_EXPERTS = {slot: name.replace("mlp.", "mlp.shared_experts.") for slot, name in _GATED_FFN.items()}
_ROUTED = Experts(count_key="n_routed_experts")
_DEEPSEEK = replace(
    _LLAMA,
    projections=tuple(
        attention | ffn for attention in (_LATENT_ATTENTION, _LATENT_KEYS) for ffn in (_SHARED_EXPERTS, _GATED_FFN)
    ),
    width_key=(None, "intermediate_size") * 2,
    head_dim_key="v_head_dim",
    head_sizes={"q": ("qk_nope_head_dim", "qk_rope_head_dim"), "kv": ("qk_nope_head_dim", "v_head_dim")},
    experts=_ROUTED,
    whole=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
)
DEEPSEEK_V2 = Family("deepseek_v2", (_DEEPSEEK,), since=(5, 16))
DEEPSEEK_V3 = Family("deepseek_v3", (_DEEPSEEK,), since=(5, 16))
GLM4_MOE_LITE = Family("glm4_moe_lite", (_DEEPSEEK,), since=(5, 16))
GLM4_MOE = Family(
    "glm4_moe",
    (
        replace(
            _LLAMA,
            projections=tuple(_SEPARATE_ATTENTION | ffn for ffn in (_SHARED_EXPERTS, _GATED_FFN)),
            width_key=(None, "intermediate_size"),
            experts=_ROUTED,
        ),
    ),
    since=(5, 16),
)

DECODERS = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GRANITE,
    GEMMA,
    GEMMA2,
    GEMMA3,
    STARCODER2,
    OLMO2,
    PHI3,
    GPT2,
    GPT_NEOX,
    FALCON,
    OPT,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    GPT_OSS,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE,
    GLM4_MOE_LITE,
)
