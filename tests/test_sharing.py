"""Light adapters and merged models by way of the hub: a stand-in on this machine, asked by the real client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants
from local_hub import LocalHub, local_hub
from test_checkpoint import light_over, logits
from tiny import make
from transformers import AutoModelForSequenceClassification

from lightpeft import load_light, save_merged
from lightpeft.models import hub as reaching


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub, an empty cache, and nobody who is logged in."""
    with local_hub() as found:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        reaching.answers.cache_clear()
        yield found
        reaching.answers.cache_clear()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a light adapter over it, and the same merged."""
    folder = tmp_path_factory.mktemp("home")
    make("bert").save_pretrained(folder / "base")
    light = light_over(AutoModelForSequenceClassification.from_pretrained(folder / "base"), {"accuracy": 0.75})
    light.save_pretrained(folder / "light")
    save_merged(light, folder / "merged")
    return folder


def test_a_name_is_a_folder(hub: LocalHub, home: Path) -> None:
    hub.add("me/light", home / "light")
    loaded = load_light("me/light")
    assert logits(loaded).equal(logits(load_light(home / "light")))
    assert hub.downloads() == {"lightpeft.json", "adapter_config.json", "adapter_model.safetensors"}
    asked = len(hub.asked)
    load_light("me/light")
    assert not [each for each in hub.asked[asked:] if each.startswith("GET") and "/resolve/" in each], "it is cached"
