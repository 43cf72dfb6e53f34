"""Bases whose blocks' weights stay on disk: the same estimation, cut and training, one weight at a time in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lanes import telling, thorough
from lights import light_of
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support import with_bottleneck
from tiny import LAYOUTS, inputs_for, make, refusal, with_lora
from torch import Tensor, nn
from transformers import (
    BertModel,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from workbench import Workbench

from lightpeft import EarlyPruner, LightModel, LightTrainer, run, weights_on_disk
from lightpeft.adapters import light_adapter
from lightpeft.app.folders.opening import find_light
from lightpeft.app.runs import bench as benching
from lightpeft.config import ModelConfig
from lightpeft.models import loading
from lightpeft.models.linears.linear_kinds import dense_weight
from lightpeft.models.linears.on_disk import is_on_disk
from lightpeft.models.on_disk import has_weights_on_disk
from lightpeft.models.task_heads import CAUSAL_LM
from lightpeft.models.unwrap import base_layer
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.profiling.memory import PeakMemory
from lightpeft.training.acceleration import accelerated


def loaded(folder: Path, architecture: Any, on_disk: bool, **options: Any) -> Any:
    """What `save_pretrained` wrote, with the weights of its blocks on disk or not."""
    if not on_disk:
        return architecture.from_pretrained(folder, **options)
    with weights_on_disk():
        return architecture.from_pretrained(folder, **options)


def saved(folder: Path, name: str, **sharding: Any) -> type[PreTrainedModel]:
    model = make(name)
    model.save_pretrained(folder, **sharding)
    return type(model)


def both(folder: Path, name: str, **options: Any) -> tuple[Any, Any]:
    """A tiny model in memory, and the same with the weights of its blocks on disk."""
    architecture = saved(folder, name)
    usual, on_disk = (loaded(folder, architecture, each, **options) for each in (False, True))
    assert has_weights_on_disk(on_disk) and not has_weights_on_disk(usual)
    return usual, on_disk


# -- the same --------------------------------------------------------------------------------------------------------


Estimated = tuple[list[Tensor], EstimationRecord, Any]
"""Losses, the record, and the light model."""


def estimated(model: Any, fast: bool = False) -> Estimated:
    """What a few steps of estimation and the cut leave."""
    pruner = EarlyPruner(model.train(), light_of(length=4, heads=0.5, neurons=0.5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, losses = inputs_for(model), list[Tensor]()
    pruner.start()
    set_seed(1)
    with accelerated(model) if fast else torch.enable_grad():
        while not pruner.finished:
            loss = model(**inputs).logits.square().mean()
            loss.backward()
            losses.append(loss.detach())
            pruner.step()
            optimizer.step()
            optimizer.zero_grad()
    return losses, pruner.record(), pruner.prune()


def assert_same(one: Estimated, other: Estimated) -> None:
    """To the last bit."""
    assert torch.stack(one[0]).equal(torch.stack(other[0]))
    assert one[1].scores.keys() == other[1].scores.keys() and one[1].fingerprint == other[1].fingerprint
    for name, scores in one[1].scores.items():
        assert scores.equal(other[1].scores[name]), name
    ours, theirs = one[2].state_dict(), other[2].state_dict()
    assert ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    kinds = [[type(module).__name__ for module in light.modules()] for _, _, light in (one, other)]
    assert kinds[0] == kinds[1], "and in memory once it is cut"


@pytest.mark.parametrize("wrap", [with_lora, with_bottleneck])
@telling("name", [name for name in LAYOUTS if name != "falcon"], {"bert", "llama-gqa", "gpt2", "t5"})
def test_estimation_and_the_cut_are_the_same(name: str, wrap: Callable[..., Any], tmp_path: Path) -> None:
    """With dropout, whose random numbers nothing draws in between."""
    usual, on_disk = both(tmp_path, name)
    assert_same(estimated(wrap(usual)), estimated(wrap(on_disk)))


@telling("name", ["llama-gqa", "llama-bias", "bert", "gpt2"], {"llama-gqa", "gpt2"})
def test_faster_steps(name: str, tmp_path: Path) -> None:
    usual, on_disk = both(tmp_path, name)
    assert_same(estimated(with_lora(usual), fast=True), estimated(with_lora(on_disk), fast=True))


@telling("reentrant", [True, False], {False})
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    """Activations are then kept at the borders of blocks alone, and a block's are computed again: with its dropout."""
    models = [with_lora(model, lora_dropout=0.3) for model in both(tmp_path, "llama-gqa")]
    for model in models:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(*(estimated(model, fast=True) for model in models))


def gradients(model: Any, autocast: bool) -> dict[str, Tensor]:
    set_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**inputs_for(model, labels=True)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@telling("name", ["bert", "llama-gqa", "gpt2"], {"llama-gqa"})
def test_data_types(name: str, dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    """The files are in float32: a weight is converted when it is read. (PEFT rounds LoRA's start as weights are.)"""
    usual, on_disk = (with_lora(model) for model in both(tmp_path, name, dtype=dtype))
    set_peft_model_state_dict(on_disk, get_peft_model_state_dict(usual))
    ours, theirs = (gradients(model, autocast) for model in (on_disk, usual))
    assert ours.keys() == theirs.keys() and all(gradient.equal(theirs[key]) for key, gradient in ours.items())


# -- what is in memory -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose blocks are 160 MiB."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained(folder)
    return folder


@telling("checkpointing", [True, False], [False])
def test_one_weight_at_a_time_is_in_memory(checkpointing: bool, large: Path) -> None:
    """Resident memory, pages of files among it, through estimation, scores and the cut."""

    def peak(on_disk: bool) -> int:
        with PeakMemory(nn.Linear(1, 1)) as memory:
            model = with_lora(loaded(large, LlamaForCausalLM, on_disk))
            if checkpointing:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": False})
            pruner = EarlyPruner(model.train(), light_of(length=2, blocks=0.9))
            pruner.start()
            while not pruner.finished:
                model(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.sum().backward()
                pruner.step()
            pruner.record()
            pruner.prune()
        return memory.bytes

    weights = sum(p.nbytes for p in LlamaForCausalLM.from_pretrained(large).model.layers.parameters())
    assert weights > 150 * 2**20
    assert peak(on_disk=True) < 0.5 * weights < 0.9 * weights < peak(on_disk=False)


def test_what_stays_on_disk(tmp_path: Path) -> None:
    """Linear layers of blocks, and nothing else; a head, which may train, is in memory."""
    _, model = both(tmp_path, "llama-tied")
    names = {name for name, layer in model.named_modules() if is_on_disk(layer)}
    assert len(names) == 21 and all(name.startswith("model.layers.") for name in names)
    shapes = {name: p.shape for name, p in make("llama-tied").named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_weights_cannot_be_written_to(tmp_path: Path) -> None:
    """What somebody wrote would be lost; PyTorch refuses it, and so merging into weights on disk."""
    usual, model = both(tmp_path, "llama-gqa")
    peft = with_lora(model)
    for safe in (False, True):
        text = refusal(lambda: peft.merge_and_unload(safe_merge=safe))  # noqa: B023
        assert "weights on disk cannot be changed, so PEFT cannot merge" in text
    layer = model.model.layers[0].mlp.down_proj
    with pytest.raises(RuntimeError, match="inference tensor"), torch.no_grad():
        base_layer(layer).weight.zero_()
    assert dense_weight(base_layer(layer)).equal(usual.model.layers[0].mlp.down_proj.weight)


def test_moves_and_copies(tmp_path: Path) -> None:
    """A layer is computed with where it goes, and in that data type; the weight stays where it is."""
    usual, on_disk = both(tmp_path, "llama-gqa")
    inputs = inputs_for(usual)
    twin = copy.deepcopy(on_disk).double()
    assert has_weights_on_disk(twin) and twin(**inputs).logits.equal(usual.double()(**inputs).logits)
    first, second = (model.model.layers[1].mlp.up_proj for model in (on_disk, twin))
    assert first.weight is second.weight and first.weight.dtype == torch.float32
    assert dense_weight(second).dtype == torch.float64 and dense_weight(first).dtype == torch.float32
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in usual.named_parameters()]


def test_files_that_change(tmp_path: Path) -> None:
    _, model = both(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    file.unlink()
    text = "has changed or gone, and a model reads its weights there; load it again"
    assert text in refusal(lambda: model(**inputs_for(model)))
    save_file(weights, file, metadata={"format": "pt"})
    assert text in refusal(lambda: model(**inputs_for(model)))


# -- what it is used from --------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[("bert", "classification"), pytest.param(("llama", "causal-lm"), marks=thorough)],
    ids=["bert", "llama"],
)
def bench(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    family, task = request.param
    return Workbench(tmp_path_factory.mktemp(family), family, task)


def test_runs(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model.low_memory` changes nothing but memory and time, in all stages, the widening at the end among them."""
    reports, weights = [], []
    for low_memory in (False, True):
        config = bench.config(
            f"low-{low_memory}",
            **{"model.low_memory": low_memory, "light.after.keep": "both", "light.after.full_width_steps": 0.2},
        )
        reports.append(run(config))
        weights.append([load_file(file) for file in sorted((Path(config.output)).rglob("adapter_model.safetensors"))])
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert reports[0]["parameters"] == reports[1]["parameters"]
    found, streams = find_light(config.output), list[Any]()

    def stream(*of: Any, original: Any = light_adapter.stream_of) -> Any:
        streams.append(original(*of))
        return streams[-1]

    monkeypatch.setattr(light_adapter, "stream_of", stream)
    assert found.model.low_memory and isinstance(found.load(), LightModel) and streams, "as whoever asks it loads it"
    assert len(weights[0]) == len(weights[1]) >= 3
    for one, other in zip(*weights, strict=True):
        assert one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


# -- refusals --------------------------------------------------------------------------------------------------------


def refused(folder: Path, architecture: Any = BertModel, **options: Any) -> str:
    return refusal(lambda: loaded(folder, architecture, on_disk=True, **options))


def test_quantized_bases(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    saved(tmp_path, "bert")
    text = "low_memory cannot read a quantized base; load it without low_memory"
    assert text in refused(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    for name, value in (("quantization", "nf4"), ("gguf_file", "model.gguf")):
        text = refusal(lambda: ModelConfig(name="base", low_memory=True, **{name: value}))  # noqa: B023
        assert f"model.low_memory cannot be combined with model.{name}; " in text


def test_what_needs_weights_in_memory(bench: Workbench) -> None:
    text = refusal(lambda: run(bench.config("full", method="full", **{"model.low_memory": True})))
    assert "method full trains every weight, which model.low_memory leaves on disk" in text
    text = refusal(lambda: benching.bench(bench.config("bench", **{"model.low_memory": True})))
    assert "bench supports models in memory only; set model.low_memory to false" in text


def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = both(tmp_path, "llama-gqa")
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    args = TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)
    text = refusal(lambda: LightTrainer(with_lora(model), args, light=light_of(), train_dataset=[]))
    assert "weights_on_disk works in one process only; load the model without it" in text
    monkeypatch.setattr(loading, "processes", lambda: SimpleNamespace(num_processes=2))
    config = ModelConfig(name=str(tmp_path), low_memory=True)
    text = refusal(lambda: loading.load_model(config, CAUSAL_LM))
    assert "model.low_memory works in a single process only" in text


def test_nothing_stays_behind(tmp_path: Path) -> None:
    """Loading is as it was, also behind a refusal."""
    own = vars(PreTrainedModel)["_load_pretrained_model"]
    architecture = saved(tmp_path, "bert")
    with pytest.raises(OSError), weights_on_disk():
        architecture.from_pretrained(tmp_path / "nowhere")
    assert vars(PreTrainedModel)["_load_pretrained_model"] is own
    assert not has_weights_on_disk(loaded(tmp_path, architecture, on_disk=False))
