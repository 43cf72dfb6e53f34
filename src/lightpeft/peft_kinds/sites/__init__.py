"""One view of the PEFT modules of a live model: where they are, what they add, how they are cut.

All that lightpeft knows of PEFT's classes is here: one `Site` class a PEFT kind, and LoRA computed in one step. Modules
are found by type, never by their names.
"""

from lightpeft.models.unwrap import base_layer, base_linear, transformers_model
from lightpeft.peft_kinds.sites.answering import fused_answers
from lightpeft.peft_kinds.sites.base import Site, peft_parts
from lightpeft.peft_kinds.sites.config_file import LIGHT_TYPE, hide_config, read_config
from lightpeft.peft_kinds.sites.fused import fused_lora
from lightpeft.peft_kinds.sites.registry import (
    adapter_in_use,
    check_config,
    check_peft,
    drop_reference,
    find_sites,
    leave_experts,
    own_adapter,
    refresh_config,
    remove_site,
    simplify_config,
    widens_alone,
)

__all__ = [
    "LIGHT_TYPE",
    "Site",
    "adapter_in_use",
    "base_layer",
    "base_linear",
    "check_config",
    "check_peft",
    "drop_reference",
    "find_sites",
    "fused_answers",
    "fused_lora",
    "hide_config",
    "leave_experts",
    "own_adapter",
    "peft_parts",
    "read_config",
    "refresh_config",
    "remove_site",
    "simplify_config",
    "transformers_model",
    "widens_alone",
]
