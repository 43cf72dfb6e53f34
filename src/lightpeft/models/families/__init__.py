"""Model families that can be pruned, and the block structure of a live model."""

from lightpeft.models.families.family_table import register_family
from lightpeft.models.families.spec import Experts, Family, Stack

__all__ = ["Experts", "Family", "Stack", "register_family"]
