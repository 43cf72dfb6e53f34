"""Checks of vLLM before it serves a light model: the widths of its layers, and settings that do not go with it."""

from __future__ import annotations

from typing import Any

from lightpeft_vllm.configs import read_widths, widths_of


class Hooks:
    """Called by vLLM, by these names, in the process of its user, for models of this package's architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Read the widths of the layers.

        Raises:
            ValueError: the folder does not say them.
        """
        read_widths(model_config.hf_config, model_config.model, model_config.revision)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Look at all settings.

        Raises:
            ValueError: naming the setting, and what to do instead.
        """
        parallel = vllm_config.parallel_config
        parts = parallel.tensor_parallel_size
        layer = undivided(vllm_config.model_config.hf_config, parts)
        if layer is not None:
            cannot = f"layer {layer} of this light model cannot be spread evenly over {parts} devices"
            raise ValueError(f"{cannot}; set tensor_parallel_size to 1")
        if parallel.pipeline_parallel_size > 1:
            raise ValueError("a light model is not spread over devices by layers; set pipeline_parallel_size to 1")
        if vllm_config.lora_config is not None:
            raise ValueError("a light model takes no adapters in vLLM; serve them over the dense base, or merge them")


def undivided(config: Any, parts: int) -> int | None:
    """The first layer whose heads or neurons cannot be spread evenly over `parts` devices; None: there is none."""
    layers = range(config.num_hidden_layers)
    return next((layer for layer in layers if any(n % parts for n in widths_of(config, layer).values())), None)
