"""What makes the steps of a light run faster, beside the smaller model: contexts around training, gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightpeft.config import LightConfig
from lightpeft.peft_kinds.sites import fused_lora, peft_parts
from lightpeft.training.logits import labelled_head
from lightpeft.training.prefix import lengths_of

SHORT_ROWS = 64
"""Tokens a row on average up to which plain products train faster than PyTorch's attention for CPUs, in bfloat16."""


def light_steps(
    model: nn.Module,
    light: LightConfig,
    rows: Any,
    *,
    fast: bool = True,
    autocast: torch.dtype | None = None,
    loss_alone: bool = False,
) -> AbstractContextManager[None]:
    """A context in which a model trains as Light-PEFT does, before and behind the cut.

    Args:
        rows: of training; where they are a data set of tokens, attention is the one for rows of their length.
        fast: beside the dropout that `light` asks for, take the faster steps.
        autocast: half precision that training computes in; None: that of the weights.
        loss_alone: as for `accelerated`.
    """
    if not fast:
        return base_dropout(model, light.dropout)
    tokens = isinstance(rows, Dataset) and {"length", "input_ids"} & set(rows.column_names)
    lengths = lengths_of(rows) if tokens else ()
    return accelerated(model, lengths, dropout=light.dropout, autocast=autocast, loss_alone=loss_alone)


@contextmanager
def accelerated(
    model: nn.Module,
    lengths: Sequence[int] = (),
    *,
    dropout: float | None = None,
    autocast: torch.dtype | None = None,
    loss_alone: bool = False,
) -> Iterator[None]:
    """Inside the block a light model trains with fused LoRA layers, its base's dropout, and attention for short rows.

    Args:
        lengths: tokens of the training rows; none: rows of unknown length.
        dropout: probability that replaces the base's own ones; None: those stay.
        autocast: half precision that training computes in under autocast; None: that of the weights.
        loss_alone: nobody reads a language model's logits in training (TRL's trainers do, for their metrics), so that
            those of tokens without a label need not be computed.
    """
    head = labelled_head(model) if loss_alone else nullcontext()
    with base_dropout(model, dropout), fused_lora(model), head, _short_attention(model, lengths, autocast):
        yield


@contextmanager
def base_dropout(model: nn.Module, probability: float | None) -> Iterator[None]:
    """Inside the block every dropout of the foundation model and its head has this probability; None: its own.

    Those of PEFT modules keep their own; configurations stay as they are. transformers keeps a probability in an
    `nn.Dropout`, or as a number called `dropout`, `attention_dropout` or the like, which the module's forward reads.
    """
    changed = [] if probability is None else list(_dropouts(model))
    try:
        for module, name, _ in changed:
            setattr(module, name, probability)
        yield
    finally:
        for module, name, own in changed:
            setattr(module, name, own)


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """The modules outside PEFT's that hold a probability of dropout, with its attribute and value."""
    of_peft = peft_parts(model)
    for module in model.modules():
        if module not in of_peft:
            names = ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "dropout" in name]
            yield from ((module, name, vars(module)[name]) for name in names if isinstance(vars(module)[name], float))


def _short_attention(
    model: nn.Module, lengths: Sequence[int], autocast: torch.dtype | None
) -> AbstractContextManager[None]:
    """Attention of plain products where PyTorch's own is slower: half precision on a CPU, in rows of few tokens."""
    parameter = next(model.parameters())
    half = (autocast or parameter.dtype) in (torch.bfloat16, torch.float16)
    short = bool(lengths) and sum(lengths) <= SHORT_ROWS * len(lengths)
    return sdpa_kernel(SDPBackend.MATH) if parameter.device.type == "cpu" and half and short else nullcontext()
