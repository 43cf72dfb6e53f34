"""Tuner of PEFT that puts bottleneck adapters into a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightpeft.compat.peft import BaseTuner
from lightpeft.errors import LightPeftError, require
from lightpeft.models.families.family_table import block_specs
from lightpeft.peft_kinds.bottleneck.config import BottleneckConfig
from lightpeft.peft_kinds.bottleneck.layer import NO_MERGE, BottleneckLayer
from lightpeft.peft_kinds.bottleneck.registration import PREFIX


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters, made by `peft.get_peft_model` from a `BottleneckConfig`.

    Houlsby et al. 2019 (after attention and FFN), Pfeiffer et al. 2021 (after the FFN alone).
    """

    prefix = PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's name; placements take its place)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._record_places(self.peft_config[adapter_name], adapter_name)

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = placed_modules(self.model, str(peft_config.placement))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target, adapter_name)
        layer.update_layer(adapter_name, peft_config, peft_config.size_pattern.get(current_key, peft_config.size))
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _record_places(self, config: BottleneckConfig, adapter_name: str) -> None:
        """Set the configuration to the exact names of the modules with the adapter, and to its widths."""
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, BottleneckLayer) and adapter_name in module.size
        }
        if not layers:  # PEFT allows a placeholder that targets nothing
            return
        sizes = {name: layer.size[adapter_name] for name, layer in layers.items()}
        config.target_modules = sorted(layers)
        config.size_pattern = {name: size for name, size in sizes.items() if size != config.size}

    def _check_merge_allowed(self) -> None:
        raise LightPeftError(NO_MERGE)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own expects the name right before the parameter; here it is before `down`, `up` or `scaling`
        head, mark, tail = key.rpartition(f".bottleneck_adapters.{adapter_name}.")
        return (
            f"{head}.bottleneck_adapters.{tail}" if mark else super()._remove_adapter_name_from_key(key, adapter_name)
        )


def placed_modules(model: nn.Module, placement: str) -> list[str]:
    """Find the modules that get an adapter in a placement (see `BottleneckConfig.placement`), in the order of blocks.

    Args:
        model: a transformers model.
        placement: "houlsby" or "pfeiffer".

    Returns:
        Names of the modules that get an adapter.

    Raises:
        LightPeftError: the model is no transformers model of a supported family, or no block has such a projection.
    """
    if not isinstance(model, PreTrainedModel):
        raise LightPeftError(
            f'placement="{placement}" needs a transformers model, not a {type(model).__name__}; give target_modules'
        )
    blocks = [spec.projections for spec in block_specs(model)]
    slots = ("o", "ffn_out") if placement == "houlsby" else ("ffn_out",)
    targets = [block[slot] for block in blocks for slot in slots if slot in block]
    require(bool(targets), f'placement="{placement}" fits no block of {type(model).__name__}; give target_modules')
    return targets
