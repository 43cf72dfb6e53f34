"""Encoder families of text, images and sound."""

from dataclasses import replace

from lightpeft.models.families.spec import Family, Stack

BERT = Family(
    "bert",
    (
        Stack(
            layers="encoder.layer",
            attention="attention.self",
            projections={
                "q": "attention.self.query",
                "k": "attention.self.key",
                "v": "attention.self.value",
                "o": "attention.output.dense",
                "ffn_in": "intermediate.dense",
                "ffn_out": "output.dense",
            },
            head_attributes={"num_attention_heads": "heads", "all_head_size": "width"},
        ),
    ),
)
ELECTRA = replace(BERT, model_type="electra")
ROBERTA = replace(BERT, model_type="roberta", positions_after_padding=True)
XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta")
CAMEMBERT = replace(ROBERTA, model_type="camembert")
ESM = replace(ROBERTA, model_type="esm")

DISTILBERT = Family(
    "distilbert",
    (
        Stack(
            layers="transformer.layer",
            attention="attention",
            projections={
                "q": "attention.q_lin",
                "k": "attention.k_lin",
                "v": "attention.v_lin",
                "o": "attention.out_lin",
                "ffn_in": "ffn.lin1",
                "ffn_out": "ffn.lin2",
            },
            head_attributes={"n_heads": "heads", "dim": "width"},
            width_key="hidden_dim",
            activation_key="activation",
        ),
    ),
)

DEBERTA_V2 = Family(
    "deberta-v2",
    (
        Stack(
            layers="encoder.layer",
            attention="attention.self",
            projections={
                # positions are projected by the same q and k (share_att_key), head by head
                "q": "attention.self.query_proj",
                "k": "attention.self.key_proj",
                "v": "attention.self.value_proj",
                "o": "attention.output.dense",
                "ffn_in": "intermediate.dense",
                "ffn_out": "output.dense",
            },
            head_attributes={"num_attention_heads": "heads", "all_head_size": "width"},
        ),
    ),
)

MPNET = Family(
    "mpnet",
    (
        Stack(
            layers="encoder.layer",
            attention="attention.attn",
            projections={
                "q": "attention.attn.q",
                "k": "attention.attn.k",
                "v": "attention.attn.v",
                "o": "attention.attn.o",
                "ffn_in": "intermediate.dense",
                "ffn_out": "output.dense",
            },
            head_attributes={"num_attention_heads": "heads", "all_head_size": "width"},
            per_head_arguments={"position_bias": 1},
        ),
    ),
    positions_after_padding=True,
)

MODERNBERT = Family(
    "modernbert",
    (
        Stack(
            layers="layers",
            attention="attn",
            projections={"qkv": "attn.Wqkv", "o": "attn.Wo", "ffn_gate_in": "mlp.Wi", "ffn_out": "mlp.Wo"},
            activation_key="hidden_activation",
        ),
    ),
)

_VISION_ATTENTION = {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.o_proj",
}
_VISION_FFN = {"ffn_in": "mlp.fc1", "ffn_out": "mlp.fc2"}
VIT = Family(
    "vit",
    (
        Stack(
            layers="layers",
            attention="attention",
            projections=_VISION_ATTENTION | _VISION_FFN,
            head_attributes={"num_attention_heads": "heads"},
        ),
    ),
    since=(5, 16),
)

DINOV2 = Family(
    "dinov2",
    (
        Stack(
            layers="encoder.layer",
            attention="attention",
            projections=(
                _VISION_ATTENTION | _VISION_FFN,
                _VISION_ATTENTION | {"ffn_in": "mlp.up_proj", "ffn_gate": "mlp.gate_proj", "ffn_out": "mlp.down_proj"},
            ),
            head_attributes={"num_attention_heads": "heads"},
            width_key=None,
        ),
    ),
    since=(5, 23),
)

ENCODERS = (BERT, ELECTRA, ROBERTA, XLM_ROBERTA, CAMEMBERT, ESM, DISTILBERT, DEBERTA_V2, MPNET, MODERNBERT, VIT, DINOV2)
