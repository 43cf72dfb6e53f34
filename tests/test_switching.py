"""Many light adapters over one base: each task's model is what `load_light` gives, and whole weights are there once."""

from __future__ import annotations

import copy
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import assert_same, edit_weights, logits, save_light, tensors
from lanes import telling
from peft import PeftConfig, PeftModel, get_peft_model
from peft_models import VARIANTS, adapted, lora, shifted
from tiny import DROPPED, LAYOUTS, USUAL, make, plan_for, refusal
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft import LightModel, LightSwitch, load_light, save_merged
from lightpeft.app.folders import switching
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.live_sites import check_peft
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan

SEEDS = {"first": 3, "second": 4, "third": 5, "fourth": 6}


def over_one_base(home: Path, name: str = "bert", count: int = 3, **budget: Any) -> dict[str, Path]:
    """The base `name` in home/base, and light adapters over it, by name, each with a cut of its own."""
    model = make(name)
    model.save_pretrained(home / "base")
    for task, seed in list(SEEDS.items())[:count]:
        save_light(type(model).from_pretrained(home / "base"), home / task, seed=seed, **budget)
    return {task: home / task for task in list(SEEDS)[:count]}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three light adapters over one base, for tests that change no file."""
    return over_one_base(tmp_path_factory.mktemp("places"))


def shared_names(first: nn.Module, second: nn.Module) -> set[str]:
    """Names of tensors that are the same memory in both, as the base calls them."""
    ours, theirs = of_base(first), of_base(second)
    return {name for name in ours.keys() & theirs.keys() if 0 != ours[name].data_ptr() == theirs[name].data_ptr()}


def of_base(model: nn.Module) -> dict[str, Tensor]:
    """All tensors by the names that those of the base have without PEFT around them."""
    return {name.replace(".base_layer", ""): tensor for name, tensor in tensors(model).items()}


# The same models


@telling("name", LAYOUTS, {"bert", "llama-gqa", "t5"})
def test_each_model_is_what_load_light_gives(name: str, tmp_path: Path) -> None:
    places = over_one_base(tmp_path, name, count=2) | {"dropped": tmp_path / "dropped"}
    save_light(type(make(name)).from_pretrained(tmp_path / "base"), tmp_path / "dropped", **DROPPED)
    switch = LightSwitch(places)
    models = {task: switch[task] for task in places}
    for task, folder in places.items():
        assert_same(models[task], load_light(folder))
    common = shared_names(models["first"], models["second"])
    assert any("norm" in key.lower() or "ln_" in key or "embed" in key for key in common)
    other = of_base(models["second"])
    cut = {key for key, tensor in of_base(models["first"]).items() if key in other and tensor.shape != other[key].shape}
    assert cut and not common & cut and not any("lora_" in key for key in common)


def with_own_head(base: PreTrainedModel) -> PeftConfig:
    return lora(base, modules_to_save=["classifier", "embeddings.word_embeddings"])


KINDS: dict[str, tuple[str, Callable[[PreTrainedModel], PeftModel]]] = {
    kind: (name, lambda base, kind=kind: get_peft_model(base, VARIANTS[kind](base)))  # type: ignore[misc]
    for name, kinds in {"gpt2": ("dora-rslora", "tokens"), "bert": ("ia3", "dora", "patterns")}.items()
    for kind in kinds
} | {
    "own-head": ("bert", lambda base: get_peft_model(base, with_own_head(base))),
    "bottleneck": ("bert", lambda base: adapted(base, placement="houlsby")),
}


@telling("kind", KINDS, {"lora-only", "tokens", "own-head", "bottleneck"})
def test_kinds_of_peft(kind: str, tmp_path: Path) -> None:
    """What one adapter brings, such as embeddings, is not to be seen in another's model."""
    name, adapt = KINDS[kind]
    base = make(name)
    base.save_pretrained(tmp_path / "base")
    places = {}
    for task, seed in list(SEEDS.items())[:2]:
        model = adapt(type(base).from_pretrained(tmp_path / "base"))
        check_peft(model)  # as a pruner that is made before training
        model = shifted(model, seed).eval()
        plan = plan_for(model, seed, **USUAL)
        apply_plan(model, plan)
        places[task] = tmp_path / task
        as_light(model, plan).save_pretrained(places[task])
    switch = LightSwitch(places)
    models = [switch[task] for task in (*places, "first")]
    assert models[0] is models[2]
    for task in places:
        assert_same(switch[task], load_light(places[task]))
    assert shared_names(*models[:2])


@telling("dtype", [None, "bfloat16", torch.bfloat16], [None, torch.bfloat16])
def test_one_tensor_for_all_tasks_in_any_type(dtype: Any, tmp_path: Path) -> None:
    """In the type of the files it is the mapped file; in another one, one copy. A tied head is the embeddings."""
    places = over_one_base(tmp_path, "llama-tied", count=3)
    switch = LightSwitch(places, dtype=dtype)
    models = [switch[task] for task in places]
    options = {} if dtype is None else {"dtype": dtype}
    for task, model in zip(places, models, strict=True):
        assert_same(model, load_light(places[task], **options))
        inner: Any = transformers_model(model)
        assert inner.lm_head.weight is inner.model.embed_tokens.weight
        assert (
            inner.model.embed_tokens.weight.data_ptr()
            == tensors(models[0])["base_model.model.model.embed_tokens.weight"].data_ptr()
        )
    common = shared_names(models[0], models[1]) & shared_names(models[1], models[2])
    assert sum("layernorm" in name for name in common) == 6 and any(
        name.endswith("model.norm.weight") for name in common
    )


def test_heads_of_several_sorts_share_the_base(tmp_path: Path) -> None:
    """The base has no head; two and three labels, and tokens, are three tasks. The head is in each adapter."""
    make("bert").base_model.save_pretrained(tmp_path / "base")
    kinds = {"two": ("Sequence", 2), "three": ("Sequence", 3), "tokens": ("Token", 5)}
    places = {}
    for task, (kind, labels) in kinds.items():
        architecture = getattr(transformers, f"BertFor{kind}Classification")
        base = architecture.from_pretrained(tmp_path / "base", num_labels=labels)
        model = get_peft_model(base, lora(base, task_type="SEQ_CLS" if kind == "Sequence" else "TOKEN_CLS"))
        model = shifted(model).eval()
        plan = plan_for(model)
        apply_plan(model, plan)
        places[task] = tmp_path / task
        as_light(model, plan).save_pretrained(places[task])
    switch = LightSwitch(places)
    models = {task: switch[task] for task in places}
    for task, (_, labels) in kinds.items():
        assert logits(models[task]).shape[-1] == labels
        assert logits(models[task]).equal(logits(load_light(places[task])))
    for other in ("three", "tokens"):
        common = shared_names(models["two"], models[other])
        assert any("word_embeddings" in name for name in common) and not any("classifier" in name for name in common)


# Which models are kept


def test_the_one_asked_for_the_longest_time_ago_goes(places: dict[str, Path]) -> None:
    switch = LightSwitch(places, cache_size=2)
    assert switch.names == tuple(switch) == ("first", "second", "third") and len(switch) == 3 and switch.cached == ()
    first = weakref.ref(switch["first"])
    switch["second"]
    assert switch["first"] is first() and switch.cached == ("second", "first")
    switch["third"]
    assert switch.cached == ("first", "third")
    switch["second"]
    assert switch.cached == ("third", "second") and first() is None, "nobody holds it, so it goes at once"


def test_a_model_lives_as_long_as_somebody_holds_it(places: dict[str, Path]) -> None:
    switch = LightSwitch(places, cache_size=1)
    first, expected = switch["first"], logits(load_light(places["first"]))
    switch["second"]
    assert switch.cached == ("second",) and logits(first).equal(expected)
    assert shared_names(first, switch["second"]), "what has gone still shares"
    switch.remove("first")
    assert "first" not in switch and switch.cached == ("second",) and logits(first).equal(expected)


def test_closing_frees_everything(places: dict[str, Path]) -> None:
    with LightSwitch(places, dtype="bfloat16") as switch:
        models = [switch[task] for task in switch.names]
        held = [weakref.ref(tensor) for tensor in switch._shared._tensors.values()]
        assert len(held) > 10
        del models[1:]
        gc.collect()
        assert all(tensor() is not None for tensor in held)
    assert len(switch) == 0 and switch.cached == ()
    models.clear()
    assert not any(tensor() is not None for tensor in held), "the last model took them along"
    assert "the switch has no task first" in refusal(lambda: switch["first"])


def test_tasks_come_and_go(places: dict[str, Path]) -> None:
    switch = LightSwitch({"first": places["first"]})
    switch["first"]
    switch.add("second", places["second"])
    assert logits(switch["second"]).equal(logits(load_light(places["second"])))
    switch.remove("first")
    switch.add("first", places["third"])
    assert switch.names == ("second", "first") and logits(switch["first"]).equal(logits(load_light(places["third"])))


# Threads


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work` gives for each number, in as many threads that begin at the same time."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Any:
        barrier.wait(60)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return [each.result(120) for each in [pool.submit(begin, number) for number in range(count)]]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of folders in the order in which their models were made."""
    made: list[str] = []

    def load(folder: Path, *args: Any, original: Any = switching.load_with_shared_tensors, **kwargs: Any) -> LightModel:
        made.append(folder.name)
        time.sleep(0.01)
        return original(folder, *args, **kwargs)

    monkeypatch.setattr(switching, "load_with_shared_tensors", load)
    return made


def test_nothing_is_made_twice(loads: list[str], places: dict[str, Path]) -> None:
    switch = LightSwitch(places)
    models = together(9, lambda number: switch[list(places)[number % 3]])
    assert sorted(loads) == sorted(places) and len({id(model) for model in models}) == 3


@telling("name", ["llama-tied", "deberta-v2"], {"llama-tied"})
def test_threads_that_switch_at_random_get_the_right_answers(name: str, tmp_path: Path, loads: list[str]) -> None:
    """In half precision, where loading a model must not change what is computed meanwhile."""
    places = over_one_base(tmp_path, name, count=4)
    alone = {task: load_light(folder, dtype="bfloat16") for task, folder in places.items()}
    expected = {task: logits(model) for task, model in alone.items()}
    switch = LightSwitch(places, cache_size=2, dtype="bfloat16")

    def work(number: int) -> int:
        order = random.Random(number)
        for _ in range(12):
            task = order.choice(list(places))
            model = switch[task]
            for _ in range(order.randrange(1, 4)):
                assert logits(model).equal(expected[task]), task
        return len(switch.cached)

    assert max(together(4, work)) <= 2
    assert len(loads) > 4, "models went and came back"


def test_loading_changes_nothing_that_others_compute_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a moment: PyTorch's default data type is that of all threads."""
    places = over_one_base(tmp_path, "llama-classifier", count=1)
    expected = logits(load_light(places["first"], dtype="bfloat16"))
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: pytest.fail(f"set to {dtype}"))
    assert logits(LightSwitch(places, dtype="bfloat16")["first"]).equal(expected)


def test_a_load_that_fails_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = over_one_base(tmp_path)
    switch = LightSwitch(places, cache_size=2)
    first, second = switch["first"], switch["second"]
    weights = places["third"] / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "adapter_model.safetensors" in refusal(lambda: switch["third"])
    assert switch.cached == ("first", "second") and switch["first"] is first and switch["second"] is second
    weights.write_bytes(whole)
    assert logits(switch["third"]).equal(logits(load_light(places["third"])))


# What is refused


def test_models_of_a_switch_do_not_change(tmp_path: Path) -> None:
    places = over_one_base(tmp_path, "llama-gqa", count=2, heads=0.0)
    switch = LightSwitch(places)
    first, expected = switch["first"], logits(switch["second"])
    assert not first.training and not any(parameter.requires_grad for parameter in first.parameters())
    changes: Sequence[tuple[str, Callable[[], Any]]] = (
        ("trained", first.train),
        ("merged", first.merge_and_unload),
        ("merged", first.merge_adapter),
    )
    for what, change in changes:
        assert f"shares its weights with other tasks and cannot be {what}; use load_light" in refusal(change)
    assert first.eval() is first
    own = copy.deepcopy(first)
    assert type(own).__mro__[1] is LightModel and not shared_names(own, first)
    own.train().merge_and_unload()
    save_merged(first, tmp_path / "merged")
    assert logits(switch["second"]).equal(expected) and logits(first).equal(logits(load_light(places["first"])))


def test_another_base_is_refused(tmp_path: Path) -> None:
    places = over_one_base(tmp_path / "one", count=1)
    other = make("bert", seed=1)
    other.save_pretrained(tmp_path / "other/base")
    save_light(type(other).from_pretrained(tmp_path / "other/base"), tmp_path / "other/light")
    both = {"a": places["first"], "b": tmp_path / "other/light"}
    text = refusal(lambda: LightSwitch(both))
    assert "other/light has the base" in text and "if they are the same, give its name or folder: base=" in text
    assert "has another base than" in refusal(lambda: LightSwitch(both, base=tmp_path / "one/base"))
    wrong = LightSwitch({"b": both["b"]}, base=tmp_path / "one/base")
    assert "belongs to another base: its fingerprint" in refusal(lambda: wrong["b"])
    switch = LightSwitch({"a": both["a"]})
    expected = logits(switch["a"])
    assert "has the base" in refusal(lambda: switch.add("b", both["b"]))
    assert switch.names == ("a",) and logits(switch["a"]).equal(expected)


def test_a_base_that_changes_is_refused(tmp_path: Path) -> None:
    places = over_one_base(tmp_path, count=2)
    switch = LightSwitch(places)
    first, expected = switch["first"], logits(switch["first"])

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights["bert.embeddings.word_embeddings.weight"] *= 2
        return weights

    time.sleep(0.01)
    (tmp_path / "base/model.safetensors").rename(tmp_path / "kept.safetensors")
    (tmp_path / "base/model.safetensors").write_bytes((tmp_path / "kept.safetensors").read_bytes())
    edit_weights(tmp_path / "base", change)
    assert "belongs to another base" in refusal(lambda: switch["second"]), (
        "what was shared is not taken for what is there"
    )
    assert logits(first).equal(expected)


def test_settings_that_make_no_sense(places: dict[str, Path]) -> None:
    assert "cache_size is 0; set it to at least 1 model" in refusal(lambda: LightSwitch(places, cache_size=0))
    switch = LightSwitch(places)
    assert "has no task frist; did you mean first?" in refusal(lambda: switch["frist"])
    assert "has no task frist" in refusal(lambda: switch.remove("frist"))
    assert "already has a task first" in refusal(lambda: switch.add("first", places["second"]))
