"""PEFT kinds of runs: by name or by PEFT's own settings, from YAML and the shell, from data to predictions."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from lanes import needs, needs_family, needs_other_types, thorough
from lights import light_of, preset
from peft import IA3Config, LoraConfig, get_peft_model
from tiny import make
from workbench import Workbench, lightpeft, read

from lightpeft import load_light
from lightpeft.app.runs import pipeline
from lightpeft.config import RunConfig, load_config, run_config_from_dict
from lightpeft.models.families.family_table import block_specs
from lightpeft.peft_kinds.kinds import projections
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.recipe.wrapping import with_allowed_modules


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("kinds_llama"), "llama")


# -- whole runs --------------------------------------------------------------------------------------------------


KINDS: dict[str, Any] = {
    "dora": {"type": "lora", "use_dora": True, "r": 4, "lora_alpha": 8},
    "rslora": {"type": "lora", "r": 4, "lora_alpha": 8, "use_rslora": True, "init_lora_weights": "gaussian"},
    "ia3": "ia3",
    "adapters": {"type": "bottleneck", "size": 8},
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=() if kind in {"dora", "adapters"} else thorough) for kind in KINDS],
)
def done(request: pytest.FixtureRequest, bench: Workbench) -> Path:
    """The folder of a finished run of a kind."""
    assert lightpeft("run", "--config", bench.yaml(request.param, peft=KINDS[request.param])) == 0
    return bench.folder / request.param


def test_a_run_has_the_peft_that_was_asked_for(done: Path) -> None:
    config = load_light(done / "adapter").peft_config["default"]
    settings = KINDS[done.name]
    for name, value in settings.items() if isinstance(settings, dict) else ():
        expected = value.upper() if name == "type" else value
        assert getattr(config, "peft_type" if name == "type" else name) == expected
    report = read(done / "metrics.json")
    assert report["config"]["peft"] == settings
    assert report["parameters"]["peft"] > 0 < report["parameters"]["base_removed_ratio"]
    assert 0 < len(config.target_modules) < 12, "most modules went"


def test_another_peft_is_another_run(done: Path, bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    for other in ("lora", {"type": "lora", "lora_bias": True}):
        assert lightpeft("run", "--config", bench.yaml("other", peft=other, output=str(done))) == 2
        assert "holds a run with other settings (it differs in peft" in capsys.readouterr().err


def test_evaluate_and_predict_say_what_the_run_measured(done: Path, bench: Workbench, tmp_path: Path) -> None:
    measured = read(done / "metrics.json")["metrics"]
    assert lightpeft("evaluate", done, "--data.test", bench.test, "--json", tmp_path / "report.json") == 0
    assert read(tmp_path / "report.json")["model"]["metrics"]["loss"] == pytest.approx(measured["loss"])
    assert lightpeft("predict", done, bench.test, "--output", tmp_path / "out.csv") == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8")))
    assert sum(row["label"] == row["input_label"] for row in rows) / len(rows) == pytest.approx(measured["accuracy"])


def test_export(done: Path, bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = tmp_path / "merged"
    if done.name == "adapters":
        assert lightpeft("export", done, merged) == 2
        assert "cannot be merged" in capsys.readouterr().err and not merged.exists()
        return
    assert lightpeft("export", done, merged) == 0
    assert lightpeft("evaluate", merged, "--data.test", bench.test, "--json", tmp_path / "report.json") == 0
    measured = read(done / "metrics.json")["metrics"]["loss"]
    assert read(tmp_path / "report.json")["model"]["metrics"]["loss"] == pytest.approx(measured, rel=1e-3)


# -- where modules go --------------------------------------------------------------------------------------------


def targets(folder: Path, field: str = "target_modules") -> set[str]:
    """Last parts of the names of a plain run's modules."""
    return {name.rpartition(".")[2] for name in read(folder / "adapter" / "adapter_config.json")[field]}


def test_ia3_by_habit_and_where_somebody_says(llama: Workbench) -> None:
    short = {"method": "plain", "training.epochs": 1}
    pipeline.run(llama.config("habit", peft="ia3", **short))
    assert targets(llama.folder / "habit") == {"k_proj", "v_proj", "down_proj"}
    assert targets(llama.folder / "habit", "feedforward_modules") == {"down_proj"}
    pipeline.run(llama.config("named", peft={"type": "ia3", "target_modules": ["q_proj", "down_proj"]}, **short))
    assert targets(llama.folder / "named") == {"q_proj", "down_proj"}
    assert targets(llama.folder / "named", "feedforward_modules") == {"down_proj"}
    pipeline.run(llama.config("expression", peft={"type": "ia3", "target_modules": r".*\.(v|down)_proj"}, **short))
    assert targets(llama.folder / "expression", "feedforward_modules") == {"down_proj"}


@needs_other_types
def test_modules_stay_in_the_allowed_blocks(llama: Workbench) -> None:
    for kind in ("lora", "ia3", "bottleneck"):
        settings = {"peft": kind, "light.modules.blocks": 0.5, "light.modules.remove": 0.0}
        work = pipeline.prepare(llama.config(f"upper-{kind}", **settings))
        blocks = {site.block for site in pipeline.estimate(work).sites}
        assert blocks == {1}, kind


@needs("peft", "0.19", "older ones take no name for that of experts")
@needs_family("deepseek_v3")
def test_lora_keeps_off_names_that_peft_takes_for_experts() -> None:
    """The FFNs that are called so would get nothing, and the experts of all blocks LoRA."""
    light = light_of(module_blocks=0.5)
    for name, dense in (("deepseek_v3", {}), ("qwen3_moe", {"mlp_only_layers": [2]})):
        model = make(name, **dense)
        specs, config = block_specs(model), with_allowed_modules(LoraConfig(), model, light)
        attention = [path for path in projections(specs[1:]) if "self_attn" in path]
        assert config.target_modules == attention and "down_proj" in str(projections(specs[1:]))
        assert {site.spec.name for site in find_sites(get_peft_model(model, config), specs)} == {*attention}
        ia3 = with_allowed_modules(IA3Config(feedforward_modules=None), model, light)
        assert any(target.endswith("down_proj") for target in ia3.target_modules)


# -- bad input ---------------------------------------------------------------------------------------------------


REFUSED: list[tuple[Any, str]] = [
    ("lorra", 'peft is "lorra", which lightpeft cannot prune; did you mean lora?'),
    ("prefix_tuning", "which lightpeft cannot prune; choose one of lora, ia3, bottleneck"),
    ({"type": "vera", "r": 4}, 'peft is "vera"'),
    ({"type": 3}, "peft.type is 3; it must be text"),
    ({"use_doar": True}, "unknown key peft.use_doar; did you mean peft.use_dora?"),
    ({"type": "ia3", "r": 4}, "unknown key peft.r; known keys: peft.target_modules"),
    ({"r": "four"}, "peft.r is 'four'; it must be a whole number"),
    ({"r": 0}, "peft.r is 0; it must be at least 1"),
    ({"lora_alpha": 0}, "peft.lora_alpha is 0; it must be positive"),
    ({"lora_dropout": 1.0}, "peft.lora_dropout is 1.0; it must be in [0, 1)"),
    ({"slots": "q"}, "peft.slots is 'q'; it must be a list"),
    ({"slots": ["query"]}, "peft.slots has unknown query; choose among q, k, v"),
    ({"type": "bottleneck", "slots": ["q"]}, "peft.slots has no effect with bottleneck"),
    ({"type": "bottleneck", "size": 0}, "peft.size is 0; it must be at least 1"),
    ({"r": 10_000_000}, "peft.r is 10000000; it can be at most 65,536"),
    ({"use_dora": "maybe"}, "peft.use_dora is 'maybe'; it must be true or false"),
    ({"bias": "some"}, "peft.bias is 'some'; it must be one of none, all, lora_only"),
    ({"bias": "all"}, 'use bias="none"'),
    ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa" changes the base weights'),
    ({"init_lora_weights": "eva"}, "peft.init_lora_weights: eva needs data"),
    ({"use_dora": True, "lora_bias": True}, "peft: The argument lora_bias=True is not supported for DoRA"),
    ({"task_type": "SEQ_CLS"}, "peft.task_type is set by the run; leave it out"),
    ({"layers_to_transform": [0]}, "give peft.target_modules, too"),
    ({"use_qalora": True}, "LoRA with use_qalora cannot be pruned"),
]


@pytest.mark.parametrize(("peft", "says"), REFUSED)
def test_refused_before_anything_is_read(
    bench: Workbench, capsys: pytest.CaptureFixture[str], peft: Any, says: str
) -> None:
    file = bench.yaml("bad", **{"peft": peft, "model.name": "nowhere", "data.train": "no/rows"})
    assert lightpeft("run", "--config", file) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1


# -- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ia3", "ia3"),
        ("LoRA", "lora"),
        ({"type": "lora"}, "lora"),
        ({}, "lora"),
        ({"use_dora": True}, {"type": "lora", "use_dora": True}),
        ({"size": 4, "type": "BOTTLENECK"}, {"type": "bottleneck", "size": 4}),
        ({"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}, "lora"),
        ({"r": 16, "lora_alpha": 16}, {"type": "lora", "r": 16}),
        ({"type": "bottleneck", "size": 64, "placement": "houlsby"}, "bottleneck"),
        ({"type": "ia3", "r": 8}, {"type": "ia3", "r": 8}),
    ],
)
def test_one_form(given: Any, expected: Any) -> None:
    config = run_config_from_dict({"peft": given})
    assert config.peft == expected == RunConfig(peft=given).peft
    assert config.peft_type == (expected if isinstance(expected, str) else expected["type"])


def test_presets_of_kinds() -> None:
    for name in ("accurate", "fast"):
        for peft in ({"type": "bottleneck", "size": 4}, {"type": "Bottleneck"}):
            light = run_config_from_dict({"light": name, "peft": peft}).light
            assert light == preset(name, "bottleneck") != preset(name)
        assert preset(name, "ia3") == run_config_from_dict({"light": name, "peft": {"use_dora": True}}).light


@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        ("lora", ["--peft", "ia3"], "ia3"),
        ("ia3", ["--peft.init_ia3_weights", "false"], {"type": "ia3", "init_ia3_weights": False}),
        ({"use_dora": True}, ["--peft.r=16"], {"type": "lora", "use_dora": True, "r": 16}),
        ({"use_dora": True}, ["--peft", "lora"], {"type": "lora", "use_dora": True}),
        ({"use_dora": True}, ["--peft.type", "ia3"], "ia3"),
        ({"use_dora": True}, ["--peft.r", "2", "--peft", "bottleneck"], {"type": "bottleneck", "r": 2}),
        ("lora", ["--peft", "{type: ia3}"], "ia3"),
        ("lora", ["--peft.rank_pattern", "{query: 2}"], {"type": "lora", "rank_pattern": {"query": 2}}),
    ],
)
def test_from_the_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: Any, options: list[str], expected: Any
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"peft": file}), encoding="utf-8")
    assert lightpeft("run", "--config", path, *options, "--print_config") == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["peft"] == expected
    path.write_text(text, encoding="utf-8")
    assert load_config(path).peft == expected
