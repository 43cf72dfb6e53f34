"""The methods that `peers.py` compares: a declarative list, and how each one's model is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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

from lightpeft.config import PRESETS, RunConfig, run_config_from_dict
from lightpeft.config.validation import load_yaml
from lightpeft.errors import require
from lightpeft.machine import autocast_dtype
from lightpeft.models.families import block_specs
from lightpeft.models.loading import LoadedModel
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.plans.records import PrunePlan
from lightpeft.plans.structure import SLOTS
from lightpeft.prune.depth import leave_out
from lightpeft.prune.surgery import apply_plan
from lightpeft.runs import pipeline
from lightpeft.runs.bench import Made, adamw
from lightpeft.runs.pipeline import Workspace
from lightpeft.saved.light_adapter import as_light
from lightpeft.tasks import task_facts
from lightpeft.training.acceleration import accelerated

Kind = Literal["plain", "pruned", "light"]
"""Dense model; pruned once before training; lightpeft."""
Builder = Callable[[Workspace, LoadedModel, Goal], nn.Module]
"""(run, dense model, how much has to go) -> the model to train."""


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning."""

    name: str
    label: str
    kind: Kind
    build: Builder | None = None
    """None: lightpeft runs it from beginning to end."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `RunConfig` by dotted name that differ from the given config's."""
    accelerated: bool = False
    """Whether it trains with the faster steps of light runs, and without dropout in the base."""

    def make(self, goal: Goal, work: Workspace) -> Made:
        """The model to train, and the factory of its optimizer."""
        assert self.build is not None
        return self.build(work, pipeline.dense_model(work), goal), adamw(work)

    def accelerating(self, work: Workspace, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the block, the model trains as the method has it."""
        lengths, autocast = work.train_rows["length"][:], autocast_dtype(work.config.training)
        return accelerated(model, lengths, dropout=0.0, autocast=autocast) if self.accelerated else nullcontext()


def plain_peft(work: Workspace, loaded: LoadedModel, goal: Goal) -> nn.Module:
    """PEFT as the settings have it, on the dense model."""
    return add_peft(loaded, work.config)


def full_model(work: Workspace, loaded: LoadedModel, goal: Goal) -> nn.Module:
    """Every weight trains."""
    return loaded.model


def top_half(work: Workspace, loaded: LoadedModel, goal: Goal) -> nn.Module:
    """LoRA on all projections of the upper half of the blocks; nothing is trained, or differentiated, below."""
    specs = block_specs(loaded.model)
    targets = [name for spec in specs[len(specs) // 2 :] for name in spec.projections.values()]
    return add_peft(loaded, replace(work.config, lora=replace(work.config.lora, target_modules=targets)))


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
    apply_plan(model, plan)
    if new:
        work.run.finish_stage("prune", time.perf_counter() - started, lambda: plan.save(work.run.plan))
    return as_light(model, plan, task=task_facts(work.task))


def one_shot(name: str, label: str, decide: Decider) -> Method:
    """LoRA on q and v of a model that was pruned once before training."""
    return Method(name, label, "pruned", partial(pruned_lora, decide=decide, by=name), LORA)


LORA = {"peft": "lora", "lora.slots": None, "lora.target_modules": None}
"""LoRA on q and v."""
BASELINE = "lora"
"""What all others are compared with."""
PEERS = (
    Method(BASELINE, "LoRA on q, v", "plain", plain_peft, LORA),
    # light runs gain from widths that are multiples of 8 tokens; this is what they cost plain LoRA
    Method(
        "lora_tight",
        "LoRA on q, v, padded to the longest row",
        "plain",
        plain_peft,
        LORA | {"training.pad_to_multiple_of": 1},
    ),
    # what of the speed is the implementation, and not the smaller model
    Method("lora_lean", "LoRA on q, v, steps as in light runs", "plain", plain_peft, LORA, accelerated=True),
    Method("lora_all", "LoRA on all linear", "plain", plain_peft, LORA | {"lora.slots": list(SLOTS)}),
    Method("lora_top", "LoRA on all linear, top half", "plain", top_half, LORA),
    Method(
        "houlsby",
        "Houlsby adapters",
        "plain",
        plain_peft,
        # adapters have eight times LoRA's parameters: no higher rate than this
        {"peft": "bottleneck", "bottleneck.placement": "houlsby", "training.learning_rate": 1e-3},
    ),
    # every weight moves by about the rate a step, so what LoRA needs would destroy the pretrained weights; 1e-4 is the
    # upper end of what small BERTs are fine-tuned with
    Method("full", "full fine-tuning", "plain", full_model, LORA | {"training.learning_rate": 1e-4}),
    one_shot("random", "random pruning, LoRA", by_random),
    one_shot("magnitude", "magnitude pruning, LoRA", by_magnitude),
    one_shot("tp_magnitude", "Torch-Pruning L2, LoRA", partial(by_torch_pruning, criterion="magnitude")),
    one_shot("tp_taylor", "Torch-Pruning Taylor, LoRA", partial(by_torch_pruning, criterion="taylor")),
    one_shot("slimformers", "slimformers, LoRA", by_slimformers),
    Method("depth", "fewer layers, LoRA", "pruned", fewer_layers, LORA),
)


def methods() -> dict[str, Method]:
    """All methods by name: the peers, and lightpeft with every preset."""
    lights = [Method(f"light_{preset}", f"lightpeft {preset}", "light") for preset in PRESETS]
    return {method.name: method for method in (*PEERS, *lights)}


def light_config(path: Path, preset: str, own: Path | None = None) -> RunConfig:
    """The config of lightpeft with a preset: the file itself for its own preset; else without its `light` section.

    What a file sets under `light` was chosen for its own preset and would make all presets alike.

    Args:
        own: another file to take for this preset.
    """
    data = load_yaml(own or path)
    if own is None and data.get("preset", "default") != preset:
        data = {name: value for name, value in data.items() if name != "light"} | {"preset": preset}
    return replace(run_config_from_dict(data), method="light")


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The config with some settings, by dotted name, replaced."""
    for path, value in settings.items():
        section, _, key = path.rpartition(".")
        change = {section: replace(getattr(config, section), **{key: value})} if section else {key: value}
        config = replace(config, **change)
    return config
