"""A smaller vocabulary: which tokens of a model stay, its tokenizer with these alone, and its rows of these alone."""

from lightpeft.models.vocabulary.closure import kept_tokens
from lightpeft.models.vocabulary.cutting import (
    check_whole,
    config_tokens,
    cut_config,
    cut_model,
    cut_parameters,
    rows_by_token,
    vocabulary_of,
)
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.models.vocabulary.live import cut_vocabulary
from lightpeft.models.vocabulary.tokenizer import cut_tokenizer

__all__ = [
    "Vocabulary",
    "check_whole",
    "config_tokens",
    "cut_config",
    "cut_model",
    "cut_parameters",
    "cut_tokenizer",
    "cut_vocabulary",
    "kept_tokens",
    "rows_by_token",
    "vocabulary_of",
]
