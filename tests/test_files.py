"""Files appear whole or not at all, whenever their writer is killed; what is read is bounded and as it was written."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from workbench import at_file_operation, signalling

from lightpeft.config.validation import load_yaml
from lightpeft.errors import LightPeftError
from lightpeft.files import (
    SCHEMA_VERSION,
    check_free,
    check_sealed,
    clean,
    lock_folder,
    read_json,
    read_tensors,
    replacing,
    replacing_folder,
    seal,
    write_json,
)

FORK = multiprocessing.get_context("fork")


def refused(read: Callable[[], object]) -> str:
    """The one line that `read` is refused with."""
    with pytest.raises(LightPeftError) as error:
        read()
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 1000
    return text


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_fork(act: Callable[[], object]) -> int:
    """The exit code of a forked process that does something."""
    process = FORK.Process(target=act)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


# -- reading -----------------------------------------------------------------------------------------------------


def test_json_carries_its_schema_and_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1, "ints": {3: "three"}})
    assert read_json(path) == {"schema_version": SCHEMA_VERSION, "x": 1, "ints": {"3": "three"}}
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert read_json(path)["x"] == 1, "how it is laid out does not matter"
    path.write_text(path.read_text().replace("three", "four"))
    assert refused(lambda: read_json(path)) == f"{path} was altered or damaged; restore the original file"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_whatever_is_written_is_read_back_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    known = {key: value for key, value in data.items() if key not in ("schema_version", "checksum")}
    write_json(path, known)
    assert read_json(path) == {"schema_version": SCHEMA_VERSION, **known}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b'{"schema_version": 99}',
            "schema version 99, but this lightpeft reads versions up to 2; upgrade lightpeft",
        ),
        (b'{"schema_version": "1"}', "schema version 1"),
        (b'{"schema_version": true}', "schema version True"),
        (b'{"schema_version": 2}', "was altered or damaged"),
        (b"{}", "schema version None"),
        (b'{"schema_version": 1', "cannot be read"),
        (b"[1]", "does not hold a JSON object"),
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        (b"", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"schema_version": 1, "x": ' + b"1" * 5000 + b"}", "cannot be read"),
        (b" " * (16 * 2**20 + 1), "is larger than 16384 KiB"),
    ],
)
def test_json_that_cannot_be_used(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    text = refused(lambda: read_json(path))
    assert says in text and str(path) in text


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "is not a regular file" in refused(lambda: read_json(tmp_path))
    assert "does not exist" in refused(lambda: read_json(tmp_path / "none.json"))
    assert "is not a file" in refused(lambda: read_tensors(tmp_path))
    assert "cannot be read" in refused(lambda: read_json(tmp_path / ("x" * 300)))


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [" + ", ".join([f"*a{n}"] * 10) + "]\n" for n in range(30)
)
"""Ten to the 31 entries, if aliases are followed as often as they are there: whoever does that never comes back."""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "remove nested aliases"),
        ("a: &a [*a]", "remove nested aliases"),
        ("a: " + "[" * 50_000, "is not YAML"),
        ("seed: !!int x", "is not YAML"),
        ("seed: 2026-13-45", "is not YAML"),
        ("seed: !!python/object/apply:os.system [true]", "is not YAML"),
        ("seed: " + "1" * 5000, "is not YAML"),
        ("a: \x01", "is not YAML"),
    ],
)
def test_yaml_that_cannot_be_used(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    line = refused(lambda: load_yaml(path))
    assert says in line and str(path) in line


def test_a_sealed_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a", "below/b"):
        (tmp_path / name).write_text(name)
    assert "checksums.json does not exist" in refused(lambda: check_sealed(tmp_path))
    seal(tmp_path)
    check_sealed(tmp_path)
    (tmp_path / "mine").write_text("a file that came later is nobody's business")
    check_sealed(tmp_path)
    (tmp_path / "below/b").write_text("c")
    assert "below/b was altered or damaged" in refused(lambda: check_sealed(tmp_path))
    (tmp_path / "below/b").unlink()
    assert "is incomplete: below/b is missing; copy it again" in refused(lambda: check_sealed(tmp_path))
    for outside in ("../x", "/etc/passwd"):
        write_json(tmp_path / "checksums.json", {"files": {outside: "0"}})
        assert "names a file outside it" in refused(lambda: check_sealed(tmp_path))


# -- writing -----------------------------------------------------------------------------------------------------


def old_folder(folder: Path) -> dict[str, str]:
    """A folder with two files that are to be replaced and two that stay; what is in it."""
    folder.mkdir()
    (folder / "sub").mkdir()
    content = {"a.txt": "old", "b.txt": "old", "mine.txt": "mine", "sub/deep.txt": "mine"}
    for name, text in content.items():
        (folder / name).write_text(text)
    return content


def content_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


NEW = {"a.txt": "new", "b.txt": "new", "c.txt": "new"}


def write_new(folder: Path, alone: bool = False, obsolete: tuple[str, ...] = ()) -> None:
    with replacing_folder(folder, "b.txt", alone=alone, obsolete=obsolete) as temporary:
        for name, text in NEW.items():
            (temporary / name).write_text(text)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_replaced(there: bool, tmp_path: Path) -> None:
    kept = old_folder(tmp_path / "out") if there else {}
    (tmp_path / "link").symlink_to(tmp_path / "out")
    write_new(tmp_path / "link")
    assert content_of(tmp_path / "out") == {**kept, **NEW}
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    for number in range(1, 100):

        def act(number: int = number) -> None:
            at_file_operation(number, signalling(signal.SIGKILL))()
            write_new(tmp_path / "out")

        code = in_fork(act)
        assert not (tmp_path / "out").exists() or content_of(tmp_path / "out") == NEW
        clean(tmp_path)
        assert os.listdir(tmp_path) in ([], ["out"]), "nothing stays of what was killed"
        if code == 0:
            break
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert code == 0 and number > 2


def test_only_what_is_called_like_something_temporary_is_cleaned(tmp_path: Path) -> None:
    names = [".x.tmp", ".hidden", "a.abcdef01.tmp", ".out.abcdef0.tmp"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "below" / ".out.abcdef01.tmp").mkdir(parents=True)
    (tmp_path / ".other.abcdef01.tmp").touch()
    clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "below"])
    assert not os.listdir(tmp_path / "below")


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"x": "old"})
    monkeypatch.setattr(Path, "replace", full_disk)
    monkeypatch.setattr(Path, "rename", full_disk)
    for name, write in {"out": write_new, "a.json": lambda path: write_json(path, {"x": "new"})}.items():
        text = refused(lambda name=name, write=write: write(tmp_path / name))
        assert text.startswith(f"cannot write {tmp_path / name}: ")
        assert text.endswith("No space left on device; nothing was changed")
    assert os.listdir(tmp_path) == ["a.json"] and read_json(tmp_path / "a.json")["x"] == "old"


def test_half_a_character(tmp_path: Path) -> None:
    def write() -> None:
        with replacing(tmp_path / "a.csv") as file:
            file.write("\ud800")

    assert "half a character" in refused(write)
    assert os.listdir(tmp_path) == []


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), replacing_folder(tmp_path / "out", "a") as temporary:
        (temporary / "a.txt").write_text("half")
        raise KeyError("x")
    with pytest.raises(KeyError), replacing(tmp_path / "a.csv") as file:
        file.write("half")
        raise KeyError("x")
    assert os.listdir(tmp_path) == []


def test_long_names_of_any_script(tmp_path: Path) -> None:
    """The name of the temporary file is as long as the file system allows, in bytes."""
    path = tmp_path / f"{'日' * 82}.json"
    write_json(path, {"a": 1})
    assert read_json(path)["a"] == 1 and [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("alone", [False, True])
def test_what_an_earlier_result_had_besides_goes(alone: bool, tmp_path: Path) -> None:
    kept = old_folder(tmp_path / "out")
    for name in ("part-1.bin", "part-2.bin", "other.bin", "README.markdown"):
        (tmp_path / "out" / name).write_text(name)
    write_new(tmp_path / "out", alone, obsolete=("part-*.bin", "a.txt"))
    others = {"other.bin": "other.bin", "README.markdown": "README.markdown"}
    assert content_of(tmp_path / "out") == (NEW if alone else {**kept, **NEW, **others})


def test_killed_at_every_file_operation_in_a_folder_that_is_there(tmp_path: Path) -> None:
    """Old and new files are never there together, and the file that says that all are there comes last."""
    kept = old_folder(tmp_path / "out")
    seen, number = set(), 0
    while True:
        number += 1

        def act(number: int = number) -> None:
            at_file_operation(number, signalling(signal.SIGKILL))()
            write_new(tmp_path / "out", obsolete=("a.txt",))

        code = in_fork(act)
        state = content_of(tmp_path / "out")
        state = {name: text for name, text in state.items() if not name.startswith(".out.")}
        assert state["mine.txt"] == "mine" and state["sub/deep.txt"] == "mine"
        if "b.txt" in state:
            assert state in (kept, {**kept, **NEW})
        else:
            assert len(set(state.values()) - {"mine"}) < 2
        seen.add(state.get("b.txt"))
        clean(tmp_path / "out")
        assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]
        if code == 0:
            break
        assert code == -signal.SIGKILL
        for name, text in kept.items():
            (tmp_path / "out" / name).write_text(text)
        (tmp_path / "out" / "c.txt").unlink(missing_ok=True)
    assert seen == {"old", "new", None}


def test_a_disk_that_fails_halfway_in_a_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_folder(tmp_path / "out")
    monkeypatch.setattr(Path, "replace", full_disk)
    assert "it is incomplete now; write it again" in refused(lambda: write_new(tmp_path / "out"))
    assert not (tmp_path / "out" / "b.txt").exists()
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]


# -- one process at a time ---------------------------------------------------------------------------------------


TRYING = """
import pathlib, sys
from lightpeft.errors import LightPeftError
from lightpeft.files import check_free, lock_folder

folder = pathlib.Path(sys.argv[1])
for take in (check_free, lambda folder: lock_folder(folder).__enter__()):
    try:
        take(folder)
    except LightPeftError as error:
        print(error)
"""


def refusals_elsewhere(folder: Path) -> list[str]:
    """What another process is told that asks whether a folder is free, and that wants to hold it."""
    command = [sys.executable, "-c", TRYING, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    check_free(folder)
    assert not folder.exists()
    in_use = f"{folder} is in use by another process; wait"
    with lock_folder(folder):
        assert [line[: len(in_use)] for line in refusals_elsewhere(folder)] == [in_use, in_use]
        with lock_folder(folder):
            check_free(folder)
        assert len(refusals_elsewhere(folder)) == 2, "held by the outer block still"
    assert not refusals_elsewhere(folder)
    assert os.listdir(folder) == [".lock"]


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    def die() -> None:
        with lock_folder(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(die) == -signal.SIGKILL
    with lock_folder(tmp_path):
        pass
