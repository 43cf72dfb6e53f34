"""The block structure of every family, and what cannot be pruned is refused with one clear line."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import (
    ALL,
    DROPPED,
    ENCODER_DECODERS,
    GROUPED,
    MODELS,
    SIZES,
    batch,
    crossed,
    every_family,
    make,
    masked,
    plan_for,
    refusal,
    relative_difference,
    with_lora,
)
from torch import nn
from transformers import OlmoConfig, OlmoForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightpeft import EarlyPruner
from lightpeft.models.families import decoders, encoder_decoders, encoders, family_table
from lightpeft.models.families.family_table import FAMILIES, REFUSED, block_specs, family_of
from lightpeft.models.families.spec import Family, Stack
from lightpeft.peft_kinds.sites.live_sites import check_peft
from lightpeft.plans.block_plan import BlockPlan, block_parameters, removable_parameters, removed_in_block
from lightpeft.plans.structure import SLOTS, BlockSpec
from lightpeft.prune.surgery import apply_plan

# Structure


STACKS = dict.fromkeys(ENCODER_DECODERS, (2, 2, 2)) | dict.fromkeys(("t5", "mt5", "t5-gated"), (3, 3, 3))
STACKS["t5-untied"] = (2, 2, 2)
KV_HEADS = {"llama-mqa": 1, "falcon-mqa": 1}
EXPERTS = {"mixtral": (0, 1, 2), "qwen2_moe": (0, 2), "qwen3_moe": (0, 1, 2)}
EXPERTS |= {"olmoe": (0, 1, 2), "gpt_oss": (0, 1, 2)}
EIGHT = ("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite")
"""Mixtures with eight experts a block, all others have four, and none in the first block."""
EXPERTS |= dict.fromkeys(EIGHT, (1, 2))
"""Blocks with routed experts."""
NEURONS = dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "gpt_oss"), dict.fromkeys(range(3), 0))
NEURONS |= {"qwen2_moe": {0: 40, 2: 40}, "dinov2": dict.fromkeys(range(3), 64)}
"""Of blocks whose FFN has other than 48."""


@every_family(ALL)
def test_sizes(name: str) -> None:
    specs = block_specs(make(name))
    stacks = STACKS.get(name, (3,))
    assert [spec.index for spec in specs] == list(range(sum(stacks)))
    labels = ["encoder {}", "decoder {}", "cross {}"] if len(stacks) > 1 else ["{}"]
    assert [spec.label for spec in specs] == [
        label.format(i) for label, depth in zip(labels, stacks, strict=True) for i in range(depth)
    ]
    assert [spec.role for spec in specs] == [
        label.removesuffix(" {}") if len(stacks) > 1 else None
        for label, depth in zip(labels, stacks, strict=True)
        for _ in range(depth)
    ]
    for spec in specs:
        assert (spec.heads, spec.kv_heads) == (4, KV_HEADS.get(name, 2 if name in GROUPED else 4))
        assert spec.head_dim == (12 if name == "llama-head-dim" else 8)
        assert spec.neurons == (0 if spec.role == "cross" else NEURONS.get(name, {}).get(spec.index, 48))
        routed = name in EXPERTS and spec.index in EXPERTS[name]
        count = 8 if name in EIGHT else 4
        assert (spec.experts, spec.expert_width, spec.experts_per_token) == ((count, 24, 2) if routed else (0, 0, 0))
        assert list(spec.projections) == [slot for slot in SLOTS if slot in spec.projections]


def parameters(model: nn.Module, blocks: Sequence[str]) -> list[int]:
    """Parameters of every block; what several share counts where it comes first."""
    counts, seen = [], set()
    for block in blocks:
        own = [p for p in model.get_submodule(block).parameters() if id(p) not in seen]
        counts.append(sum(p.numel() for p in own))
        seen |= {id(p) for p in own}
    return counts


@every_family(ALL)
@pytest.mark.parametrize("kept", ["nothing", "some"])
def test_costs_are_what_surgery_removes(name: str, kept: str) -> None:
    """In every block: whole sub-layers, with their norms of queries and keys, or some units of each kind."""
    model = make(name)
    plan = plan_for(with_lora(copy.deepcopy(model)))
    group = tuple(range(plan.specs[0].heads_per_kv))
    some = [BlockPlan(group, (0,), tuple(range(2, spec.neurons - 5)), *some_experts(spec, 16)) for spec in plan.specs]
    least = [BlockPlan((), (), (), *some_experts(spec, 8)) for spec in plan.specs]
    blocks = some if kept == "some" else least
    paths = block_paths(plan.specs)
    before, whole = parameters(model, paths), sum(p.numel() for p in model.parameters())
    plan = replace(plan, blocks=tuple(blocks))
    apply_plan(model, plan)
    gone = dict.fromkeys(paths, 0)
    for spec, block in zip(plan.specs, blocks, strict=True):
        gone[block_path(spec)] += removed_in_block(spec, block)
        whole_experts = len(block.experts) * (spec.expert_parameters - 16 * spec.expert_neuron_parameters)
        left = 0 if kept == "some" else removable_parameters(spec) - removed_in_block(spec, block)
        assert kept == "some" or left == whole_experts
    assert [old - new for old, new in zip(before, parameters(model, paths), strict=True)] == list(gone.values())
    assert whole - sum(p.numel() for p in model.parameters()) == sum(gone.values()) == plan.removed_parameters


def some_experts(spec: BlockSpec, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two experts (of each group), and the first neurons of each."""
    size = spec.experts // spec.expert_groups
    some = tuple(group * size + expert for group in range(spec.expert_groups if size else 0) for expert in (1, 3))
    return some, tuple(expert * spec.expert_width + neuron for expert in some for neuron in range(width))


def block_path(spec: BlockSpec) -> str:
    """The transformer block that a spec is of; cross-attention shares it with the decoder's self-attention."""
    parts = spec.attention.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) + 1])


def block_paths(specs: Sequence[BlockSpec]) -> list[str]:
    return list(dict.fromkeys(block_path(spec) for spec in specs))


@every_family(ALL)
def test_all_parameters_of_a_block_are_counted(name: str) -> None:
    """What pruning can reach and what it leaves; PEFT modules inside count for nothing."""
    model = make(name)
    counted = [block_specs(model), block_specs(with_lora(copy.deepcopy(model)).get_base_model())]
    paths = block_paths(counted[0])
    for specs in counted:
        total = dict.fromkeys(paths, 0)
        for spec in specs:
            total[block_path(spec)] += block_parameters(spec)
        assert list(total.values()) == parameters(model, paths)


@every_family(MODELS)
def test_every_linear_layer_of_a_block_is_a_projection(name: str) -> None:
    model = make(name)
    specs = block_specs(model)
    named = [path for spec in specs for path in spec.projections.values()]
    inside = {
        f"{block}.{path}"
        for block in block_paths(specs)
        for path, module in model.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    whole = ("shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa")
    assert set(named) | {path for path in inside if path.endswith(whole)} == inside
    assert len(named) == len(set(named))


@every_family([name for name in MODELS if "t5" not in name])
def test_a_model_without_a_head(name: str) -> None:
    model = make(name)
    bare = model.base_model
    assert bare is not model
    prefix = f"{model.base_model_prefix}."

    def relative(path: Any) -> Any:
        return path.removeprefix(prefix) if isinstance(path, str) else path

    for with_head, without in zip(block_specs(model), block_specs(bare), strict=True):
        assert without == replace(
            with_head,
            attention=relative(with_head.attention),
            projections={slot: relative(path) for slot, path in with_head.projections.items()},
            wide_norms={slot: relative(path) for slot, path in with_head.wide_norms.items()},
            expert_modules={part: relative(path) for part, path in with_head.expert_modules.items()},
        )


def test_registry() -> None:
    listed = (*encoders.ENCODERS, *decoders.DECODERS, *encoder_decoders.ENCODER_DECODERS)
    assert len({family.model_type for family in listed}) == len(listed)
    for family in listed:
        assert FAMILIES[family.model_type] is family_of(family.model_type) is family
    assert not set(FAMILIES) & set(REFUSED)


def test_an_entry_is_checked_when_it_is_made() -> None:
    separate = {slot: slot for slot in ("q", "k", "v", "o", "ffn_in", "ffn_gate", "ffn_out")}
    fused = {slot: slot for slot in ("qkv", "o", "ffn_gate_in", "ffn_out")}
    attention = {slot: slot for slot in ("q", "k", "v", "o")}
    for table in (separate, fused, attention):
        Family("new", (Stack("layers", "attention", table),))
    without_q = {slot: slot for slot in separate if slot != "q"}
    for wrong in (without_q, separate | fused, attention | {"ffn_in": "in"}, attention | {"mlp": "mlp"}, {}):
        with pytest.raises(ValueError, match="family new: .* are not the projections of a block"):
            Family("new", (Stack("layers", "attention", attention), Stack("layers", "attention", (separate, wrong))))
    latent = {slot: slot for slot in ("q", "kv", "o")}
    Family("new", (Stack("layers", "attention", latent, head_sizes={"kv": ("k_dim", "v_dim")}),))
    with pytest.raises(ValueError, match="family new: kv rows of a head are unknown; set head_sizes"):
        Family("new", (Stack("layers", "attention", latent),))
    with pytest.raises(ValueError, match="family new: unknown quantities"):
        Family("new", (Stack("layers", "attention", separate, {"heads": "number"}),))


def test_the_family_that_the_documentation_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_table, "FAMILIES", {k: v for k, v in FAMILIES.items() if k != "olmo"})
    document = Path(__file__).parents[1] / "docs" / "reference" / "families.md"
    code = document.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(code, "documentation", "exec"), {})
    assert set(family_table.FAMILIES) - set(FAMILIES) <= {"olmo"} <= set(family_table.FAMILIES)
    settings = {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    model = with_lora(OlmoForCausalLM(OlmoConfig(**SIZES, **settings)).eval())
    plan = plan_for(model, **DROPPED)
    reference = masked(model, plan)
    apply_plan(model, plan)
    with torch.no_grad():
        values, expected = (m(**batch(padding="none")).logits for m in (model, reference))
    assert relative_difference(values, expected) < 1e-5


# Models that cannot be pruned


SMALL: dict[str, Any] = {**SIZES, "intermediate_size": 48}


def bert_with_cross_attention() -> PreTrainedModel:
    return hf.BertLMHeadModel(hf.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            lambda: hf.AlbertModel(hf.AlbertConfig(**SMALL, embedding_size=16)),
            'model family "albert" cannot be pruned: its layers share one set of weights',
        ),
        (
            lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=67, hidden_size=32, n_layer=1, n_head=4)),
            'model family "bloom" cannot be pruned: its attention adds the residual',
        ),
        (lambda: make("falcon", alibi=True), "falcon with alibi=True cannot be pruned; alibi=False can"),
        (
            lambda: make("deberta-v2", share_att_key=False),
            "deberta.encoder.layer.0.attention.self.pos_key_proj cannot be pruned: the entry of the family does not",
        ),
        (
            bert_with_cross_attention,
            "bert.encoder.layer.0.crossattention.self.query cannot be pruned: the entry of the family does not",
        ),
        (
            lambda: make("gpt2", add_cross_attention=True),
            "transformer.h.0.crossattention.c_attn cannot be pruned: the entry of the family does not",
        ),
    ],
    ids=["albert", "bloom", "falcon", "deberta-v2", "bert", "gpt2"],
)
def test_what_cannot_be_pruned(build: Callable[[], PreTrainedModel], says: str) -> None:
    model = build()
    assert refusal(lambda: block_specs(model)).startswith(says)
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    before = {key: value.clone() for key, value in peft_model.state_dict().items()}
    assert says in refusal(lambda: EarlyPruner(peft_model))
    assert all(value.equal(before[key]) for key, value in peft_model.state_dict().items())


def test_families_that_are_not_listed() -> None:
    text = refusal(lambda: family_of("nothing"))
    assert text.startswith('model family "nothing" is not ') and "docs/reference/families.md" in text
    model = make("bert")
    model.config.model_type = "nothing"
    assert refusal(lambda: block_specs(model)) == text


class Packed(nn.Module):
    """Stands in for a quantized layer that is no Linear at all."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features


def integers(linear: nn.Linear) -> nn.Linear:
    """A subclass of Linear in the guise of a quantized layer: its weight holds integers."""
    weight = linear.weight.detach().to(torch.int8)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def eighths(linear: nn.Linear) -> nn.Linear:
    """In the guise of a layer in FP8, which has its scales beside its weight."""
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return linear


@pytest.mark.parametrize("peft", [False, True], ids=["bare", "peft"])
@pytest.mark.parametrize("quantize", [integers, eighths, Packed], ids=["integers", "fp8", "other"])
def test_layers_of_an_unknown_kind(quantize: Callable[[nn.Linear], nn.Module], peft: bool) -> None:
    model = make("llama-gqa")
    model.model.layers[1].mlp.up_proj = quantize(model.model.layers[1].mlp.up_proj)
    if peft:
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    text = refusal(lambda: block_specs(model))
    assert text.startswith("model.layers.1.mlp.up_proj is a ") and "which lightpeft cannot cut" in text
    assert "load the base in float32, bfloat16 or float16" in text


BUDGETS: dict[str, dict[str, Any]] = {"usual": {}, "dropped": DROPPED, "ffn only": {"heads": 0}}


@crossed(MODELS, BUDGETS)
def test_pruned_before(name: str, budget: dict[str, Any]) -> None:
    model = with_lora(make(name))
    apply_plan(model, plan_for(model, **budget))
    text = refusal(lambda: block_specs(model.get_base_model()))
    kind = type(model.get_base_model()).__name__
    assert text == f"this {kind} is pruned; a pruned model cannot be pruned again, so give the dense base"
    assert refusal(lambda: EarlyPruner(model)) == text


@crossed([name for name in MODELS if name != "dinov2"], BUDGETS)
def test_layers_of_other_widths_than_the_config_says(name: str, budget: dict[str, Any]) -> None:
    """A model that someone else has cut, or lightpeft in another process."""
    model = make(name)
    apply_plan(model, plan_for(with_lora(copy.deepcopy(model)), **budget))
    model.light_pruned = False
    text = refusal(lambda: block_specs(model))
    assert "a pruned model cannot be pruned again" in text and ("widths differ" in text or "the model has no" in text)


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
    ],
)
def test_lora_settings_that_cannot_be_pruned(name: str) -> None:
    assert hasattr(lora(), name)
    assert_refused(bert_with_setting(name, [1]), f"LoRA with {name} cannot be pruned; use LoRA, rsLoRA or DoRA")


def test_biases_of_the_whole_base() -> None:
    says = 'LoRA with bias="all" changes biases of the base, which tasks share'
    assert_refused(bert_with(lora(bias="all")), says)
    assert_refused(bert_with(lora(bias="all", use_dora=True)), says)


def test_models_that_are_no_peft_model() -> None:
    assert_refused(
        make("bert"), "BertForSequenceClassification is not a PeftModel; pass a model from peft.get_peft_model"
    )
    mixed = get_peft_model(make("bert"), lora(), mixed=True)
    assert_refused(mixed, "PeftMixedModel is not a PeftModel; pass a model from peft.get_peft_model")


def test_several_adapters() -> None:
    model = bert_with(lora())
    model.add_adapter("second", lora())
    assert model.active_adapter == "default"
    assert_refused(model, "the model has several adapters (default, second), and lightpeft prunes and saves one")
    model.delete_adapter("second")
    check_peft(model)


def test_adapters_inside_the_base() -> None:
    base = peft.inject_adapter_in_model(lora(), make("bert"), adapter_name="inner")
    says = "the model has several adapters (inner, default), and lightpeft prunes and saves one"
    assert_refused(get_peft_model(base, lora(target_modules=["key"])), says)
    with pytest.warns(UserWarning):
        twice = get_peft_model(bert_with(lora()), lora(target_modules=["key"]))
    assert_refused(twice, "the PeftModel contains another PeftModel; merge or unload the inner adapter first")


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


def test_lora_only_outside_the_blocks() -> None:
    model = bert_with(lora(target_modules=["pooler.dense"]))
    text = refusal(lambda: EarlyPruner(model))
    assert "no PEFT module is on a prunable projection" in text and "query, key, value" in text
