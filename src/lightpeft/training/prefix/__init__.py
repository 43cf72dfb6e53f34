"""The frozen prefix: blocks below the lowest one that trains need no graph, and need to run only once."""

from lightpeft.training.prefix.blocks import STATES, FrozenPrefix
from lightpeft.training.prefix.caching import CachedRows, Collate, PrefixCache, cache_prefix
from lightpeft.training.prefix.states import StateStore

__all__ = ["STATES", "CachedRows", "Collate", "FrozenPrefix", "PrefixCache", "StateStore", "cache_prefix"]
