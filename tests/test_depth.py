"""Depth: whole blocks are left out from the top before estimation; what is left is pruned, saved and served as ever."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import A_THIRD, logits, shallow
from lights import light_of
from tiny import ALL, GENERATORS, every_family, inputs_for, make, refusal, relative_difference, with_lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from workbench import Workbench, read

from lightpeft import EarlyPruner, load_light, save_merged
from lightpeft.app.runs import pipeline
from lightpeft.models.families.family_table import block_lists
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.sizes import count_parameters
from lightpeft.prune.depth import leave_out
from lightpeft.prune.estimation import Estimator

TWO_STACKS = [name for name in ALL if name.startswith(("t5", "mt5", "bart", "mbart", "whisper"))]
ONE_STACK = [name for name in ALL if name not in (*TWO_STACKS, "esm")]


@torch.no_grad()
def output_of(block: nn.Module, model: Any) -> Tensor:
    """What a block gives in a forward pass of the model."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, args, output: seen.append(output))
    model(**inputs_for(model))
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return block_lists(transformers_model(model))[0]


# The model


@every_family(ONE_STACK)
def test_it_is_a_model_that_was_made_with_fewer_blocks(name: str) -> None:
    dense = make(name)
    model = copy.deepcopy(dense)
    leave_out(model, 2)
    assert len(blocks_of(model)) == 2
    assert output_of(blocks_of(model)[1], model).equal(output_of(blocks_of(dense)[1], dense))
    again = type(model)(copy.deepcopy(model.config)).eval()
    again.load_state_dict(model.state_dict())
    assert logits(again).equal(logits(model))


@every_family([name for name in GENERATORS if name in ONE_STACK])
def test_generate_counts_on_the_blocks_that_are_there(name: str) -> None:
    light = shallow(make(name))
    inputs = inputs_for(light, "left", generate=True)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    tokens = light.generate(**inputs, **options)
    assert light.generate(**inputs, **options, use_cache=False).equal(tokens)
    assert len(light(**inputs, use_cache=True).past_key_values) == 2


def test_at_least_one_block_stays() -> None:
    assert light_of(depth=0.99).blocks_left(3) == 1
    assert [light_of(depth=0.4).blocks_left(blocks) for blocks in (1, 5, 30)] == [1, 3, 18]


@every_family(TWO_STACKS)
def test_one_stack_reads_the_other(name: str) -> None:
    model = with_lora(make(name))
    before = len(list(model.modules()))
    reason = refusal(lambda: EarlyPruner(model, light_of(depth=A_THIRD)))
    assert "a model with one stack" in reason and "set light.remove.depth to 0" in reason
    assert len(list(model.modules())) == before


def test_something_else_has_a_size_by_the_number_of_blocks() -> None:
    """The contact head of ESM reads the attention of every block."""
    model = make("esm")
    reason = refusal(lambda: leave_out(model, 2))
    assert "esm cannot lose blocks: the size of esm.contact_head.regression.weight" in reason
    assert len(blocks_of(model)) == 3 and model.config.num_hidden_layers == 3


# Plans and what is saved


@every_family(ONE_STACK)
def test_the_plan_tells_what_goes_and_the_adapter_brings_it_back(name: str, tmp_path: Path) -> None:
    dense = count_parameters(with_lora(make(name))).base
    light = shallow(make(name))
    plan = light.light_plan
    assert dense - count_parameters(light).base == plan.removed_parameters
    assert len(plan.specs) == 3 and len(plan.blocks) == 2 and len(plan.left_out) == 1
    assert PrunePlan.from_dict(plan.to_dict()) == plan
    light.save_pretrained(tmp_path)
    assert logits(load_light(tmp_path, make(name))).equal(logits(light))


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "gemma3", "gpt2", "olmo2"])
def test_a_base_that_is_read_piece_by_piece(name: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path / "base")
    light = shallow(type(make(name)).from_pretrained(tmp_path / "base"))
    light.save_pretrained(tmp_path / "light")
    loaded = load_light(tmp_path / "light", low_memory=True)
    assert logits(loaded).equal(logits(light))
    assert count_parameters(loaded).base == count_parameters(light).base


def test_a_model_of_equal_layers_is_one_for_transformers_alone(tmp_path: Path) -> None:
    light = shallow(make("llama-gqa"), heads=0.0, neurons=0.5, scope="layerwise")
    assert save_merged(light, tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert alone.config.num_hidden_layers == 2
    assert relative_difference(logits(alone), logits(light)) < 3e-5


def test_a_plan_that_keeps_a_module_above_is_refused() -> None:
    plan = shallow(make("bert")).light_plan
    data = plan.to_dict()
    above = plan.left_out[0].projections["q"]
    data["dense_sites"].append({"name": above, "rank": 4, "block": 2, "slot": "q"})
    data["sites"][above] = "0-3"
    reason = refusal(lambda: PrunePlan.from_dict(data))
    assert "in a block that it drops" in reason
    assert "has no blocks, or more blocks than specs" in refusal(
        lambda: PrunePlan.from_dict({**plan.to_dict(), "blocks": []})
    )


# Estimation


def test_estimation_is_on_what_is_left_and_modules_go_with_their_blocks(tmp_path: Path) -> None:
    model = with_lora(make("llama-classifier"))
    fingerprint = Estimator(copy.deepcopy(model), light_of()).fingerprint
    pruner = EarlyPruner(model, light_of(length=2, depth=A_THIRD, heads=0.5))
    assert len(blocks_of(model)) == 2
    assert not [name for name in model.peft_config["default"].target_modules if ".2." in name]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    pruner.start(4)
    while not pruner.finished:
        model(**inputs_for(model, labels=True)).loss.backward()
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()
    record = pruner.record()
    assert [len(record.blocks), len(record.left_out)] == [2, 1] and record.fingerprint == fingerprint
    assert {site.block for site in record.sites} == {0, 1}
    record.save(tmp_path / "estimation")
    assert EstimationRecord.load(tmp_path / "estimation").left_out == record.left_out
    light = pruner.prune()
    light.save_pretrained(tmp_path / "light")
    assert logits(load_light(tmp_path / "light", make("llama-classifier"))).equal(logits(light.eval()))


# Runs


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("depth"), "llama")


@pytest.mark.parametrize("peft", ["lora", "bottleneck"])
def test_a_whole_run(bench: Workbench, peft: str) -> None:
    """Half of the two blocks goes; what the run reports is what its adapter has."""
    result = pipeline.run(bench.config(peft, peft=peft, **{"light.remove.depth": 0.5}))
    folder = bench.folder / peft
    record, plan = EstimationRecord.load(folder / "estimation"), PrunePlan.load(folder / "plan.json")
    assert {site.block for site in record.sites} == {0} and len(plan.left_out) == 1
    assert plan.removed_of_blocks > 0.5
    assert result["parameters"]["base_removed_ratio"] == pytest.approx(plan.removed_ratio)
    assert read(folder / "metrics.json")["config"]["light"]["remove"]["depth"] == 0.5
    light = load_light(folder / "adapter")
    assert len(blocks_of(light)) == 1
