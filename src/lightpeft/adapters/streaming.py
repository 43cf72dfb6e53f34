"""Reading a base that does not fit: its weights come from disk one at a time, and only what a plan keeps stays.

transformers itself builds, renames, converts, casts and ties, as for any model. Here are only the two ends: tensors
that are read from their file when they are asked for, and projections that are cut as they arrive. What no plan cuts
may be shared with models that were read from the same files before.
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

from lightpeft.compat.torch import set_unseen, with_own_parameters
from lightpeft.compat.transformers import Checkpoint, mark_read, one_at_a_time, with_reader
from lightpeft.errors import require
from lightpeft.models.experts import ExpertLayer
from lightpeft.models.linears.registry import slice_linear, stored_weight
from lightpeft.models.tensors import Reading, SharedTensors, check_files, on_disk
from lightpeft.models.vocabulary.cutting import rows_by_token
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.plans.layout import cut_dim, kept_channels, kept_experts
from lightpeft.plans.records import BlockPlan, PrunePlan
from lightpeft.plans.structure import BlockSpec
from lightpeft.prune.fingerprint import Sample, digest_of, expert_weight, sample, weight_names

_INSTEAD = "load the adapter without low_memory"


class Stream:
    """Loads a transformers model whose projections and experts arrive cut to what a plan keeps.

    `loader` is the class to call `from_pretrained` of. The model that comes back has its dense structure, with the
    projections that the plan cuts on the meta device; after `apply_plan`, `fill` gives them their weights. Until then
    they are held here, and at no time is there more than the kept weights and the one tensor that is being cut.
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
            plan: what stays.
            check: called with the model on the meta device before any weight is read; raises to refuse it.
            device: where kept parts of projections go; None: they stay in host memory.
            vocabulary: tokens whose rows alone stay of embeddings and heads; None: all.
            shared: tensors that models have in common, where whole tensors are looked up and kept; None: all are read.
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
        """The class, with a `from_pretrained` that reads into this stream; the models it makes are of the class itself.

        Raises (when it loads):
            LightPeftError: `check` refuses the model, the weights are quantised or not in safetensors files, or some
                projection has none.
        """

        def read(model: PreTrainedModel, checkpoint: Checkpoint) -> Any:
            check_files(checkpoint, _INSTEAD)
            self._check(model)
            self._places = dict(_places(model, self._plan))
            self._experts = dict(_expert_places(model, self._plan))
            self._rows = {} if self._vocabulary is None else dict(_rows(model, self._vocabulary))
            hooks = [
                register_module_parameter_registration_hook(self._receive),
                register_module_buffer_registration_hook(self._see),
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
        """`loading.fingerprint` of the dense base, from what was sampled while its weights went by.

        Raises:
            LightPeftError: some projection had no weights.
        """
        self._check_complete()
        names = (name for block in blocks for name in weight_names(model, block))
        return digest_of(model, ((name, self._samples[name]) for name in names), self._vocabulary)

    def fill(self, model: PreTrainedModel) -> None:
        """Give the projections of the model, now cut by `apply_plan`, their weights; nothing is held here any more.

        Raises:
            LightPeftError: some other weight was never read.
        """
        modules = dict(model.named_modules())
        for place in self._places.values():
            layer = modules.get(place.name)
            if layer is not None and place.index is not None:  # those of a dropped attention are gone
                for name, parameter in place.layer.named_parameters(recurse=False):
                    setattr(layer, name, parameter)
        for expert_place in self._experts.values():
            part, _, own = expert_place.name.rpartition(".")
            if part in modules and expert_place.kept is not None:
                setattr(modules[part], own, nn.Parameter(expert_place.kept, requires_grad=False))
        self._places, self._experts, self._rows = {}, {}, {}
        empty = [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]
        require(not empty, f"low_memory left {', '.join(empty[:3])} without weights; {_INSTEAD}")

    def hold(self, model: nn.Module) -> None:
        """Say that the model, which is all that was read, has the tensors that it shares for as long as it lives."""
        self._reading.hold(model)

    def _receive(self, module: nn.Module, name: str, parameter: Any) -> Any:
        """Called when a parameter is set in any module; returns what is set instead, or None."""
        if parameter is None or parameter.is_meta:
            return None
        if self._vocabulary is not None and (module, name) in self._rows:
            self._reading.forget()
            kept = self._vocabulary.rows(parameter.detach(), self._rows[module, name])
            return _read(nn.Parameter(kept, requires_grad=parameter.requires_grad))
        if (module, name) in self._experts:
            return self._receive_experts(module, name, parameter)
        place = self._places.get(module)
        if place is None:
            return self._reading.in_common(parameter)
        whole = self._reading.in_common(parameter) if place.leaves_whole(name) else None
        set_unseen(place.layer, name, parameter if whole is None else whole)
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
        return _read(module.get_parameter(name))

    def _see(self, module: nn.Module, name: str, buffer: Any) -> None:
        """Called when a buffer is set in any module. Those of routers are small: they arrive whole, to be cut later."""
        if buffer is not None and not buffer.is_meta and (module, name) in self._experts:
            self._samples[self._experts[module, name].name] = sample(buffer)

    def _receive_experts(self, module: nn.Module, name: str, parameter: Any) -> Any:
        place = self._experts[module, name]
        self._samples[place.name] = sample(parameter.detach())
        if place.cut is None:
            return self._reading.in_common(parameter)
        self._reading.forget()
        place.kept = place.cut(parameter.detach()).to(self._device or parameter.device)
        return _read(module.get_parameter(name))

    def _check_complete(self) -> None:
        names = [name for spec in self._plan.specs for name in spec.projections.values()]
        cut = {p.name: p.layer for p in self._places.values() if p.index is not None}
        empty = {name for name, layer in cut.items() if any(p.is_meta for p in layer.parameters(recurse=False))}
        names += [place.name for place in self._experts.values()]
        lacking = [name for name in names if name not in self._samples or name in empty]
        require(not lacking, f"the base has no weights of {', '.join(lacking[:1])} to read one by one; {_INSTEAD}")


def _read(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, for transformers to take as one that has its weights."""
    mark_read(parameter)
    return parameter


@dataclass(frozen=True)
class _Place:
    """A projection that weights are to arrive for."""

    name: str
    index: Tensor | None
    """Channels that stay; None: all."""
    dim: int
    layer: nn.Module
    """A stand-in of the projection in the model; takes the dense parameters and is cut when all of them are there."""

    def leaves_whole(self, parameter: str) -> bool:
        """Whether the cut leaves a parameter of the layer as it is: all do where nothing goes, and else some biases."""
        return self.index is None or (parameter == "bias" and self.dim == 1)


@dataclass
class _ExpertPlace:
    """A weight of routed experts or of their router that is to arrive."""

    name: str
    cut: Callable[[Tensor], Tensor] | None
    """From the dense weight to what stays of it; None: all."""
    kept: Tensor | None = None
    """What stays, once it is there."""


def _expert_places(model: PreTrainedModel, plan: PrunePlan) -> Iterator[tuple[tuple[nn.Module, str], _ExpertPlace]]:
    nothing = [(spec, BlockPlan((), (), ())) for spec in plan.left_out]
    for spec, kept in (*plan.parts, *nothing):
        if not spec.experts:
            continue
        layer, stay = ExpertLayer.of(model, spec.expert_modules), kept_experts(spec, kept)
        whole = len(kept.expert_neurons) == spec.expert_neurons
        for name, _ in layer.weights():
            path = expert_weight(spec, name)
            owner, _, own = path.rpartition(".")
            cut = None if whole else partial(_part, layer, name, stay)
            yield (model.get_submodule(owner), own), _ExpertPlace(path, cut)


def _part(layer: ExpertLayer, name: str, stay: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    return layer.part(name, weight, *stay)


def _places(model: PreTrainedModel, plan: PrunePlan) -> Iterator[tuple[nn.Module, _Place]]:
    nothing = [(spec, BlockPlan((), (), ())) for spec in plan.left_out]
    for spec, kept in (*plan.parts, *nothing):
        for slot, name in spec.projections.items():
            layer = model.get_submodule(name)
            yield layer, _Place(name, _kept(spec, kept, slot), cut_dim(slot), with_own_parameters(layer))


def _rows(model: PreTrainedModel, vocabulary: Vocabulary) -> Iterator[tuple[tuple[nn.Module, str], int]]:
    """What has one entry a token: its module, its name there, and the dimension that has them."""
    for name, dim in rows_by_token(model, vocabulary).items():
        owner, _, leaf = name.rpartition(".")
        yield (model.get_submodule(owner), leaf), dim


def _kept(spec: BlockSpec, kept: BlockPlan, slot: str) -> Tensor | None:
    """Channels of a projection that stay; None: all. Rows before a norm over all heads stay unless all heads go."""
    if slot in spec.wide_norms and not kept.heads:
        return torch.empty(0, dtype=torch.long)
    return kept_channels(spec, kept, slot)
