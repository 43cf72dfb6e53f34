"""Routed experts of transformers: 3-D parameters with all experts of a layer, and a router with one row per expert.

The live module determines the layout: `gate_up_proj` and `down_proj` (with biases or without) are [experts, out, in],
or [experts, in, out] if the module's `is_transposed` is set; gate and up are concatenated, or interleaved by channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.errors import LightPeftError, require
from lightpeft.models.sharding import placed_like, whole
from lightpeft.models.unwrap import base_layer

_CHANNELS: dict[str, tuple[int | None, int | None]] = {
    "gate_up_proj": (1, 2),
    "gate_up_proj_bias": (1, 1),
    "down_proj": (2, 1),
    "down_proj_bias": (None, None),
}
"""Parameter -> dimension of the neurons, plain and transposed; None: it has no entry per neuron."""
_WIDTHS = ("intermediate_dim", "intermediate_size")
"""Attributes of modules of experts with the width of each expert."""


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one block and their router, without PEFT around them."""

    experts: Any
    router: Any

    @classmethod
    def of(cls, model: nn.Module, modules: dict[str, str]) -> ExpertLayer:
        """Make the layer from the names of its modules, "router" and "experts" (`BlockSpec.expert_modules`).

        Raises:
            LightPeftError: the parameters differ from those of transformers' experts in floating point.
        """
        try:
            layer = cls(*(base_layer(model.get_submodule(modules[part])) for part in ("experts", "router")))
        except AttributeError as error:
            raise LightPeftError(f"the model has no module {modules['experts']} with a router") from error
        layer.check(modules["experts"])
        return layer

    def check(self, where: str) -> None:
        """Raise `LightPeftError` if the modules have unknown parameters; `where` names the experts."""
        own = dict(self.experts.named_parameters(recurse=False))
        others = sorted(own.keys() - _CHANNELS.keys())
        plain = {"gate_up_proj", "down_proj"} <= own.keys() and all(p.is_floating_point() for p in own.values())
        kept = "lightpeft cuts experts that are 3-D parameters in floating point only"
        require(plain and not others, f"{where} is a {type(self.experts).__name__} with unknown parameters; {kept}")
        rows = all(tensor.shape[0] == self.count for _, tensor in self._router_tensors())
        require(rows, f"the router of {where} cannot be cut: a parameter does not have one row per expert")

    @property
    def count(self) -> int:
        """Number of experts."""
        return int(self.experts.down_proj.shape[0])

    @property
    def width(self) -> int:
        """Intermediate channels of each expert."""
        return int(self.experts.down_proj.shape[self._dim("down_proj") or 0])

    @property
    def per_token(self) -> int:
        """Number of experts that a token is routed to."""
        return int(self.router.top_k)

    @property
    def groups(self) -> int:
        """Number of groups of consecutive experts, among which the router chooses first."""
        return int(getattr(self.router, "num_group", None) or 1)

    @property
    def fewest(self) -> int:
        """Minimum number of experts that the router needs, equally many of every group.

        The chosen groups need enough experts for a token; each needs two, because groups are ranked by their two best.
        """
        chosen = int(getattr(self.router, "topk_group", None) or self.groups)
        of_group = math.ceil(self.per_token / chosen)
        return self.groups * (of_group if getattr(self.router, "num_group", None) is None else max(of_group, 2))

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert, its row of the router included."""
        own = sum(parameter.numel() for _, parameter in self._parameters())
        return (own + sum(p.numel() for p in self.router.parameters(recurse=False))) // self.count

    @property
    def neuron_parameters(self) -> int:
        """Parameters of one neuron of one expert."""
        inside = (p.numel() for name, p in self._parameters() if self._dim(name) is not None)
        return sum(inside) // (self.count * self.width)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors that a cut changes, with their names "experts.<name>" and "router.<name>"."""
        for part, tensors in (("experts", self._parameters()), ("router", self._router_tensors())):
            for name, tensor in tensors:
                yield f"{part}.{name}", tensor.detach()

    def squares(self) -> tuple[Tensor, Tensor]:
        """Sum up the squared weights of each expert (with its row of the router) and of each of its neurons.

        Returns:
            [experts] and [experts * neurons of each], float32.
        """
        neurons = torch.zeros(self.count, self.width, device=self.experts.down_proj.device)
        experts = torch.zeros(self.count, device=neurons.device)
        for name, parameter in (*self._parameters(), *self.router.named_parameters(recurse=False)):
            squares = whole(parameter).float().square()
            experts += squares.flatten(1).sum(1) if squares.dim() > 1 else squares
            dim = self._dim(name)
            if dim is not None:
                rest = [other for other in range(1, squares.dim()) if other != dim]
                channels = squares.sum(rest) if rest else squares
                neurons += channels if not _is_fused(name) else self._pairs(channels).sum(2)
        return experts, neurons.flatten()

    @torch.no_grad()
    def cut(self, experts: Tensor, neurons: Tensor) -> None:
        """Keep some experts, and some neurons of each of these, in place.

        Args:
            experts: experts to keep, ascending, [kept].
            neurons: channels to keep of each, [kept, width].
        """
        before, parts = (self.count, self.width), {"experts": self.experts, "router": self.router}
        kept = {name: placed_like(self.part(name, whole(w), experts, neurons), w) for name, w in self.weights()}
        for name, weight in kept.items():
            part, _, own = name.partition(".")
            dense = getattr(parts[part], own)
            parameter = isinstance(dense, nn.Parameter)
            setattr(parts[part], own, nn.Parameter(weight, dense.requires_grad) if parameter else weight)
        self._update_counts(*before)

    def part(self, name: str, weight: Tensor, experts: Tensor, neurons: Tensor) -> Tensor:
        """Cut one of the dense `weights`.

        Args:
            name: name of the weight in `weights`.
            weight: the dense weight.
            experts: experts to keep, ascending, [kept].
            neurons: channels to keep of each, [kept, width].
        """
        part, _, own = name.partition(".")
        kept = weight.index_select(0, experts.to(weight.device))
        dim = self._dim(own) if part == "experts" else None
        if dim is not None and neurons.shape[1] < self.width:
            kept = gather(kept, self.channels(own, neurons).to(weight.device), dim)
        return kept.contiguous()

    def _update_counts(self, count: int, width: int) -> None:
        """Update the attributes of both modules that held the counts before the cut."""
        for module, name in ((self.experts, "num_experts"), (self.router, "num_experts")):
            if getattr(module, name, None) == count:
                setattr(module, name, self.count)
        for name in _WIDTHS:
            if getattr(self.experts, name, None) == width:
                setattr(self.experts, name, self.width)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        own = dict(self.experts.named_parameters(recurse=False))
        yield from ((name, own[name]) for name in _CHANNELS if name in own)

    def _router_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.router.named_parameters(recurse=False)
        yield from self.router.named_buffers(recurse=False)

    def _dim(self, name: str) -> int | None:
        """Return the dimension of a parameter's neurons; None: it has no entry per neuron."""
        return _CHANNELS.get(name, (None, None))[bool(getattr(self.experts, "is_transposed", False))]

    @property
    def _interleaved(self) -> bool:
        """True if gate and up are interleaved by channel, and not concatenated."""
        return not getattr(self.experts, "is_concatenated", True)

    def _pairs(self, channels: Tensor) -> Tensor:
        """Pair gate and up channels of a fused parameter: [experts, 2 * neurons] -> [experts, neurons, 2]."""
        return channels.view(len(channels), -1, 2) if self._interleaved else channels.view(len(channels), 2, -1).mT

    def channels(self, name: str, neurons: Tensor) -> Tensor:
        """Return the entries of a parameter for these neurons: [kept, width], or [kept, 2 * width] if it is fused."""
        if not _is_fused(name):
            return neurons
        if self._interleaved:
            return torch.stack([2 * neurons, 2 * neurons + 1], dim=2).flatten(1)
        return torch.cat([neurons, neurons + self.width], dim=1)


def _is_fused(name: str) -> bool:
    return name.startswith("gate_up")


def gather(weights: Tensor, index: Tensor, dim: int) -> Tensor:
    """Select entries of every expert along a dimension: [experts, ...] by index [experts, entries]."""
    shape = [1] * weights.dim()
    shape[0], shape[dim] = index.shape
    sizes = list(weights.shape)
    sizes[dim] = index.shape[1]
    return weights.gather(dim, index.view(shape).expand(sizes))
