"""Tokenizers: loading, checks that they belong to a model, and their padding token."""

from __future__ import annotations

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lightpeft.config import ModelConfig
from lightpeft.config.validation import short_repr
from lightpeft.errors import require
from lightpeft.models.loading import check_checkpoint, explain_errors
from lightpeft.models.repositories import Token

LEAST_VOCABULARY = 0.1
"""Minimum fraction of a model's embeddings that its tokenizer uses. Vocabularies padded to a round number use nearly
all; without tokenizer files transformers makes special tokens only, for T5 104 of 32,128 tokens."""


def load_tokenizer(
    config: ModelConfig, own: PretrainedConfig | None = None, token: Token = None
) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Args:
        own: configuration of the model, if transformers cannot find it itself; None: it can.
        token: access token for the hub; None: that of the logged-in account, if any.

    Raises:
        LightPeftError: there is no tokenizer, or its files are damaged.
    """
    with explain_errors(config):
        options = check_checkpoint(config, token=token)
        tokenizer = AutoTokenizer.from_pretrained(config.name, **({} if own is None else {"config": own}), **options)
    _check_tokenizer(tokenizer, config.name)
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check settings of a tokenizer that transformers does not check."""
    longest, inputs = tokenizer.model_max_length, tokenizer.model_input_names
    fits = isinstance(longest, (int, float)) and not isinstance(longest, bool) and longest >= 1
    says = f"the tokenizer of model {name} has"
    require(fits, f"{says} model_max_length {short_repr(longest)}, which is not a number of tokens; correct its files")
    known = isinstance(inputs, (list, tuple)) and "input_ids" in inputs and all(isinstance(n, str) for n in inputs)
    require(known, f"{says} model_input_names {short_repr(inputs)}; it must be a list of names with input_ids")


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
