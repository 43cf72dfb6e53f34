"""Each formula against values worked out by hand."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import get_args

import pytest
import torch
from lights import light_of
from tiny import batch, make, relative_difference, with_lora

from lightpeft.config.light import ModuleCriterion, RankCriterion, UnitCriterion
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.plans import scoring
from lightpeft.plans.structure import MASKED
from lightpeft.prune.importance import ModuleObserver
from lightpeft.recipe.pruner import EarlyPruner

MASKS = torch.tensor([1.0, -0.5, 0.0, 2.0])
GRADIENTS = scoring.MaskGradients(
    mean=torch.tensor([0.5, 4.0, 3.0, -1.0]),
    absolute=torch.tensor([1.0, 4.0, 5.0, 3.0]),
    squares=torch.tensor([2.0, 17.0, 30.0, 9.5]),
)


def test_unit_criteria() -> None:
    assert scoring.taylor(MASKS, GRADIENTS).tolist() == [1.0, 2.0, 0.0, 6.0]
    assert scoring.fisher(GRADIENTS).tolist() == [2.0, 17.0, 30.0, 9.5]
    assert scoring.mask_size(MASKS).tolist() == [1.0, 0.5, 0.0, 2.0]
    assert scoring.weight_norm(torch.tensor([4.0, 0.0, 9.0])).tolist() == [2.0, 0.0, 3.0]


def test_module_criteria() -> None:
    ratios = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    assert scoring.mean_ratio(ratios).tolist() == [0.75, 0.0], "a module that saw no token"
    assert scoring.module_taylor([torch.tensor([1.0, 2.0]), torch.tensor([5.0])]).tolist() == [3.0, 5.0]


# The table


OF_SETTINGS = {**dict.fromkeys(MASKED, UnitCriterion), "modules": ModuleCriterion, "ranks": RankCriterion}


@pytest.mark.parametrize("unit", OF_SETTINGS)
def test_the_settings_name_the_criteria_of_the_table(unit: scoring.Unit) -> None:
    assert set(get_args(OF_SETTINGS[unit])) == set(scoring.criteria(unit))


def test_a_unit_has_one_criterion_of_a_name() -> None:
    rows = [(unit, criterion.name) for criterion in scoring.CRITERIA for unit in criterion.units]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("criterion", scoring.CRITERIA, ids=lambda each: f"{each.name}-{each.units[0]}")
def test_a_criterion_is_given_what_it_needs(criterion: scoring.Criterion) -> None:
    taken = {name: object() for name in get_args(scoring.Fact)}
    seen = []
    replace(criterion, score=lambda *facts: seen.extend(facts))(taken)
    assert seen == [taken[name] for name in criterion.needs]
    assert len(inspect.signature(criterion.score).parameters) == len(criterion.needs)


def test_what_needs_to_know_of_a_step_is_scored_at_every_step() -> None:
    at_steps = [(criterion.name, criterion.units) for criterion in scoring.CRITERIA if criterion.every_step]
    of_masks = [("taylor", MASKED), ("fisher", MASKED)]
    assert at_steps == [*of_masks, ("taylor", ("ranks",))]


def test_random_is_reproducible() -> None:
    first, again, other = (scoring.random(50, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)
    assert first.shape == (50,) and float(first.min()) >= 0 and float(first.max()) < 1


def test_module_ratio_without_padding() -> None:
    delta = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    base = torch.tensor([[[0.0, 2.0], [0.0, 4.0]]])
    total, tokens = scoring.module_ratio(delta, base, None)
    assert float(total) == pytest.approx(2.75) and float(tokens) == 2


@pytest.mark.parametrize("padding", [0.0, 7.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_module_ratio_leaves_padding_out(padding: float, dtype: torch.dtype) -> None:
    delta = torch.tensor([[[3.0, 4.0], [padding, 1.0]], [[0.0, 1.0], [padding, padding]]])
    base = torch.tensor([[[0.0, 2.0], [0.0, padding]], [[0.0, 4.0], [padding, 0.0]]])
    real = torch.tensor([[1, 0], [1, 0]]).to(dtype)
    total, tokens = scoring.module_ratio(delta, base, real)
    assert float(total) == pytest.approx(2.75) and float(tokens) == 2


def test_module_ratio_on_flattened_tokens() -> None:
    """OPT runs its FFN on [rows * length, width]."""
    generator = torch.Generator().manual_seed(0)
    delta, base = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    real = torch.tensor([[1, 1, 0], [1, 0, 0]])
    whole = scoring.module_ratio(delta, base, real)
    flat = scoring.module_ratio(delta.flatten(0, 1), base.flatten(0, 1), real)
    assert whole[0].equal(flat[0]) and whole[1].equal(flat[1])


@pytest.mark.parametrize("delta", [0.0, 1.0, 1e4])
def test_a_base_output_of_zero_gives_a_finite_ratio(delta: float) -> None:
    total, tokens = scoring.module_ratio(torch.full((2, 50, 8), delta), torch.zeros(2, 50, 8), None)
    assert torch.isfinite(total) and float(tokens) == 100
    assert (float(total) > 0) == (delta > 0)


def test_module_ratio_in_half_precision_does_not_overflow() -> None:
    wide = torch.full((1, 1, 512), 6e4, dtype=torch.float16)
    total, _ = scoring.module_ratio(wide, wide, None)
    assert float(total) == pytest.approx(1.0)


def test_rank_taylor_of_a_and_b() -> None:
    down, down_gradient = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0, -1.0], [2.0, 2.0]])
    up, up_gradient = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 5.0]]), torch.ones(3, 2)
    of_down = scoring.rank_taylor_terms(down, down_gradient, dim=1)
    of_up = scoring.rank_taylor_terms(up, up_gradient, dim=0)
    assert of_down.tolist() == [-0.5, 2.0]
    assert of_up.tolist() == [1.0, 2.0]
    assert scoring.rank_taylor(of_down, of_up).tolist() == [1.5, 4.0]


def test_rank_taylor_terms_are_linear_in_the_gradient() -> None:
    weight, first, second = torch.randn(3, 4, 6)
    mean = (scoring.rank_taylor_terms(weight, first, 1) + scoring.rank_taylor_terms(weight, second, 1)) / 2
    assert torch.allclose(scoring.rank_taylor_terms(weight, (first + second) / 2, 1), mean, atol=1e-6)


def test_rank_magnitude() -> None:
    down, up = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert scoring.rank_magnitude(down, up).tolist() == [10.0, 2.0]


# The same quantities read from a live model


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "opt"])
def test_the_observer_reads_the_ratio_from_the_forward_pass(name: str) -> None:
    model = with_lora(make(name, **({} if name.startswith("llama") else NO_DROPOUT[name])))
    sites = find_sites(model, block_specs(transformers_model(model)))
    observer = ModuleObserver(model, sites, block_specs(transformers_model(model)), torch.device("cpu"))
    inputs: dict[int, torch.Tensor] = {}
    for index, site in enumerate(sites):
        site.base.register_forward_pre_hook(lambda m, args, index=index: inputs.__setitem__(index, args[0].detach()))
    data = batch()
    model.train()(**data)
    observer.detach()
    real = data["attention_mask"].flatten().bool()
    assert observer.sums[1].tolist() == [float(real.sum())] * len(sites)
    for index, site in enumerate(sites):
        x = inputs[index].reshape(len(real), -1)[real]
        delta, base = site.scaling * (x @ site.down.T @ site.up.T), site.base(x)
        expected = (delta.norm(dim=1) / base.norm(dim=1)).sum().detach()
        assert float(observer.sums[0, index]) == pytest.approx(float(expected), rel=1e-4), site.spec.name


NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "opt": {"dropout": 0.0, "attention_dropout": 0.0},
}


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "opt"])
def test_magnitude_of_the_record(name: str) -> None:
    model = with_lora(make(name))
    pruner = EarlyPruner(model, light_of(length=2))
    pruner.start()
    model.train()
    for seed in (0, 1):
        model(**batch(seed=seed)).logits.square().mean().backward()
        pruner.step()
        model.zero_grad()
    scores = pruner.record().scores
    inner = transformers_model(model)
    for spec in pruner.estimator.blocks:
        weight = {slot: inner.get_submodule(n).base_layer.weight for slot, n in spec.projections.items()}
        group = torch.arange(spec.heads) // spec.heads_per_kv
        for head in range(spec.heads):
            own = slice(head * spec.head_dim, (head + 1) * spec.head_dim)
            shared = slice(int(group[head]) * spec.head_dim, (int(group[head]) + 1) * spec.head_dim)
            parts = [weight["q"][own], weight["o"][:, own], weight["k"][shared], weight["v"][shared]]
            expected = torch.cat([part.flatten() for part in parts]).norm()
            assert relative_difference(scores[f"heads/magnitude/{spec.index}"][head], expected) < 1e-5
        parts = [weight[s] for s in ("ffn_in", "ffn_gate") if s in weight] + [weight["ffn_out"].T]
        expected = torch.cat(parts, dim=1).norm(dim=1)
        assert relative_difference(scores[f"neurons/magnitude/{spec.index}"], expected) < 1e-5
    for index, site in enumerate(find_sites(model, pruner.estimator.blocks)):
        expected = scoring.rank_magnitude(site.down, site.up)
        assert scores[f"ranks/magnitude/{index}"].equal(expected)
