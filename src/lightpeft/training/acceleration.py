"""What makes the steps of a light run faster, beside the smaller model: contexts around training, gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from torch import nn

from lightpeft.config import LightConfig
from lightpeft.peft_kinds.sites.base import peft_parts
from lightpeft.peft_kinds.sites.fused import fused_lora
from lightpeft.training.attention import attention_by_products
from lightpeft.training.logits import labelled_head
from lightpeft.training.norms import fused_norms
from lightpeft.training.recomputing import recomputed_activations


def light_steps(
    model: nn.Module,
    light: LightConfig,
    *,
    fast: bool = True,
    loss_alone: bool = False,
) -> AbstractContextManager[None]:
    """A context in which a model trains as Light-PEFT does, before and behind the cut.

    Args:
        fast: beside the dropout that `light` asks for, take the faster steps.
        loss_alone: as for `accelerated`.
    """
    if not fast:
        return base_dropout(model, light.rates.base_dropout)
    return accelerated(model, dropout=light.rates.base_dropout, loss_alone=loss_alone)


@contextmanager
def accelerated(
    model: nn.Module,
    *,
    dropout: float | None = None,
    loss_alone: bool = False,
) -> Iterator[None]:
    """Inside the block a light model trains with fused LoRA layers, its base's dropout, a faster way back through
    attention and norms, and activations that the backward pass makes again.

    Args:
        dropout: probability that replaces the base's own ones; None: those stay.
        loss_alone: nobody reads a language model's logits in training (TRL's losses may), so that
            those of tokens without a label need not be computed.
    """
    with ExitStack() as stack:
        stack.enter_context(base_dropout(model, dropout))
        stack.enter_context(fused_lora(model))
        stack.enter_context(labelled_head(model) if loss_alone else nullcontext())
        stack.enter_context(attention_by_products(model))
        stack.enter_context(fused_norms(model))
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
