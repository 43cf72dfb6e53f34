"""The frozen prefix: blocks below the lowest trained one, which need no autograd graph and run only once per row."""

from lightpeft.training.prefix.blocks import STATES, FrozenPrefix
from lightpeft.training.prefix.caching import CachedRows, PrefixCache, cache_prefix
from lightpeft.training.prefix.keys import row_keys
from lightpeft.training.prefix.states import StateStore, store_bytes
from lightpeft.training.prefix.trainer import TrainerPrefix

__all__ = [
    "STATES",
    "CachedRows",
    "FrozenPrefix",
    "PrefixCache",
    "StateStore",
    "TrainerPrefix",
    "cache_prefix",
    "row_keys",
    "store_bytes",
]
