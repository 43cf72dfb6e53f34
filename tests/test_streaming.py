"""Light adapters over a base that is read one tensor at a time: the same model, and never the dense one in memory."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import assert_same, edit_weights, logits, save_light, saved, tensors
from lanes import needs_family
from tiny import DROPPED, LAYOUTS, MODELS, every_family, make, refusal
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BitsAndBytesConfig, PreTrainedModel, conversion_mapping, set_seed
from transformers.core_model_loading import Chunk, WeightConverter

from lightpeft import load_light
from lightpeft.adapters.streaming import Stream
from lightpeft.models.tensors import Reading
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.layout import kept_channels
from lightpeft.prune.surgery import apply_plan

SHARDS: dict[str, Any] = {"max_shard_size": "20KB"}


@pytest.fixture(autouse=True)
def nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    yield
    assert not torch_module._global_parameter_registration_hooks, "no hook stays, whether it loaded or not"
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


# The same model


@every_family(MODELS)
def test_bit_equal(name: str, tmp_path: Path) -> None:
    dropped = name in LAYOUTS
    saved(tmp_path, name, DROPPED if dropped else {}, **(SHARDS if dropped else {}))
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3 or not dropped
    assert_same(load_light(tmp_path / "light", low_memory=True), load_light(tmp_path / "light"))


def save_without_head(name: str, home: Path) -> None:
    """A base without a head in home/base, and in home/light an adapter over it that was trained with one."""
    model = make(name)
    model.base_model.save_pretrained(home / "base")
    save_light(type(model).from_pretrained(home / "base", num_labels=3), home / "light")


@needs_family("vit")
@pytest.mark.parametrize("low_memory", [True, False])
def test_a_head_that_nobody_brings_is_refused(low_memory: bool, tmp_path: Path) -> None:
    """PEFT has no task of images, so that the head is in the adapter only if its user says so."""
    save_without_head("vit", tmp_path)
    text = refusal(lambda: load_light(tmp_path / "light", low_memory=low_memory))
    assert "has no weights for classifier.bias, classifier.weight" in text and "would be random" in text


@pytest.mark.parametrize("name", ["bert", "llama-classifier"])
def test_a_base_without_its_head(name: str, tmp_path: Path) -> None:
    """The keys have no prefix, and the head's weights are in the adapter."""
    save_without_head(name, tmp_path)
    loaded = []
    for low_memory in (True, False):
        set_seed(5)
        loaded.append(load_light(tmp_path / "light", low_memory=low_memory))
    assert logits(loaded[0]).shape[-1] == 3
    assert_same(*loaded)


def test_weights_that_transformers_splits_while_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "llama-mha")
    parts = [f"self_attn.{slot}_proj.weight" for slot in "qkv"]

    def fuse(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer in range(3):
            names = [f"model.layers.{layer}.{part}" for part in parts]
            weights[f"model.layers.{layer}.self_attn.qkv.weight"] = torch.cat([weights.pop(name) for name in names])
        return weights

    edit_weights(tmp_path / "base", fuse)
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the table
    split = WeightConverter("self_attn.qkv.weight", parts, operations=[Chunk(dim=0)])
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [split])
    assert_same(load_light(tmp_path / "light", low_memory=True), load_light(tmp_path / "light"))


# What is in memory


class Memory(TorchDispatchMode):
    """The most bytes at one time of all tensors in host memory that come into being inside."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._places: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._places[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._places = {key: place for key, place in self._places.items() if not place[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._places.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_model_is_never_in_memory(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: Any, *of: Any, original: Any = Reading.read) -> Tensor:
        assert threading.current_thread() is threading.main_thread(), "nothing is read ahead, and all of it is counted"
        return original(self, *of)

    monkeypatch.setattr(Reading, "read", read)
    model = make("llama-gqa", hidden_size=64, intermediate_size=512)
    model.save_pretrained(tmp_path / "base", max_shard_size="1KB")  # a tensor a file: mapped files count as a whole
    save_light(type(model).from_pretrained(tmp_path / "base"), tmp_path / "light", heads=0.5, neurons=0.5)
    files = max(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    dense = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    largest = max(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    seen = {}
    for low_memory in (True, False):
        with Memory() as memory:
            loaded = load_light(tmp_path / "light", dtype=dtype, low_memory=low_memory)
        seen[low_memory] = memory.most
    pruned = sum(tensor.nbytes for tensor in tensors(loaded).values())
    samples = sum(2 * 1024 * len(spec.projections) for spec in loaded.light_plan.specs)
    extra = 0.05 * dense  # headers of files, channel numbers
    assert seen[True] < pruned + files + largest + samples + extra < dense <= seen[False]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "olmo2"])
def test_no_cut_projection_is_ever_set_in_the_model(name: str, tmp_path: Path) -> None:
    plan = saved(tmp_path, name, DROPPED).light_plan
    stream = Stream(plan, lambda model: None)
    loader = stream.loader(type(make(name)))
    model = loader.from_pretrained(tmp_path / "base")
    for spec, kept in zip(plan.specs, plan.blocks, strict=True):
        for slot, projection in spec.projections.items():
            layer = model.get_submodule(projection)
            gone = slot in spec.wide_norms and not kept.heads
            cut = gone or kept_channels(spec, kept, slot) is not None
            assert {parameter.is_meta for parameter in layer.parameters()} == {cut}, projection
            assert all(parameter._is_hf_initialized for parameter in layer.parameters()), "else it is drawn at random"
    assert type(model) is type(make(name))
    apply_plan(model, plan)
    stream.fill(model)
    assert not any(tensor.is_meta for tensor in tensors(model).values())
    model.to("meta")
    assert "low_memory found no weights for" in refusal(lambda: stream.fill(model))


# Refusals


def refused(light: Path, base: Any = None) -> str:
    return refusal(lambda: load_light(light, base, low_memory=True))


def test_another_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "bert")
    make("bert", seed=1).save_pretrained(tmp_path / "other")
    assert "belongs to another base" in refused(tmp_path / "light", tmp_path / "other")

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights["bert.encoder.layer.2.output.dense.weight"].mul_(1.01)
        return weights

    edit_weights(tmp_path / "base", change)
    assert "belongs to another base" in refused(tmp_path / "light")

    def unread(self: Any, *of: Any) -> Tensor:
        raise AssertionError("weights are read although the structure is another one")

    monkeypatch.setattr(Reading, "read", unread)
    make("bert", num_hidden_layers=2).save_pretrained(tmp_path / "shallow")
    assert "belongs to another base" in refused(tmp_path / "light", tmp_path / "shallow")


@pytest.mark.parametrize("lost", ["weight", "bias"])
def test_a_projection_without_weights(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "bert")
    never = "_move_missing_keys_from_meta_to_device"  # makes room for the dense weights that are missing
    monkeypatch.setattr(PreTrainedModel, never, lambda *args: pytest.fail(never))
    name = "bert.encoder.layer.1.intermediate.dense"
    edit_weights(tmp_path / "base", lambda weights: {k: v for k, v in weights.items() if k != f"{name}.{lost}"})
    text = refused(tmp_path / "light")
    assert f"cannot read the weights of {name}" in text and "without low_memory" in text


def test_quantized_bases_and_gguf_files_are_refused(tmp_path: Path) -> None:
    light = saved(tmp_path, "bert")
    config: Any = transformers_model(light).config
    config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    light.save_pretrained(tmp_path / "light")
    assert "is quantized, which low_memory cannot read; load without low_memory" in refused(tmp_path / "light")
    del config.quantization_config
    transformers_model(light).light_gguf_file = "model.gguf"
    light.save_pretrained(tmp_path / "light")
    assert "is a GGUF file, which low_memory cannot read; load without low_memory" in refused(tmp_path / "light")


@pytest.mark.parametrize("damage", ["cut", "missing", "index"])
def test_a_damaged_base(damage: str, tmp_path: Path) -> None:
    saved(tmp_path, "bert", **SHARDS)
    index = tmp_path / "base" / "model.safetensors.index.json"
    shard = tmp_path / "base" / sorted(set(json.loads(index.read_text())["weight_map"].values()))[2]
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        (shard if damage == "missing" else index).unlink()
    assert f"base {tmp_path / 'base'} cannot be loaded" in refused(tmp_path / "light")
