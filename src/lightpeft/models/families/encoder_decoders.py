"""Encoder-decoder families of text and speech: encoder, decoder, and cross-attention as blocks of its own."""

from dataclasses import replace

from lightpeft.models.families.spec import Family, Stack


def _t5_attention(name: str) -> dict[str, str]:
    return {slot: f"{name}.{slot}" for slot in ("q", "k", "v", "o")}


def _t5_ffn(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the projections of an FFN without and with a gate; the activation belongs to wi_0."""
    plain = {"ffn_in": f"{name}.wi", "ffn_out": f"{name}.wo"}
    gated = {"ffn_in": f"{name}.wi_1", "ffn_gate": f"{name}.wi_0", "ffn_out": f"{name}.wo"}
    return plain, gated


_T5_SELF = _t5_attention("layer.0.SelfAttention")
_T5_ENCODER = Stack(
    layers="encoder.block",
    attention="layer.0.SelfAttention",
    projections=tuple(_T5_SELF | ffn for ffn in _t5_ffn("layer.1.DenseReluDense")),
    head_attributes={"n_heads": "heads", "inner_dim": "width"},
    head_dim_key="d_kv",
    width_key="d_ff",
    activation_key="dense_act_fn",
    role="encoder",
    position_bias="layer.0.SelfAttention.relative_attention_bias",
    shared_arguments=("position_bias",),
    attention_outputs=3,
)
_T5_DECODER = replace(
    _T5_ENCODER,
    layers="decoder.block",
    projections=tuple(_T5_SELF | ffn for ffn in _t5_ffn("layer.2.DenseReluDense")),
    role="decoder",
)
_T5_CROSS = replace(
    _T5_DECODER,
    attention="layer.1.EncDecAttention",
    projections=_t5_attention("layer.1.EncDecAttention"),
    role="cross",
    position_bias=None,
)
T5 = Family("t5", (_T5_ENCODER, _T5_DECODER, _T5_CROSS), own_bias="has_relative_attention_bias")
MT5 = replace(T5, model_type="mt5")


def _bart_attention(name: str) -> dict[str, str]:
    return {"q": f"{name}.q_proj", "k": f"{name}.k_proj", "v": f"{name}.v_proj", "o": f"{name}.out_proj"}


_BART_FFN = {"ffn_in": "fc1", "ffn_out": "fc2"}
_BART_ENCODER = Stack(
    layers="encoder.layers",
    attention="self_attn",
    projections=_bart_attention("self_attn") | _BART_FFN,
    head_attributes={"num_heads": "heads"},
    heads_key="encoder_attention_heads",
    width_key="encoder_ffn_dim",
    activation_key="activation_function",
    role="encoder",
)
_BART_DECODER = replace(
    _BART_ENCODER,
    layers="decoder.layers",
    heads_key="decoder_attention_heads",
    width_key="decoder_ffn_dim",
    role="decoder",
)
_BART_CROSS = replace(
    _BART_DECODER, attention="encoder_attn", projections=_bart_attention("encoder_attn"), role="cross"
)
BART = Family("bart", (_BART_ENCODER, _BART_DECODER, _BART_CROSS))
MBART = replace(BART, model_type="mbart")
WHISPER = replace(BART, model_type="whisper", head_settings=("alignment_heads",))  # for timestamps of tokens

ENCODER_DECODERS = (T5, MT5, BART, MBART, WHISPER)
