"""Runs that take the estimation of another one, and runs that begin anew in the folder of another one."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from workbench import Workbench, comparable, lightpeft, stamps

from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reuse import estimation_settings
from lightpeft.files import lock_folder

OTHER = {"light.remove.heads": 0.5, "light.modules.remove_ranks": 0.75}
"""Another budget than that of the workbench."""
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    bench = Workbench(tmp_path_factory.mktemp("reuse"))
    pipeline.run(bench.config("donor"))
    pipeline.run(bench.config("alone", **OTHER))
    return bench


@pytest.fixture
def refused(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused, and return its one line; nothing has changed on the disk."""

    def run(*arguments: object) -> str:
        before = stamps(bench.folder)
        capsys.readouterr()
        assert lightpeft(*arguments) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert stamps(bench.folder) == before
        return line

    return run


def check_same(one: Path, other: Path) -> None:
    """Two runs made the same plan, and measured the same."""
    assert comparable(one) == comparable(other)


# -- the estimation of another run -------------------------------------------------------------------------------


def test_a_run_with_a_taken_estimation_is_the_same_run(bench: Workbench) -> None:
    taking = bench.yaml("taken", **OTHER)
    arguments = ("run", "--config", taking, "--estimation", bench.folder / "donor")
    assert lightpeft(*arguments) == 0
    check_same(bench.folder / "taken", bench.folder / "alone")
    log = [json.loads(line) for line in (bench.folder / "taken" / "log.jsonl").read_text().splitlines()]
    assert [entry.get("taken_from") for entry in log if entry.get("stage") == "estimate"] == [
        str(bench.folder / "donor")
    ]
    before = stamps(bench.folder)
    assert lightpeft(*arguments) == 0, "the same command has nothing left to do"
    assert stamps(bench.folder) == before


def test_scores_of_nothing_serve_no_budget(bench: Workbench, refused: Refused) -> None:
    """A run that takes nothing away leaves no scores, and says so to one that needs some."""
    nothing = {"light.remove.blocks": 0.0, "light.modules.remove": 0.0, "light.modules.remove_ranks": 0.0}
    assert lightpeft("estimate", "--config", bench.yaml("unscored", **nothing)) == 0
    for budget in (0.3, "auto"):
        asking = bench.yaml("asking", **nothing | {"light.remove.blocks": budget})
        line = refused("run", "--config", asking, "--estimation", bench.folder / "unscored")
        assert "since its settings removed nothing; estimate again" in line


MISFITS: dict[str, dict[str, Any]] = {
    "training.learning_rate": {"training.learning_rate": 1e-2},
    "seed": {"seed": 4},
    "peft.r": {"peft.r": 8},
    "light.estimate.length": {"light.estimate.length": 0.5},
    "light.modules.blocks": {"light.modules.blocks": 0.5},
    "data.max_length": {"data.max_length": 16},
    "share no estimation; both must be light": {"method": "plain"},
    "blocks that were present during estimation": {"light.remove.depth": 0.5},
}


@pytest.mark.parametrize("says", MISFITS)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_estimations_that_do_not_fit(bench: Workbench, refused: Refused, verb: str, says: str) -> None:
    file = bench.yaml("misfit", **MISFITS[says])
    line = refused(verb, "--config", file, "--estimation", bench.folder / "donor")
    assert (says if "light.remove.depth" not in MISFITS[says] else "light.remove.depth") in line


def test_folders_without_an_estimation(bench: Workbench, refused: Refused, tmp_path: Path) -> None:
    file = bench.yaml("lonely", **OTHER)
    assert "is not a run folder" in refused("run", "--config", file, "--estimation", bench.base)
    itself = ("run", "--config", bench.yaml("donor"), "--estimation", bench.folder / "donor")
    assert "is the output" in refused(*itself)
    unfinished = shutil.copytree(bench.folder / "donor", tmp_path / "unfinished")
    (unfinished / "log.jsonl").unlink()
    assert "has not finished its estimation" in refused("run", "--config", file, "--estimation", unfinished)
    scores = unfinished / "estimation" / "scores.safetensors"
    scores.write_bytes(scores.read_bytes()[:-1] + b"x")
    assert "was altered or damaged" in refused("plan", "--config", file, "--estimation", unfinished)
    shutil.rmtree(unfinished / "estimation")
    assert "has no result of `lightpeft estimate` yet" in refused("run", "--config", file, "--estimation", unfinished)


def test_a_run_that_has_another_estimation(bench: Workbench, refused: Refused) -> None:
    pipeline.estimate(pipeline.prepare(bench.config("longer", **{"light.estimate.length": 0.5})))
    file = bench.yaml("own")
    shutil.copytree(bench.folder / "donor", bench.folder / "own")
    shutil.rmtree(bench.folder / "own" / "estimation")
    shutil.copytree(bench.folder / "longer" / "estimation", bench.folder / "own" / "estimation")
    config = bench.folder / "own" / "config.yaml"
    config.unlink()
    shutil.copy(bench.folder / "donor" / "config.yaml", config)
    line = refused("run", "--config", file, "--estimation", bench.folder / "donor")
    assert "has an estimation of its own" in line


def test_what_an_estimation_depends_on(bench: Workbench) -> None:
    same = estimation_settings(bench.config("a"))
    later = {**OTHER, "light.after.keep": "both", "light.remove.scope": "global"}
    assert estimation_settings(bench.config("b", **later)) == same
    assert estimation_settings(bench.config("b", **{"model.trust_remote_code": True})) == same
    assert estimation_settings(bench.config("b", **{"light.estimate.mask_learning_rate": 0.5})) != same


# -- beginning anew ----------------------------------------------------------------------------------------------


def test_overwriting_the_run_of_another_config(bench: Workbench, refused: Refused) -> None:
    """What is left is as if the other run had never been; files that are no run's stay."""
    folder = bench.folder / "again"
    shutil.copytree(bench.folder / "donor", folder)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    file = bench.yaml("again", **OTHER)
    assert "or --overwrite to start again" in refused("run", "--config", file)
    assert lightpeft("run", "--config", file, "--overwrite") == 0
    check_same(folder, bench.folder / "alone")
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    before = stamps(bench.folder)
    assert lightpeft("run", "--config", file, "--overwrite") == 0, "the run of the same config goes on"
    assert stamps(bench.folder) == before


def test_what_is_not_overwritten(bench: Workbench, refused: Refused) -> None:
    """What is no run, a run for a command that has a fault, and one that another process works in."""
    settings = bench.settings("kept", **OTHER)
    shutil.copytree(bench.folder / "donor", bench.folder / "kept")
    file = bench.yaml("kept", **OTHER)
    foreign = bench.yaml("base", **OTHER)
    assert settings["output"] == str(bench.folder / "kept")
    assert "contains files but no run" in refused("run", "--config", foreign, "--overwrite")
    assert "does not exist" in refused("run", "--config", file, "--overwrite", "--data.train", "none.csv")
    line = refused("run", "--config", file, "--overwrite", "--estimation", bench.base)
    assert "is not a run folder" in line
    edited = bench.folder / "kept" / "config.yaml"
    edited.write_text(edited.read_text(encoding="utf-8").replace("seed: 0", "seed: 1"), encoding="utf-8")
    assert "was edited" in refused("run", "--config", file, "--overwrite")


def test_links_are_removed_and_not_what_they_point_to(bench: Workbench, tmp_path: Path) -> None:
    folder = bench.folder / "linked"
    shutil.copytree(bench.folder / "donor", folder)
    elsewhere = shutil.copytree(folder / "adapter", tmp_path / "elsewhere")
    shutil.rmtree(folder / "adapter")
    (folder / "adapter").symlink_to(elsewhere)
    assert lightpeft("run", "--config", bench.yaml("linked", **OTHER), "--overwrite") == 0
    assert sorted(path.name for path in elsewhere.iterdir()) == sorted(
        path.name for path in (bench.folder / "donor" / "adapter").iterdir()
    )
    assert not (folder / "adapter").is_symlink()


def test_a_run_that_is_in_use_is_not_overwritten(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench.folder / "busy"
    shutil.copytree(bench.folder / "donor", folder)
    context = multiprocessing.get_context("fork")
    taken, free = context.Event(), context.Event()

    def hold() -> None:
        with lock_folder(folder):
            taken.set()
            free.wait(60)

    process = context.Process(target=hold)
    process.start()
    assert taken.wait(60)
    before = (folder / "metrics.json").read_bytes()
    assert lightpeft("run", "--config", bench.yaml("busy", **OTHER), "--overwrite") == 2
    free.set()
    process.join()
    assert "is in use by another process" in capsys.readouterr().err
    assert (folder / "metrics.json").read_bytes() == before
