"""Find the frozen lower blocks of a model, and run them without an autograd graph or skip them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightpeft.compat.transformers import computed_once
from lightpeft.models.families.family_table import block_lists
from lightpeft.models.patching import in_mode, override_forward
from lightpeft.models.unwrap import transformers_model

STATES = "prefix_states"
"""Keyword argument of the model for outputs of the prefix, which it then does not compute: [batch, length, width]."""


class KnownStates(Protocol):
    """Interface of a cache of the prefix's outputs."""

    def of(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the cached outputs for the rows of a call, [batch, length, width]; None if any row is not cached."""


class FrozenPrefix:
    """The blocks of one stack below the lowest block that holds a trained parameter.

    While attached, they run without a graph: no activation or dropout mask of theirs is stored, also if embeddings
    require gradients (gradient checkpointing). A training step skips them if `known` has the outputs for all its rows,
    or if the call passes them as `prefix_states`; everything around the blocks (embeddings, positions, masks, rotary
    angles) runs as always.
    """

    known: KnownStates | None = None
    """Cache that is looked up at each training step by the model's inputs, so that collators need not know of it."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module] | None = None) -> None:
        """
        Args:
            model: a transformers model or a PeftModel, with `requires_grad` as it will be trained.
            blocks: the frozen blocks, if parameters outside the model train, too; None: `frozen_blocks(model)`.
        """
        self.model = model
        self.blocks = frozen_blocks(model) if blocks is None else list(blocks)
        self.outputs: int | None = None
        """Length of the tuple that a block returns, 0 for a bare tensor; None: no block has run yet."""
        self._states: Tensor | None = None
        self._capturing = False
        self._attached = ExitStack()

    def __bool__(self) -> bool:
        return bool(self.blocks)

    @contextmanager
    def attached(self) -> Iterator[FrozenPrefix]:
        """Attach the prefix inside the block: it runs without a graph, or is skipped."""
        self.attach()
        try:
            yield self
        finally:
            self.detach()

    def attach(self) -> None:
        """Make the frozen blocks run without a graph, or be skipped; does nothing if there are none."""
        if not self.blocks:
            return
        enter = self._attached.enter_context
        enter(self.model.register_forward_pre_hook(self._receive_states, with_kwargs=True))
        enter(self.model.register_forward_hook(self._forget_states, always_call=True))
        for block in self.blocks:
            enter(override_forward(block, partial(self._run_block, block.forward, block is self.blocks[-1])))
            enter(computed_once(block))

    def detach(self) -> None:
        """Restore the model as it was before `attach`."""
        self._attached.close()

    @torch.no_grad()
    def compute(self, batch: Mapping[str, Any]) -> Tensor:
        """Compute the prefix's output for a batch, in eval mode: [batch, length, width]; higher blocks do not run."""
        self._capturing = True
        try:
            with in_mode(self.model, training=False):
                self.model(**batch)
        except _Captured as captured:
            return captured.states
        finally:
            self._capturing = False
        raise RuntimeError("the model's forward did not reach its last frozen block")

    def _receive_states(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._states = kwargs.pop(STATES, None)
        if self._states is None and self.known is not None and not args and module.training and torch.is_grad_enabled():
            self._states = self.known.of(kwargs)
        return args, kwargs

    def _forget_states(self, *_: Any) -> None:
        self._states = None

    def _run_block(self, forward: Callable[..., Any], last: bool, *args: Any, **kwargs: Any) -> Any:
        """Forward of one frozen block.

        Args:
            forward: its own forward.
            last: True for the highest frozen block.
        """
        states = args[0] if args else kwargs["hidden_states"]
        if self._states is not None and self.outputs is not None:
            given = self._states.to(device=states.device, dtype=states.dtype)
            # reentrant checkpointing of the block above needs an input that requires a gradient
            given = given.requires_grad_() if states.requires_grad else given
            return (given, *[None] * (self.outputs - 1)) if self.outputs else given
        with torch.no_grad():
            output = forward(*args, **kwargs)
        self.outputs = len(output) if isinstance(output, tuple) else 0
        if self._states is not None:  # the first call has told how many outputs a block returns
            return self._run_block(forward, last, *args, **kwargs)
        if last and self._capturing:
            raise _Captured(output[0] if self.outputs else output)
        if not (torch.is_grad_enabled() and states.requires_grad):
            return output
        return (output[0].requires_grad_(), *output[1:]) if self.outputs else output.requires_grad_()


class _Captured(Exception):
    """Ends a forward pass once the prefix is computed, and carries its output."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def frozen_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the lowest blocks whose outputs no trained parameter can change.

    The list is empty for encoder-decoders, whose blocks pass more than hidden states to each other, and for models
    that train something else in the base model, such as embeddings.
    """
    inner = transformers_model(model)
    stacks = block_lists(inner)
    if len(stacks) != 1:
        return []
    blocks = list(stacks[0])
    inside = {id(p) for block in blocks for p in block.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in inner.base_model.parameters()):
        return []
    trained = (index for index, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))
    return blocks[: next(trained, len(blocks))]
