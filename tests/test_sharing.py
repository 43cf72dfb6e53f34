"""Light adapters and merged models by way of the hub: a stand-in on this machine, asked by the real client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import transformers
from adapters import light_over, logits
from huggingface_hub import ModelCard, constants
from lanes import thorough
from local_hub import LocalHub, local_hub
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import DROPPED, make, refusal
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from workbench import Workbench, lightpeft, tokenizer_of_word_pieces

from lightpeft import LightModel, light_tokenizer, load_light, load_merged, push_to_hub, run, save_merged
from lightpeft.errors import LightPeftError
from lightpeft.models import hub as reaching

LIGHT_FILES = {"lightpeft.json", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub, an empty cache, and nobody who is logged in."""
    with local_hub() as found:
        addresses = {"ENDPOINT": "", "HUGGINGFACE_CO_URL_TEMPLATE": "/{repo_id}/resolve/{revision}/{filename}"}
        for name, path in addresses.items():
            monkeypatch.setattr(constants, name, found.url + path)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", found.url)  # noted when it was imported
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # has that of another test's hub
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)  # where no folder has the name of a repository
        reaching.is_reachable.cache_clear()
        yield found
        reaching.is_reachable.cache_clear()


@pytest.fixture
def owner(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """The hub, to somebody who is logged in and may write there."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


def classifier(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two light adapters over it with other plans, and one of them merged."""
    folder = tmp_path_factory.mktemp("home")
    make("bert").save_pretrained(folder / "base")
    light = light_over(classifier(folder / "base"), {"accuracy": 0.75})
    light.save_pretrained(folder / "light")
    save_merged(light, folder / "merged")
    light_over(classifier(folder / "base"), **DROPPED).save_pretrained(folder / "other")
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    get_peft_model(classifier(folder / "base"), lora).save_pretrained(folder / "plain")
    return folder


# -- from the hub ------------------------------------------------------------------------------------------------


def test_a_name_is_its_folder(hub: LocalHub, home: Path) -> None:
    shutil.copytree(home / "light", more := hub_folder("light", home))
    (more / "optimizer.pt").write_bytes(b"1")
    (more / "checkpoint-4").mkdir()
    shutil.copy(home / "light" / "adapter_model.safetensors", more / "checkpoint-4")
    hub.add("me/light", more)
    assert logits(load_light("me/light")).equal(logits(load_light(home / "light")))
    assert hub.downloads() == LIGHT_FILES, "and nothing else of the repository"
    assert not [path for path in hub.asked if "checkpoint" in path]
    before = len(hub.asked)
    load_light("me/light")
    assert not [path for path in hub.asked[before:] if path.startswith("GET") and "/resolve/" in path], "it is cached"


def hub_folder(name: str, home: Path) -> Path:
    """A place for the files of a repository."""
    return home.parent / f"{home.name}-{name}-on-hub"


def test_a_merged_model_by_its_name(hub: LocalHub, home: Path) -> None:
    hub.add("me/merged", home / "merged")
    expected = logits(load_merged(home / "merged"))
    assert logits(load_merged("me/merged")).equal(expected)
    assert logits(AutoModelForSequenceClassification.from_pretrained("me/merged")).equal(expected)


@pytest.mark.parametrize("name", ["me/light@v2", "me/light"])
def test_revisions(name: str, hub: LocalHub, home: Path) -> None:
    hub.add("me/light", home / "light")
    hub.add("me/light", home / "other", branch="v2")
    plans = [load_light(home / folder).light_plan for folder in ("light", "other")]
    assert load_light("me/light").light_plan == plans[0]
    wanted = {} if "@" in name else {"revision": "v2"}
    assert load_light(name, **wanted).light_plan == plans[1]
    commit = hub.repositories["me/light"].branches["v2"]
    assert load_light("me/light", revision=commit).light_plan == plans[1]
    assert refusal(lambda: load_light("me/light", revision="v3")) == (
        "folder me/light does not exist, and me/light on the hub has no revision v3"
    )
    assert "name different revisions" in refusal(lambda: load_light("me/light@v2", revision="main"))
    assert "is a folder" in refusal(lambda: load_light(home / "light", revision="main"))


@pytest.mark.parametrize(("form", "load"), [("light", load_light), ("merged", load_merged)])
@pytest.mark.parametrize(
    ("closed", "reason"),
    [
        ("private", "no such repository on the hub; if it is private, log in (hf auth login), or give a token"),
        ("gated", "is a gated repository; request access on its page, then log in (hf auth login), or give a token"),
    ],
)
def test_a_closed_one_needs_a_token(
    form: str, load: Any, closed: str, reason: str, hub: LocalHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, and with one of somebody who was not let in."""
    hub.add("me/model", home / form, **{closed: True})
    assert reason in refusal(lambda: load("me/model"))
    assert reason in refusal(lambda: load("me/model", token=hub.stranger))
    assert not hub.downloads()
    assert load("me/model", token=hub.token).light_plan
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert load("me/model").light_plan


def test_a_merged_model_in_a_revision(hub: LocalHub, home: Path) -> None:
    hub.add("me/merged", home / "merged", branch="v2")
    hub.add("me/merged", home / "base")
    assert load_merged("me/merged", revision="v2").light_plan == load_merged("me/merged@v2").light_plan
    assert "is not a merged light model" in refusal(lambda: load_merged("me/merged"))


@pytest.fixture
def over_closed(hub: LocalHub, home: Path, tmp_path: Path) -> LocalHub:
    """The hub with "me/light", whose base has the name of a gated repository on the hub."""
    base = classifier(home / "base")
    base.config.name_or_path = "me/base"
    light_over(base).save_pretrained(tmp_path / "light-on-hub")
    hub.add("me/light", tmp_path / "light-on-hub")
    hub.add("me/base", with_words(home, tmp_path), gated=True)
    return hub


def with_words(home: Path, folder: Path) -> Path:
    """The base, with a tokenizer."""
    place = shutil.copytree(home / "base", folder / "base-on-hub")
    tokenizer_of_word_pieces().save_pretrained(place)
    return place


def test_a_gated_base_needs_the_token_too(over_closed: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    said = "it is a gated repository; request access on its page, then log in (hf auth login), or give a token"
    for load in (load_light, light_tokenizer):
        assert said in refusal(lambda load=load: load("me/light"))  # type: ignore[misc]
    assert lightpeft("export", "me/light", "out") == 2
    line = one_line(capsys)
    assert line.startswith("lightpeft: me/light needs its base model: ") and said in line and not Path("out").exists()
    token = over_closed.token
    assert load_light("me/light", token=token).light_plan
    assert load_light("me/light", token=token, low_memory=True).light_plan
    assert light_tokenizer("me/light", token=token)("good1")["input_ids"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr, which is one line beside the client's progress, while nothing went to stdout."""
    out, errors = capsys.readouterr()
    lines = [line for line in errors.splitlines() if line and not line.startswith("Fetching")]
    assert out == "" and len(lines) == 1, out + errors
    return lines[0]


def test_what_cannot_be_had(
    hub: LocalHub, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/base", home / "base")
    hub.add("me/gated", home / "light", gated=True)
    assert refusal(lambda: load_light("me/nothing")) == (
        "folder me/nothing does not exist, and no such repository on the hub; "
        "if it is private, log in (hf auth login), or give a token"
    )
    hub.add("me/broken", home / "light", broken=True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before a hub that fails is asked again
    assert "me/broken cannot be downloaded from the hub" in refusal(lambda: load_light("me/broken"))
    assert "is a gated repository; request access" in refusal(lambda: load_light("me/gated"))
    assert "on the hub is not a light adapter: it has no lightpeft.json" in refusal(lambda: load_light("me/base"))
    assert "on the hub is not a merged light model: it has no merged.json" in refusal(lambda: load_merged("me/base"))
    assert (
        refusal(lambda: load_light(Path("me/light"))) == "light adapter folder me/light does not exist; check the path"
    )
    assert "does not exist" in refusal(lambda: load_light("./me/light"))
    for verb, *options in (("predict", "--example", "a"), ("export", "out"), ("inspect",)):
        assert lightpeft(verb, "me/nothing", *options) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and "no such repository on the hub" in errors, errors


def test_another_form_is_named(hub: LocalHub, home: Path) -> None:
    for form in ("light", "merged", "plain"):
        hub.add(f"me/{form}", home / form)
    assert refusal(lambda: load_light("me/merged")) == (
        "me/merged on the hub is a merged light model, not a light adapter; load it with load_merged"
    )
    assert refusal(lambda: load_merged("me/light")) == (
        "me/light on the hub is a light adapter, not a merged light model; load it with load_light"
    )
    for load, form in ((load_light, "light adapter"), (load_merged, "merged light model")):
        assert refusal(lambda load=load: load("me/plain@main")) == (  # type: ignore[misc]
            f"me/plain@main on the hub is a plain PEFT adapter, not a {form}; "
            "load it with peft.PeftModel.from_pretrained"
        )
    assert "adapter_model.safetensors" not in hub.downloads(), "weights are left where they are"


# -- the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A finished run, and its result in other forms."""
    bench = Workbench(tmp_path_factory.mktemp("bench"))
    run(bench.config())
    for form in ("merged", "peft"):
        assert lightpeft("export", bench.folder / "run", bench.folder / form, "--form", form) == 0
    return bench


def test_verbs_take_names(hub: LocalHub, bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {"adapter": bench.folder / "run" / "adapter", "merged": bench.folder / "merged"}
    for name, folder in folders.items():
        hub.add(f"me/{name}", folder)
        answers = []
        for model in (folder, f"me/{name}"):
            assert lightpeft("predict", model, "--example", "word1 good2") == 0
            answers.append(capsys.readouterr().out)
        assert answers[0] == answers[1] and "p_positive" in answers[0]
        assert lightpeft("inspect", f"me/{name}") == 0 and f"me/{name}" in capsys.readouterr().out
    assert lightpeft("export", "me/adapter", "exported") == 0
    assert Path("exported/merged.json").is_file()
    rows = ("--data.test", bench.test, "--data.train", bench.train)
    assert lightpeft("evaluate", "me/adapter", *rows, "--compare", "me/merged@main") == 0
    assert "me/merged@main" in capsys.readouterr().out


def test_verbs_refuse_in_one_line(
    hub: LocalHub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Repositories that are gated or missing, plain PEFT adapters and newer formats; and nothing is written."""
    newer = shutil.copytree(home / "light", tmp_path / "newer-on-hub")
    description = json.loads((newer / "lightpeft.json").read_text())
    (newer / "lightpeft.json").write_text(json.dumps({**description, "schema_version": 3, "more": 1}))
    for name, folder in {"plain": home / "plain", "newer": newer}.items():
        hub.add(f"me/{name}", folder)
    hub.add("me/gated", home / "light", gated=True)
    reasons = {
        "me/gated": "me/gated is a gated repository; request access on its page, then log in (hf auth login)",
        "me/nothing": "no such repository on the hub",
        "me/plain": "me/plain is a PEFT adapter",
        "me/newer": "has schema version 3, but this lightpeft reads versions up to 2; upgrade lightpeft",
    }
    (empty := tmp_path / "empty").mkdir()
    monkeypatch.chdir(empty)
    for name, reason in reasons.items():
        predict = ("predict", name, "--example", "a", "--output", "out.csv")
        for verb in (predict, ("export", name, "out"), ("inspect", name)):
            assert lightpeft(*verb) == 2
            assert reason in one_line(capsys), verb
    assert not list(empty.iterdir())


@thorough
def test_a_shell_s_own_settings(hub: LocalHub, home: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_TOKEN, in a process that knows nothing else of this hub; and its exit codes."""
    hub.add("me/gated", home / "light", gated=True)
    path = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": path}
    command = [sys.executable, "-m", "lightpeft", "inspect", "me/gated"]
    for token, code, said in ((hub.stranger, 2, "me/gated is a gated repository"), (hub.token, 0, "me/gated")):
        environment = {**os.environ, **settings, "HF_TOKEN": token}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert said in (done.stderr if code else done.stdout) and "Traceback" not in done.stderr


# -- to the hub --------------------------------------------------------------------------------------------------


def test_there_and_back(owner: LocalHub, home: Path) -> None:
    light = load_light(home / "light")
    where = light.push_to_hub("me/light", private=True, commit_message="first")
    commit = owner.repositories["me/light"].branches["main"]
    assert where == f"{owner.url}/me/light/commit/{commit}"
    assert owner.repositories["me/light"].private and owner.repositories["me/light"].messages[-1] == "first"
    assert set(owner.files("me/light")) == {*LIGHT_FILES, "README.md", ".gitattributes"}
    assert logits(load_light("me/light")).equal(logits(light))
    card = ModelCard(owner.files("me/light")["README.md"].decode())
    assert 'load_light("me/light")' in card.text and "this folder" not in card.text


def test_merged_models_go_with_their_card(owner: LocalHub, home: Path) -> None:
    model = load_merged(home / "merged")
    model.push_to_hub("me/merged")
    assert logits(load_merged("me/merged")).equal(logits(model))
    assert 'load_merged("me/merged")' in owner.files("me/merged")["README.md"].decode()
    merged = load_light(home / "light").merge_and_unload()
    merged.push_to_hub("me/merged")
    assert logits(load_merged("me/merged")).equal(logits(merged))


def test_weights_of_before_go(owner: LocalHub, home: Path) -> None:
    push_to_hub(home / "merged", "me/merged")
    repository = owner.repositories["me/merged"]
    kept = {"notes.txt": b"mine", "run/model.safetensors": b"mine"}
    repository.commit({"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", **kept})
    push_to_hub(home / "merged", "me/merged", commit_message="again")
    expected = {path.name for path in (home / "merged").iterdir()} | kept.keys() | {".gitattributes"}
    assert owner.files("me/merged").keys() == expected
    push_to_hub(home / "light", "me/merged")
    assert owner.files("me/merged").keys() == expected | LIGHT_FILES, "an adapter leaves what is there"


def test_what_is_not_sent(hub: LocalHub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(lambda: push_to_hub(home / "light", "me/light"))
    assert said.startswith("cannot upload me/light to the hub: ") and "log in (hf auth login)" in said
    assert "is not a light adapter or merged light model" in refusal(lambda: push_to_hub(home / "base", "me/base"))
    damaged = shutil.copytree(home / "light", tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"x")
    assert "altered or damaged" in refusal(lambda: push_to_hub(damaged, "me/light", token=hub.token))
    assert not hub.repositories
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(lambda: push_to_hub(home / "light", "me/light", token=hub.token))


# -- habits of PEFT and transformers -----------------------------------------------------------------------------


def test_peft_s_own_ways_to_load_name_load_light(home: Path) -> None:
    for kind in (LightModel, type(load_light(home / "light"))):
        with pytest.raises(LightPeftError, match="load_light"):
            kind.from_pretrained(classifier(home / "base"), str(home / "light"))
    with pytest.raises(KeyError, match="load_light"):
        PeftModel.from_pretrained(classifier(home / "base"), str(home / "light"))
