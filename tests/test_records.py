"""What is written down is read back, and a damaged, newer or half-written file is one clear line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import DROPPED, MODELS, make, plan_for, random_record, with_lora

from lightpeft import records
from lightpeft.errors import LightPeftError
from lightpeft.files import SCHEMA_VERSION, read_json, replacing_folder, write_json
from lightpeft.records import EstimationRecord, PrunePlan, from_ranges, to_ranges


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def message(error: pytest.ExceptionInfo[LightPeftError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


@pytest.fixture(scope="module")
def record() -> EstimationRecord:
    record = random_record(with_lora(make("llama-gqa")))
    record.meta["history"] = [{"step": 10, "overlap": 0.96}]
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


@pytest.mark.parametrize("name", MODELS)
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
    assert [len(scores) for scores in record.of_blocks("heads", "taylor")] == [4, 4, 4]
    assert [len(scores) for scores in record.of_blocks("neurons", "random")] == [48, 48, 48]
    assert record.of_modules("ratio").shape == (len(record.sites),)
    assert [len(scores) for scores in record.of_ranks("magnitude")] == [4] * len(record.sites)
    with pytest.raises(LightPeftError) as error:
        record.of_modules("mask")
    assert 'no scores "modules/mask"' in message(error) and "modules/ratio" in message(error)


def test_record_with_a_file_missing_or_damaged(record: EstimationRecord, tmp_path: Path) -> None:
    with pytest.raises(LightPeftError, match=r"estimation\.json does not exist"):
        EstimationRecord.load(tmp_path)
    record.save(tmp_path)
    scores = tmp_path / "scores.safetensors"
    scores.write_bytes(scores.read_bytes()[:-5])
    with pytest.raises(LightPeftError, match=r"scores\.safetensors cannot be read") as error:
        EstimationRecord.load(tmp_path)
    message(error)
    scores.unlink()
    with pytest.raises(LightPeftError, match=r"scores\.safetensors cannot be read"):
        EstimationRecord.load(tmp_path)


@pytest.mark.parametrize("damage", [lambda d: d.pop("blocks"), lambda d: d["blocks"][0].pop("heads")])
def test_record_with_unexpected_content(record: EstimationRecord, tmp_path: Path, damage: Any) -> None:
    record.save(tmp_path)
    data = json.loads((tmp_path / "estimation.json").read_text())
    damage(data)
    (tmp_path / "estimation.json").write_text(json.dumps(data))
    with pytest.raises(LightPeftError, match=r"estimation\.json does not have the expected content"):
        EstimationRecord.load(tmp_path)


# JSON


def test_json_carries_the_schema_version(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"schema_version": SCHEMA_VERSION, "x": 1}
    assert read_json(tmp_path / "a.json")["x"] == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"schema_version": 99}', "schema version 99, this lightpeft reads up to 1; upgrade lightpeft"),
        (b'{"schema_version": "1"}', "schema version 1"),
        (b"{}", "schema version None"),
        (b'{"schema_version": 1', "cannot be read"),
        (b"[1]", "does not hold a JSON object"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_json_that_cannot_be_used(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    for read in (read_json, PrunePlan.load):
        with pytest.raises(LightPeftError) as error:
            read(path)
        assert says in message(error) and str(path) in message(error)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("specs"),
        lambda d: d["specs"][0].update(colour="red"),
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
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(LightPeftError) as error:
        PrunePlan.load(path)
    assert f"{path} does not have the expected content" in message(error)


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(LightPeftError, match=r"plan\.json does not exist"):
        PrunePlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("target", ["os.replace", "Path.open"])
def test_interrupted_writing_leaves_the_old_file(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"x": "old"})
    owner, name = (os, "replace") if target == "os.replace" else (Path, "open")
    with monkeypatch.context() as full, pytest.raises(LightPeftError) as error:
        full.setattr(owner, name, full_disk)
        write_json(path, {"x": "new"})
    assert message(error) == f"cannot write {path}: No space left on device; nothing was changed"
    assert read_json(path)["x"] == "old" and os.listdir(tmp_path) == ["plan.json"]


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []


# Folders


def test_writing_files_moves_all_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    (folder / "a.txt").write_text("old")
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    with replacing_folder(folder) as temporary:
        for name in ("a.txt", "b.txt", "c.txt"):
            (temporary / name).write_text("new")
        assert (folder / "a.txt").read_text() == "old"
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "mine.txt": "mine",
        "a.txt": "new",
        "b.txt": "new",
        "c.txt": "new",
    }
    assert [name for name in moved if not name.startswith(".")][-1] == "a.txt"
    assert os.listdir(tmp_path) == ["out"]


def test_writing_files_cleans_up_when_the_block_fails(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(KeyError), replacing_folder(folder) as temporary:
        (temporary / "a.txt").write_text("half")
        raise KeyError("x")
    assert os.listdir(tmp_path) == []
    with pytest.raises(LightPeftError, match="cannot write .*No space left"), replacing_folder(folder):
        full_disk()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fails_at", range(6))
def test_writing_files_when_moving_fails(fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    old = {"a.txt": "old a", "b.txt": "old b"}
    for name, text in old.items():
        (folder / name).write_text(text)
    calls = []

    def replace(source: Any, destination: Any) -> None:
        calls.append(source)
        if len(calls) == fails_at + 1:
            full_disk()
        os.rename(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    try:
        with replacing_folder(folder) as temporary:
            for name in ("a.txt", "b.txt", "c.txt"):
                (temporary / name).write_text("new")
    except LightPeftError as error:
        assert "nothing was changed" in str(error)
        assert {file.name: file.read_text() for file in folder.iterdir()} == old
    else:
        assert len(calls) == fails_at == 5, "two old files and three new ones are moved"
    assert os.listdir(tmp_path) == ["out"]


def test_writing_where_nothing_can_be_written(record: EstimationRecord, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LightPeftError) as error:
            record.save(folder)
        assert f"cannot write {folder}" in message(error)
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


def test_disk_full_while_saving_a_record(
    record: EstimationRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "estimation"
    record.save(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    record_of_zeros = EstimationRecord(
        record.blocks, record.sites, {key: torch.zeros_like(v) for key, v in record.scores.items()}, 1, "f"
    )
    monkeypatch.setattr(records, "save_file", full_disk)
    with pytest.raises(LightPeftError, match="No space left on device"):
        record_of_zeros.save(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["estimation"]
