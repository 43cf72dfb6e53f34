"""vLLM serves merged light models of lightpeft, whose layers are unequally wide.

vLLM calls `register` in every process of its own, by the entry point `vllm.general_plugins`.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM what is in such a folder and what computes it; a second call changes nothing."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from lightpeft_vllm.configs import ARCHITECTURE, LIGHT_TYPE, MergedConfig
    from lightpeft_vllm.hooks import Hooks

    AutoConfig.register(LIGHT_TYPE, MergedConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"lightpeft_vllm.models:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Hooks
