"""The command with standard streams that are closed, full, or of an encoding without the letters that are needed."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from workbench import Workbench, labelled, lightpeft, write_rows

from lightpeft.app.cli import command
from lightpeft.app.runs import pipeline

LABELS = {"negative": "übel", "positive": "schön"}
TEXT = "good0 good1 good2 wörter"
FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """Rows with letters that ASCII has not, and a finished run on them."""
    bench = Workbench(tmp_path_factory.mktemp("streams"))
    write_rows(bench.train, [{**row, "label": LABELS[row["label"]]} for row in labelled(64, seed=1)])
    write_rows(bench.test, [{**row, "label": LABELS[row["label"]]} for row in labelled(40, seed=2)])
    pipeline.run(bench.config("run"))
    return bench


class Shell:
    """Runs the command in a forked process, whose streams are as Python makes them when it starts."""

    NAMES: ClassVar = ("stdin", "stdout", "stderr")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in self.NAMES:
            (folder / name).write_bytes(b"")

    def run(self, *arguments: object, encoding: str = "utf-8", **streams: Path | None) -> int:
        """Exit code, with streams that are files of the folder unless they are given; None: closed."""
        paths = {name: streams.get(name, self.folder / name) for name in self.NAMES}

        def child() -> None:
            self._open(paths, encoding)
            code = lightpeft(*arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # as Python does at its end
            os._exit(code)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def _open(self, paths: Mapping[str, Path | None], encoding: str) -> None:
        for number, (name, path) in enumerate(paths.items()):
            os.close(number)
            stream = None if path is None else self._stream(number, path, encoding)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)

    def _stream(self, number: int, path: Path, encoding: str) -> io.TextIOWrapper:
        """A stream with its number, though those before it may be closed."""
        descriptor = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if descriptor != number:
            os.dup2(descriptor, number)
            os.close(descriptor)
        errors = "backslashreplace" if number == 2 else "strict"
        return open(number, "r" if number == 0 else "w", encoding=encoding, errors=errors, closefd=False)

    def text(self, name: str) -> str:
        """What was written to a stream."""
        return (self.folder / name).read_text(encoding="utf-8")

    def line(self) -> str:
        """The one line on stderr."""
        text = self.text("stderr")
        assert text.startswith("lightpeft: ")
        assert text.count("\n") == 1
        return text


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def check_predictions(text: str, source: str = TEXT) -> None:
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["text"] for row in rows] == [source]
    assert rows[0]["label"] in LABELS.values()
    assert set(rows[0]) == {"text", "label", "p_übel", "p_schön"}


# -- standard output ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stdout", "says"), [(None, "is closed"), (FULL, "No space left on device")])
def test_predictions_that_would_be_lost(bench: Workbench, shell: Shell, stdout: Path | None, says: str) -> None:
    assert shell.run("predict", bench.folder / "run", "--example", TEXT, stdout=stdout) == 2
    assert says in shell.line()


def test_predictions_that_go_to_a_file(bench: Workbench, shell: Shell, tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    assert shell.run("predict", bench.folder / "run", "--example", TEXT, "--output", target, stdout=None) == 0
    assert shell.text("stderr") == ""
    check_predictions(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize("stdout", [None, FULL])
@pytest.mark.parametrize("arguments", [["run", "--print_config"], ["inspect", "run"]])
def test_what_is_shown_alone(
    bench: Workbench, shell: Shell, monkeypatch: pytest.MonkeyPatch, arguments: list[str], stdout: Path | None
) -> None:
    monkeypatch.chdir(bench.folder)
    assert shell.run(*arguments, stdout=stdout) == 2
    assert "standard output" in shell.line()


def test_a_run_needs_no_output(bench: Workbench, shell: Shell) -> None:
    """Nor does any file of it take the place of the closed one."""
    file = bench.yaml("silent")
    assert shell.run("run", "--config", file, stdin=None, stdout=None, stderr=None) == 0
    for name in ("metrics.json", "plan.json", "log.jsonl"):
        assert (bench.folder / "silent" / name).read_text(encoding="utf-8").startswith("{")
    metrics = [(bench.folder / run / "metrics.json").read_text(encoding="utf-8") for run in ("run", "silent")]
    assert len({text[text.index('"metrics"') : text.index('"intervals"')] for text in metrics}) == 1


# -- standard error ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stderr", [None, FULL])
def test_messages_that_cannot_be_shown_end_nothing(bench: Workbench, shell: Shell, stderr: Path | None) -> None:
    assert shell.run("predict", bench.folder / "run", "--example", TEXT, stderr=stderr) == 0
    check_predictions(shell.text("stdout"))
    assert shell.run("run", "--seed", "-1", stderr=stderr) == 2


# -- encodings and standard input --------------------------------------------------------------------------------


def test_predictions_are_utf8(bench: Workbench, shell: Shell) -> None:
    (shell.folder / "stdin").write_text(f"{TEXT}\n", encoding="utf-8-sig")
    assert shell.run("predict", bench.folder / "run", "-", encoding="ascii") == 0
    assert shell.text("stderr") == ""
    check_predictions(shell.text("stdout"))
    assert b"\r\r" not in (shell.folder / "stdout").read_bytes()


def test_tables_on_an_ascii_screen(bench: Workbench, shell: Shell) -> None:
    arguments = ["evaluate", bench.folder / "run", "--per_class"]
    assert shell.run(*arguments, encoding="ascii") == 0
    assert shell.text("stderr") == ""
    assert r"sch\xf6n" in shell.text("stdout")


def test_closed_standard_input(bench: Workbench, shell: Shell) -> None:
    assert shell.run("predict", bench.folder / "run", "-", stdin=None) == 2
    assert "standard input is closed; give a file instead of -" in shell.line()


def test_standard_input_of_another_encoding(bench: Workbench, shell: Shell) -> None:
    (shell.folder / "stdin").write_bytes(TEXT.encode("latin-1"))
    assert shell.run("predict", bench.folder / "run", "-") == 2
    assert "standard input is not UTF-8 text" in shell.line()


# -- what the system says ----------------------------------------------------------------------------------------


def test_memory_and_the_system_are_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, says in (
        (MemoryError(), "out of memory"),
        (PermissionError(13, "Permission denied", "/some/file"), "'/some/file': Permission denied"),
        (OSError("odd"), "'odd'"),
    ):

        def fail(arguments: list[str], error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(command, "_dispatch", fail)
        assert lightpeft("run") == 2
        line = capsys.readouterr().err
        assert says in line
        assert line.count("\n") == 1
