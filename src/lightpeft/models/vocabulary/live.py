"""A live model and its tokenizer, cut together."""

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
    """Leave a model and its tokenizer the tokens that some texts take, and what lets every text still be tokenised.

    Call it before PEFT is on the model. What is trained on it and saved as a light adapter knows which tokens it has,
    and `light_tokenizer` gives the same tokenizer again.

    Args:
        model: a dense transformers model, which is cut in place.
        tokenizer: its tokenizer, which stays as it is.
        rows: input_ids of all texts that count, labels and prompts included.

    Returns:
        The tokenizer that the model takes from now on.

    Raises:
        LightPeftError: the tokenizer is not a fast one of a kind that can be cut, or the model cannot be (see
            `cut_model`).
    """
    needed = {token for row in rows for token in row} | config_tokens(model.config) | set(tokenizer.all_special_ids)
    size = model.config.get_text_config().vocab_size
    vocabulary = Vocabulary(kept_tokens(tokenizer, needed), size)
    small = cut_tokenizer(tokenizer, vocabulary)
    cut_model(model, vocabulary)
    return small
