"""Variants of LoRA, and IA3: each is cut to what masks and zeroed ranks compute, saves exactly, and trains on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lanes import telling
from lights import light_of
from peft import EvaConfig, IA3Config, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft_models import (
    BASES,
    CASES,
    TELLING_CASES,
    lora,
    projection_names,
    shifted,
    trained,
    with_variant,
)
from tiny import (
    DROPPED,
    USUAL,
    inputs_for,
    kept_channels,
    make,
    plan_for,
    relative_difference,
    without_dropout,
)
from torch import Tensor, nn

from lightpeft import EarlyPruner, load_light
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.base import Site
from lightpeft.peft_kinds.sites.config_file import read_config
from lightpeft.peft_kinds.sites.dora import DoraSite
from lightpeft.peft_kinds.sites.ia3 import Ia3Site
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.importance import ModuleObserver
from lightpeft.prune.light_model import as_light
from lightpeft.prune.masks import UnitMasks
from lightpeft.prune.surgery import apply_plan

TOLERANCE = 1e-5


all_cases = telling(("name", "variant"), CASES, TELLING_CASES)
all_budgets = pytest.mark.parametrize("budget", [USUAL, DROPPED], ids=["usual", "dropped"])


def sites_of(model: PeftModel) -> dict[str, Site]:
    return {site.spec.name: site for site in find_sites(model, block_specs(transformers_model(model)))}


def reference(model: PeftModel, plan: PrunePlan, name: str) -> PeftModel:
    """What the pruned model must compute: units masked, ranks zeroed, modules that go switched off (as the base is)."""
    dense, base = copy.deepcopy(model), make(name)
    for site in find_sites(dense, plan.specs):
        if site.spec.name not in plan.sites:
            site.layer.enable_adapters(False)
            site.base.load_state_dict(base.get_submodule(site.spec.name).state_dict())
        elif site.up is not None:
            gone = sorted(set(range(site.spec.rank)) - set(plan.sites[site.spec.name]))
            site.up.data[:, gone] = 0.0
    masks = UnitMasks(plan.specs)
    masks.set_plan(plan)
    masks.attach(dense)
    return dense


@torch.no_grad()
def logits(model: nn.Module, padding: str = "right") -> Tensor:
    return model(**inputs_for(model, padding)).logits


def difference(first: nn.Module, second: nn.Module) -> float:
    return max(relative_difference(logits(first, side), logits(second, side)) for side in ("right", "none"))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(after[key].equal(value) for key, value in before.items())


# Surgery, saving, training


@all_cases
@all_budgets
def test_surgery_equals_masks_and_zeroed_ranks(name: str, variant: str, budget: dict[str, Any]) -> None:
    model = trained(name, variant)
    plan = plan_for(model, **budget)
    expected = reference(model, plan, name)
    assert difference(expected, model) > 1e-2
    apply_plan(model, plan)
    assert difference(model, expected) < TOLERANCE
    assert {name: site.spec.rank for name, site in live(model, plan).items()} == {
        name: len(ranks) for name, ranks in plan.sites.items()
    }
    merged = copy.deepcopy(model).merge_and_unload()
    assert difference(merged, model) < 10 * TOLERANCE


def live(model: PeftModel, plan: PrunePlan) -> dict[str, Site]:
    return {site.spec.name: site for site in find_sites(model, plan.specs)}


@all_cases
def test_saved_and_loaded_bit_equal(name: str, variant: str, tmp_path: Path) -> None:
    model = trained(name, variant)
    plan = plan_for(model)
    apply_plan(model, plan)
    modules = {n: m for n, m in transformers_model(model).named_modules() if hasattr(m, "base_layer")}
    light = as_light(model, plan)
    light.save_pretrained(tmp_path)
    again = load_light(tmp_path, make(name), is_trainable=True)
    assert logits(again.eval()).equal(logits(light))
    assert unchanged(again, state(light))
    trains = {key for key, parameter in light.named_parameters() if parameter.requires_grad}
    assert {key for key, parameter in again.named_parameters() if parameter.requires_grad} == trains
    config = read_config(tmp_path)
    assert set(config.target_modules) == {n for n, m in modules.items() if not n.endswith("token_adapter")} - tokens(
        model
    )
    if isinstance(config, IA3Config):
        assert set(config.feedforward_modules) == {n for n, m in modules.items() if m.is_feedforward}


def tokens(model: PeftModel) -> set[str]:
    """Modules with trainable tokens, which are wrapped but no targets."""
    return {n for n, m in transformers_model(model).named_modules() if hasattr(m, "token_adapter")}


def step(model: PeftModel, optimizer: torch.optim.Optimizer, pruner: EarlyPruner | None = None) -> float:
    loss = model(**inputs_for(model, labels=True)).loss
    loss.backward()
    if pruner is not None:
        pruner.step()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    return {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}


@all_cases
def test_estimation_pruning_and_training_on(name: str, variant: str, tmp_path: Path) -> None:
    model = without_dropout(with_variant(name, variant)).train()
    pruner = EarlyPruner(model, light_of(length=4, heads=0.5, neurons=0.5, modules=0.4, ranks=0.5))
    optimizer = torch.optim.AdamW(trainables(model).values(), lr=1e-2)
    pruner.start()
    while not pruner.finished:
        step(model, optimizer, pruner)
    record = pruner.record()
    assert record.scores["modules/ratio"].gt(0).all()
    for index, site in enumerate(pruner.estimator.sites):
        taylor = record.scores[f"ranks/taylor/{index}"]
        assert taylor.shape == (site.spec.rank,)
        assert bool(taylor.gt(0).all()) == (site.up is not None)
    light = pruner.prune()
    assert len(light.light_plan.sites) < len(record.sites)
    before = state(light)
    optimizer = torch.optim.AdamW(trainables(light).values(), lr=1e-3)
    losses = [step(light, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0]
    changed = {value.data_ptr() for key, value in light.state_dict().items() if not value.equal(before[key])}
    assert changed == {parameter.data_ptr() for parameter in trainables(light).values()}
    light.eval().save_pretrained(tmp_path)
    assert logits(load_light(tmp_path, make(name))).equal(logits(light))


# What a variant has of its own


def observed(model: PeftModel) -> tuple[Tensor, dict[str, Site]]:
    """Module importance after one pass in training mode."""
    blocks = block_specs(transformers_model(model))
    sites = find_sites(model, blocks)
    observer = ModuleObserver(model, sites, blocks, torch.device("cpu"))
    model.train()(**inputs_for(model))
    observer.detach()
    return observer.sums[0] / observer.sums[1], {site.spec.name: site for site in sites}


def inputs_of(model: PeftModel, sites: dict[str, Site]) -> dict[str, Tensor]:
    """What each module reads, real tokens only."""
    seen: dict[str, Tensor] = {}
    handles = [
        site.layer.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0].detach()}))
        for name, site in sites.items()
    ]
    batch = inputs_for(model)
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: states[batch["attention_mask"].bool()] for name, states in seen.items()}


@pytest.mark.parametrize("variant", ["dora", "ia3"])
@pytest.mark.parametrize("name", ["bert", "llama-gqa", "gpt2"])
def test_module_importance_against_the_definition(name: str, variant: str) -> None:
    model = trained(name, variant)
    without_dropout(model)
    ratios, sites = observed(model)
    read = inputs_of(model, sites)
    for ratio, (module_name, site) in zip(ratios, sites.items(), strict=True):
        states = read[module_name]
        with torch.no_grad():
            base = site.base(states)
            if variant == "ia3" and site.layer.is_feedforward:
                change, base = states * site.factors.flatten() - states, states
            else:
                change = site.layer(states) - base
        torch.testing.assert_close(ratio, (change.norm(dim=1) / base.norm(dim=1)).mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", BASES)
def test_dora_magnitudes(name: str) -> None:
    model = trained(name, "dora")
    plan = plan_for(model, ranks=0)
    before = copy.deepcopy(model)
    apply_plan(model, plan)
    compared = set()
    for module_name, site in live(model, plan).items():
        dense = live(before, plan)[module_name]
        assert isinstance(site, DoraSite) and isinstance(dense, DoraSite)
        spec, kept = plan.specs[site.spec.block], plan.blocks[site.spec.block]
        rows, columns = kept_channels(spec, kept, site.spec.slot)
        weight = dense.base.weight.T if name == "gpt2" else dense.base.weight
        direction = weight + dense.scaling * dense.up @ dense.down
        expected = dense.magnitude.weight if rows is None else dense.magnitude.weight[rows]
        if columns is not None:
            expected = expected * direction[:, columns].norm(dim=1) / direction.norm(dim=1)
        assert site.magnitude.weight.requires_grad
        torch.testing.assert_close(site.magnitude.weight, expected)
        compared.add(columns is None)
    assert compared == {True, False}


def test_ia3_has_no_ranks_to_prune() -> None:
    model = trained("bert", "ia3")
    plan = plan_for(model, ranks=0.9)
    assert set(plan.sites.values()) == {(0,)}
    apply_plan(model, plan)
    for site in live(model, plan).values():
        assert isinstance(site, Ia3Site) and site.down is None and site.up is None
        shape = (1, site.layer.in_features) if site.layer.is_feedforward else (site.layer.out_features, 1)
        assert site.factors.shape == shape and site.factors.requires_grad


def test_eva(tmp_path: Path) -> None:
    """EVA spreads ranks over the modules before training; here one module gets none and one gets five."""
    base = make("bert")
    first, second, third, *_ = projection_names(base, ("q", "v"))
    starts = {name: torch.randn(rank, 32) for name, rank in ((first, 0), (second, 5), (third, 2))}
    with pytest.warns(UserWarning):
        model = get_peft_model(base, lora(base, r=4, init_lora_weights="eva", eva_config=EvaConfig()))
        initialize_lora_eva_weights(model, eva_state_dict={f"base_model.model.{n}": w for n, w in starts.items()})
    ranks = {name: site.spec.rank for name, site in sites_of(model).items()}
    assert first not in ranks and (ranks[second], ranks[third]) == (5, 2)
    assert sites_of(model)[second].down.equal(starts[second])
    shifted(model.eval())
    plan = plan_for(model)
    expected = reference(model, plan, "bert")
    apply_plan(model, plan)
    assert difference(model, expected) < TOLERANCE
    as_light(model, plan).save_pretrained(tmp_path)
    assert logits(load_light(tmp_path, make("bert"))).equal(logits(model))


# Modules outside the blocks


OUTSIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "pooler": ("bert", {"target_modules": ["query", "value", "pooler.dense"]}),
    "word embeddings": ("bert", {"target_modules": ["query", "value", "word_embeddings"]}),
    "head and embeddings": ("llama-gqa", {"target_modules": ["q_proj", "v_proj", "lm_head", "embed_tokens"]}),
    "tied head": ("llama-tied", {"target_modules": ["q_proj", "v_proj", "lm_head"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    "trained norms": ("llama-gqa", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "lm_head"]}),
    "trained embeddings": ("bert", {"target_modules": ["query"], "modules_to_save": ["word_embeddings", "pooler"]}),
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("name", "settings"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_modules_outside_the_blocks_are_left_alone(
    name: str, settings: dict[str, Any], dora: bool, tmp_path: Path
) -> None:
    base = make(name)
    model = shifted(get_peft_model(base, lora(base, use_dora=dora, **settings)).eval())
    inside = tuple(f"base_model.model.{name}." for name in projection_names(base))
    outside = {key: value for key, value in state(model).items() if not key.startswith(inside)}
    assert any("lora_" in key or "modules_to_save" in key for key in outside)
    plan = plan_for(model)
    expected = reference(model, plan, name)
    apply_plan(model, plan)
    assert all(model.state_dict()[key].equal(value) for key, value in outside.items())
    assert difference(model, expected) < TOLERANCE
    as_light(model, plan).save_pretrained(tmp_path)
    assert logits(load_light(tmp_path, make(name))).equal(logits(model))
