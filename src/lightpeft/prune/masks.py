"""Masks on heads, neurons and experts as hooks: no forked model code, the attention backend stays as chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from lightpeft.compat.torch import storage_of
from lightpeft.compat.transformers import ACT2FN, recomputes
from lightpeft.models.experts import ExpertLayer
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.registry import adapter_in_use
from lightpeft.plans.records import PrunePlan
from lightpeft.plans.scoring import MaskGradients
from lightpeft.plans.structure import MASKED, BlockSpec, MaskedUnit
from lightpeft.prune.routing import ClosedRouter, Masked, MaskedExperts

_KEPT_ANYWAY = ("relu", "linear")
"""Activations of which autograd saves the output, or whose output is their input: nothing is gained by another pass."""


class UnitMasks:
    """One trainable scalar per query head, FFN neuron, routed expert and neuron inside these, all 1 at the start.

    As in Light-PEFT, section 3.2, they multiply the inputs of the attention-output and the FFN-output projections:
    `attn(x) = sum_i m_A[i] * head_i(x) W_O[i]`, `ffn(x) = (m_F * act(x W_in)) W_out`; those of experts what `routing`
    says. They are not parameters of the model, so checkpoints, weight decay and the user's optimizer never see them.
    All of them live in one flat float32 tensor, `values` [heads of all blocks, then neurons, experts and neurons inside
    experts of all blocks]; what is done to them at a step is a handful of vector operations, however many blocks there
    are.
    """

    def __init__(self, blocks: Sequence[BlockSpec], device: torch.device | str = "cpu") -> None:
        self.blocks = list(blocks)
        self.sizes: list[int] = [getattr(block, kind) for kind in MASKED for block in blocks]
        self.values = torch.ones(sum(self.sizes), device=device)
        self._tally = torch.zeros(2, len(self.values), device=device)  # of single examples: sizes, squares
        self._closed: list[Tensor | None] = [None for _ in blocks]
        self._batch = _Batch()
        self.examples = 0
        """Examples of the step whose gradients were taken last."""
        # leaves that share the storage of `values`: each block's gradient arrives apart, updates reach all at once
        self._leaves = [part.detach().requires_grad_() for part in self.values.split(self.sizes)]
        self._handles: list[Any] = []

    @property
    def heads(self) -> list[Tensor]:
        """Masks of the query heads, one [heads] tensor a block."""
        return self._of_kinds(self._leaves)["heads"]

    @property
    def neurons(self) -> list[Tensor]:
        """Masks of the neurons, one [neurons] tensor a block."""
        return self._of_kinds(self._leaves)["neurons"]

    def split(self, flat: Tensor) -> dict[MaskedUnit, list[Tensor]]:
        """Views of a flat tensor like `values`: kind of unit -> one [units] tensor a block."""
        return self._of_kinds(list(flat.split(self.sizes)))

    def _of_kinds(self, parts: list[Tensor]) -> dict[MaskedUnit, list[Tensor]]:
        count = len(self.blocks)
        return {kind: parts[place * count : (place + 1) * count] for place, kind in enumerate(MASKED)}

    def attach(self, model: nn.Module) -> None:
        """Let the projections of a transformers model, or of a PeftModel around it, read the masks."""
        inner = transformers_model(model)
        self._batch.masked = adapter_in_use(model)
        self._handles.append(inner.register_forward_pre_hook(self._batch, with_kwargs=True))
        leaves, tallies = self._of_kinds(self._leaves), self._of_kinds(list(self._tally.split(self.sizes, dim=1)))
        for place, block in enumerate(self.blocks):
            masks = {kind: Masked(leaves[kind][place], tallies[kind][place]) for kind in MASKED}
            projections = {slot: inner.get_submodule(name) for slot, name in block.projections.items()}
            scaler = _Scaler(masks["heads"], self._batch, channels=block.head_dim)
            self._handles += scaler.attach(projections["o"])
            if block.neurons:
                self._attach_neurons(projections, masks["neurons"], block.activation)
            if block.experts:
                self._attach_experts(inner, place, masks)

    def _attach_neurons(self, projections: dict[str, nn.Module], mask: Masked, activation: str | None) -> None:
        function = ACT2FN[activation] if activation and activation not in _KEPT_ANYWAY else None
        scaler = _Scaler(mask, self._batch, activation=function)
        self._handles += scaler.attach(projections["ffn_out"])
        for slot in ("ffn_gate_in", "ffn_gate", "ffn_in"):
            if slot in projections and function is not None:
                self._handles.append(projections[slot].register_forward_hook(scaler.store_output))

    def _attach_experts(self, inner: nn.Module, place: int, masks: dict[MaskedUnit, Masked]) -> None:
        block = self.blocks[place]
        layer = ExpertLayer.of(inner, block.expert_modules)
        experts = MaskedExperts(layer, masks["experts"], masks["expert_neurons"])
        experts.masked, experts.examples = self._batch.masked, self._batch.of_tokens
        experts.attach()
        self._handles += [experts, ClosedRouter(layer.router, lambda: self._closed[place])]

    def detach(self) -> None:
        """Take the hooks off the model; it is as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take_gradients(self) -> MaskGradients:
        """The gradients since the last call, flat like `values`; zero where none arrived."""
        parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        # each example's gradient has arrived as a part of the mean: divided by the examples of the step
        self.examples = self._batch.taken()
        taken = MaskGradients(torch.cat(parts), self._tally[0].clone(), self._tally[1] * self.examples)
        self._tally.zero_()
        return taken

    def set_plan(self, plan: PrunePlan) -> None:
        """Set the masks to 1 for units that stay and 0 for units that go, and let routers leave out experts that go:
        the pruned model before any cut."""
        kept = [getattr(block, kind) for kind in MASKED for block in plan.blocks]
        with torch.no_grad():
            for leaf, units in zip(self._leaves, kept, strict=True):
                leaf.zero_()[torch.tensor(units, dtype=torch.long, device=leaf.device)] = 1.0
        self._closed = [leaf == 0 if len(leaf) else None for leaf in self._of_kinds(self._leaves)["experts"]]


class _Batch:
    """Forward pre-hook of the model: how many examples the batch under way has, and how many the step has so far."""

    def __init__(self) -> None:
        self.examples, self._of_step = 1, 0
        self.masked: Callable[[], bool] = lambda: True
        """Whether a pass is masked: not where it gives the reference that the model is trained against."""
        self.checkpointed = False
        """Whether gradient checkpointing drops what the backward pass needs, and computes it again."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        self.examples = len(tensors[0]) if tensors else 1
        if torch.is_grad_enabled():
            self.checkpointed = recomputes(module)
            self._of_step += self.examples

    def taken(self) -> int:
        """Examples of the step that ends here."""
        count, self._of_step = self._of_step, 0
        return count

    def split(self, products: Tensor) -> Tensor:
        """[..., units] -> [examples, what belongs to an example, units].

        Models may have made one dimension of examples and tokens (OPT), or of examples and options (multiple choice);
        what belongs to an example is one piece of it. Where it cannot be told apart, all are one example.
        """
        rows = products.flatten(0, -2)
        return rows.unflatten(0, (self.of_tokens(len(rows)), -1))

    def of_tokens(self, rows: int) -> int:
        """How many examples so many rows are of."""
        return self.examples if rows % self.examples == 0 else 1


class _Scaler:
    """Scales the `channels` of each unit in the input of an output projection, [..., units * channels].

    The backward pass needs that input twice: unscaled for the gradient of the mask, and scaled for that of a LoRA
    module. Neither is kept: they are computed again from what other operations save anyway. Of attention that is its
    output; of the FFN what its activation function takes, provided that the first call of each mode (training,
    evaluation) has shown that this gives the same bits. benchmarks/README.md says what that saves.
    """

    def __init__(
        self,
        mask: Masked,
        batch: _Batch,
        channels: int = 1,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.mask, self.tally, self.batch, self.channels = mask.values, mask.tally, batch, channels
        self.activation = activation
        self._sources: list[Tensor] = []
        self._reproducible: dict[bool, bool] = {} if activation is not None else {True: False, False: False}
        self._hooks: saved_tensors_hooks | None = None

    def attach(self, projection: nn.Module) -> list[RemovableHandle]:
        """Scale what a projection takes."""
        return [
            projection.register_forward_pre_hook(self._begin),
            projection.register_forward_hook(self._end, always_call=True),
        ]

    def store_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the projections into the FFN (gate first, where there is one)."""
        if self._reproducible.get(module.training, True):
            self._sources.append(output.detach())

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, sources = args[0], self._sources
        self._sources = []
        if not self.batch.masked():
            return args
        if module.training not in self._reproducible:
            self._reproducible[module.training] = _activated(self.activation, sources, x.shape[-1]).equal(x)
        again = self._reproducible[module.training]
        unscaled = _Unscaled(self.activation if again else None, x.shape[-1])
        sources = sources if again else [x.detach()]
        scaled = _Scaled.apply(x, self.mask, self, unscaled, *sources)
        if torch.is_grad_enabled() and not self.batch.checkpointed:
            # not the tensor itself, which every saved tensor would keep by its hooks
            pack = partial(self._pack, _memory(scaled), unscaled, sources)
            self._hooks = saved_tensors_hooks(pack, _unpack)
            self._hooks.__enter__()
        return scaled, *args[1:]

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None

    def _pack(
        self, memory: object, unscaled: _Unscaled, sources: Sequence[Tensor], saved: Tensor
    ) -> Tensor | Callable[[], Tensor]:
        """What is kept of a tensor that the projection saves: itself or, of its input, how to get it again."""
        if memory is None or _memory(saved) != memory:
            return saved
        shape = saved.shape
        return lambda: self.scaled(unscaled.of(sources)).view(shape)

    def scaled(self, x: Tensor) -> Tensor:
        """`x` with every unit multiplied by its mask."""
        mask = self.mask.to(x)
        return x * (mask.repeat_interleave(self.channels) if self.channels > 1 else mask)

    def gradient_of_mask(self, products: Tensor) -> Tensor:
        """Sum over tokens and channels of input times gradient, [units]; every example's own goes into the tally."""
        of_channels = _sum_of_tokens(self.batch.split(products))
        of_examples = of_channels.unflatten(-1, (-1, self.channels)).sum(-1) if self.channels > 1 else of_channels
        self.tally[0] += of_examples.abs().sum(0)
        self.tally[1] += of_examples.square().sum(0)
        return of_examples.sum(0)


class _Unscaled:
    """The input of one call of a projection as it was before scaling, computed again once for all that need it."""

    def __init__(self, activation: Callable[[Tensor], Tensor] | None, width: int) -> None:
        """
        Args:
            activation: the FFN's; None: the source is the input itself.
            width: channels of the input.
        """
        self.activation, self.width = activation, width
        self._x: Tensor | None = None

    def of(self, sources: Sequence[Tensor]) -> Tensor:
        """The input, kept until it is taken."""
        if self._x is None:
            self._x = _activated(self.activation, sources, self.width) if self.activation else sources[0]
        return self._x

    def times(self, gradient: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """Its product with a gradient, for the last that needs it; in the memory of what was computed again."""
        x, self._x = self.of(sources), None
        if x.dtype == torch.float16:  # where a scaled loss's gradients may be finite, and their products not
            return x.float() * gradient
        return x.mul_(gradient) if self.activation else gradient * x


class _Scaled(torch.autograd.Function):
    """`scaler.scaled(x)`; the last arguments are what x is computed from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scaler: _Scaler, unscaled: _Unscaled, *sources: Tensor) -> Tensor:
        ctx.scaler, ctx.unscaled = scaler, unscaled
        ctx.save_for_backward(*sources)
        return scaler.scaled(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaler, sources = ctx.scaler, ctx.saved_tensors
        of_mask = scaler.gradient_of_mask(ctx.unscaled.times(gradient, sources))
        return scaler.scaled(gradient), of_mask, *(None for _ in range(2 + len(sources)))


def _sum_of_tokens(products: Tensor) -> Tensor:
    """[examples, tokens, channels] -> [examples, channels], float32."""
    # CPUs copy what they are to sum in another type; bfloat16 has the range for the sum, and it is float32 inside
    return products.sum(1).float() if products.dtype == torch.bfloat16 else products.sum(1, dtype=torch.float32)


def _memory(tensor: Tensor) -> object:
    """Equal for tensors that are all of the same contiguous memory, as long as one of them is there; else None."""
    where = storage_of(tensor), tensor.storage_offset(), tensor.numel(), tensor.dtype
    return where if tensor.is_contiguous() else None


def _unpack(saved: Tensor | Callable[[], Tensor]) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved()


def _activated(activation: Any, sources: Sequence[Tensor], width: int) -> Tensor:
    """The FFN's hidden channels, so many: `act(in)`, or `act(gate) * in` from two tensors or one fused."""
    first, *rest = sources
    if not rest and first.shape[-1] == 2 * width:
        first, *rest = first.chunk(2, dim=-1)
    return activation(first) * rest[0] if rest else activation(first)
