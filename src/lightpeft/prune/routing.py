"""Masks on routed experts and on their neurons, and routers that exclude experts.

Experts compute `sum_e w_e(x) * E_e(x)` over the experts that the router chooses for a token. A mask m_e scales the
weight of an expert, and so its output; masks m_ej scale its neurons. The experts run here one after the other, because
transformers' fused call cannot apply masks.

A mask of 0 differs from a cut: tokens that the router sends to the expert lose its output, where a router without the
expert's row would send them to another one, and normalize over the others. To simulate a cut, the router's logits of
removed experts are set to -inf.
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
    """Masks of one kind of units of a block, with statistics of their gradients."""

    values: Tensor
    """Trainable masks, [units]."""
    tally: Tensor
    """Sums over examples of the absolute and of the squared gradients, [2, units]."""


class MaskedExperts:
    """Forward pass of a module of experts with masks, in place of its own."""

    def __init__(
        self,
        layer: ExpertLayer,
        experts: Masked,
        neurons: Masked,
        masked: Callable[[], bool],
        owners: Callable[[Tensor, int], tuple[Tensor, int]],
    ) -> None:
        """Replace the module's forward pass.

        Args:
            masked: function that returns whether the current pass is masked.
            owners: function from token numbers [rows], and the number of tokens, to the indices of the examples that
                they belong to, [rows], and the number of examples.
        """
        self._layer, self._experts, self._neurons = layer, experts, neurons
        self._masked, self._owners = masked, owners
        self._forward = layer.experts.forward
        vars(layer.experts)["forward"] = self

    def remove(self) -> None:
        """Restore the module's forward pass."""
        vars(self._layer.experts).pop("forward", None)

    def __call__(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute the experts' output, [tokens, hidden].

        Args:
            states: [tokens, hidden].
            index: experts of each token, [tokens, experts per token].
            weights: weights of these experts, [tokens, experts per token].
        """
        if not self._masked():
            return self._forward(states, index, weights)
        # sorted as transformers does, not stably: on some CPUs the rounding of a row depends on its position
        experts, order = index.flatten().sort()
        rows = order // index.shape[1]
        tokens = len(states)
        owners = _Owners(experts, *self._owners(rows, tokens))
        # one copy of the counts to the host for each layer, as in transformers' own loop over experts
        routed = _RoutedRows(experts, experts.bincount(minlength=self._layer.count).tolist())
        hidden = self._linear("gate_up_proj", states[rows], routed)
        hidden = _ScaledUnits.apply(gated(self._layer.experts, hidden), self._neurons, owners, self._neurons.values)
        output = self._linear("down_proj", hidden, routed)
        weight = weights.flatten()[order].unsqueeze(1)
        output = output * _ScaledUnits.apply(weight, self._experts, owners, self._experts.values)
        return output[order.argsort()].view(tokens, index.shape[1], -1).sum(1).to(states.dtype)  # as transformers adds

    def _linear(self, name: str, states: Tensor, routed: _RoutedRows) -> Tensor:
        """Apply a projection of each row's expert; rows are sorted by expert."""
        weight, bias = getattr(self._layer.experts, name), getattr(self._layer.experts, f"{name}_bias", None)
        transposed = getattr(self._layer.experts, "is_transposed", False)
        parts = states.to(weight.dtype).split(routed.counts)
        matrices = ((part, weight[expert]) for expert, part in enumerate(parts) if len(part))
        product = torch.cat([functional.linear(part, matrix.T if transposed else matrix) for part, matrix in matrices])
        return product if bias is None else product + bias[routed.experts]


@dataclass(frozen=True)
class _RoutedRows:
    """Expert of each row, and number of rows of each expert, for rows sorted by expert."""

    experts: Tensor
    counts: list[int]


@dataclass(frozen=True)
class _Owners:
    """Expert and example of each row."""

    experts: Tensor
    examples: Tensor
    count: int
    """Number of examples."""


class _ScaledUnits(torch.autograd.Function):
    """Multiply rows [rows, units] by the masks of their experts [experts * units].

    The last argument repeats the masks as a tensor, so that autograd computes their gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, masked: Masked, owners: _Owners, values: Tensor) -> Tensor:
        ctx.masked, ctx.owners = masked, owners
        ctx.save_for_backward(rows)
        return rows * _masks_of_rows(values, owners, rows)

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
        return gradient * _masks_of_rows(masked.values, owners, gradient), None, None, of_examples.sum(0)


def _masks_of_rows(values: Tensor, owners: _Owners, rows: Tensor) -> Tensor:
    return values.detach().view(-1, rows.shape[1]).to(rows.dtype)[owners.experts]


_CASTS = (Tensor.type, Tensor.to, Tensor.float)
"""Functions by which routers convert their weight to float32."""
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
"""Functions by which routers add corrections to scores."""


class ClosedRouter:
    """Hooks on a router that exclude experts, as if the router had no rows for them."""

    def __init__(self, router: Any, closed: Callable[[], Tensor | None]) -> None:
        """
        Args:
            closed: returns the mask of the experts to exclude, [experts]; None: no expert.
        """
        self._router, self._closed = router, closed
        self._mode: _CloseExperts | None = None
        self._handles = [
            router.register_forward_pre_hook(self._begin),
            router.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        closed = self._closed()
        if closed is not None:
            self._mode = _CloseExperts(self._router.weight, list(self._router.buffers(recurse=False)), closed)
            self._mode.__enter__()

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)
            name = type(module).__name__
            require(mode.seen or output is None, f"experts of {name} cannot be cut: its logits have an unknown origin")


class _CloseExperts(TorchFunctionMode):
    """Context in which a router's logits are -inf for excluded experts, also after corrections are added.

    Scores other than a softmax turn -inf into 0, which a correction could make the highest score.
    """

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
