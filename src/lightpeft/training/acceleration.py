"""Faster training steps beside the smaller model: context managers around training that leave the model unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from torch import nn

from lightpeft.config import LightConfig
from lightpeft.peft_kinds.sites.base import peft_parts
from lightpeft.peft_kinds.sites.fused import fused_lora
from lightpeft.training.attention import attention_by_products
from lightpeft.training.logits import labeled_head
from lightpeft.training.norms import fused_norms
from lightpeft.training.recomputing import recomputed_activations


def light_steps(
    model: nn.Module,
    light: LightConfig,
    *,
    fast: bool = True,
    loss_only: bool = False,
) -> AbstractContextManager[None]:
    """Return a context in which a model trains as the settings say, before and after the cut.

    Args:
        light: settings, of which `rates.base_dropout` counts.
        fast: also use the faster steps of `accelerated`.
        loss_only: True if only the loss reads a language model's logits in training.
    """
    if not fast:
        return base_dropout(model, light.rates.base_dropout)
    return accelerated(model, dropout=light.rates.base_dropout, loss_only=loss_only)


@contextmanager
def accelerated(
    model: nn.Module,
    *,
    dropout: float | None = None,
    loss_only: bool = False,
) -> Iterator[None]:
    """Make training steps faster inside the block, with the same gradients up to rounding.

    LoRA layers are fused, the backward pass of attention and norms is faster on a CPU, and activations that are cheap
    to recompute are not stored. `LightTrainer` does this by itself; use it around your own training loop.

    Args:
        model: a transformers model or a PeftModel, dense or pruned.
        dropout: dropout probability for the base, in place of its own; None: its own.
        loss_only: True if only the loss reads a language model's logits in training (TRL's trainers may read them
            too), so that logits of tokens without a label are not computed.

    Example:
        ```python
        with accelerated(light, dropout=0.0):
            for batch in batches:
                light(**batch).loss.backward()
                optimizer.step(); optimizer.zero_grad()
        ```
    """
    with ExitStack() as stack:
        stack.enter_context(base_dropout(model, dropout))
        stack.enter_context(fused_lora(model))
        stack.enter_context(labeled_head(model) if loss_only else nullcontext())
        stack.enter_context(attention_by_products(model))
        stack.enter_context(fused_norms(model))
        stack.enter_context(recomputed_activations(model))
        yield


@contextmanager
def base_dropout(model: nn.Module, probability: float | None) -> Iterator[None]:
    """Set the dropout probability of the base model and its head inside the block; None: leave it.

    PEFT modules keep their own dropout, and configurations are unchanged. transformers stores the probability in an
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
    """Yield (module, attribute, probability) for each dropout outside of PEFT modules."""
    of_peft = peft_parts(model)
    for module in model.modules():
        if module not in of_peft:
            names = ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "dropout" in name]
            yield from ((module, name, vars(module)[name]) for name in names if isinstance(vars(module)[name], float))
