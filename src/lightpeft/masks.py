"""Masks on heads and neurons as forward pre-hooks: no forked model code, the attention backend stays as chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN

from lightpeft.records import PrunePlan
from lightpeft.sites import transformers_model
from lightpeft.structure import BlockSpec


class UnitMasks:
    """One trainable scalar per query head and per FFN neuron, all 1 at the start (Light-PEFT, section 3.2).

    The scalars multiply the inputs of the attention-output and the FFN-output projections:
    `attn(x) = sum_i m_A[i] * head_i(x) W_O[i]`, `ffn(x) = (m_F * act(x W_in)) W_out`.
    They are not parameters of the model, so checkpoints, weight decay and the user's optimizer never see them.
    All of them live in one flat float32 tensor, `values` [heads of all blocks, then neurons of all blocks]; what is
    done to them at a step is a handful of vector operations, however many blocks there are.
    """

    def __init__(self, blocks: Sequence[BlockSpec], device: torch.device | str = "cpu") -> None:
        self.blocks = list(blocks)
        self.sizes = [block.heads for block in blocks] + [block.neurons for block in blocks]
        self.head_count = sum(block.heads for block in blocks)
        self.values = torch.ones(sum(self.sizes), device=device)
        # leaves that share the storage of `values`: each block's gradient arrives apart, updates reach all at once
        self._leaves = [part.detach().requires_grad_() for part in self.values.split(self.sizes)]
        self._handles: list[RemovableHandle] = []

    @property
    def heads(self) -> list[Tensor]:
        """Masks of the query heads, one [heads] tensor a block."""
        return self._leaves[: len(self.blocks)]

    @property
    def neurons(self) -> list[Tensor]:
        """Masks of the neurons, one [neurons] tensor a block."""
        return self._leaves[len(self.blocks) :]

    def split(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of a flat tensor like `values`: (one [heads] tensor a block, one [neurons] tensor a block)."""
        parts = list(flat.split(self.sizes))
        return parts[: len(self.blocks)], parts[len(self.blocks) :]

    def attach(self, model: nn.Module) -> None:
        """Let the projections of a transformers model, or of a PeftModel around it, read the masks."""
        inner = transformers_model(model)
        for block, heads, neurons in zip(self.blocks, self.heads, self.neurons, strict=True):
            projections = {slot: inner.get_submodule(name) for slot, name in block.projections.items()}
            self._handles.append(projections["o"].register_forward_pre_hook(_HeadScaler(heads, block.head_dim)))
            if block.neurons:
                self._attach_neurons(projections, neurons, block.activation)

    def _attach_neurons(self, projections: dict[str, nn.Module], mask: Tensor, activation: str | None) -> None:
        # autograd saves what ReLU gives, not what it takes, so that there is nothing to gain from computing it again
        scaler = _NeuronScaler(mask, ACT2FN[activation] if activation and activation != "relu" else None)
        self._handles.append(projections["ffn_out"].register_forward_pre_hook(scaler))
        for slot in ("ffn_gate_in", "ffn_gate", "ffn_in"):
            if slot in projections:
                self._handles.append(projections[slot].register_forward_hook(scaler.remember))

    def detach(self) -> None:
        """Take the hooks off the model; it is as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take_gradient(self) -> Tensor:
        """The gradient since the last call, flat like `values`; zero where no gradient arrived."""
        parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        return torch.cat(parts)

    def set_plan(self, plan: PrunePlan) -> None:
        """Set the masks to 1 for units that stay and 0 for units that go: the pruned model before any cut."""
        kept = [block.heads for block in plan.blocks] + [block.neurons for block in plan.blocks]
        with torch.no_grad():
            for leaf, units in zip(self._leaves, kept, strict=True):
                leaf.zero_()[torch.tensor(units, dtype=torch.long, device=leaf.device)] = 1.0


class _HeadScaler:
    """Pre-hook of the attention-output projection: scales each head's channels of the input [..., heads * dim]."""

    def __init__(self, mask: Tensor, head_dim: int) -> None:
        self.mask, self.head_dim = mask, head_dim

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        heads = args[0].unflatten(-1, (-1, self.head_dim))
        return ((heads * self.mask.to(heads).unsqueeze(-1)).flatten(-2), *args[1:])


class _NeuronScaler:
    """Pre-hook of the FFN-output projection: scales the input [..., neurons].

    The gradient of a mask needs that input, which other operations seldom save: keeping it would cost about a tenth
    of LoRA's memory. What it was computed from is saved anyway, so it is computed again in the backward pass, provided
    that the first call of each mode (training, evaluation) has shown that this gives the same bits.
    """

    def __init__(self, mask: Tensor, activation: Callable[[Tensor], Tensor] | None) -> None:
        self.mask, self.activation = mask, activation
        self._sources: list[Tensor] = []
        self._reproducible: dict[bool, bool] = {} if activation is not None else {True: False, False: False}

    def remember(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the projections into the FFN (gate first, where there is one)."""
        if self._reproducible.get(module.training, True):
            self._sources.append(output.detach())

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        sources, self._sources = self._sources, []
        if module.training not in self._reproducible:
            self._reproducible[module.training] = _activated(self.activation, sources, args[0]).equal(args[0])
        if self._reproducible[module.training]:
            return (_ScaledActivation.apply(args[0], self.mask, self.activation, *sources), *args[1:])
        return (args[0] * self.mask.to(args[0]), *args[1:])


class _ScaledActivation(torch.autograd.Function):
    """`x * mask` for `x = _activated(activation, sources)`, which is not saved but computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, activation: Callable[[Tensor], Tensor], *sources: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(mask, *sources)
        return x * mask.to(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mask, *sources = ctx.saved_tensors
        of_mask = (gradient * _activated(ctx.activation, sources, gradient)).sum_to_size(mask.shape).to(mask.dtype)
        return gradient * mask.to(gradient), of_mask, None, *(None for _ in sources)


def _activated(activation: Any, sources: Sequence[Tensor], like: Tensor) -> Tensor:
    """The FFN's hidden channels, shaped as `like`: `act(in)`, or `act(gate) * in` from two tensors or one fused."""
    first, *rest = sources
    if not rest and first.shape[-1] == 2 * like.shape[-1]:
        first, *rest = first.chunk(2, dim=-1)
    return activation(first) * rest[0] if rest else activation(first)
