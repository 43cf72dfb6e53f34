"""One-shot pruning before any training, by other criteria and other libraries: which heads and neurons stay.

Every decider takes the dense model and says what stays of each block; lightpeft's surgery then cuts, so that all pruned
models are cut, saved and loaded alike. Torch-Pruning and slimformers would cut the same themselves
(`tests/test_peers.py` compares the logits).
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightpeft.app.runs.pipeline import Workspace
from lightpeft.app.runs.subject import sample_batches
from lightpeft.config import LightConfig, override_light
from lightpeft.errors import require
from lightpeft.models.arguments import change_arguments
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.linears.linear_kinds import dense_weight, is_linear
from lightpeft.models.loading import LoadedModel
from lightpeft.models.unwrap import base_linear, transformers_model
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.plans import scoring
from lightpeft.plans.block_plan import BlockPlan, block_parameters
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.layout import squared_norms
from lightpeft.plans.planning import make_plan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import BlockSpec, SiteSpec
from lightpeft.profiling.sizes import count_parameters
from lightpeft.prune.fingerprint import fingerprint

CALIBRATION_BATCHES = 10
"""Training batches that the criteria of other libraries may look at; the number in their own examples."""

Decider = Callable[[Workspace, PreTrainedModel, "Goal"], tuple[BlockPlan, ...]]
"""(run, dense model without PEFT, how much has to go) -> what stays of each block."""


@dataclass(frozen=True)
class Goal:
    """How much every pruned peer removes: what the light run removes."""

    light: LightConfig
    """The light run's."""
    removed: int
    """Base parameters that the light run's plan removes."""
    heads: int
    """Heads a block that go, on average and rounded."""
    base: int
    """Base parameters of the dense model."""
    blocks: int
    """Those of its transformer blocks."""
    head: int
    """Those of the task's head, which every method trains."""

    def neurons(self, specs: Sequence[BlockSpec]) -> int:
        """Neurons a block that have to go beside `heads` so that `removed` is met as nearly as whole numbers allow."""
        by_heads = sum(self.heads * (spec.head_parameters + spec.kv_parameters) for spec in specs)
        return max(0, round((self.removed - by_heads) / sum(spec.neuron_parameters for spec in specs)))


def goal_of(loaded: LoadedModel, light: LightConfig) -> Goal:
    """The amount that a plan of these settings removes; which units those are hardly changes how many parameters go.

    Raises:
        LightPeftError: they have a depth and no total, which the peers could take for theirs.
    """
    said = "with light.remove.depth, say in light.remove.blocks how much goes in all"
    require(not light.remove.depth or light.remove.blocks is not None, said)
    plan = _plan(loaded.model, light, "random", seed=0)
    heads = sum(spec.heads - len(kept.heads) for spec, kept in plan.parts)
    return Goal(
        light=light,
        removed=plan.removed_parameters,
        heads=round(heads / len(plan.blocks)),
        base=plan.base_parameters,
        blocks=sum(block_parameters(spec) for spec in plan.specs),
        head=sum(p.numel() for name in loaded.new_modules for p in loaded.model.get_submodule(name).parameters()),
    )


def apply_to_peft(model: PeftModel, blocks: tuple[BlockPlan, ...], by: str) -> PrunePlan:
    """The plan that keeps `blocks` and every PEFT module in full.

    LoRA starts at zero and its modules on q and v are cut along the heads alone, so adding it before the cut or
    afterwards is the same.
    """
    specs = block_specs(transformers_model(model))
    sites = [site.spec for site in find_sites(model, specs)]
    return PrunePlan(
        specs=tuple(specs),
        blocks=blocks,
        sites={site.name: tuple(range(site.rank)) for site in sites},
        dense_sites=tuple(sites),
        base_parameters=count_parameters(model).base,
        fingerprint=fingerprint(model, specs),
        budget={"by": by},
    )


# lightpeft's own plan and surgery with criteria that need no training


def by_random(work: Workspace, model: PreTrainedModel, goal: Goal) -> tuple[BlockPlan, ...]:
    """Heads and neurons at random."""
    return _plan(model, goal.light, "random", work.config.seed).blocks


def by_magnitude(work: Workspace, model: PreTrainedModel, goal: Goal) -> tuple[BlockPlan, ...]:
    """The heads and neurons with the largest weight norms."""
    return _plan(model, goal.light, "magnitude", work.config.seed).blocks


def _plan(model: PreTrainedModel, light: LightConfig, criterion: str, seed: int) -> PrunePlan:
    """A plan of the run's counts and scopes; it knows one PEFT module that stays whatever happens."""
    estimate = {"criterion": criterion, "module_criterion": "random", "rank_criterion": "random"}
    plain = override_light(light.with_all_modules().with_depth(0.0), {"estimate": estimate, "modules": {"blocks": 1.0}})
    return make_plan(_record(model, seed), plain)


@torch.no_grad()
def _record(model: PreTrainedModel, seed: int) -> EstimationRecord:
    """Random scores and weight norms of every head and neuron."""
    specs = block_specs(model)
    generator = torch.Generator().manual_seed(seed)
    scores = {"modules/random": torch.zeros(1), "ranks/random/0": torch.zeros(1)}
    for spec in specs:
        norms = [squared_norms(spec, slot, dense_weight(base_linear(model, n))) for slot, n in spec.projections.items()]
        for kind, of_kind in zip(("heads", "neurons"), zip(*norms, strict=True), strict=True):
            norm = torch.stack(of_kind).sum(0).sqrt().cpu()
            scores[f"{kind}/magnitude/{spec.index}"] = norm
            scores[f"{kind}/random/{spec.index}"] = scoring.random(len(norm), generator)
    return EstimationRecord(specs, [SiteSpec("none", 1, None, None)], scores, count_parameters(model).base, "")


# Torch-Pruning


def by_torch_pruning(
    work: Workspace, model: PreTrainedModel, goal: Goal, criterion: str = "taylor"
) -> tuple[BlockPlan, ...]:
    """The units that Torch-Pruning keeps (DepGraph, Fang et al., CVPR 2023), with equal ratios in every layer.

    Args:
        criterion: "magnitude": L2 norms of the coupled weights; "taylor": first-order Taylor on training batches. At
            this moment the task's head is untrained, as it is in any pruning before fine-tuning.
    """
    specs = block_specs(model)
    return _from_history(specs, torch_pruned(work, copy.deepcopy(model), goal, criterion).pruning_history())


def torch_pruned(work: Workspace, model: PreTrainedModel, goal: Goal, criterion: str) -> Any:
    """Let Torch-Pruning cut the model, in place; returns its pruner.

    The hidden size stays: only the outputs of q, k, v and of the FFN's first projections may begin a group.

    Raises:
        LightPeftError: query heads share KV heads.
    """
    import torch_pruning

    specs = block_specs(model)
    grouped = any(spec.kv_heads != spec.heads for spec in specs)
    require(not grouped, "Torch-Pruning is run on models whose query heads have a KV head each; see benchmarks/README")
    batches = sample_batches(work, CALIBRATION_BATCHES)
    if criterion == "taylor":
        _accumulate_gradients(model, batches)
    heads = {_layer(model, spec, slot): spec.heads for spec in specs for slot in ("q", "k", "v")}
    first = [slot for slot in ("ffn_in", "ffn_gate") if slot in specs[0].projections]
    roots = {*heads, *(_layer(model, spec, slot) for spec in specs for slot in first)}
    weighted = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    importance = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
        "taylor": torch_pruning.importance.GroupTaylorImportance,
    }[criterion]
    shown = {name: value[:1] for name, value in batches[0].items() if name != "labels"}
    with _arguments_by_head_untraced(model, specs):
        pruner = torch_pruning.pruner.BasePruner(
            model.eval(),
            shown,
            importance=importance(),
            pruning_ratio=_share(goal.neurons(specs), specs[0].neurons),
            head_pruning_ratio=_share(goal.heads, specs[0].heads),
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            ignored_layers=[module for module in weighted if module not in roots],
            output_transform=lambda output: output.logits.sum(),
            # the library's defaults are one dictionary for all pruners of a process
            in_channel_groups={},
            out_channel_groups={},
        )
    pruner.step()
    return pruner


@contextlib.contextmanager
def _arguments_by_head_untraced(model: PreTrainedModel, specs: Sequence[BlockSpec]) -> Iterator[None]:
    """Inside the block, no graph leads from an attention to what it is given with an entry a head.

    Such a bias of positions comes from one table for all blocks. The library would have the heads of all of them hang
    together with it, and cut none.
    """
    with contextlib.ExitStack() as stack:
        for spec in specs:
            untraced = dict.fromkeys(spec.per_head_arguments, Tensor.detach)
            stack.callback(change_arguments(model.get_submodule(spec.attention), untraced).remove)
        yield


def _accumulate_gradients(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> None:
    device = next(model.parameters()).device
    for batch in batches:
        model.eval()(**{name: value.to(device) for name, value in batch.items()}).loss.backward()


def _share(count: int, units: int) -> float:
    """A ratio that both libraries turn into exactly `count` of `units`, however they round."""
    return max(count - 0.5, 0.0) / units


def _layer(model: PreTrainedModel, spec: BlockSpec, slot: str) -> nn.Module:
    require(slot in spec.projections, f"{type(model).__name__} fuses its projections; this library needs q, k and v")
    layer = model.get_submodule(spec.projections[slot])
    require(is_linear(layer), f"{spec.projections[slot]} is not a linear layer")
    return layer


def _from_history(specs: Sequence[BlockSpec], history: Sequence[Sequence[Any]]) -> tuple[BlockPlan, ...]:
    """The units that stay of each block, from the modules and channels that were pruned."""
    owners = {name: (spec.index, slot) for spec in specs for slot, name in spec.projections.items()}
    gone: dict[tuple[int, str], set[int]] = {}
    for name, _, channels in history:
        index, slot = owners[name]
        kind, size = ("neurons", 1) if slot.startswith("ffn") else ("heads", specs[index].head_dim)
        gone.setdefault((index, kind), set()).update(channel // size for channel in channels)
    return tuple(
        _stays(spec, gone.get((spec.index, "heads"), set()), gone.get((spec.index, "neurons"), set())) for spec in specs
    )


def _stays(spec: BlockSpec, heads: set[int], neurons: set[int]) -> BlockPlan:
    """All but these heads and neurons, in a block with a KV head for every head."""
    kept = tuple(head for head in range(spec.heads) if head not in heads)
    return BlockPlan(kept, kept, tuple(neuron for neuron in range(spec.neurons) if neuron not in neurons))


# slimformers


def by_slimformers(work: Workspace, model: PreTrainedModel, goal: Goal) -> tuple[BlockPlan, ...]:
    """The units that slimformers keeps: the largest mean activations, FFN first, then heads by their queries."""
    specs = block_specs(model)
    kept = slimmed(work, copy.deepcopy(model), goal)
    neurons, heads = kept[: len(specs)], kept[len(specs) :]
    return tuple(
        BlockPlan(tuple(of_heads), tuple(of_heads), tuple(of_neurons))
        for of_heads, of_neurons in zip(heads, neurons, strict=True)
    )


def slimmed(work: Workspace, model: PreTrainedModel, goal: Goal) -> list[list[int]]:
    """Let slimformers cut the model, in place; returns the units it kept, neurons of all blocks before heads.

    It finds blocks by the model's class name and knows the classes without a task's head only, so the class at hand
    is entered under the base's. It adds activations of batches up, so all batches are padded to one length.

    Raises:
        LightPeftError: it does not know the base's class, or query heads share KV heads.
    """
    vars(transformers.modeling_utils).setdefault("Conv1D", Conv1D)  # where the library, made for version 4, imports it
    import slimformers
    from slimformers.discovery import ATTENTION_DISCOVERY_REGISTRY, DISCOVERY_REGISTRY

    specs = block_specs(model)
    require(all(spec.kv_heads == spec.heads for spec in specs), "slimformers cuts keys as if every head had its own")
    known, own = type(model.base_model).__name__, type(model).__name__
    for registry in (DISCOVERY_REGISTRY, ATTENTION_DISCOVERY_REGISTRY):
        require(known in registry, f"slimformers does not know {known}")
        registry.setdefault(own, registry[known])
    kept: list[list[int]] = []

    def strategy(activations: Tensor, sparsity: float) -> tuple[Tensor, int]:
        """The library's own rule; what it keeps is noted, in ascending order."""
        stays, units = pruner._compute_topk_neurons(activations, sparsity)
        kept.append(sorted(stays.tolist()))
        return torch.tensor(kept[-1], device=stays.device), units

    with contextlib.redirect_stdout(io.StringIO()):
        pruner = slimformers.Pruner(model, pruning_strategy=strategy)
        steps = [
            ("ffn", {"sparsity": _share(goal.neurons(specs), specs[0].neurons)}),
            ("attn", {"sparsity": _share(goal.heads, specs[0].heads)}),
        ]
        pruner.prune(_equal_batches(work), strategy=steps, max_batches=CALIBRATION_BATCHES)
    return kept


def _equal_batches(work: Workspace) -> list[dict[str, Tensor]]:
    """Full training batches, all of the greatest length."""
    size = min(work.config.training.batch_size, len(work.train_rows))
    collator = work.task.collator(work.tokenizer, work.config.data.max_length)
    starts = range(0, len(work.train_rows) - size + 1, size)
    rows = [work.train_rows.select(range(start, start + size)).to_list() for start in starts[:CALIBRATION_BATCHES]]
    return [dict(collator(batch)) for batch in rows]
