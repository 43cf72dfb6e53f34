"""Refit: after a cut, the projections that lost inputs give what they gave before, as well as a small correction can.

Of a projection y = W x + b with second moments of its inputs over calibration rows (mean mu, covariance C), the inputs
K stay and the weight is W' = W[:, K] afterwards. The correction D x_K + beta that gives y best, by ridge regression, is

    D = (W C[:, K] - W' C[K, K]) (C[K, K] + lambda I)^-1,    beta = W mu - (W' + D) mu[K],

and of rank r, measured on the data, D_r = U U^T D with U the first r eigenvectors of D C[K, K] D^T. W and W' include
the LoRA of the projection, so that what a LoRA module that goes has learned is not lost. The corrections are part of
the light adapter, and are merged into weights that surgery has made anyway: they cost no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lightpeft.errors import LightPeftError, require
from lightpeft.machine import autocasting
from lightpeft.models.batches import without_labels
from lightpeft.models.linears import add_to_linear, can_be_added_to, dense_weight
from lightpeft.models.patching import in_mode
from lightpeft.models.unwrap import base_linear, transformers_model
from lightpeft.peft_kinds.sites import find_sites
from lightpeft.plans.layout import kept_channels, width
from lightpeft.plans.records import BlockPlan, PrunePlan
from lightpeft.plans.structure import OUTPUT_SLOTS, BlockSpec
from lightpeft.prune.importance import RealTokens

Batches = Callable[[], Iterable[Mapping[str, Any]]]
"""Gives the same calibration batches, with an `attention_mask` where there is padding, at every call."""
_RIDGE = 1e-2
"""lambda, as part of the mean variance of the inputs that stay."""
_MOMENT_BYTES = 2 * 2**30
"""Second moments held at a time; bigger models go through the calibration rows several times."""


@dataclass(frozen=True)
class Correction:
    """What is added to a projection after the cut: `up (down x) + bias`."""

    bias: Tensor
    """[out]."""
    up: Tensor | None = None
    """[out, rank]; None: the bias alone."""
    down: Tensor | None = None
    """[rank, kept inputs]."""


Refit = dict[str, Correction]
"""Projection (module name in the transformers model) -> its correction."""
Fit = Callable[[PeftModel, PrunePlan, Batches, int], Refit]
"""What `fit_refit` does: (dense model, plan, calibration batches, rank) -> the corrections."""


def calibration_batches(
    rows: Any,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    count: int,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """Batches of some training rows, without labels, on a device.

    Args:
        count: rows at most.
        seed: by which they are chosen.
    """
    numbers = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    for start in range(0, len(numbers), batch_size):
        batch = collator([rows[number] for number in numbers[start : start + batch_size]])
        yield {name: value.to(device) for name, value in without_labels(batch).items()}


@torch.no_grad()
def fit_refit(
    model: PeftModel, plan: PrunePlan, batches: Batches, rank: int = 16, dtype: torch.dtype = torch.bfloat16
) -> Refit:
    """Corrections for every projection that `plan` takes inputs from; the model is still dense, and is left as it is.

    A projection that keeps a PEFT module which is no matrix beside its weight (DoRA, IA3) gets none.

    Args:
        batches: model inputs; labels are not needed.
        rank: of the matrix that is added; 0: a bias alone.
        dtype: in which the corrections are kept.

    Raises:
        LightPeftError: a projection is quantised, so that nothing can be added to it.
    """
    inner = transformers_model(model)
    weights = _Weights(model, plan)
    changed = [place for place in outputs_changed(plan) if weights.known(place[0].projections[place[2]])]
    for spec, _, slot in changed:
        name = spec.projections[slot]
        require(
            can_be_added_to(base_linear(inner, name)),
            f"{name} is quantised, and refit cannot add to it; set light.refit to none",
        )
    result: Refit = {}
    for group in _groups(changed):
        moments = _moments(model, plan.specs, [(spec, slot) for spec, _, slot in group], batches)
        for (spec, kept, slot), moment in zip(group, moments, strict=True):
            name = spec.projections[slot]
            index = kept_channels(spec, kept, slot)
            assert index is not None
            before, after = weights.before(name), weights.after(name, index)
            result[name] = correction(moment, before, after, index.to(moment.device), rank, dtype)
    return result


def apply_refit(model: nn.Module, refit: Mapping[str, Correction]) -> None:
    """Add the corrections to the projections of a pruned model, in place; the dense base's weights are not touched.

    Raises:
        LightPeftError: a correction does not fit; nothing was changed.
    """
    inner = transformers_model(model)
    layers = {name: base_linear(inner, name) for name in refit}
    for name, correction in refit.items():
        rows, columns = dense_weight(layers[name]).shape
        fits = correction.bias.shape == (rows,)
        if correction.up is not None and correction.down is not None:
            rank = correction.up.shape[1]
            fits = fits and correction.up.shape == (rows, rank) and correction.down.shape == (rank, columns)
        require(fits, f"the refit of {name} has other sizes than the projection")
    for name, correction in refit.items():
        weight = dense_weight(layers[name])
        bias, delta = correction.bias.to(weight.device), None
        if correction.up is not None and correction.down is not None:
            delta = correction.up.to(weight.device).float() @ correction.down.to(weight.device).float()
        add_to_linear(layers[name], delta, bias)


def refit_tensors(refit: Mapping[str, Correction]) -> dict[str, Tensor]:
    """The corrections as flat tensors, `<projection>.bias`, `.up`, `.down`, to be saved."""
    parts = {f"{name}.{part}": getattr(c, part) for name, c in refit.items() for part in ("bias", "up", "down")}
    return {key: value.contiguous() for key, value in parts.items() if value is not None}


def refit_of_tensors(tensors: Mapping[str, Tensor]) -> Refit:
    """What `refit_tensors` flattened.

    Raises:
        LightPeftError: a part is missing.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition(".")
        parts.setdefault(name, {})[part] = value
    if any(set(part) not in ({"bias"}, {"bias", "up", "down"}) for part in parts.values()):
        raise LightPeftError("the refit is not complete")
    return {name: Correction(**part) for name, part in parts.items()}


class _Weights:
    """The weight of a projection, its LoRA included, before the cut and after it."""

    def __init__(self, model: PeftModel, plan: PrunePlan) -> None:
        self.inner = transformers_model(model)
        self.plan = plan
        self.sites = {site.spec.name: site for site in find_sites(model, plan.specs)}

    def known(self, name: str) -> bool:
        """Whether what the projection computes after the cut is a matrix."""
        return name not in self.plan.sites or self.sites[name].delta() is not None

    def before(self, name: str) -> Tensor:
        """[out, in], float32."""
        return self._with_delta(name, None)

    def after(self, name: str, index: Tensor) -> Tensor:
        """[out, kept inputs], float32."""
        ranks = self.plan.sites.get(name, ())
        return self._with_delta(name, torch.tensor(ranks, dtype=torch.long))[:, index]

    def _with_delta(self, name: str, ranks: Tensor | None) -> Tensor:
        weight = dense_weight(base_linear(self.inner, name)).float()
        delta = self.sites[name].delta(ranks) if name in self.sites else None
        return weight if delta is None else weight + delta


def outputs_changed(plan: PrunePlan) -> Iterator[tuple[BlockSpec, BlockPlan, str]]:
    """The projections that lose inputs, with their blocks."""
    for spec, kept in plan.parts:
        for slot in OUTPUT_SLOTS:
            if slot in spec.projections and kept_channels(spec, kept, slot) is not None:
                yield spec, kept, slot


def _groups(changed: Sequence[tuple[BlockSpec, BlockPlan, str]]) -> Iterator[list[tuple[BlockSpec, BlockPlan, str]]]:
    """Projections whose moments fit into memory together."""
    group: list[tuple[BlockSpec, BlockPlan, str]] = []
    size = 0
    for spec, kept, slot in changed:
        own = 4 * (1 + width(spec, slot)) ** 2
        if group and size + own > _MOMENT_BYTES:
            yield group
            group, size = [], 0
        group.append((spec, kept, slot))
        size += own
    if group:
        yield group


def _moments(
    model: PeftModel, specs: Sequence[BlockSpec], places: Sequence[tuple[BlockSpec, str]], batches: Batches
) -> list[Tensor]:
    """Mean of [x, 1] [x, 1]^T over real tokens, [in + 1, in + 1], for the inputs x of each projection."""
    inner = transformers_model(model)
    sums: list[Any] = [0.0] * len(places)
    real = RealTokens(model)

    def adder(index: int, block: BlockSpec, slot: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            states = real.select(args[0], block, slot).float()
            extended = torch.cat([states, states.new_ones(len(states), 1)], dim=1)
            with autocasting(states.device, None):  # whatever the model computes in
                sums[index] = sums[index] + extended.T @ extended

        return add

    handles = [
        inner.get_submodule(spec.projections[slot]).register_forward_pre_hook(adder(index, spec, slot))
        for index, (spec, slot) in enumerate(places)
    ]
    try:
        with in_mode(model, training=False):
            for batch in batches():
                model(**batch)
    finally:
        for handle in (*handles, real):
            handle.remove()
    return [total / total[-1, -1].clamp_min(1) for total in sums]


def correction(
    moment: Tensor, before: Tensor, after: Tensor, index: Tensor, rank: int, dtype: torch.dtype
) -> Correction:
    """The correction that brings what `after` gives on some inputs nearest to what `before` gives on all of them.

    Args:
        moment: mean of [x, 1] [x, 1]^T over the data, [in + 1, in + 1].
        before: [out, in].
        after: [out, kept inputs].
        index: which inputs are kept.
        rank: of the matrix that is added, at most; 0: a bias alone.
        dtype: in which the correction is kept.
    """
    size = len(moment) - 1
    mean = moment[:size, size]
    covariance = moment[:size, :size] - torch.outer(mean, mean)
    if not rank or not len(index):
        return Correction((before @ mean - after @ mean[index]).to(dtype))
    kept = covariance[index][:, index]
    ridge = _RIDGE * kept.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    wanted = before @ covariance[:, index] - after @ kept
    delta = torch.linalg.solve(kept + ridge * torch.eye(len(index), device=kept.device), wanted.T).T
    directions = torch.linalg.eigh(delta @ kept @ delta.T).eigenvectors[:, -rank:].flip(1)
    up, down = directions.to(dtype), (directions.T @ delta).to(dtype)
    bias = before @ mean - (after + up.float() @ down.float()) @ mean[index]  # also makes up for the rounding
    return Correction(bias.to(dtype), up, down)
