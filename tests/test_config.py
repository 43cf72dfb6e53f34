"""Settings: types, ranges, presets, and errors that name what to write instead."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from workbench import RUNS

from lightpeft.config import (
    PRESETS,
    DataConfig,
    Estimate,
    LightConfig,
    ModelConfig,
    Rates,
    Remove,
    RunConfig,
    TrainingConfig,
    load_config,
    run_config_from_dict,
)
from lightpeft.config.validation import from_dict, unknown_key
from lightpeft.errors import LightPeftError


def message(error: pytest.ExceptionInfo[LightPeftError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# Ranges


@pytest.mark.parametrize(
    ("cls", "values", "says"),
    [
        (ModelConfig, {"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, bfloat16, float16, auto"),
        (ModelConfig, {"attn_implementation": "flash"}, "it must be unset or one of sdpa, eager, flash"),
        (DataConfig, {"answer": "loud"}, "answer is 'loud'; it must be one of auto, head, likelihood"),
        (DataConfig, {"max_length": 1}, "data.max_length is 1"),
        (DataConfig, {"test_fraction": 0.0}, "data.test_fraction is 0"),
        (DataConfig, {"limit_test": 0}, "data.limit_test is 0; it must be at least 1"),
        (TrainingConfig, {"epochs": 0}, "training.epochs is 0; it must be positive"),
        (TrainingConfig, {"learning_rate": float("nan")}, "training.learning_rate is nan"),
        (TrainingConfig, {"warmup": 1.0}, "training.warmup is 1"),
        (TrainingConfig, {"save_steps": 0}, "training.save_steps is 0; it must be at least 1"),
        (TrainingConfig, {"precision": "half"}, "training.precision is 'half'; it must be one of float32, bf16"),
        (RunConfig, {"seed": "a"}, "seed is 'a'; it must be a whole number"),
        (Remove, {"blocks": [1]}, "light.remove.blocks is [1]; it must be a number or unset or auto"),
        (Remove, {"vocabulary": "x"}, "light.remove.vocabulary is 'x'; it must be one of keep, task"),
        (Rates, {"scale": "fast"}, "light.rates.scale is 'fast'; it must be a number or unset"),
        (LightConfig, {"preset": 3}, "light.preset is 3; it must be unset or one of fast, accurate, paper"),
        (RunConfig, {"method": "fulll"}, "method is 'fulll'; it must be one of light, plain, full"),
    ],
)
def test_values_out_of_range(cls: type, values: dict[str, Any], says: str) -> None:
    with pytest.raises(LightPeftError) as error:
        cls(**values)
    assert says in message(error)


@pytest.mark.parametrize(
    "data", [{"data": "sst2"}, {"data": {"task": ["chat"]}}, {"tasks": ["own"]}, {"tasks": {"a": 1}}]
)
def test_sections_that_say_no_task(data: dict[str, Any]) -> None:
    with pytest.raises(LightPeftError, match=r"^(data|tasks)"):
        run_config_from_dict(data)


# Plain data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"lite": {}}, "unknown key lite; did you mean light?"),
        ({"training": {"lr": 1.0}}, "unknown key training.lr"),
        ({"model": {"zzzzzz": 1}}, "unknown key model.zzzzzz"),
        ({1: 2}, "unknown key 1; known keys: method, peft"),
        ({"training": {"warmup": "half"}}, "training.warmup is 'half'; it must be a number"),
        ({"training": {"warmup": True}}, "training.warmup is True; it must be a number"),
        ({"training": {"warmup": None}}, "training.warmup is None"),
        ({"light": {"remove": {"multiple_of": 1.5}}}, "light.remove.multiple_of is 1.5; it must be a whole number"),
        ({"model": {"low_memory": "yes"}}, "model.low_memory is 'yes'; it must be true or false"),
        ({"model": "bert"}, "model must be a mapping, not 'bert'"),
        ({"model": {"name": 3}}, "model.name is 3; it must be text"),
        ({"data": {"columns": "text"}}, "data.columns is 'text'; it must be a mapping"),
        ({"data": {"columns": {"text": 2}}}, "data.columns.text is 2; it must be text"),
        ({"seed": 1.0}, "seed is 1.0; it must be a whole number"),
    ],
)
def test_bad_plain_data(data: dict[Any, Any], says: str) -> None:
    with pytest.raises(LightPeftError) as error:
        run_config_from_dict(data)
    assert says in message(error)


def test_nested_plain_data() -> None:
    config = from_dict(
        RunConfig,
        {
            "model": {"name": "m", "attn_implementation": None},
            "peft": {"slots": ["q", "v"], "lora_alpha": 32, "r": 8},
            "light": {"remove": {"tolerance": "1 point", "heads": 0}},
            "training": {"epochs": 2},
        },
    )
    assert config.model.name == "m" and config.model.attn_implementation is None
    assert config.peft == {"type": "lora", "slots": ["q", "v"], "lora_alpha": 32}, "without what is so by default"
    assert config.light.remove.tolerance == "1 point"
    assert isinstance(config.light.remove.heads, float) and isinstance(config.training.epochs, float)
    assert from_dict(Estimate, {"length": 20}).length == 20
    assert from_dict(Estimate, {"length": 0.2}).length == 0.2


def test_what_is_written_is_read_again() -> None:
    config = run_config_from_dict({"light": "paper", "peft": {"slots": ["q"]}})
    assert run_config_from_dict(dataclasses.asdict(config)) == config


def test_unknown_key_lists_what_there_is() -> None:
    assert unknown_key("xyz", ["alpha", "beta"]) == "unknown key xyz; known keys: alpha, beta"


# Files


def test_load_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  name: m\ntraining:\n  epochs: 2\n")
    config = load_config(path)
    assert (config.model.name, config.training.epochs) == ("m", 2)
    path.write_text("")
    assert load_config(path) == RunConfig()
    path.write_text("light:\ntraining:\n")
    assert load_config(path) == run_config_from_dict({}), "sections left empty"


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 3e-4 and 2.5e1 as strings."""
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  learning_rate: 3e-4\n  epochs: 2.5e1\n")
    training = load_config(path).training
    assert (training.learning_rate, training.epochs) == (3e-4, 25.0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"light: [1", "is not YAML"),
        (b"- 1\n- 2\n", "must hold a mapping of settings, not a list"),
        (b"heads: 0.5", "unknown key heads"),
        (b"seed: 1\ntraining: {epochs: 1, batch_size: 2,\n  epochs: 2}", ", line 3: epochs is set twice; keep one"),
        (b"? [a, b]\n: 1\n? [a, b]\n: 2\n", "is not YAML"),
        (b"\xff\xfe\x00light", "is not UTF-8 text (byte 0)"),
        (b"a: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_bad_files(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(LightPeftError) as error:
        load_config(path)
    assert says in message(error)


def test_missing_file(tmp_path: Path) -> None:
    for path, says in {tmp_path / "none.yaml": "does not exist", tmp_path: "is not a regular file"}.items():
        with pytest.raises(LightPeftError, match=says):
            load_config(path)


@pytest.mark.parametrize("path", RUNS, ids=[path.stem for path in RUNS])
def test_shipped_configurations_are_read(path: Path) -> None:
    config = load_config(path)
    assert config.model.name and (config.data.train or config.data.path)
    assert config.light == run_config_from_dict(dataclasses.asdict(config)).light


def leaves(section: Any, prefix: str = "") -> list[str]:
    """Names of all settings below one of a run's sections."""
    found = []
    for each in dataclasses.fields(section):
        value = getattr(section, each.name)
        found += leaves(value, f"{prefix}{each.name}.") if dataclasses.is_dataclass(value) else [prefix + each.name]
    return found


def test_there_are_few_settings_and_three_presets() -> None:
    assert len(leaves(RunConfig())) <= 70
    assert PRESETS == ("fast", "accurate", "paper")
