"""Which model families can be pruned, and the block structure of a live model."""

from lightpeft.families.registry import FAMILIES, REFUSED, block_specs, family_of, max_positions, register_family
from lightpeft.families.spec import Family, Stack

__all__ = ["FAMILIES", "REFUSED", "Family", "Stack", "block_specs", "family_of", "max_positions", "register_family"]
