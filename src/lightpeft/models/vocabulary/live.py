"""Cutting of a live model and its tokenizer to the same tokens."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        LightPeftError: the tokenizer is not a fast tokenizer of a type that can be cut, or the model cannot be cut (see
            `cut_model`).
    """
    needed = {token for row in rows for token in row} | config_tokens(model.config) | set(tokenizer.all_special_ids)
    size = model.config.get_text_config().vocab_size
    vocabulary = Vocabulary(kept_tokens(tokenizer, needed), size)
    small = cut_tokenizer(tokenizer, vocabulary)
    cut_model(model, vocabulary)
    return small
