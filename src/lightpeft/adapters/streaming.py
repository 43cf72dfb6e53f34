"""Load a base that does not fit in memory: read tensor by tensor, and keep only what a plan keeps.

transformers itself builds the model, and renames, converts, casts and ties weights. This module adds the two ends: lazy
tensors that are read from their file when they are indexed, and projections that are cut as they arrive. Tensors that
are not cut can be shared with models that were read from the same files before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedModel

from lightpeft.compat.torch import set_without_hooks, with_own_parameters
from lightpeft.compat.transformers import Checkpoint, mark_read, one_at_a_time, with_reader
from lightpeft.errors import require
from lightpeft.models.experts import ExpertLayer
from lightpeft.models.linears.linear_kinds import slice_linear, stored_weight
from lightpeft.models.tensors import Reading, SharedTensors, check_files, on_disk
from lightpeft.models.vocabulary.cutting import rows_by_token
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.layout import cut_dim, kept_channels, kept_experts
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import BlockSpec
from lightpeft.prune.fingerprint import Sample, digest_of, expert_weight, sample, weight_names

_WITHOUT_LOW_MEMORY = "load the adapter without low_memory"


class Stream:
    """Loads a transformers model and cuts projections and experts to a plan as they arrive.

    Call `from_pretrained` of the class that `loader` returns. The loaded model has its dense structure; the projections
    that the plan cuts are on the meta device. After `apply_plan`, `fill` sets their weights, which the stream holds
    until then. Memory never holds more than the kept weights and the one tensor that is being cut.
    """

    def __init__(
        self,
        plan: PrunePlan,
        check: Callable[[PreTrainedModel], object],
        device: str | torch.device | None = None,
        vocabulary: Vocabulary | None = None,
        shared: SharedTensors | None = None,
    ) -> None:
        """
        Args:
            plan: the units to keep.
            check: called with the model on the meta device before any weight is read; raises to refuse it.
            device: device of kept weights of projections; None: host memory.
            vocabulary: tokens whose rows of embeddings and heads are kept; None: all.
            shared: tensors that several models share; uncut tensors are looked up and added there. None: read all.
        """
        self._plan = plan
        self._check = check
        self._device = device
        self._vocabulary = vocabulary
        self._rows: dict[tuple[nn.Module, str], int] = {}
        self._reading = Reading(shared, device)
        self._places: dict[nn.Module, _Place] = {}
        self._experts: dict[tuple[nn.Module, str], _ExpertPlace] = {}
        self._samples: dict[str, Sample] = {}

    def loader(self, architecture: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """Return a subclass whose `from_pretrained` reads through this stream, and returns instances of `architecture`.

        Raises (when it loads):
            LightPeftError: `check` refuses the model, the weights are quantized or not in safetensors files, or a
                projection has no weights.
        """

        def read(model: PreTrainedModel, checkpoint: Checkpoint) -> Any:
            check_files(checkpoint, _WITHOUT_LOW_MEMORY)
            self._check(model)
            self._places = dict(_projection_places(model, self._plan))
            self._experts = dict(_expert_places(model, self._plan))
            self._rows = {} if self._vocabulary is None else dict(_token_dims(model, self._vocabulary))
            hooks = [
                register_module_parameter_registration_hook(self._receive),
                register_module_buffer_registration_hook(self._sample_buffer),
            ]
            try:
                with one_at_a_time():
                    result = checkpoint.load(model, on_disk(checkpoint.files, self._reading))
            finally:
                for hook in hooks:
                    hook.remove()
            self._check_complete()
            return result

        return with_reader(architecture, read)

    def fingerprint(self, model: PreTrainedModel, blocks: Sequence[BlockSpec]) -> str:
        """Return the fingerprint of the dense base, from samples that were taken while its weights were read.

        Raises:
            LightPeftError: a projection had no weights.
        """
        self._check_complete()
        names = (name for block in blocks for name in weight_names(model, block))
        return digest_of(model, ((name, self._samples[name]) for name in names), self._vocabulary)

    def fill(self, model: PreTrainedModel) -> None:
        """Set the weights of the model's projections after `apply_plan`, and release them from the stream.

        Raises:
            LightPeftError: another weight was never read.
        """
        modules = dict(model.named_modules())
        for place in self._places.values():
            layer = modules.get(place.name)
            if layer is not None and place.index is not None:  # projections of a dropped attention do not exist
                for name, parameter in place.layer.named_parameters(recurse=False):
                    setattr(layer, name, parameter)
        for expert_place in self._experts.values():
            part, _, own = expert_place.name.rpartition(".")
            if part in modules and expert_place.kept is not None:
                setattr(modules[part], own, nn.Parameter(expert_place.kept, requires_grad=False))
        self._places, self._experts, self._rows = {}, {}, {}
        empty = [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]
        require(not empty, f"low_memory found no weights for {', '.join(empty[:3])}; {_WITHOUT_LOW_MEMORY}")

    def hold(self, model: nn.Module) -> None:
        """Keep the shared tensors for as long as the model lives."""
        self._reading.hold(model)

    def _receive(self, module: nn.Module, name: str, parameter: Any) -> Any:
        """Registration hook for parameters: cut a parameter as it arrives.

        Returns:
            The parameter to register instead; None: the given one.
        """
        if parameter is None or parameter.is_meta:
            return None
        if self._vocabulary is not None and (module, name) in self._rows:
            self._reading.forget()
            kept = self._vocabulary.rows(parameter.detach(), self._rows[module, name])
            return _mark_loaded(nn.Parameter(kept, requires_grad=parameter.requires_grad))
        if (module, name) in self._experts:
            return self._receive_experts(module, name, parameter)
        place = self._places.get(module)
        if place is None:
            return self._reading.in_common(parameter)
        whole = self._reading.in_common(parameter) if place.leaves_whole(name) else None
        set_without_hooks(place.layer, name, parameter if whole is None else whole)
        if name == "weight":
            self._samples[place.name] = sample(stored_weight(place.layer))
        if place.index is None:
            return whole
        self._reading.forget()
        if not any(other.is_meta for other in place.layer.parameters(recurse=False)):
            if len({other.device for other in place.layer.parameters(recurse=False)}) > 1:  # some were shared there
                place.layer.to(self._device)
            slice_linear(place.layer, place.index, place.dim)
            place.layer.to(self._device)
        return _mark_loaded(module.get_parameter(name))

    def _sample_buffer(self, module: nn.Module, name: str, buffer: Any) -> None:
        """Registration hook for buffers: sample those of routers, which are small and are cut later."""
        if buffer is not None and not buffer.is_meta and (module, name) in self._experts:
            self._samples[self._experts[module, name].name] = sample(buffer)

    def _receive_experts(self, module: nn.Module, name: str, parameter: Any) -> Any:
        """Cut a weight of experts or of their router as it arrives; return the parameter to register instead."""
        place = self._experts[module, name]
        self._samples[place.name] = sample(parameter.detach())
        if place.cut is None:
            return self._reading.in_common(parameter)
        self._reading.forget()
        place.kept = place.cut(parameter.detach()).to(self._device or parameter.device)
        return _mark_loaded(module.get_parameter(name))

    def _check_complete(self) -> None:
        """Refuse a base in which weights of projections or experts are missing."""
        names = [name for spec in self._plan.specs for name in spec.projections.values()]
        cut = {p.name: p.layer for p in self._places.values() if p.index is not None}
        empty = {name for name, layer in cut.items() if any(p.is_meta for p in layer.parameters(recurse=False))}
        names += [place.name for place in self._experts.values()]
        lacking = [name for name in names if name not in self._samples or name in empty]
        require(not lacking, f"low_memory cannot read the weights of {', '.join(lacking[:1])}; {_WITHOUT_LOW_MEMORY}")


def _mark_loaded(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter as loaded, so that transformers does not initialize it, and return it."""
    mark_read(parameter)
    return parameter


@dataclass(frozen=True)
class _Place:
    """A projection whose weights are read through the stream."""

    name: str
    index: Tensor | None
    """Numbers of the kept channels; None: all."""
    dim: int
    layer: nn.Module
    """Copy of the projection that takes the dense parameters, and is cut when all of them have arrived."""

    def leaves_whole(self, parameter: str) -> bool:
        """Return True if the cut does not change this parameter of the layer (nothing is cut, or it is a bias that is
        not)."""
        return self.index is None or (parameter == "bias" and self.dim == 1)


@dataclass
class _ExpertPlace:
    """A weight of routed experts or of their router that is read through the stream."""

    name: str
    cut: Callable[[Tensor], Tensor] | None
    """Returns the kept part of the dense weight; None: all is kept."""
    kept: Tensor | None = None
    """The kept part, once the weight has arrived."""


def _expert_places(model: PreTrainedModel, plan: PrunePlan) -> Iterator[tuple[tuple[nn.Module, str], _ExpertPlace]]:
    """Yield (module, name) of each weight of experts and routers, with how to cut it."""
    nothing = [(spec, BlockPlan((), (), ())) for spec in plan.left_out]
    for spec, kept in (*plan.parts, *nothing):
        if not spec.experts:
            continue
        layer, stay = ExpertLayer.of(model, spec.expert_modules), kept_experts(spec, kept)
        whole = len(kept.expert_neurons) == spec.expert_neurons
        for name, _ in layer.weights():
            path = expert_weight(spec, name)
            owner, _, own = path.rpartition(".")
            cut = None if whole else partial(_cut_expert_weight, layer, name, stay)
            yield (model.get_submodule(owner), own), _ExpertPlace(path, cut)


def _cut_expert_weight(layer: ExpertLayer, name: str, stay: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    return layer.part(name, weight, *stay)


def _projection_places(model: PreTrainedModel, plan: PrunePlan) -> Iterator[tuple[nn.Module, _Place]]:
    """Yield each projection of the model, with how to cut it."""
    nothing = [(spec, BlockPlan((), (), ())) for spec in plan.left_out]
    for spec, kept in (*plan.parts, *nothing):
        for slot, name in spec.projections.items():
            layer = model.get_submodule(name)
            yield layer, _Place(name, _kept_channels(spec, kept, slot), cut_dim(slot), with_own_parameters(layer))


def _token_dims(model: PreTrainedModel, vocabulary: Vocabulary) -> Iterator[tuple[tuple[nn.Module, str], int]]:
    """Yield (module, name) of each tensor with one entry per token, and the dimension of the tokens."""
    for name, dim in rows_by_token(model, vocabulary).items():
        owner, _, leaf = name.rpartition(".")
        yield (model.get_submodule(owner), leaf), dim


def _kept_channels(spec: BlockSpec, kept: BlockPlan, slot: str) -> Tensor | None:
    """Return the kept channels of a projection; None: all. Rows before a norm over all heads stay unless no head
    does."""
    if slot in spec.wide_norms and not kept.heads:
        return torch.empty(0, dtype=torch.long)
    return kept_channels(spec, kept, slot)
