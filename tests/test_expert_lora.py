"""LoRA on the 3-D parameters of routed experts: parity, what is cut, scores against plain loops, files, whole runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import logits
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from steps import losses, stage
from test_experts import EVEN, FAMILIES, LAYOUTS, PARTS, first_experts
from tiny import inputs_for, make, masked, plan_for, refusal, relative_difference, with_lora, without_dropout
from torch import Tensor
from training import inputs, student
from workbench import Workbench, lightpeft

from lightpeft import EarlyPruner, LightConfig, LightSwitch, full_width, load_light, load_merged
from lightpeft.adapters.full_width import save_full_width
from lightpeft.adapters.merging import save_merged
from lightpeft.compat.transformers import gated
from lightpeft.config import ModelConfig
from lightpeft.models.families import block_specs
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites import Site, find_sites
from lightpeft.plans.records import BlockPlan, PrunePlan
from lightpeft.plans.structure import EXPERT_SLOTS
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.importance import ModuleObserver, RankObserver
from lightpeft.prune.light_model import LightModel, as_light
from lightpeft.prune.masks import UnitMasks
from lightpeft.prune.surgery import apply_plan

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
BUDGETS: dict[str, dict[str, Any]] = {
    "whole modules": PARTS,
    "some modules and ranks": {**PARTS, "modules": 0.25, "ranks": 0.5, "ranks_scope": "layerwise"},
    "by parameters": {**PARTS, "blocks": 0.4, "ranks": 1 / 3},
}


def adapted(name: str, targets: list[str] = BOTH, **changes: Any) -> PeftModel:
    """LoRA, with B other than zero, on all projections and on parameters of experts."""
    return with_lora(make(name), target_parameters=targets, **changes)


def light_over(name: str, **budget: Any) -> LightModel:
    model = adapted(name)
    plan = plan_for(model, **budget)
    apply_plan(model, plan)
    return as_light(model.eval(), plan)


def sites_on_experts(model: PeftModel) -> list[Site]:
    return [site for site in find_sites(model, block_specs_of(model)) if site.spec.slot in EXPERT_SLOTS]


def block_specs_of(model: PeftModel) -> Any:
    """Of a model that may be cut: where its sites are is what counts."""
    plan = getattr(model, "light_plan", None)
    return plan.specs if plan is not None else block_specs(transformers_model(model))


def difference(first: Any, second: Any, padding: str = "right") -> float:
    data = inputs_for(first, padding)
    with torch.no_grad():
        return relative_difference(first(**data).logits, second(**data).logits)


# Cut


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_cut_model_is_the_dense_one_whose_routers_leave_experts_out(name: str, budget: dict[str, Any]) -> None:
    model = adapted(name)
    plan = plan_for(model, **budget)
    assert any(site.slot in EXPERT_SLOTS for site in plan.dense_sites) and plan.removed_parameters
    reference, without = masked(model, plan), copy.deepcopy(model)
    apply_plan(model, plan)
    for padding in ("right", "left", "none"):
        assert difference(model, reference, padding) < 1e-5, padding
    with torch.no_grad():  # LoRA on experts is a part of what is compared
        for site in sites_on_experts(without):
            site.up.zero_()
    assert difference(masked(without, plan), reference) > 1e-3
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    prompt = inputs_for(model, "left", generate=True)
    assert model.generate(**prompt, **options).equal(reference.generate(**prompt, **options))


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_the_dense_model(name: str) -> None:
    model = adapted(name)
    plan = plan_for(model, **{**PARTS, "ranks": 0.5})
    reference = masked(model, plan)
    apply_plan(model, plan)
    data = inputs_for(model)
    for each in (model, reference):
        without_dropout(each.train())(**data).logits.square().mean().backward()
    dense = {site.spec.name: site for site in find_sites(reference, plan.specs)}
    for site in find_sites(model, plan.specs):
        if site.spec.slot not in EXPERT_SLOTS:
            continue
        whole = dense[site.spec.name]
        before = (whole.layer.num_experts, whole.down.grad, whole.up.grad)
        downs, ups = parts_by_hand(*before, plan, site)
        own_downs, own_ups = matrices(site.layer.num_experts, site.down.grad, site.up.grad)
        for place in range(site.layer.num_experts):
            assert relative_difference(own_downs[place], downs[place]) < 1e-4
            assert relative_difference(own_ups[place], ups[place]) < 1e-4


def matrices(experts: int, down: Tensor, up: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A and B of each expert as PEFT lays them out: rows e * rank + r of A, columns r * experts + e of B."""
    rank = len(down) // experts
    downs = [torch.stack([down[e * rank + r] for r in range(rank)]) for e in range(experts)]
    ups = [torch.stack([up[:, r * experts + e] for r in range(rank)], dim=1) for e in range(experts)]
    return downs, ups


def parts_by_hand(
    experts: int, down: Tensor, up: Tensor, plan: PrunePlan, site: Site
) -> tuple[list[Tensor], list[Tensor]]:
    """What stays of A and B, or of what is like them, of the experts that stay."""
    assert site.spec.block is not None
    spec, kept = plan.specs[site.spec.block], plan.blocks[site.spec.block]
    downs, ups = matrices(experts, down, up)
    ranks, turns = list(plan.sites[site.spec.name]), not getattr(site.base, "is_concatenated", True)
    of_downs, of_ups = [], []
    for expert in kept.experts:
        own = [n % spec.expert_width for n in kept.expert_neurons if n // spec.expert_width == expert]
        if site.spec.slot == "experts_out":
            of_downs.append(downs[expert][ranks][:, own])
            of_ups.append(ups[expert][:, ranks])
        else:
            fused = [2 * n + k for n in own for k in (0, 1)] if turns else [*own, *(n + spec.expert_width for n in own)]
            of_downs.append(downs[expert][ranks])
            of_ups.append(ups[expert][fused][:, ranks])
    return of_downs, of_ups


@pytest.mark.parametrize("name", LAYOUTS)
def test_kept_weights_are_bit_equal(name: str) -> None:
    model = adapted(name)
    dense, plan = copy.deepcopy(model), plan_for(model, **{**PARTS, "ranks": 0.5})
    apply_plan(model, plan)
    whole = {site.spec.name: site for site in find_sites(dense, plan.specs)}
    seen = 0
    for site in find_sites(model, plan.specs):
        if site.spec.slot in EXPERT_SLOTS:
            before = whole[site.spec.name]
            downs, ups = parts_by_hand(before.layer.num_experts, before.down, before.up, plan, site)
            own_downs, own_ups = matrices(site.layer.num_experts, site.down, site.up)
            assert all(a.equal(b) for a, b in zip([*own_downs, *own_ups], [*downs, *ups], strict=True))
            assert site.layer.scaling[site.adapter] == before.layer.scaling[site.adapter]
            assert site.layer.lora_A[site.adapter].out_features == len(site.down)
            seen += 1
    assert seen == 2 * sum(spec.experts > 0 for spec in plan.specs)


@pytest.mark.parametrize("stays", EXPERT_SLOTS)
def test_either_of_two_modules_around_the_same_experts_goes(stays: str, tmp_path: Path) -> None:
    model = adapted("mixtral")
    plan = plan_for(model, **PARTS)
    gone = next(slot for slot in EXPERT_SLOTS if slot != stays)
    sites = {site.name: plan.sites[site.name] for site in plan.dense_sites if site.slot != gone}
    plan = PrunePlan(plan.specs, plan.blocks, sites, plan.dense_sites, plan.base_parameters, plan.fingerprint)
    reference = masked(model, plan)
    apply_plan(model, plan)
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert [wrapper.parameter_name for wrapper in wrappers] == [EXPERT_SLOTS[stays]] * 3
    assert difference(model, reference) < 1e-5
    as_light(model.eval(), plan).save_pretrained(tmp_path)
    assert logits(load_light(tmp_path, make("mixtral"))).equal(logits(model))


# Scores


def experts_by_hand(site: Site, states: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """What LoRA adds to the outputs of each token's experts, and these, token by token: [tokens, experts * out]."""
    downs, ups = matrices(site.layer.num_experts, site.down.detach(), site.up.detach())
    weight = getattr(site.base, site.layer.parameter_name).detach()
    weight = weight.mT if getattr(site.base, "is_transposed", False) else weight
    bias = getattr(site.base, f"{site.layer.parameter_name}_bias", torch.zeros(weight.shape[:2])).detach()
    added, base = [], []
    for token, experts in enumerate(index.tolist()):
        xs = states[token].expand(len(experts), -1) if states.dim() == 2 else states[token]
        pairs = list(zip(experts, xs, strict=True))
        added.append(torch.cat([site.layer.scaling[site.adapter] * ups[e] @ (downs[e] @ x) for e, x in pairs]))
        base.append(torch.cat([weight[e] @ x + bias[e] for e, x in pairs]))
    return torch.stack(added), torch.stack(base)


@pytest.mark.parametrize("name", LAYOUTS)
def test_module_ratios(name: str) -> None:
    """Mean over real tokens of what is added over what the parameter gives, all experts of a token together."""
    model = student(name, target_parameters=BOTH)
    data, sites, specs = inputs(name, rows=4), sites_on_experts(model), block_specs(transformers_model(model))
    given: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        site.base.register_forward_pre_hook(lambda m, args, at=site.place: given.update({at: args[:2]}))
        for site in sites
    ]
    masks = UnitMasks(specs)
    masks.attach(model)
    observer = ModuleObserver(model, sites, specs, torch.device("cpu"))
    model(**data)
    for handle in handles:
        handle.remove()
    real = data["attention_mask"].bool().flatten()
    for place, site in enumerate(sites):
        states, index = given[site.place]
        states, index = states[real].detach(), index[real]
        if site.spec.slot == "experts_out":
            inner = next(each for each in sites if each.place == site.place and each.spec.slot != site.spec.slot)
            hidden = sum(experts_by_hand(inner, states, index)).unflatten(1, (index.shape[1], -1))
            states = gated(site.base, hidden)
        added, base = experts_by_hand(site, states, index)
        expected = (added.norm(dim=1) / base.norm(dim=1)).mean()
        torch.testing.assert_close(observer.sums[0, place] / observer.sums[1, place], expected, rtol=1e-4, atol=0)
        assert observer.sums[1, place] == real.sum()
    observer.detach()
    masks.detach()
    assert not any(watchers for site in sites for watchers in vars(site.base)["light_watchers"].values())


def test_rank_scores_are_of_a_rank_of_all_experts() -> None:
    model, data = student("mixtral", target_parameters=BOTH), inputs("mixtral")
    sites = sites_on_experts(model)
    observer = RankObserver(sites)
    model(**data).loss.backward()
    down_terms, up_terms = observer.take_terms().chunk(2)
    for place, site in enumerate(sites):
        downs, ups = matrices(4, site.down * site.down.grad, site.up * site.up.grad)
        for rank in range(4):
            expected = torch.stack([down[rank] for down in downs]).mean()
            torch.testing.assert_close(down_terms[4 * place + rank], expected)
            torch.testing.assert_close(up_terms[4 * place + rank], torch.stack([up[:, rank] for up in ups]).mean())
    observer.detach()


def test_estimation_scores_modules_on_experts() -> None:
    model, data = student("qwen3_moe", target_parameters=BOTH), inputs("qwen3_moe")
    estimator = Estimator(model, LightConfig(length=2, least_examples=0, ratio_every=1))
    estimator.start(None)
    for _ in range(2):
        model(**data).loss.backward()
        estimator.step()
        model.zero_grad()
    estimator.stop()
    record = estimator.record()
    assert sum(site.slot in EXPERT_SLOTS for site in record.sites) == 6
    assert record.of_modules("ratio").gt(0).all()
    assert all(scores.gt(0).all() for scores in record.of_ranks("taylor"))
    assert all(
        len(scores) == site.rank for scores, site in zip(record.of_ranks("magnitude"), record.sites, strict=True)
    )


# Saved


@pytest.mark.parametrize("name", FAMILIES)
def test_light_adapters(name: str, tmp_path: Path) -> None:
    base = make(name)
    base.save_pretrained(tmp_path / "base")
    light = light_over(name, **BUDGETS["some modules and ranks"])
    assert sites_on_experts(light)
    light.save_pretrained(tmp_path / "adapter")
    again = load_light(tmp_path / "adapter", base)
    assert logits(again).equal(logits(light)) and again.light_plan == light.light_plan
    low = load_light(tmp_path / "adapter", tmp_path / "base", low_memory=True)
    assert relative_difference(logits(low), logits(light)) < 1e-6
    again.save_pretrained(tmp_path / "again")
    files = [tmp_path / place / "adapter_model.safetensors" for place in ("adapter", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_checkpoints(name: str, tmp_path: Path) -> None:
    for place, budget in (("even", EVEN), ("uneven", {**PARTS, "blocks": 0.5})):
        light = light_over(name, **budget)
        native = save_merged(light, tmp_path / place)
        assert native == (place == "even" and name != "olmoe")
        assert relative_difference(logits(load_merged(tmp_path / place)), logits(light)) < 1e-4


@pytest.mark.parametrize("name", LAYOUTS)
def test_full_width_adds_nothing_where_the_light_model_has_nothing(name: str, tmp_path: Path) -> None:
    """Against the dense model with LoRA that is zero in all that went, and the same base."""
    dense = adapted(name)
    plan = plan_for(dense, **BUDGETS["some modules and ranks"])
    light = copy.deepcopy(dense)
    apply_plan(light, plan)
    light = as_light(light.eval(), plan)
    wide = full_width(light, make(name))
    found = {site.spec.name: site for site in find_sites(wide, plan.specs)}
    assert set(found) == set(plan.sites)
    for site in find_sites(dense, plan.specs):
        if site.spec.slot in EXPERT_SLOTS and site.spec.name in found:
            mine, spec = found[site.spec.name], plan.specs[site.spec.block or 0]
            kept = plan.blocks[site.spec.block or 0]
            expected_downs, expected_ups = parts_by_hand(spec.experts, site.down, site.up, plan, site)
            whole = PrunePlan(plan.specs, plan.blocks, {site.spec.name: tuple(range(mine.spec.rank))}, (), 1, "")
            downs, ups = parts_by_hand(spec.experts, mine.down, mine.up, whole, mine)
            for place in range(len(kept.experts)):
                rank = len(expected_downs[place])
                assert downs[place][:rank].equal(expected_downs[place]) and ups[place][:, :rank].equal(
                    expected_ups[place]
                )
            went = set(range(spec.experts)) - set(kept.experts)
            all_downs, all_ups = matrices(spec.experts, mine.down, mine.up)
            assert went and not any(all_downs[e].any() or all_ups[e].any() for e in went)
    light.save_pretrained(tmp_path / "light")
    make(name).save_pretrained(tmp_path / "base")
    save_full_width(tmp_path / "light", ModelConfig(name=str(tmp_path / "base")), tmp_path / "wide")
    again = PeftModel.from_pretrained(make(name), str(tmp_path / "wide"))
    assert relative_difference(logits(again.eval()), logits(wide)) < 1e-6


# Whole runs


def test_a_pruner_trains_what_it_cut(tmp_path: Path) -> None:
    pruner = stage(student("qwen3_moe", target_parameters=BOTH, trained=False), experts=0.25, modules=0.0)
    assert all(site.up.any() for site in sites_on_experts(pruner.model)), "estimation trains it"
    light = pruner.prune()
    sites = sites_on_experts(light)
    assert len(sites) == 6 and all(site.layer.num_experts == 3 and site.spec.rank == 2 for site in sites)
    values = losses(light)
    assert values[-1] < values[0] and all(site.up.any() for site in sites)
    light.save_pretrained(tmp_path)
    again = load_light(tmp_path, without_dropout(make("qwen3_moe")), is_trainable=True)
    assert all(site.up.requires_grad for site in sites_on_experts(again))
    assert losses(again, 1) == pytest.approx(losses(light, 1))


def test_modules_that_peft_makes_of_the_names_of_before() -> None:
    """In Qwen3-MoE it makes those of gate_proj and up_proj with twice the rank, of which as many are kept."""
    model = without_dropout(make("qwen3_moe"))
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")).train()
    light = stage(model, experts=0.25, modules=0.0, ranks=0.5).prune()
    ranks = {site.spec.slot: site.spec.rank for site in find_sites(light, light.light_plan.specs)}
    assert ranks == {"q": 1, "experts_gate_in": 2, "experts_out": 1}


def test_a_run(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, "mixtral", "causal-lm")
    changes = {"light.experts": 0.25, "light.least_examples": 0, "light.modules": 0.0, "peft.lora_dropout": 0.0}
    config = bench.yaml("run", peft={"type": "lora", "target_parameters": BOTH}, **changes)
    assert lightpeft("run", "--config", config) == 0
    light = load_light(tmp_path / "run" / "adapter")
    assert len(sites_on_experts(light)) == 2 * len(light.light_plan.blocks)
    assert lightpeft("report", tmp_path / "run") == 0
    assert lightpeft("export", tmp_path / "run" / "adapter", tmp_path / "merged", "--form", "merged") == 0
    ids = {"input_ids": torch.tensor([[2, 5, 6, 7]])}
    assert relative_difference(load_merged(tmp_path / "merged")(**ids).logits, light(**ids).logits) < 1e-4


def test_a_run_with_lora_on_experts_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Workbench(tmp_path, "mixtral", "causal-lm")
    changes = {"light.experts": 0.25, "light.least_examples": 0, "light.modules": 0.0, "peft.lora_dropout": 0.0}
    alone = {"type": "lora", "target_modules": [], "target_parameters": BOTH}
    assert lightpeft("run", "--config", bench.yaml("run", peft=alone, **changes)) == 0
    light = load_light(tmp_path / "run" / "adapter")
    sites = find_sites(light, light.light_plan.specs)
    assert {site.spec.slot for site in sites} == set(EXPERT_SLOTS) and all(site.up.any() for site in sites)
    capsys.readouterr()
    nothing = bench.yaml("nothing", peft={"type": "lora", "target_modules": []}, **changes)
    assert lightpeft("run", "--config", nothing) == 2
    assert capsys.readouterr().err.count("\n") == 1


# On routers, where PEFT puts it by itself


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_all_linear_layers_but_the_router(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What people write: PEFT then takes the router for one of them."""
    base = without_dropout(make(name))
    routers = [spec.expert_modules["router"] for spec in block_specs(base) if spec.experts]
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert all(isinstance(base.get_submodule(router), ParamWrapper) for router in routers)
    EarlyPruner(model)
    assert f"no LoRA on {len(routers)} routers ({routers[0]}): a router is cut with its experts" in caplog.text
    assert not any(isinstance(base.get_submodule(router), ParamWrapper) for router in routers)
    assert not any("gate.weight" in name for name in model.peft_config["default"].target_parameters)
    with torch.no_grad():
        for site in find_sites(model, block_specs(base)):
            site.up.normal_()
    plan = plan_for(model, **PARTS)
    reference = masked(model, plan)
    apply_plan(model, plan)
    assert difference(model, reference) < 1e-5
    light = as_light(model.eval(), plan)
    light.save_pretrained(tmp_path)
    assert logits(load_light(tmp_path, make(name))).equal(logits(light))


def test_a_run_on_all_linear_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Workbench(tmp_path, "mixtral", "causal-lm")
    peft = {"type": "lora", "target_modules": "all-linear", "lora_dropout": 0.0}
    file = bench.yaml("run", peft=peft, **{"light.experts": 0.25})
    for verb in ("check", "run"):
        assert lightpeft(verb, "--config", file) == 0
    assert "adapter_model.safetensors" in {path.name for path in (tmp_path / "run" / "adapter").iterdir()}


def test_lora_on_a_router_that_was_trained_is_refused() -> None:
    model = get_peft_model(without_dropout(make("mixtral")), LoraConfig(r=2, target_modules="all-linear"))
    router = transformers_model(model).get_submodule("model.layers.0.mlp.gate")
    with torch.no_grad():
        router.lora_B["default"].weight.fill_(1.0)
    assert refusal(lambda: EarlyPruner(model)).startswith("LoRA on the parameter gate.weight cannot be pruned")


# Refused


def test_what_is_refused_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = without_dropout(make("mixtral"))
    router = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    text = refusal(lambda: EarlyPruner(get_peft_model(base, router)))
    assert text.startswith("LoRA on the parameter mlp.gate.weight cannot be pruned; target_parameters may name gate_up")
    bench = Workbench(tmp_path, "mixtral", "causal-lm")
    config = bench.yaml("run", peft={"type": "lora", "target_parameters": BOTH})
    capsys.readouterr()
    assert lightpeft("run", "--config", config) == 2
    assert "no dropout in PEFT; set lora_dropout to 0" in capsys.readouterr().err


def test_a_switch_whose_models_several_threads_may_ask(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path / "base")
    light_over("mixtral", **PARTS).save_pretrained(tmp_path / "task")
    says = refusal(lambda: LightSwitch({"task": tmp_path / "task"}, tmp_path / "base"))
    assert "so that threads cannot ask one model at a time; load it alone: load_light" in says


def test_modules_that_are_nested_another_way() -> None:
    """PEFT names modules by what is inside what, and that by the order in which parameters happen to be."""
    model = adapted("mixtral", ["experts.gate_up_proj"])
    model(**inputs_for(model))
    assert "start from one" in refusal(lambda: with_lora(model.unload(), target_parameters=BOTH))


def test_a_single_expert_whose_matrices_are_transposed() -> None:
    model = with_lora(make("gpt_oss", num_experts_per_tok=1), target_parameters=BOTH)
    specs = block_specs(transformers_model(model))
    blocks = [BlockPlan(tuple(range(4)), (0, 1), (), *first_experts(spec, 1)) for spec in specs]
    sites = {site.spec.name: tuple(range(site.spec.rank)) for site in find_sites(model, specs)}
    dense = tuple(site.spec for site in find_sites(model, specs))
    plan = PrunePlan(tuple(specs), tuple(blocks), sites, dense, model.num_parameters(), "")
    assert "is for several experts; keep more" in refusal(lambda: apply_plan(model, plan))
    assert all(site.layer.num_experts == 4 for site in sites_on_experts(model))
