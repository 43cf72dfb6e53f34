"""Surgery: parameters really go, memory is freed, the model stays whole, and what does not fit is refused untouched."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import too_new
from peft import PeftModel
from tiny import (
    ALL,
    DROPPED,
    LAYOUTS,
    crossed,
    inputs_for,
    kept_channels,
    make,
    plan_for,
    plan_of,
    random_record,
    relative_difference,
    select,
    with_lora,
)
from torch import nn

from lightpeft.errors import LightPeftError
from lightpeft.models.linears.linear_kinds import dense_weight
from lightpeft.models.unwrap import base_layer, transformers_model
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.sizes import count_parameters
from lightpeft.prune.surgery import apply_plan

BUDGETS: dict[str, dict[str, Any]] = {"usual": {}, "dropped": DROPPED, "balanced": {"head_unit": "balanced"}}
HERE = [name for name in LAYOUTS if not too_new(name)]
all_models = crossed(ALL, BUDGETS)
all_budgets = pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())


def module_of(model: nn.Module, name: str) -> nn.Module | None:
    return dict(transformers_model(model).named_modules()).get(name)


# What is gone


ratios = st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 0.8])
budgets = st.fixed_dictionaries(
    {
        "heads": ratios,
        "neurons": ratios,
        "modules": ratios,
        "ranks": ratios,
        "scope": st.sampled_from(["layerwise", "global"]),
        "min_heads": st.integers(0, 1),
        "min_neurons": st.integers(0, 1),
        "multiple_of": st.sampled_from([1, 8]),
        "head_unit": st.sampled_from(["group", "balanced"]),
    }
)


@pytest.fixture(scope="module")
def dense() -> dict[str, tuple[PeftModel, Any]]:
    models = {name: with_lora(make(name)) for name in HERE}
    return {name: (model, random_record(model)) for name, model in models.items()}


@settings(deadline=None, max_examples=50)
@given(name=st.sampled_from(HERE), budget=budgets)
def test_the_plan_tells_exactly_what_goes(dense: dict[str, Any], name: str, budget: dict[str, Any]) -> None:
    model, record = dense[name]
    plan = plan_of(record, **budget)
    pruned = copy.deepcopy(model)
    apply_plan(pruned, plan)
    before, after = count_parameters(model), count_parameters(pruned)
    assert before.base - after.base == plan.removed_parameters
    assert plan.removed_ratio == (before.base - after.base) / before.base
    assert after.head == before.head
    outside = before.peft - sum(s.down.numel() + s.up.numel() for s in find_sites(model, plan.specs))
    assert after.peft - outside == expected_peft_parameters(plan, model)
    logits = pruned(**inputs_for(pruned)).logits
    assert logits.shape == model(**inputs_for(model)).logits.shape and torch.isfinite(logits).all()


def expected_peft_parameters(plan: PrunePlan, model: PeftModel) -> int:
    total = 0
    for site in find_sites(model, plan.specs):
        if site.spec.name in plan.sites:
            outputs, inputs = kept_channels(plan.specs[site.spec.block], plan.blocks[site.spec.block], site.spec.slot)
            width = len(site.down[0]) if inputs is None else len(inputs)
            width += len(site.up) if outputs is None else len(outputs)
            total += len(plan.sites[site.spec.name]) * width
    return total


@all_models
def test_kept_weights_are_bit_equal(name: str, budget: dict[str, Any]) -> None:
    model = with_lora(make(name))
    original = copy.deepcopy(model)
    plan = plan_for(model, **budget)
    apply_plan(model, plan)
    for spec, kept in zip(plan.specs, plan.blocks, strict=True):
        for slot, path in spec.projections.items():
            module = module_of(model, path)
            if module is None:
                assert not kept.heads
                continue
            linear, dense = base_layer(module), base_layer(module_of(original, path))
            outputs, inputs = kept_channels(spec, kept, slot)
            assert dense_weight(linear).equal(select(dense_weight(dense), outputs, inputs)), path
            if isinstance(linear, nn.Linear):
                assert linear.weight.shape == (linear.out_features, linear.in_features)
            if dense.bias is not None:
                assert linear.bias.equal(dense.bias if outputs is None else dense.bias[outputs])
    dense_sites = {site.spec.name: site for site in find_sites(original, plan.specs)}
    for site in find_sites(model, plan.specs):
        ranks = list(plan.sites[site.spec.name])
        outputs, inputs = kept_channels(plan.specs[site.spec.block], plan.blocks[site.spec.block], site.spec.slot)
        assert site.down.equal(select(dense_sites[site.spec.name].down, ranks, inputs))
        assert site.up.equal(select(dense_sites[site.spec.name].up, outputs, ranks))


@pytest.mark.parametrize("name", LAYOUTS)
@all_budgets
def test_memory_is_freed(name: str, budget: dict[str, Any]) -> None:
    model = with_lora(make(name))
    plan = plan_for(model, **budget)
    old = {key: weakref.ref(parameter) for key, parameter in model.named_parameters()}
    storages = {key: weakref.ref(p.untyped_storage()) for key, p in model.named_parameters()}
    apply_plan(model, plan)
    gc.collect()
    live = {id(parameter) for parameter in model.parameters()}
    alive = [key for key, ref in old.items() if ref() is not None and id(ref()) not in live]
    assert not alive
    assert sum(ref() is None for ref in old.values()) > 0 and len(storages) == len(old)
    for key, parameter in model.named_parameters():
        assert parameter.is_contiguous() and parameter._base is None
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size(), key


# The model stays whole


def test_requires_grad_is_kept_and_the_base_stays_frozen() -> None:
    model = with_lora(make("llama-gqa"))
    apply_plan(model, plan_for(model, **DROPPED))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "opt"])
@all_budgets
def test_the_peft_config_says_what_is_there(name: str, budget: dict[str, Any]) -> None:
    model = with_lora(make(name))
    plan = plan_for(model, **budget)
    apply_plan(model, plan)
    config, names = model.peft_config["default"], {spec.name for spec in plan.dense_sites}
    assert set(config.target_modules) & names == set(plan.sites)
    for site, ranks in plan.sites.items():
        assert config.rank_pattern.get(site, config.r) == len(ranks)
    sites = {site.spec.name for site in find_sites(model, plan.specs)}
    assert sites == set(plan.sites)
    assert not any("lora" in key for key in model.state_dict() for gone in names - sites if f"{gone}." in key)


@pytest.mark.parametrize("name", LAYOUTS)
@all_budgets
def test_training_goes_on_with_a_new_optimizer(name: str, budget: dict[str, Any]) -> None:
    model = with_lora(make(name))
    plan = plan_for(model, **budget)
    apply_plan(model, plan)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(5):
        loss = model(**inputs_for(model)).logits.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for key, parameter in model.named_parameters():
        assert parameter.equal(before[key]) != parameter.requires_grad, key


@all_models
def test_merging_after_pruning(name: str, budget: dict[str, Any]) -> None:
    model = with_lora(make(name))
    apply_plan(model, plan_for(model, **budget))
    with torch.no_grad():
        expected = model(**inputs_for(model)).logits
        merged = model.merge_and_unload()
        assert not any("lora" in key for key in merged.state_dict())
        assert relative_difference(merged(**inputs_for(merged)).logits, expected) < 1e-5


# Refusals: nothing is cut


def state(model: nn.Module) -> dict[str, Any]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def edited(plan: PrunePlan, index: int, **changes: Any) -> PrunePlan:
    blocks = list(plan.blocks)
    blocks[index] = dataclasses.replace(blocks[index], **changes)
    return dataclasses.replace(plan, blocks=tuple(blocks))


def test_a_plan_for_another_model() -> None:
    models = {name: with_lora(make(name)) for name in ("bert", "llama-mha", *HERE[2:])}
    plans = {name: plan_for(model) for name, model in models.items()}
    for name, model in models.items():
        before = state(model)
        for other, plan in plans.items():
            if other == name:
                continue
            with pytest.raises(LightPeftError, match="the plan is for another model") as error:
                apply_plan(model, plan)
            assert "\n" not in str(error.value)
            assert same(before, model.state_dict()), (name, other)


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(value.equal(after[key]) for key, value in before.items())


@pytest.mark.parametrize("changes", [{"target_modules": ["query"]}, {"r": 3}], ids=["sites", "ranks"])
def test_a_plan_with_other_sites(changes: dict[str, Any]) -> None:
    plan = plan_for(with_lora(make("bert")))
    model = with_lora(make("bert"), **changes)
    before = state(model)
    with pytest.raises(LightPeftError, match="other PEFT modules than this model has"):
        apply_plan(model, plan)
    assert same(before, state(model))


@pytest.mark.parametrize("kind", ["heads", "neurons", "ranks", "site", "kv_heads"])
def test_a_plan_that_keeps_what_is_not_there(kind: str) -> None:
    model = with_lora(make("llama-gqa"))
    plan = plan_for(model)
    site = list(plan.sites)[-1]
    wrong = {
        "heads": lambda: edited(plan, 2, heads=(0, 1, 2, 9)),
        "neurons": lambda: edited(plan, 2, neurons=(0, 48)),
        "kv_heads": lambda: edited(plan, 2, kv_heads=(0, 2)),
        "ranks": lambda: dataclasses.replace(plan, sites={**plan.sites, site: (0, 4)}),
        "site": lambda: dataclasses.replace(plan, sites={**plan.sites, "lm_head": (0,)}),
    }[kind]()
    before = state(model)
    with pytest.raises(LightPeftError):
        apply_plan(model, wrong)
    assert same(before, state(model))
