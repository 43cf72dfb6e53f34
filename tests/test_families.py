"""The block structure of every family, and what cannot be pruned is refused with one clear line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import ALL, DROPPED, MODELS, SIZES, make, plan_for, with_lora
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from lightpeft import EarlyPruner
from lightpeft.errors import LightPeftError
from lightpeft.families import FAMILIES, Family, block_specs, family_of
from lightpeft.records import dense_parameters
from lightpeft.sites import check_peft, find_sites
from lightpeft.structure import SLOTS
from lightpeft.surgery import apply_plan


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(LightPeftError) as error:
        action()
    text = str(error.value)
    assert text and "\n" not in text
    return text


# Structure


@pytest.mark.parametrize("name", ALL)
def test_sizes_and_costs(name: str) -> None:
    model = make(name)
    modules = dict(model.named_modules())
    specs = block_specs(model)
    assert [spec.index for spec in specs] == [0, 1, 2]
    kv_heads = {"llama-mqa": 1, "llama-mha": 4}.get(name, 2 if name.startswith("llama") else 4)
    for spec in specs:
        assert (spec.heads, spec.kv_heads, spec.neurons) == (4, kv_heads, 48)
        assert spec.head_dim == (12 if name == "llama-head-dim" else 8)
        assert spec.heads_per_kv * spec.kv_heads == spec.heads
        assert ("ffn_gate" in spec.projections) == name.startswith("llama")
        assert list(spec.projections) == [slot for slot in SLOTS if slot in spec.projections]
        linears = {slot: modules[path] for slot, path in spec.projections.items()}
        assert all(type(linear) is nn.Linear for linear in linears.values())
        all_parameters = sum(p.numel() for linear in linears.values() for p in linear.parameters())
        stays = sum(linears[s].bias.numel() for s in ("o", "ffn_out") if linears[s].bias is not None)
        assert dense_parameters(spec) == all_parameters - stays
        for attribute in spec.head_attributes:
            assert hasattr(modules[spec.attention], attribute)


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_of_a_block_is_a_projection(name: str) -> None:
    model = make(name)
    named = {path for spec in block_specs(model) for path in spec.projections.values()}
    layers = f".{family_of(model.config.model_type).layers}."
    inside = {path for path, module in model.named_modules() if isinstance(module, nn.Linear) and layers in f".{path}"}
    assert named == inside


@pytest.mark.parametrize("name", MODELS)
def test_peft_does_not_change_the_specs(name: str) -> None:
    model = make(name)
    expected = block_specs(model)
    peft_model = with_lora(model)
    assert block_specs(peft_model.get_base_model()) == expected
    sites = find_sites(peft_model, expected)
    assert [(site.spec.block, site.spec.slot) for site in sites] == [
        (spec.index, slot) for spec in expected for slot in spec.projections
    ]


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "opt"])
def test_a_model_without_a_head(name: str) -> None:
    model = make(name)
    bare = model.base_model
    prefix = f"{model.base_model_prefix}."
    for with_head, without in zip(block_specs(model), block_specs(bare), strict=True):
        paths = {slot: path.removeprefix(prefix) for slot, path in with_head.projections.items()}
        assert without == replace(with_head, attention=with_head.attention.removeprefix(prefix), projections=paths)


def test_registry() -> None:
    assert set(FAMILIES) == {"bert", "roberta", "llama", "opt"}
    assert all(family_of(name).model_type == name for name in FAMILIES)


def test_an_entry_is_checked_when_it_is_made() -> None:
    projections = {slot: slot for slot in SLOTS}
    Family("new", "layers", "attention", projections)
    without_q = {slot: slot for slot in SLOTS if slot != "q"}
    for wrong in (without_q, {**projections, "qkv": "qkv"}):
        with pytest.raises(ValueError, match="family new: projections must name"):
            Family("new", "layers", "attention", wrong)
    with pytest.raises(ValueError, match="family new: unknown head attribute"):
        Family("new", "layers", "attention", projections, {"heads": "number"})


# Models that cannot be pruned


def small_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=32, n_layer=1, n_head=4))


def small_distilbert() -> PreTrainedModel:
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=67, dim=32, n_layers=1, n_heads=4))


@pytest.mark.parametrize(("build", "name"), [(small_gpt2, "gpt2"), (small_distilbert, "distilbert")])
def test_unsupported_family(build: Callable[[], PreTrainedModel], name: str) -> None:
    text = refusal(lambda: block_specs(build()))
    assert text.startswith(f'model family "{name}" is not supported; supported: bert, llama, opt, roberta')
    assert "docs/families.md" in text


def test_cross_attention() -> None:
    config = BertConfig(**SIZES, intermediate_size=48, is_decoder=True, add_cross_attention=True)
    assert "cross-attention" in refusal(lambda: block_specs(BertLMHeadModel(config)))


class Linear8bit(nn.Linear):
    """Stands in for a quantised layer: a subclass of Linear with other weights."""


class Packed(nn.Module):
    """Stands in for a quantised layer that is no Linear at all."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features


@pytest.mark.parametrize("peft", [False, True], ids=["bare", "peft"])
@pytest.mark.parametrize("quantise", [lambda _: Linear8bit(32, 48), Packed], ids=["subclass", "other"])
def test_quantised_weights(quantise: Callable[[nn.Linear], nn.Module], peft: bool) -> None:
    model = make("llama-gqa")
    model.model.layers[1].mlp.up_proj = quantise(model.model.layers[1].mlp.up_proj)
    if peft:
        with_lora(model, target_modules=["q_proj"])
    text = refusal(lambda: block_specs(model))
    assert text.startswith("model.layers.1.mlp.up_proj is a ") and "not a plain torch.nn.Linear" in text
    assert "load the base in float32, bfloat16 or float16" in text


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "opt"])
@pytest.mark.parametrize("budget", [{}, DROPPED], ids=["usual", "dropped"])
def test_pruned_before(name: str, budget: dict[str, Any]) -> None:
    model = with_lora(make(name))
    apply_plan(model, plan_for(model, **budget))
    text = refusal(lambda: block_specs(model.get_base_model()))
    assert "pruned before cannot be pruned again" in text
    assert refusal(lambda: EarlyPruner(model)) == text


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "opt"])
def test_pruned_before_in_the_ffn_only(name: str) -> None:
    model = with_lora(make(name))
    apply_plan(model, plan_for(model, heads=0))
    assert "pruned before cannot be pruned again" in refusal(lambda: block_specs(model.get_base_model()))


# PEFT models that cannot be pruned


def bert_with(adapter: Any) -> PeftModel:
    return get_peft_model(make("bert"), adapter)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["query", "value"], "r": 4, **changes})


def bert_with_setting(name: str, value: Any) -> PeftModel:
    """LoRA whose configuration says one more thing, without the work of making it so."""
    model = bert_with(lora())
    setattr(model.peft_config["default"], name, value)
    return model


def assert_refused(model: nn.Module, says: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert says in refusal(lambda: check_peft(model))
    assert says in refusal(lambda: EarlyPruner(model))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(value.equal(before[key]) for key, value in after.items())


@pytest.mark.parametrize(
    ("method", "settings", "name"),
    [
        ("AdaLoraConfig", {"total_step": 9}, "ADALORA"),
        ("VeraConfig", {"r": 4}, "VERA"),
        ("LoHaConfig", {}, "LOHA"),
        ("LoKrConfig", {}, "LOKR"),
        ("OFTConfig", {"oft_block_size": 8}, "OFT"),
        ("PromptTuningConfig", {"num_virtual_tokens": 2}, "PROMPT_TUNING"),
        ("PrefixTuningConfig", {"num_virtual_tokens": 2}, "PREFIX_TUNING"),
        ("LNTuningConfig", {"target_modules": ["LayerNorm"]}, "LN_TUNING"),
    ],
)
def test_unsupported_peft_types(method: str, settings: dict[str, Any], name: str) -> None:
    if "num_virtual_tokens" not in settings:
        settings = {"target_modules": ["query", "value"], **settings}
    model = bert_with(getattr(peft, method)(task_type="SEQ_CLS", **settings))
    assert_refused(model, f"PEFT type {name} cannot be pruned; use one of LORA, IA3, BOTTLENECK")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica"])
def test_starts_that_change_the_base(start: str) -> None:
    made = start.startswith("pissa") or start == "olora"
    model = bert_with(lora(init_lora_weights=start)) if made else bert_with_setting("init_lora_weights", start)
    assert_refused(model, f'init_lora_weights="{start}" changes the base weights; use True, "gaussian" or "eva"')


@pytest.mark.parametrize(
    "name",
    [
        "use_bdlora",
        "use_qalora",
        "alora_invocation_tokens",
        "arrow_config",
        "velora_config",
        "kasa_config",
        "monteclora_config",
        "layer_replication",
        "target_parameters",
    ],
)
def test_lora_settings_that_cannot_be_pruned(name: str) -> None:
    assert hasattr(lora(), name)
    assert_refused(bert_with_setting(name, [1]), f"LoRA with {name} cannot be pruned; use LoRA, rsLoRA or DoRA")


def test_biases_of_the_whole_base() -> None:
    says = 'LoRA bias="all" also trains biases of the base where no LoRA module is'
    assert_refused(bert_with(lora(bias="all")), says)
    assert_refused(bert_with(lora(bias="all", use_dora=True)), says)


def test_models_that_are_no_peft_model() -> None:
    assert_refused(make("bert"), "expected a PeftModel from peft.get_peft_model, got a BertForSequenceClassification")
    mixed = get_peft_model(make("bert"), lora(), mixed=True)
    assert_refused(mixed, "expected a PeftModel from peft.get_peft_model, got a PeftMixedModel")


def test_several_adapters() -> None:
    model = bert_with(lora())
    model.add_adapter("second", lora())
    assert model.active_adapter == "default"
    assert_refused(model, "the model has adapters default, second; lightpeft prunes one adapter at a time")
    model.delete_adapter("second")
    check_peft(model)


def test_adapters_inside_the_base() -> None:
    base = peft.inject_adapter_in_model(lora(), make("bert"), adapter_name="inner")
    says = "the model has adapters inner, default; lightpeft prunes one adapter at a time"
    assert_refused(get_peft_model(base, lora(target_modules=["key"])), says)
    with pytest.warns(UserWarning):
        twice = get_peft_model(bert_with(lora()), lora(target_modules=["key"]))
    assert_refused(twice, "there is a PeftModel inside the PeftModel; lightpeft prunes one adapter at a time")


def test_merged_weights() -> None:
    model = with_lora(make("bert"))
    model.merge_adapter()
    assert_refused(model, "the PEFT weights are merged; call model.unmerge_adapter() first")
    model.unmerge_adapter()
    check_peft(model)


def test_disabled_modules() -> None:
    model = with_lora(make("bert"))
    with model.disable_adapter():
        assert_refused(model, "the PEFT modules are disabled; call model.enable_adapter_layers() first")
    check_peft(model)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"trainable_token_indices": [1]},
    ],
)
def test_supported_lora(changes: dict[str, Any]) -> None:
    check_peft(bert_with(lora(**changes)))


def test_lora_only_outside_the_blocks() -> None:
    model = bert_with(lora(target_modules=["pooler.dense"]))
    text = refusal(lambda: EarlyPruner(model))
    assert "no PEFT module sits on a prunable projection" in text and "query, key, value" in text
