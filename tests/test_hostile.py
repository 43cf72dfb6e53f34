"""Folders that are made to harm: no code of theirs runs, nothing leaves for the network, nothing is written elsewhere,
and each is refused in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damage
from lanes import FULL, telling
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import refusal
from transformers import AutoModelForSequenceClassification
from workbench import Workbench, checksums, edit, lightpeft

from lightpeft import load_light, load_merged
from lightpeft.app.evaluation.reports import evaluate_model
from lightpeft.app.runs import pipeline
from lightpeft.config import ModelConfig
from lightpeft.errors import LightPeftError
from lightpeft.files import file_checksum
from lightpeft.models.loading import load_model, load_model_config
from lightpeft.models.task_heads import CLASSIFICATION
from lightpeft.models.tokenizers import load_tokenizer

MUTATIONS = 400 if FULL else 20
LABELS = ("negative", "positive")

Edit = Callable[[dict[str, Any]], Any]


# -- a place with a light adapter, a merged model, a PEFT adapter and their base, and guards around it ----------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    bench = Workbench(tmp_path_factory.mktemp("hostile"))
    pipeline.run(bench.config("run"))
    shutil.copytree(bench.folder / "run" / "adapter", bench.folder / "light")
    assert lightpeft("export", bench.folder / "light", bench.folder / "merged") == 0
    model = AutoModelForSequenceClassification.from_pretrained(bench.base, num_labels=2)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    get_peft_model(model, lora).save_pretrained(bench.folder / "peft")
    return bench


@pytest.fixture
def place(bench: Workbench, tmp_path: Path) -> Path:
    """A copy of it all, to be made hostile."""
    for name in ("base", "light", "merged", "peft"):
        shutil.copytree(bench.folder / name, tmp_path / name)
    base = str(tmp_path / "base")
    edit(tmp_path / "light" / "lightpeft.json", lambda data: data["base"].update(id=base))
    rewritten(tmp_path / "peft" / "adapter_config.json", lambda data: data.update(base_model_name_or_path=base))
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing connects, and nothing asks for an address, also where the error of that would be caught."""
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked


def touched(place: Path) -> Path:
    """What code from a hostile folder would make."""
    return place / "code-ran"


class Payload:
    """Unpickling it runs code."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(touched(self.place)),)


def rewritten(path: Path, change: Edit) -> None:
    """Change a JSON object of another library's."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def sealed(folder: Path, change: Edit = lambda data: None) -> None:
    """Change what a light adapter or merged model says of itself, and make every checksum right, as its author can."""
    name = "lightpeft.json" if (folder / "lightpeft.json").is_file() else "merged.json"
    files = [file for file in folder.iterdir() if file.is_file() and file.name not in (name, "README.md")]

    def seal(data: dict[str, Any]) -> None:
        data["checksums"] = {file.name: file_checksum(file) for file in files}
        change(data)

    edit(folder / name, seal)


def doors(place: Path, bench: Workbench, *kinds: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ways into folders of these kinds; with the kind "all", every way."""
    test = ("--data.task", "classification", "--data.test", bench.test, "--data.max_length", 32)
    config = bench.yaml("other", **{"model.name": str(place / "base")})
    thorough = "all" in kinds
    if "light" in kinds:
        yield "load_light", lambda: load_light(place / "light")
        yield "predict", lambda: lightpeft("predict", place / "light", "--example", "good1")
    if "light" in kinds and thorough:
        yield "low_memory", lambda: load_light(place / "light", low_memory=True)
        yield "trainable", lambda: load_light(place / "light", is_trainable=True)
        yield "evaluate", lambda: lightpeft("evaluate", place / "light", *test)
        yield "export", lambda: lightpeft("export", place / "light", place / "exported")
    if "merged" in kinds:
        yield "load_merged", lambda: load_merged(place / "merged")
    if "merged" in kinds and thorough:
        yield "predict merged", lambda: lightpeft("predict", place / "merged", bench.test)
        yield "evaluate merged", lambda: lightpeft("evaluate", place / "merged", *test)
    if "peft" in kinds:
        yield "evaluate peft", lambda: lightpeft("evaluate", place / "peft", *test)
    if "base" in kinds:
        yield "load_model", lambda: load_model(ModelConfig(name=str(place / "base")), CLASSIFICATION, LABELS)
    if "words" in kinds or ("base" in kinds and thorough):
        yield "run", lambda: lightpeft("run", "--config", config)


def rows_of(test: Path) -> dict[str, Any]:
    return {"data": {"task": "classification", "test": str(test), "max_length": 32}}


def refused(place: Path, bench: Workbench, *kinds: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The one line of each door; nothing ran, and nothing is written anywhere."""
    lines = {}
    found = list(doors(place, bench, *kinds))
    before = {**checksums(place), **checksums(bench.folder)}
    for name, door in found:
        capsys.readouterr()
        try:
            code, text = door(), capsys.readouterr().err.removeprefix("lightpeft: ")
        except LightPeftError as error:
            code, text = 2, f"{error}\n"
        assert code == 2, name
        assert text.count("\n") == 1 and len(text) < 1000, (name, text)
        assert not touched(place).exists(), name
        lines[name] = text
    assert {**checksums(place), **checksums(bench.folder)} == before
    return lines


# -- descriptions that ask for more than they may ----------------------------------------------------------------------

DEMANDS: dict[str, Edit] = {
    "base.config.weights_only": lambda base: base["config"].update(weights_only=False),
    "base.config.use_safetensors": lambda base: base["config"].update(use_safetensors=False),
    "base.config.attn_implementation": lambda base: base["config"].update(attn_implementation="owner/kernel"),
    "base.config.use_kernels": lambda base: base["config"].update(use_kernels=True),
    "base.config.trust_remote_code": lambda base: base["config"].update(trust_remote_code=True),
    "base.config.config": lambda base: base["config"].update(config="elsewhere"),
    "base.config.cache_dir": lambda base: base["config"].update(cache_dir="here"),
    "base.config.device_map": lambda base: base["config"].update(device_map="disk", offload_folder="here"),
    "base.config.num_hidden_layers": lambda base: base["config"].update(num_hidden_layers=10**7),
    "base.config.id2label": lambda base: base["config"].update(id2label=5),
    "base.config.pad_token_id": lambda base: base["config"].update(pad_token_id="[PAD]"),
    "base.config": lambda base: base.update(config=[]),
    "base.code": lambda base: base.update(code="import os"),
    "base.revision": lambda base: base.update(revision=5),
    "dtype": lambda base: base.update(dtype="auto"),
    "base.dtype": lambda base: base.update(dtype=5),
    "gguf_file": lambda base: base.update(gguf_file="../../model.gguf"),
    "by gptq": lambda base: base.update(quantization={"quant_method": "gptq"}),
    "base.quantization": lambda base: base.update(quantization=5),
    "base.architecture": lambda base: base.update(architecture=5),
    "no model class pipeline": lambda base: base.update(architecture="pipeline"),
    "no model class AutoModel": lambda base: base.update(architecture="AutoModel"),
    "no model class PreTrainedModel": lambda base: base.update(architecture="PreTrainedModel"),
    "no model class RagRetriever": lambda base: base.update(architecture="RagRetriever"),
    "no model class os": lambda base: base.update(architecture="os"),
}
"""What the line about it says -> how the base's description is changed."""


@telling(
    "what", DEMANDS, {"base.config.weights_only", "base.config.trust_remote_code", "base.code", "base.architecture"}
)
def test_a_base_is_described_and_not_configured(
    what: str, place: Path, bench: Workbench, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled_only(place, place / "base")
    for kind in ("light", "merged"):
        sealed(place / kind, lambda data: DEMANDS[what](data["base"]))
        lines = refused(place, bench, kind, capsys=capsys)
        assert all(what in line for line in lines.values()), lines


# -- weights that are programs -----------------------------------------------------------------------------------------


def pickled_only(place: Path, folder: Path, name: str = "pytorch_model.bin") -> None:
    """Put a program in the place of weights."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Payload(place)}, folder / name)


def test_the_payload_is_one(place: Path) -> None:
    pickled_only(place, place / "base")
    torch.load(place / "base" / "pytorch_model.bin", weights_only=False)
    assert touched(place).exists()


def test_pickled_weights(place: Path, bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    pickled_only(place, place / "base")
    pickled_only(place, place / "peft", "adapter_model.bin")
    pickled_only(place, place / "merged")
    sealed(place / "merged")
    lines = refused(place, bench, "all", "light", "merged", "peft", "base", capsys=capsys)
    assert all("pickled" in line and "allow_pickle" in line for line in lines.values()), lines


def test_pickled_weights_are_weights_even_where_they_are_allowed(place: Path, bench: Workbench) -> None:
    pickled_only(place, place / "base")
    assert "cannot be loaded" in refusal(lambda: load_light(place / "light", allow_pickle=True))
    model = ModelConfig(name=str(place / "base"), allow_pickle=True)
    assert "cannot be loaded" in refusal(lambda: load_model(model, CLASSIFICATION, LABELS))
    shutil.rmtree(place / "base")
    shutil.copytree(bench.base, place / "base")
    pickled_only(place, place / "peft", "adapter_model.bin")
    given = {**rows_of(bench.test), "model": {"allow_pickle": True}}
    assert "does not fit" in refusal(lambda: evaluate_model(place / "peft", given))
    assert not touched(place).exists()


def test_pickled_weights_are_read_where_they_are_allowed(place: Path, bench: Workbench) -> None:
    expected = load_merged(place / "merged").state_dict()
    torch.save(load_file(place / "base" / "model.safetensors"), place / "base" / "pytorch_model.bin")
    (place / "base" / "model.safetensors").unlink()
    found = load_light(place / "light", allow_pickle=True).merge_and_unload().state_dict()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    command = ("predict", place / "light", bench.test, "--output", place / "p.csv")
    assert lightpeft(*command) == 2
    assert lightpeft(*command, "--allow_pickle") == 0
    assert lightpeft("export", place / "light", place / "whole", "--allow_pickle") == 0


# -- code that comes with a model --------------------------------------------------------------------------------------

MODULE = """
import os
os.mkdir({marker!r})
import transformers
class BertConfig(transformers.BertConfig): pass
class BertForSequenceClassification(transformers.BertForSequenceClassification): config_class = BertConfig
class Words(transformers.PreTrainedTokenizerFast): pass
"""
"""Code of a model's own, which leaves a trace."""
CLASSES = {"AutoConfig": "own.BertConfig", "AutoModelForSequenceClassification": "own.BertForSequenceClassification"}


def with_code(place: Path, folder: Path, **config: Any) -> None:
    """Give a model a module of its own."""
    (folder / "own.py").write_text(MODULE.format(marker=str(touched(place))), encoding="utf-8")
    rewritten(folder / "config.json", lambda data: data.update(auto_map=CLASSES, **config))
    words = {"auto_map": {"AutoTokenizer": ["own.Words", "own.Words"]}, "tokenizer_class": "Words"}
    rewritten(folder / "tokenizer_config.json", lambda data: data.update(words))


def test_code_of_a_model_that_needs_it(place: Path, bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    with_code(place, place / "base", model_type="own")
    lines = refused(place, bench, "all", "base", "peft", capsys=capsys)
    assert all("trust_remote_code" in line and "Python code" in line for line in lines.values()), lines
    refused(place, bench, "all", "light", capsys=capsys)
    with_code(place, place / "merged", model_type="own")
    sealed(place / "merged")
    for _, door in doors(place, bench, "all", "merged"):
        opened(door)
        assert not touched(place).exists()
    load_model_config(ModelConfig(name=str(place / "base"), trust_remote_code=True))
    assert touched(place).exists(), "it runs where its user says so"


def test_code_of_a_model_that_does_without(place: Path, bench: Workbench) -> None:
    """A run that was made with trust_remote_code, or says that it was, has it no longer for who opens the folder."""
    with_code(place, place / "base")
    (place / "base" / "tokenizer_config.json").write_text((bench.base / "tokenizer_config.json").read_text())
    changes = {"model.name": str(place / "base"), "model.trust_remote_code": True, "output": str(place / "run")}
    file = bench.yaml("trusting", **changes)
    assert lightpeft("run", "--config", file) == 0
    assert touched(place).exists(), "it runs where its user says so"
    touched(place).rmdir()
    assert "trust_remote_code: true" in (place / "run" / "config.yaml").read_text()
    for command in (
        ("run", "--run", place / "run"),
        ("evaluate", "--run", place / "run", "--per_class"),
        ("evaluate", place / "run"),
        ("predict", place / "run", bench.test, "--output", place / "p.csv"),
        ("export", place / "run", place / "whole"),
    ):
        assert lightpeft(*command) == 0, command
        assert not touched(place).exists(), command


KERNELS: dict[str, Any] = {
    "attn_implementation": "owner/kernel",
    "_attn_implementation": "kernels-community/flash-attn",
    "text_config": {"attn_implementation": "paged|owner/kernel@main:function"},
    "experts_implementation": "owner/kernel",
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "owner/kernel:RMSNorm"},
}


def test_a_base_with_an_adapter_in_it(place: Path, bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers would put it into the model, by PEFT's rules alone."""
    for file in (place / "peft").glob("adapter_*"):
        shutil.copy(file, place / "base")
    lines = refused(place, bench, "light", "base", capsys=capsys)
    assert all("has a PEFT adapter in its folder" in line for line in lines.values()), lines


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "a module to import": ({"megatron_config": {"a": 1}, "megatron_core": "own"}, "megatron_config"),
    "another rank": ({"r": 10**6, "rank_pattern": {}}, "does not fit"),
    "copies of layers": ({"layer_replication": [[0, 10**7]]}, "layer_replication"),
    "no expression": ({"target_modules": "(("}, "does not fit"),
    "an unknown type": ({"peft_type": "XX"}, "adapter_config.json"),
    "a type of another kind": ({"peft_type": ["LORA"]}, "adapter_config.json"),
    "a file elsewhere": (
        {
            "peft_type": "MULTITASK_PROMPT_TUNING",
            "prompt_tuning_init_state_dict_path": "x.bin",
            "num_virtual_tokens": 2,
        },
        "prompt_tuning_init_state_dict_path",
    ),
    "a model elsewhere": ({"peft_type": "XLORA", "hidden_size": 32, "adapters": {"a": "owner/name"}}, "adapters"),
    "modules of another kind": ({"modules_to_save": [True]}, ""),
    "ranks as text": ({"rank_pattern": {"query": "8"}, "r": "8"}, ""),
    "negative ranks": ({"rank_pattern": {}, "r": -8}, ""),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str, place: Path, bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    changes, said = ADAPTERS[name]
    (place / "own.py").write_text(MODULE.format(marker=str(touched(place))), encoding="utf-8")
    rewritten(place / "peft" / "adapter_config.json", lambda data: data.update(changes))
    (line,) = refused(place, bench, "peft", capsys=capsys).values()
    assert said in line

    def change(data: dict[str, Any]) -> None:
        data.get("peft_config", data).update(changes)

    rewritten(place / "light" / "adapter_config.json", change)
    sealed(place / "light")
    refused(place, bench, "light", capsys=capsys)


@pytest.mark.parametrize("setting", KERNELS)
def test_kernels_by_their_name_on_the_hub(
    setting: str, place: Path, bench: Workbench, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("base", "merged"):
        rewritten(place / name / "config.json", lambda data: data.update({setting: KERNELS[setting]}))
    sealed(place / "merged")
    lines = refused(place, bench, "light", "merged", "peft", "base", capsys=capsys)
    assert all("code from the hub" in line for line in lines.values()), lines


# -- whatever else anybody writes into them ----------------------------------------------------------------------------


def opened(action: Callable[[], object]) -> str | None:
    """The one line of a refusal; None if it is none."""
    try:
        action()
    except LightPeftError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return str(error)
    return None


MODELS: dict[str, Callable[[Path], object]] = {
    "base": lambda place: load_light(place / "light"),
    "merged": lambda place: load_merged(place / "merged"),
    "peft": lambda place: evaluate_model(place / "peft", rows_of(place / "test.csv")),
    "tokenizer": lambda place: load_tokenizer(ModelConfig(name=str(place / "base"))),
}


@pytest.mark.parametrize("model", MODELS)
def test_damage_is_one_line(model: str, place: Path, bench: Workbench) -> None:
    shutil.copy(bench.test, place / "test.csv")
    folder = place / ("base" if model == "tokenizer" else model)
    shutil.copytree(folder, place / "good")
    lines = 0
    for seed in range(MUTATIONS):
        shutil.rmtree(folder)
        shutil.copytree(place / "good", folder)
        damage(folder, random.Random(seed))
        lines += opened(lambda: MODELS[model](place)) is not None
    assert lines
