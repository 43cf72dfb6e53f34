"""What makes the steps of a light run faster, beside the smaller model: contexts around training, gone afterwards."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightpeft.config import LightConfig
from lightpeft.models.patching import instead
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites import fused_lora, peft_parts
from lightpeft.training.logits import labelled_head
from lightpeft.training.recomputing import recomputed_activations

SHORT_ROWS = 64
"""Tokens a row, padding included, up to which plain products train faster than PyTorch's attention for CPUs, in
bfloat16. They keep the probabilities for the backward pass, whose memory grows with the square."""


def light_steps(
    model: nn.Module,
    light: LightConfig,
    *,
    fast: bool = True,
    autocast: torch.dtype | None = None,
    loss_alone: bool = False,
) -> AbstractContextManager[None]:
    """A context in which a model trains as Light-PEFT does, before and behind the cut.

    Args:
        fast: beside the dropout that `light` asks for, take the faster steps.
        autocast: half precision that training computes in; None: that of the weights.
        loss_alone: as for `accelerated`.
    """
    if not fast:
        return base_dropout(model, light.dropout)
    return accelerated(model, dropout=light.dropout, autocast=autocast, loss_alone=loss_alone)


@contextmanager
def accelerated(
    model: nn.Module,
    *,
    dropout: float | None = None,
    autocast: torch.dtype | None = None,
    loss_alone: bool = False,
) -> Iterator[None]:
    """Inside the block a light model trains with fused LoRA layers, its base's dropout, attention for short rows, and
    activations that the backward pass makes again.

    Args:
        dropout: probability that replaces the base's own ones; None: those stay.
        autocast: half precision that training computes in under autocast; None: that of the weights.
        loss_alone: nobody reads a language model's logits in training (TRL's trainers do, for their metrics), so that
            those of tokens without a label need not be computed.
    """
    with ExitStack() as stack:
        stack.enter_context(base_dropout(model, dropout))
        stack.enter_context(fused_lora(model))
        stack.enter_context(labelled_head(model) if loss_alone else nullcontext())
        stack.enter_context(_short_attention(model, autocast))
        stack.enter_context(recomputed_activations(model))
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


@contextmanager
def _short_attention(model: nn.Module, autocast: torch.dtype | None) -> Iterator[None]:
    """Attention of plain products where PyTorch's own is slower: half precision on a CPU, in batches of short rows.

    Not under gradient checkpointing, which computes attention again outside of the model's forward pass.
    """
    inner, parameter = transformers_model(model), next(model.parameters())
    half = (autocast or parameter.dtype) in (torch.bfloat16, torch.float16)
    if parameter.device.type != "cpu" or not half:
        yield
        return
    usual = inner.forward

    @functools.wraps(usual)
    def forward(*args: Any, **kwargs: Any) -> Any:
        tokens = None if inner.is_gradient_checkpointing else _tokens_a_row(args, kwargs)
        with sdpa_kernel(SDPBackend.MATH) if tokens is not None and tokens <= SHORT_ROWS else nullcontext():
            return usual(*args, **kwargs)

    with instead(inner, forward):
        yield


def _tokens_a_row(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How long the rows of a batch are; None where they are not of tokens."""
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    tokens = next((each for each in given if isinstance(each, Tensor) and each.dim() in (2, 3)), None)
    return None if tokens is None else tokens.shape[1]
