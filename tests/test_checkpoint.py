"""Light adapters: bit-equal after loading, over a base that is never written to; damage is one clear line."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
import workbench
from adapters import from_folder, light_over, logits, saved_base
from lanes import telling
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import (
    DROPPED,
    IN_MAKE_TEST,
    LAYOUTS,
    VARIANTS,
    batch,
    make,
    refusal,
    relative_difference,
    with_lora,
)
from torch import Tensor
from transformers import BertForMaskedLM

from lightpeft import LightModel, load_light
from lightpeft.errors import LightPeftError
from lightpeft.peft_kinds.sites.config_file import read_config
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving import adapter_files
from lightpeft.saving.adapter_files import read_description
from lightpeft.saving.description import per_layer_config
from lightpeft.saving.tokens import VOCABULARY_FILE

CASES = [*LAYOUTS, *VARIANTS]
"""Of other families test_support.py saves and loads a model."""
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "lightpeft.json"]


def test_a_base_with_more_tokens(tmp_path: Path) -> None:
    """PEFT would save its embeddings, which no light adapter holds."""
    base = make("bert")
    base.resize_token_embeddings(base.config.vocab_size + 3)
    original = copy.deepcopy(base)
    light = light_over(base)
    light.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "embeddings" in name]
    assert logits(load_light(tmp_path, base=original)).equal(logits(light))


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a light adapter over it, to be copied before it is damaged."""
    home = tmp_path_factory.mktemp("home")
    base = saved_base("bert", home / "base")
    light_over(from_folder("bert", base), {"accuracy": 0.75}).save_pretrained(home / "light")
    return home


@pytest.fixture
def light(home: Path, tmp_path: Path) -> Path:
    """A copy of the light adapter of `home`."""
    return Path(shutil.copytree(home / "light", tmp_path / "light"))


# Save and load


@telling("name", CASES, IN_MAKE_TEST)
def test_bit_equal_from_folder_memory_and_recorded_name(name: str, tmp_path: Path) -> None:
    base = saved_base(name, tmp_path / "base")
    before = hashes(base)
    model = light_over(from_folder(name, base), {"accuracy": 0.5}, **DROPPED)
    expected = logits(model)
    model.save_pretrained(tmp_path / "light")
    assert sorted(os.listdir(tmp_path / "light")) == FILES
    moved = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    places: list[Any] = [None] if name not in LAYOUTS else [None, base, str(moved), from_folder(name, base)]
    for given in places:
        loaded = load_light(tmp_path / "light", given)
        assert logits(loaded).equal(expected)
        assert isinstance(loaded, LightModel) and type(loaded).__name__ == type(model).__name__
        assert loaded.light_plan == model.light_plan and loaded.light_metrics == {"accuracy": 0.5}
        assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert hashes(base) == before, "the base is never written to"


def test_into_the_working_directory(light: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell or a notebook that works in the folder sees the new files; tokens of before are gone."""
    model = load_light(light, is_trainable=True)
    (light / VOCABULARY_FILE).write_text("of an adapter that was here before")
    (light / "notes.txt").write_text("mine")
    monkeypatch.chdir(light)
    here = os.stat(".").st_ino
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1.0)
    model.save_pretrained(".")
    assert os.stat(".").st_ino == here and sorted(os.listdir(".")) == sorted([*FILES, "notes.txt"])
    assert logits(load_light(".")).equal(logits(model.eval()))


@telling("name", CASES, IN_MAKE_TEST)
def test_pickle_as_peft_models_do(name: str) -> None:
    """Other processes get models so: those of sentence-transformers' pools, and of `torch.save` of a whole model."""
    model = light_over(make(name), **DROPPED)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):  # noqa: S301 (its own bytes)
        assert type(again) is type(model) and again.light_plan == model.light_plan
        assert logits(again.eval()).equal(logits(model.eval()))


def test_light_models_of_a_kind_have_one_class() -> None:
    assert type(light_over(make("bert"))) is type(light_over(make("bert")))
    assert type(light_over(make("bert"))) is not type(light_over(make("llama-gqa")))


def test_asking_for_pickle_is_refused(light: Path, tmp_path: Path) -> None:
    with pytest.raises(LightPeftError, match="safetensors"):
        load_light(light).save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert os.listdir(tmp_path) == ["light"]


def test_training_goes_on_after_loading(light: Path) -> None:
    model = load_light(light, is_trainable=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name or "modules_to_save" in name for name in trainable)
    before = logits(model.eval())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for seed in range(3):
        model(**batch(labels=True, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model.eval())
    assert not after.equal(before)
    model.light_metrics["accuracy"] = 0.9
    model.save_pretrained(light)
    loaded = load_light(light)
    assert logits(loaded).equal(after) and loaded.light_metrics == {"accuracy": 0.9}


def test_peft_reads_the_folder_on_a_pruned_base(home: Path, light: Path) -> None:
    """Without lightpeft's loader: cut the base to the plan, then PEFT's own, with the configuration that it hides."""
    base = from_folder("bert", home / "base")
    apply_plan(base, PrunePlan.from_dict(json.loads((light / "lightpeft.json").read_text())["plan"]))
    model = PeftModel.from_pretrained(base, str(light), config=read_config(light)).eval()
    assert logits(model).equal(logits(load_light(light)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_adapter_of_a_float32_base_loads_on_bfloat16(name: str, tmp_path: Path) -> None:
    base = saved_base(name, tmp_path / "base")
    model = light_over(from_folder(name, base))
    model.save_pretrained(tmp_path / "light")
    in_memory = type(make(name)).from_pretrained(base, dtype=torch.bfloat16)
    for loaded in (load_light(tmp_path / "light", dtype="bfloat16"), load_light(tmp_path / "light", in_memory)):
        frozen = {p.dtype for n, p in loaded.named_parameters() if "lora" not in n and "modules_to_save" not in n}
        assert frozen == {torch.bfloat16}
        # bfloat16 keeps eight bits, and three layers of large random weights add up what is lost
        assert relative_difference(logits(loaded).float(), logits(model)) < 0.2


# What is written


def test_description(home: Path, light: Path) -> None:
    description = read_description(light)
    base = description["base"]
    assert (base["id"], base["model_type"]) == (str(home / "base"), "bert")
    assert (base["architecture"], base["dtype"]) == ("BertForSequenceClassification", "float32")
    assert base["fingerprint"] == description["plan"]["fingerprint"]
    assert description["schema_version"] == 2 and description["metrics"] == {"accuracy": 0.75}
    assert set(description["versions"]) == {"lightpeft", "torch", "transformers", "peft"}
    assert set(description["checksums"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert description["per_layer_config"] == per_layer_config("bert", PrunePlan.from_dict(description["plan"]))
    card = (light / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: lightpeft\n") and "| accuracy | 0.75 |" in card
    assert str(home) not in card, "a local path says nothing elsewhere"


def test_a_head_that_the_base_checkpoint_does_not_have(tmp_path: Path) -> None:
    make("bert").base_model.save_pretrained(tmp_path / "encoder")
    kind, labels = type(make("bert")), {0: "no", 1: "yes", 2: "maybe"}
    model = light_over(kind.from_pretrained(tmp_path / "encoder", id2label=labels))
    model.save_pretrained(tmp_path / "light")
    loaded = load_light(tmp_path / "light")
    assert loaded.config.id2label == labels and logits(loaded).shape == (3, 3)
    assert logits(loaded).equal(logits(model))


# Damage


@pytest.mark.parametrize("name", [name for name in FILES if name != "README.md"])
@pytest.mark.parametrize("where", [0.1, 0.5, 0.95])
def test_a_flipped_byte(name: str, where: float, light: Path) -> None:
    data = bytearray((light / name).read_bytes())
    position = int(where * len(data))
    data[position] ^= 0x01
    (light / name).write_bytes(bytes(data))
    text = refusal(lambda: load_light(light))
    assert str(light / name) in text


def test_the_model_card_may_be_edited(light: Path) -> None:
    expected = logits(load_light(light))
    (light / "README.md").write_text("my words")
    assert logits(load_light(light)).equal(expected)
    (light / "README.md").unlink()
    assert logits(load_light(light)).equal(expected)


def sealed(light: Path, edit: Callable[[dict[str, Any]], Any] = lambda description: None) -> None:
    """Edit lightpeft.json and make all checksums right again, as a careful editor would."""
    checksums = {name: hashlib.sha256((light / name).read_bytes()).hexdigest() for name in FILES[1:3]}
    workbench.edit(light / "lightpeft.json", lambda d: (edit(d), d.update(checksums=checksums)))


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["plan"]["blocks"][0].update(neurons="0-3"),
        lambda d: d["base"].update(id="other"),
        lambda d: d["metrics"].update(accuracy=1.0),
        lambda d: d.update(extra=1),
        lambda d: d.pop("versions"),
        lambda d: d["checksums"].pop("adapter_model.safetensors"),
        lambda d: d.pop("checksum"),
    ],
)
def test_an_edited_description(edit: Callable[[dict[str, Any]], Any], light: Path) -> None:
    path = light / "lightpeft.json"
    description = json.loads(path.read_text())
    edit(description)
    path.write_text(json.dumps(description))
    assert refusal(lambda: load_light(light)) == f"{path} was altered or damaged; restore the original file"


def test_a_file_that_nothing_reads(light: Path) -> None:
    """What it holds may change the answers, so that the adapter is not loaded without it."""
    (light / "more.safetensors").write_bytes(b"")
    more = {"more.safetensors": hashlib.sha256(b"").hexdigest()}
    workbench.edit(light / "lightpeft.json", lambda d: d["checksums"].update(more))
    line = refusal(lambda: load_light(light))
    assert "has more.safetensors, which this version of lightpeft cannot read" in line


def test_an_unknown_schema_version(light: Path) -> None:
    sealed(light, lambda d: d.update(schema_version=3))
    assert "schema version 3, but this lightpeft reads versions up to 2; upgrade" in refusal(lambda: load_light(light))


def rewrite_tensors(light: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = light / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    sealed(light)


def test_tensors_that_are_missing_or_too_many(light: Path) -> None:
    rewrite_tensors(light, lambda tensors: tensors.pop(next(key for key in tensors if "lora_B" in key)))
    assert "missing tensors: base_model.model.bert" in refusal(lambda: load_light(light))


def test_a_tensor_that_fits_nowhere(light: Path) -> None:
    rewrite_tensors(light, lambda tensors: tensors.update({"base_model.model.other": torch.zeros(1)}))
    assert "unexpected tensors: base_model.model.other" in refusal(lambda: load_light(light))


def test_a_tensor_of_another_shape(light: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if "lora_A" in key)
        tensors[key] = tensors[key][:, :-1].contiguous()

    rewrite_tensors(light, edit)
    assert "does not fit its base: tensors of another shape: base_model" in refusal(lambda: load_light(light))


@pytest.mark.parametrize("damage", ["tensors", "head"])
def test_what_does_not_fit_leaves_a_base_in_memory_whole(damage: str, home: Path, light: Path) -> None:
    base = from_folder("bert", home / "base")
    if damage == "tensors":
        rewrite_tensors(light, lambda tensors: tensors.pop(next(key for key in tensors if "lora_B" in key)))
    else:  # the same encoder, so the fingerprint is right, below another head
        base = BertForMaskedLM.from_pretrained(home / "base")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    refusal(lambda: load_light(light, base))
    after = base.state_dict()
    assert before.keys() == after.keys() and all(value.equal(after[key]) for key, value in before.items())


def test_folders_that_are_no_light_adapter(tmp_path: Path, home: Path) -> None:
    assert refusal(lambda: load_light(tmp_path / "none")).endswith("none does not exist; check the path")
    assert "is not a light adapter: it has no lightpeft.json" in refusal(lambda: load_light(tmp_path))
    with_lora(from_folder("bert", home / "base")).save_pretrained(tmp_path / "plain")
    assert "is not a light adapter" in refusal(lambda: load_light(tmp_path / "plain"))


# Another base


def test_a_base_with_other_weights(home: Path, light: Path, tmp_path: Path) -> None:
    other = saved_base("bert", tmp_path / "other", seed=1)
    base = from_folder("bert", other)
    before = hashes(other)
    for given in (other, base):
        text = refusal(lambda given=given: load_light(light, given))
        assert f"{light} belongs to another base" in text and "pass the original base" in text
    assert base.bert.encoder.layer[0].intermediate.dense.weight.shape == (48, 32), "not cut"
    assert hashes(other) == before


def test_a_base_that_was_pruned_or_has_peft(home: Path, light: Path) -> None:
    base = from_folder("bert", home / "base")
    load_light(light, base)
    assert "cannot be pruned again" in refusal(lambda: load_light(light, base.eval()))
    wrapped = with_lora(from_folder("bert", home / "base"))
    assert "without PEFT" in refusal(lambda: load_light(light, wrapped))


def test_a_base_that_is_not_there(light: Path, tmp_path: Path) -> None:
    text = refusal(lambda: load_light(light, tmp_path / "none"))
    assert f"base {tmp_path / 'none'} cannot be loaded" in text and "base=" in text
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in refusal(lambda: load_light(light, tmp_path / "empty"))


def test_the_recorded_base_has_moved(light: Path, home: Path) -> None:
    sealed(light, lambda d: d["base"].update(id=""))
    assert "does not name its base" in refusal(lambda: load_light(light))
    assert logits(load_light(light, home / "base")).shape == (3, 2)
    sealed(light, lambda d: d["base"].update(architecture="NoSuchModel"))
    assert "has no model class NoSuchModel" in refusal(lambda: load_light(light, home / "base"))


# Disk full


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["weights", "description", "card", "moving"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "over"])
def test_disk_full_while_saving(
    where: str, fresh: bool, light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_light(light, is_trainable=True)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1.0)
    target = tmp_path / "fresh" if fresh else light
    before = hashes(tmp_path)
    owner, name = {
        "weights": (peft.peft_model, "safe_save_file"),
        "description": (adapter_files, "write_json"),
        "card": (Path, "write_text"),
        "moving": (os, "replace"),
    }[where]
    monkeypatch.setattr(owner, name, full_disk)
    text = refusal(lambda: model.save_pretrained(target))
    monkeypatch.undo()
    assert "No space left on device" in text and "nothing was changed" in text
    assert hashes(tmp_path) == before
    load_light(light)
    model.save_pretrained(target)
    assert logits(load_light(target)).equal(logits(model.eval()))
