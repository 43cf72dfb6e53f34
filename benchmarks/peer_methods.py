"""The methods that `peers.py` compares: a declarative list, and how the models of those are made that are no run of
`lightpeft run` alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from peer_pruning import (
    Decider,
    Goal,
    apply_to_peft,
    by_magnitude,
    by_random,
    by_slimformers,
    by_torch_pruning,
)
from torch import nn

from lightpeft.app.runs.pipeline import Workspace
from lightpeft.app.runs.reproduce import Arm
from lightpeft.app.runs.reproduce.arms import NestedSettings
from lightpeft.app.runs.subject import Build, Made, adamw
from lightpeft.app.tasks.loading import task_facts
from lightpeft.config import merge_settings
from lightpeft.config.validation import load_yaml
from lightpeft.errors import require
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.loading import LoadedModel
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import SLOTS
from lightpeft.prune.depth import leave_out
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan
from lightpeft.training.acceleration import accelerated

Kind = Literal["plain", "pruned", "light"]
"""Dense model; pruned once before training; lightpeft."""
Maker = Callable[[Workspace, LoadedModel, Goal], nn.Module]
"""(run, dense model, how much has to go) -> the model to train."""
_NEAR = 0.05
"""Part of what has to go by which a peer may miss it: it cuts whole heads, as many in every block."""


@dataclass(frozen=True)
class Peer:
    """One way of fine-tuning."""

    label: str
    kind: Kind
    settings: NestedSettings = field(default_factory=dict)
    """Settings that differ from the given config."""
    make: Maker | None = None
    """Makes the model that trains; None: it is what `lightpeft run` makes of the settings."""
    accelerated: bool = False
    """Whether a model of its own trains with the faster steps of light runs, and without dropout in the base."""

    def arm(self, settings: NestedSettings) -> Arm:
        """The peer in a grid.

        Args:
            settings: what else differs from the given config.
        """
        return Arm(merge_settings(dict(self.settings), dict(settings)))

    def subject(self, goal: Goal) -> str | Build:
        """The subject of a measurement of speed."""
        if self.make is None:
            return "light" if self.kind == "light" else "plain"
        return Build(partial(_made, self.make, goal), self.accelerating)

    def accelerating(self, work: Workspace, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the block, the model trains as the peer has it."""
        return accelerated(model, dropout=0.0) if self.accelerated else nullcontext()


def _made(make: Maker, goal: Goal, work: Workspace) -> Made:
    return make(work, work.dense_model(), goal), adamw(work)


def plain_peft(work: Workspace, loaded: LoadedModel, goal: Goal) -> nn.Module:
    """PEFT as the settings have it, on the dense model."""
    return add_peft(loaded, work.config)


def tight(work: Workspace, loaded: LoadedModel, goal: Goal) -> nn.Module:
    """The same with batches that are padded to their longest row alone, as where a multiple would outgrow the model."""
    work.positions = work.config.data.max_length - 1
    return add_peft(loaded, work.config)


def full_model(work: Workspace, loaded: LoadedModel, goal: Goal) -> nn.Module:
    """Every weight trains."""
    return loaded.model


def top_half(work: Workspace, loaded: LoadedModel, goal: Goal) -> nn.Module:
    """LoRA on all projections of the upper half of the blocks; nothing is trained, or differentiated, below."""
    specs = block_specs(loaded.model)
    targets = [name for spec in specs[len(specs) // 2 :] for name in spec.projections.values()]
    return add_peft(loaded, replace(work.config, peft={**work.config.peft_settings, "target_modules": targets}))


def fewer_layers(work: Workspace, loaded: LoadedModel, goal: Goal) -> nn.Module:
    """The model without its top layers, as many as come nearest to the goal."""
    layers = len(block_specs(loaded.model))
    count = round(goal.removed / (goal.blocks / layers))
    require(count < layers, f"removing {count} of {layers} layers leaves none")
    leave_out(loaded.model, layers - count)
    return add_peft(loaded, work.config)


def pruned_lora(work: Workspace, loaded: LoadedModel, goal: Goal, *, decide: Decider, by: str) -> nn.Module:
    """LoRA on the model that `decide` cut once; a decision that is in the run folder is taken over."""
    started = time.perf_counter()
    new = not work.run.plan.is_file()
    blocks = decide(work, loaded.model, goal) if new else PrunePlan.load(work.run.plan).blocks
    model = add_peft(loaded, work.config)
    plan = apply_to_peft(model, blocks, by)
    missed = abs(plan.removed_parameters - goal.removed)
    require(
        missed <= _NEAR * goal.removed,
        f"{by} removes {plan.removed_parameters:,} parameters, and {goal.removed:,} are to go: sizes would differ",
    )
    apply_plan(model, plan)
    if new:
        work.run.finish_stage("prune", time.perf_counter() - started, lambda: plan.save(work.run.plan))
    return as_light(model, plan, task=task_facts(work.task))


def one_shot(label: str, by: str, decide: Decider) -> Peer:
    """LoRA on q and v of a model that was pruned once before training."""
    return Peer(label, "pruned", LORA, partial(pruned_lora, decide=decide, by=by))


PLAIN = {"method": "plain"}
LORA = {**PLAIN, "peft": {"type": "lora", "slots": None, "target_modules": None}}
"""LoRA on q and v."""
BASELINE = "lora"
"""The method that all others are compared with."""
_ALL_RANKS = {"preset": "accurate", "remove": {"blocks": 0.6}}
_FOUR_RANKS = {"remove": {"blocks": 0.4}, "modules": {"remove_ranks": 0.5}, "rates": {"scale": 1.0}}
LIGHT: dict[str, Any] = {
    "paper": "paper",
    "default": 0.6,
    "thorough": _ALL_RANKS,
    "uniform": {"remove": {"blocks": 0.5, "scope": "layerwise"}},
    "fast": _FOUR_RANKS,
    "auto": "auto",
}
"""Settings of light runs, by the names that their results have."""
PEERS: dict[str, Peer] = {
    BASELINE: Peer("LoRA on q, v", "plain", LORA),
    # light runs gain from widths that are multiples of 8 tokens; this is what they cost plain LoRA
    "lora_tight": Peer("LoRA on q, v, padded to the longest row", "plain", LORA, tight),
    # what of the speed is the implementation, and not the smaller model
    "lora_lean": Peer("LoRA on q, v, steps as in light runs", "plain", LORA, plain_peft, accelerated=True),
    "lora_all": Peer("LoRA on all linear", "plain", merge_settings(LORA, {"peft": {"slots": list(SLOTS)}})),
    "lora_top": Peer("LoRA on all linear, top half", "plain", LORA, top_half),
    "houlsby": Peer(
        "Houlsby adapters",
        "plain",
        # adapters have eight times LoRA's parameters: no higher rate than this
        {**PLAIN, "peft": {"type": "bottleneck", "placement": "houlsby"}, "training": {"learning_rate": 1e-3}},
    ),
    # every weight moves by about the rate a step, so what LoRA needs would destroy the pretrained weights; 1e-4 is the
    # upper end of what small BERTs are fine-tuned with
    "full": Peer("full fine-tuning", "plain", {"method": "full", "training": {"learning_rate": 1e-4}}, full_model),
    "random": one_shot("random pruning, LoRA", "random", by_random),
    "magnitude": one_shot("magnitude pruning, LoRA", "magnitude", by_magnitude),
    "tp_magnitude": one_shot(
        "Torch-Pruning L2, LoRA", "tp_magnitude", partial(by_torch_pruning, criterion="magnitude")
    ),
    "tp_taylor": one_shot("Torch-Pruning Taylor, LoRA", "tp_taylor", partial(by_torch_pruning, criterion="taylor")),
    "slimformers": one_shot("slimformers, LoRA", "slimformers", by_slimformers),
    "depth": Peer("fewer layers, LoRA", "pruned", LORA, fewer_layers),
    **{
        f"light_{name}": Peer(f"lightpeft {name}", "light", {"method": "light", "light": light})
        for name, light in LIGHT.items()
    },
}
"""By name, lightpeft with several settings at the end."""


def shared_settings(path: Path) -> dict[str, Any]:
    """Settings of a config for all peers, without those that differ from cell to cell."""
    return {name: value for name, value in load_yaml(path).items() if name not in ("light", "method", "output", "seed")}


def own_settings(path: Path, name: str) -> dict[str, Any]:
    """Settings of a config for one peer: `light` for `light_default` alone, since it would make all others alike."""
    data = load_yaml(path)
    return {"light": data["light"]} if name == "light_default" and "light" in data else {}
