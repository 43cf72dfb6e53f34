"""Plain LoRA beside light: what is measured, that the numbers fit each other, and what happens when a worker fails."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lanes import thorough
from tiny import without_dropout
from workbench import Workbench, forked, lightpeft, read, stamps

from lightpeft.app.cli.tables import bench_table, speed_rows
from lightpeft.app.folders.results import open_peft
from lightpeft.app.runs import bench as benching
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.subject import Subject, sample_batches, sample_rows
from lightpeft.app.runs.workers import Worker
from lightpeft.errors import LightPeftError
from lightpeft.profiling.flops import count_flops

ROUNDS, STEPS = 2, 2
UPPER = {"light.modules.blocks": 0.5, "light.modules.remove": 0.5}
"""Modules stay in the upper block, so that there is a frozen prefix."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def report(bench: Workbench) -> dict[str, Any]:
    """bench.json of a run that had not begun; through processes of their own, forked to begin in a moment."""
    with forked():
        code = lightpeft("bench", "--config", bench.yaml("run", **UPPER), "--rounds", ROUNDS, "--steps", STEPS)
    assert code == 0
    return read(bench.folder / "run" / "bench.json")


def test_report_is_complete(report: dict[str, Any]) -> None:
    assert report["rounds"] == ROUNDS
    assert report["steps"] == STEPS
    assert set(report["subjects"]) == {"plain", "estimation", "light"}
    for name, subject in report["subjects"].items():
        assert subject["peak_memory_bytes"] > 0
        assert subject["peak_memory_method"]
        assert min(subject["flops"].values()) > 0
        if name != "light":  # which skips its frozen blocks in training
            assert subject["flops"]["training"] > subject["flops"]["forward"]
        spreads = [subject["training_samples_per_second"]]
        spreads += [subject["inference_samples_per_second"]] if name != "estimation" else []
        for spread in spreads:
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
            assert spread["n"] == ROUNDS
    assert report["hardware"]["torch"]
    assert report["config"]["training"]["batch_size"] == 8


def test_ratios_are_medians_over_paired_rounds(report: dict[str, Any]) -> None:
    for what, of, over, name in [
        ("training", "light", "plain", "training_throughput"),
        ("inference", "light", "plain", "inference_throughput"),
        ("training", "estimation", "plain", "estimation_throughput"),
    ]:
        values = report["values"][what]
        assert len(values[of]) == len(values[over]) == ROUNDS
        paired = np.array(values[of]) / np.array(values[over])
        ratio = report["ratios"][name]
        assert ratio["median"] == pytest.approx(np.median(paired))
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
        assert ratio["n"] == ROUNDS
    subjects = report["subjects"]
    for key, name in (("training", "training_flops"), ("forward", "inference_flops")):
        quotient = subjects["light"]["flops"][key] / subjects["plain"]["flops"][key]
        assert report["ratios"][name] == pytest.approx(quotient)
    memory = [subjects[name]["peak_memory_bytes"] for name in ("light", "plain")]
    assert report["ratios"]["peak_memory"] == pytest.approx(memory[0] / memory[1])


def test_memory_of_inference_is_that_of_merged_weights_and_a_batch(bench: Workbench, report: dict[str, Any]) -> None:
    """Weights by the sizes of the model's tensors: PEFT is in them, and what was cut is not there."""
    assert "inference" not in report["subjects"]["estimation"]
    served = {name: report["subjects"][name]["inference"] for name in ("plain", "light")}
    work = pipeline.prepare(bench.config("run", **UPPER))
    dense = work.dense_model().model
    assert served["plain"]["weights_bytes"] == bytes_of(dense)
    small = open_peft(work.run.pruned, work.dense_model().model).merge_and_unload()
    assert served["light"]["weights_bytes"] == bytes_of(small) < bytes_of(dense)
    for found in served.values():
        assert found["peak_memory_bytes"] >= found["weights_bytes"]
        assert found["peak_memory_method"]
    ratio = served["light"]["peak_memory_bytes"] / served["plain"]["peak_memory_bytes"]
    assert report["ratios"]["inference_memory"] == pytest.approx(ratio)
    told = {row["name"]: row for row in speed_rows(report)}
    assert told["weights at inference"]["ratio"] == pytest.approx(bytes_of(small) / bytes_of(dense))
    assert told["inference memory"]["ratio"] == pytest.approx(ratio)


def bytes_of(model: torch.nn.Module) -> int:
    """Of parameters (tied ones have one name here) and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_whole_run_counts_estimation_surgery_and_cache(bench: Workbench, report: dict[str, Any]) -> None:
    whole = report["end_to_end"]
    assert (whole["steps"], whole["estimation_steps"]) == (24, 6)
    per_step = {
        name: 8 / subject["training_samples_per_second"]["median"] for name, subject in report["subjects"].items()
    }
    assert whole["plain_seconds"] == pytest.approx(24 * per_step["plain"])
    assert whole["light_estimation_seconds"] == pytest.approx(6 * per_step["estimation"])
    speed = report["subjects"]["light"]["prefix_samples_per_second"]
    assert report["subjects"]["plain"]["prefix_samples_per_second"] is None
    assert whole["light_caching_seconds"] == pytest.approx(64 / speed)
    before = whole["light_estimation_seconds"] + whole["light_caching_seconds"]
    surgery = whole["light_seconds"] - before - 18 * per_step["light"]
    run = pipeline.prepare(bench.config("run", **UPPER)).run
    assert surgery == pytest.approx(run.stage_seconds()["prune"], abs=1e-6)
    assert whole["light_over_plain"] == pytest.approx(whole["light_seconds"] / whole["plain_seconds"])


def test_bench_leaves_the_run_as_it_is(bench: Workbench, report: dict[str, Any]) -> None:
    """Only what bench needs has been run, and fine-tuning goes on from there."""
    folder = bench.folder / "run"
    assert (folder / "pruned").is_dir()
    assert not (folder / "adapter").exists()
    before = stamps(folder)
    assert lightpeft("prune", "--config", bench.yaml("run", **UPPER)) == 0
    assert stamps(folder) == before


def test_table_shows_the_measurements(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=140).print(bench_table(report))
    text = " ".join(capsys.readouterr().out.split())
    light = report["subjects"]["light"]
    assert f"{light['training_samples_per_second']['median']:,.1f}" in text
    assert f"{report['ratios']['inference_throughput']['median']:.2f}" in text
    assert f"{report['ratios']['training_flops']:.2f}" in text
    assert "6 steps of estimation" in text
    assert "MiB" in text
    spread = [f"{report['ratios']['inference_throughput'][end]:.2f}" for end in ("low", "high")]
    assert " - ".join(spread) in text
    Console(width=140).print(bench_table({**report, "rounds": 1}))
    assert " - " not in capsys.readouterr().out, "one round has no quartiles"


def test_batches_are_the_same_for_all_and_spread_over_the_epoch(bench: Workbench) -> None:
    work = pipeline.prepare(bench.config("sampled", **{"data.max_length": 34}))
    work.positions = 38  # no room to pad batches to a multiple of 8
    batches = sample_batches(work, 4)
    again = sample_batches(work, 4)
    assert len(batches) == 4
    assert all(a["input_ids"].equal(b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert all(len(batch["labels"]) == 8 for batch in batches)
    assert len({batch["input_ids"].shape[1] for batch in batches}) > 1
    whole = sample_batches(work, 100)
    assert len(whole) == 8  # no more than there are
    assert sum(len(batch["input_ids"]) for batch in whole) == len(work.train_rows)
    seen = [row["input_ids"] for rows in sample_rows(work, 100) for row in rows]
    assert sorted(seen) == sorted(work.train_rows["input_ids"]), "each row once"


# -- failures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def forking() -> Iterator[None]:
    """Workers are forked, so that they fail in a moment and can be made to fail."""
    with forked():
        yield


@pytest.mark.usefixtures("forking")
def test_failing_worker_gives_one_line(
    bench: Workbench, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory\nleft")

    monkeypatch.setattr(Subject, "_train", fail)
    capsys.readouterr()
    assert lightpeft("bench", "--config", bench.yaml("run", **UPPER), "--rounds", 1, "--steps", 1) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightpeft: measuring failed: RuntimeError: no memory left")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize("moment", ["__init__", "training"])
def test_worker_that_vanishes_gives_one_line(
    bench: Workbench, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(Subject, moment, lambda *_: os._exit(9))
    with Worker(Subject, "plain", bench.config("run", **UPPER), 1) as worker:
        if moment == "training":
            assert worker.measure("fixed")["flops"]["training"] > 0
        for _ in range(2):
            with pytest.raises(LightPeftError, match="ended early"):
                worker.measure("training")


@pytest.mark.usefixtures("forking")
def test_workers_leave_interrupts_to_the_command(bench: Workbench, report: dict[str, Any]) -> None:
    """Ctrl-C reaches all processes of a terminal; one of them tells of it."""
    with Worker(Subject, "plain", bench.config("run", **UPPER), 1) as worker:
        assert worker._process.pid is not None
        os.kill(worker._process.pid, signal.SIGINT)
        assert worker.measure("training") > 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize("over", [0, 1])
def test_measurements_that_are_stopped(
    bench: Workbench,
    report: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    over: int,
) -> None:
    """How long it takes is said first, each measurement is shown, and rounds that are over are kept."""
    before, place = stamps(bench.folder), tmp_path / "result.json"
    real = benching.in_rounds

    def stopping(*arguments: Any) -> Iterator[Any]:
        yield from itertools.islice(real(*arguments), over)
        raise KeyboardInterrupt

    monkeypatch.setattr(benching, "in_rounds", stopping)
    capsys.readouterr()
    options = ("--rounds", 3, "--steps", 1, "--json", place)
    assert lightpeft("bench", "--run", bench.folder / "run", *options) == 130
    written = capsys.readouterr()
    *shown, last = written.err.splitlines()
    kept = f"{place} has 1 of 3 rounds" if over else "no round was over"
    assert last == f"lightpeft: stopped; {kept}; the same command starts from the first round"
    what = [f"{name}, memory and FLOPs" for name in benching.SUBJECTS]
    what += ["plain, inference memory", "light, inference memory"]
    starts = [f"[{number}/20] {name}: " for number, name in enumerate(what, 1)]
    assert all(line.startswith(start) for line, start in zip(shown, starts, strict=False))
    assert re.fullmatch(r"3 rounds of 1 batches take about \d+ s; Ctrl-C stops and keeps the finished rounds", shown[5])
    assert len(shown) == 6 + 5 * over
    assert stamps(bench.folder) == before
    assert place.exists() == bool(over)
    if over:
        found = read(place)
        assert (found["rounds"], found["of_rounds"]) == (1, 3)
        assert found["subjects"]["light"]["inference_samples_per_second"]["n"] == 1
        assert found.keys() == report.keys()
        assert "medians of 1 of 3 rounds" in written.out
    else:
        assert written.out == ""


@thorough
def test_processes_that_measure_say_nothing(bench: Workbench, report: dict[str, Any]) -> None:
    """Nor of what libraries lack when they are imported anew: outside these tests no process is forked."""
    place = bench.folder / "quiet.json"
    command = [sys.executable, "-m", "lightpeft", "bench", "--run", str(bench.folder / "run"), "--json", str(place)]
    done = subprocess.run([*command, "--rounds", "2", "--steps", "1"], capture_output=True, text=True, check=True)
    assert read(place)["rounds"] == 2
    said = done.stderr.splitlines()
    assert [line for line in said if not line.startswith(("[", "2 rounds of 1 batches"))] == []


def test_light_trains_on_the_states_of_its_prefix(bench: Workbench, report: dict[str, Any]) -> None:
    subject = Subject("light", bench.config("run", **UPPER), 2)
    without_dropout(subject.model)  # the stored states have none
    whole, loss = count_flops(subject.model, subject.batches[0]), float(subject.model(**subject.batches[1]).loss)
    with subject._training_as_a_run():
        skipping = count_flops(subject.model, subject.batches[0])
        assert float(subject.model(**subject.batches[1]).loss) == pytest.approx(loss, rel=1e-4)
    assert skipping.training < whole.training
