"""Cutting of a live model and its tokenizer to the same tokens."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.errors import require
from lightpeft.models.vocabulary.closure import kept_tokens
from lightpeft.models.vocabulary.cutting import config_tokens, cut_model
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.models.vocabulary.tokenizer import cut_tokenizer


def cut_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Iterable[int]]
) -> PreTrainedTokenizerBase:
    """Cut the vocabulary of a model and its tokenizer to the tokens of some texts, and those that other texts need.

    Call it before PEFT is on the model. A light adapter that is trained on the model stores the kept tokens, and
    `light_tokenizer` makes the same tokenizer again.

    Example:
        tokenizer = cut_vocabulary(model, tokenizer, tokenizer(texts)["input_ids"])

    Args:
        model: a dense transformers model, which is cut in place.
        tokenizer: its tokenizer, which does not change.
        rows: input_ids of all texts of the task, labels and prompts included.

    Returns:
        The tokenizer for the cut model.

    Raises:
        LightPeftError: the tokenizer is not a fast tokenizer of a type that can be cut, or has more tokens than the
            model, or the model cannot be cut (see `cut_model`).
    """
    kept = kept_tokens(tokenizer, {token for row in rows for token in row} | config_tokens(model.config))
    size = model.config.get_text_config().vocab_size
    lacking = f"the model has rows for {size} tokens, and the tokenizer a token {kept[-1]}"
    require(kept[-1] < size, f"{lacking}; call model.resize_token_embeddings(len(tokenizer)) first")
    vocabulary = Vocabulary(kept, size)
    small = cut_tokenizer(tokenizer, vocabulary)
    cut_model(model, vocabulary)
    return small
