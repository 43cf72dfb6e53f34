"""Discovery of families that are not listed: a structure is proposed, and checked on a small random model.

The check compares masking with surgery: with masks of 0 and 1, and with the masked units cut out, the model must
compute the same values and generate the same tokens.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft.errors import LightPeftError, require
from lightpeft.files.foreign import parsing
from lightpeft.models.families.family_table import FAMILIES, REFUSED, block_specs, check_not_refused, register_family
from lightpeft.models.families.proposal import propose_families
from lightpeft.models.families.skeleton import random_inputs, run, skeleton, skeleton_config
from lightpeft.models.families.spec import Family
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import BlockSpec
from lightpeft.prune.masks import UnitMasks
from lightpeft.prune.surgery import apply_plan

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Maximum relative difference that passes the check, in float32."""
EFFECT = 1e-2
"""Minimum relative difference that masks must make to the dense model, so that the check is meaningful."""


_discovered: dict[str, tuple[Family, str]] = {}
"""Model type -> its discovered family, and the model class and config that the check used."""


def ensure_family(model: nn.Module) -> None:
    """Register the family of a transformers model, or of the one in a PeftModel: discover it if it is not listed.

    A discovery takes seconds and runs once per model class and config, on a random model of two layers; the weights of
    `model` are not read. Equal configs give equal structures.

    Example:
        model = AutoModelForCausalLM.from_pretrained("owner/new-architecture")
        ensure_family(model)  # then the model can be pruned like those of listed families

    Args:
        model: a transformers model, or a PeftModel around one.

    Raises:
        LightPeftError: the family cannot be pruned, or it is not listed and no proposed structure passes the check.
    """
    inner = transformers_model(model)
    if not isinstance(inner, PreTrainedModel):
        return  # the next check refuses it
    model_type = inner.config.model_type
    known, checked = _discovered.get(model_type, (None, ""))
    if model_type in REFUSED or (model_type in FAMILIES and FAMILIES[model_type] is not known):
        check_not_refused(model_type)
        return
    try:
        with parsing(f"{type(inner).__name__} differs from transformers' own models"):  # it may raise any exception
            settings = f"{type(inner).__name__} {skeleton_config(inner.config).to_json_string(use_diff=False)}"
            if model_type in FAMILIES and checked == settings:
                return
            family = discover_family(inner)
    except LightPeftError as error:
        raise LightPeftError(
            f'model family "{model_type}" is not supported, and its structure could not be discovered: {error}; '
            "add an entry for it (docs/reference/families.md)"
        ) from error
    block_specs(inner, family)  # layers beyond the first two may differ
    register_family(family)
    _discovered[model_type] = family, settings
    logger.warning(
        'model family "%s" is not listed; its structure was discovered and checked (masking and pruning agree): %s',
        model_type,
        describe(family),
    )


def discover_family(model: PreTrainedModel) -> Family:
    """Return the first proposed family of a model that passes the check.

    Raises:
        LightPeftError: no family was proposed, or none passes; the message names the structure and the mismatch.
    """
    small, failure = skeleton(model), "no structure was proposed"
    for family in propose_families(small):
        try:
            check_family(small, family)
        except LightPeftError as error:
            failure = f"{error}; found: {describe(family)}"
        else:
            return family
    raise LightPeftError(failure)


def check_family(small: PreTrainedModel, family: Family) -> None:
    """Check that pruning a random model by a family's structure equals masking it.

    Random plans remove KV groups, query heads of every group, neurons, and whole sub-layers. The check compares the
    model's first output and that of the last block of every list, at real tokens, with padding on either side, and
    generated tokens.

    Raises:
        LightPeftError: the results differ, masks have no effect, or the structure does not fit or cannot be cut.
    """
    specs = block_specs(small, family)
    dense = _compute_outputs(small, family)
    for what, blocks in trial_plans(specs, torch.Generator().manual_seed(3)).items():
        plan = PrunePlan(tuple(specs), tuple(blocks), {}, (), small.num_parameters(), "")
        _check_plan(small, family, plan, dense, what)


def _check_plan(small: PreTrainedModel, family: Family, plan: PrunePlan, dense: list[Tensor], what: str) -> None:
    masked, pruned = copy.deepcopy(small), copy.deepcopy(small)
    masks = UnitMasks(plan.specs)
    masks.set_plan(plan)
    masks.attach(masked)
    with parsing(f"{what} cannot be cut"):
        apply_plan(pruned, plan, family)
    expected = _compute_outputs(masked, family)
    require(_difference(expected, dense) > EFFECT, f"masks of {what} have no effect")
    try:
        difference = _difference(_compute_outputs(pruned, family), expected)
    except LightPeftError as error:
        raise LightPeftError(f"without {what}, {error}") from error
    require(difference <= TOLERANCE, f"masking and pruning {what} differ by {difference:.1e} of the values")
    if small.can_generate() and small.main_input_name == "input_ids":
        require(_generate(pruned).equal(_generate(masked)), f"masking and pruning {what} generate different tokens")


def describe(family: Family) -> str:
    """Describe a family in one line: slot=module for every list of blocks."""
    stacks = []
    for stack in family.stacks:
        slots = ", ".join(f"{slot}={name}" for slot, name in stack.tables[0].items())
        fused = ", qkv by KV groups" if stack.interleaved else ""
        counts = "".join(f", {name}={quantity}" for name, quantity in stack.head_attributes.items())
        by_head = "".join(f", {name} by head" for name in stack.per_head_arguments)
        stacks.append(f"{stack.layers}[{slots}{fused}{counts}{by_head}]")
    return " ".join(stacks)


def _compute_outputs(model: PreTrainedModel, family: Family) -> list[Tensor]:
    """Compute the outputs of the model and of each list's last block at real tokens, with padding on either side."""
    lists = [model.base_model.get_submodule(layers) for layers in {stack.layers: None for stack in family.stacks}]
    values = []
    for padding in ("right", "left"):
        inputs = random_inputs(model, padding=padding)
        note = _RecordOutput()
        last = run(model, inputs, [list(blocks.children())[-1].register_forward_hook(note) for blocks in lists])
        values += [_select_real(value, inputs.get("attention_mask")) for value in (*note.seen, last)]
    return values


class _RecordOutput:
    """Forward hook that keeps the first output of a module at every call."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self.seen.append(output if isinstance(output, Tensor) else output[0])


def _select_real(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the values at tokens that are no padding."""
    return values[mask > 0] if mask is not None and values.shape[:2] == mask.shape else values


def _difference(values: list[Tensor], expected: list[Tensor]) -> float:
    """Compute the largest difference relative to the largest value of a tensor; infinite if a value is not finite."""
    worst = 0.0
    for first, second in zip(values, expected, strict=True):
        if first.shape != second.shape or not (torch.isfinite(first).all() and torch.isfinite(second).all()):
            return float("inf")
        worst = max(worst, float((first - second).abs().max() / second.abs().max().clamp_min(1e-12)))
    return worst


def _generate(model: PreTrainedModel) -> Tensor:
    """Generate tokens greedily with the KV cache."""
    inputs = {k: v for k, v in random_inputs(model, padding="left").items() if k != "decoder_input_ids"}
    with parsing(f"{type(model).__name__} cannot generate"):
        return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)


# Random plans


def trial_plans(specs: list[BlockSpec], generator: torch.Generator) -> dict[str, list[BlockPlan]]:
    """Make plans for the check: name of the removed units -> plans of the blocks."""
    return {
        "KV groups and neurons": [_keep_half(spec, generator, balanced=False) for spec in specs],
        "query heads and neurons": [_keep_half(spec, generator, balanced=True) for spec in specs],
        "whole sub-layers": [_keep_half_without(spec, generator, attention=spec.index % 2 == 0) for spec in specs],
        "whole sub-layers, the others": [
            _keep_half_without(spec, generator, attention=spec.index % 2 == 1) for spec in specs
        ],
    }


def _keep_half(spec: BlockSpec, generator: torch.Generator, balanced: bool) -> BlockPlan:
    """Keep half of the neurons, and half of the KV groups or (balanced) of the query heads of every group."""
    balanced = balanced and spec.heads_per_kv > 1
    groups = list(range(spec.kv_heads)) if balanced else _choose_half(spec.kv_heads, generator)
    inside = [_choose_half(spec.heads_per_kv, generator) if balanced else range(spec.heads_per_kv) for _ in groups]
    heads = [group * spec.heads_per_kv + head for group, of in zip(groups, inside, strict=True) for head in of]
    return BlockPlan(tuple(heads), tuple(groups), tuple(_choose_half(spec.neurons, generator)))


def _keep_half_without(spec: BlockSpec, generator: torch.Generator, attention: bool) -> BlockPlan:
    """Keep half of a block, without its attention or without its FFN."""
    half = _keep_half(spec, generator, balanced=False)
    return BlockPlan((), (), half.neurons) if attention else BlockPlan(half.heads, half.kv_heads, ())


def _choose_half(units: int, generator: torch.Generator) -> list[int]:
    """Choose half of the units at random, rounded up, ascending."""
    return sorted(torch.randperm(units, generator=generator)[: (units + 1) // 2].tolist())
