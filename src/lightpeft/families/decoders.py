"""Decoder families."""

from lightpeft.families.spec import Family

LLAMA = Family(
    model_type="llama",
    layers="layers",
    attention="self_attn",
    projections={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "ffn_in": "mlp.up_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_out": "mlp.down_proj",
    },
    head_attributes={"num_key_value_groups": "heads_per_kv"},
)

OPT = Family(
    model_type="opt",
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
)
