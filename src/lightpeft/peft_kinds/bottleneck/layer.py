"""The adapter branch, and the layer that adds it to what a frozen layer gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Conv1D

from lightpeft.compat.peft import BaseTunerLayer
from lightpeft.compat.transformers import ACT2FN
from lightpeft.errors import LightPeftError, require
from lightpeft.peft_kinds.bottleneck.config import LEARNED, BottleneckConfig

NO_MERGE = (
    "bottleneck adapters cannot be merged into the base weights: they have a non-linearity; "
    "keep them as an adapter, or call unload() for the base model without them"
)


class Bottleneck(nn.Module):
    """The branch of one adapter (Houlsby et al. 2019): `scaling * up(non_linearity(down(dropout(x))))`.

    Args:
        width_in: features of what the branch reads.
        width_out: features of what it gives.
        size: width of the bottleneck.
        config: non-linearity, dropout, scaling and initialisation.
    """

    def __init__(self, width_in: int, width_out: int, size: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Linear(width_in, size)
        self.activation = ACT2FN[config.non_linearity]
        self.up = nn.Linear(size, width_out)
        # one element, not zero-dimensional: fully sharded training takes no parameters without a dimension
        learned = config.scaling == LEARNED
        self.scaling: float | nn.Parameter = nn.Parameter(torch.ones(1)) if learned else float(config.scaling)
        self.init = config.init
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again, in the way the configuration says (`BottleneckConfig.init`)."""
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if self.init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        else:
            for weight in (self.down.weight, self.up.weight):
                if self.init == "bert":
                    nn.init.normal_(weight, std=0.02)
                else:
                    nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)
        if isinstance(self.scaling, nn.Parameter):
            nn.init.ones_(self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """What the adapter adds, scaling included: [..., width_in] -> [..., width_out]."""
        delta: Tensor = self.up(self.activation(self.down(self.dropout(x))))
        return delta * (self.scaling.to(delta.dtype) if isinstance(self.scaling, Tensor) else self.scaling)


class ParallelInput:
    """What the module `source` reads, kept from its forward until the layer that runs later in the block takes it.

    Under gradient checkpointing both run again in the backward pass, in the same order, so the recomputed input is the
    one that is taken.
    """

    def __init__(self, name: str, source: nn.Module) -> None:
        self.name = name
        self._value: Tensor | None = None
        self._handle = source.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._value = args[0] if args else next(iter(kwargs.values()))

    def take(self) -> Tensor | None:
        """The input, which is no longer kept; None if the source did not run."""
        value, self._value = self._value, None
        return value

    def detach(self) -> None:
        """Take the hook off the source, for good."""
        self._handle.remove()
        self._value = None

    def __getstate__(self) -> dict[str, Any]:
        # a forward that was interrupted may have left an input, which a copy has no use for
        return self.__dict__ | {"_value": None}


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A frozen layer with bottleneck adapters on its output.

    `y = base_layer(x)`; each active adapter adds what its branch makes of `y`, or of the input of its source if it is
    parallel. Several active adapters all read the same `y`, so their order does not matter.

    Attributes:
        bottleneck_adapters: adapter name -> `Bottleneck`.
        size: adapter name -> width of its bottleneck.
        sources: adapter name -> `ParallelInput`, of parallel adapters.
    """

    adapter_layer_names = ("bottleneck_adapters",)
    other_param_names = ("size", "sources")

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
        self.sources: dict[str, ParallelInput] = {}
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._active_adapter = adapter_name

    @property
    def in_features(self) -> int:
        """Input features of the frozen layer."""
        return widths(self)[0]

    @property
    def out_features(self) -> int:
        """Output features of the frozen layer."""
        return widths(self)[1]

    def update_layer(
        self, adapter_name: str, config: BottleneckConfig, size: int, source: tuple[str, nn.Module] | None = None
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            config: what the branch is like.
            size: width of the bottleneck.
            source: name of the module whose input a parallel adapter reads, and the module; None for a serial adapter.

        Raises:
            LightPeftError: the name would be mistaken for a part of an adapter, or a layer's width is unknown.
        """
        width_in = self.out_features if source is None else widths(source[1])[0]
        branch = Bottleneck(width_in, self.out_features, size, config)
        parts = {name.partition(".")[0] for name, _ in branch.named_parameters()}
        require(adapter_name not in parts, f'an adapter cannot be called "{adapter_name}": a part of adapters is')
        self.detach_source(adapter_name)
        self.sources.pop(adapter_name, None)
        self.bottleneck_adapters[adapter_name] = branch
        self.size[adapter_name] = size
        if source is not None:
            self.sources[adapter_name] = ParallelInput(*source)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def detach_source(self, adapter_name: str | None = None) -> None:
        """Take the hooks of one adapter, or of all, off the modules that they read from.

        To be called before the layer is replaced by its base layer; a second call does nothing. A parallel adapter
        cannot run any more afterwards.
        """
        for name, source in self.sources.items():
            if adapter_name in (None, name):
                source.detach()

    def delete_adapter(self, adapter_name: str) -> None:
        self.detach_source(adapter_name)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise LightPeftError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing: no adapter is ever merged."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts back in the place of the layer."""
        if merge:
            self.merge(safe_merge, adapter_names)
        self.detach_source()
        return self.get_base_layer()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype that the frozen layer gives."""
        # taken whether they are used or not, so that nothing keeps them alive
        parallel = {name: source.take() for name, source in self.sources.items()}
        base = result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return base
        for name in self.active_adapters:
            if name in self.bottleneck_adapters:
                result = result + self._delta(name, parallel.get(name) if name in self.sources else base)
        return result.to(base.dtype)

    def _delta(self, name: str, read: Tensor | None) -> Tensor:
        if read is None:
            raise LightPeftError(
                f"adapter {name} reads the input of {self.sources[name].name}, which did not run before this layer; "
                "was that module replaced, or this layer detached?"
            )
        branch = cast(Bottleneck, self.bottleneck_adapters[name])
        return branch(self._cast_input_dtype(read, branch.down.weight.dtype))


def widths(layer: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer, also of one inside a tuner layer.

    Raises:
        LightPeftError: not a layer whose widths are known.
    """
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if not (hasattr(layer, "in_features") and hasattr(layer, "out_features")):
        raise LightPeftError(
            f"bottleneck adapters go on linear layers; a {type(layer).__module__}.{type(layer).__name__} is none"
        )
    return cast(int, layer.in_features), cast(int, layer.out_features)
