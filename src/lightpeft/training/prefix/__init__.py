"""The frozen prefix: blocks below the lowest one that trains need no graph, and need to run only once."""

from lightpeft.training.prefix.batches import ROWS, Numbered, number_rows, with_states
from lightpeft.training.prefix.blocks import STATES, FrozenPrefix
from lightpeft.training.prefix.caching import Collate, PrefixCache, cache_prefix, lengths_of, obstacle
from lightpeft.training.prefix.mixin import PrefixMixin
from lightpeft.training.prefix.states import StateStore, store_bytes

__all__ = [
    "ROWS",
    "STATES",
    "Collate",
    "FrozenPrefix",
    "Numbered",
    "PrefixCache",
    "PrefixMixin",
    "StateStore",
    "cache_prefix",
    "lengths_of",
    "number_rows",
    "obstacle",
    "store_bytes",
    "with_states",
]
