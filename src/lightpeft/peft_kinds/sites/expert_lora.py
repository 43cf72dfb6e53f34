"""LoRA on the 3-D parameters of routed experts (PEFT's `target_parameters`): an A and a B of its own for every expert.

PEFT keeps those of all experts in two linear layers that are never called: A is [experts * rank, in], expert by expert,
and B [out, rank * experts], rank by rank. Before each forward pass it adds their products to the parameter; two
parameters of one module have two modules of PEFT, one inside the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lightpeft.compat.peft import ParamWrapper
from lightpeft.errors import require
from lightpeft.models.experts import ExpertLayer, ExpertRows, gather, watch
from lightpeft.peft_kinds.sites.base import Report, Tensors
from lightpeft.peft_kinds.sites.lora import DOWN, UP, Lora
from lightpeft.plans.layout import kept_experts
from lightpeft.plans.records import BlockPlan
from lightpeft.plans.structure import EXPERT_SLOTS, BlockSpec, SiteSpec


class ExpertLoraSite(Lora):
    """`E_e(x)` with `W_e + scaling * B_e A_e` in the place of `W_e`, for every expert e of a layer."""

    layer_type = ParamWrapper

    @property
    def parameter(self) -> str:
        """The one that is adapted."""
        return str(self.layer.parameter_name)

    @property
    def place(self) -> str:
        return self.spec.name.rpartition(".")[0]

    @property
    def downs(self) -> Tensor:
        """A of each expert, [experts, rank, in]."""
        return self._downs_of(self.down.detach(), self.layer.num_experts)

    @property
    def ups(self) -> Tensor:
        """B of each expert, [experts, out, rank]."""
        return self._ups_of(self.up.detach(), self.layer.num_experts)

    @staticmethod
    def _downs_of(down: Tensor, experts: int) -> Tensor:
        return down.view(experts, -1, down.shape[1])

    @staticmethod
    def _ups_of(up: Tensor, experts: int) -> Tensor:
        return up.view(len(up), -1, experts).permute(2, 0, 1)

    def by_rank_down(self, like_down: Tensor) -> Tensor:
        """A rank is that of all experts together."""
        return self._downs_of(like_down, self.layer.num_experts).transpose(0, 1).flatten(1)

    def by_rank_up(self, like_up: Tensor) -> Tensor:
        return self._ups_of(like_up, self.layer.num_experts).flatten(0, 1)

    def observe(self, report: Report, counting: Callable[[], bool]) -> list[RemovableHandle]:
        """What is added to the outputs of a token's experts, against these outputs without it."""

        @torch.no_grad()
        def compare(rows: ExpertRows) -> None:
            if counting():
                delta = self._added(rows)
                base = rows.product - self.scaling * delta
                report(rows.of_tokens(delta), rows.of_tokens(base), self.scaling)

        return [watch(self.base, self.parameter, compare)]

    def _added(self, rows: ExpertRows) -> Tensor:
        """B_e A_e x of each row, [rows, out]."""
        parts = zip(rows.states.to(self.down.dtype).split(rows.counts), self.downs, self.ups, strict=True)
        return torch.cat([functional.linear(functional.linear(x, down), up) for x, down, up in parts if len(x)])

    def check_fitted(self, spec: BlockSpec, kept: BlockPlan) -> None:
        alone = len(kept.experts) == 1 and getattr(self.base, "is_transposed", False)
        require(
            not alone, f"LoRA on {self.spec.name}, whose matrices are transposed, is for several experts; keep more"
        )

    def fit(self, spec: BlockSpec, kept: BlockPlan) -> None:
        """Experts go with their A and B; where neurons go, so do rows of B, or columns of A."""
        if len(kept.expert_neurons) == spec.expert_neurons:
            return
        experts, neurons = (index.to(self.device) for index in kept_experts(spec, kept))
        channels = self._channels(neurons)
        downs, ups = self.downs[experts], self.ups[experts]
        self._take(*((downs, gather(ups, channels, 1)) if self._cuts_outputs else (gather(downs, channels, 2), ups)))

    def _slice_ranks(self, index: Tensor) -> None:
        index = index.to(self.device)
        self._take(self.downs[:, index], self.ups[:, :, index])

    def unfitted(self, learned: Tensors, spec: BlockSpec, kept: BlockPlan) -> Tensors:
        """A and B of further experts, rows of B, columns of A and further ranks are zero."""
        experts, neurons = kept_experts(spec, kept)
        channels, count = self._channels(neurons).unsqueeze(1), len(experts)
        downs, ups = self._downs_of(learned[DOWN], count), self._ups_of(learned[UP], count).mT
        wide_downs, wide_ups = (downs.new_zeros(self.downs.shape), ups.new_zeros(self.ups.mT.shape))
        ranks, place = torch.arange(downs.shape[1]).unsqueeze(1), experts.view(-1, 1, 1)
        if self._cuts_outputs:
            wide_downs[experts, : downs.shape[1]] = downs
            wide_ups[place, ranks, channels] = ups
        else:
            wide_downs[place, ranks, channels] = downs
            wide_ups[experts, : downs.shape[1]] = ups
        return {DOWN: _stacked_downs(wide_downs), UP: _stacked_ups(wide_ups.mT)}

    @property
    def _cuts_outputs(self) -> bool:
        return self.spec.slot == "experts_gate_in"

    def _channels(self, neurons: Tensor) -> Tensor:
        """Of each expert, the entries that belong to these neurons, [experts, entries]."""
        return ExpertLayer(self.base, router=None).channels(self.parameter, neurons)

    def _take(self, downs: Tensor, ups: Tensor) -> None:
        """Make these A and B of all experts the module's own."""
        _replace(self.layer.lora_A[self.adapter], _stacked_downs(downs))
        _replace(self.layer.lora_B[self.adapter], _stacked_ups(ups))
        self.layer.num_experts = len(downs)
        self.layer.in_features, self.layer.out_features = downs.shape[2], ups.shape[1]


def _stacked_downs(downs: Tensor) -> Tensor:
    """[experts, rank, in] -> [experts * rank, in]."""
    return downs.flatten(0, 1)


def _stacked_ups(ups: Tensor) -> Tensor:
    """[experts, out, rank] -> [out, rank * experts]."""
    return ups.permute(1, 2, 0).flatten(1)


def _replace(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = weight.shape


def expert_sites(module: nn.Module | None, block: BlockSpec, adapter: str) -> Iterator[ExpertLoraSite]:
    """The sites on the experts of a block, in the order of slots.

    Args:
        module: the experts, with PEFT's modules around them.
    """
    layers: dict[str, ParamWrapper] = {}
    while isinstance(module, ParamWrapper):
        layers[module.parameter_name] = module
        module = module.base_layer
    place = block.expert_modules["experts"]
    require(  # PEFT's files name modules by what is inside what
        list(layers) != list(EXPERT_SLOTS.values()),
        f"PEFT has nested its modules on {place} as it would not on a model fresh from its files; start from one",
    )
    for slot, name in EXPERT_SLOTS.items():
        rank = ExpertLoraSite.rank_of(layers[name], adapter) if name in layers else 0
        if rank:
            spec = SiteSpec(f"{place}.{name}", rank, block.index, slot)
            yield ExpertLoraSite(spec, layers[name], adapter)
