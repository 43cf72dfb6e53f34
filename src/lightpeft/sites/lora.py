"""LoRA modules (Hu et al. 2022), with rank-stabilised scaling if asked for (rsLoRA, Kalajdzievski 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightpeft.errors import LightPeftError, require
from lightpeft.linears import slice_linear
from lightpeft.sites.base import Report, Site, observe_pair

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "mica")
"""LoRA initialisations that write to the base weights."""
_UNSUPPORTED = (
    "use_dora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
"""LoRA settings that change what a module computes or where it sits in a way the site view does not know."""


class LoraSite(Site):
    """`base(x) + scaling * B A x`."""

    peft_type = PeftType.LORA
    layer_type = LoraLayer

    @classmethod
    def check(cls, config: LoraConfig) -> None:
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise LightPeftError(f'init_lora_weights="{start}" changes the base weights; use True, "gaussian" or "eva"')
        require(config.bias == "none", f'LoRA bias="{config.bias}" trains biases of the base; use bias="none"')
        for name in _UNSUPPORTED:
            require(not getattr(config, name, None), f"LoRA with {name} is not supported; use plain LoRA or rsLoRA")

    @classmethod
    def rank_of(cls, layer: LoraLayer, adapter: str) -> int:
        return layer.r.get(adapter, 0)

    @classmethod
    def refresh(cls, config: LoraConfig, layers: dict[str, LoraLayer], adapter: str) -> None:
        config.layers_to_transform = config.layers_pattern = None
        config.rank_pattern = {name: layer.r[adapter] for name, layer in layers.items() if layer.r[adapter] != config.r}
        config.alpha_pattern = {
            name: layer.lora_alpha[adapter]
            for name, layer in layers.items()
            if layer.lora_alpha[adapter] != config.lora_alpha
        }

    @property
    def down(self) -> nn.Parameter:
        """A, [rank, in]."""
        return self.layer.lora_A[self.adapter].weight

    @property
    def up(self) -> nn.Parameter:
        """B, [out, rank]."""
        return self.layer.lora_B[self.adapter].weight

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.layer.scaling[self.adapter]

    def observe(self, report: Report, counting: Callable[[], bool]) -> list[RemovableHandle]:
        """The low-rank output against the frozen layer's output (Light-PEFT, module importance)."""
        return observe_pair(self.base, self.layer.lora_B[self.adapter], self.scaling, report, counting)

    def cut(self, index: Tensor, dim: int) -> None:
        slice_linear((self.layer.lora_B if dim == 0 else self.layer.lora_A)[self.adapter], index, dim)
        if dim == 0:
            self.layer.out_features = len(index)
        else:
            self.layer.in_features = len(index)

    def keep_ranks(self, index: Tensor) -> None:
        """Keep these ranks; alpha shrinks with the rank, so that the scaling stays to the last bit."""
        slice_linear(self.layer.lora_A[self.adapter], index, dim=0)
        slice_linear(self.layer.lora_B[self.adapter], index, dim=1)
        rank = len(index)
        self.layer.r[self.adapter] = rank
        divisor = math.sqrt(rank) if self.layer.use_rslora[self.adapter] else rank
        self.layer.lora_alpha[self.adapter] = _exact_alpha(self.scaling, divisor)

    def restart(self) -> None:
        self.layer.reset_lora_parameters(self.adapter, init_lora_weights=True)


def _exact_alpha(scaling: float, divisor: float) -> float:
    """The float alpha with `alpha / divisor == scaling`, as PEFT will compute it; the nearest if there is none."""
    near = scaling * divisor
    candidates = [near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)]
    alpha: Any = min(candidates, key=lambda candidate: abs(candidate / divisor - scaling))
    return int(alpha) if alpha.is_integer() else alpha
