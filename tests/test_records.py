"""What is written down is read back, and a damaged, newer or half-written file is one clear line."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import DROPPED, MODELS, every_family, make, plan_for, random_record, with_lora
from workbench import edit

from lightpeft.errors import LightPeftError
from lightpeft.files import file_checksum
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.ranges import from_ranges, to_ranges


def message(error: pytest.ExceptionInfo[LightPeftError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


@pytest.fixture(scope="module")
def record() -> EstimationRecord:
    record = random_record(with_lora(make("llama-gqa")))
    record.meta["versions"] = {"torch": "2.0"}
    return record


# Ranges


@given(st.sets(st.integers(0, 300)))
def test_ranges_round_trip(indices: set[int]) -> None:
    ascending = tuple(sorted(indices))
    assert from_ranges(to_ranges(ascending), 301) == ascending


@pytest.mark.parametrize(
    ("indices", "text"), [((), ""), ((0,), "0"), ((0, 1, 2, 5), "0-2,5"), ((3, 4, 10, 12, 13), "3-4,10,12-13")]
)
def test_ranges_are_compact(indices: tuple[int, ...], text: str) -> None:
    assert to_ranges(indices) == text and from_ranges(text, 14) == indices


# Plans


@every_family(MODELS)
def test_plan_round_trip(name: str, tmp_path: Path) -> None:
    plan = plan_for(with_lora(make(name)), **DROPPED)
    plan.save(tmp_path / "new" / "plan.json")
    assert PrunePlan.load(tmp_path / "new" / "plan.json") == plan
    text = json.dumps(plan.to_dict())
    assert PrunePlan.from_dict(json.loads(text)) == plan
    assert os.listdir(tmp_path / "new") == ["plan.json"]


def test_plan_as_a_table() -> None:
    plan = plan_for(with_lora(make("bert")), **DROPPED)
    header, *rows, summary = str(plan).splitlines()
    assert header.split("  ")[0] == "layer" and len(rows) == 3
    assert rows[0].split()[:4] == ["0", "0/4", "0/4", f"{len(plan.blocks[0].neurons)}/48"]
    assert f"{plan.removed_parameters:,} of {plan.base_parameters:,}" in summary
    assert f"keeps {len(plan.sites)} of 18 PEFT modules" in summary


# Estimation records


def test_record_round_trip(record: EstimationRecord, tmp_path: Path) -> None:
    record.save(tmp_path / "estimation")
    assert sorted(os.listdir(tmp_path / "estimation")) == ["estimation.json", "scores.safetensors"]
    assert os.listdir(tmp_path) == ["estimation"], "no temporary folder is left"
    loaded = EstimationRecord.load(tmp_path / "estimation")
    assert (loaded.blocks, loaded.sites, loaded.meta) == (record.blocks, record.sites, record.meta)
    assert (loaded.base_parameters, loaded.fingerprint) == (record.base_parameters, record.fingerprint)
    assert loaded.scores.keys() == record.scores.keys()
    assert all(value.equal(record.scores[key]) for key, value in loaded.scores.items())


def test_record_answers_by_kind_and_criterion(record: EstimationRecord) -> None:
    assert [len(scores) for scores in record.block_scores("heads", "taylor")] == [4, 4, 4]
    assert [len(scores) for scores in record.block_scores("neurons", "random")] == [48, 48, 48]
    assert record.module_scores("ratio").shape == (len(record.sites),)
    assert [len(scores) for scores in record.rank_scores("magnitude")] == [4] * len(record.sites)
    with pytest.raises(LightPeftError) as error:
        record.module_scores("mask")
    assert 'no scores "modules/mask"' in message(error) and "modules/ratio" in message(error)


def test_record_with_a_file_missing_or_damaged(record: EstimationRecord, tmp_path: Path) -> None:
    with pytest.raises(LightPeftError, match=r"estimation\.json does not exist"):
        EstimationRecord.load(tmp_path)
    record.save(tmp_path)
    scores = tmp_path / "scores.safetensors"
    scores.write_bytes(scores.read_bytes()[:-5])
    with pytest.raises(LightPeftError, match=r"scores\.safetensors was altered or damaged") as error:
        EstimationRecord.load(tmp_path)
    message(error)
    edit(tmp_path / "estimation.json", lambda data: data.update(scores=file_checksum(scores)))
    with pytest.raises(LightPeftError, match=r"scores\.safetensors cannot be read"):
        EstimationRecord.load(tmp_path)
    scores.unlink()
    with pytest.raises(LightPeftError, match=r"scores\.safetensors is missing"):
        EstimationRecord.load(tmp_path)


@pytest.mark.parametrize("damage", [lambda d: d.pop("blocks"), lambda d: d["blocks"][0].pop("heads")])
def test_record_with_unexpected_content(record: EstimationRecord, tmp_path: Path, damage: Any) -> None:
    record.save(tmp_path)
    path = tmp_path / "estimation.json"
    path.write_text(path.read_text().replace("fingerprint", "Fingerprint"))
    with pytest.raises(LightPeftError, match=r"estimation\.json was altered or damaged"):
        EstimationRecord.load(tmp_path)
    record.save(tmp_path)
    edit(path, damage)
    with pytest.raises(LightPeftError, match=r"estimation\.json does not have the expected content"):
        EstimationRecord.load(tmp_path)


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("specs"),
        lambda d: d["specs"][0].update(color="red"),
        lambda d: d["blocks"][0].update(heads="0-x"),
        lambda d: d["blocks"][0].update(heads=[0, 1]),
        lambda d: d["blocks"].pop(),
        lambda d: d["blocks"][0].update(heads="0-9"),
        lambda d: d["blocks"][0].update(kv_heads="0-3"),
        lambda d: d["blocks"][0].update(neurons="1,0"),
        lambda d: d["blocks"][0].update(neurons="48"),
        lambda d: d["sites"].update(other="0"),
        lambda d: d["sites"].update({next(iter(d["sites"])): "4"}),
        lambda d: d.update(blocks=None),
        lambda d: d.update(sites=[1]),
    ],
)
def test_edited_plans(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_for(with_lora(make("bert"))).save(path)
    edit(path, damage)
    with pytest.raises(LightPeftError) as error:
        PrunePlan.load(path)
    assert f"{path} does not have the expected content" in message(error)


BOMB = "0-99999999999"


@pytest.mark.parametrize("place", ["heads", "neurons", "ranks", "specs"])
def test_ranges_that_would_not_fit_into_memory(place: str, tmp_path: Path) -> None:
    """Nothing is made of them, also where the plan says that the model is as large."""
    path = tmp_path / "plan.json"
    plan_for(with_lora(make("bert"))).save(path)

    def change(data: dict[str, Any]) -> None:
        if place == "ranks":
            data["sites"] = dict.fromkeys(data["sites"], BOMB)
            return
        data["blocks"][0]["neurons" if place == "specs" else place] = BOMB
        if place == "specs":
            data["specs"][0]["neurons"] = 10**11

    edit(path, change)
    tracemalloc.start()
    with pytest.raises(LightPeftError) as error:
        PrunePlan.load(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert ("below" in message(error)) != (place == "specs")
    assert ("heads and neurons" in message(error)) == (place == "specs")
