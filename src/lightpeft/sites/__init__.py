"""One view of the PEFT modules of a live model: where they are, what they add, how they are cut.

All that lightpeft knows of PEFT's classes is here: one `Site` class a PEFT kind, and LoRA computed in one step. Modules
are found by type, never by their names.
"""

from lightpeft.sites.base import Site, base_layer, base_linear, peft_parts, transformers_model
from lightpeft.sites.config_file import LIGHT_TYPE, hide_config, read_config
from lightpeft.sites.fused import fused_lora
from lightpeft.sites.registry import (
    adapter_in_use,
    check_peft,
    check_removable,
    drop_reference,
    find_sites,
    own_adapter,
    refresh_config,
    remove_site,
    restart_sites,
)

__all__ = [
    "LIGHT_TYPE",
    "Site",
    "adapter_in_use",
    "base_layer",
    "base_linear",
    "check_peft",
    "check_removable",
    "drop_reference",
    "find_sites",
    "fused_lora",
    "hide_config",
    "own_adapter",
    "peft_parts",
    "read_config",
    "refresh_config",
    "remove_site",
    "restart_sites",
    "transformers_model",
]
