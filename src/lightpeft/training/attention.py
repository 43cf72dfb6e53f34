"""Attention in bfloat16 on a CPU, as PyTorch computes it, with a backward pass of plain matrix products.

PyTorch's kernel for CPUs is as fast forward as it can be, and several times slower than the products themselves on its
way back, most of all where the CPU multiplies matrices in bfloat16. Products alone would keep the probabilities of all
layers; here nothing is kept but what the kernel keeps, and probabilities are computed once more, some rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lightpeft.compat.torch import changes_of, softmax_backward
from lightpeft.compat.transformers import recomputes
from lightpeft.models.patching import override_forward
from lightpeft.models.unwrap import transformers_model

LONGEST = 256
"""Tokens a row up to which products are the faster way back; where the CPU has matrix units for bfloat16, up to 512."""
_AT_ONCE = 2**22
"""Bytes of probabilities that are computed together, about what caches hold."""


@contextmanager
def attention_by_products(model: nn.Module) -> Iterator[None]:
    """Inside the block, gradients of `scaled_dot_product_attention` in the model are computed by plain products.

    What the model computes forward is the same to the last bit, gradients but for rounding. In bfloat16 on a CPU alone,
    up to `LONGEST` tokens, without dropout, and where no kernel was chosen. Not under gradient checkpointing, which
    computes attention again outside of the model's forward pass, and has to in the same way.

    Args:
        model: a transformers model, or a PeftModel around one.
    """
    inner = transformers_model(model)
    usual = inner.forward

    @functools.wraps(usual)
    def forward(*args: Any, **kwargs: Any) -> Any:
        on_cpu = next(inner.parameters()).device.type == "cpu"
        if not on_cpu or not torch.is_grad_enabled() or recomputes(inner):
            return usual(*args, **kwargs)
        with ByProducts():
            return usual(*args, **kwargs)

    with override_forward(inner, forward):
        yield


class ByProducts(TorchFunctionMode):
    """Inside this context, `scaled_dot_product_attention` leaves its way back to products where they are faster."""

    def __init__(self) -> None:
        super().__init__()
        self._masks = _Masks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attention(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As `scaled_dot_product_attention`."""
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (states.to(torch.get_autocast_dtype("cpu")) for states in (query, key, value))
        if dropout_p or not _are_faster(query, key, value, attn_mask):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
        bias, attends = self._masks.of(query, key, attn_mask, is_causal)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return _Attention.apply(query, key, value, attn_mask, is_causal, scale, bias, attends)


def _are_faster(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether products are the faster way to gradients of these."""
    given = (query, key, value)
    trains = any(states.requires_grad for states in given) and not (mask is not None and mask.requires_grad)
    usual = all(states.dtype == torch.bfloat16 and states.is_cpu and states.dim() == 4 for states in given)
    chosen = not torch.backends.cuda.flash_sdp_enabled()  # PyTorch's switch for CPUs, too
    return trains and usual and not chosen and max(query.shape[2], key.shape[2]) <= LONGEST


class _Masks:
    """What is added to scores; the layers of a model share a mask."""

    def __init__(self) -> None:
        self._given: tuple[Any, ...] = ()
        self._mask: Tensor | None = None
        self._terms: tuple[Tensor | None, Tensor | None] = (None, None)

    def of(
        self, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is added to scores, [1 or batch, 1 or heads, tokens, keys], and which tokens attend at all, [..., 1].

        Both are None where every token attends to all keys, and the latter is where every token attends to one.
        """
        given = (None if mask is None else changes_of(mask), is_causal, query.shape[2], key.shape[2])
        if self._mask is not mask or self._given != given:
            self._mask, self._given = mask, given
            if is_causal:
                mask = query.new_ones(*given[2:], dtype=torch.bool).tril()
            self._terms = (None, None) if mask is None else _term(mask, query.dtype)
        return self._terms


def _term(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The mask as what is added, and its tokens that attend to a key."""
    lowest = torch.finfo(dtype).min
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    finite = mask.new_zeros(mask.shape, dtype=dtype) if mask is seen else mask.to(dtype).clamp(min=lowest)
    attends = seen.any(-1, keepdim=True)
    return finite.masked_fill(~seen, lowest), None if attends.all() else attends


class _Attention(torch.autograd.Function):
    """`softmax(scale Q K' + bias) V`, each [batch, heads, tokens, channels]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        bias: Tensor | None,
        attends: Tensor | None,
    ) -> Tensor:
        """
        Args:
            mask, is_causal: as PyTorch has them.
            bias, attends: the same as `_Masks` has them.
        """
        ctx.save_for_backward(query, key, value, bias, attends)
        ctx.scale = scale
        return scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, attends = ctx.saved_tensors
        if attends is not None:
            gradient = gradient * attends  # what attends to nothing is zero, whatever keys and values are
        batch, heads, tokens, _ = query.shape
        keys = key.shape[2]
        results = [torch.empty(states.shape, dtype=states.dtype) for states in (query, key, value)]
        bias = None if bias is None else bias.expand(batch, heads, tokens, keys)
        rows = max(_AT_ONCE // (heads * tokens * keys * query.element_size()), 1)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, batch, rows):
                part = slice(start, start + rows)
                given = [states[part].flatten(0, 1) for states in (gradient, query, key, value)]
                term = None if bias is None else bias[part].clone(memory_format=torch.contiguous_format).flatten(0, 1)
                _backward(given, term, ctx.scale, [result[part].flatten(0, 1) for result in results])
        return (*results, None, None, None, None, None)


def _backward(given: list[Tensor], term: Tensor | None, scale: float, results: list[Tensor]) -> None:
    """Write gradients of queries, keys and values.

    Args:
        given: gradient of the output, queries, keys and values, [heads, tokens, channels].
        term: of the scores, [heads, tokens, keys]; it is overwritten.
        results: where the gradients go.
    """
    (gradient, query, key, value), (of_query, of_key, of_value) = given, results
    scores = torch.bmm(query, key.mT).mul_(scale) if term is None else term.baddbmm_(query, key.mT, alpha=scale)
    probabilities = torch.softmax(scores, -1)
    torch.bmm(probabilities.mT, gradient, out=of_value)
    of_probabilities = torch.bmm(gradient, value.mT, out=scores)
    of_scores = softmax_backward(of_probabilities, probabilities)
    torch.bmm(of_scores, key, out=of_query).mul_(scale)
    torch.bmm(of_scores.mT, query, out=of_key).mul_(scale)
