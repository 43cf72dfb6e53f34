"""Kills, damage and company: whatever happens to a run and its files, the end is the same, or one line says why not.

A sample in `make test`; `make test-faults` takes hundreds of kills and thousands of mutations.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from damage import damage, rewrite
from lanes import FULL
from workbench import (
    NOTICE,
    Disturb,
    Workbench,
    at_file_operation,
    at_step,
    comparable,
    edit,
    in_child,
    lightpeft,
    read,
    signalling,
)

from lightpeft.app.runs import pipeline

KILLED_AT_OPERATIONS, KILLED_AT_TIMES, KILLED_EXPORTS = (120, 60, 20) if FULL else (3, 1, 2)
MUTATIONS, ODD = (2000, 200) if FULL else (40, 2)
SETTINGS: dict[str, Any] = {"light.estimate.length": 0.4, "training.save_steps": 3}
KILL = signalling(signal.SIGKILL)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def finished(bench: Workbench) -> Path:
    pipeline.run(bench.config("finished", **SETTINGS))
    return bench.folder / "finished"


def leftovers(folder: Path) -> list[str]:
    """What is there for a while only."""
    return [str(path) for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name == "checkpoints"]


def check_parses(folder: Path) -> None:
    """Every JSON file of a run is whole; so is every line of its log but the last."""
    for path in folder.rglob("*.json"):
        if "checkpoints" not in path.parts and not any(part.endswith(".tmp") for part in path.parts):
            json.loads(path.read_text(encoding="utf-8"))
    if (folder / "config.yaml").exists():
        assert isinstance(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")), dict)
    log = (folder / "log.jsonl").read_text(encoding="utf-8") if (folder / "log.jsonl").exists() else ""
    for line in log.splitlines()[:-1]:
        json.loads(line)


# -- kills -------------------------------------------------------------------------------------------------------


def operations(*command: object) -> int:
    """How many times a command changes something on disk."""
    counted = multiprocessing.get_context("fork").Value("i", 0)

    def count(number: int) -> None:
        counted.value = number

    assert in_child(at_file_operation(0, KILL, count), *command)[0] == 0
    return int(counted.value)


def unexpected(errors: str) -> list[str]:
    """Lines on stderr, without those on where a run goes on, and on the linear probe: few rows are enough for it."""
    known = ("a linear probe", "train: continues from step", "was finished already")
    return [line for line in errors.splitlines() if not any(part in line for part in known)]


def after(seconds: float) -> Disturb:
    """Kills the process when some time has passed."""
    return lambda: threading.Timer(seconds, KILL).start()


def test_killed_at_file_operations_and_at_any_time(bench: Workbench, finished: Path) -> None:
    expected, name, file = comparable(finished), "killed", bench.yaml("killed", **SETTINGS)
    folder = bench.folder / name
    started = time.monotonic()
    total = operations("run", "--config", file)
    seconds = time.monotonic() - started
    assert comparable(folder) == expected
    draw = random.Random(0)
    disturbances = [at_file_operation(at, KILL) for at in draw.sample(range(1, total + 1), KILLED_AT_OPERATIONS)]
    disturbances += [after(draw.uniform(0, seconds)) for _ in range(KILLED_AT_TIMES)]
    killed = 0
    for disturb in disturbances:
        shutil.rmtree(folder)
        killed += in_child(disturb, "run", "--config", file)[0] == -signal.SIGKILL
        check_parses(folder)
        code, errors = in_child(lambda: None, "run", "--config", file)
        assert (code, unexpected(errors)) == (0, [])
        assert comparable(folder) == expected
        assert leftovers(folder) == []
    assert killed >= KILLED_AT_OPERATIONS


def test_killed_while_the_metrics_are_noted(bench: Workbench, finished: Path) -> None:
    """The trained adapter is there at every moment."""
    folder = Path(shutil.copytree(finished, bench.folder / "noted"))
    (folder / "metrics.json").unlink()
    edit(folder / "adapter" / "lightpeft.json", lambda d: d.update(metrics={}))
    command = ("predict", folder / "adapter", "--example", "good1 word1")
    numbers = range(1, 1 + operations("evaluate", "--run", folder))
    for number in numbers if FULL else random.Random(3).sample(numbers, 3):
        (folder / "metrics.json").unlink(missing_ok=True)
        in_child(at_file_operation(number, KILL), "evaluate", "--run", folder)
        assert lightpeft(*command) == 0
    assert in_child(lambda: None, "evaluate", "--run", folder)[0] == 0
    assert comparable(folder) == comparable(finished) and leftovers(folder) == []


def test_a_killed_export_is_made_again_by_the_same_command(bench: Workbench, finished: Path) -> None:
    out = bench.folder / "exports" / "whole"
    command = ("export", finished / "adapter", out)
    total = operations(*command)
    expected = sorted(path.name for path in out.iterdir())
    for number in random.Random(2).sample(range(1, total + 1), min(KILLED_EXPORTS, total)):
        shutil.rmtree(out.parent)
        assert in_child(at_file_operation(number, KILL), *command)[0] == -signal.SIGKILL
        if not out.exists():  # else it was killed when all was done but the cleaning up
            assert in_child(lambda: None, *command)[0] == 0
        assert sorted(path.name for path in out.iterdir()) == expected
        assert lightpeft("predict", out, "--example", "good1 word1") == 0


SIZES = [3_000, 24_000, *([100, 700, 6_000, 10_000, 16_000, 40_000] if FULL else [])]
"""Bytes that a file may have on a full disk."""


@pytest.mark.parametrize("size", SIZES)
def test_a_disk_that_fills_up(bench: Workbench, finished: Path, size: int) -> None:
    """In the middle of whatever file is the first that is larger: one line, and the same command goes on with room."""
    name = f"full_{size}"
    file, folder = bench.yaml(name, **SETTINGS), bench.folder / name

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    code, errors = in_child(fill, "run", "--config", file)
    assert (code, errors.count("\n")) in ((2, 1), (0, 0))
    if code:
        assert "cannot write" in errors
    check_parses(folder)
    assert in_child(lambda: None, "run", "--config", file)[0] == 0
    assert comparable(folder) == comparable(finished) and leftovers(folder) == []


# -- company -----------------------------------------------------------------------------------------------------


def beside(disturb: Disturb, *command: object) -> Callable[[], tuple[int, str]]:
    """A command that runs meanwhile; returns what waits for it."""
    result: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: result.append(in_child(disturb, *command)))
    thread.start()

    def wait() -> tuple[int, str]:
        thread.join()
        return result[0]

    return wait


def test_two_runs_into_one_folder(bench: Workbench, finished: Path) -> None:
    """One of them is refused in one line, of whatever settings; the other's result is its own alone."""
    output = {"output": str(bench.folder / "shared")}
    same, other = (bench.yaml(f"shared_{seed}", **SETTINGS, **output, seed=seed) for seed in (0, 1))
    ready, go = (multiprocessing.get_context("fork").Event() for _ in range(2))
    first = beside(at_step(2, lambda: (ready.set(), go.wait(120))), "run", "--config", same)
    assert ready.wait(120)
    refusals = [in_child(lambda: None, "run", "--config", file) for file in (same, other)]
    go.set()
    for code, line in refusals:
        assert code == 2 and line.count("\n") == 1
        assert "is in use by another process" in line
    assert first()[0] == 0
    assert comparable(bench.folder / "shared") == comparable(finished)
    assert in_child(lambda: None, "run", "--config", same)[0] == 0
    code, line = in_child(lambda: None, "run", "--config", other)
    assert code == 2 and "differs in seed" in line


def test_two_runs_that_begin_at_once(bench: Workbench, finished: Path) -> None:
    file = bench.yaml("twins", **SETTINGS)
    waits = [beside(lambda: None, "run", "--config", file) for _ in range(2)]
    results = [wait() for wait in waits]
    assert {code for code, _ in results} <= {0, 2} and 0 in {code for code, _ in results}
    for code, errors in results:
        assert (code, len(unexpected(errors))) in ((0, 0), (2, 1))
    assert comparable(bench.folder / "twins") == comparable(finished)


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subjects(bench: Workbench, finished: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """What is damaged, by name: a good folder, and a command on a copy of it with what it gives."""
    assert lightpeft("export", finished / "adapter", bench.folder / "merged") == 0
    file = bench.yaml("stopped", **SETTINGS)
    for name, step in (("stopped", 21), ("stopped_early", 8)):
        file = bench.yaml(name, **SETTINGS)
        assert in_child(at_step(step, KILL), "run", "--config", file)[0] == -signal.SIGKILL
    assert lightpeft("plan", "--config", bench.yaml("planned", **SETTINGS)) == 2
    file = bench.yaml("planned", **SETTINGS)
    assert lightpeft("estimate", "--config", file) == lightpeft("plan", "--config", file) == 0
    assert lightpeft("run", "--config", bench.yaml("plain", method="plain", **SETTINGS)) == 0

    def predictions(folder: Path) -> object:
        out = bench.folder / "predicted.csv"
        out.unlink(missing_ok=True)
        code = lightpeft("predict", folder, bench.test, "--output", out)
        return code or out.read_bytes()

    def rerun(folder: Path) -> object:
        code = lightpeft("run", "--run", folder)
        return code or comparable(folder)

    return {
        "adapter": (finished / "adapter", predictions),
        "merged": (bench.folder / "merged", predictions),
        "finished run": (finished, predictions),
        "plain run": (bench.folder / "plain", predictions),
        "planned run": (bench.folder / "planned", rerun),
        "run stopped in training": (bench.folder / "stopped", rerun),
        "run stopped in estimation": (bench.folder / "stopped_early", rerun),
    }


WEIGHTS = {"adapter": 6, "merged": 5, "finished run": 4, "plain run": 4, "planned run": 1}
WEIGHTS |= {"run stopped in training": 1, "run stopped in estimation": 1}
"""How often each is damaged: runs that go on take seconds."""


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_files_give_the_same_or_one_line(
    bench: Workbench,
    subjects: dict[str, tuple[Path, Callable[[Path], object]]],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, command = subjects[name]
    copy = bench.folder / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    expected = command(Path(shutil.copytree(good, copy)))
    assert expected != 2
    same = refused = 0
    for seed in range(MUTATIONS * WEIGHTS[name] // sum(WEIGHTS.values())):
        shutil.rmtree(copy)
        shutil.copytree(good, copy)
        done = f"{name}, seed {seed}: {damage(copy, random.Random(seed))}"
        capsys.readouterr()
        result = command(copy)
        errors = capsys.readouterr().err
        if result == 2:
            lines = [line for line in errors.splitlines() if not NOTICE.match(line) and not line.startswith(str(copy))]
            assert len(lines) == 1 and lines[0].startswith("lightpeft: "), (done, errors)
            refused += 1
        else:
            assert result == expected, done
            same += 1
    assert refused or "stopped" in name, "checkpoints give way to older ones"
    print(f"{name}: {same} the same, {refused} refused")  # noqa: T201 (for `make test-faults`, which shows it)


DESCRIPTIONS = ["adapter/lightpeft.json", "plan.json", "estimation/estimation.json", "metrics.json"]


@pytest.mark.parametrize("name", [*DESCRIPTIONS, "merged.json", "task.json"])
def test_a_description_that_its_author_made_odd(
    bench: Workbench, subjects: dict[str, Any], finished: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With checksums that fit: what it says may be another thing, but nothing ends in a traceback."""
    good = {"merged.json": bench.folder / "merged", "task.json": bench.folder / "plain"}.get(name, finished)
    commands = {
        "merged.json": [("predict", "{}", bench.test), ("inspect", "{}")],
        "task.json": [("predict", "{}", bench.test), ("evaluate", "{}")],
        "adapter/lightpeft.json": [("predict", "{}", bench.test), ("inspect", "{}"), ("evaluate", "{}/adapter")],
        "plan.json": [("inspect", "{}/plan.json"), ("report", "{}"), ("run", "--run", "{}")],
        "estimation/estimation.json": [("plan", "--run", "{}")],
        "metrics.json": [("run", "--run", "{}"), ("evaluate", "--run", "{}"), ("report", "{}")],
    }[name]
    copy = bench.folder / "odd"
    for seed in range(ODD):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        draw = random.Random(seed)
        edit(copy / name, lambda data, draw=draw: rewrite(data, draw))
        for command in commands:
            capsys.readouterr()
            code = lightpeft(*(str(word).format(copy) for word in command))
            errors = capsys.readouterr().err
            assert code in (0, 2), (seed, command, read(copy / name))
            assert code == 0 or errors.count("\n") == 1, (seed, command, errors)


ONCE_TRACEBACKS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str, str]] = {
    "fewer labels": (
        "adapter/lightpeft.json",
        lambda d: d["task"]["labels"].pop(),
        "predict",
        "the model has 2 classes",
    ),
    "no plan": (
        "adapter/lightpeft.json",
        lambda d: d.update(plan=None),
        "inspect",
        "does not have the expected content",
    ),
    "numbers as labels": ("adapter/lightpeft.json", lambda d: d["task"].update(labels=[3, 4]), "evaluate", "of names"),
    "metrics as text": ("adapter/lightpeft.json", lambda d: d.update(metrics="x"), "inspect", "metrics is 'x'"),
    "no metrics": ("metrics.json", lambda d: d.pop("metrics"), "run", "metrics is missing"),
    "no base": ("metrics.json", lambda d: d["parameters"].pop("base"), "run", "parameters.base is missing"),
    "half an interval": ("metrics.json", lambda d: d["intervals"].update(accuracy=[0.5]), "run", "must be a list"),
    "milestones of nothing": ("metrics.json", lambda d: d["milestones"].pop("metrics"), "run", "metrics is missing"),
    "a site in no block": (
        "estimation/estimation.json",
        lambda d: d["sites"][0].update(block=99),
        "plan",
        "that the record does",
    ),
    "scores of others": (
        "estimation/estimation.json",
        lambda d: d["sites"].pop(),
        "plan",
        "of the estimation record have shape",
    ),
    "no report": ("metrics.json", lambda d: (d.clear(), d.update(x=1)), "run", "is missing"),
}


def test_metrics_without_warnings_and_milestones_are_shown(
    bench: Workbench, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, bench.folder / "lean")
    edit(copy / "metrics.json", lambda report: (report.pop("warnings"), report.pop("milestones")))
    assert lightpeft("run", "--run", copy) == 0
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("name", ONCE_TRACEBACKS)
def test_what_a_file_says_against_itself(
    bench: Workbench, finished: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, change, verb, says = ONCE_TRACEBACKS[name]
    copy = bench.folder / "against"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(finished, copy)
    if verb == "plan":
        shutil.rmtree(copy / "pruned")
    edit(copy / file, change)
    arguments = {"predict": (copy, bench.test), "inspect": (copy,), "run": ("--run", copy), "plan": ("--run", copy)}
    arguments |= {"evaluate": (copy / "adapter", "--data.test", bench.test)}
    capsys.readouterr()
    assert lightpeft(verb, *arguments[verb]) == 2
    written = capsys.readouterr().err
    assert says in written and written.count("\n") == 1
