"""A tokenizer and its model: whether they belong together, and one token to pad with."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lightpeft.errors import require

LEAST_VOCABULARY = 0.1
"""Part of a model's embeddings that its tokenizer uses at least. Vocabularies padded to a round number use nearly all;
what transformers makes up where there are no tokenizer files is special tokens, of T5's 32,128 tokens 104."""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
    """Refuse a tokenizer that cannot be the model's own, because it knows next to nothing of its vocabulary.

    Raises:
        LightPeftError: so it is, as where the checkpoint has no tokenizer files.
    """
    known, embeddings = len(tokenizer), embeddings_of(model_config)
    require(
        embeddings is None or known >= LEAST_VOCABULARY * embeddings,
        f"the tokenizer knows {known:,} tokens, and the model has embeddings of {embeddings or 0:,}: the files of its "
        "tokenizer are missing or another model's; put those that belong to it into its folder",
    )


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
    """Give tokenizer and model config one padding token; a decoder without one pads with its end token.

    Padded positions have attention 0 and no label, so the choice changes no result. `*ForSequenceClassification`
    decoders find the last real token by `pad_token_id`, hence both sides must agree.

    Raises:
        LightPeftError: the tokenizer has neither a usable padding token nor an end token.
    """
    config = model_config.get_text_config()
    pad, vocabulary = tokenizer.pad_token_id, getattr(config, "vocab_size", None)
    # A padding token that was added to the tokenizer only has no row in the embedding.
    if pad is None or (vocabulary is not None and pad >= vocabulary):
        require(tokenizer.eos_token is not None, "the tokenizer has no padding token and no end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id


def embeddings_of(model_config: PretrainedConfig) -> int | None:
    """How many tokens a model has embeddings of; None where its config does not say."""
    return getattr(model_config.get_text_config(), "vocab_size", None)
