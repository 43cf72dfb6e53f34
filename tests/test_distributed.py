"""Two processes with half the rows each must see what one process with all of them sees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lights import light_of
from safetensors.torch import load_file
from torch import Tensor
from training import (
    assert_close,
    assert_equal,
    collate,
    encoded,
    estimate,
    one_light_training,
    student,
    trained_classifier,
    trained_weights,
    trainer,
    upper,
)
from two_processes import main
from workbench import in_children

from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.recipe.pruner import EarlyPruner
from lightpeft.training.prefix import FrozenPrefix

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs the gloo backend")

LOOPS = ["ddp", "ddp-bucket-view", "ddp-static-graph"]
LOOPS += ["accumulation-no-sync", "accumulation-bucket-view", "accumulation-every-sync"]
TRAINERS = ["trainer", "trainer-accumulation", "trainer-resumed"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what both processes wrote."""
    folder = tmp_path_factory.mktemp("distributed")

    def process(rank: int) -> None:
        main(folder)
        os._exit(0)

    ends = in_children(2, process)
    assert [code for code, _ in ends] == [0, 0], ends
    return folder


def of_rank(results: Path, rank: int, name: str) -> tuple[EstimationRecord, Tensor]:
    folder = results / f"rank{rank}" / name
    return EstimationRecord.load(folder), load_file(folder / "masks.safetensors")["masks"]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_ones_own(results: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightpeft.prune.learning.FEWEST_TELLING", 1)
    whole = estimate(student(), steps=3)
    record, masks = of_rank(results, 0, name)
    assert_close(record, whole.record())
    torch.testing.assert_close(masks, whole.masks.values, rtol=0, atol=1e-4)
    for count in ("ratio_tokens", "scored_examples"):
        assert record.meta[count] == whole.record().meta[count]
    assert record.meta["learned"] == pytest.approx(whole.record().meta["learned"], abs=1e-4)
    assert record.meta["processes"] == 2


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer(results: Path, tmp_path: Path, name: str) -> None:
    pruner = EarlyPruner(student("llama-gqa"), light_of(length=4))
    trainer(pruner.model, tmp_path, pruner.callback(), per_device_train_batch_size=8).train()
    record, masks = of_rank(results, 0, name)
    assert_close(record, pruner.record())
    torch.testing.assert_close(masks, pruner.estimator.masks.values, rtol=0, atol=1e-4)
    assert record.meta["ratio_tokens"] == pruner.record().meta["ratio_tokens"]


@pytest.mark.parametrize("name", LOOPS + TRAINERS)
def test_both_processes_agree_to_the_last_bit(results: Path, name: str) -> None:
    """Or they would make different plans."""
    records, masks = zip(*(of_rank(results, rank, name) for rank in (0, 1)), strict=True)
    assert masks[0].equal(masks[1])
    assert_equal(*records)
    assert records[0].meta == records[1].meta


@pytest.mark.parametrize("train", ["peft", "all"])
@pytest.mark.parametrize("how", ["once", "resumed"])
def test_one_training_through_the_cut(results: Path, tmp_path: Path, train: str, how: str) -> None:
    """Gradients are averaged over processes behind the cut, too, from a checkpoint as well as in one go."""
    whole = one_light_training(tmp_path, train=train)
    whole.train()
    places = [results / f"rank{rank}" / f"{train}-{how}" for rank in (0, 1)]
    found = [load_file(place / "weights.safetensors") for place in places]
    assert all(found[0][key].equal(found[1][key]) for key in found[0])
    assert all(PrunePlan.load(place / "plan.json").blocks == whole.light_plan.blocks for place in places)
    for key, value in trained_weights(whole.model).items():
        torch.testing.assert_close(found[0][key], value, rtol=1e-3, atol=1e-4)


def test_gradients_of_a_classifier_do_not_grow_with_processes(results: Path, tmp_path: Path) -> None:
    """Nor with accumulation: transformers takes its loss for one that divides by the labels of all of them."""
    whole = trained_weights(trained_classifier(tmp_path))
    for rank in (0, 1):
        found = load_file(results / f"rank{rank}" / "classifier.safetensors")
        for name, weight in whole.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", ["plain", "bucket-view"])
def test_the_observer_sees_gradients_before_they_are_reduced(results: Path, options: str) -> None:
    terms = [load_file(results / f"rank{rank}" / f"{options}.safetensors") for rank in (0, 1)]
    for of_process in terms:
        torch.testing.assert_close(of_process["seen"], of_process["local"])
        assert not torch.allclose(of_process["seen"], of_process["reduced"])
    torch.testing.assert_close((terms[0]["seen"] + terms[1]["seen"]) / 2, terms[0]["reduced"])


def test_processes_share_the_states_of_a_frozen_prefix(results: Path) -> None:
    ranks = [load_file(results / f"rank{rank}" / "prefix.safetensors") for rank in (0, 1)]
    model = upper()
    batch = collate(encoded(16).to_list())
    prefix = FrozenPrefix(model)
    with prefix.attached():
        states = prefix.compute(batch)[batch["attention_mask"].bool()]
    model(**batch).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for rank in ranks:
        torch.testing.assert_close(rank.pop("states"), states)
        assert int(rank.pop("computed")) == 3 + 8  # three rows to see what comes out, then half of all
        assert int(rank.pop("again")) == 0
        assert rank.keys() == gradients.keys()
        for name, gradient in rank.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6)
