"""LoRA modules (Hu et al. 2022), optionally with rank-stabilised scaling (rsLoRA, Kalajdzievski 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftType
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightpeft.compat.peft import LoraLayer
from lightpeft.errors import LightPeftError, require
from lightpeft.models.linears.linear_kinds import slice_linear
from lightpeft.peft_kinds.sites.base import ReportOutputs, Site, Tensors, observe_pair, spread

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "mica")
"""Prefixes of LoRA initializations that change the base weights."""
_UNSUPPORTED = (
    "use_bdlora",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
)
"""LoRA settings that change the computation or the place of a module in a way that pruning does not support."""

DOWN, UP, UP_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
"""Names in PEFT's files of A, B, and the bias that `lora_bias=True` trains."""


class LoraSite(Site):
    """Access to `base(x) + scaling * B A x`."""

    peft_type = PeftType.LORA
    layer_type = LoraLayer

    @classmethod
    def check(cls, config: LoraConfig) -> None:
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise LightPeftError(f'init_lora_weights="{start}" changes the base weights; use True, "gaussian" or "eva"')
        require(
            config.bias == "none",
            f'LoRA with bias="{config.bias}" changes biases of the base, which tasks share; use bias="none"',
        )
        for name in _UNSUPPORTED:
            require(not getattr(config, name, None), f"LoRA with {name} cannot be pruned; use LoRA, rsLoRA or DoRA")
        parameters = sorted(config.target_parameters or ())
        require(
            not parameters,
            f"LoRA on the parameter {', '.join(parameters[:1])} cannot be pruned; leave target_parameters out, and "
            "give linear layers in target_modules",
        )

    @classmethod
    def rank_of(cls, layer: LoraLayer, adapter: str) -> int:
        return layer.r.get(adapter, 0)

    @classmethod
    def refresh(cls, config: LoraConfig, layers: dict[str, LoraLayer], adapter: str) -> None:
        config.target_parameters = None
        config.layers_to_transform = config.layers_pattern = None
        if config.init_lora_weights == "orthogonal":  # it would need even ranks when the adapter is loaded
            config.init_lora_weights = True
        config.rank_pattern = {name: layer.r[adapter] for name, layer in layers.items() if layer.r[adapter] != config.r}
        config.alpha_pattern = {
            name: layer.lora_alpha[adapter]
            for name, layer in layers.items()
            if layer.lora_alpha[adapter] != config.lora_alpha
        }

    @classmethod
    def simplify(cls, config: LoraConfig) -> None:
        """Set one rank for all modules if their scaling is equal, because inference servers read no patterns."""
        ranks = {name: config.rank_pattern.get(name, config.r) for name in config.target_modules}
        alphas = {name: config.alpha_pattern.get(name, config.lora_alpha) for name in ranks}
        scalings = {alphas[name] / _divisor(rank, config.use_rslora) for name, rank in ranks.items()}
        if len(scalings) == 1:
            config.r = max(ranks.values())
            config.lora_alpha = _exact_alpha(scalings.pop(), _divisor(config.r, config.use_rslora))
            config.rank_pattern, config.alpha_pattern = {}, {}

    @property
    def down(self) -> nn.Parameter:
        """Weight A, [rank, in]."""
        return self.layer.lora_A[self.adapter].weight

    @property
    def up(self) -> nn.Parameter:
        """Weight B, [out, rank]."""
        return self.layer.lora_B[self.adapter].weight

    @property
    def scaling(self) -> float:
        """Factor alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.layer.scaling[self.adapter]

    def keep_ranks(self, index: Tensor) -> None:
        """Keep these ranks; alpha shrinks with the rank, so that the scaling is bit-equal."""
        slice_linear(self.layer.lora_A[self.adapter], index, dim=0)
        slice_linear(self.layer.lora_B[self.adapter], index, dim=1)
        rank = len(index)
        self.layer.r[self.adapter] = rank
        divisor = _divisor(rank, self.layer.use_rslora[self.adapter])
        self.layer.lora_alpha[self.adapter] = _exact_alpha(self.scaling, divisor)

    def observe(self, report: ReportOutputs, counting: Callable[[], bool]) -> list[RemovableHandle]:
        """Hook the module to report its low-rank output and the frozen layer's (Light-PEFT, module importance)."""
        return observe_pair(self.base, self.layer.lora_B[self.adapter], self.scaling, report, counting)

    def cut(self, index: Tensor, dim: int) -> None:
        slice_linear((self.layer.lora_B if dim == 0 else self.layer.lora_A)[self.adapter], index, dim)
        if dim == 0:
            self.layer.out_features = len(index)
        else:
            self.layer.in_features = len(index)

    def expanded_to_dense(self, learned: Tensors, index: Tensor, dim: int) -> Tensors:
        """Expand to the dense layer: restored rows of B and of its bias, columns of A, and ranks are zero."""
        wide, ranks = dict(learned), torch.arange(len(learned[DOWN]))
        wide[DOWN] = spread(wide[DOWN], ranks, 0, self.down.shape[0])
        wide[UP] = spread(wide[UP], ranks, 1, self.up.shape[1])
        cut, size = (UP, self.up.shape[0]) if dim == 0 else (DOWN, self.down.shape[1])
        wide[cut] = spread(wide[cut], index, dim, size)
        if UP_BIAS in learned and dim == 0:
            wide[UP_BIAS] = spread(wide[UP_BIAS], index, 0, size)
        return wide


def _divisor(rank: int, rank_stabilised: bool) -> float:
    """Return the divisor of alpha in the scaling."""
    return math.sqrt(rank) if rank_stabilised else rank


def _exact_alpha(scaling: float, divisor: float) -> float:
    """Return the float alpha with `alpha / divisor == scaling` in PEFT's arithmetic; the nearest if there is none."""
    near = scaling * divisor
    candidates = [near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)]
    alpha: Any = min(candidates, key=lambda candidate: abs(candidate / divisor - scaling))
    return int(alpha) if alpha.is_integer() else alpha
