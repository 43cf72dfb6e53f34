"""Settings: types, ranges, presets, and errors that name what to write instead."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from workbench import RUNS

from lightpeft.app.tasks.entries.registry import ENTRIES
from lightpeft.app.tasks.kinds.completions import CompletionTask
from lightpeft.app.tasks.kinds.registry import KINDS
from lightpeft.config import (
    PRESETS,
    WRITTEN,
    Budget,
    DataConfig,
    LightConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    load_config,
    preset_light,
    run_config_from_dict,
)
from lightpeft.config.validation import from_dict, unknown_key
from lightpeft.errors import LightPeftError


def message(error: pytest.ExceptionInfo[LightPeftError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# Ranges


@pytest.mark.parametrize("name", ["heads", "neurons", "modules", "ranks", "blocks", "target"])
@pytest.mark.parametrize("value", [-0.1, 1.0, 1, 40.0, float("nan"), float("inf")])
def test_ratios_lie_in_zero_to_one(name: str, value: float) -> None:
    with pytest.raises(LightPeftError) as error:
        Budget(**{name: value})
    assert message(error).startswith(f"{name} is ") and "[0, 1)" in message(error)


@pytest.mark.parametrize("value", [0, 0.0, 1 / 3, 0.999])
def test_ratios_in_range(value: float) -> None:
    assert Budget(heads=value, neurons=value, modules=value, ranks=value, target=value).heads == value


@pytest.mark.parametrize(
    ("cls", "values", "says"),
    [
        (Budget, {"min_heads": -1}, "min_heads is -1; it must be at least 0"),
        (Budget, {"min_ranks": 0}, "min_ranks is 0; it must be at least 1"),
        (Budget, {"multiple_of": 0}, "multiple_of is 0"),
        (Budget, {"heads_scope": "local"}, 'heads_scope is "local"; choose one of layerwise, global'),
        (Budget, {"head_unit": "pair"}, 'head_unit is "pair"; choose one of group, balanced'),
        (Budget, {"module_blocks": 0.0}, "module_blocks is 0; it lies in (0, 1]"),
        (Budget, {"depth": 1.0}, "depth is 1; a ratio to remove lies in [0, 1)"),
        (Budget, {"module_blocks": 1.5}, "module_blocks is 1.5; it lies in (0, 1]"),
        (Budget, {"module_criterion": "mask"}, 'is "mask"; choose one of ratio, taylor, random'),
        (Budget, {"blocks": 0.5, "target": 0.5}, "blocks and target both say how much goes"),
        (LightConfig, {"length": 1}, "length is 1 steps; estimation needs at least 2"),
        (LightConfig, {"length": True}, "estimation needs at least 2"),
        (LightConfig, {"length": 1.0}, "length is 1; a fraction of the run lies in (0, 1)"),
        (LightConfig, {"length": "later"}, 'length is "later"'),
        (LightConfig, {"heads": 1.5}, "heads is 1.5"),
        (LightConfig, {"mask_learning_rate": 0.0}, "mask_learning_rate is 0; it must be positive"),
        (LightConfig, {"lambda_heads": -1.0}, "cannot be negative"),
        (LightConfig, {"lambda_neurons": float("nan")}, "lambda_neurons is nan; it must be a finite number"),
        (LightConfig, {"lambda_heads": float("inf")}, "lambda_heads is inf; it must be a finite number"),
        (LightConfig, {"least_examples": 2**70}, "below 2**63"),
        (LightConfig, {"ratio_every": 0}, "ratio_every is 0; it starts at 1"),
        (LightConfig, {"max_fraction": 1.0}, "max_fraction is 1"),
        (ModelConfig, {"dtype": "int8"}, 'dtype is "int8"; choose one of float32, bfloat16, float16, auto'),
        (ModelConfig, {"attn_implementation": "flash"}, "choose one of sdpa, eager, flash_attention_2"),
        (DataConfig, {"answer": "loud"}, 'answer is "loud"; choose one of auto, head, likelihood'),
        (DataConfig, {"max_length": 1}, "data.max_length is 1"),
        (DataConfig, {"test_fraction": 0.0}, "data.test_fraction is 0"),
        (DataConfig, {"limit_test": 0}, "data.limit_test is 0; it must be at least 1"),
        (TrainingConfig, {"epochs": 0}, "training.epochs is 0; it must be positive"),
        (TrainingConfig, {"learning_rate": float("nan")}, "training.learning_rate is nan"),
        (TrainingConfig, {"warmup": 1.0}, "training.warmup is 1"),
        (TrainingConfig, {"save_steps": 0}, "training.save_steps is 0; it must be at least 1"),
        (TrainingConfig, {"precision": "half"}, 'training.precision is "half"; choose one of float32, bf16'),
        (LightConfig, {"dropout": 1.0}, "dropout is 1.0; it lies in [0, 1)"),
        (RunConfig, {"method": "fulll"}, 'method is "fulll"; choose one of light, plain, full'),
        (LightConfig, {"learning_rate_scale": 0.0}, "learning_rate_scale is 0; it must be positive"),
        (LightConfig, {"estimation_learning_rate_scale": -1.0}, "estimation_learning_rate_scale is -1; it must be"),
        (LightConfig, {"least_steps": 1}, "least_steps is 1; estimation needs at least 2"),
        (RunConfig, {"preset": "slow"}, 'preset is "slow"'),
    ],
)
def test_values_out_of_range(cls: type, values: dict[str, Any], says: str) -> None:
    with pytest.raises(LightPeftError) as error:
        cls(**values)
    assert says in message(error)


# Presets


def test_presets() -> None:
    paper = preset_light("paper")
    assert (paper.heads, paper.neurons, paper.modules, paper.ranks) == (1 / 3, 1 / 3, 3 / 4, 1 / 2)
    assert (paper.heads_scope, paper.neurons_scope) == ("layerwise", "global")
    assert (paper.lambda_heads, paper.lambda_neurons, paper.mask_learning_rate) == (1e-4, 1e-4, 3e-4)
    assert (paper.head_criterion, paper.neuron_criterion) == ("mask", "mask")
    assert (paper.module_criterion, paper.rank_criterion, paper.multiple_of) == ("ratio", "taylor", 1)
    assert preset_light("default", heads=0.5).heads == 0.5
    assert preset_light("default").blocks == 0.6
    assert preset_light("auto") == preset_light("default", blocks="auto")
    assert preset_light("paper", "bottleneck") == preset_light("paper")
    assert preset_light("fast", "bottleneck") == preset_light("fast", learning_rate_scale=4.0)
    assert preset_light("default", "bottleneck") == preset_light("default", blocks=0.5, learning_rate_scale=4.0)
    measured = preset_light("auto", learning_rate_scale=4.0, estimation_learning_rate_scale=1.0)
    assert preset_light("auto", "bottleneck") == measured
    fields = {field.name for field in dataclasses.fields(LightConfig)}
    assert all(set(values) <= fields for values in PRESETS.values())


@pytest.mark.parametrize(
    ("given", "preset"),
    [
        ({}, "auto"),
        ({"data": {"task": "sst2"}}, "auto"),
        ({"data": {"task": "multiple-choice", "answer": "likelihood"}}, "auto"),
        ({"data": {"task": "causal-lm"}}, "writer"),
        ({"data": {"task": "web_questions"}}, "writer"),
        ({"data": {"task": "own"}, "tasks": {"own": {"kind": "chat"}}}, "writer"),
        ({"data": {"task": "own"}, "tasks": {"own": {}}}, "auto"),
        ({"data": {"task": "chat"}, "preset": "default"}, "default"),
        ({"data": {"task": "chat"}, "preset": "fast"}, "fast"),
    ],
)
def test_the_task_chooses_a_preset_where_none_is_given(given: dict[str, Any], preset: str) -> None:
    config = run_config_from_dict(given)
    assert (config.preset, config.light) == (given.get("preset"), preset_light(preset))
    assert run_config_from_dict({**given, "light": {"blocks": 0.3}}).light == preset_light(preset, blocks=0.3)


def test_who_asks_for_a_budget_to_be_found_has_the_preset_that_does_it() -> None:
    """Also where the file of a run says that nobody asked."""
    asked = run_config_from_dict({"light": {"blocks": "auto", "tolerance": "2 points"}})
    assert (asked.preset, asked.light) == ("auto", preset_light("auto", tolerance="2 points"))
    usual = run_config_from_dict({})
    again = run_config_from_dict({"preset": None, "light": dataclasses.asdict(usual.light)})
    assert again == usual
    assert again.preset is None


def test_what_is_written() -> None:
    """The list that the presets go by is that of the kinds and of the tasks that ship."""
    kinds = {name for name, kind in KINDS.items() if issubclass(kind, CompletionTask)}
    assert kinds | {name for name, entry in ENTRIES.items() if entry.kind in kinds} == WRITTEN


@pytest.mark.parametrize(
    "data", [{"data": "sst2"}, {"data": {"task": ["chat"]}}, {"tasks": ["own"]}, {"tasks": {"a": 1}}]
)
def test_sections_that_say_no_task(data: dict[str, Any]) -> None:
    with pytest.raises(LightPeftError, match=r"^(data|tasks)"):
        run_config_from_dict(data)


@pytest.mark.parametrize(
    ("given", "blocks", "target"),
    [
        ({}, "auto", None),
        ({"modules": 0.1}, "auto", None),
        ({"blocks": 0.2}, 0.2, None),
        ({"heads": 0.2}, None, None),
        ({"neurons": 0.0}, None, None),
        ({"target": 0.2}, None, 0.2),
        ({"heads": 0.2, "blocks": 0.3}, 0.3, None),
    ],
)
def test_one_way_to_say_how_much_goes_takes_the_place_of_another(
    given: dict[str, Any], blocks: float | str | None, target: float | None
) -> None:
    for light in (preset_light("auto", **given), run_config_from_dict({"light": given}).light):
        assert (light.blocks, light.target) == (blocks, target)


def test_unknown_preset() -> None:
    for make in (lambda: preset_light("slow"), lambda: run_config_from_dict({"preset": "slow"})):
        with pytest.raises(LightPeftError) as error:
            make()
        known = "paper, default, thorough, auto, uniform, fast, writer"
        assert message(error) == f'preset "slow" is unknown; choose one of {known}'


@pytest.mark.parametrize("preset", [["paper"], {"name": "paper"}, 3])
def test_a_preset_that_is_no_name(preset: Any) -> None:
    with pytest.raises(LightPeftError, match="preset .* is unknown"):
        run_config_from_dict({"preset": preset})


def test_given_values_win_over_the_preset() -> None:
    config = run_config_from_dict({"preset": "paper", "light": {"mask_learning_rate": 0.1, "heads": 0.25}})
    assert config.light == preset_light("paper", mask_learning_rate=0.1, heads=0.25)
    assert run_config_from_dict({}).light == preset_light("auto")
    assert run_config_from_dict({"peft": "bottleneck"}).light == preset_light("auto", "bottleneck")


# Plain data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"lite": {}}, "unknown key lite; did you mean light?"),
        ({"light": {"head": 0.5}}, "unknown key light.head; did you mean light.heads?"),
        ({"light": {"lenght": 5}}, "unknown key light.lenght; did you mean light.length?"),
        ({"training": {"lr": 1.0}}, "unknown key training.lr"),
        ({"model": {"zzzzzz": 1}}, "unknown key model.zzzzzz"),
        ({1: 2}, "unknown key 1; known keys: preset, method"),
        ({"light": {"heads": "half"}}, "light.heads is 'half'; it must be a number"),
        ({"light": {"heads": True}}, "light.heads is True; it must be a number"),
        ({"light": {"heads": None}}, "light.heads is None"),
        ({"light": {"min_heads": 1.5}}, "light.min_heads is 1.5; it must be a whole number"),
        (
            {"light": {"length": "later"}},
            "light.length is 'later'; it must be a whole number or a number",
        ),
        ({"light": {"head_criterion": "best"}}, "light.head_criterion is 'best'; it must be one of mask, taylor"),
        ({"model": {"low_memory": "yes"}}, "model.low_memory is 'yes'; it must be true or false"),
        ({"light": 5}, "light. must be a mapping, not 5"),
        ({"light": [1]}, "light. must be a mapping"),
        ({"model": "bert"}, "model. must be a mapping, not 'bert'"),
        ({"model": {"name": 3}}, "model.name is 3; it must be text"),
        ({"data": {"columns": "text"}}, "data.columns is 'text'; it must be a mapping"),
        ({"data": {"columns": {"text": 2}}}, "data.columns.text is 2; it must be text"),
        ({"seed": 1.0}, "seed is 1.0; it must be a whole number"),
        ({"light": {"heads": 2}}, "heads is 2; a ratio"),
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
            "light": {"tolerance": "1 point", "heads": 0, "target": 0.4},
            "training": {"epochs": 2},
        },
    )
    assert config.model.name == "m" and config.model.attn_implementation is None
    assert config.peft == {"type": "lora", "slots": ["q", "v"], "lora_alpha": 32}, "without what is so by default"
    assert config.light.tolerance == "1 point" and config.light.target == 0.4
    assert isinstance(config.light.heads, float) and isinstance(config.training.epochs, float)
    assert from_dict(LightConfig, {"length": 20}).length == 20
    assert from_dict(LightConfig, {"length": 0.2}).length == 0.2


def test_what_is_written_is_read_again() -> None:
    config = run_config_from_dict({"preset": "paper", "light": {"target": 0.3}, "peft": {"slots": ["q"]}})
    assert run_config_from_dict(dataclasses.asdict(config)) == config


def test_unknown_key_lists_what_there_is() -> None:
    assert unknown_key("xyz", ["alpha", "beta"]) == "unknown key xyz; known keys: alpha, beta"


# Files


def test_load_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: paper\nmodel:\n  name: m\nlight:\n  heads: 0.25\n")
    config = load_config(path)
    assert (config.preset, config.model.name) == ("paper", "m")
    assert config.light == preset_light("paper", heads=0.25)
    path.write_text("")
    assert load_config(path).light == preset_light("auto")
    path.write_text("light:\ntraining:\n")
    assert load_config(path) == run_config_from_dict({}), "sections left empty"


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 3e-4 as a string."""
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  learning_rate: 3e-4\nlight:\n  lambda_heads: 1e-4\n  length: 0.2\n")
    config = load_config(path)
    assert (config.training.learning_rate, config.light.lambda_heads, config.light.length) == (3e-4, 1e-4, 0.2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"light: [1", "is not YAML"),
        (b"- 1\n- 2\n", "must hold a mapping of settings, not a list"),
        (b"heads: 0.5", "unknown key heads"),
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
    assert config.preset == yaml.safe_load(path.read_text()).get("preset")
