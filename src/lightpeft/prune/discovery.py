"""Families that are not listed: a structure is proposed, and used only after a check on a small random model.

The check is what surgery promises: with masks of 0 and 1, and with the masked units cut out, the model computes the
same values and generates the same tokens.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft.errors import LightPeftError, require
from lightpeft.files.foreign import parsing
from lightpeft.models.families.proposal import propose_families
from lightpeft.models.families.registry import FAMILIES, REFUSED, block_specs, check_not_refused, register_family
from lightpeft.models.families.skeleton import one_line, random_inputs, run, skeleton, skeleton_config
from lightpeft.models.families.spec import Family
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.records import BlockPlan, PrunePlan
from lightpeft.plans.structure import BlockSpec
from lightpeft.prune.masks import UnitMasks
from lightpeft.prune.surgery import apply_plan

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest relative difference that passes the check, in float32."""
EFFECT = 1e-2
"""Smallest relative difference that masks must make to the dense model, so that the check tells something."""


_discovered: dict[str, tuple[Family, str]] = {}
"""Model type -> its family, and the model class and config that it was checked for."""


def ensure_family(model: nn.Module) -> None:
    """Make the family of a transformers model, or of the one in a PeftModel, known: discover it if it is not listed.

    A discovery takes seconds and is made once per model class and config, on a random model of two layers: the weights
    of `model` are not read. The same config always gives the same structure.

    Raises:
        LightPeftError: the family is refused; or it is not listed and no structure was found that passes the check.
    """
    inner = transformers_model(model)
    if not isinstance(inner, PreTrainedModel):
        return  # whoever asks next refuses it
    model_type = inner.config.model_type
    known, checked = _discovered.get(model_type, (None, ""))
    if model_type in REFUSED or (model_type in FAMILIES and FAMILIES[model_type] is not known):
        check_not_refused(model_type)
        return
    try:
        with parsing(f"{type(inner).__name__} is not what its kin are"):  # classes of others may raise anything
            settings = f"{type(inner).__name__} {skeleton_config(inner.config).to_json_string(use_diff=False)}"
            if model_type in FAMILIES and checked == settings:
                return
            family = discover_family(inner)
    except LightPeftError as error:
        raise LightPeftError(
            f'model family "{model_type}" is not listed, and its structure could not be discovered: {error}; '
            "docs/reference/families.md says how to add it"
        ) from error
    block_specs(inner, family)  # layers beyond the first two may be others
    register_family(family)
    _discovered[model_type] = family, settings
    logger.warning(
        'model family "%s" is not listed; its structure was discovered, and masked and pruned models of it compute the '
        "same: %s",
        model_type,
        describe(family),
    )


def discover_family(model: PreTrainedModel) -> Family:
    """The first proposed family of a model that passes the check.

    Raises:
        LightPeftError: none was proposed, or none passes; the message says what was found and what did not match.
    """
    small, failure = skeleton(model), "nothing was proposed"
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

    Random plans take KV groups, query heads of every group, neurons, and whole sub-layers. Compared are the model's
    first output and that of the last block of every list, at real tokens, with padding on either side, and generated
    tokens.

    Raises:
        LightPeftError: they differ, masks have no effect, or the structure does not fit or cannot be cut.
    """
    specs = block_specs(small, family)
    dense = _outputs(small, family)
    for what, blocks in trial_plans(specs, torch.Generator().manual_seed(3)).items():
        plan = PrunePlan(tuple(specs), tuple(blocks), {}, (), small.num_parameters(), "")
        _check_plan(small, family, plan, dense, what)


def _check_plan(small: PreTrainedModel, family: Family, plan: PrunePlan, dense: list[Tensor], what: str) -> None:
    masked, pruned = copy.deepcopy(small), copy.deepcopy(small)
    masks = UnitMasks(plan.specs)
    masks.set_plan(plan)
    masks.attach(masked)
    try:
        apply_plan(pruned, plan, family)
    except (RuntimeError, AttributeError, TypeError, IndexError, KeyError) as error:
        raise LightPeftError(f"{what} cannot be cut: {one_line(error)}") from error
    expected = _outputs(masked, family)
    require(_difference(expected, dense) > EFFECT, f"masks of {what} have no effect")
    try:
        difference = _difference(_outputs(pruned, family), expected)
    except LightPeftError as error:
        raise LightPeftError(f"without {what}, {error}") from error
    require(difference <= TOLERANCE, f"masking and pruning {what} differ by {difference:.1e} of the values")
    if small.can_generate() and small.main_input_name == "input_ids":
        require(_generate(pruned).equal(_generate(masked)), f"masking and pruning {what} generate different tokens")


def describe(family: Family) -> str:
    """A family in one line: of every list of blocks, which module plays which part."""
    stacks = []
    for stack in family.stacks:
        slots = ", ".join(f"{slot}={name}" for slot, name in stack.tables[0].items())
        fused = ", qkv by KV groups" if stack.interleaved else ""
        counts = "".join(f", {name}={quantity}" for name, quantity in stack.head_attributes.items())
        by_head = "".join(f", {name} by head" for name in stack.per_head_arguments)
        stacks.append(f"{stack.layers}[{slots}{fused}{counts}{by_head}]")
    return " ".join(stacks)


def _outputs(model: PreTrainedModel, family: Family) -> list[Tensor]:
    """At real tokens, with padding on either side: the outputs of the last block of every list and of the model."""
    lists = [model.base_model.get_submodule(layers) for layers in {stack.layers: None for stack in family.stacks}]
    values = []
    for padding in ("right", "left"):
        inputs = random_inputs(model, padding=padding)
        note = _Note()
        last = run(model, inputs, [list(blocks.children())[-1].register_forward_hook(note) for blocks in lists])
        values += [_real(value, inputs.get("attention_mask")) for value in (*note.seen, last)]
    return values


class _Note:
    """Forward hook that keeps the first output of a module at every call."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self.seen.append(output if isinstance(output, Tensor) else output[0])


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values of tokens that are no padding."""
    return values[mask > 0] if mask is not None and values.shape[:2] == mask.shape else values


def _difference(values: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of a value over the largest value of its tensor; infinite where values are not finite."""
    worst = 0.0
    for first, second in zip(values, expected, strict=True):
        if first.shape != second.shape or not (torch.isfinite(first).all() and torch.isfinite(second).all()):
            return float("inf")
        worst = max(worst, float((first - second).abs().max() / second.abs().max().clamp_min(1e-12)))
    return worst


def _generate(model: PreTrainedModel) -> Tensor:
    """Tokens that a model generates greedily with its KV cache."""
    inputs = {k: v for k, v in random_inputs(model, padding="left").items() if k != "decoder_input_ids"}
    try:
        return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    except Exception as error:  # a model class of anyone's own may raise anything
        raise LightPeftError(f"{type(model).__name__} does not generate: {one_line(error)}") from error


# Random plans


def trial_plans(specs: list[BlockSpec], generator: torch.Generator) -> dict[str, list[BlockPlan]]:
    """What each plan takes -> what it keeps of the blocks."""
    return {
        "KV groups and neurons": [_half(spec, generator, balanced=False) for spec in specs],
        "query heads and neurons": [_half(spec, generator, balanced=True) for spec in specs],
        "whole sub-layers": [_without(spec, generator, attention=spec.index % 2 == 0) for spec in specs],
        "whole sub-layers, the others": [_without(spec, generator, attention=spec.index % 2 == 1) for spec in specs],
    }


def _half(spec: BlockSpec, generator: torch.Generator, balanced: bool) -> BlockPlan:
    """Half of the neurons, and half of the KV groups or (balanced) of the query heads of every group."""
    balanced = balanced and spec.heads_per_kv > 1
    groups = list(range(spec.kv_heads)) if balanced else _some(spec.kv_heads, generator)
    inside = [_some(spec.heads_per_kv, generator) if balanced else range(spec.heads_per_kv) for _ in groups]
    heads = [group * spec.heads_per_kv + head for group, of in zip(groups, inside, strict=True) for head in of]
    return BlockPlan(tuple(heads), tuple(groups), tuple(_some(spec.neurons, generator)))


def _without(spec: BlockSpec, generator: torch.Generator, attention: bool) -> BlockPlan:
    """Half of a block, without its attention or without its FFN."""
    half = _half(spec, generator, balanced=False)
    return BlockPlan((), (), half.neurons) if attention else BlockPlan(half.heads, half.kv_heads, ())


def _some(units: int, generator: torch.Generator) -> list[int]:
    """Half of the units, rounded up, ascending."""
    return sorted(torch.randperm(units, generator=generator)[: (units + 1) // 2].tolist())
