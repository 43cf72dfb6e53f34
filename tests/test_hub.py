"""Names on the hub, without a network: one line at once; what is in the cache is used, in the revision asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants
from workbench import save_base

from lightpeft.models import hub

NOWHERE = "http://127.0.0.1:9"
"""An address where nobody answers."""


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody has asked yet, and nothing says that there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.is_reachable.cache_clear()
    yield
    hub.is_reachable.cache_clear()


class _Hub(BaseHTTPRequestHandler):
    asked: int = 0

    def do_HEAD(self) -> None:
        type(self).asked += 1
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    """A hub on this machine, which knows nothing but answers."""
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(_Hub, "asked", 0)
    yield _Hub
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_is_asked_once(answering: type[_Hub]) -> None:
    for _ in range(3):
        hub.go_offline_if_unreachable("someone/something")
    assert answering.asked == 1
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    hub.go_offline_if_unreachable("someone/something")
    assert constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


def cached(home: Path, name: str, *, seed: int = 0, tag: str = "main") -> str:
    """A model in the hub's cache; returns its commit."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = f"{seed:040x}"
    save_base(folder / "snapshots" / commit, seed=seed)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / tag).write_text(commit, encoding="utf-8")
    return commit


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached model is loaded; for others, and for data sets, one line says that there is no network.

    A light adapter names the commit of its base: the base moves on; the adapter is loaded on the one it was trained on.
    """
    older, newer = (cached(tmp_path, "someone/tiny", seed=seed, tag=tag) for seed, tag in ((1, "v1"), (2, "main")))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "bert"
    assert found["tokens"] > 0
    assert "couldn't find them in the cached files" in found["other"]
    assert "the hub cannot be reached for a data set of that name" in found["data"]
    assert all("\n" not in found[name] for name in ("other", "data"))
    assert found["seconds"] < 5  # the libraries' own retries take 23
    assert older != newer and [found[name] for name in ("saved", "loaded", "saved again")] == [older] * 3


_PROGRAM = """
import json, sys, time
from tiny import plan_for, with_lora
from lightpeft.app.cli.command import quiet
from lightpeft.config import ModelConfig
from lightpeft.errors import LightPeftError
from lightpeft.models.loading import load_model, load_model_config
from lightpeft.models.task_heads import CLASSIFICATION
from lightpeft.models.tokenizers import load_tokenizer
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving.adapter_files import read_description
from lightpeft.adapters.light_adapter import as_light, load_light
from lightpeft.app.tasks.rows.reading import read_hub

def line(load, *arguments):
    try:
        load(*arguments)
    except LightPeftError as error:
        return str(error)

def revision(folder):
    return read_description(folder)["base"]["revision"]

quiet()
started = time.monotonic()
tiny = ModelConfig(name="someone/tiny")
found = {"model": load_model_config(tiny).model_type, "tokens": len(load_tokenizer(tiny))}
found["other"] = line(load_model_config, ModelConfig(name="someone/other"))
found["data"] = line(read_hub, "someone/rows", "data.train")
found["seconds"] = time.monotonic() - started
model = with_lora(load_model(ModelConfig(name="someone/tiny", revision="v1"), CLASSIFICATION, ["a", "b"]).model)
plan = plan_for(model)
apply_plan(model, plan)
as_light(model, plan).save_pretrained(sys.argv[1])
loaded = load_light(sys.argv[1])
found |= {"saved": revision(sys.argv[1]), "loaded": loaded.get_base_model().light_revision}
loaded.save_pretrained(sys.argv[1] + "-again")
print(json.dumps({**found, "saved again": revision(sys.argv[1] + "-again")}))
"""
