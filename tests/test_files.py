"""Files appear whole or not at all, whenever their writer is killed; what is read is bounded and as it was written."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
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
    InUseError,
    check_free,
    check_sealed,
    clean,
    holding,
    read_json,
    read_tensors,
    read_text,
    replacing,
    replacing_folder,
    seal,
    write_json,
    write_text,
    writing,
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
    assert refused(lambda: read_json(path)) == f"{path} was altered or damaged"


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
        (b'{"schema_version": 99}', "schema version 99, this lightpeft reads up to 2; upgrade lightpeft"),
        (b'{"schema_version": "1"}', "schema version 1"),
        (b'{"schema_version": true}', "schema version True"),
        (b'{"schema_version": 2}', "was altered or damaged"),
        (b"{}", "schema version None"),
        (b'{"schema_version": 1', "cannot be read"),
        (b"[1]", "does not hold a JSON object"),
        (b"\xff\xfe", "it is not UTF-8 text (byte 0)"),
        (b"", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"schema_version": 1, "x": ' + b"1" * 5000 + b"}", "cannot be read"),
        (b'{"schema_version": 1, "x": NaN}', "NaN is no JSON"),
        (b'{"schema_version": 1, "x": "\\ud800"}', "cannot be read"),
        (b" " * (16 * 2**20 + 1), "is larger than 16384 KiB"),
    ],
)
def test_json_that_cannot_be_used(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    text = refused(lambda: read_json(path))
    assert says in text and str(path) in text


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        for read in (read_text, read_json, load_yaml):
            assert "is not a regular file" in refused(lambda name=name, read=read: read(tmp_path / name))
        assert "is no file" in refused(lambda name=name: read_tensors(tmp_path / name))
    assert "cannot be read" in refused(lambda: read_json(tmp_path))
    assert "does not exist" in refused(lambda: read_json(tmp_path / "none.json"))
    assert "cannot be read" in refused(lambda: read_json(tmp_path / ("x" * 300)))
    assert "cannot be read" in refused(lambda: read_json(tmp_path / "a\0b"))


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [" + ", ".join([f"*a{n}"] * 10) + "]\n" for n in range(30)
)
"""Ten to the 31 entries, if aliases are followed as often as they are there: whoever does that never comes back."""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "repeats some by aliases too often"),
        ("a: &a [*a]", "repeats some by aliases too often"),
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
    assert "is incomplete: below/b is missing" in refused(lambda: check_sealed(tmp_path))
    for outside in ("../x", "/etc/passwd"):
        write_json(tmp_path / "checksums.json", {"files": {outside: "0"}})
        assert "names a file outside it" in refused(lambda: check_sealed(tmp_path))


# -- writing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_what_is_written_is_for_whom_the_umask_says(umask: None, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {})
    with replacing_folder(tmp_path / "new", "a") as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "a").write_text("a")
        (temporary / "below" / "a").chmod(0o600)
    modes = {"a.json": 0o640, "new": 0o750, "new/below": 0o750, "new/below/a": 0o640}
    assert {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in modes} == modes


def test_temporary_names_cannot_be_guessed_and_links_are_not_followed(tmp_path: Path) -> None:
    names: set[str] = set()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for _ in range(5):
        with replacing(tmp_path / "out.csv") as file:
            names |= {path.name for path in tmp_path.iterdir()} - {"victim", "out.csv"}
            file.write("rows")
    assert len(names) == 5 and all(name.startswith(".out.csv.") and name.endswith(".tmp") for name in names)
    for name in names:
        (tmp_path / name).symlink_to(victim)
    with replacing(tmp_path / "out.csv") as file:
        file.write("more rows")
    assert victim.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["out.csv", "victim"]


def test_what_is_to_be_new_takes_nobody_s_place(tmp_path: Path) -> None:
    write_text(tmp_path / "config.yaml", "mine", new=True)
    assert "File exists; nothing was changed" in refused(lambda: write_text(tmp_path / "config.yaml", "x", new=True))
    assert (tmp_path / "config.yaml").read_text() == "mine" and os.listdir(tmp_path) == ["config.yaml"]


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


def slowly(one: Path, other: Path) -> bool:
    """Where two folders cannot change places in one step."""
    return False


@pytest.mark.parametrize("exchange", [writing.exchange_at_once, slowly])
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_replaced(there: bool, exchange: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "exchange_at_once", exchange)
    kept = old_folder(tmp_path / "out") if there else {}
    (tmp_path / "link").symlink_to(tmp_path / "out")
    write_new(tmp_path / "link")
    assert content_of(tmp_path / "out") == {**kept, **NEW}
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "out"]


@pytest.mark.parametrize("exchange", [writing.exchange_at_once, slowly])
def test_killed_at_every_file_operation(exchange: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder or the new one is there, whole, and the next writer cleans up after the one that was killed."""
    monkeypatch.setattr(writing, "exchange_at_once", exchange)
    kept = old_folder(tmp_path / "out")
    seen, number = set(), 0
    while True:
        number += 1

        def act(number: int = number) -> None:
            at_file_operation(number, signalling(signal.SIGKILL))()
            write_new(tmp_path / "out")

        code = in_fork(act)
        if exchange is slowly:
            clean(tmp_path)  # the run folder's own call: what was taken out of the way comes back
        state = content_of(tmp_path / "out")
        assert state in (kept, {**kept, **NEW})
        seen.add(state == kept)
        clean(tmp_path)
        assert os.listdir(tmp_path) == ["out"], "nothing stays of what was killed"
        if code == 0:
            break
        assert code == -signal.SIGKILL
        for name, text in kept.items():
            (tmp_path / "out" / name).write_text(text)
        (tmp_path / "out" / "c.txt").unlink(missing_ok=True)
    assert number > 10 and seen == {True, False}


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "out", "a") as temporary, replacing(tmp_path / "rows.csv"):
        assert in_fork(lambda: clean(tmp_path)) == 0
        assert temporary.is_dir() and len(os.listdir(tmp_path)) == 2
        (temporary / "a").write_text("a")
    assert sorted(os.listdir(tmp_path)) == ["out", "rows.csv"]


def test_only_what_is_called_like_something_temporary_is_cleaned(tmp_path: Path) -> None:
    names = [".x.tmp", ".hidden", "a.abcdefgh.tmp", ".out.abcdefg.tmp"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".out.abcdefgh.tmp").mkdir()
    (tmp_path / ".other.abcdefgh.tmp").touch()
    clean(tmp_path, "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, ".other.abcdefgh.tmp"])
    clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


@pytest.mark.parametrize("fails", ["mkstemp", "mkdtemp", "_sync", "_exchange"])
def test_a_full_disk_changes_nothing(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = old_folder(tmp_path / "out")
    write_json(tmp_path / "a.json", {"x": "old"})
    owner = writing if fails.startswith("_") else writing.tempfile
    monkeypatch.setattr(owner, fails, full_disk)
    for name, write in {"out": write_new, "a.json": lambda path: write_json(path, {"x": "new"})}.items():
        if fails in ("mkdtemp", "_exchange") and name == "a.json":
            continue
        if fails == "mkstemp" and name == "out":
            continue
        if fails == "_sync" and name == "a.json":  # it is in place when its folder is synced
            write(tmp_path / name)
            assert read_json(tmp_path / name)["x"] == "new"
            continue
        text = refused(lambda name=name, write=write: write(tmp_path / name))
        assert text.startswith(f"cannot write {tmp_path / name}") and "No space left on device" in text
    assert content_of(tmp_path / "out") == kept and sorted(os.listdir(tmp_path)) == ["a.json", "out"]
    if fails != "_sync":
        assert read_json(tmp_path / "a.json")["x"] == "old"


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


def bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Linux's list of mounts say that `out` is one, as a part of the same disk that is mounted there."""
    mounts = tmp_path / "mounts"
    escaped = str(tmp_path / "out").replace(" ", "\\040")
    mounts.write_text(
        f"36 35 98:0 / / rw shared:1 - ext4 /dev/sda rw\n37 36 98:0 /some {escaped} rw - ext4 /dev/sda rw\n"
    )
    monkeypatch.setattr(writing, "_MOUNTS", mounts)


def test_a_part_of_the_same_disk_that_is_mounted_is_a_mount_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "with space"
    place.mkdir()
    old_folder(place / "out")
    bound(place, monkeypatch)
    before = (place / "out").stat().st_ino
    write_new(place / "out", alone=True)
    assert content_of(place / "out") == NEW and (place / "out").stat().st_ino == before


@pytest.mark.parametrize("inside", [".", "sub", "below/deeper"])
@pytest.mark.parametrize("alone", [False, True])
def test_who_stands_in_a_folder_does_not_lose_it(
    inside: str, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cd out; lightpeft export run .` leaves the shell in a folder that is there, with the new files in it."""
    kept = old_folder(tmp_path / "out")
    (tmp_path / "out" / inside).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / "out" / inside)
    here = os.stat(".").st_ino
    write_new(Path(os.path.relpath(tmp_path / "out")), alone)
    assert os.stat(".").st_ino == here and Path.cwd() == tmp_path / "out" / inside
    stays = {"sub/deep.txt": "mine"} if inside == "sub" else {}
    assert content_of(tmp_path / "out") == ({**stays, **NEW} if alone else {**kept, **NEW})
    assert os.listdir(tmp_path) == ["out"]


def test_killed_at_every_file_operation_in_a_folder_that_stays(tmp_path: Path) -> None:
    """Old and new files are never there together, and the file that says that all are there comes last."""
    kept = old_folder(tmp_path / "out")
    seen, number = set(), 0
    while True:
        number += 1

        def act(number: int = number) -> None:
            os.chdir(tmp_path / "out")
            at_file_operation(number, signalling(signal.SIGKILL))()
            write_new(Path(), obsolete=("a.txt",))

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


def test_a_disk_that_fails_halfway_in_a_folder_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_folder(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr(Path, "replace", full_disk)
    assert "it is incomplete now; write it again" in refused(lambda: write_new(Path()))
    assert not (tmp_path / "out" / "b.txt").exists()
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for place in (tmp_path / "a", tmp_path / "a" / "below"):
        for act in (write_new, check_free, lambda place: holding(place).__enter__()):
            assert str(place) in refused(lambda place=place, act=act: act(place))
    assert "cannot write" in refused(lambda: write_json(tmp_path / "a" / "below", {}))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


# -- one process at a time ---------------------------------------------------------------------------------------


TRYING = """
import pathlib, sys
from lightpeft.errors import LightPeftError
from lightpeft.files import check_free, holding

folder = pathlib.Path(sys.argv[1])
for take in (check_free, lambda folder: holding(folder).__enter__()):
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
    in_use = f"{folder} is in use by another process (number {os.getpid()}); wait"
    with holding(folder):
        assert [line[: len(in_use)] for line in refusals_elsewhere(folder)] == [in_use, in_use]
        with holding(folder):
            check_free(folder)
        assert len(refusals_elsewhere(folder)) == 2, "held by the outer block still"
    assert not refusals_elsewhere(folder)
    assert os.listdir(folder) == [".lock"]


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    def die() -> None:
        with holding(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(die) == -signal.SIGKILL
    with holding(tmp_path):
        pass


def test_waiting_for_a_folder(tmp_path: Path) -> None:
    ready, go = FORK.Event(), FORK.Event()

    def keep() -> None:
        with holding(tmp_path):
            ready.set()
            go.wait()

    process = FORK.Process(target=keep)
    process.start()
    ready.wait()
    with pytest.raises(InUseError), holding(tmp_path):
        pass
    told = []
    with holding(tmp_path, wait=lambda: (told.append(1), go.set())):
        assert told == [1]
    process.join()


def test_a_full_disk_is_no_reason_not_to_hold(tmp_path: Path) -> None:
    def hold() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with holding(tmp_path):
            os._exit(0)

    assert in_fork(hold) == 0
