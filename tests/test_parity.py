"""A model with masks of 0 and 1, and the same model after surgery, compute the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lanes import telling, thorough
from lights import light_of
from peft import PeftModel
from tiny import (
    ALL,
    DROPPED,
    GENERATORS,
    GROUPED,
    IN_MAKE_TEST,
    LAYOUTS,
    MODELS,
    USUAL,
    VARIANTS,
    batch,
    crossed,
    inputs_for,
    kept_channels,
    make,
    masked,
    plan_for,
    random_record,
    relative_difference,
    select,
    with_lora,
    without_dropout,
    zero_pruned_ranks,
)
from torch import Tensor

from lightpeft.compat.torch import has_hooks
from lightpeft.compat.transformers import attention_of
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.plans.planning import make_plan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.masks import UnitMasks
from lightpeft.prune.surgery import apply_plan

TOLERANCE = 1e-5
BUDGETS = {"usual": USUAL, "dropped": DROPPED}
all_models = crossed(ALL, BUDGETS)
UNITS = [(name, "group") for name in VARIANTS] + [(name, "balanced") for name in GROUPED]
"""What docs/reference/families.md does not hold, which test_support.py checks: settings, and other head units."""
UNITS_IN_MAKE_TEST = {*IN_MAKE_TEST, "llama-tied", "llama-head-dim", "falcon-mqa"}
UNITS_AND_BUDGETS = [
    pytest.param(name, unit, budget, id=f"{name}-{unit}-{key}", marks=() if name in UNITS_IN_MAKE_TEST else thorough)
    for key, budget in BUDGETS.items()
    for name, unit in UNITS
    if budget is DROPPED or name in LAYOUTS
]
"""As `crossed` has it."""


def pair(name: str, lora: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **budget: Any) -> Any:
    """(masked reference, pruned model, plan) of the same weights."""
    pruned = with_lora(make(name, **(model or {})), **(lora or {}))
    plan = plan_for(pruned, **budget)
    reference = masked(pruned, plan)
    apply_plan(pruned, plan)
    return reference, pruned, plan


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of real tokens [tokens, vocabulary], or of rows [rows, labels]."""
    values = model(**inputs).logits
    return values[inputs["attention_mask"] > 0] if values.dim() == 3 and "decoder_input_ids" not in inputs else values


@torch.no_grad()
def difference(first: Any, second: Any, padding: str = "right") -> float:
    inputs = inputs_for(first, padding)
    return relative_difference(logits(first, inputs), logits(second, inputs))


@pytest.mark.parametrize(("name", "unit", "budget"), UNITS_AND_BUDGETS)
def test_logits_with_every_padding(name: str, unit: str, budget: dict[str, Any]) -> None:
    reference, pruned, plan = pair(name, head_unit=unit, **budget)
    assert plan.removed_parameters > 0 and len(plan.sites) < len(plan.dense_sites)
    if budget is DROPPED:
        assert not plan.blocks[0].heads and not plan.blocks[1].neurons
    for padding in ("right", "left", "none"):
        assert difference(pruned, reference, padding) < TOLERANCE, padding


@crossed(MODELS, BUDGETS)
def test_eager_attention(name: str, budget: dict[str, Any]) -> None:
    """All other tests run under "sdpa", wherever the model has it."""
    assert attention_of(make(name).config) == ("sdpa" if make(name)._supports_sdpa else "eager")
    reference, pruned, _ = pair(name, model={"attn_implementation": "eager"}, **budget)
    assert attention_of(transformers_model(pruned).config) == "eager"
    assert difference(pruned, reference) < TOLERANCE
    assert difference(pruned, reference, "left") < TOLERANCE


@all_models
def test_training_mode_and_gradients(name: str, budget: dict[str, Any]) -> None:
    reference, pruned, plan = pair(name, lora={"lora_dropout": 0.0}, **budget)
    inputs = inputs_for(reference)
    for model in (reference, pruned):
        without_dropout(model.train())
        logits(model, inputs).square().mean().backward()
    dense_sites = {site.spec.name: site for site in find_sites(reference, plan.specs)}
    sites = find_sites(pruned, plan.specs)
    assert {site.spec.name for site in sites} == set(plan.sites)
    for site in sites:
        dense, ranks = dense_sites[site.spec.name], list(plan.sites[site.spec.name])
        spec, kept = plan.specs[site.spec.block], plan.blocks[site.spec.block]
        outputs, ins = kept_channels(spec, kept, site.spec.slot)
        compare_gradients(site.down, select(dense.down.grad, ranks, ins))
        compare_gradients(site.up, select(dense.up.grad, outputs, ranks))
    heads = {n: p for n, p in reference.named_parameters() if "modules_to_save" in n}
    assert bool(heads) == ("SequenceClassification" in type(transformers_model(pruned)).__name__)
    for parameter_name, parameter in pruned.named_parameters():
        if parameter_name in heads:
            compare_gradients(parameter, heads[parameter_name].grad)


def compare_gradients(parameter: Tensor, expected: Tensor) -> None:
    assert parameter.grad is not None and parameter.grad.shape == expected.shape
    largest = float(expected.abs().max())
    assert float((parameter.grad - expected).abs().max()) <= 1e-4 * largest + 1e-7


@pytest.mark.parametrize(
    ("name", "unit", "budget"), [case for case in UNITS_AND_BUDGETS if case.values[0] in GENERATORS]
)
def test_generate_with_cache(name: str, unit: str, budget: dict[str, Any]) -> None:
    reference, pruned, _ = pair(name, head_unit=unit, **budget)
    inputs = inputs_for(reference, "left", generate=True)
    for options in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
        expected = reference.generate(**inputs, **settings)
        assert expected.shape[1] >= 8
        assert pruned.generate(**inputs, **settings).equal(expected)
        if not options:
            assert pruned.generate(**inputs, use_cache=False, **settings).equal(expected)


@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
def test_cache_counts_tokens_where_the_first_attention_is_gone(name: str) -> None:
    _, pruned, plan = pair(name, **DROPPED)
    assert not plan.blocks[0].heads
    inputs = batch(padding="none")
    with torch.no_grad():
        whole = pruned(**inputs).logits
        first = pruned(input_ids=inputs["input_ids"][:, :5], use_cache=True)
        assert first.past_key_values.get_seq_length() == 5
        rest = pruned(input_ids=inputs["input_ids"][:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert rest.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    assert relative_difference(torch.cat([first.logits, rest.logits], 1), whole) < TOLERANCE


@all_models
def test_bare_models_without_peft(name: str, budget: dict[str, Any]) -> None:
    model = make(name)
    plan = plan_for(with_lora(copy.deepcopy(model)), **budget)
    reference = copy.deepcopy(model)
    masks = UnitMasks(plan.specs)
    masks.set_plan(plan)
    masks.attach(reference)
    apply_plan(model, plan)
    assert not isinstance(model, PeftModel)
    for padding in ("right", "left"):
        assert difference(model, reference, padding) < TOLERANCE


@crossed(MODELS, BUDGETS)
def test_bfloat16(name: str, budget: dict[str, Any]) -> None:
    pruned = with_lora(make(name).bfloat16())
    plan = plan_for(pruned, **budget)
    reference = masked(pruned, plan)
    apply_plan(pruned, plan)
    assert {p.dtype for n, p in pruned.named_parameters() if "base_layer" in n} == {torch.bfloat16}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs_for(pruned).items()}
    with torch.no_grad():
        values, expected = (logits(model, inputs).float() for model in (pruned, reference))
    assert torch.isfinite(values).all()
    assert relative_difference(values, expected) < 0.1
    model = pruned.float()
    assert difference(model, reference.float()) < TOLERANCE


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "opt"])
def test_masks_leave_no_trace(name: str) -> None:
    model = with_lora(make(name))
    keys, before = set(model.state_dict()), logits(model, batch())
    plan = plan_for(model)
    masks = UnitMasks(plan.specs)
    masks.attach(model)
    assert logits(model, batch()).equal(before), "masks of one change nothing"
    masks.set_plan(plan)
    assert set(model.state_dict()) == keys
    assert not logits(model, batch()).equal(before)
    masks.detach()
    assert logits(model, batch()).equal(before)
    apply_plan(model, plan)
    assert {key.replace(".base_layer", "") for key in model.state_dict()} < {k.replace(".base_layer", "") for k in keys}
    assert not any(map(has_hooks, model.modules()))


# Ranks


RANKS: dict[str, dict[str, Any]] = {
    "power of two": {"r": 4, "lora_alpha": 8},
    "r=6": {"r": 6, "lora_alpha": 16},
    "rslora": {"r": 6, "lora_alpha": 16, "use_rslora": True},
    "patterns": {"r": 6, "lora_alpha": 16, "alpha_pattern": {"query": 5, "q_proj": 5}, "rank_pattern": {"value": 3}},
    "lora bias": {"r": 6, "lora_alpha": 16, "lora_bias": True},
}


@telling("ranks", [0.34, 0.5, 0.9], [0.34])
@pytest.mark.parametrize("settings", RANKS.values(), ids=RANKS.keys())
@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_rank_pruning_equals_zeroing(name: str, settings: dict[str, Any], ranks: float) -> None:
    model = with_lora(make(name), **settings)
    plan = only_ranks(model, ranks)
    scalings = {site.spec.name: site.scaling for site in find_sites(model, plan.specs)}
    reference = copy.deepcopy(model)
    zero_pruned_ranks(reference, plan)
    apply_plan(model, plan)
    for site in find_sites(model, plan.specs):
        assert site.spec.rank == len(plan.sites[site.spec.name]) < 6
        assert site.scaling == scalings[site.spec.name], "the live scaling is that of the original rank"
    assert difference(model, reference) < TOLERANCE


@pytest.mark.parametrize("settings", RANKS.values(), ids=RANKS.keys())
def test_scaling_is_exact_when_peft_computes_it_again(settings: dict[str, Any]) -> None:
    model = with_lora(make("bert"), **settings)
    plan = only_ranks(model, 0.5)
    scalings = {site.spec.name: site.scaling for site in find_sites(model, plan.specs)}
    apply_plan(model, plan)
    config = model.peft_config["default"]
    for site in find_sites(model, plan.specs):
        name, rank = site.spec.name, config.rank_pattern.get(site.spec.name, config.r)
        alpha = config.alpha_pattern.get(name, config.lora_alpha)
        assert rank == site.spec.rank
        assert alpha / (rank**0.5 if config.use_rslora else rank) == scalings[name]


def only_ranks(model: PeftModel, ranks: float) -> PrunePlan:
    return make_plan(random_record(model), light_of(heads=0, neurons=0, modules=0, ranks=ranks))
