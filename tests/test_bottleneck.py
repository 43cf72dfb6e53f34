"""Bottleneck adapters as a PEFT method: what they compute, and that PEFT's own calls work with them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lanes import needs_other_types
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft_models import adapted, layers, train_by_hand
from safetensors.torch import load_file
from tiny import MODELS, batch, every_family, inputs_for, make, relative_difference
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft.errors import LightPeftError
from lightpeft.models.families.family_table import block_specs
from lightpeft.peft_kinds.bottleneck import (
    Bottleneck,
    BottleneckConfig,
    BottleneckModel,
)
from lightpeft.peft_kinds.bottleneck.registration import BOTTLENECK, register

pytestmark = needs_other_types

PLACEMENTS = ("houlsby", "pfeiffer")
FAMILIES = ("bert", "llama-gqa", "opt")
ATTENTION_OUT = {
    "bert": "bert.encoder.layer.{}.attention.output.dense",
    "llama-gqa": "model.layers.{}.self_attn.o_proj",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
}
FFN_OUT = {
    "bert": "bert.encoder.layer.{}.output.dense",
    "llama-gqa": "model.layers.{}.mlp.down_proj",
    "opt": "model.decoder.layers.{}.fc2",
}


def output(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or batch())).logits


# --- values ---------------------------------------------------------------------------------------------------------


Delta = Callable[[str, Tensor], Tensor]


def delta_of(model: PeftModel, scaling: float) -> Delta:
    """The adapters' formula on plain tensors, by module name; a module without an adapter adds nothing."""
    weights = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}

    def delta(name: str, read: Tensor) -> Tensor:
        down, up = (f"{name}.bottleneck_adapters.default.{part}" for part in ("down", "up"))
        if f"{down}.weight" not in weights:
            return torch.zeros(())
        hidden = (read @ weights[f"{down}.weight"].T + weights[f"{down}.bias"]).clamp(min=0)
        return scaling * (hidden @ weights[f"{up}.weight"].T + weights[f"{up}.bias"])

    return delta


@every_family(MODELS, "family")
def test_every_family_has_the_places(family: str) -> None:
    """Hooks on an untouched base compute the same; a fresh adapter changes no bit; every adapter gets a gradient."""
    base = make(family)
    inputs = inputs_for(base)
    all_routed = not any(spec.neurons for spec in block_specs(base))
    for placement in ("houlsby",) if all_routed else PLACEMENTS:
        model = adapted(make(family), trained=False, placement=placement, scaling=0.7)
        assert output(model, inputs).equal(output(base, inputs))
        train_by_hand(model)
        delta, reference = delta_of(model, scaling=0.7), copy.deepcopy(base)
        hook_adapters(reference, placement, delta)
        assert relative_difference(output(model, inputs), output(reference, inputs)) < 1e-5
        model(**inputs).logits.sum().backward()
        branches = [p for layer in layers(model).values() for p in layer.bottleneck_adapters.parameters()]
        assert all(p.grad is not None and p.grad.any() for p in branches)


def hook_adapters(base: PreTrainedModel, placement: str, delta: Delta) -> None:
    """Add the adapters to a base by forward hooks."""
    for spec in block_specs(base):
        for slot in ("o", "ffn_out"):
            if slot not in spec.projections or (slot == "o" and placement != "houlsby"):
                continue
            name = spec.projections[slot]
            base.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: out + delta(name, out))


def test_dropout_is_on_what_the_branch_reads() -> None:
    branch = Bottleneck(6, 3, BottleneckConfig(placement="houlsby", dropout=0.4))
    x, seen = torch.randn(50, 6), []
    branch.down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    branch(x)
    dropped = seen[0] == 0
    assert 0.2 < dropped.float().mean() < 0.6
    torch.testing.assert_close(seen[0][~dropped], x[~dropped] / 0.6)
    branch.eval()(x)
    assert seen[1].equal(x)


# --- PEFT's calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("scaling", [0.3, "learned"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_save_and_load(tmp_path: Path, placement: str, scaling: float | str, low_cpu_mem_usage: bool) -> None:
    model = adapted(make("llama-gqa"), placement=placement, scaling=scaling, non_linearity="gelu", dropout=0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("llama-gqa"), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert output(loaded).equal(output(model))
    saved, again = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert saved.keys() == again.keys() and all(saved[key].equal(again[key]) for key in saved)
    assert saved.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    assert not any("default" in key for key in saved)
    per_layer = 5 if scaling == "learned" else 4
    assert len(saved) == per_layer * len(layers(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_saved_config_says_where_adapters_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(make("opt"), placement="pfeiffer")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "BOTTLENECK"
    assert saved["target_modules"] == [FFN_OUT["opt"].format(index) for index in range(3)]
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, BottleneckConfig) and config.placement == "pfeiffer" and config.size == 5

    def refuse(model: PreTrainedModel) -> None:
        raise AssertionError("the model family was asked")

    monkeypatch.setattr("lightpeft.peft_kinds.bottleneck.model.block_specs", refuse)
    assert output(PeftModel.from_pretrained(make("opt"), str(tmp_path))).equal(output(model))


def test_two_adapters_of_one_model(tmp_path: Path) -> None:
    """Of two placements and widths: each computes what it computes alone."""
    second = {"placement": "pfeiffer", "size": 3, "scaling": 0.5}
    alone = [adapted(make("llama-gqa")), adapted(make("llama-gqa"), **second)]
    for name, model in zip(("first", "second"), alone, strict=True):
        model.save_pretrained(tmp_path / name)
    expected = {"first": output(alone[0]), "second": output(alone[1]), "none": output(make("llama-gqa"))}

    model = PeftModel.from_pretrained(make("llama-gqa"), str(tmp_path / "first"), "first", is_trainable=True)
    model.load_adapter(str(tmp_path / "second"), "second")
    layer = layers(model)[FFN_OUT["llama-gqa"].format(0)]
    assert layer.size == {"first": 5, "second": 3}
    for name in ("second", "first", "second"):
        model.set_adapter(name)
        assert output(model).equal(expected[name])
        with model.disable_adapter():
            assert output(model).equal(expected["none"])
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable and all(f".{name}." in n for n in trainable)

    model.base_model.set_adapter(["first", "second"])
    both = output(model)
    assert not both.equal(expected["first"]) and not both.equal(expected["second"])
    model.base_model.set_adapter(["second", "first"])
    torch.testing.assert_close(output(model), both)

    model.set_adapter("first")
    model.delete_adapter("second")
    assert layer.size == {"first": 5}
    assert output(model).equal(expected["first"])
    model.add_adapter("third", BottleneckConfig(size=2, target_modules=["down_proj"]))
    assert output(model).equal(expected["first"])
    model.save_pretrained(tmp_path / "again", selected_adapters=["first"])
    assert output(PeftModel.from_pretrained(make("llama-gqa"), str(tmp_path / "again" / "first"))).equal(
        expected["first"]
    )


def test_size_pattern(tmp_path: Path) -> None:
    pattern = {"model.layers.1.self_attn.o_proj": 3, "model.layers.0.mlp.down_proj": 7}
    model = adapted(make("llama-gqa"), placement="houlsby", size_pattern=pattern)
    expected = {}
    for index in range(3):
        expected[FFN_OUT["llama-gqa"].format(index)] = 7 if index == 0 else 5
        expected[ATTENTION_OUT["llama-gqa"].format(index)] = 3 if index == 1 else 5
    assert {name: layer.size["default"] for name, layer in layers(model).items()} == expected
    for layer in layers(model).values():
        branch = layer.bottleneck_adapters["default"]
        assert branch.down.out_features == branch.up.in_features == layer.size["default"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("llama-gqa"), str(tmp_path))
    assert output(loaded).equal(output(model))
    assert loaded.peft_config["default"].size_pattern == {n: size for n, size in expected.items() if size != 5}


def test_merging_is_refused() -> None:
    """At once: also what stands before the first adapter is left as it is."""
    model = adapted(make("opt"), placement="pfeiffer", modules_to_save=["embed_positions"])
    names = [name for name, _ in model.named_modules()]
    before = output(model)
    for attempt in (model.merge_and_unload, model.merge_adapter, next(iter(layers(model).values())).merge):
        with pytest.raises(LightPeftError, match="cannot be merged.*unload") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    model.unmerge_adapter()
    assert output(model).equal(before) and [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_unload_gives_the_base_back(family: str, placement: str) -> None:
    base = make(family)
    names, expected = [name for name, _ in base.named_modules()], output(base)
    model = adapted(base, placement=placement, task_type=None)
    unloaded = model.unload()
    assert [name for name, _ in unloaded.named_modules()] == names
    assert output(unloaded).equal(expected)
    assert not output(adapted(unloaded, placement=placement)).equal(expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["bert", "llama-gqa"])
def test_gradient_checkpointing(family: str, placement: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = adapted(make(family), placement=placement, scaling="learned")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        # checkpointing is for training; the tiny models' dropout would be drawn anew
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        calls = []
        layer = next(iter(layers(model).values()))
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        model(**batch()).logits.square().mean().backward()
        assert len(calls) == (2 if checkpointing else 1)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and len(plain) >= 15
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-8)


# --- kinds of models and numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bases(tmp_path: Path, placement: str, dtype: torch.dtype) -> None:
    model = adapted(make("llama-gqa").to(dtype), placement=placement, scaling="learned")
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable and all(p.dtype == torch.float32 for p in trainable)
    logits = model(**batch()).logits
    assert logits.dtype == dtype and not logits.equal(output(make("llama-gqa").to(dtype)))
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trainable)
    reference = output(adapted(make("llama-gqa").to(dtype).float(), placement=placement, scaling="learned"))
    assert relative_difference(logits.float(), reference) < 0.05
    model.save_pretrained(tmp_path)
    assert output(PeftModel.from_pretrained(make("llama-gqa").to(dtype), str(tmp_path))).equal(logits)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0; it must be .* at least 1"),
        ({"size": 2.5}, "size is 2.5; it must be a whole number"),
        ({"size": True}, "size is True; it must be a whole number"),
        ({"size_pattern": {"fc2": 0}}, "size_pattern of fc2 is 0; it must be"),
        ({"non_linearity": "rellu"}, "non_linearity 'rellu' is unknown.* relu,"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be in"),
        ({"dropout": -0.1}, "dropout is -0.1; it must be in"),
        ({"scaling": "learn"}, "scaling is 'learn'; it must be a number or \"learned\""),
        ({"scaling": float("nan")}, "scaling is nan; it must be a number"),
        ({"placement": "serial"}, "placement is 'serial'; choose one of houlsby, pfeiffer, or None"),
        ({"placement": None}, "give placement .* or target_modules"),
        ({"task_type": "NONSENSE"}, "Invalid task type"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        BottleneckConfig(**{"placement": "houlsby", **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target_modules": ["nowhere"], "task_type": None}, ValueError, "not found in the base model"),
        ({"placement": "houlsby", "exclude_modules": ["dense"]}, ValueError, "No modules were targeted"),
        ({"target_modules": ["LayerNorm"]}, LightPeftError, "a .*LayerNorm cannot be pruned"),
    ],
)
def test_what_does_not_fit_the_model(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        adapted(make("bert"), **settings)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_a_placement_needs_a_transformers_model() -> None:
    with pytest.raises(LightPeftError, match="needs a transformers model, not a Sequential; give target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), BottleneckConfig(placement="houlsby"))


# --- registration ---------------------------------------------------------------------------------------------------


def test_registration_is_done_once() -> None:
    register(BottleneckConfig, BottleneckModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING["BOTTLENECK"] is BottleneckModel
    assert PEFT_TYPE_TO_CONFIG_MAPPING["BOTTLENECK"] is BottleneckConfig
    assert "BOTTLENECK" not in PeftType.__members__, "PEFT's own enum stays as it is"
    assert copy.deepcopy(BOTTLENECK) is BOTTLENECK
    assert json.dumps(BOTTLENECK) == '"BOTTLENECK"'


def test_another_method_of_this_name() -> None:
    with pytest.raises(LightPeftError, match="PEFT already has a method BOTTLENECK"):
        register(BottleneckConfig, type("Other", (BottleneckModel,), {}))
    assert PEFT_TYPE_TO_TUNER_MAPPING["BOTTLENECK"] is BottleneckModel
