"""docs/tutorials/serve.md: its commands lead from a clone to a model that answers, in one shell, word for word."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import site
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import workbench
from documents import blocks
from lanes import thorough

ROOT = Path(__file__).parents[1]
COMMANDS = blocks(ROOT / "docs" / "tutorials" / "serve.md", "")[0].splitlines()
TEXTS = "good1 word3 good2 good4\nbad1 word3 bad2 bad4"


def test_there_are_fewer_than_ten_commands() -> None:
    assert len(COMMANDS) < 10 and COMMANDS[0].startswith("git clone ") and COMMANDS[-1].startswith("curl ")


@thorough
def test_from_a_clone_to_a_served_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded: the new environment sees the packages of this one, and the cache holds a tiny model."""
    if shutil.which("curl") is None or not (ROOT / ".git").exists():
        pytest.skip("needs curl, and a repository to clone")
    monkeypatch.setattr(workbench, "POSITIONS", 128)
    cache, port = fill_cache(tmp_path / "cache"), free_port()
    packages = f"import sys; sys.path[:0] = {site.getsitepackages()}"  # in front of what venv brings along
    url = f"http://127.0.0.1:{port}"
    asked = ["curl", "--silent", "--data-binary"]
    empty = [*asked, "", "--output", "/dev/null", "--write-out", "an empty question gives %{http_code}\\n"]
    after = {
        "cd lightpeft": f"cp -r {shlex.quote(str(cache))} demo/cache",
        "python3 -m venv .venv": f"echo {shlex.quote(packages)} > $(echo .venv/lib/python3.*/site-packages)/outer.pth",
        COMMANDS[-2]: f"trap 'kill %1' EXIT; until (: < /dev/tcp/127.0.0.1/{port}) 2> /dev/null; do sleep 0.2; done",
        COMMANDS[-1]: f"{shlex.join([*asked, TEXTS, url])}\n{shlex.join([*empty, url])}",
    }
    fetch = ".venv/bin/python demo/fetch.py"  # which takes nothing but the real model for done
    assert {*after, fetch} <= set(COMMANDS)
    lines = (line for command in COMMANDS if command != fetch for line in (command, after.get(command, "")))
    script = "\n".join(["set -e", *lines]).replace("ADDRESS", shlex.quote(str(ROOT))).replace("8000", str(port))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    labels = [answer["label"] for answer in answers]
    assert labels[0] in ("negative", "positive") and all(0.5 <= answer["p"] <= 1 for answer in answers)
    assert labels[1:] == ["positive", "negative"], "it has learned which words are good"
    assert "an empty question gives 400" in done.stdout
    assert (tmp_path / "lightpeft/runs/movies/plan.json").is_file()


def environment() -> dict[str, str]:
    """For a shell in which pip takes what is here, and nothing else is of this process's own lightpeft."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "COV" not in name}
    alone = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return {**kept, **alone, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def fill_cache(folder: Path) -> Path:
    """What `demo/fetch.py` leaves, with a tiny model and rows that it can learn."""
    workbench.save_base(folder / "minilm", "bert")
    (folder / "movie_reviews").mkdir()
    for name, count in (("train", 1600), ("test", 200)):
        workbench.write_rows(folder / "movie_reviews" / f"{name}.csv", workbench.labeled(count, seed=len(name)))
    return folder


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])
