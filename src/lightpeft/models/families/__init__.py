"""Which model families can be pruned, and the block structure of a live model."""

from lightpeft.models.families.proposal import propose_families
from lightpeft.models.families.registry import (
    FAMILIES,
    REFUSED,
    block_lists,
    block_specs,
    check_not_refused,
    family_of,
    max_positions,
    register_family,
)
from lightpeft.models.families.skeleton import random_inputs, skeleton, skeleton_config
from lightpeft.models.families.spec import Experts, Family, Stack

__all__ = [
    "FAMILIES",
    "REFUSED",
    "Experts",
    "Family",
    "Stack",
    "block_lists",
    "block_specs",
    "check_not_refused",
    "family_of",
    "max_positions",
    "propose_families",
    "random_inputs",
    "register_family",
    "skeleton",
    "skeleton_config",
]
