"""A smaller vocabulary: which tokens of a model stay, its tokenizer with these alone, and its rows of these alone."""

from lightpeft.models.vocabulary.closure import kept_tokens
from lightpeft.models.vocabulary.cutting import config_tokens, cut_config, cut_model, cut_parameters, vocabulary_of
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.models.vocabulary.tokenizer import cut_tokenizer

__all__ = [
    "Vocabulary",
    "config_tokens",
    "cut_config",
    "cut_model",
    "cut_parameters",
    "cut_tokenizer",
    "kept_tokens",
    "vocabulary_of",
]
