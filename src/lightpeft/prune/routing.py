"""Masks on routed experts and on the neurons inside them, and routers that leave experts out.

Experts compute `sum_e w_e(x) * E_e(x)` over those that the router sends a token to. A mask m_e scales the weight of an
expert, which is its weighted output; masks m_ej scale the neurons inside it. For them the experts run here, one after
the other: what transformers makes of them is one fused call that has no place for masks.

A mask of 0 is not yet a cut: tokens that the router sent to the expert lose it, where a router without the expert's row
sends them to the next one, and takes its probabilities over those that stay. What a plan cuts is therefore shown to the
router: its logits for them are -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightpeft.compat.transformers import gated
from lightpeft.errors import require
from lightpeft.models.experts import ExpertLayer


@dataclass(frozen=True)
class Masked:
    """The masks of one kind of a block, and what is known of their gradients."""

    values: Tensor
    """[units], which trains."""
    tally: Tensor
    """Sums over single examples of the sizes and of the squares of their gradients, [2, units]."""


class MaskedExperts:
    """In place of the forward pass of a module of experts: the same with masks."""

    def __init__(self, layer: ExpertLayer, experts: Masked, neurons: Masked) -> None:
        self._layer, self._experts, self._neurons = layer, experts, neurons
        self.masked: Callable[[], bool] = lambda: True
        """Whether a pass is masked."""
        self.examples: Callable[[int], int] = lambda tokens: 1
        """How many examples so many tokens are of."""
        self._forward = layer.experts.forward

    def attach(self) -> None:
        """Take the place of the module's forward pass."""
        vars(self._layer.experts)["forward"] = self

    def remove(self) -> None:
        """Give the place back."""
        vars(self._layer.experts).pop("forward", None)

    def __call__(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[tokens, hidden], experts of each token and their weights [tokens, experts of each] -> [tokens, hidden]."""
        if not self.masked():
            return self._forward(states, index, weights)
        # sorted as transformers does, not stably: on some CPUs a product rounds a row by its place among the others
        experts, order = index.flatten().sort()
        rows = order // index.shape[1]
        tokens = len(states)
        examples = self.examples(tokens)
        owners = _Owners(experts, rows * examples // tokens, examples)
        # how many rows each expert has is asked of the device once a layer, as transformers' own loop over experts does
        routed = _Routed(experts, experts.bincount(minlength=self._layer.count).tolist())
        hidden = self._linear("gate_up_proj", states[rows], routed)
        hidden = _ScaledUnits.apply(gated(self._layer.experts, hidden), self._neurons, owners, self._neurons.values)
        output = self._linear("down_proj", hidden, routed)
        weight = weights.flatten()[order].unsqueeze(1)
        output = output * _ScaledUnits.apply(weight, self._experts, owners, self._experts.values)
        return output[order.argsort()].view(tokens, index.shape[1], -1).sum(1).to(states.dtype)  # as transformers adds

    def _linear(self, name: str, states: Tensor, routed: _Routed) -> Tensor:
        """What each row's expert makes of it; rows are sorted by expert."""
        weight, bias = getattr(self._layer.experts, name), getattr(self._layer.experts, f"{name}_bias", None)
        transposed = getattr(self._layer.experts, "is_transposed", False)
        parts = states.to(weight.dtype).split(routed.counts)
        matrices = ((part, weight[expert]) for expert, part in enumerate(parts) if len(part))
        product = torch.cat([functional.linear(part, matrix.T if transposed else matrix) for part, matrix in matrices])
        return product if bias is None else product + bias[routed.experts]


@dataclass(frozen=True)
class _Routed:
    """Rows sorted by expert: which it is, and how many rows each has."""

    experts: Tensor
    counts: list[int]


@dataclass(frozen=True)
class _Owners:
    """Which expert and which example rows belong to."""

    experts: Tensor
    examples: Tensor
    count: int
    """Examples."""


class _ScaledUnits(torch.autograd.Function):
    """Rows [rows, units] times the masks of their experts [experts * units]; the last argument says what is trained."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, masked: Masked, owners: _Owners, values: Tensor) -> Tensor:
        ctx.masked, ctx.owners = masked, owners
        ctx.save_for_backward(rows)
        return rows * _of_rows(values, owners, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,), masked, owners = ctx.saved_tensors, ctx.masked, ctx.owners
        units = rows.shape[1]
        experts = len(masked.values) // units
        products = gradient.float() * rows.float()
        sums = products.new_zeros(owners.count * experts, units)
        sums.index_add_(0, owners.examples * experts + owners.experts, products)
        of_examples = sums.view(owners.count, -1)
        masked.tally[0] += of_examples.abs().sum(0)
        masked.tally[1] += of_examples.square().sum(0)
        return gradient * _of_rows(masked.values, owners, gradient), None, None, of_examples.sum(0)


def _of_rows(values: Tensor, owners: _Owners, rows: Tensor) -> Tensor:
    return values.detach().view(-1, rows.shape[1]).to(rows.dtype)[owners.experts]


_CASTS = (Tensor.type, Tensor.to, Tensor.float)
"""By which routers compute in float32, whatever their weights are in."""
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
"""By which they add corrections to scores."""


class ClosedRouter:
    """Hooks on a router by which it leaves some experts out, as if it had no rows for them."""

    def __init__(self, router: Any, closed: Callable[[], Tensor | None]) -> None:
        """
        Args:
            closed: what are left out now, a mask [experts]; None: none.
        """
        self._router, self._closed = router, closed
        self._mode: _Closing | None = None
        self._handles = [
            router.register_forward_pre_hook(self._begin),
            router.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        closed = self._closed()
        if closed is not None:
            self._mode = _Closing(self._router.weight, list(self._router.buffers(recurse=False)), closed)
            self._mode.__enter__()

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)
            name = type(module).__name__
            require(mode.seen or output is None, f"{name} makes its logits in a way in which no expert can be left out")


class _Closing(TorchFunctionMode):
    """Inside it, linear layers with a router's weight give -inf for some of its rows, and so does adding what corrects
    the choice among experts: scores that are no softmax are 0 there, and with the correction perhaps the highest."""

    def __init__(self, weight: Tensor, corrections: Sequence[Tensor], closed: Tensor) -> None:
        super().__init__()
        self._weight, self._corrections, self._closed = weight, corrections, closed
        self._cast: Tensor | None = None
        self.seen = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _CASTS and args[0] is self._weight:
            self._cast = result
        logits = function is functional.linear and (args[1] is self._weight or args[1] is self._cast)
        corrected = function in _SUMS and any(part is each for part in args for each in self._corrections)
        if logits or corrected:
            self.seen = True
            return result.masked_fill(self._closed.to(result.device), float("-inf"))
        return result
