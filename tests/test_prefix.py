"""The frozen prefix: no graph below the lowest module, and the same gradients when its outputs are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import telling
from peft import PeftModel
from torch import Tensor, nn
from training import blocks_of, collate, encoded, upper
from workbench import Workbench, comparable, read

from lightpeft.app.runs import pipeline
from lightpeft.models.unwrap import transformers_model
from lightpeft.training.prefix import (
    STATES,
    FrozenPrefix,
    PrefixCache,
    StateStore,
    cache_prefix,
)

TEXT = sorted(set(tiny.ENCODERS) - {"vit", "dinov2"} | set(tiny.DECODERS))


def inputs(model: PeftModel, side: str = "right") -> dict[str, Tensor]:
    """A padded batch with labels; none for the first token, which a padded one would have to predict."""
    batch = tiny.inputs_for(model, side, labels=True)
    if batch["labels"].dim() == 2:
        first = batch["attention_mask"].cumsum(1) == 1
        batch["labels"] = batch["labels"].masked_fill(first, -100)
    return batch


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and the gradients of one backward pass."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=1e-4, atol=1e-6), name


def stored(prefix: FrozenPrefix, batch: dict[str, Tensor]) -> Tensor:
    """The states of a batch, by way of a store that knows nothing of its padding."""
    mask = batch["attention_mask"]
    rows = [
        {name: value[row : row + 1][:, mask[row].bool()] for name, value in batch.items() if name != "labels"}
        for row in range(len(mask))
    ]
    states = [prefix.compute(row)[0] for row in rows]
    store = StateStore([len(s) for s in states], states[0].shape[-1], states[0].dtype, None)
    for row, values in enumerate(states):
        store.write(row, values)
    return store.padded(range(len(mask)), mask)


@tiny.every_family(TEXT)
def test_skipping_the_prefix_changes_nothing(name: str) -> None:
    side = "left" if name in tiny.DECODERS and name != "gpt2" else "right"  # GPT-2 counts padding as positions
    batch = inputs(upper(name), side)
    plain = gradients(upper(name), batch)
    model = upper(name)
    prefix = FrozenPrefix(model)
    assert len(prefix.blocks) == 2
    with prefix.attached():
        assert_same(gradients(model, batch), plain)
        states = stored(prefix, batch)
        ran: list[int] = []
        for child in blocks_of(model)[0].children():
            child.register_forward_hook(lambda *_: ran.append(1))
        assert_same(gradients(model, {**batch, STATES: states}), plain)
        assert not ran
    with FrozenPrefix(model).attached():  # one that has seen no block run
        assert_same(gradients(model, {**batch, STATES: states}), plain)
    assert_same(gradients(model, batch), plain)
    assert ran and all("forward" not in vars(block) for block in blocks_of(model))


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
@pytest.mark.parametrize("with_states", [True, False])
def test_nothing_below_builds_a_graph(name: str, reentrant: bool | None, with_states: bool) -> None:
    batch = inputs(upper(name))
    plain = gradients(upper(name), batch)
    model = upper(name)
    if reentrant is not None:
        model.enable_input_require_grads()  # as users of gradient checkpointing do: a graph from the embeddings on
        transformers_model(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    prefix = FrozenPrefix(model)
    outputs: list[Tensor] = []
    for block in blocks_of(model)[:2]:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with prefix.attached():
        if with_states:
            batch = {**batch, STATES: stored(prefix, batch)}
        outputs.clear()
        assert_same(gradients(model, batch), plain)
    assert len(outputs) == 2
    assert all(output.grad_fn is None for output in outputs)


def test_the_prefix_keeps_its_dropout_until_its_states_are_given() -> None:
    model = upper()
    for module in blocks_of(model)[0].modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    batch = inputs(model)
    prefix = FrozenPrefix(model)
    with prefix.attached(), torch.no_grad():
        states = prefix.compute(batch)
        assert model.training
        assert not torch.equal(model(**batch).loss, model(**batch).loss)
        assert torch.equal(prefix.compute(batch), states)
        given = {**batch, STATES: states}
        assert torch.equal(model(**given).loss, model(**given).loss)


def test_what_is_frozen() -> None:
    assert len(FrozenPrefix(upper(lowest=0)).blocks) == 0
    assert len(FrozenPrefix(upper(lowest=3)).blocks) == 3  # only the head trains
    embeddings = upper()
    transformers_model(embeddings).get_input_embeddings().requires_grad_(True)
    assert not FrozenPrefix(embeddings)
    sequence = tiny.with_lora(tiny.make("t5"))
    sequence.requires_grad_(False)
    assert not FrozenPrefix(sequence)  # its blocks hand on position biases


# The store


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_store_gives_back_what_it_took(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    file = data.draw(st.sampled_from([None, tmp_path_factory.mktemp("store") / "states.bin"]))
    store = StateStore(lengths, 3, dtype, file)
    rows = [torch.randn(length, 3).to(dtype) for length in lengths]
    for row in data.draw(st.permutations(range(len(lengths)))):
        store.write(row, rows[row])
    order = data.draw(st.permutations(range(len(lengths))))
    left = data.draw(st.booleans())
    places, sizes = torch.arange(max(lengths)), torch.tensor([lengths[row] for row in order]).unsqueeze(1)
    mask = places >= max(lengths) - sizes if left else places < sizes
    batch = store.padded(order, mask)
    assert batch.dtype == dtype
    for place, row in enumerate(order):
        assert torch.equal(batch[place][mask[place]], rows[row])
        assert not batch[place][~mask[place]].any()
    if file is not None:
        assert file.stat().st_size == sum(lengths) * 3 * dtype.itemsize
    store.close()


# Filling it


class Caching:
    """Calls `cache_prefix` and counts what it computes."""

    def __init__(self, folder: Path, model: PeftModel | None = None, **changes: Any) -> None:
        self.said: list[str] = []
        self.computed = 0
        self.model = model or upper()
        prefix = FrozenPrefix(self.model)
        compute = prefix.compute

        def counted(batch: Any) -> Tensor:
            self.computed += len(batch["input_ids"])
            return compute(batch)

        prefix.compute = counted  # type: ignore[method-assign]
        rows, collator = changes.pop("rows", encoded()), changes.pop("collate", collate)
        with prefix.attached():
            options = {"batch_size": 4, "announce": self.said.append}
            self.known = cache_prefix(prefix, rows, collator, PrefixCache(**changes), folder, **options)

    @property
    def store(self) -> StateStore:
        assert self.known is not None
        return self.known.store


@pytest.mark.parametrize("place", ["file", "memory"])
def test_batches_bring_the_states_of_their_rows(tmp_path: Path, place: str) -> None:
    model = upper()
    batch = collate(encoded().select([7, 0, 5]).to_list())
    with FrozenPrefix(model).attached() as prefix:
        prefix.known = Caching(tmp_path, place=place).known
        gradients(model, batch)  # shows what a block returns
        ran: list[int] = []
        blocks_of(model)[0].attention.register_forward_hook(lambda *_: ran.append(1))
        assert_same(gradients(model, batch), gradients(upper(), batch))
        assert not ran
        gradients(model, {**batch, "input_ids": batch["input_ids"].flip(1)})  # other rows
        assert ran
    assert (tmp_path / "states.bin").exists() == (place == "file")


def test_states_that_do_not_fit_are_not_made(tmp_path: Path) -> None:
    caching = Caching(tmp_path / "new", limit=1000)
    assert caching.known is None
    assert caching.computed == 3
    assert "no prefix cache" in caching.said[0]
    assert not (tmp_path / "new").exists()


def test_states_that_depend_on_padding_are_not_stored(tmp_path: Path) -> None:
    def left(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        turned = {name: value.flip(1) for name, value in batch.items() if name != "labels"}
        return {**turned, "labels": batch["labels"]}

    for name, refused in (("gpt2", True), ("llama-gqa", False)):
        caching = Caching(tmp_path / name, model=upper(name), collate=left)
        assert (caching.known is None) == refused
        assert ("depends on the padding" in caching.said[0]) == refused


# In a run

UPPER: dict[str, Any] = {"light.modules.blocks": 0.5, "light.modules.remove": 0.0, "training.save_steps": 3}
"""The modules of the upper block stay."""


def notes(folder: Path) -> list[str]:
    """What a run said on its way, but for what it says to all whose models write."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    told = [entry["note"] for entry in entries if "note" in entry]
    return [note for note in told if "a model that generates text" not in note]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("prefix"))


@telling(("family", "task"), [("bert", "classification"), ("llama", "causal-lm")], [("llama", "causal-lm")])
def test_a_run_is_the_same_from_file_and_memory(tmp_path: Path, family: str, task: str) -> None:
    bench = Workbench(tmp_path, family, task)
    for place in ("file", "memory", "off"):
        pipeline.run(bench.config(place, **UPPER, **{"training.prefix_cache": place}))
    file, memory, off = (tmp_path / place for place in ("file", "memory", "off"))
    assert comparable(file) == comparable(memory)
    assert comparable(file)["plan"] == comparable(off)["plan"]
    said = [note for note in notes(file) + notes(memory) if "linear probe" not in note]
    assert ["computed once for 64 rows; their outputs take " in note for note in said] == [True, True]
    assert notes(off) == []
    assert not (file / "checkpoints").exists()
    if family == "llama":  # without dropout, so that nothing but float noise can differ
        loss = [read(folder / "metrics.json")["metrics"]["loss"] for folder in (file, off)]
        assert loss[0] == pytest.approx(loss[1], rel=1e-3)
