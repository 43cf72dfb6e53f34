"""`EarlyPruner` as a user meets it: with a bare `Trainer` and with a loop of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from lights import light_of
from single_steps import HALF, losses, stage
from tiny import batch, make, with_lora
from training import inputs, student, trainer
from transformers import BertModel

from lightpeft import EarlyPruner, LightModel, LightPeftError, load_light
from lightpeft.compat.torch import has_hooks
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.plans.prune_plan import PrunePlan


@pytest.mark.parametrize("family", ["bert", "llama-gqa", "opt"])
def test_a_bare_trainer(tmp_path: Path, family: str) -> None:
    model = student(family)
    dense = sum(p.numel() for p in model.parameters())
    pruner = EarlyPruner(model, light_of(length=0.1, **HALF))
    run = trainer(model, tmp_path, pruner.callback())
    run.train()
    assert run.state.global_step == 4
    light = pruner.prune()
    assert light is model
    assert isinstance(light, LightModel)
    assert sum(p.numel() for p in light.parameters()) < 0.8 * dense
    assert not any(map(has_hooks, light.modules()))
    before = {key: value.clone() for key, value in light.state_dict().items()}
    trainer(light, tmp_path, max_steps=6).train()
    changed = {key for key, value in light.state_dict().items() if not value.equal(before[key])}
    assert changed
    assert all("lora_" in key or "classifier" in key for key in changed)


@pytest.mark.parametrize("family", ["bert", "llama-gqa", "opt"])
def test_a_loop_of_ones_own(tmp_path: Path, family: str) -> None:
    base = make(family)
    base.save_pretrained(tmp_path / "base")
    model = with_lora(type(base).from_pretrained(tmp_path / "base")).train()
    light = stage(model).prune()
    before = light.get_base_model().state_dict()
    frozen = {key: value.clone() for key, value in before.items() if "base_layer" in key}
    losses(light)
    after = light.get_base_model().state_dict()
    assert frozen
    assert all(after[key].equal(value) for key, value in frozen.items())
    light.eval()
    light.save_pretrained(tmp_path / "light")
    again = load_light(tmp_path / "light")
    assert again(**batch()).logits.equal(light(**batch()).logits)
    assert again.light_plan == light.light_plan


def test_training_on_lowers_the_loss() -> None:
    light = stage(student()).prune()
    values = losses(light, 20)
    assert values[-1] < 0.5 * values[0]


def test_counts_follow_the_budget() -> None:
    light = stage(student()).prune()
    plan = light.light_plan
    assert [len(block.heads) for block in plan.blocks] == [2, 2, 2]
    assert sum(len(block.neurons) for block in plan.blocks) == 72
    assert len(plan.sites) == 9
    assert {len(ranks) for ranks in plan.sites.values()} == {2}
    assert {site.spec.name: site.spec.rank for site in find_sites(light, plan.specs)} == dict.fromkeys(plan.sites, 2)


def test_what_estimation_learned_stays() -> None:
    pruner = stage(student())
    learned = {site.spec.name: site.up.detach().clone() for site in pruner.estimator.sites}
    light = pruner.prune()
    plan = light.light_plan
    for site in find_sites(light, plan.specs):
        if site.spec.slot == "o":  # its outputs are not cut
            assert site.up.equal(learned[site.spec.name][:, list(plan.sites[site.spec.name])])


def test_a_plan_from_another_budget() -> None:
    pruner = stage(student())
    plan = pruner.plan(light_of(heads=0.25, neurons=0.0, modules=0.0, ranks=0.0))
    assert plan != pruner.plan()
    light = pruner.prune(plan)
    assert light.light_plan is plan
    assert [len(block.heads) for block in light.light_plan.blocks] == [3, 3, 3]
    assert light.get_base_model().bert.encoder.layer[0].intermediate.dense.out_features == 48


def test_a_plan_that_was_written_down() -> None:
    plan = stage(student()).plan()
    again = PrunePlan.from_dict(plan.to_dict())
    model = student()
    assert EarlyPruner(model, light_of()).prune(again).light_plan == plan


def test_a_plan_is_a_table() -> None:
    pruner = stage(student())
    header, *rows, summary = str(pruner.plan()).splitlines()
    assert header.split()[:2] == ["layer", "heads"]
    assert [row.split()[:3] for row in rows] == [[str(layer), "2/4", "2/4"] for layer in range(3)]
    assert summary.startswith("removes ")
    assert "keeps 9 of 18 PEFT modules" in summary


def test_pruning_before_any_step() -> None:
    pruner = EarlyPruner(student())
    with pytest.raises(LightPeftError, match="has no steps yet"):
        pruner.prune()
    pruner.start(total_steps=100)
    with pytest.raises(LightPeftError, match="has no steps yet"):
        pruner.prune()


def test_pruning_in_the_middle_takes_what_there_is() -> None:
    model = student()
    pruner = EarlyPruner(model, light_of(length=10, **HALF))
    pruner.start()
    for _ in range(3):
        model(**inputs(rows=4)).loss.backward()
        pruner.step()
    assert not pruner.finished
    assert pruner.record().meta["steps"] == 3
    assert not any(map(has_hooks, pruner.prune().modules()))


def test_pruning_twice() -> None:
    pruner = stage(student())
    plan = pruner.plan()
    pruner.prune(plan)
    with pytest.raises(LightPeftError, match="cannot be pruned again"):
        pruner.prune(plan)


def test_what_is_no_peft_model() -> None:
    with pytest.raises(LightPeftError, match="is not a PeftModel; pass a model"):
        EarlyPruner(make("bert"))  # type: ignore[arg-type]


def test_classifier_trains_and_stays() -> None:
    light = stage(student()).prune()
    trained = [key for key, p in light.named_parameters() if p.requires_grad and "classifier" in key]
    assert trained
    assert isinstance(light.get_base_model().bert, BertModel)
