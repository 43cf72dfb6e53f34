"""Families that are not listed: found by names and order of their layers, used only if masking and pruning agree."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lanes import telling
from lights import light_of
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import (
    IMAGES,
    TEXT,
    TOKENS,
    VOCABULARY,
    Maker,
    decoder,
    encoder,
    encoder_decoder,
    inputs_for,
    make,
    maker,
    with_lora,
)
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from lightpeft import EarlyPruner, LightTrainer, load_light
from lightpeft.compat.torch import has_hooks
from lightpeft.errors import LightPeftError
from lightpeft.models.families.family_table import FAMILIES, REFUSED, block_specs, family_of, register_family
from lightpeft.models.families.skeleton import random_inputs, skeleton
from lightpeft.models.families.spec import Family
from lightpeft.prune import discovery
from lightpeft.prune.discovery import check_family, discover_family, ensure_family
from lightpeft.prune.fingerprint import fingerprint

GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **TOKENS}
SOUND = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SOUND |= {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 20}

DECODERS: dict[str, Maker] = {
    "gptj": maker("GPTJConfig", "GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "gpt_bigcode-mqa": maker("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT),
    "gpt_bigcode-mha": maker("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT | {"multi_query": False}),
    "persimmon": maker("PersimmonConfig", "PersimmonForCausalLM", TEXT | TOKENS),
    "xglm": maker(
        "XGLMConfig",
        "XGLMForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48, **TOKENS},
    ),
    "stablelm": decoder("StableLm"),
    "cohere": decoder("Cohere"),
    "nemotron": decoder("Nemotron"),
    "biogpt": maker("BioGptConfig", "BioGptForCausalLM", TEXT | TOKENS | {"max_position_embeddings": 64}),
    "smollm3": decoder("SmolLM3"),
    "glm": decoder("Glm", head_dim=8),
    "exaone4": decoder("Exaone4"),
    "olmo3": decoder("Olmo3"),
    "arcee": decoder("Arcee"),
}
OTHERS: dict[str, Maker] = {
    "roformer": encoder("RoFormer", embedding_size=32),
    "megatron-bert": encoder("MegatronBert"),
    "layoutlm": encoder("LayoutLM"),
    "deit": maker("DeiTConfig", "DeiTForImageClassification", IMAGES | {"intermediate_size": 48}),
    "beit": maker("BeitConfig", "BeitForImageClassification", IMAGES | {"intermediate_size": 48}),
    "hubert": maker("HubertConfig", "HubertForSequenceClassification", SOUND),
    "pegasus": encoder_decoder("Pegasus"),
}
FOUND = DECODERS | OTHERS
"""Families that no entry lists, and that can be pruned all the same."""

LISTED = ["bert", "roberta", "deberta-v2", "modernbert", "dinov2-swiglu", "bart", "opt", "gpt2"]
LISTED += ["gpt_neox", "falcon", "falcon-mqa", "falcon-mha", "phi3", "olmo2", "gemma2", "llama-gqa", "llama-mqa"]
LISTED += ["llama-head-dim"]
"""Listed families of every layout. T5 is not here: no measurement shows that blocks hand their position biases on."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts from the listed families; the models of this file are known to `make`."""
    for name, constructor in FOUND.items():
        monkeypatch.setitem(tiny.ALL, name, constructor)
    listed = dict(FAMILIES)
    monkeypatch.setattr(discovery, "_discovered", {})
    yield
    FAMILIES.clear()
    FAMILIES.update(listed)


def found(name: str) -> PreTrainedModel:
    """The model `name`, its family discovered."""
    model = make(name)
    ensure_family(model)
    return model


def unlist(name: str) -> PreTrainedModel:
    """The listed model `name` after its entry was taken away."""
    model = make(name)
    del FAMILIES[model.config.model_type]
    return model


def refusal(model: nn.Module) -> str:
    with pytest.raises(LightPeftError) as error:
        ensure_family(model)
    text = str(error.value)
    assert text and "\n" not in text
    return text


def inputs_of(model: Any, padding: str = "right") -> dict[str, torch.Tensor]:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return random_inputs(inner) if inner.main_input_name == "input_values" else inputs_for(inner, padding)


@torch.no_grad()
def values(model: Any, padding: str = "right") -> torch.Tensor:
    """Logits of real tokens, or of rows."""
    inputs = inputs_of(model, padding)
    logits = model(**inputs).logits
    real = logits.dim() == 3 and "decoder_input_ids" not in inputs and "attention_mask" in inputs
    return logits[inputs["attention_mask"] > 0] if real else logits


# What is found


@telling("name", FOUND, {"gptj", "gpt_bigcode-mqa", "beit", "hubert", "pegasus"})
def test_unlisted_families_are_found(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make(name)
    assert model.config.model_type not in FAMILIES
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="lightpeft"):
        ensure_family(model)
        ensure_family(model)
    assert len(caplog.records) == 1, "it is said once, in one line"
    line = caplog.messages[0]
    assert f'"{model.config.model_type}" is not listed; its structure was discovered' in line and "\n" not in line
    specs = block_specs(model)
    assert len(specs) == (6 if name == "pegasus" else 3)
    assert {(s.heads, s.head_dim) for s in specs} == {(4, 8)}
    assert all(value.equal(before[key]) for key, value in model.state_dict().items()), "the model was not touched"
    assert not any(map(has_hooks, model.modules()))


@telling("name", LISTED, {"bert", "falcon", "phi3", "olmo2", "bart"})
def test_what_is_found_of_listed_families_is_what_is_listed(name: str) -> None:
    expected = block_specs(make(name))
    model = unlist(name)
    ensure_family(model)
    for spec, entry in zip(block_specs(model), expected, strict=True):
        differing = {"head_attributes", "attention_outputs"}  # more is named than is listed
        if spec.kv_heads == 1:
            differing.add("interleaved")  # one KV group lies the same both ways
        same = {key: value for key, value in vars(spec).items() if key not in differing}
        assert same == {key: value for key, value in vars(entry).items() if key not in differing}


def test_t5_is_more_than_can_be_found() -> None:
    assert "fails on" in refusal(unlist("t5"))


# Parity, as of listed families


@telling(
    "name",
    ["gptj", "gpt_bigcode-mqa", "persimmon", "olmo3", "glm", "roformer", "deit", "hubert", "pegasus"],
    {"gptj", "pegasus"},
)
def test_from_estimation_to_a_loaded_light_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = dict(FAMILIES)
    model = with_lora(found(name), trained=False)
    pruner = EarlyPruner(model, light_of(length=2, heads=0.5, neurons=0.5, modules=0.5, ranks=0.5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    pruner.start()
    while not pruner.finished:
        model(**inputs_of(model)).logits.square().mean().backward()
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()
    light = pruner.prune().eval()
    assert light.light_plan.removed_ratio > 0.05
    light.save_pretrained(tmp_path)
    FAMILIES.clear()  # another process: the family has to be found again
    FAMILIES.update(listed)
    monkeypatch.setattr(discovery, "_discovered", {})
    again = load_light(tmp_path, make(name))
    assert family_of(make(name).config.model_type)
    assert values(again).equal(values(light))


# What is refused


MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
XLNET = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
CANINE = {name: value for name, value in TEXT.items() if name != "vocab_size"}
FUNNEL = {"vocab_size": VOCABULARY, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4}
FUNNEL |= {"d_head": 8, "d_inner": 48}
PROPHETNET = {"vocab_size": VOCABULARY, "hidden_size": 32}
for _side in ("encoder", "decoder"):
    PROPHETNET |= {f"{_side}_ffn_dim": 48, f"num_{_side}_layers": 2, f"num_{_side}_attention_heads": 4}
REFUSALS: dict[str, tuple[Maker, str]] = {
    "no linear attention": (maker("MambaConfig", "MambaForCausalLM", MAMBA), "of more than two dimensions"),
    "no linear layers": (maker("XLNetConfig", "XLNetForSequenceClassification", XLNET), "no list of equal blocks"),
    "paired heads": (decoder("DiffLlama"), "found: layers[q=self_attn.q_proj"),
    "a norm of the neurons": (decoder("BitNet"), "without KV groups and neurons, BitNetForCausalLM"),
    "a bias beside the output": (
        maker("GPTNeoXJapaneseConfig", "GPTNeoXJapaneseForCausalLM", TEXT | TOKENS | {"intermediate_multiple_size": 2}),
        "masking and pruning whole sub-layers, the others differ by",
    ),
    "experts": (decoder("GraniteMoe", num_local_experts=2), "of more than two dimensions, like experts and conv"),
    "gated attention": (decoder("Doge"), "has linear layers beside attention that are not one FFN: self_attn.o_proj"),
    "adapters inside": (encoder("Xmod", languages=["en"], default_language="en"), "that are not one FFN"),
    "convolution": (encoder("ConvBert", embedding_size=16), "like experts and convolutions"),
    "no vocabulary": (
        maker("CanineConfig", "CanineForSequenceClassification", CANINE),
        "CanineConfig has no vocab_size",
    ),
    "blocks of blocks": (
        maker("FunnelConfig", "FunnelForSequenceClassification", FUNNEL),
        "FunnelConfig.num_hidden_layers cannot be set to fewer layers",
    ),
    "two sums of layers": (
        maker("ProphetNetConfig", "ProphetNetForConditionalGeneration", PROPHETNET),
        "ProphetNetConfig.num_hidden_layers cannot be set to fewer layers",
    ),
    "ALiBi of the dense heads": (
        maker("MptConfig", "MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
        "without KV groups and neurons, MptForCausalLM fails on",
    ),
    "listed as refused": (encoder("Albert", embedding_size=16), "its layers share one set of weights"),
}


@pytest.mark.parametrize(("build", "says"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_cannot_be_pruned_is_refused(build: Maker, says: str) -> None:
    model = build()
    before = dict(FAMILIES)
    text = refusal(model)
    assert says in text and f'model family "{model.config.model_type}"' in text
    if model.config.model_type not in REFUSED:
        assert "could not be discovered" in text and "add an entry for it (docs/reference/families.md)" in text
    assert before == FAMILIES


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "mixtral"])
def test_a_model_without_weights_is_refused(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = type(make(name))(make(name).config)
    lora = LoraConfig(target_modules="all-linear")
    says = "on the meta device, without values; load the model with its weights"
    for make_light in (
        lambda: LightTrainer(copy.deepcopy(model), TrainingArguments(str(tmp_path)), peft_config=lora),
        lambda: EarlyPruner(get_peft_model(copy.deepcopy(model), lora)),
        lambda: fingerprint(model, block_specs(model)),
    ):
        with pytest.raises(LightPeftError, match=says):
            make_light()


# The check


def only(monkeypatch: pytest.MonkeyPatch, proposal: Family) -> None:
    monkeypatch.setattr(discovery, "propose_families", lambda small: iter([proposal]))


def listed_with(name: str, **changes: Any) -> Family:
    """The listed family of a model with a mistake in all its stacks."""
    family = family_of(make(name).config.model_type)
    return replace(family, stacks=tuple(replace(stack, **changes) for stack in family.stacks))


def swapped(name: str, first: str, second: str) -> dict[str, str]:
    (stack,) = family_of(name).stacks
    table = dict(stack.tables[0])
    return {**table, first: table[second], second: table[first]}


@pytest.mark.parametrize(
    ("name", "mistake", "says"),
    [
        ("gpt_neox", {"interleaved": False}, "masking and pruning KV groups and neurons differ by"),
        ("falcon", {"interleaved": False}, "masking and pruning KV groups and neurons differ by"),
        ("phi3", {"interleaved": True}, "masking and pruning KV groups and neurons differ by"),
        ("gpt2", {"interleaved": True}, "masking and pruning KV groups and neurons differ by"),
        ("gpt2", {"head_attributes": {}}, "without KV groups and neurons, GPT2LMHeadModel fails on"),
        ("llama-gqa", {"head_attributes": {}}, "without query heads and neurons, LlamaForCausalLM"),
        ("olmo2", {"wide_norms": {}}, "without KV groups and neurons, Olmo2ForCausalLM fails on"),
        ("mpnet", {"per_head_arguments": {}}, "without KV groups and neurons, MPNetForSequenceClassification fails on"),
        ("phi3", {"head_attributes": {"num_key_value_groups": "heads_per_kv"}}, "Phi3ForCausalLM fails on"),
        ("bert", {"attention": "attention"}, "whole sub-layers cannot be cut"),
    ],
)
def test_a_wrong_proposal_is_caught(
    name: str, mistake: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = listed_with(name, **mistake)
    model = unlist(name)
    only(monkeypatch, wrong)
    text = refusal(model)
    assert says in text and "found: " in text
    assert model.config.model_type not in FAMILIES


def test_a_projection_in_the_wrong_slot_is_caught() -> None:
    small = skeleton(make("bert"))
    for first, second in (("q", "ffn_in"), ("o", "ffn_out"), ("v", "o")):
        with pytest.raises(LightPeftError):
            check_family(small, listed_with("bert", projections=swapped("bert", first, second)))
    check_family(small, listed_with("bert"))


def test_every_plan_is_checked() -> None:
    """A family that is right for heads and neurons, but cannot lose whole attention."""
    small = skeleton(make("llama-gqa"))
    with pytest.raises(LightPeftError, match="without whole sub-layers"):
        check_family(small, listed_with("llama-gqa", attention_outputs=1))


def test_generated_tokens_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = iter(range(100))
    monkeypatch.setattr(discovery, "_generate", lambda model: torch.tensor([next(tokens)]))
    with pytest.raises(LightPeftError, match="masking and pruning KV groups and neurons generate different tokens"):
        check_family(skeleton(make("llama-gqa")), listed_with("llama-gqa"))


# When it is made


def test_a_family_of_your_own_takes_the_place_of_a_discovered_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = found("gptj")
    own = replace(family_of("gptj"))
    register_family(own)
    monkeypatch.setattr(discovery, "discover_family", lambda model: pytest.fail("discovered"))
    model.config.n_positions = 32
    ensure_family(model)
    assert family_of("gptj") is own


def test_another_config_of_the_same_family_is_looked_at_again() -> None:
    """GPT BigCode lays out fused rows by its config."""
    layouts = []
    for name in ("gpt_bigcode-mqa", "gpt_bigcode-mha", "gpt_bigcode-mqa"):
        specs = block_specs(found(name))
        layouts.append((specs[0].interleaved, specs[0].kv_heads))
    assert layouts == [(False, 1), (True, 4), (False, 1)]


def test_layers_beyond_the_skeleton_are_looked_at_before_the_family_is_used() -> None:
    model = make("gptj")
    model.transformer.h[2].extra = nn.Linear(32, 32)
    with pytest.raises(LightPeftError, match=r"transformer\.h\.2\.extra cannot be pruned: the entry of the family"):
        ensure_family(model)
    assert "gptj" not in FAMILIES


# The skeleton


def test_a_skeleton_is_small_and_random_and_of_the_same_shape() -> None:
    windows = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 4}
    settings = {"vocab_size": 5000, "intermediate_size": 999, "eos_token_id": [4999, 4998], "pad_token_id": 4997}
    dense = decoder("Qwen2", **windows, **settings)()
    state = torch.random.get_rng_state()
    small = skeleton(dense.half())
    assert torch.random.get_rng_state().equal(state), "nobody else's random numbers are used up"
    assert len(small.model.layers) == 2 and small.config.layer_types == windows["layer_types"][:2]
    assert small.config.vocab_size == 256 and small.config.intermediate_size == 128
    assert 0 <= small.config.eos_token_id < 64 and 0 <= small.config.pad_token_id < 64
    assert small.config.eos_token_id != small.config.pad_token_id
    assert small.model.layers[0].self_attn.q_proj.weight.shape == dense.model.layers[0].self_attn.q_proj.weight.shape
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert all(p.std() > 0.1 for p in small.parameters() if p.numel() > 1)
    assert dense.config.num_hidden_layers == 3 and dense.config.vocab_size == 5000
    again = skeleton(dense)
    assert all(a.equal(b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


def test_discovery_needs_no_weights() -> None:
    with torch.device("meta"):
        model = FOUND["stablelm"]()
    assert discover_family(model).stacks[0].layers == "layers"
