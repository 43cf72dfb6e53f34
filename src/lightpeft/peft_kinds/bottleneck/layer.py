"""The adapter branch, and the layer that adds it to the output of a frozen layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightpeft.compat.peft import BaseTunerLayer
from lightpeft.compat.transformers import ACT2FN
from lightpeft.errors import LightPeftError, require
from lightpeft.models.linears.linear_kinds import features
from lightpeft.peft_kinds.bottleneck.config import LEARNED, BottleneckConfig

NO_MERGE = (
    "bottleneck adapters cannot be merged into the base weights, because they are not linear; "
    "keep them as an adapter, or call unload() for the base model without them"
)


class Bottleneck(nn.Module):
    """The branch of one adapter (Houlsby et al. 2019): `scaling * up(non_linearity(down(dropout(x))))`.

    Args:
        width: features of the input and of the output.
        size: width of the bottleneck.
        config: non-linearity, dropout and scaling.
    """

    def __init__(self, width: int, size: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Linear(width, size)
        self.activation = ACT2FN[config.non_linearity]
        self.up = nn.Linear(size, width)
        # one element, not zero-dimensional: FSDP cannot shard parameters without a dimension
        learned = config.scaling == LEARNED
        self.scaling: float | nn.Parameter = nn.Parameter(torch.ones(1)) if learned else float(config.scaling)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the adapter's addition, scaling included: [..., width] -> [..., width]."""
        delta: Tensor = self.up(self.activation(self.down(self.dropout(x))))
        return delta * (self.scaling.to(delta.dtype) if isinstance(self.scaling, Tensor) else self.scaling)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A frozen layer with bottleneck adapters on its output.

    `y = base_layer(x)`; each active adapter adds `branch(y)`. All read the same `y`, so their order does not matter.

    Attributes:
        bottleneck_adapters: adapter name -> `Bottleneck`.
        size: adapter name -> width of its bottleneck.
    """

    adapter_layer_names = ("bottleneck_adapters",)
    other_param_names = ("size",)

    # PEFT's, declared because type checkers see `nn.Module.__getattr__` first
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    active_adapters: list[str]
    disable_adapters: bool
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_adapters = nn.ModuleDict()
        self.size: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._active_adapter = adapter_name

    @property
    def in_features(self) -> int:
        """Input features of the frozen layer."""
        return features(self.get_base_layer())[1]

    @property
    def out_features(self) -> int:
        """Output features of the frozen layer."""
        return features(self.get_base_layer())[0]

    def update_layer(self, adapter_name: str, config: BottleneckConfig, size: int) -> None:
        """Add an adapter.

        Args:
            adapter_name: name of the adapter.
            config: non-linearity, dropout and scaling of the branch.
            size: width of the bottleneck.

        Raises:
            LightPeftError: the name equals that of a part of an adapter, or the layer is not linear.
        """
        branch = Bottleneck(self.out_features, size, config)
        parts = {name.partition(".")[0] for name, _ in branch.named_parameters()}
        require(adapter_name not in parts, f'adapter name "{adapter_name}" is reserved; choose another name')
        self.bottleneck_adapters[adapter_name] = branch
        self.size[adapter_name] = size
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise LightPeftError(NO_MERGE)

    def unmerge(self) -> None:
        """Do nothing, because no adapter can be merged."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the frozen layer, which PEFT puts back in the place of this one."""
        if merge:
            self.merge(safe_merge, adapter_names)
        return self.get_base_layer()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer: [..., in_features] -> [..., out_features], in the data type of the frozen layer's output."""
        base = result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return base
        for name in self.active_adapters:
            if name in self.bottleneck_adapters:
                branch = cast(Bottleneck, self.bottleneck_adapters[name])
                result = result + branch(self._cast_input_dtype(base, branch.down.weight.dtype))
        return result.to(base.dtype)
