"""Merged light models: whole, without a base, loaded in one call; what cannot be one is refused in one line."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from adapters import CLOSE, light_over, logits
from lanes import telling
from peft_models import adapted
from safetensors.torch import load_file, save_file
from tiny import ALL, DROPPED, crossed, inputs_for, make, plan_for, refusal, relative_difference, with_lora
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from workbench import edit, read, save_base

from lightpeft import load_merged, save_merged
from lightpeft.app.cli.verbs.export import EXPORT
from lightpeft.app.exports.exporting import EXPORTS
from lightpeft.files import file_checksum
from lightpeft.models.unwrap import transformers_model
from lightpeft.prune.light_model import LightModel, as_light
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving.whole import MERGED, native_config, read_merged


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged light model, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("home") / "merged"
    save_merged(light_over(make("bert"), {"accuracy": 0.75}), folder)
    return folder


@pytest.fixture
def merged(home: Path, tmp_path: Path) -> Path:
    """A copy of `home`."""
    return Path(shutil.copytree(home, tmp_path / "merged"))


def test_the_command_line_knows_every_form() -> None:
    (form,) = (option for option in EXPORT.options if option.name == "--form")
    assert get_args(form.type) == tuple(EXPORTS)


# Save and load


@crossed(ALL, {"usual": {}, "dropped": DROPPED})
def test_the_same_answers_without_a_base(name: str, budget: dict[str, Any], tmp_path: Path) -> None:
    light = light_over(make(name), **budget)
    expected, before = logits(light), {key: value.clone() for key, value in light.state_dict().items()}
    save_merged(light, tmp_path)
    assert all(before[key].equal(value) for key, value in light.state_dict().items()), "the light model stays as it is"
    loaded = load_merged(tmp_path)
    assert isinstance(loaded, PreTrainedModel) and type(loaded) is type(make(name)) and not loaded.training
    assert relative_difference(logits(loaded), expected) < CLOSE
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    whole = sum(parameter.numel() for parameter in make(name).parameters())
    assert sum(parameter.numel() for parameter in loaded.parameters()) == whole - light.light_plan.removed_parameters
    assert loaded.light_plan == light.light_plan


@telling("name", ["llama-gqa", "olmo2", "falcon", "gpt2", "t5", "whisper"], {"llama-gqa", "t5"})
def test_generate(name: str, tmp_path: Path) -> None:
    light = light_over(make(name), **DROPPED)
    save_merged(light, tmp_path)
    options: dict[str, Any] = {**inputs_for(light, "left", generate=True), "max_new_tokens": 6, "do_sample": False}
    assert load_merged(tmp_path).generate(**options).equal(light.generate(**options))


def test_position_biases_that_a_stack_shares_stay_one_table(tmp_path: Path) -> None:
    save_merged(light_over(make("t5"), **DROPPED), tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if "relative_attention_bias" in name]
    assert len([name for name in names if name.endswith("weight")]) == 2, "one of the encoder and one of the decoder"
    blocks = load_merged(tmp_path).encoder.block
    attentions = [block.layer[0].SelfAttention for block in blocks[1:]]
    assert len({id(attention.relative_attention_bias.table) for attention in attentions}) == 1


def light_over_files(folder: Path, **budget: Any) -> LightModel:
    """A light model over a base in a folder, with a tokenizer beside it."""
    model = AutoModelForSequenceClassification.from_pretrained(save_base(folder), num_labels=2)
    plan = plan_for(peft := with_lora(model), **budget)
    apply_plan(peft, plan)
    return as_light(peft.eval(), plan)


def test_the_tokenizer_of_the_base_is_written_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    light = light_over_files(tmp_path / "base")
    save_merged(light, tmp_path / "merged")
    of_base, written = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "merged"))
    assert written("word1 good2").input_ids == of_base("word1 good2").input_ids and written.pad_token == "[PAD]"
    mine = AutoTokenizer.from_pretrained(tmp_path / "base", model_max_length=7)
    save_merged(light, tmp_path / "merged", mine, overwrite=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").model_max_length == 7, "the one that is given"
    assert not said(caplog)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("lightpeft")]


@pytest.mark.parametrize("lacking", ["tokenizer", "base", "name"])
def test_where_there_is_no_tokenizer_a_line_says_so(
    lacking: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    light = light_over_files(tmp_path / "base")
    if lacking == "tokenizer":
        for file in (tmp_path / "base").glob("tokenizer*"):
            file.unlink()
    elif lacking == "base":
        shutil.rmtree(tmp_path / "base")
    else:
        transformers_model(light).config.name_or_path = ""
    save_merged(light, tmp_path / "merged")
    (line,) = said(caplog)
    assert line.startswith(f"no tokenizer is saved in {tmp_path / 'merged'}: ") and "\n" not in line
    assert not list((tmp_path / "merged").glob("tokenizer*"))
    load_merged(tmp_path / "merged")


def test_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light = light_over(make("llama-gqa"), **DROPPED)
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda self, to: save(self, to, max_shard_size="20KB"))
    save_merged(light, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert relative_difference(logits(load_merged(tmp_path)), logits(light)) < CLOSE


@pytest.mark.parametrize("first", ["20KB", "1GB"])
def test_files_of_a_model_that_was_saved_there_before_go(first: str, merged: Path) -> None:
    """In one file over several and the other way round: transformers would read the old one."""
    model = load_merged(merged)
    (merged / "notes.txt").write_text("mine")
    for size in (first, "1GB" if first == "20KB" else "20KB"):
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        model.save_pretrained(merged, max_shard_size=size)
        assert (merged / "model.safetensors").exists() == (size == "1GB") != bool(list(merged.glob("model-*")))
        assert logits(load_merged(merged)).equal(logits(model)) and (merged / "notes.txt").exists()


EVEN: dict[str, Any] = {"heads": 0.5, "neurons": 0.5, "scope": "layerwise"}
"""Half of the heads and of the neurons of every layer."""
NARROW: dict[str, Any] = {**EVEN, "heads": 0.0}
SHALLOW: dict[str, Any] = {"heads": 0.0, "neurons": 0.0, "depth": 1 / 3}


HEADS_IN_CONFIG = ("llama-gqa", "llama-head-dim", "llama-tied", "mistral", "qwen3", "gemma2", "phi3")
WIDTH_IN_CONFIG = ("bert", "mpnet", "distilbert", "modernbert", "vit", "gpt2", "gpt_neox", "opt", "olmo2")
NOT_IN_CONFIG = ("bert", "mpnet", "gpt2", "gpt_neox", "falcon", "olmo2", "t5")


@pytest.mark.parametrize(
    ("name", "budget", "native"),
    [
        *((name, EVEN, True) for name in HEADS_IN_CONFIG),
        *((name, NARROW, True) for name in WIDTH_IN_CONFIG),
        *((name, EVEN, False) for name in NOT_IN_CONFIG),
        ("llama-gqa", {}, False),
        *(("llama-mha", {**EVEN, "heads": part}, part == 0.5) for part in (0.5, 0.25)),  # no config of 3 heads in 32
    ],
)
def test_layers_of_equal_width_are_a_checkpoint_like_any_other(
    name: str, budget: dict[str, Any], native: bool, tmp_path: Path
) -> None:
    light = light_over(make(name), **budget)
    assert save_merged(light, tmp_path) == native
    assert relative_difference(logits(load_merged(tmp_path)), logits(light)) < CLOSE
    if native:
        (tmp_path / MERGED).unlink()
        loaded = type(make(name)).from_pretrained(tmp_path)
        assert relative_difference(logits(loaded), logits(light)) < CLOSE


def test_no_config_says_which_entries_of_an_argument_are_those_of_the_kept_heads() -> None:
    """However well the shapes fit."""
    light = light_over(make("llama-gqa"), **EVEN)
    whole, plan = light.merge_and_unload(), light.light_plan
    assert native_config(whole, plan) is not None
    specs = tuple(replace(spec, per_head_arguments={"position_bias": 1}) for spec in plan.specs)
    assert native_config(whole, replace(plan, specs=specs)) is None


# The model that merging gives


@pytest.mark.parametrize(
    ("name", "budget"), [*((name, EVEN) for name in HEADS_IN_CONFIG[:2]), ("bert", NARROW), ("llama-gqa", SHALLOW)]
)
@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_what_its_config_can_say_is_saved_as_any_other(
    way: str, name: str, budget: dict[str, Any], tmp_path: Path
) -> None:
    light = light_over(make(name), **budget)
    whole = getattr(light, way)()
    whole.save_pretrained(tmp_path)
    assert sorted(
        path.name for path in tmp_path.iterdir() if path.suffix == ".json" and "generation" not in path.name
    ) == ["config.json"]
    assert logits(type(make(name)).from_pretrained(tmp_path)).equal(logits(whole))


@telling("name", ["bert", "llama-gqa", "t5", "gpt2"], {"bert", "t5"})
@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_what_its_config_cannot_say_is_saved_with_its_plan(way: str, name: str, tmp_path: Path) -> None:
    light = light_over(make(name), {"accuracy": 0.75}, **DROPPED)
    whole = getattr(light, way)()
    whole.save_pretrained(tmp_path / "whole")
    loaded = load_merged(tmp_path / "whole")
    assert logits(loaded).equal(logits(whole)) and loaded.light_plan == light.light_plan
    assert read_merged(tmp_path / "whole")["metrics"] == {}, "it may have been trained since they were measured"
    loaded.save_pretrained(tmp_path / "again")
    assert logits(load_merged(tmp_path / "again")).equal(logits(whole))
    copied = copy.deepcopy(loaded)
    with torch.no_grad():
        next(parameter for parameter in copied.parameters() if parameter.dim() > 1).mul_(1.1)
    copied.save_pretrained(tmp_path / "copied")
    assert logits(load_merged(tmp_path / "copied")).equal(logits(copied)), "a copy saves its own weights"
    whole.save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not (tmp_path / "rank1").exists()


def test_a_trainer_saves_checkpoints_of_it(tmp_path: Path) -> None:
    model = light_over(make("bert"), **DROPPED).merge_and_unload().train()
    rows = [{"input_ids": [4, 5, 6 + i], "labels": i % 2} for i in range(8)]
    settings: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows).train()
    assert logits(load_merged(tmp_path / "checkpoint-2")).equal(logits(model.eval()))
    assert not logits(load_merged(tmp_path / "checkpoint-1")).equal(logits(model))


# What is written


def test_what_is_in_the_folder(merged: Path) -> None:
    assert sorted(path.name for path in merged.iterdir()) == ["README.md", "config.json", MERGED, "model.safetensors"]
    description = read_merged(merged)
    assert description["metrics"] == {"accuracy": 0.75} and description["base"]["model_type"] == "bert"
    card = (merged / "README.md").read_text()
    assert "# Pruned model" in card and 'load_merged("this folder")' in card and "| accuracy | 0.75 |" in card
    assert set(description["checksums"]) == {"config.json", "model.safetensors"}, "people edit the card"


# Refusals


def test_overwriting_leaves_nothing_of_what_was_there(merged: Path, tmp_path: Path) -> None:
    (merged / "model-00001-of-00002.safetensors").write_text("old")
    light = light_over(make("bert"))
    assert "or overwrite what is there" in refusal(lambda: save_merged(light, merged))
    save_merged(light, merged, overwrite=True)
    assert sorted(path.name for path in merged.iterdir()) == ["README.md", "config.json", MERGED, "model.safetensors"]
    assert logits(load_merged(merged)).shape == logits(light).shape
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "give a new folder" in refusal(lambda: save_merged(light, tmp_path / "mine", overwrite=True))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_bottleneck_adapters(tmp_path: Path) -> None:
    model = adapted(make("bert"))
    plan = plan_for(model)
    apply_plan(model, plan)
    assert "cannot be merged" in refusal(lambda: save_merged(as_light(model, plan), tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_biases_of_lora_on_layers_without_one(tmp_path: Path) -> None:
    model = with_lora(make("llama-gqa"), lora_bias=True)
    plan = plan_for(model)
    apply_plan(model, plan)
    said = refusal(lambda: save_merged(as_light(model, plan), tmp_path / "out"))
    assert "cannot be merged; keep the light adapter" in said
    assert not list(tmp_path.iterdir())


def test_a_quantized_base(tmp_path: Path) -> None:
    light = light_over(make("bert"))
    light.config.quantization_config = SimpleNamespace()
    assert "keep the light adapter" in refusal(lambda: save_merged(light, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_what_is_no_merged_model(tmp_path: Path) -> None:
    assert "is not a merged light model" in refusal(lambda: load_merged(tmp_path))
    light_over(make("bert")).save_pretrained(tmp_path)
    assert "is not a merged light model" in refusal(lambda: load_merged(tmp_path))


def altered(merged: Path, change: Any) -> str:
    """The refusal of a folder whose weights `change` has altered."""
    tensors: dict[str, Tensor] = load_file(merged / "model.safetensors")
    change(tensors)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    assert "model.safetensors was altered or damaged" in refusal(lambda: load_merged(merged))
    edit(
        merged / MERGED,
        lambda d: d["checksums"].update({"model.safetensors": file_checksum(merged / "model.safetensors")}),
    )
    return refusal(lambda: load_merged(merged))


@pytest.mark.parametrize("change", [lambda t: t.pop("classifier.weight"), lambda t: t.update(stray=torch.zeros(1))])
def test_weights_that_are_missing_or_too_many(change: Any, merged: Path) -> None:
    assert "do not fit its plan" in altered(merged, change)


def test_a_plan_of_another_model(merged: Path, tmp_path: Path) -> None:
    save_merged(light_over(make("bert", num_hidden_layers=2)), tmp_path / "other")
    own = read(merged / MERGED)["checksums"]
    shutil.copy(tmp_path / "other" / MERGED, merged)
    assert "was altered or damaged" in refusal(lambda: load_merged(merged))
    edit(merged / MERGED, lambda d: d.update(checksums=own))
    assert "the plan is for another model" in refusal(lambda: load_merged(merged))
