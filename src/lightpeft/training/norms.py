"""RMS norms as one node of the autograd graph: the same result, with fewer passes over memory in the backward pass.

transformers computes an RMS norm as a square, a mean, a root and two products, and the backward pass of each of them
runs over all hidden states. LayerNorm has a backward kernel, and differs from an RMS norm only in subtracting the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightpeft.compat.torch import layer_norm_backward
from lightpeft.compat.transformers import is_rms_norm, keep_kernels
from lightpeft.models.patching import override_forward


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """Compute Llama's kind of RMS norm as one autograd node inside the block, in float32 on a CPU.

    Outputs are bitwise the same, gradients the same up to rounding. Other norms are unchanged.

    Args:
        model: a transformers model, or a PeftModel around one.
    """
    with keep_kernels(model), ExitStack() as stack:
        for module in model.modules():
            if is_rms_norm(module) and module.weight.device.type == "cpu":
                stack.enter_context(override_forward(module, partial(_norm_forward, module, module.forward)))
        yield


def _norm_forward(module: Any, usual: Any, hidden_states: Tensor) -> Tensor:
    """Forward of a norm module; falls back to the usual one outside of float32 training."""
    weight, x = module.weight, hidden_states
    in_float32 = x.dtype == weight.dtype == torch.float32
    if not in_float32 or not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        result: Tensor = usual(hidden_states)
        return result
    return _RmsNorm.apply(x, weight, module.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    """`weight x / sqrt(mean(x^2) + epsilon)`, over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """
        Args:
            x: [..., channels].
            weight: [channels].
        """
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def recompute(node: Any) -> Tensor:
        """Recompute the result from the tensors that the node saved."""
        x, weight, inverse = node.saved_tensors
        result: Tensor = (x * inverse).mul_(weight)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        of_x, of_weight = layer_norm_backward(gradient, x, torch.zeros_like(inverse), inverse, weight, wanted)
        if of_x is not None:  # a layer norm also takes away the mean of the gradient, as it did of x
            with torch.autocast("cpu", enabled=False):
                mean = (gradient.flatten(0, -2) @ weight).div_(len(weight)).view(inverse.shape)
            of_x.addcmul_(inverse, mean)
        return of_x, of_weight, None
