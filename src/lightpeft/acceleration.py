"""What makes the steps of a light run faster, beside the smaller model: contexts around training, gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightpeft.sites import fused_lora, peft_parts

SHORT_ROWS = 64
"""Tokens a row on average up to which plain products train faster than PyTorch's attention for CPUs, in bfloat16."""


@contextmanager
def accelerated(
    model: nn.Module,
    lengths: Sequence[int] = (),
    *,
    fused: bool = True,
    dropout: float | None = None,
    bf16: bool = False,
) -> Iterator[None]:
    """Inside the block a light model trains with fused LoRA layers, its base's dropout, and attention for short rows.

    Args:
        lengths: tokens of the training rows; none: rows of unknown length.
        fused: compute LoRA layers in one step, and attention of short rows by plain products.
        dropout: probability that replaces the base's own ones; None: those stay.
        bf16: training computes under bfloat16 autocast.
    """
    with ExitStack() as stack:
        if dropout is not None:
            stack.enter_context(base_dropout(model, dropout))
        if fused:
            stack.enter_context(fused_lora(model))
            stack.enter_context(_short_attention(model, lengths, bf16))
        yield


@contextmanager
def base_dropout(model: nn.Module, probability: float) -> Iterator[None]:
    """Inside the block every dropout of the foundation model and its head has this probability.

    Those of PEFT modules keep their own; configurations stay as they are. transformers keeps a probability in an
    `nn.Dropout`, or as a number called `dropout`, `attention_dropout` or the like, which the module's forward reads.
    """
    of_peft = peft_parts(model)
    changed: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if module in of_peft:
            continue
        keys = ["p"] if isinstance(module, nn.Dropout) else [key for key in vars(module) if "dropout" in key]
        changed += [(module, key, vars(module)[key]) for key in keys if isinstance(vars(module)[key], float)]
    try:
        for module, key, _ in changed:
            setattr(module, key, probability)
        yield
    finally:
        for module, key, value in changed:
            setattr(module, key, value)


def _short_attention(model: nn.Module, lengths: Sequence[int], bf16: bool) -> AbstractContextManager[None]:
    """Attention of plain products where PyTorch's own is slower: half precision on a CPU, in rows of few tokens."""
    parameter = next(model.parameters())
    half = bf16 or parameter.dtype in (torch.bfloat16, torch.float16)
    short = bool(lengths) and sum(lengths) <= SHORT_ROWS * len(lengths)
    return sdpa_kernel(SDPBackend.MATH) if parameter.device.type == "cpu" and half and short else nullcontext()
