"""Checks that a tokenizer and a model belong together, and their padding token."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lightpeft.errors import require

LEAST_VOCABULARY = 0.1
"""Minimum fraction of a model's embeddings that its tokenizer uses. Vocabularies padded to a round number use nearly
all; without tokenizer files transformers makes special tokens only, for T5 104 of 32,128 tokens."""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
    """Check that a tokenizer knows a plausible fraction of the model's vocabulary.

    Raises:
        LightPeftError: it knows next to nothing, for example because the checkpoint has no tokenizer files.
    """
    known, embeddings = len(tokenizer), embeddings_of(model_config)
    require(
        embeddings is None or known >= LEAST_VOCABULARY * embeddings,
        f"the tokenizer knows {known:,} tokens, and the model has {embeddings or 0:,} embeddings: tokenizer files are "
        "missing or belong to another model; put those of the model into its folder",
    )


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
    """Set the same padding token in tokenizer and model config: the tokenizer's, else its end token.

    Padded positions have attention 0 and no label, so the choice changes no result. `*ForSequenceClassification`
    decoders find the last real token by `pad_token_id`, so both sides must agree.

    Raises:
        LightPeftError: the tokenizer has neither a usable padding token nor an end token.
    """
    config = model_config.get_text_config()
    pad, vocabulary = tokenizer.pad_token_id, getattr(config, "vocab_size", None)
    # A padding token that was added to the tokenizer only has no row in the embedding.
    if pad is None or (vocabulary is not None and pad >= vocabulary):
        require(tokenizer.eos_token is not None, "the tokenizer has no padding and no end token; set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id


def embeddings_of(model_config: PretrainedConfig) -> int | None:
    """Return the number of a model's token embeddings; None if its config does not have it."""
    return getattr(model_config.get_text_config(), "vocab_size", None)
