"""Models with a run's shapes and without weights: with PEFT modules, and cut as if every layer lost the same part.

The units that a cut removes are not known before estimation, so every layer counts as an average one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lightpeft.app.runs.workspace import Workspace
from lightpeft.config import LightConfig, RunConfig, override_light
from lightpeft.errors import require
from lightpeft.machine import accelerator, autocast_dtype, autocasting
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.loading import load_model_config, untrained_model
from lightpeft.models.unwrap import transformers_model
from lightpeft.models.vocabulary.cutting import cut_model
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.planning import make_plan
from lightpeft.plans.structure import MASKED, BlockSpec
from lightpeft.profiling.rehearsal import BatchShapes
from lightpeft.profiling.sizes import count_parameters
from lightpeft.prune.depth import leave_out
from lightpeft.prune.discovery import ensure_family
from lightpeft.prune.surgery import apply_plan
from lightpeft.training.prefix import FrozenPrefix, store_bytes

_TILT = 0.2
"""Assumed gain in score from the first block's neurons to the last block's, where neurons of all blocks compete."""


def check_in_memory(work: Workspace) -> None:
    """Require a run with floating-point weights in memory, most of them frozen; `check` knows no others.

    Raises:
        LightPeftError: the base is quantized or on disk, or all weights train.
    """
    model, own = work.config.model, load_model_config(work.config.model)
    stored = getattr(own, "quantization_config", None) is not None and model.gguf_file is None
    quantized = (
        f"check supports floating-point weights only, and {model.name} is quantized; leave model.quantization unset"
    )
    require(model.quantization is None and not stored, quantized)
    require(not model.low_memory, "check supports weights in memory only; set model.low_memory to false")
    require(work.config.method_spec.has_peft, "check does not support method full; set method to light or plain")


def with_peft(work: Workspace, config: RunConfig) -> PeftModel:
    """Make the run's model with PEFT modules, on the meta device."""
    loaded = untrained_model(config.model, work.task.head, work.task.labels)
    ensure_family(loaded.model)
    if work.vocabulary is not None:
        cut_model(loaded.model, work.vocabulary)
    with torch.device("meta"):
        model = add_peft(loaded, config)
    if config.training.gradient_checkpointing:
        model.enable_input_require_grads()
        # the other kind holds about as much, but its stand-ins refer to one another, and outlive what they stand for
        model.gradient_checkpointing_enable({"use_reentrant": True})
    return model


def cut_evenly(model: PeftModel, light: LightConfig) -> None:
    """Cut a model by random scores, because no real ones exist yet.

    Where neurons of all blocks compete, each block keeps another number of them, as after a real estimation: each
    shape that occurs only once costs memory.
    """
    dense = block_specs(transformers_model(model))
    stay = light.blocks_left(len(dense))
    blocks, left_out = dense[:stay], dense[stay:]
    base = count_parameters(model).base
    if left_out:
        leave_out(model, stay)
    sites = [site.spec for site in find_sites(model, blocks)]
    drawn = torch.Generator().manual_seed(0)

    def scores(count: int) -> Tensor:
        return torch.rand(count, generator=drawn)

    found = {f"{kind}/random/{block.index}": scores(getattr(block, kind)) for kind in MASKED for block in blocks}
    for place, block in enumerate(blocks):
        for kind in ("neurons", "expert_neurons"):
            found[f"{kind}/random/{block.index}"] += _TILT * place / len(blocks)
    found |= {f"ranks/random/{index}": scores(site.rank) for index, site in enumerate(sites)}
    found["modules/random"] = scores(len(sites))
    record = EstimationRecord(blocks, sites, found, base, fingerprint="", left_out=left_out)
    apply_plan(model, make_plan(record, with_even_shares(light, blocks)))


def with_even_shares(light: LightConfig, blocks: Sequence[BlockSpec]) -> LightConfig:
    """Return a budget that removes the same part of heads, neurons and experts in each block.

    Real scores would spread `light.remove.blocks` over them. Routers keep as many experts as they need.
    """
    named = {"criterion": "random", "module_criterion": "random", "rank_criterion": "random"}
    light = override_light(light, {"estimate": named})
    part = 0.0 if light.is_auto else light.known_blocks
    if part is None:
        return light
    spare = [1 - block.needed_experts / block.experts for block in blocks if block.experts]
    shares = light.with_shares(part).remove
    return replace(light, remove=replace(shares, experts=min([part, *spare]), scope=None))


def stored_states(work: Workspace, prefix: FrozenPrefix, shapes: BatchShapes) -> Tensor | None:
    """Compute the output of the frozen blocks for a batch; None: no block is frozen, or the run would not store it."""
    settings = work.prefix_cache
    steps = work.steps - work.stage.steps - work.last_steps
    seen = steps * work.pace.batch_size * work.pace.accumulation
    if settings is None or not prefix or seen <= work.pace.rows:
        return None
    batch = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items() if name != "labels"}
    with autocasting(device(), autocast_dtype(work.config.training)):
        states = prefix.compute(batch)
    return states if store_bytes_of(work, states) <= settings.limit else None


def store_bytes_of(work: Workspace, states: Tensor) -> int:
    """Return the bytes of the stored states of all training rows."""
    return store_bytes(work.train_rows["length"][:], states.shape[-1], states.dtype)


def shapes_of(batch: Mapping[str, Any]) -> BatchShapes:
    """Return the shape and data type of each tensor in a batch."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}


def device() -> torch.device:
    """Return the device that training uses: the accelerator, or else the CPU."""
    return accelerator() or torch.device("cpu")
