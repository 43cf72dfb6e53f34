"""Which model families can be pruned, and the block structure of a live model."""

from lightpeft.families.registry import FAMILIES, block_specs, family_of, max_positions
from lightpeft.families.spec import Family

__all__ = ["FAMILIES", "Family", "block_specs", "family_of", "max_positions"]
