"""Linear layers in 4 and 8 bits: cut like others, exactly where the format allows it, and within bounds elsewhere."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lanes import telling
from lights import light_of
from quantized import CONFIGS, SIZES, densified
from tiny import batch, make, plan_for, relative_difference, with_lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel

from lightpeft import EarlyPruner
from lightpeft.adapters.light_adapter import load_light
from lightpeft.models.linears.bitsandbytes import logical_numel, prepare_quantized
from lightpeft.models.linears.linear_kinds import dense_weight, features, is_linear, slice_linear, stored_weight
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan

ROWS, COLUMNS = 64, 256
BLOCK = 64
SOME_ROWS = torch.arange(0, ROWS, 3)  # 22 of them, no multiple of anything that kernels like
WHOLE_BLOCKS = torch.cat([torch.arange(start, start + BLOCK) for start in (0, 128)])
SINGLE_COLUMNS = torch.arange(0, COLUMNS, 2)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """bitsandbytes warns of every cast of float32 inputs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    yield


# The kinds


def plain() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(COLUMNS, ROWS).requires_grad_(False)


def four_bits(source: nn.Linear, compute: torch.dtype = torch.float32, **settings: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    settings = {"quant_type": "nf4", "compress_statistics": False, **settings}
    blocksize = settings.pop("blocksize", None)
    layer = bnb.nn.Linear4bit(source.in_features, source.out_features, compute_dtype=compute, **settings)
    layer.weight = bnb.nn.Params4bit(source.weight.clone(), blocksize=blocksize, module=layer, **settings)
    layer.bias = nn.Parameter(source.bias.clone(), requires_grad=False)
    return layer.to("cpu")


def eight_bits(source: nn.Linear) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(source.in_features, source.out_features, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(source.weight.clone(), requires_grad=False)
    layer.bias = nn.Parameter(source.bias.clone(), requires_grad=False)
    return layer.to("cpu")


KINDS: dict[str, Callable[[nn.Linear], Any]] = {
    "nf4": four_bits,
    "fp4": lambda source: four_bits(source, quant_type="fp4"),
    "nf4-double": lambda source: four_bits(source, compress_statistics=True),
    "nf4-blocks-128": lambda source: four_bits(source, blocksize=128),
    "nf4-storage": lambda source: four_bits(source, quant_storage=torch.bfloat16),
    "int8": eight_bits,
}
EXACT = ("int8",)
"""Kinds whose scales hold for whole rows: every cut is exact."""
all_kinds = pytest.mark.parametrize("kind", KINDS)


def relative_error(weight: Tensor, reference: Tensor) -> float:
    return float((weight - reference).norm() / reference.norm())


# One layer


@all_kinds
def test_what_is_read_of_a_layer(kind: str) -> None:
    source = plain()
    layer = KINDS[kind](source)
    assert is_linear(layer) and features(layer) == (ROWS, COLUMNS)
    assert logical_numel(layer.weight) == ROWS * COLUMNS
    dense, stored = dense_weight(layer), stored_weight(layer)
    assert dense.dtype == torch.float32 and dense.shape == stored.shape == (ROWS, COLUMNS)
    assert relative_error(dense, source.weight) < (0.02 if "int8" in kind else 0.15)
    assert not stored.is_floating_point() and len(stored.unique()) > 8
    x = torch.randn(5, COLUMNS)
    torch.testing.assert_close(layer.train()(x), x @ dense.T + layer.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_order_of_packed_codes(kind: str) -> None:
    layer = KINDS[kind](plain())
    state = layer.weight.quant_state
    scales = state.absmax.repeat_interleave(BLOCK).view(ROWS, COLUMNS)
    torch.testing.assert_close(state.code[stored_weight(layer).long()] * scales, dense_weight(layer))


@all_kinds
@pytest.mark.parametrize(("index", "dim"), [(SOME_ROWS, 0), (WHOLE_BLOCKS, 1)], ids=["rows", "blocks"])
def test_what_stays_is_what_was_there(kind: str, index: Tensor, dim: int) -> None:
    if kind == "nf4-blocks-128" and dim == 1:
        index = torch.arange(128, 256)
    layer = KINDS[kind](plain())
    expected, stored = dense_weight(layer).index_select(dim, index), stored_weight(layer).index_select(dim, index)
    slice_linear(layer, index, dim)
    zeros = (0, 8) if kind == "fp4" else ()  # FP4 has two codes for zero
    assert all(code in zeros for code in stored_weight(layer)[stored_weight(layer) != stored])
    if kind == "nf4-double":  # the scales are quantized anew
        assert relative_error(dense_weight(layer), expected) < 0.01
    else:
        assert dense_weight(layer).equal(expected)


@pytest.mark.parametrize("kind", EXACT)
def test_single_columns_of_row_scaled_weights(kind: str) -> None:
    layer = KINDS[kind](plain())
    expected = dense_weight(layer)[:, SINGLE_COLUMNS]
    slice_linear(layer, SINGLE_COLUMNS, 1)
    assert dense_weight(layer).equal(expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in EXACT])
def test_single_columns_of_blocks_are_rounded_once_more(kind: str) -> None:
    source = plain()
    layer = KINDS[kind](source)
    before = dense_weight(layer)[:, SINGLE_COLUMNS]
    slice_linear(layer, SINGLE_COLUMNS, 1)
    cut = nn.Linear(len(SINGLE_COLUMNS), ROWS).requires_grad_(False)
    cut.weight.copy_(source.weight[:, SINGLE_COLUMNS])
    direct = relative_error(dense_weight(KINDS[kind](cut)), cut.weight)
    assert 0 < relative_error(dense_weight(layer), before) < 1.05 * direct
    assert direct < relative_error(dense_weight(layer), cut.weight) < 1.5 * direct


@all_kinds
@pytest.mark.parametrize(("index", "dim"), [(SOME_ROWS, 0), (SINGLE_COLUMNS, 1)], ids=["rows", "columns"])
@pytest.mark.parametrize("ran", [False, True])
def test_a_cut_layer_computes_with_its_weight(kind: str, index: Tensor, dim: int, ran: bool) -> None:
    layer = KINDS[kind](plain())
    bias = layer.bias.clone()
    if ran:  # weights move or are packed anew at the first pass
        layer.eval()(torch.randn(2, COLUMNS))
    slice_linear(layer, index, dim)
    outputs, inputs = (len(index), COLUMNS) if dim == 0 else (ROWS, len(index))
    assert features(layer) == (outputs, inputs) == (layer.out_features, layer.in_features)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.bias.equal(bias[index] if dim == 0 else bias)
    x = torch.randn(5, inputs, requires_grad=True)
    result = layer.train()(x)
    torch.testing.assert_close(result, x @ dense_weight(layer).T + layer.bias, rtol=1e-4, atol=1e-4)
    result.sum().backward()
    torch.testing.assert_close(x.grad, dense_weight(layer).sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.eval()(x.detach()), result.detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("index", [SOME_ROWS, SINGLE_COLUMNS], ids=["rows", "columns"])
def test_settings_stay(index: Tensor) -> None:
    dim = 0 if index is SOME_ROWS else 1
    settings = {"quant_type": "fp4", "blocksize": 128, "compress_statistics": True, "quant_storage": torch.bfloat16}
    four, eight = four_bits(plain().bfloat16(), torch.bfloat16, **settings), eight_bits(plain())
    for layer in (four, eight):
        layer(torch.randn(1, COLUMNS))
        slice_linear(layer, index, dim)
    state = four.weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested, state.dtype) == ("fp4", 128, True, torch.bfloat16)
    assert four.weight.dtype == four.compute_dtype == torch.bfloat16 and four.weight.quant_type == "fp4"
    assert four.weight.numel() == logical_numel(four.weight) // 4
    assert eight.state.threshold == 6.0 and eight.weight.dtype == torch.int8
    assert eight.state.CB is None  # the dense weight is freed


@all_kinds
def test_cut_twice_and_copied(kind: str) -> None:
    layer = KINDS[kind](plain())
    slice_linear(layer, SOME_ROWS, 0)
    other = copy.deepcopy(layer)
    expected = dense_weight(layer)[:16]
    slice_linear(layer, torch.arange(16), 0)
    assert relative_error(dense_weight(layer), expected) < (0.01 if kind == "nf4-double" else 1e-9)
    assert features(other) == (len(SOME_ROWS), COLUMNS)


@all_kinds
def test_a_layer_without_features(kind: str) -> None:
    nothing = torch.tensor([], dtype=torch.long)
    without_inputs, without_outputs = KINDS[kind](plain()), KINDS[kind](plain())
    slice_linear(without_inputs, nothing, 1)
    slice_linear(without_outputs, nothing, 0)
    assert features(without_inputs) == (ROWS, 0) and features(without_outputs) == (0, COLUMNS)
    x = torch.randn(2, 3, COLUMNS, dtype=torch.bfloat16)
    assert without_inputs(x[..., :0]).equal(without_inputs.bias.bfloat16().expand(2, 3, ROWS))
    assert without_outputs(x).shape == (2, 3, 0)


# Widths


@pytest.mark.parametrize("width", [16, 32, 96, 100, 128, 144, 192])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4-double", "nf4-blocks-128"])
def test_4_bit_widths_that_the_kernels_of_this_machine_get_wrong(kind: str, width: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = KINDS[kind](plain())
    cut = copy.deepcopy(layer)
    slice_linear(cut, torch.arange(width), 1)
    kernel = bnb.functional.dequantize_4bit(cut.weight.data, cut.weight.quant_state)
    right = torch.allclose(kernel, dense_weight(cut), atol=1e-6)
    assert right == (type(cut) is bnb.nn.Linear4bit) and (right or width % cut.weight.quant_state.blocksize)
    assert relative_error(dense_weight(cut), dense_weight(layer)[:, :width]) < 0.12
    x = torch.randn(5, width, dtype=torch.bfloat16)
    for model in (cut.train(), copy.deepcopy(cut).eval()):
        expected = x.float() @ dense_weight(cut).T + cut.bias
        assert model(x).dtype == torch.bfloat16 and relative_error(model(x).float(), expected) < 0.01
    y = x.float().requires_grad_()
    cut.train()(y).square().sum().backward()
    torch.testing.assert_close(y.grad, 2 * expected @ dense_weight(cut), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [64, 96])
def test_prepared_layers_of_any_width_compute_with_their_weight(width: int) -> None:
    """Those of a base that nothing was cut from."""
    source = nn.Linear(width, ROWS)
    model = nn.Sequential(four_bits(source.requires_grad_(False)))
    prepare_quantized(model)
    x = torch.randn(5, width)
    torch.testing.assert_close(model(x), x @ dense_weight(model[0]).T + source.bias, rtol=1e-4, atol=1e-4)


# Whole models


all_configs = pytest.mark.parametrize("kind", CONFIGS)
BUDGET = {"heads": 0.5, "neurons": 0.5, "modules": 0.3, "multiple_of": 64}
NARROW: list[dict[str, Any]] = [{"heads": 0.5, "neurons": 0.5}, {"blocks": 0.5, "head_unit": "balanced"}]
"""Budgets that leave widths which are no multiples of a block of 64."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk, in float32."""
    path = tmp_path_factory.mktemp("llama")
    make("llama-gqa", **SIZES).save_pretrained(path)
    return path


def load(folder: Path, kind: str, auto: Any = AutoModelForCausalLM) -> Any:
    model = auto.from_pretrained(folder, quantization_config=CONFIGS[kind](), dtype=torch.float32)
    prepare_quantized(model)
    return model


@torch.no_grad()
def logits(model: Any, train: bool = False) -> Tensor:
    inputs = batch()
    return model.train(train)(**inputs).logits[inputs["attention_mask"] > 0]


@all_configs
@pytest.mark.parametrize(
    "budget", [BUDGET, BUDGET | {"min_heads": 0, "min_neurons": 0, "heads": 0.6}, BUDGET | {"depth": 1 / 3}]
)
def test_trains_saves_and_loads(folder: Path, tmp_path: Path, kind: str, budget: dict[str, Any]) -> None:
    if "min_heads" in budget:
        budget = {**budget, "scope": "global"}
    model = with_lora(load(folder, kind), lora_dropout=0.0)
    plan = plan_for(model, **budget)
    apply_plan(model, plan)
    if "min_heads" in budget:
        assert not all(block.heads for block in plan.blocks)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model.train()(**batch(), labels=batch()["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    expected = logits(model)
    as_light(model, plan).save_pretrained(tmp_path)
    assert logits(load_light(tmp_path, base=load(folder, kind))).equal(expected)


@telling("kind", ["nf4", "nf4-double"], ["nf4-double"])
@pytest.mark.parametrize("budget", NARROW)
def test_heads_and_neurons_of_any_width_in_4_bits(tmp_path: Path, kind: str, budget: dict[str, Any]) -> None:
    """Heads of 16 channels, of which a block has four, in a width of 160: nothing is a multiple of 64."""
    make("llama-gqa", hidden_size=160, intermediate_size=224, head_dim=16).save_pretrained(tmp_path / "base")
    model = with_lora(load(tmp_path / "base", kind), trained=False, lora_dropout=0.0)
    pruner = EarlyPruner(model, light_of(length=3, modules=0.3, **budget))
    pruner.start()
    while not pruner.finished:
        model.train()(**batch(), labels=batch()["input_ids"]).loss.backward()
        pruner.step()
    light = pruner.prune()
    widths = {kept.heads and len(kept.heads) * 16 for kept in light.light_plan.blocks}
    assert all(width % 64 for width in widths) or all(len(kept.neurons) % 64 for kept in light.light_plan.blocks)
    dense = densified(light)
    assert relative_difference(logits(light, train=True), logits(dense, train=True)) < 1e-5
    assert relative_difference(logits(light), logits(dense)) < 1e-5
    expected = logits(light)
    light.save_pretrained(tmp_path / "light")
    assert logits(load_light(tmp_path / "light", base=load(tmp_path / "base", kind))).equal(expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_new_heads_are_ordinary_layers(tmp_path: Path, kind: str) -> None:
    encoder = make("bert", hidden_size=64, intermediate_size=128).base_model
    BertModel(encoder.config, add_pooling_layer=False).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=CONFIGS[kind](), dtype=torch.float32
    )
    prepare_quantized(model)
    assert type(model.classifier) is type(model.bert.pooler.dense) is nn.Linear
    assert type(model.bert.encoder.layer[0].output.dense) is not nn.Linear
    tuned = with_lora(model)
    tuned.train()(**batch(labels=True)).loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for n, p in tuned.named_parameters() if "classifier" in n)


# Refusals


def test_bitsandbytes_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    layer = plain()
    prepare_quantized(layer)
    slice_linear(layer, SOME_ROWS, 0)
    assert features(layer) == (len(SOME_ROWS), COLUMNS) and logical_numel(layer.weight) == len(SOME_ROWS) * COLUMNS
    assert not is_linear(nn.LayerNorm(4))
