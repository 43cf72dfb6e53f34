"""Masks on heads, neurons and experts as hooks, without forked model code and with any attention backend."""

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
from lightpeft.peft_kinds.sites.live_sites import adapter_in_use
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.scoring import MaskGradients
from lightpeft.plans.structure import MASKED, BlockSpec, MaskedUnit
from lightpeft.prune.routing import ClosedRouter, Masked, MaskedExperts

_KEPT_ANYWAY = ("relu", "linear")
"""Activations whose output autograd saves, or whose output is their input, so that recomputation saves nothing."""


class UnitMasks:
    """One trainable scalar per query head, FFN neuron, routed expert and neuron inside these, all 1 at the start.

    As in Light-PEFT, section 3.2, they multiply the inputs of the attention-output and the FFN-output projections:
    `attn(x) = sum_i m_A[i] * head_i(x) W_O[i]`, `ffn(x) = (m_F * act(x W_in)) W_out`; `routing` has the masks of
    experts. Masks are no parameters of the model, so checkpoints, weight decay and the user's optimizer do not see
    them. One flat float32 tensor, `values`, holds them all [heads of all blocks, then neurons, experts and neurons of
    experts of all blocks], so that a step takes a few vector operations for any number of blocks.
    """

    def __init__(self, blocks: Sequence[BlockSpec], device: torch.device | str = "cpu") -> None:
        self.blocks = list(blocks)
        self.sizes: list[int] = [getattr(block, kind) for kind in MASKED for block in blocks]
        self.values = torch.ones(sum(self.sizes), device=device)
        self._tally = torch.zeros(2, len(self.values), device=device)  # of single examples: sizes, squares
        self._closed: list[Tensor | None] = [None for _ in blocks]
        self._batch = _Batch()
        self.examples = 0
        """Number of examples of the step whose gradients were taken last."""
        # leaves that share the storage of `values`: gradients arrive block by block, one update changes all
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
        """Split a flat tensor like `values` into views: kind of unit -> one [units] tensor for each block."""
        return self._of_kinds(list(flat.split(self.sizes)))

    def _of_kinds(self, parts: list[Tensor]) -> dict[MaskedUnit, list[Tensor]]:
        count = len(self.blocks)
        return {kind: parts[place * count : (place + 1) * count] for place, kind in enumerate(MASKED)}

    def attach(self, model: nn.Module) -> None:
        """Hook the masks onto the projections of a transformers model, or of a PeftModel around it."""
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
        of_batch = (self._batch.masked, self._batch.owners)
        experts = MaskedExperts(layer, masks["experts"], masks["expert_neurons"], *of_batch)
        self._handles += [experts, ClosedRouter(layer.router, lambda: self._closed[place])]

    def detach(self) -> None:
        """Remove all hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take_gradients(self) -> MaskGradients:
        """Return the gradients since the last call and reset them, flat like `values`; zero where none arrived."""
        parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        # the gradient of each example is its share of the mean, so it is divided by the examples of the step
        self.examples = self._batch.taken()
        taken = MaskGradients(torch.cat(parts), self._tally[0].clone(), self._tally[1] * self.examples)
        self._tally.zero_()
        return taken

    def set_plan(self, plan: PrunePlan) -> None:
        """Simulate a plan: masks are 1 for units to keep and 0 for all others, and routers exclude removed experts."""
        kept = [getattr(block, kind) for kind in MASKED for block in plan.blocks]
        with torch.no_grad():
            for leaf, units in zip(self._leaves, kept, strict=True):
                leaf.zero_()[torch.tensor(units, dtype=torch.long, device=leaf.device)] = 1.0
        self._closed = [leaf == 0 if len(leaf) else None for leaf in self._of_kinds(self._leaves)["experts"]]


class _Batch:
    """Forward pre-hook of the model that counts the examples of the current batch and of the current step.

    The examples of a batch [examples, tokens] are its rows; those of a flattened batch [1, tokens], as padding-free
    collators make it with `position_ids`, are the sequences that follow one another in the row.
    """

    def __init__(self) -> None:
        self.examples, self._of_step = 1, 0
        self._sequences: Tensor | None = None
        """Index of the sequence of each token of a flattened batch, [tokens]; None: the batch is not flattened."""
        self.masked: Callable[[], bool] = lambda: True
        """Function that returns whether the current pass is masked; passes of a frozen reference are not."""
        self.checkpointed = False
        """True if gradient checkpointing drops activations, and recomputes them in the backward pass."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        self.examples, self._sequences = len(tensors[0]) if tensors else 1, None
        positions = kwargs.get("position_ids")
        if self.examples == 1 and isinstance(positions, Tensor) and positions.dim() == 2:
            owners, count = _find_sequences(positions[0])  # one copy of the count to the host for each batch
            if count > 1:
                self.examples, self._sequences = count, owners
        if torch.is_grad_enabled():
            self.checkpointed = recomputes(module)
            self._of_step += self.examples

    def taken(self) -> int:
        """Return the number of examples of the step, and start counting the next step."""
        count, self._of_step = self._of_step, 0
        return count

    def sums(self, products: Tensor) -> Tensor:
        """Sum over the tokens of each example: [..., channels] -> [examples, channels], float32.

        Models may flatten examples and tokens (OPT), or examples and options (multiple choice), into one dimension, in
        which the rows of an example are consecutive. If the rows cannot be divided evenly, they count as one example.
        """
        rows = products.flatten(0, -2)
        if self._sequences is None or len(rows) != len(self._sequences):
            return _sum_of_tokens(rows.unflatten(0, (self._of_equal_length(len(rows)), -1)))
        sums = torch.zeros(self.examples, rows.shape[1], device=rows.device)
        return sums.index_add_(0, self._sequences.to(rows.device), rows.float())

    def owners(self, rows: Tensor, tokens: int) -> tuple[Tensor, int]:
        """Return the index of the example of each row, and the number of examples.

        Args:
            rows: token numbers, [rows].
            tokens: number of tokens of the batch.
        """
        if self._sequences is not None and len(self._sequences) == tokens:
            return self._sequences.to(rows.device)[rows], self.examples
        examples = self._of_equal_length(tokens)
        return rows * examples // tokens, examples

    def _of_equal_length(self, rows: int) -> int:
        """Return the number of examples that `rows` rows belong to if each has as many."""
        return self.examples if rows % self.examples == 0 else 1


def _find_sequences(positions: Tensor) -> tuple[Tensor, int]:
    """Return the index of the sequence of each token of a flattened batch, [tokens], and the number of sequences.

    A sequence starts where positions stop to rise. A token alone is none: it predicts nothing, and collators pad with
    position 0; it counts to the sequence before it.
    """
    rises, end = positions[1:] > positions[:-1], positions.new_zeros(1, dtype=torch.bool)
    starts = torch.cat([rises, end]) & ~torch.cat([end, rises])
    return (starts.cumsum(0) - 1).clamp_min(0), int(starts.sum())


class _Scaler:
    """Scale the `channels` of each unit in the input of an output projection, [..., units * channels].

    The backward pass needs this input twice: unscaled for the gradient of the mask, and scaled for that of a LoRA
    module. Neither is saved: both are recomputed from tensors that other operations save anyway. For attention that is
    its output; for the FFN it is the input of the activation function, provided that the first call of each mode
    (training, evaluation) gave the same bits. benchmarks/README.md has the memory that this saves.
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
        """Hook the scaling onto a projection; return the handles of the hooks."""
        return [
            projection.register_forward_pre_hook(self._begin),
            projection.register_forward_hook(self._end, always_call=True),
        ]

    def store_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Store the output of a projection into the FFN, as a forward hook (the gate comes first, if there is one)."""
        if self._reproducible.get(module.training, True):
            self._sources.append(output.detach())

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, sources = args[0], self._sources
        self._sources = []
        if not self.batch.masked():
            return args
        if module.training not in self._reproducible:
            self._reproducible[module.training] = _apply_activation(self.activation, sources, x.shape[-1]).equal(x)
        again = self._reproducible[module.training]
        unscaled = _UnscaledInput(self.activation if again else None, x.shape[-1])
        sources = sources if again else [x.detach()]
        scaled = _ScaleInput.apply(x, self.mask, self, unscaled, *sources)
        if torch.is_grad_enabled() and not self.batch.checkpointed:
            # not the tensor itself, which the hooks of every saved tensor would keep alive
            pack = partial(self._pack, _memory_key(scaled), unscaled, sources)
            self._hooks = saved_tensors_hooks(pack, _unpack)
            self._hooks.__enter__()
        return scaled, *args[1:]

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None

    def _pack(
        self, memory: object, unscaled: _UnscaledInput, sources: Sequence[Tensor], saved: Tensor
    ) -> Tensor | Callable[[], Tensor]:
        """Pack a tensor that autograd saves: return a function that recomputes it if it is the scaled input."""
        if memory is None or _memory_key(saved) != memory:
            return saved
        shape = saved.shape
        return lambda: self.scaled(unscaled.of(sources)).view(shape)

    def scaled(self, x: Tensor) -> Tensor:
        """Multiply every unit of `x` by its mask."""
        mask = self.mask.to(x)
        return x * (mask.repeat_interleave(self.channels) if self.channels > 1 else mask)

    def gradient_of_mask(self, products: Tensor) -> Tensor:
        """Sum input times gradient over tokens and channels, [units]; add the sums of single examples to the tally."""
        of_channels = self.batch.sums(products)
        of_examples = of_channels.unflatten(-1, (-1, self.channels)).sum(-1) if self.channels > 1 else of_channels
        self.tally[0] += of_examples.abs().sum(0)
        self.tally[1] += of_examples.square().sum(0)
        return of_examples.sum(0)


class _UnscaledInput:
    """Unscaled input of one call of a projection, recomputed once for all users in the backward pass."""

    def __init__(self, activation: Callable[[Tensor], Tensor] | None, width: int) -> None:
        """
        Args:
            activation: activation function of the FFN; None: the source is the input itself.
            width: number of channels of the input.
        """
        self.activation, self.width = activation, width
        self._x: Tensor | None = None

    def of(self, sources: Sequence[Tensor]) -> Tensor:
        """Return the input, and keep it until `times` is called."""
        if self._x is None:
            self._x = _apply_activation(self.activation, sources, self.width) if self.activation else sources[0]
        return self._x

    def times(self, gradient: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """Multiply the input with a gradient, in place if it was recomputed, and forget the input."""
        x, self._x = self.of(sources), None
        if x.dtype == torch.float16:  # finite gradients of a scaled loss may have infinite products
            return x.float() * gradient
        return x.mul_(gradient) if self.activation else gradient * x


class _ScaleInput(torch.autograd.Function):
    """Compute `scaler.scaled(x)`; the last arguments are the tensors that x is recomputed from."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor, scaler: _Scaler, unscaled: _UnscaledInput, *sources: Tensor
    ) -> Tensor:
        ctx.scaler, ctx.unscaled = scaler, unscaled
        ctx.save_for_backward(*sources)
        return scaler.scaled(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaler, sources = ctx.scaler, ctx.saved_tensors
        of_mask = scaler.gradient_of_mask(ctx.unscaled.times(gradient, sources))
        return scaler.scaled(gradient), of_mask, *(None for _ in range(2 + len(sources)))


def _sum_of_tokens(products: Tensor) -> Tensor:
    """Sum over tokens: [examples, tokens, channels] -> [examples, channels], float32."""
    # CPUs copy a tensor to sum it in another type; bfloat16 has the range for the sum, and accumulates in float32
    return products.sum(1).float() if products.dtype == torch.bfloat16 else products.sum(1, dtype=torch.float32)


def _memory_key(tensor: Tensor) -> object:
    """Return a key that is equal for tensors over the same contiguous memory, while one of them lives; else None."""
    where = storage_of(tensor), tensor.storage_offset(), tensor.numel(), tensor.dtype
    return where if tensor.is_contiguous() else None


def _unpack(saved: Tensor | Callable[[], Tensor]) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved()


def _apply_activation(activation: Any, sources: Sequence[Tensor], width: int) -> Tensor:
    """Compute the FFN's `width` hidden channels: `act(in)`, or `act(gate) * in` from two tensors or a fused one."""
    first, *rest = sources
    if not rest and first.shape[-1] == 2 * width:
        first, *rest = first.chunk(2, dim=-1)
    return activation(first) * rest[0] if rest else activation(first)
