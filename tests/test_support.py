"""The tables of docs/reference/families.md say what is so, and what else holds of pruned models of every family."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import support
import torch
from lanes import telling, thorough
from peft import PeftModel
from support import CELLS, CHECKS, DOCUMENT, KINDS, NOT_APPLICABLE, TABLES, TOLERANCE, YES, logits, pair
from tiny import (
    DROPPED,
    IN_MAKE_TEST,
    LAYOUTS,
    MODELS,
    every_family,
    inputs_for,
    make,
    plan_for,
    relative_difference,
    with_lora,
    without_dropout,
)
from torch import Tensor, nn
from transformers import GenerationConfig

from lightpeft.errors import LightPeftError
from lightpeft.models.families.decoders import DECODERS
from lightpeft.models.families.encoder_decoders import ENCODER_DECODERS
from lightpeft.models.families.encoders import ENCODERS
from lightpeft.models.unwrap import transformers_model
from lightpeft.prune.adapting import ConfigView, SelectedChannels, SharedBiases
from lightpeft.prune.masks import UnitMasks
from lightpeft.prune.surgery import apply_plan

ADAPTED = {"bert", "llama-gqa", "t5", "mixtral"}
"""Models for which `make test` checks bottleneck adapters; it checks LoRA for one of each layout."""

every_model = every_family(MODELS)


def quick(check: str, kind: str, name: str) -> bool:
    """Whether `make test` checks a cell."""
    return check != "compile" and name in (IN_MAKE_TEST if kind == "lora" else ADAPTED)


def runs() -> list[Any]:
    """All cells."""
    return [
        pytest.param(name, kind, check, id=f"{name}-{kind}-{check}", marks=() if quick(check, kind, name) else thorough)
        for name in MODELS
        for check, kind in CELLS
        if support.applies(check, name)
    ]


# The tables


@pytest.mark.parametrize(("name", "kind", "check"), runs())
def test_the_document_says_what_works(name: str, kind: str, check: str) -> None:
    said = support.read_support()[support.row_of(name)][CELLS.index((check, kind))]
    if said == YES:
        CHECKS[check](name, kind)
    else:
        assert said == support.NO
        with pytest.raises((AssertionError, LightPeftError, RuntimeError, TypeError, ValueError)):
            CHECKS[check](name, kind)


def test_a_model_is_captured_as_a_graph() -> None:
    """All of `torch.compile` but the code that Inductor makes of the graph, where its time goes."""
    support.compiles("llama-gqa", "bottleneck", backend="aot_eager")


def test_the_document_has_a_row_for_every_family() -> None:
    families = [family.model_type for family in (*ENCODERS, *DECODERS, *ENCODER_DECODERS)]
    assert list(support.read_support()) == list(support.rows()) == families
    assert {name for names in support.rows().values() for name in names} == set(MODELS)


def test_the_document_has_a_column_for_every_check() -> None:
    text = support.section(DOCUMENT.read_text(encoding="utf-8"), "support")
    assert text == support.support_table(support.read_support())
    for model_type, cells in support.read_support().items():
        for (check, _), cell in zip(CELLS, cells, strict=True):
            assert (cell == NOT_APPLICABLE) != all(support.applies(check, n) for n in support.rows()[model_type])


@pytest.mark.parametrize("name", TABLES)
def test_the_document_describes_the_registry(name: str) -> None:
    assert support.section(DOCUMENT.read_text(encoding="utf-8"), name) == TABLES[name](), (
        "run: python tests/support.py --write"
    )


# Training


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointing(model: PeftModel, inputs: dict[str, Tensor], reentrant: bool) -> None:
    """Recompute activations. The re-entrant kind needs an input with a gradient, as everywhere in PEFT."""
    if not transformers_model(model).supports_gradient_checkpointing:
        pytest.skip("transformers does not checkpoint this model")
    if reentrant and "input_ids" in inputs:
        model.enable_input_require_grads()
    for value in inputs.values():
        value.requires_grad_(reentrant and value.is_floating_point())
    transformers_model(model).gradient_checkpointing_enable({"use_reentrant": reentrant})


def assert_close(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert values.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert float((values[name] - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max()) + 1e-8, name


@pytest.mark.parametrize("reentrant", [False, True])
@every_model
def test_gradient_checkpointing_after_pruning(name: str, reentrant: bool) -> None:
    model = with_lora(make(name))
    apply_plan(model, plan_for(model, **DROPPED))
    inputs = inputs_for(model)
    expected = gradients(without_dropout(model.train()), inputs)
    checkpointing(model, inputs, reentrant)
    assert_close(gradients(model, inputs), expected)


# One block that is cut among others that are not


@pytest.mark.parametrize("name", [*LAYOUTS, "bart"])
@pytest.mark.parametrize("kept", ["half", "none"])
def test_one_block_alone_loses_heads(name: str, kept: str) -> None:
    """In every place: what a block hands to the next is of as many heads as it has, and the next may have others."""
    dense = make(name)
    plan = plan_for(with_lora(copy.deepcopy(dense)), heads=0, neurons=0)
    inputs = inputs_for(dense)
    for index, spec in enumerate(plan.specs):
        kv_heads = tuple(range(spec.kv_heads // 2)) if kept == "half" else ()
        heads = tuple(range(len(kv_heads) * spec.heads_per_kv))
        blocks = list(plan.blocks)
        blocks[index] = replace(blocks[index], heads=heads, kv_heads=kv_heads)
        one = replace(plan, blocks=tuple(blocks))
        reference, pruned = copy.deepcopy(dense), copy.deepcopy(dense)
        masks = UnitMasks(plan.specs)
        masks.set_plan(one)
        masks.attach(reference)
        apply_plan(pruned, one)
        expected = logits(reference, inputs)
        assert not expected.equal(logits(dense, inputs))
        assert relative_difference(logits(pruned, inputs), expected) < TOLERANCE, spec.label


# The model stays whole


def shared(model: nn.Module) -> set[frozenset[str]]:
    """Names of parameters that are one and the same."""
    names = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name.replace(".table.", "."))
    return {frozenset(group) for group in names.values() if len(group) > 1}


def plain(key: str) -> str:
    """A key of a state dict without the modules that are put around a layer, a norm or a table."""
    return key.replace(".base_layer", "").replace("_norm.norm.", "_norm.").replace(".table.", ".")


@every_model
@telling("kind", KINDS, ["lora"])
def test_nothing_but_weights_is_left(name: str, kind: str) -> None:
    model = KINDS[kind](make(name))
    keys, tied = {plain(key) for key in model.state_dict()}, shared(model)
    apply_plan(model, plan_for(model))
    assert {plain(key) for key in model.state_dict()} <= keys, "no mask, no index"
    assert tied == shared(model), "what was tied stays tied, and nothing is shared anew"


@every_model
def test_copies_compute_the_same(name: str) -> None:
    _, pruned, _ = pair(name, "lora", "dropped")
    inputs = inputs_for(pruned)
    expected = logits(pruned, inputs)
    assert logits(copy.deepcopy(pruned), inputs).equal(expected)
    assert logits(pickle.loads(pickle.dumps(pruned)), inputs).equal(expected)  # noqa: S301 (of our own)


@every_model
def test_another_attention_backend_after_pruning(name: str) -> None:
    _, pruned, plan = pair(name, "lora", "usual")
    pruned = copy.deepcopy(pruned)
    inner = transformers_model(pruned)
    if not inner._supports_sdpa or not inner._can_set_attn_implementation():
        pytest.skip("transformers does not switch this model")
    inputs = inputs_for(pruned)
    expected = logits(pruned, inputs)
    inner.set_attn_implementation("eager")
    assert relative_difference(logits(pruned, inputs), expected) < TOLERANCE
    output = pruned(**inputs, output_attentions=True)
    weights = output.get("attentions") or output.get("encoder_attentions")
    kept = [len(block.heads) for block in plan.blocks[: len(weights)]]
    assert [layer.shape[1] for layer in weights] == kept, "only the new backend returns weights, one a kept head"


def test_phi3_reads_head_counts_of_its_own() -> None:
    """Its attention reads the count from the config that all layers share."""
    dense = make("phi3")
    counts = dense.config.num_attention_heads, dense.config.num_key_value_heads
    model = with_lora(dense)
    plan = plan_for(model)
    apply_plan(model, plan)
    attention = dense.model.layers[0].self_attn
    assert isinstance(attention.config, ConfigView) and len(plan.blocks[0].heads) < counts[0]
    assert attention.config.num_attention_heads == len(plan.blocks[0].heads)
    assert (dense.config.num_attention_heads, dense.config.num_key_value_heads) == counts
    assert "ConfigView" not in dense.config.to_json_string(use_diff=False)
    dense.config.sliding_window = 3
    assert attention.config.sliding_window == 3, "all else is read from the shared config when it is asked for"
    pickled = pickle.dumps(attention.config)
    for other in (copy.deepcopy(attention.config), pickle.loads(pickled)):  # noqa: S301 (of our own)
        assert other.num_attention_heads == len(plan.blocks[0].heads) and other.sliding_window == 3
        assert other.shared is not dense.config
    with pytest.raises(AttributeError):
        _ = attention.config.nothing_of_this_name


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
@pytest.mark.parametrize("budget", ["usual", "dropped"])
def test_position_biases_are_those_of_the_heads_that_stay(name: str, budget: str) -> None:
    _, pruned, plan = pair(name, "lora", budget)
    inner, dense = transformers_model(pruned), make(name)
    seen: dict[str, Tensor] = {}
    tables = {}
    for spec, kept in zip(plan.specs, plan.blocks, strict=True):
        if not spec.position_bias or not kept.heads:
            continue
        first = dense.get_submodule(spec.position_bias.rpartition(".")[0])
        attention = inner.get_submodule(spec.attention)
        biases = attention.relative_attention_bias
        tables[id(biases.table if isinstance(biases, SharedBiases) else biases)] = spec.position_bias
        expected = first.compute_bias(7, 7)[:, list(kept.heads)]
        assert attention.compute_bias(7, 7).equal(expected)
        seen[spec.attention] = expected
    assert len(seen) >= 4 and sorted(tables.values()) == sorted(set(tables.values())), "one table a stack"


def test_a_norm_over_all_heads_sees_all_heads() -> None:
    _, pruned, plan = pair("olmo2", "lora", "usual")
    inner, dense = transformers_model(pruned), make("olmo2")
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    for spec, kept in zip(plan.specs, plan.blocks, strict=True):
        for slot, heads in (("q", kept.heads), ("k", kept.kv_heads)):
            norm = inner.get_submodule(spec.wide_norms[slot])
            whole = dense.get_submodule(spec.wide_norms[slot])
            width = whole.weight.numel()
            expected = whole(states[..., :width]).unflatten(-1, (-1, spec.head_dim))[..., list(heads), :].flatten(-2)
            assert isinstance(norm, SelectedChannels) and len(heads) * spec.head_dim < width
            assert norm(states[..., :width]).equal(expected)


# Generation


def test_continuous_batching_is_refused_where_kv_heads_went() -> None:
    settings = GenerationConfig(max_new_tokens=2, do_sample=False)
    for name, budget in (("llama-gqa", "usual"), ("opt", "dropped")):
        _, pruned, plan = pair(name, "lora", budget)
        assert any(0 < len(k.kv_heads) < s.kv_heads for s, k in zip(plan.specs, plan.blocks, strict=True))
        with pytest.raises(LightPeftError, match=r"^continuous batching needs equally many KV heads .*generate\(\)$"):
            pruned.generate_batch([[5, 6, 7]], generation_config=settings)
    _, same_kv_heads, _ = pair("llama-mqa", "lora", "usual")
    assert "init_continuous_batching" not in vars(transformers_model(same_kv_heads))
