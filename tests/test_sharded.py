"""Two processes that share a model's weights (FSDP2) must end where one does that has them all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_processes import REFUSED, trainings
from sharded_trainings import FSDP, LONG, MODELS, found, training
from tiny import make
from transformers import TrainingArguments
from workbench import in_children

from lightpeft import LightTrainer, load_light
from lightpeft.errors import LightPeftError

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs the gloo backend")

SIDES = ["before", "behind"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what both processes found."""
    folder = tmp_path_factory.mktemp("fsdp2")
    ends = in_children(2, lambda rank: trainings(folder))
    assert [code for code, _ in ends] == [0, 0], ends
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process finds."""
    trainers = {name: training(name, tmp_path_factory.mktemp("alone")) for name in MODELS}
    for trainer in trainers.values():
        trainer.train()
    return {name: found(trainer) for name, trainer in trainers.items()}


def of_rank(results: Path, rank: int, name: str) -> dict[str, Any]:
    return torch.load(results / f"rank{rank}" / f"{name}.pt")


def assert_close(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert found["plan"]["blocks"] == alone["plan"]["blocks"]
    assert found["plan"]["sites"] == alone["plan"]["sites"]
    losses = found["losses"]
    torch.testing.assert_close(losses, alone["losses"][-len(losses) :], rtol=1e-4, atol=1e-5)
    assert found["weights"].keys() == alone["weights"].keys()
    for name, weight in found["weights"].items():
        torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-2, atol=2e-4, msg=name)


# -- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_end_where_one_does(results: Path, alone: dict[str, dict[str, Any]], name: str) -> None:
    assert len(alone[name]["losses"]) == (50 if name in LONG else 12)
    for rank in (0, 1):
        assert_close(of_rank(results, rank, name), alone[name])


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_one_process(results: Path, alone: dict[str, dict[str, Any]], name: str) -> None:
    scores, expected = of_rank(results, 0, name)["scores"], alone[name]["scores"]
    assert scores.keys() == expected.keys()
    for key, value in expected.items():
        largest = max(value.abs().tolist(), default=0.0)  # of a mixture of experts no neuron of an FFN has a score
        torch.testing.assert_close(scores[key], value, rtol=1e-3, atol=1e-4 * largest, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_both_processes_agree_to_the_last_bit(results: Path, name: str) -> None:
    first, second = (of_rank(results, rank, name) for rank in (0, 1))
    assert first["plan"] == second["plan"]
    assert first["losses"] == second["losses"]
    assert all(weight.equal(second["weights"][key]) for key, weight in first["weights"].items())


@pytest.mark.parametrize("name", MODELS)
def test_each_process_holds_a_part_of_the_cut_base(results: Path, name: str) -> None:
    for rank in (0, 1):
        of_process = of_rank(results, rank, name)
        assert of_process["held"] <= 0.55 * of_process["numbers"]
        assert of_process["held"] >= 0.45 * of_process["numbers"]


def test_the_light_adapter_is_written_once_and_opens_anywhere(results: Path) -> None:
    name = "bert-lora"
    base = MODELS[name]().unload()
    light = load_light(results / name / "adapter", base, is_trainable=True)
    trained = of_rank(results, 0, name)["weights"]
    parameters = dict(light.named_parameters())
    assert light.light_plan.to_dict() == of_rank(results, 0, name)["plan"]
    assert all(parameters[key].equal(weight) for key, weight in trained.items())


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_two_processes_go_on_from_a_checkpoint(results: Path, alone: dict[str, dict[str, Any]], side: str) -> None:
    assert_close(of_rank(results, 0, side), alone["bert-lora"])


def test_a_training_in_half_precision_goes_on_as_if_nothing_had_been(results: Path) -> None:
    again, undisturbed = (of_rank(results, 0, name) for name in ("half-resumed", "half"))
    assert again["losses"] == undisturbed["losses"][-len(again["losses"]) :]
    assert all(weight.equal(undisturbed["weights"][name]) for name, weight in again["weights"].items())


@pytest.mark.parametrize("side", SIDES)
def test_one_process_goes_on_where_two_were(
    results: Path, alone: dict[str, dict[str, Any]], side: str, tmp_path: Path
) -> None:
    (checkpoint,) = (results / side).glob("checkpoint-*")
    trainer = training("bert-lora", tmp_path)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_close(found(trainer), alone["bert-lora"])


def test_a_number_of_processes_that_does_not_fit_is_refused(results: Path, tmp_path: Path) -> None:
    trainer = training("bert-lora", tmp_path, per_device_train_batch_size=4)
    with pytest.raises(LightPeftError, match="global batch of 8 rows in 2 process.*has 4 in 1; start 2"):
        trainer.train(resume_from_checkpoint=str(results / "before" / "checkpoint-3"))


# -- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", REFUSED)
def test_what_cannot_be_shared_is_refused_in_one_line(results: Path, setting: str) -> None:
    line = json.loads((results / "rank0" / "refused.json").read_text())[setting]
    assert setting in line and "\n" not in line


def test_cpus_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes would train by DDP without a word: accelerate shards over accelerators alone."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # which arguments change for the rest of the process
    with pytest.raises(LightPeftError, match="accelerate shards models over GPUs only"):
        training("bert-lora", tmp_path, **FSDP)


@pytest.mark.parametrize("launched", [False, True])
def test_deepspeed_is_refused_in_one_line(launched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer whose arguments were made elsewhere: those with `deepspeed` need it installed."""
    args = TrainingArguments(str(tmp_path), report_to=[])
    if launched:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    else:
        args.deepspeed = "zero3.json"
    with pytest.raises(LightPeftError, match="deepspeed: its engine does not work with a model that is cut"):
        LightTrainer(make("bert"), args)
