"""Inputs of importance scores: hooks on training for PEFT modules and ranks, without further matrix products, and norms
of the weights of heads and neurons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightpeft.models.experts import ExpertLayer
from lightpeft.models.linears.linear_kinds import dense_weight
from lightpeft.models.unwrap import base_linear, transformers_model
from lightpeft.peft_kinds.sites.base import ReportOutputs, Site
from lightpeft.plans import scoring
from lightpeft.plans.layout import squared_norms
from lightpeft.plans.structure import KEY_VALUE_SLOTS, BlockSpec


class RealTokens:
    """Mask of the current batch's tokens that are no padding, for hooks on layers inside the model.

    It comes from the `attention_mask` that the model is called with, and for the decoder of an encoder-decoder from
    `decoder_attention_mask` or, without one, from the labels.
    """

    def __init__(self, model: nn.Module) -> None:
        self._masks: dict[bool, Tensor | None] = {}
        self._handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def of(self, block: BlockSpec, slot: str | None) -> Tensor | None:
        """Return 1 for the real tokens in the input of a projection, [batch, length]; None: all are real."""
        return self._masks[_reads_decoder(block, slot)]

    def remove(self) -> None:
        """Remove the hook from the model."""
        self._handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if _reads_options(args, kwargs) and mask is not None:
            mask = mask.flatten(0, 1)  # as the model flattens the inputs of its blocks
        self._masks = {False: _token_mask(mask), True: _decoder_mask(kwargs)}


class ModuleObserver:
    """Sums of `||delta_M(x)|| / ||base_M(x)||` over real tokens, per PEFT module, on the device, without host copies.

    The norms come from the outputs of the forward pass. Only training-mode forward passes with gradients count, each
    once: recomputation by gradient checkpointing happens in the backward pass, outside the model's forward. Hooks are
    on the modules only in passes that count, so that all other passes run at full speed.
    """

    def __init__(
        self,
        model: PeftModel,
        sites: Sequence[Site],
        blocks: Sequence[BlockSpec],
        device: torch.device,
        due: Callable[[], bool] = lambda: True,
    ) -> None:
        """
        Args:
            due: returns whether the current training step counts.
        """
        self.sites = list(sites)
        self._blocks = [blocks[site.spec.block] for site in sites]  # type: ignore[index]
        self.sums = torch.zeros(2, len(self.sites), device=device)  # ratio sums, token counts
        self._due, self._counting = due, False
        self._real = RealTokens(model)
        self._watching: list[RemovableHandle] = []
        self._handles: list[RemovableHandle | RealTokens] = [
            self._real,
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def detach(self) -> None:
        """Remove all hooks from the model."""
        self._watch(False)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # checked here, because reentrant checkpointing switches gradients off inside
        self._counting = module.training and torch.is_grad_enabled() and self._due()
        self._watch(self._counting)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # the hooks stay until the next pass, because checkpointing has to recompute this one in the same way
        self._counting = False

    def _watch(self, wanted: bool) -> None:
        """Put the hooks on the modules, or remove them."""
        if wanted and not self._watching:
            for index, site in enumerate(self.sites):
                self._watching.extend(site.observe(self._adder(index), lambda: self._counting))
        elif not wanted:
            for handle in self._watching:
                handle.remove()
            self._watching.clear()

    def _adder(self, index: int) -> ReportOutputs:
        @torch.no_grad()
        def add(delta: Tensor, reference: Tensor, scaling: float) -> None:
            real = self._real.of(self._blocks[index], self.sites[index].spec.slot)
            ratio, tokens = scoring.module_ratio(delta, reference, real)
            self.sums[0, index] += ratio * scaling
            self.sums[1, index] += tokens

        return add


def _reads_decoder(block: BlockSpec, slot: str | None) -> bool:
    """Return whether a projection of an encoder-decoder reads the decoder's tokens, unlike k, v of cross-attention."""
    return block.role == "decoder" or (block.role == "cross" and slot not in KEY_VALUE_SLOTS)


def _reads_options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the model is called with options of questions, [batch, options, length]."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return isinstance(ids, Tensor) and ids.dim() == 3


def _token_mask(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _decoder_mask(kwargs: dict[str, Any]) -> Tensor | None:
    mask, labels = _token_mask(kwargs.get("decoder_attention_mask")), _token_mask(kwargs.get("labels"))
    return labels != -100 if mask is None and labels is not None else mask


class RankObserver:
    """Signed rank Taylor terms of the current step, computed in gradient hooks of the parameters.

    The terms are linear in the gradient, so those of a step are the sum over its micro-batches. Later changes of the
    gradients (clipping, reduction over processes) are not included.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        self._handles: list[RemovableHandle] = []
        self._terms: list[Tensor | None] = [None] * (2 * len(self.sites))
        for index, site in enumerate(self.sites):
            self._watch(index, site.down, dim=1)
            self._watch(len(self.sites) + index, site.up, dim=0)

    def _watch(self, position: int, parameter: nn.Parameter | None, dim: int) -> None:
        if parameter is None:
            return

        @torch.no_grad()
        def hook(gradient: Tensor) -> None:
            terms = scoring.rank_taylor_terms(parameter.detach(), gradient, dim)
            before = self._terms[position]
            self._terms[position] = terms if before is None else before + terms

        self._handles.append(parameter.register_hook(hook))

    def take_terms(self) -> Tensor:
        """Return the terms of the step, flat, and reset them: those of A for the ranks of all modules, then of B."""
        device = self.sites[0].device
        ranks = 2 * [site.spec.rank for site in self.sites]
        terms = [
            torch.zeros(rank, device=device) if term is None else term.to(device)
            for rank, term in zip(ranks, self._terms, strict=True)
        ]
        self._terms = [None] * len(self._terms)
        return torch.cat(terms)

    def detach(self) -> None:
        """Remove all hooks from the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@torch.no_grad()
def weight_squares(model: nn.Module, block: BlockSpec) -> tuple[Tensor, ...]:
    """Sum up the squared weights of a block's query heads (with their KV group's rows), neurons, experts and neurons of
    experts.

    Returns:
        One [units] tensor for each kind in the order of `MASKED`, float32, on the CPU.
    """
    heads, neurons = torch.zeros(block.heads), torch.zeros(block.neurons)
    for slot, name in block.projections.items():
        of_heads, of_neurons = squared_norms(block, slot, dense_weight(base_linear(model, name)))
        heads, neurons = heads + of_heads.cpu(), neurons + of_neurons.cpu()
    inside = torch.zeros(0), torch.zeros(0)
    if block.experts:
        inside = ExpertLayer.of(transformers_model(model), block.expert_modules).squares()
    return heads, neurons, *(squares.cpu() for squares in inside)
