"""Grids: what their files span, cells that are killed, fail or share an estimation, and tables of fixed numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lanes import thorough
from lights import nested
from rich.console import Console
from workbench import (
    GRIDS,
    NOTICE,
    Workbench,
    at_step,
    checksums,
    in_child,
    in_this_process,
    lightpeft,
    read,
    signalling,
    stamps,
)

from lightpeft.app import cli
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs.reproduce import (
    ARMS,
    Results,
    Row,
    join_results,
    load_grid,
    markdown_table,
    read_results,
    reproduce,
    rich_table,
    running,
    selected,
    summarize,
    write_results,
)
from lightpeft.app.runs.reproduce.results import MEASURES, SeedSpread, p_value
from lightpeft.config import PRESETS, RunConfig, run_config_from_dict
from lightpeft.errors import LightPeftError
from lightpeft.files import read_json, write_json
from lightpeft.plans.prune_plan import PrunePlan


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("reproduce"))


def grid_file(path: Path, bench: Workbench | None = None, **changes: Any) -> Path:
    """A grid over runs of eight steps on the bench; `changes` are of its top-level keys."""
    steps = {"training.epochs": 1, "training.save_steps": 2}
    common: dict[str, Any] = {} if bench is None else bench.settings(**steps)
    shared = {name: value for name, value in common.items() if name not in ("output", "model", "data", "light")}
    grid = {
        "run": {**shared, "light": nested(blocks=0.6, length=0.25, multiple_of=1)},
        "models": {"tiny": {"model": common.get("model", {"name": "m"})}},
        "tasks": {"words": {"data": common.get("data", {"train": "t.csv"})}},
        "methods": ["lora", "light-lora"],
        "seeds": [0],
        **changes,
    }
    path.write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")
    return path


# -- what a file spans -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_grid_of_the_repository_is_one(path: Path) -> None:
    """Its settings, methods and tasks are known ones, and so are parts that its head names; those of the paper say what
    they need."""
    grid = load_grid(path)
    cells = grid.cells(Path("out"))
    for part in re.findall(r"^# +--only (.+)$", path.read_text(), re.MULTILINE):
        assert selected(cells, shlex.split(part)), part
    assert len(cells) == len(grid.models) * len(grid.tasks) * len(grid.arms) * len(grid.seeds) > 0
    assert len({cell.config.output for cell in cells}) == len(cells)
    assert len({cell.name for cell in cells}) == len(cells)
    if path.parent.name == "paper":
        head = " ".join(line.strip("# \n") for line in path.read_text().partition("baseline")[0].splitlines())
        assert "Needs a CUDA GPU" in head and "and the hub" in head and "Not run by this project" in head
        assert {cell.config.light.preset for cell in cells} == {"paper"}


NOT_WITH_AUTO = {
    "random": "light.remove.blocks is auto, which is measured after estimation; give a number here",
    "mask": "light.remove.blocks is auto, which is measured after estimation; give a number here",
}
"""Methods that want a number under `light: auto`, and what says so."""


@pytest.mark.parametrize("name", NOT_WITH_AUTO)
def test_methods_that_want_a_number(tmp_path: Path, name: str) -> None:
    file = grid_file(tmp_path / "grid.yaml", methods=[name], run={"light": "auto"})
    with pytest.raises(LightPeftError, match=re.escape(NOT_WITH_AUTO[name])):
        load_grid(file).cells(tmp_path)


@pytest.mark.parametrize(
    ("name", "preset"),
    [(name, preset) for name in ARMS for preset in PRESETS],
)
def test_known_methods_do_what_they_say_under_every_preset(tmp_path: Path, name: str, preset: str) -> None:
    own = {"preset": preset} if preset == "paper" else {"preset": preset, "remove": {"blocks": 0.6}}
    file = grid_file(tmp_path / "grid.yaml", methods=[name], run={"light": own}, seeds=[3])
    (cell,) = load_grid(file).cells(tmp_path)
    config = cell.config
    whole = run_config_from_dict({"light": own, "peft": config.peft}).light
    light = config.light
    assert config.seed == 3
    assert config.method == {"full": "full", "lora": "plain", "adapter": "plain"}.get(name, "light")
    assert config.peft == ("bottleneck" if name.endswith("adapter") else "lora")
    foundation = light.cuts_blocks
    assert foundation == (name not in ("peft-only", "modules-only", "ranks-only"))
    fewer, fewer_of_preset = (each.modules.remove > 0 or each.modules.blocks < 1 for each in (light, whole))
    assert fewer == (fewer_of_preset and name not in ("foundation-only", "ranks-only"))
    assert (light.modules.remove_ranks > 0) == (
        whole.modules.remove_ranks > 0 and name not in ("foundation-only", "modules-only")
    )
    if name in ("mask", "taylor", "fisher", "magnitude", "random"):
        assert light.estimate.criterion == name
    if name in ("random", "mask") and whole.remove.blocks is not None:  # their scores cannot compete
        assert (light.remove.blocks, light.remove.heads, light.remove.neurons) == (None, 0.6, 0.6)
    elif foundation and name != "full":
        assert (light.remove.blocks, light.remove.heads) == (whole.remove.blocks, whole.remove.heads)
    if name.startswith("length"):
        assert str(light.estimate.length) == name.partition("-")[2]


def test_settings_come_from_run_model_task_and_method_in_that_order(tmp_path: Path) -> None:
    rates = {name: {"training": {"learning_rate": rate}} for name, rate in (("a", 1e-3), ("b", 2e-3))}
    file = grid_file(
        tmp_path / "grid.yaml",
        run={"training": {"learning_rate": 5e-4, "epochs": 7}, "light": 0.3},
        models={"hub/model": None, "own": {"model": {"name": "folder"}, **rates["a"]}},
        tasks={"classification": None, "slow": {"data": {"train": "x.csv"}, **rates["b"]}},
        methods={
            "lora": None,
            "light-lora": {"training": {"learning_rate": 3e-3}},
            "mine": {"light": nested(heads=0.5)},
        },
        baseline="mine",
    )
    grid = load_grid(file)
    found = {(cell.model, cell.task, cell.method): cell.config for cell in grid.cells(tmp_path)}
    assert grid.baseline == "mine"
    assert {key: config.training.learning_rate for key, config in found.items() if key[2] == "lora"} == {
        ("hub/model", "classification", "lora"): 5e-4,
        ("own", "classification", "lora"): 1e-3,
        ("hub/model", "slow", "lora"): 2e-3,
        ("own", "slow", "lora"): 2e-3,
    }
    mine = found["hub/model", "classification", "mine"]
    assert (mine.method, mine.light.remove.blocks, mine.light.remove.heads, mine.training.epochs) == (
        "light",
        None,
        0.5,
        7,
    )
    assert mine.model.name == "hub/model"
    assert mine.output == str(tmp_path / "cells" / "hub_model" / "classification" / "mine" / "0")
    assert found["own", "slow", "light-lora"].training.learning_rate == 3e-3
    assert found["own", "slow", "light-lora"].light.remove.blocks == 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ["lora"]}, "unknown key method; did you mean methods?"),
        ({"methods": ["light-lorra"]}, "unknown method light-lorra; did you mean light-lora?"),
        ({"methods": {"mine": {"from": "nothing"}}}, "methods.mine.from is 'nothing', not a known method"),
        ({"methods": [1]}, "unknown method 1; known methods: full, lora"),
        (
            {"methods": {"mine": {"from": "random", "light": {"remove": {"blocks": "auto"}}}}},
            "cell tiny/words/mine/0: light.remove.blocks is auto",
        ),
        ({"methods": []}, "methods is empty or missing"),
        ({"methods": ["lora", "lora"]}, "methods has a name twice"),
        ({"methods": {"a b": {"light": {}}, "a_b": {"light": {}}}}, "folder would be a_b; rename one"),
        ({"tasks": {"words": 3}}, "tasks.words must be a mapping of settings, not 3"),
        ({"models": {"tiny": {"output": "x"}}}, "models.tiny sets output, which the grid sets for each cell"),
        ({"run": {"seed": 1}}, "run sets seed"),
        ({"run": {"lite": {}}}, "cell tiny/words/lora/0: unknown key lite; did you mean light?"),
        ({"tasks": ["rtee"]}, 'cell tiny/rtee/lora/0: data.task "rtee" is neither a kind'),
        ({"seeds": [0, 0]}, "seeds has 0 twice"),
        ({"methods": {"mine": {"from": ["lora"]}}}, "methods.mine.from is ['lora'], not a known method"),
        ({"methods": {"mine": {"from": {"lora": 1}}}}, "not a known method; give one of full, lora"),
        ({"baseline": ["lora"]}, "baseline ['lora'] is not a method of the grid; give one of lora, light-lora"),
        ({"baseline": {"lora": 1}}, "is not a method of the grid; give one of lora, light-lora"),
        ({"run": [1]}, "run must be a mapping of settings, not [1]"),
        ({"run": {"tasks": 5}}, "tasks is 5; it must be a mapping"),
        ({"seeds": [2**64]}, "seed is 18446744073709551616"),
        ({"seeds": 3}, "seeds must be a list of whole numbers, not 3"),
        ({"seeds": [True]}, "seeds must be a list of whole numbers"),
        ({"seeds": [-1]}, "seed is -1"),
        ({"baseline": "full"}, "baseline 'full' is not a method of the grid; give one of lora, light-lora"),
    ],
)
def test_faults_of_a_grid_are_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = grid_file(tmp_path / "grid.yaml", **changes)
    assert lightpeft("reproduce", file, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_part_of_the_cells(tmp_path: Path) -> None:
    cells = load_grid(grid_file(tmp_path / "grid.yaml", seeds=[0, 1, 2])).cells(tmp_path)
    names = [cell.name for cell in selected(cells, ["method=lora", "seed=2", "seed=0"])]
    assert names == ["tiny/words/lora/0", "tiny/words/lora/2"]
    for only, message in (
        ("method=lor", "unknown method lor; did you mean lora?"),
        ("lora", "give one of model, task"),
        ("seed=7", "unknown seed 7; known seeds: 0, 1, 2"),
    ):
        with pytest.raises(LightPeftError, match=message.replace("?", r"\?")):
            selected(cells, [only])


# -- how a cell is run -----------------------------------------------------------------------------------------------


def test_accelerate_reads_the_command_so() -> None:
    launch = pytest.importorskip("accelerate.commands.launch")
    given = launch.launch_command_parser().parse_args(running.command(["lightpeft", "run", "--run", "out/cell"], 2)[3:])
    assert (given.num_processes, given.num_machines, given.main_process_port, given.module) == (2, 1, 0, True)
    assert [given.training_script, *given.training_script_args] == ["lightpeft", "run", "--run", "out/cell"]


@thorough
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs the gloo backend")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes on the CPU need a machine without more")
def test_a_cell_over_two_processes_does_what_one_does(tmp_path: Path) -> None:
    """Estimation, plan, losses and metrics, without dropout, which is drawn in each process."""
    training = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-2}
    shared = {
        "peft": {"r": 4, "lora_dropout": 0.0},
        "light": nested(blocks=0.6, length=4, multiple_of=1),
        "training": training,
    }
    shared["trainer"] = {"logging_steps": 1}
    file = grid_file(tmp_path / "grid.yaml", Workbench(tmp_path, "llama"), methods=["light-lora"], run=shared)
    reports, runs = [], []
    for devices, launch in ((1, in_this_process), (2, None)):
        results = reproduce(file, tmp_path / f"on-{devices}", devices=devices, launch=launch)
        assert not results.failures
        reports += results.reports.values()
        runs += [cell.run for cell in load_grid(file).cells(tmp_path / f"on-{devices}")]
    one, two = ([entry["loss"] for entry in run.log_entries() if "loss" in entry] for run in runs)
    assert len(one) == len(two) == 16
    assert two == pytest.approx(one, rel=1e-3)
    assert PrunePlan.load(runs[1].plan) == PrunePlan.load(runs[0].plan)
    assert reports[1]["metrics"] == pytest.approx(reports[0]["metrics"], rel=1e-3)
    assert len([stage for stage in runs[1].log_entries() if stage.get("done")]) == 4, "the main process alone writes"


def test_more_devices_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(LightPeftError, match="--devices is 4, but this machine has 2"):
        reproduce(grid_file(tmp_path / "grid.yaml"), tmp_path / "out", devices=4)
    assert not (tmp_path / "out").exists()


def test_a_step_sees_as_many_rows_on_any_number_of_devices(tmp_path: Path) -> None:
    (cell,) = load_grid(grid_file(tmp_path / "grid.yaml", methods=["lora"])).cells(tmp_path)
    assert running.spread_over_devices(cell, 4).config.training.batch_size == 8
    assert running.spread_over_devices(cell, 1) == cell
    with pytest.raises(LightPeftError, match="batch_size 32 cannot be divided among 5 devices"):
        running.spread_over_devices(cell, 5)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets cells run a piece of Python instead of their run."""

    def use(code: str) -> None:
        monkeypatch.setattr(running, "command", lambda module, devices: [sys.executable, "-c", code])

    return use


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("pass", "the process ended without a result"),
        ("import sys; sys.exit('lightpeft: the disk is full')", "the disk is full"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("raise ValueError('deep\\n inside')", "inside"),
    ],
)
def test_a_crash_of_a_cell_is_its_own(bench: Workbench, tmp_path: Path, runs: Any, code: str, reason: str) -> None:
    runs(code)
    results = reproduce(grid_file(tmp_path / "grid.yaml", bench, methods=["lora"]), tmp_path / "out")
    (failure,) = results.failures.values()
    assert failure.startswith(reason)
    log = tmp_path / "out" / "logs" / "tiny-words-lora-0.txt"
    assert str(log) in failure
    assert log.is_file()


def test_a_grid_that_is_stopped_stops_its_cell(tmp_path: Path) -> None:
    """The cell gets a SIGTERM, may end its step, and the grid waits for that."""
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(130)); print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    wait = process.wait
    calls = iter([KeyboardInterrupt(), None])

    def interrupted(*args: Any) -> int:
        error = next(calls)
        if error is not None:
            raise error
        return wait(timeout=30)

    process.wait = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        running._wait(process)
    assert process.returncode == 130
    process.stdout.close()


# -- whole grids on tiny models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid(bench: Workbench) -> Path:
    """Five methods and two seeds; three light ones differ in their budget alone, and one of these cuts nothing."""
    nothing = {"from": "light-lora", "light": nested(blocks=0.0, modules=0.0, ranks=0.0)}
    methods = {
        "lora": None,
        "light-lora": None,
        "random": None,
        "long": {"light": nested(length=0.5)},
        "nothing": nothing,
    }
    return grid_file(bench.folder / "grid.yaml", bench, methods=methods, seeds=[0, 1])


@pytest.fixture(scope="module")
def finished(bench: Workbench, grid: Path) -> Path:
    out = bench.folder / "out"
    assert reproduce(grid, out, launch=in_this_process).failures == {}
    return out


def cell_folder(out: Path, method: str, seed: int = 0) -> Path:
    return out / "cells" / "tiny" / "words" / method / str(seed)


def test_the_table_is_that_of_the_runs(finished: Path) -> None:
    results = read(finished / "results.json")
    assert [row["method"] for row in results["rows"]] == ["lora", "light-lora", "random", "long", "nothing"]
    assert (results["cells"], len(results["reports"]), results["baseline"]) == (10, 10, "lora")
    for row in results["rows"]:
        reports = [read(cell_folder(finished, row["method"], seed) / "metrics.json") for seed in (0, 1)]
        assert row["quality"] == [report["metrics"]["accuracy"] for report in reports]
        assert row["measures"]["parameters"]["mean"] == sum(report["parameters"]["base"] for report in reports) / 2
        seconds = [sum(t for stage, t in report["seconds"].items() if stage != "evaluate") for report in reports]
        assert row["measures"]["seconds"]["mean"] == pytest.approx(statistics.fmean(seconds))
        assert row["measures"]["seconds"]["std"] == pytest.approx(statistics.stdev(seconds))
        base = results["rows"][0]["quality"]
        expected = None if row["method"] == "lora" else [a - b for a, b in zip(row["quality"], base, strict=True)]
        assert row["difference"] == expected
    assert results["command"].startswith("lightpeft reproduce ") and results["command"].endswith("grid.yaml")
    folders = {name: finished.joinpath("cells", *name.split("/")) for name in results["reports"]}
    logs = {name: hashlib.sha256((folder / "log.jsonl").read_bytes()).hexdigest() for name, folder in folders.items()}
    assert results["logs"] == logs
    removed = {row["method"]: row["measures"]["removed"]["mean"] for row in results["rows"]}
    assert removed["lora"] == 0 < removed["random"] < 1
    trained = {row["method"]: row["measures"]["trained"]["mean"] for row in results["rows"]}
    assert trained["light-lora"] < trained["lora"]
    assert {path.name for path in finished.iterdir()} == {
        ".lock",
        "cells",
        "logs",
        *(f"results.{suffix}" for suffix in ("json", "md")),
    }


def test_estimation_is_shared_where_it_is_the_same(finished: Path) -> None:
    for seed in (0, 1):
        sums = {name: checksums(cell_folder(finished, name, seed) / "estimation") for name in ("light-lora", "random")}
        assert sums["light-lora"] == sums["random"] != checksums(cell_folder(finished, "long", seed) / "estimation")
        reports = [read(cell_folder(finished, name, seed) / "metrics.json") for name in ("light-lora", "random")]
        assert reports[0]["training"]["estimate"] == reports[1]["training"]["estimate"]
        assert reports[0]["seconds"]["estimate"] == reports[1]["seconds"]["estimate"]
        plans = [read(cell_folder(finished, name, seed) / "plan.json") for name in ("light-lora", "random")]
        assert plans[0]["blocks"] != plans[1]["blocks"]
    assert checksums(cell_folder(finished, "random", 0) / "estimation") != sums["random"]


def test_finished_cells_are_not_repeated(grid: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stamps(finished / "cells")

    def never(*_: Any) -> str:
        raise AssertionError("a finished cell was run")

    results = reproduce(grid, finished, launch=never)
    assert len(results.reports) == 10
    assert stamps(finished / "cells") == before
    assert "10 of 10 cells are done already" in capsys.readouterr().err


def test_a_folder_belongs_to_one_grid(bench: Workbench, finished: Path, tmp_path: Path) -> None:
    before = stamps(finished)
    shorter = {**yaml.safe_load((bench.folder / "grid.yaml").read_text())["run"], "peft": {"r": 2}}
    file = grid_file(tmp_path / "grid.yaml", bench, run=shorter)
    with pytest.raises(LightPeftError, match=r"holds a run with other settings \(it differs in peft"):
        reproduce(file, finished, launch=in_this_process)
    assert stamps(finished) == before


def test_a_failing_cell_is_reported_and_the_rest_goes_on(
    bench: Workbench, grid: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A method is added to a finished grid; its first cell fails, is said so, and is run again next time."""
    out = tmp_path / "out"
    shutil.copytree(finished / "cells" / "tiny" / "words" / "lora", cell_folder(out, "lora").parent)
    methods = {"lora": None, "broken": {"from": "lora", "peft": {"target_modules": ["nothing"]}}, "random": None}
    file = grid_file(tmp_path / "grid.yaml", bench, methods=methods)
    monkeypatch.setattr(running, "run_cell", in_this_process)
    assert lightpeft("reproduce", file, "--out", out) == 1
    streams = capsys.readouterr()
    lines = [line for line in streams.err.splitlines() if not NOTICE.match(line)]
    assert lines[0] == "1 of 3 cells are done already"
    assert lines[1].startswith("[2/3] tiny/words/broken/0: failed: target_modules ['nothing'] match nothing in bert")
    assert lines[2].startswith("[3/3] tiny/words/random/0: accuracy 0.")
    assert lines[2].endswith("time left: none")
    results = read(out / "results.json")
    assert list(results["failures"]) == ["tiny/words/broken/0"]
    assert [row["method"] for row in results["rows"]] == ["lora", "random"]
    assert "- tiny/words/broken/0: target_modules" in (out / "results.md").read_text()
    file = grid_file(tmp_path / "grid.yaml", bench, methods={**methods, "broken": {"from": "lora"}})
    shutil.rmtree(cell_folder(out, "broken"))
    assert lightpeft("reproduce", file, "--out", out, "--only", "method=broken") == 0
    assert read(out / "results.json")["failures"] == {}
    assert read(out / "results.json")["rows"][1]["difference"] == [0.0]  # the baseline again, with the same seed


def test_a_killed_grid_goes_on_inside_its_cell(bench: Workbench, finished: Path, tmp_path: Path) -> None:
    file = grid_file(tmp_path / "grid.yaml", bench)
    out = tmp_path / "out"
    disturb = at_step(5, signalling(signal.SIGKILL))

    def disturbed() -> None:
        running.run_cell = in_this_process
        disturb()

    assert in_child(disturbed, "reproduce", file, "--out", out)[0] == -signal.SIGKILL
    assert not (cell_folder(out, "lora") / "metrics.json").exists()
    assert (cell_folder(out, "lora") / "checkpoints" / "train" / "checkpoint-4").is_dir()
    results = reproduce(file, out, launch=in_this_process)
    for method in ("lora", "light-lora"):
        reports = [read(cell_folder(folder, method) / "metrics.json") for folder in (out, finished)]
        assert reports[0]["metrics"] == reports[1]["metrics"]
    resumed, whole = results.rows
    assert resumed.measures["seconds"] is None  # only the last part of the run is known
    assert whole.measures["seconds"] is not None


def test_a_cell_in_a_process_of_its_own_gives_the_same(bench: Workbench, finished: Path, tmp_path: Path) -> None:
    file = grid_file(tmp_path / "grid.yaml", bench, methods=["lora"])
    results = reproduce(file, tmp_path / "out")
    assert results.failures == {}
    assert results.rows[0].quality == [read(cell_folder(finished, "lora") / "metrics.json")["metrics"]["accuracy"]]
    assert "method plain" in (tmp_path / "out" / "logs" / "tiny-words-lora-0.txt").read_text()


def test_a_folder_that_cannot_be_written(bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    file = grid_file(tmp_path / "grid.yaml", bench)
    assert lightpeft("reproduce", file, "--out", tmp_path / "file") == 2
    assert capsys.readouterr().err.count("\n") == 1


# -- tables ------------------------------------------------------------------------------------------------------------


def spreads(**values: tuple[float, float | None] | None) -> dict[str, SeedSpread | None]:
    values = {"full_width": None, **values}
    return {name: None if values[name] is None else SeedSpread(*values[name]) for name in MEASURES}  # type: ignore[misc]


FIXED = Results(
    rows=[
        Row(
            "minilm", "rte", "lora", "accuracy", [0, 1, 2], [0.84, 0.845, 0.838], None, None,
            spreads(
                parameters=(22_713_216, 0), removed=(0, 0), trained=(74_498, 0), samples_per_second=(118.4, 3),
                training_memory_bytes=(557 * 2**20, 0), peak_memory_bytes=(557 * 2**20, 0), seconds=(204.4, 26.1),
                adapter_bytes=(301 * 1024, 0),
            ),
        ),
        Row(
            "minilm", "rte", "light & 50%_off", "accuracy", [0, 1], [0.834, 0.828], [-0.006, -0.018], 0.2389,
            spreads(
                parameters=(1_238_000_000, 0), removed=(0.2349, 0), trained=(19_093, 0), samples_per_second=(3070, 1),
                training_memory_bytes=(256 * 2**20, 0), peak_memory_bytes=(612 * 2**20, 0), seconds=None,
                adapter_bytes=(91 * 1024, 0),
            ),
        ),
        Row(
            "minilm", "texts", "lora", "perplexity", [0], [21.9], None, 0.0001,
            spreads(
                parameters=(999, None), removed=(0, None), trained=(10, None), samples_per_second=None,
                training_memory_bytes=None, peak_memory_bytes=None, seconds=(75, None),
                adapter_bytes=(1e9, None),
            ),
        ),
    ],
    baseline="lora",
    cells=9,
    command="lightpeft reproduce grid.yaml",
    reports={str(number): {"training": {"train": {"others": 0.4} if number else {}}} for number in range(6)},
    failures={"minilm/rte/light/2": "out of memory"},
)  # fmt: skip
CAPTION = (
    "model minilm, 6 of 9 cells are done (5 beside other programs: their times do not compare); mean ± standard "
    "deviation over seeds; quality: in percent, except losses and perplexity; difference: to lora; p: of a paired "
    "t-test over seeds; parameters: of the base after the cut; "
    "removed, %: of the base's parameters; trained: trainable parameters; samples/s: of fine-tuning; training MiB: of "
    "fine-tuning; peak MiB: of the run; seconds: of the run, with estimation."
)
MARKDOWN = f"""\
| task | method | metric | seeds | quality | difference | p | parameters | removed, % | trained | adapter KiB | samples/s | training MiB | peak MiB | seconds |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| rte | lora | accuracy | 3 | 84.1 ± 0.4 | - | - | 22.7M | 0.0 | 74,498 | 301 | 118 | 557 | 557 | 204 ± 26 |
| rte | light & 50%_off | accuracy | 2 | 83.1 ± 0.4 | -1.2 ± 0.8 | 0.239 | 1.24B | 23.5 | 19,093 | 91 | 3,070 | 256 | 612 | - |
| texts | lora | perplexity | 1 | 21.9 | - | <0.001 | 999 | 0.0 | 10 | 976,562 | - | - | - | 75 |

{CAPTION}

Failed:

- minilm/rte/light/2: out of memory
"""  # noqa: E501


def test_markdown_of_fixed_numbers() -> None:
    assert markdown_table(FIXED) == MARKDOWN


def test_quality_at_full_width_has_a_column_where_a_run_keeps_both() -> None:
    kept = replace(FIXED.rows[1], measures={**FIXED.rows[1].measures, "full_width": SeedSpread(0.836, 0.001)})
    table = markdown_table(replace(FIXED, rows=[FIXED.rows[0], kept]))
    assert "| full width |" in table and "| 83.6 ± 0.1 |" in table
    assert "full width: quality of the full-width model, where a run keeps both" in table


def test_a_narrow_screen_has_whole_cells_of_fewer_columns() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(rich_table(FIXED, console.width))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in capture.get()
    assert re.split(r"\s{2,}", lines[0].strip()) == [
        "method",
        "seeds",
        "quality",
        "difference",
        "removed, %",
        "seconds",
    ]
    assert [line.strip() for line in lines[1:6:3]] == ["rte, accuracy", "texts, perplexity"]
    assert re.split(r"\s{2,}", lines[3].strip()) == ["light & 50%_off", "2", "83.1 ± 0.4", "-1.2 ± 0.8", "23.5", "-"]
    assert "parameters:" not in capture.get()


def test_tables_before_any_cell_is_done(tmp_path: Path) -> None:
    empty = Results([], "lora", 4, "lightpeft reproduce grid.yaml")
    write_results(tmp_path, empty)
    assert read_json(tmp_path / "results.json")["rows"] == []
    assert (tmp_path / "results.md").read_text().startswith("| method |")
    assert "0 of 4 cells" in (tmp_path / "results.md").read_text()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        (None, None),
        ([0.1], None),
        ([0.1, 0.1], None),
        ([1.0, -1.0], 1.0),
        # mean 2 and standard error 1 / sqrt(3): t = 2 sqrt(3) = 3.4641 with 2 degrees of freedom, p = 0.0742
        ([1.0, 2.0, 3.0], 0.0742),
    ],
)
def test_p_values(differences: list[float] | None, p: float | None) -> None:
    assert p_value(differences) == (p if p is None else pytest.approx(p, abs=1e-4))


RESULTS = [path for path in sorted(GRIDS[0].parents[1].glob("*/*.results.json")) if "rows" in read(path)]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.name.partition('.')[0]}")
def test_results_of_the_repository_are_read(path: Path) -> None:
    """Whatever version wrote them: their rows, and their table."""
    results, stored = read_results(path), read(path)
    assert [row.quality for row in results.rows] == [row["quality"] for row in stored["rows"]]
    assert markdown_table(results).count("\n| ") == 1 + len(results.rows)


@pytest.mark.parametrize("name", ["movie_reviews/auto", "glue/presets", "socialiqa/writers"])
def test_published_results_are_those_of_their_grid(name: str, tmp_path: Path) -> None:
    grid = GRIDS[0].parents[1] / name
    published = read_results(grid.with_suffix(".results.json"))
    results = join_results(grid.with_suffix(".yaml"), [grid.with_suffix(".results.json")], tmp_path)
    assert [row.quality for row in results.rows] == [row.quality for row in published.rows]


def test_what_is_no_results_file_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {"rows": [{"model": "m"}], "baseline": "lora"})
    with pytest.raises(LightPeftError, match=r"does not hold the results of a grid: rows\[0\].task is missing"):
        read_results(tmp_path / "results.json")


def test_differences_are_between_equal_seeds(bench: Workbench, tmp_path: Path) -> None:
    """Also where each method lacks another seed; runs of old versions, which measured less, are taken too."""
    grid = load_grid(grid_file(tmp_path / "grid.yaml", bench, seeds=[0, 1, 2]))
    cells = grid.cells(tmp_path)
    accuracy = {("lora", 0): 0.5, ("lora", 2): 0.7, ("light-lora", 1): 0.9, ("light-lora", 2): 0.6}
    for cell in cells:
        if (cell.method, cell.seed) in accuracy:
            fake_report(cell.config, accuracy[cell.method, cell.seed])
    lora, light = summarize(grid, cells).rows
    assert (lora.seeds, light.seeds) == ([0, 2], [1, 2])
    assert light.difference == [pytest.approx(-0.1)]
    assert light.p is None
    assert light.measures["samples_per_second"] is None
    assert light.measures["seconds"] == SeedSpread(3.0, 0.0)


# -- parts of a grid -------------------------------------------------------------------------------------------------


def parts(file: Path, folder: Path) -> list[Path]:
    """The results of a grid whose seeds were run in a folder each; the second one has both seeds of one method."""
    found = []
    for part in (0, 1):
        grid, out = load_grid(file), folder / str(part)
        for cell in grid.cells(out):
            if cell.seed == part or (part == 1 and cell.method == "lora"):
                fake_report(cell.config, accuracy=0.5 + 0.1 * cell.seed + 0.01 * part)
        write_results(out, summarize(grid, grid.cells(out)))
        found.append(out / "results.json")
    return found


def test_parts_of_a_grid_are_one_table(tmp_path: Path) -> None:
    """As if all had run in one folder; of what two parts have, the first one's counts."""
    file = grid_file(tmp_path / "grid.yaml", seeds=[0, 1])
    one, other = parts(file, tmp_path)
    results = join_results(file, [one, other.parent], tmp_path / "whole")
    assert read_results(tmp_path / "whole/results.json") == results
    lora, light = results.rows
    assert (lora.seeds, lora.quality) == ([0, 1], [0.5, 0.61]), "seed 0 is the first part's"
    assert light.difference == [0.0, 0.0]
    assert list(results.reports) == [cell.name for cell in load_grid(file).cells(tmp_path)]
    assert join_results(file, [other, one], tmp_path / "other").rows[0].quality == [0.51, 0.61]


def test_parts_that_were_spread_over_devices(tmp_path: Path) -> None:
    file = grid_file(tmp_path / "grid.yaml")
    grid, out = load_grid(file), tmp_path / "on_four"
    cells = [running.spread_over_devices(cell, 4) for cell in grid.cells(out)]
    for cell in cells:
        fake_report(cell.config, 0.5)
    write_results(out, summarize(grid, cells))
    assert len(join_results(file, [out], tmp_path / "whole").rows) == 2


def test_a_part_of_another_grid_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = grid_file(tmp_path / "grid.yaml", seeds=[0, 1])
    one, _ = parts(file, tmp_path)
    fewer = grid_file(tmp_path / "fewer.yaml", seeds=[1])
    rates = {"run": {"training": {"learning_rate": 0.5}, "light": nested(blocks=0.6, length=0.25, multiple_of=1)}}
    for grid, part, message in (
        (fewer, one, "fewer.yaml has no cell tiny/words/lora/0"),
        (
            grid_file(tmp_path / "faster.yaml", seeds=[0, 1], **rates),
            one,
            "was run with another training.learning_rate",
        ),
        (file, tmp_path / "none", "none does not exist"),
    ):
        with pytest.raises(LightPeftError, match=message):
            join_results(grid, [part], tmp_path / "whole")
    altered = read_json(one)
    altered["reports"]["tiny/words/lora/0"].setdefault("config", {})["later"] = 1
    write_json(tmp_path / "altered.json", altered)
    with pytest.raises(LightPeftError, match=r"cannot read cell .*lora/0.*later"):
        join_results(file, [tmp_path / "altered.json"], tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reproduce", str(file), "--join", str(one), "--only", "seed=0"])
    assert stopped.value.code == 2 and "--join runs no cell" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()


def test_parts_that_found_settings(tmp_path: Path) -> None:
    """The grid has `auto`, and a run's settings what it found for it."""
    auto = nested(blocks=0.6, length=0.25, multiple_of=1)
    auto["remove"]["depth"] = "auto"
    file, out = grid_file(tmp_path / "grid.yaml", run={"light": auto}), tmp_path / "part"
    grid = load_grid(file)
    cells = grid.cells(out)
    for cell in cells:
        config = cell.config
        assert config.training.learning_rate == config.training.epochs == "auto"
        found = replace(config.training, learning_rate=3e-4, epochs=3.0)
        fake_report(replace(config, training=found, light=config.light.with_depth(0.4)), 0.5)
    write_results(out, summarize(grid, cells))
    assert len(join_results(file, [out], tmp_path / "whole").rows) == 2
    fixed = grid_file(tmp_path / "fixed.yaml", run={"light": nested(blocks=0.6, length=0.25, multiple_of=1)})
    with pytest.raises(LightPeftError, match=r"another light\.remove\.depth"):
        join_results(fixed, [out], tmp_path / "whole")


def fake_report(config: RunConfig, accuracy: float) -> None:
    """Leave metrics.json of a run that measured no training."""
    sizes = {"base_dense": 20, "base": 10, "base_removed_ratio": 0.5, "trained": 3}
    report = {
        "method": config.method,
        "main_metric": "accuracy",
        "metrics": {"f1": 0.1, "accuracy": accuracy},
        "intervals": {"accuracy": None},
        "parameters": sizes,
        "seconds": {"train": 3.0, "evaluate": 9.0},
        "training": {},
        "adapter_bytes": 7,
        "hardware": {},
        "config": dataclasses.asdict(config),
    }
    run = RunFolder.open(config)
    run.begin()
    write_json(run.metrics, report)
