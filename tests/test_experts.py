"""Routed experts: masks against plain autograd, routers without rows, what is cut, and whole runs of a mixture."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import light_over, logits
from lanes import telling, thorough
from lights import light_of
from peft import LoraConfig, get_peft_model
from tiny import (
    inputs_for,
    make,
    masked,
    plan_for,
    random_record,
    refusal,
    relative_difference,
    with_lora,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from training import inputs, student
from transformers import AutoModelForCausalLM, PreTrainedModel
from workbench import Workbench, lightpeft

from lightpeft import EarlyPruner, load_light, load_merged
from lightpeft.adapters.merging import save_merged
from lightpeft.app.exports.gguf.exporting import save_gguf
from lightpeft.app.exports.graphs.exporting import save_graph
from lightpeft.app.exports.graphs.runtimes import RUNTIMES
from lightpeft.compat.peft import ParamWrapper
from lightpeft.models.experts import ExpertLayer
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.planning import make_plan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import BlockSpec
from lightpeft.prune.light_model import as_light
from lightpeft.prune.masks import UnitMasks
from lightpeft.prune.routing import ClosedRouter
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving.whole import MERGED

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
FAMILIES += ("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite")
LAYOUTS = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3")
"""Gate and up behind one another, an expert that all tokens pass, gate and up in turns with biases, and routers that
choose among groups of experts, by scores with a correction."""
PARTS: dict[str, Any] = {"heads": 0.5, "experts": 0.25, "neurons": 1 / 3, "modules": 0.0, "ranks": 0.0}
EVEN: dict[str, Any] = {**PARTS, "scope": "layerwise"}


def layers_of(model: PreTrainedModel) -> dict[int, ExpertLayer]:
    """Block -> its experts."""
    return {spec.index: ExpertLayer.of(model, spec.expert_modules) for spec in block_specs(model) if spec.experts}


# Masks


class Weights:
    """The masks of experts and of their neurons as autograd alone would have them: factors of `down_proj`."""

    def __init__(self, model: nn.Module) -> None:
        self.inner = transformers_model(model)
        self.specs = [spec for spec in block_specs(self.inner) if spec.experts]
        generator = torch.Generator().manual_seed(5)
        self.experts = [_factors(spec.experts, generator) for spec in self.specs]
        self.neurons = [_factors(spec.expert_neurons, generator) for spec in self.specs]

    def changed(self) -> dict[str, Tensor]:
        """Name of a parameter -> what it is with the masks."""
        result = {}
        for spec, of_experts, of_neurons in zip(self.specs, self.experts, self.neurons, strict=True):
            name = f"{spec.expert_modules['experts']}.down_proj"
            module = self.inner.get_submodule(spec.expert_modules["experts"])
            inside = of_neurons.view(spec.experts, -1)
            inside = inside.unsqueeze(2) if module.is_transposed else inside.unsqueeze(1)
            result[name] = module.down_proj * inside * of_experts.view(-1, 1, 1)
            if hasattr(module, "down_proj_bias"):
                result[f"{name}_bias"] = module.down_proj_bias * of_experts.unsqueeze(1)
        return result

    def loss(self, data: dict[str, Tensor]) -> Tensor:
        """Of the model with the masks."""
        result: Tensor = functional_call(self.inner, self.changed(), kwargs=data).loss
        return result


def _factors(count: int, generator: torch.Generator) -> Tensor:
    return (0.5 + torch.rand(count, generator=generator)).requires_grad_()


def masks_like(weights: Weights, model: nn.Module) -> UnitMasks:
    """The same masks on a model."""
    masks = UnitMasks(block_specs(transformers_model(model)))
    parts = masks.split(masks.values)
    with torch.no_grad():
        for place, spec in enumerate(weights.specs):
            parts["experts"][spec.index].copy_(weights.experts[place])
            parts["expert_neurons"][spec.index].copy_(weights.neurons[place])
    masks.attach(model)
    return masks


@pytest.mark.parametrize("name", LAYOUTS)
def test_masks_scale_the_weighted_output_of_experts_and_their_neurons(name: str) -> None:
    model, data = with_lora(make(name)), inputs_for(make(name))
    weights = Weights(model)
    expected = functional_call(weights.inner, weights.changed(), kwargs=data).logits
    before = model(**data).logits
    masks = masks_like(weights, model)
    assert relative_difference(model(**data).logits, expected) < 1e-5 < relative_difference(before, expected)
    masks.detach()
    assert model(**data).logits.equal(before) and "forward" not in vars(layers_of(weights.inner)[2].experts)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_masks_are_those_of_plain_autograd(name: str) -> None:
    """Their mean, and the mean of their sizes and squares over single examples."""
    model, data = student(name), inputs(name)
    weights = Weights(model)
    masks = masks_like(weights, model)
    model(**data).loss.backward()
    taken = masks.take_gradients()
    masks.detach()
    leaves = [*weights.experts, *weights.neurons]
    whole = torch.autograd.grad(weights.loss(data), leaves)
    tokens = (data["labels"][:, 1:] != -100).sum(1)
    rows = len(tokens)
    singles = []
    for row in range(rows):
        part = {key: value[row : row + 1] for key, value in data.items()}
        shares = rows * tokens[row] / tokens.sum()  # a loss is a mean over tokens, of which rows have different numbers
        singles.append(torch.autograd.grad(weights.loss(part) * shares, leaves))
    for kind, start in (("experts", 0), ("expert_neurons", len(weights.experts))):
        for place, spec in enumerate(weights.specs):
            of_rows = torch.stack([single[start + place] for single in singles])
            found = {
                what: masks.split(getattr(taken, what))[kind][spec.index]  # type: ignore[index]
                for what in ("mean", "absolute", "squares")
            }
            assert relative_difference(found["mean"], whole[start + place]) < 1e-4
            assert relative_difference(found["absolute"], of_rows.abs().mean(0)) < 1e-4
            assert relative_difference(found["squares"], of_rows.square().mean(0)) < 1e-4


# Routers


def test_a_cut_router_ranks_groups_by_what_stays() -> None:
    """By hand: of each group the two best scores with their corrections, and the two best experts of the best group."""
    model = make("deepseek_v3")
    layer = layers_of(model)[1]
    weight, correction = layer.router.weight.clone(), layer.router.e_score_correction_bias.clone()
    states, kept = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), [0, 1, 3, 4, 6, 7]
    layer.cut(torch.tensor(kept), torch.arange(24).expand(6, 24))
    _, shares, index = layer.router(states)
    for token, state in enumerate(states):
        scores = {expert: float((state @ weight[expert]).sigmoid()) for expert in kept}
        choice = {expert: score + float(correction[expert]) for expert, score in scores.items()}
        groups = [sorted((e for e in kept if e // 4 == group), key=choice.__getitem__)[-2:] for group in (0, 1)]
        best = max(groups, key=lambda pair: sum(choice[expert] for expert in pair))
        found = {kept[place]: float(share) for place, share in zip(index[token], shares[token], strict=True)}
        whole = sum(scores[expert] for expert in best)
        assert found == pytest.approx({expert: 2.5 * scores[expert] / whole for expert in best}, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@telling("name", FAMILIES, LAYOUTS)
def test_a_router_that_leaves_experts_out_is_the_one_without_their_rows(name: str, dtype: torch.dtype) -> None:
    """Also where what corrects the choice speaks for the ones that are left out."""
    layer = layers_of(make(name).to(dtype))[2]
    half = layer.count // 2
    gone, kept = [1, half + 1], [expert for expert in range(layer.count) if expert not in (1, half + 1)]
    for correction in layer.router.buffers(recurse=False):
        correction[gone] = 5.0
    closed = torch.zeros(layer.count, dtype=torch.bool)
    closed[gone] = True
    states = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    router = ClosedRouter(layer.router, lambda: closed)
    _, shares, index = layer.router(states)
    router.remove()
    assert not closed[index].any() and closed[layer.router(states)[2]].any()
    layer.cut(torch.tensor(kept), torch.arange(24).expand(len(kept), 24))
    _, own_shares, own_index = layer.router(states)
    there, own = (torch.zeros(50, len(closed), dtype=each.dtype) for each in (shares, own_shares))
    there.scatter_(1, index, shares), own.scatter_(1, torch.tensor(kept)[own_index], own_shares)
    torch.testing.assert_close(own, there)


def test_a_plan_and_a_mask_of_zero_differ_where_a_router_chose_what_goes() -> None:
    """A mask of 0 takes an expert's output away; a cut lets the router choose another. Only the latter is the cut."""
    model = with_lora(make("mixtral"))
    plan = plan_for(model, **PARTS, criterion="random")
    data = inputs_for(model)
    reference = masked(model, plan)
    masks = UnitMasks(plan.specs)
    masks.set_plan(plan)
    masks._closed = [None for _ in plan.specs]
    only_zero = copy.deepcopy(model)
    masks.attach(only_zero)
    apply_plan(model, plan)
    assert relative_difference(model(**data).logits, reference(**data).logits) < 1e-5
    assert relative_difference(model(**data).logits, only_zero(**data).logits) > 1e-2


def balance(logits: list[Tensor], experts: int) -> Tensor:
    """transformers' load-balancing loss by hand, over layers whose routers have some or all of so many experts."""
    padded = [functional.pad(each, (0, experts - each.shape[1]), value=float("-inf")) for each in logits]
    shares = torch.cat(padded).softmax(-1)
    chosen = functional.one_hot(shares.topk(2).indices, experts).float().sum(1)
    return experts * (chosen.mean(0) * shares.mean(0)).sum()


@pytest.mark.parametrize("kept", [(3, 3, 3), (2, 4, 3)])
def test_the_balancing_loss_counts_experts_that_stay(kept: tuple[int, ...]) -> None:
    model = make("mixtral")
    specs = block_specs(model)
    blocks = [
        BlockPlan(tuple(range(4)), (0, 1), (), *first_experts(spec, n)) for spec, n in zip(specs, kept, strict=True)
    ]
    seen: list[Tensor] = []
    data = inputs_for(model, "none")
    model(**data, output_router_logits=True)  # transformers keeps hooks from the first time on
    apply_plan(model, PrunePlan(tuple(specs), tuple(blocks), {}, (), model.num_parameters(), ""))
    for block in model.model.layers:
        block.mlp.gate.register_forward_pre_hook(lambda module, args: seen.append(args[0] @ module.weight.T))
    found = model(**data, output_router_logits=True)
    assert [each.shape[1] for each in seen] == list(kept)
    torch.testing.assert_close(found.aux_loss, balance(seen, max(kept)))


def first_experts(spec: BlockSpec, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(range(count)), tuple(range(count * spec.expert_width))


# What is cut


@telling("name", FAMILIES, LAYOUTS)
def test_kept_weights_are_bit_equal(name: str) -> None:
    """Against rows written out neuron by neuron."""
    dense = make(name)
    model = copy.deepcopy(dense)
    plan = plan_for(with_lora(copy.deepcopy(dense)), **PARTS)
    before, layers = layers_of(dense), layers_of(model)
    apply_plan(model, plan)
    for spec, kept in plan.parts:
        if not spec.experts:
            continue
        old, new = before[spec.index].experts, layers[spec.index].experts
        assert new.down_proj.shape[0] == len(kept.experts) == 3 * spec.experts // 4 and kept.expert_width == 16
        for place, expert in enumerate(kept.experts):
            own = [n % spec.expert_width for n in kept.expert_neurons if n // spec.expert_width == expert]
            fused = [2 * n + k for n in own for k in (0, 1)] if name == "gpt_oss" else [*own, *(n + 24 for n in own)]
            if name == "gpt_oss":
                assert new.gate_up_proj[place].equal(old.gate_up_proj[expert][:, fused])
                assert new.gate_up_proj_bias[place].equal(old.gate_up_proj_bias[expert][fused])
                assert new.down_proj[place].equal(old.down_proj[expert][own])
                assert new.down_proj_bias[place].equal(old.down_proj_bias[expert])
            else:
                assert new.gate_up_proj[place].equal(old.gate_up_proj[expert][fused])
                assert new.down_proj[place].equal(old.down_proj[expert][:, own])
        old, new = before[spec.index].router.state_dict(), layers[spec.index].router.state_dict()
        assert len(new) == len(old) and all(new[key].equal(old[key][list(kept.experts)]) for key in old)


@pytest.mark.parametrize("name", LAYOUTS)
def test_weight_norms_of_experts(name: str) -> None:
    """Each square counts once for its expert; each of a neuron's own once for the neuron."""
    layer = layers_of(make(name))[2]
    experts, neurons = layer.squares()
    own = [*layer.experts.parameters(recurse=False), *layer.router.parameters(recurse=False)]
    torch.testing.assert_close(
        experts, sum(p.detach().square().flatten(1).sum(1) if p.dim() > 1 else p.detach() ** 2 for p in own)
    )
    smaller = copy.deepcopy(layer)
    smaller.cut(torch.arange(layer.count), torch.arange(1, 24).expand(layer.count, 23))
    rest, _ = smaller.squares()
    torch.testing.assert_close(neurons.view(-1, 24)[:, 0], experts - rest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", [0.3, 0.6, 0.97])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_compete_and_enough_of_them_stay(name: str, blocks: float) -> None:
    model = with_lora(make(name))
    record = random_record(model)
    budget = light_of(blocks=blocks, criterion="fisher", modules=0)
    if blocks == 0.97:
        assert "cannot be reached" in refusal(lambda: make_plan(record, budget))
        return
    plan = make_plan(record, budget)
    assert plan.removed_of_blocks >= blocks
    for spec, kept in plan.parts:
        assert len(kept.experts) >= spec.needed_experts and kept.expert_width % 8 == 0
        of_first = sum(expert < spec.experts // spec.expert_groups for expert in kept.experts)
        assert of_first * spec.expert_groups == len(kept.experts), "equally many of every group"


def test_a_budget_that_leaves_too_few_experts() -> None:
    leaves = "light.remove.experts 0.75 would leave 1 of 4 experts, and each token is routed to 2"
    says = f"{leaves}; set it to 0.5 or less"
    model = with_lora(make("mixtral"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert refusal(lambda: EarlyPruner(model, light_of(experts=0.75))) == says
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    assert refusal(lambda: plan_for(model, experts=0.75)) == says
    assert plan_for(model, experts=0.5).blocks[0].experts


def test_a_budget_that_leaves_too_few_experts_of_a_group() -> None:
    """Each group is ranked by two of them, and a token gets both from one."""
    model = with_lora(make("deepseek_v3"))
    assert refusal(lambda: plan_for(model, experts=0.75)) == (
        "light.remove.experts 0.75 would leave 2 of 8 experts, and each token is routed to 2, for which its router "
        "needs 4 in 2 equal groups; set it to 0.5 or less"
    )
    plan = plan_for(model, experts=0.5)
    assert [len(block.experts) for block in plan.blocks] == [0, 4, 4]
    data = plan.to_dict()
    for experts, wrong in (("0-3", "equally many experts of every group"), ("0,4", "keeps 2 of 8 experts of block 1")):
        data["blocks"][1] |= {"experts": experts, "expert_neurons": ""}
        assert wrong in refusal(lambda: PrunePlan.from_dict(data))
    alone = block_specs(make("glm4_moe", num_experts_per_tok=1))[1]
    assert alone.needs_experts() == "each token is routed to 1, for which its router needs 2 in 1 equal group"
    assert block_specs(make("deepseek_v2", topk_group=2))[1].needed_experts == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"experts": "0", "expert_neurons": "0-23"}, "keeps 1 of 4 experts of block 1, and each token is routed to 2"),
        ({"expert_neurons": "0-15"}, "does not keep equally many neurons of every kept expert"),
        ({"experts": "0-4"}, "not ascending indices below 4"),
        ({"expert_neurons": "0-96"}, "not ascending indices below 96"),
    ],
)
def test_edited_plans(change: dict[str, str], says: str) -> None:
    data = plan_for(with_lora(make("mixtral")), **PARTS).to_dict()
    assert PrunePlan.from_dict(data).to_dict() == data
    data["blocks"][1] |= change
    assert says in refusal(lambda: PrunePlan.from_dict(data))


# Saved


@telling("name", FAMILIES, LAYOUTS)
def test_merged_checkpoints(name: str, tmp_path: Path) -> None:
    """With equal layers transformers alone loads it where no norm runs over all heads; with unequal ones, lightpeft."""
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    for place, budget in (("even", EVEN), ("uneven", {"heads": None, "blocks": 0.5, "modules": 0.0})):
        light = light_over(make(name), **budget)
        native = save_merged(light, tmp_path / place)
        assert native == (place == "even" and name != "olmoe")
        loaded = load_merged(tmp_path / place)
        assert relative_difference(logits(loaded), logits(light)) < 1e-4
        prompt = inputs_for(light, "left", generate=True)
        assert loaded.generate(**prompt, **options).equal(light.generate(**prompt, **options))
        if native:
            (tmp_path / place / MERGED).unlink()
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / place)
            assert relative_difference(logits(plain), logits(light)) < 1e-4


def test_forms_that_have_no_place_for_experts(tmp_path: Path) -> None:
    light = light_over(make("mixtral"), **EVEN)
    assert "family mixtral has no GGUF export" in refusal(lambda: save_gguf(light, tmp_path / "gguf", None))  # type: ignore[arg-type]
    text = refusal(lambda: save_graph(light, tmp_path / "onnx", None, RUNTIMES["onnx"]))
    assert "does not support routed experts" in text
    assert not list(tmp_path.iterdir())


# Whole runs


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("experts"), "mixtral", "causal-lm")


@telling(("family", "stay"), [("mixtral", 3), ("deepseek_v3", 6)], [("deepseek_v3", 6)])
def test_a_run_of_a_mixture(family: str, stay: int, bench: Workbench, tmp_path: Path) -> None:
    bench = bench if family == "mixtral" else Workbench(tmp_path, family, "causal-lm")
    changes = {
        "light.remove.experts": 0.25,
    }
    assert lightpeft("run", "--config", bench.yaml("run", **changes)) == 0
    folder = bench.folder / "run"
    plan = PrunePlan.load(folder / "plan.json")
    assert all(len(block.experts) == stay for spec, block in plan.parts if spec.experts)
    assert plan.removed_parameters > 0
    assert all(len(block.heads) < spec.heads or spec.heads == 4 for spec, block in plan.parts)
    light = load_light(folder / "adapter")
    assert light.light_plan.blocks == plan.blocks
    assert load_light(folder / "adapter", low_memory=True).light_plan.blocks == plan.blocks
    assert lightpeft("export", folder / "adapter", bench.folder / "merged", "--form", "merged") == 0
    merged = load_merged(bench.folder / "merged")
    ids = {"input_ids": torch.tensor([[2, 5, 6, 7]])}
    assert relative_difference(merged(**ids).logits, light(**ids).logits) < 1e-4
    assert lightpeft("predict", folder / "adapter", bench.test, "--output", bench.folder / "answers.csv") == 0
    assert len((bench.folder / "answers.csv").read_text().splitlines()) == 41


# No LoRA on experts and routers


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_all_linear_layers_but_experts_and_routers(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What people write: PEFT then takes routers and parameters of experts for linear layers."""
    base = make(name)
    parts = [part for spec in block_specs(base) if spec.experts for part in spec.expert_modules.values()]
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert all(isinstance(base.get_submodule(part), ParamWrapper) for part in parts)
    EarlyPruner(model)
    assert f"LoRA was removed from {len(parts)} modules of routed experts and routers ({parts[0]}), " in caplog.text
    assert not any(isinstance(base.get_submodule(part), ParamWrapper) for part in parts)
    assert model.peft_config["default"].target_parameters is None
    with torch.no_grad():
        for site in find_sites(model, block_specs(base)):
            site.up.normal_()
    plan = plan_for(model.eval(), **PARTS)
    apply_plan(model, plan)
    light = as_light(model, plan)
    light.save_pretrained(tmp_path)
    assert logits(load_light(tmp_path, make(name))).equal(logits(light))


@thorough
def test_a_run_on_all_linear_layers(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, "mixtral", "causal-lm")
    peft = {"type": "lora", "target_modules": "all-linear", "lora_dropout": 0.0}
    changes = {"light.remove.experts": 0.25, "peft": peft}
    file = bench.yaml("run", **changes)
    for verb in ("check", "run"):
        assert lightpeft(verb, "--config", file) == 0
    assert load_light(tmp_path / "run" / "adapter").light_plan.sites


def test_lora_on_experts_that_somebody_named_or_trained_is_refused() -> None:
    named = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    text = refusal(lambda: EarlyPruner(get_peft_model(make("mixtral"), named)))
    assert text.startswith("LoRA on the parameter experts.down_proj cannot be pruned; leave target_parameters out")
    model = get_peft_model(make("mixtral"), LoraConfig(r=2, target_modules="all-linear"))
    router = transformers_model(model).get_submodule("model.layers.0.mlp.gate")
    with torch.no_grad():
        router.lora_B["default"].weight.fill_(1.0)
    assert refusal(lambda: EarlyPruner(model)).startswith("LoRA on the parameter down_proj cannot be pruned")
