"""Experts as transformers keeps them: 3-D parameters with all experts of a layer, and a router with a row for each.

What lies where is read off the live module: `gate_up_proj` and `down_proj` (with biases or without) are [experts, out,
in], or [experts, in, out] where the module says that they are transposed; gate and up come one after the other, or
channel by channel in turns.
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
"""Parameter -> the dimension that has the neurons, as it is and transposed; None: it has no entry a neuron."""
_WIDTHS = ("intermediate_dim", "intermediate_size")
"""Attributes in which modules of experts keep how wide each is."""


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one block, and their router; without PEFT around them."""

    experts: Any
    router: Any

    @classmethod
    def of(cls, model: nn.Module, modules: dict[str, str]) -> ExpertLayer:
        """That whose modules have these names in a transformers model ("router" and "experts", as in `BlockSpec`).

        Raises:
            LightPeftError: it is kept in another way than transformers keeps experts in floating point.
        """
        try:
            layer = cls(*(base_layer(model.get_submodule(modules[part])) for part in ("experts", "router")))
        except AttributeError as error:
            raise LightPeftError(f"there is no module {modules['experts']} with a router") from error
        layer.check(modules["experts"])
        return layer

    def check(self, where: str) -> None:
        """Raise `LightPeftError` where parameters are others than those that are known here."""
        own = dict(self.experts.named_parameters(recurse=False))
        others = sorted(own.keys() - _CHANNELS.keys())
        plain = {"gate_up_proj", "down_proj"} <= own.keys() and all(p.is_floating_point() for p in own.values())
        kept = "lightpeft cuts experts that are single 3-D parameters in floating point"
        require(plain and not others, f"{where} is a {type(self.experts).__name__} with other parameters: {kept}")
        rows = all(tensor.shape[0] == self.count for _, tensor in self._of_router())
        require(rows, f"the router of {where} has parameters that are no rows of experts")

    @property
    def count(self) -> int:
        """Experts."""
        return int(self.experts.down_proj.shape[0])

    @property
    def width(self) -> int:
        """Intermediate channels of each."""
        return int(self.experts.down_proj.shape[self._dim("down_proj") or 0])

    @property
    def per_token(self) -> int:
        """Experts that a token is routed to."""
        return int(self.router.top_k)

    @property
    def groups(self) -> int:
        """Groups of equally many experts, one after the other, of which the router chooses some first."""
        return int(getattr(self.router, "num_group", None) or 1)

    @property
    def fewest(self) -> int:
        """Experts that have to stay, equally many of every group: enough for a token in the groups that it chooses, and
        two each, as groups are ranked by their two best."""
        chosen = int(getattr(self.router, "topk_group", None) or self.groups)
        of_group = math.ceil(self.per_token / chosen)
        return self.groups * (of_group if getattr(self.router, "num_group", None) is None else max(of_group, 2))

    @property
    def expert_parameters(self) -> int:
        """Parameters that one expert takes with it, its row of the router included."""
        own = sum(parameter.numel() for _, parameter in self._parameters())
        return (own + sum(p.numel() for p in self.router.parameters(recurse=False))) // self.count

    @property
    def neuron_parameters(self) -> int:
        """Parameters that one neuron of one expert takes with it."""
        inside = (p.numel() for name, p in self._parameters() if self._dim(name) is not None)
        return sum(inside) // (self.count * self.width)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All that a cut takes a part of, by "experts.<name>" and "router.<name>"."""
        for part, tensors in (("experts", self._parameters()), ("router", self._of_router())):
            for name, tensor in tensors:
                yield f"{part}.{name}", tensor.detach()

    def squares(self) -> tuple[Tensor, Tensor]:
        """Sums of squares of the weights of each expert (with its row of the router) and of each of its neurons.

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
        """Keep some experts, and of each of these some neurons, in place.

        Args:
            experts: which stay, ascending, [kept].
            neurons: channels of each that stay, [kept, width].
        """
        before, parts = (self.count, self.width), {"experts": self.experts, "router": self.router}
        kept = {name: placed_like(self.part(name, whole(w), experts, neurons), w) for name, w in self.weights()}
        for name, weight in kept.items():
            part, _, own = name.partition(".")
            dense = getattr(parts[part], own)
            parameter = isinstance(dense, nn.Parameter)
            setattr(parts[part], own, nn.Parameter(weight, dense.requires_grad) if parameter else weight)
        self._say(*before)

    def part(self, name: str, weight: Tensor, experts: Tensor, neurons: Tensor) -> Tensor:
        """What stays of one of the dense `weights`; arguments as for `cut`."""
        part, _, own = name.partition(".")
        kept = weight.index_select(0, experts.to(weight.device))
        dim = self._dim(own) if part == "experts" else None
        if dim is not None and neurons.shape[1] < self.width:
            kept = gather(kept, self.channels(own, neurons).to(weight.device), dim)
        return kept.contiguous()

    def _say(self, count: int, width: int) -> None:
        """Write the counts into the attributes of both modules that had those of before."""
        for module, name in ((self.experts, "num_experts"), (self.router, "num_experts")):
            if getattr(module, name, None) == count:
                setattr(module, name, self.count)
        for name in _WIDTHS:
            if getattr(self.experts, name, None) == width:
                setattr(self.experts, name, self.width)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        own = dict(self.experts.named_parameters(recurse=False))
        yield from ((name, own[name]) for name in _CHANNELS if name in own)

    def _of_router(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.router.named_parameters(recurse=False)
        yield from self.router.named_buffers(recurse=False)

    def _dim(self, name: str) -> int | None:
        """The dimension of a parameter that has the neurons."""
        return _CHANNELS.get(name, (None, None))[bool(getattr(self.experts, "is_transposed", False))]

    @property
    def _in_turns(self) -> bool:
        """Whether gate and up of a neuron lie side by side."""
        return not getattr(self.experts, "is_concatenated", True)

    def _pairs(self, channels: Tensor) -> Tensor:
        """[experts, 2 * neurons] of a fused parameter -> [experts, neurons, 2]."""
        return channels.view(len(channels), -1, 2) if self._in_turns else channels.view(len(channels), 2, -1).mT

    def channels(self, name: str, neurons: Tensor) -> Tensor:
        """Entries of a parameter that belong to these neurons: [kept, width], or twice as many of a fused one."""
        if not _is_fused(name):
            return neurons
        if self._in_turns:
            return torch.stack([2 * neurons, 2 * neurons + 1], dim=2).flatten(1)
        return torch.cat([neurons, neurons + self.width], dim=1)


def _is_fused(name: str) -> bool:
    return name.startswith("gate_up")


def gather(weights: Tensor, index: Tensor, dim: int) -> Tensor:
    """Other entries of every expert along a dimension; [experts, ...], index [experts, entries]."""
    shape = [1] * weights.dim()
    shape[0], shape[dim] = index.shape
    sizes = list(weights.shape)
    sizes[dim] = index.shape[1]
    return weights.gather(dim, index.view(shape).expand(sizes))
