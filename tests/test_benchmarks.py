"""The benchmark scripts, end to end on tiny models: what they write, that they go on, what the peers are."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finegates
import found_budgets
import frontier
import gguf_speed
import gpu
import inference
import latency
import needs
import numpy as np
import peer_cells
import peer_methods
import peer_pruning
import peer_tables
import peers
import plots
import publishing
import pytest
import row_counts
import serving
import sft
import siblings
import sizes
import solving
import steps
import synthetic
import torch
import vllm_engine
import vllm_speed
import wnut17
import workbench
import writers
import yaml
from lanes import thorough
from matplotlib.text import Text
from tiny import make, relative_difference
from torch import Tensor
from transformers import AutoModelForCausalLM
from workbench import (
    Workbench,
    checksums,
    forked,
    in_this_process,
    lightpeft,
    read,
    save_base,
    stamps,
    tokenizer_of_bytes,
)

from lightpeft.adapters.merging import load_merged
from lightpeft.app.evaluation import statistics
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reproduce import Results, Row, load_grid, read_results, reproduce
from lightpeft.app.runs.reproduce.results import SeedSpread
from lightpeft.app.tasks.answers import Answers
from lightpeft.app.tasks.metrics import accuracy, matthews
from lightpeft.config import RunConfig, load_config, run_config_from_dict
from lightpeft.errors import LightPeftError
from lightpeft.files import read_json
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.loading import LoadedModel
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.surgery import apply_plan

ROOT = Path(__file__).parents[1]
PRUNED = ("random", "magnitude", "tp_magnitude", "tp_taylor", "slimformers")


@pytest.fixture(scope="module", autouse=True)
def forking() -> Any:
    with forked():
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def config(bench: Workbench) -> Path:
    """Eight steps, two of them estimation."""
    return bench.yaml("tiny", **{"training.epochs": 1, "light.preset": "paper"})


def compare(config: Path, out: Path, *more: object) -> int:
    words = (config, "--out", out, "--rounds", 1, "--steps", 1, "--together", 8, *more)
    return peers.main([str(word) for word in words], launch=in_this_process)


def cell_folder(out: Path, method: str, seed: int = 0) -> Path:
    """A cell of `compare`."""
    return out / "cells" / "tiny" / "classification" / method / str(seed)


METHODS = [name for name in peer_methods.PEERS if name != "light_auto"]
"""All but the one that sets rows aside to measure on, for which the tests' are too few."""


@pytest.fixture(scope="module")
def compared(config: Path) -> Path:
    """The output folder of a comparison of all methods that so few rows allow."""
    out = config.parent / "out"
    assert compare(config, out, "--methods", *METHODS, "--seeds", 0, "--curve", 2) == 0
    return out


@pytest.fixture(scope="module")
def results(compared: Path) -> dict[str, Any]:
    return read(compared / "peers.results.json")


# -- found_budgets.py --------------------------------------------------------------------------------------------------


def priced(*costs: float, tolerance: float = 1.0) -> found_budgets.Pair:
    """A pair whose budgets of 20, 40, ... % cost so many points."""
    tried = {0.2 * (place + 1): [cost, cost] for place, cost in enumerate(costs)}
    return found_budgets.Pair("m", "t", "accuracy", "points", tolerance, 0.9, tried, [])


@pytest.mark.parametrize(
    ("costs", "oracle"),
    [
        ((0.0, 0.5, 1.5, 3.0), 0.5),  # half-way between 40% and 60%
        ((-1.0, 0.0, 0.9, 1.0), 0.8),
        ((2.0, 0.0, 0.0, 0.0), 0.1),  # what comes behind a loss is luck
        ((30.0, 30.0), 0.0),
    ],
)
def test_an_oracle_stops_where_the_tolerance_is_reached(costs: tuple[float, ...], oracle: float) -> None:
    assert priced(*costs).oracle == pytest.approx(oracle)


def test_found_budgets_of_published_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it says of a pair is what the published runs say of themselves; a plot."""
    file = ROOT / "configs/movie_reviews/auto.results.json"
    assert found_budgets.main([str(file), "--out", str(tmp_path / "found.json")]) == 0
    (pair,) = read(tmp_path / "found.json")["pairs"]
    results = read_results(file)
    rows = {row.method: row for row in results.rows}
    budgets = [results.reports[f"minilm/movie_reviews/auto/{seed}"]["budget"] for seed in rows["auto"].seeds]
    assert pair["costs"]["0.6"] == [pytest.approx(-100 * each) for each in rows["60%"].difference or []]
    assert [found["cost"] for found in pair["found"]] == [
        pytest.approx(-100 * d) for d in rows["auto"].difference or []
    ]
    assert [found["blocks"] for found in pair["found"]] == [budget["blocks"] for budget in budgets]
    assert (pair["tolerance"], pair["oracle"]) == (pytest.approx(1.0), pytest.approx(0.5))
    assert "1 of 1 pairs are within their tolerance, and 3 of 3 single runs; " in capsys.readouterr().out
    assert (tmp_path / "found.png").stat().st_size > 5000
    assert found_budgets.main([str(ROOT / "configs/movie_reviews/grid.results.json")]) == 2
    assert "none of these files has results of" in capsys.readouterr().err


def test_the_documented_table_of_found_budgets_is_the_published_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever publishes other results writes the table of docs/explanation/results.md anew."""
    command = shlex.split(read(ROOT / "benchmarks" / "found_budgets.json")["command"])
    files = [str(ROOT / part) for part in command if part.endswith(".results.json")]
    assert found_budgets.main(files) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (ROOT / "docs/explanation/results.md").read_text()
    for line in shown[2:]:
        named, _, numbers = line.partition(" | ")
        assert f" | {numbers}" in page, f"{named} has other numbers in docs/explanation/results.md"


def test_costs_of_a_tolerance_in_nats_are_those_of_the_loss(tmp_path: Path) -> None:
    """Whatever the task's own metric is; a run that cuts nothing expects nothing."""
    losses = {"nothing cut": 2.0, "20%": 2.03, "auto": 2.01}
    seen = {"before": [{"blocks": 0.2, "rise": 0.1}], "probed": []}
    asked = {"tolerance": 0.05, "points_per_nat": None, "blocks": 0.1, "expected": {"left": 0.02}, **seen}
    reports = {
        f"m/t/{method}/{seed}": {"metrics": {"accuracy": 0.5, "loss": loss + seed}, "budget": asked}
        for method, loss in losses.items()
        for seed in (0, 1)
    }
    probed = [{"blocks": 0.2, "before": 0.1, "after": 0.04, "error": 0.001}]
    reports["m/t/auto/0"]["budget"] = asked | {"probed": probed}
    reports["m/t/auto/1"]["budget"] = asked | {"blocks": 0.0, "expected": None}
    rows = [Row("m", "t", method, "accuracy", [0, 1], [0.5, 0.5], None, None, {}) for method in losses]
    (pair,) = found_budgets.pairs_of(Results(rows, "nothing cut", 6, "", reports))
    assert (pair.metric, pair.unit, pair.tolerance, pair.dense) == ("loss", "nats", 0.05, 2.5)
    assert pair.costs == {0.2: [pytest.approx(0.03)] * 2}
    assert [(f.blocks, f.again, f.expected, f.cost) for f in pair.found] == [
        (0.1, 0.2, 0.02, pytest.approx(0.01)),
        (0.0, 0.0, None, pytest.approx(0.01)),
    ]
    assert pair.oracle == pytest.approx(0.2)


# -- sizes.py ----------------------------------------------------------------------------------------------------------


def of_size(model: str, parameters: float, qualities: dict[str, float], metric: str = "accuracy") -> Results:
    """One seed of each method on one task; every interval is two points to each side."""
    size = {"parameters": SeedSpread(parameters, None)}
    rows = [Row(model, "t", method, metric, [0], [value], None, None, size) for method, value in qualities.items()]
    reports = {f"{model}/t/{n}/0": {"intervals": {metric: [v - 0.02, v + 0.02]}} for n, v in qualities.items()}
    return Results(rows, "lora", len(rows), "", reports)


def test_costs_by_size_fall_on_their_line() -> None:
    points = of_size("m", 1e8, {"lora": 0.8, "20% of the blocks": 0.77, "no cut": 0.9, "60%, depth auto": 0.1})
    (cost,) = sizes.costs_of(points)
    assert (cost.unit, cost.blocks, cost.cost) == ("points", 0.2, pytest.approx(3.0)), "against lora, not no cut"
    assert cost.high - cost.cost == pytest.approx(100 * 0.02 * 2**0.5)
    nats = [
        next(sizes.costs_of(of_size("m", 1e8 * 4**k, {"no cut": math.e, "20% of the blocks": rise}, "perplexity")))
        for k, rise in enumerate((math.exp(1.4), math.exp(1.2)))
    ]
    assert [(each.unit, each.cost) for each in nats] == [("nats", pytest.approx(0.4)), ("nats", pytest.approx(0.2))]
    line = sizes.trend(nats)
    assert line is not None and line.at(1.6e9) == pytest.approx(0.1)
    assert sizes.trend(nats[:1]) is None
    better = [replace(nats[0], cost=0.1), replace(nats[1], cost=-0.1)]
    assert sizes.trend(better).at(1.6e9) == pytest.approx(-0.3), "no logarithm of a cut that is better"  # type: ignore[union-attr]


def test_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Workbench(tmp_path, "llama", "causal-lm")
    assert lightpeft("estimate", "--config", bench.yaml("tiny")) == 0
    words = ["--curves", str(tmp_path / "tiny"), "--out", str(tmp_path / "out")]
    assert sizes.main(words) == 2
    assert "has no loss curve" in capsys.readouterr().err
    assert lightpeft("plan", "--run", tmp_path / "tiny", "--curve", "--rows", "16") == 0
    assert sizes.main([str(ROOT / "configs/gsm8k/writers.results.json"), *words]) == 0
    costs = {(cost["task"], cost["blocks"]): cost for cost in read(tmp_path / "out/sizes.json")["costs"]}
    curve = {point["blocks"]: point["rise"] for point in read(tmp_path / "tiny/curve.json")["points"]}
    assert {blocks: cost["cost"] for (task, blocks), cost in costs.items() if task == sizes.CURVE} == curve
    trained = costs[sizes.TASKS["gsm8k"], 0.4]
    assert trained["cost"] == pytest.approx(0.22, abs=0.01) and trained["seeds"] == 3
    assert "| GSM8K, 640 rows, trained, nats | 40% | " in (tmp_path / "out/sizes.md").read_text()
    assert all((tmp_path / f"out/sizes.{suffix}").stat().st_size > 5000 for suffix in ("png", "svg"))
    assert read(tmp_path / "out/sizes.json")["processors"] == ["AMD EPYC"]
    assert sizes.main(["--curves", str(tmp_path / "out/sizes.json"), "--out", str(tmp_path / "again")]) == 0
    assert {each["blocks"]: each["cost"] for each in read(tmp_path / "again/sizes.json")["costs"]} == curve
    assert sizes.main(["--out", str(tmp_path / "none")]) == 2 and not (tmp_path / "none").exists()


# -- peers.py ----------------------------------------------------------------------------------------------------------


def test_every_method_has_a_result(results: dict[str, Any], compared: Path) -> None:
    assert set(results["methods"]) == set(METHODS)
    assert {f"light_{name}" for name in peer_methods.LIGHT} <= {*METHODS, "light_auto"} == set(peer_methods.PEERS)
    assert results["failures"] == {}
    for name, method in results["methods"].items():
        assert 0 <= method["quality"]["mean"] <= 1
        assert method["seconds"]["mean"] > 0
        assert method["adapter_bytes"] > 0
        assert method["speed"]["peak_memory_bytes"] > 0
        for what in ("training", "inference_1", "inference_32"):
            assert method["speed"][what]["samples_per_second"]["median"] > 0
            values = method["speed"]["values"][what]
            assert method["speed"][what]["ratio"]["median"] == pytest.approx(values["own"][0] / values["baseline"][0])
        curve = results["cells"][name][0]["curve"]
        assert [second for second, _ in curve] == sorted(second for second, _ in curve)
        assert len(curve) == 2
        assert curve[-1][1] == pytest.approx(method["quality"]["mean"])
    table = (compared / "peers.md").read_text()
    assert all(method["label"] in table for method in results["methods"].values())
    assert all((compared / f"peers.{suffix}").stat().st_size > 5000 for suffix in ("png", "svg"))


def test_differences_are_to_plain_lora_of_the_same_seed(results: dict[str, Any]) -> None:
    quality = {name: method["quality"]["mean"] for name, method in results["methods"].items()}
    for name, method in results["methods"].items():
        assert method["difference"]["mean"] == pytest.approx(quality[name] - quality["lora"])
    assert results["methods"]["lora"]["seconds_to_quality"]["of"] == 1


def test_sizes_are_those_of_the_methods(results: dict[str, Any]) -> None:
    sizes = {name: method["parameters"] for name, method in results["methods"].items()}
    goal = results["goal"]
    assert goal["removed"] > 0
    for name in ("lora", "lora_all", "lora_top", "houlsby", "full"):
        assert sizes[name]["removed"] == 0
    for name in PRUNED:  # to the nearest head and neuron
        assert sizes[name]["removed"] == pytest.approx(goal["removed"], rel=0.05)
    assert sizes["random"]["removed"] == sizes["magnitude"]["removed"] == goal["removed"]
    assert sizes["light_paper"]["removed"] == goal["removed"]
    assert sizes["depth"]["removed"] == goal["blocks"] // 2  # one of two equal layers
    # r = 4 on q and v, then on all six projections, of two layers of 32 channels and 48 neurons
    assert sizes["lora"]["trained"] == 2 * 2 * 4 * (32 + 32)
    assert sizes["lora_all"]["trained"] == 2 * 4 * (4 * (32 + 32) + 2 * (32 + 48))
    assert sizes["lora_top"]["trained"] * 2 == sizes["lora_all"]["trained"]
    assert sizes["full"]["trained"] + sizes["full"]["head"] > goal["base"] - 100
    heads = {size["head"] for size in sizes.values()}
    assert len(heads) == 1
    for size in sizes.values():
        assert size["removed_of_blocks"] == pytest.approx(size["removed"] / goal["blocks"])
        assert size["removed_of_all"] == pytest.approx(size["removed"] / goal["base"])


def test_finished_cells_are_kept_and_others_made(config: Path, compared: Path) -> None:
    done = [cell_folder(compared, name) for name in peer_methods.PEERS]
    before = [stamps(folder) for folder in done]
    assert compare(config, compared, "--seeds", 0, 1, "--methods", "random", "--curve", 2) == 0
    assert [stamps(folder) for folder in done] == before
    made = {folder.parent.name for folder in compared.glob("cells/tiny/classification/*/1")}
    assert made == {"lora", "random"}
    found = read(compared / "peers.results.json")["methods"]["random"]
    reports = [read(cell_folder(compared, "random", seed) / "metrics.json") for seed in (0, 1)]
    assert found["seeds"] == [0, 1]
    assert found["quality"]["mean"] == pytest.approx(sum(report["metrics"]["accuracy"] for report in reports) / 2)


def test_every_cell_leaves_the_report_of_a_run(results: dict[str, Any], compared: Path) -> None:
    """Also where lightpeft did not run it alone; so that a grid's table has it, and its log's checksum is published."""
    for name, method in results["methods"].items():
        report = read(cell_folder(compared, name) / "metrics.json")
        assert report["parameters"]["base_removed_ratio"] == pytest.approx(method["parameters"]["removed_of_all"])
        assert report["training"]["train"]["samples_per_second"] > 0
        assert results["logs"][f"{name}/0"] == checksums(cell_folder(compared, name))["log.jsonl"]
    assert "python benchmarks/peers.py" in results["command"] and results["command"].endswith("--seeds 0 --curve 2")


def test_a_peer_that_lightpeft_runs_is_an_ordinary_run(config: Path, compared: Path, tmp_path: Path) -> None:
    """Watching it changes nothing, and without that it is run by the command."""
    assert compare(config, tmp_path, "--seeds", 0, "--methods", "light_paper", "--rounds", 0) == 0
    for name in ("lora", "light_paper"):
        folder = cell_folder(tmp_path, name)
        assert read(folder / "metrics.json")["metrics"] == read(cell_folder(compared, name) / "metrics.json")["metrics"]


def test_results_of_what_is_there(config: Path, compared: Path, tmp_path: Path) -> None:
    """Nothing is run, and the table says how many seeds each method has."""
    out = shutil.copytree(compared, tmp_path / "out")
    before = stamps(out / "cells")
    assert compare(config, out, "--methods", "lora", "depth", "--seeds", 0, 5, "--finished-only", "--curve", 2) == 0
    assert stamps(out / "cells") == before
    table = (out / "peers.md").read_text().splitlines()
    assert table[0].startswith("| method | seeds |")
    assert any(line.startswith("| fewer layers, LoRA | 1 |") for line in table)


def test_results_of_nothing_are_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(config, tmp_path, "--finished-only") == 2
    assert "no finished cell" in capsys.readouterr().err


def test_cells_of_other_settings_are_not_taken(
    config: Path, compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        compare(config, compared, "--seeds", 0, "--methods", "lora", "--curve", 2, "--learning-rate", "lora=0.5") == 2
    )
    assert "differs in training.learning_rate" in capsys.readouterr().err


def test_failing_cell_is_reported_and_the_rest_goes_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise TypeError("not this model")

    monkeypatch.setitem(peer_methods.PEERS, "depth", replace(peer_methods.PEERS["depth"], make=fail))
    assert compare(config, tmp_path, "--seeds", 0, "--rounds", 0, "--methods", "depth", "lora_top") == 1
    assert "tiny/classification/depth/0: failed: TypeError: not this model" in capsys.readouterr().err
    results = read(tmp_path / "peers.results.json")
    assert results["failures"] == {"tiny/classification/depth/0": "TypeError: not this model"}
    assert set(results["methods"]) == {"lora", "lora_top"}
    assert not (cell_folder(tmp_path, "depth") / "metrics.json").exists()
    assert "TypeError" in (tmp_path / "peers.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", -1), "--rounds starts at 0"),
        (("--together", 1), "--together starts at 2"),
        (("--learning-rate", "lorra=1"), "names lorra"),
        (("--learning-rate", "lora=much"), "could not convert"),
    ],
)
def test_bad_options_give_one_line(
    config: Path, tmp_path: Path, options: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(config, tmp_path / "none", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_learning_rates_are_the_methods_own_unless_given(config: Path, tmp_path: Path) -> None:
    configs = configs_of(config, tmp_path, "--learning-rate", "lora=0.5")
    rates = {name: run_rate(configs[name]) for name in ("lora", "lora_all", "full", "houlsby")}
    assert rates == {"lora": 0.5, "lora_all": 3e-2, "full": 1e-4, "houlsby": 1e-3}
    assert len({each.output for each in configs.values()}) == len(peer_methods.PEERS)


def run_rate(config: RunConfig) -> float:
    """The learning rate that a run's method uses."""
    return float(config.training.learning_rate)


def configs_of(config: Path, out: Path, *more: str) -> dict[str, RunConfig]:
    """The run of every method with seed 0."""
    options = peers.options_of(peers.parser().parse_args([str(config), "--out", str(out), "--seeds", "0", *more]), "")
    return {cell.method: cell.config for cell in peers.grid_of(options).cells(out)}


def test_one_light_run_alone_takes_the_files_own_section(config: Path, tmp_path: Path) -> None:
    configs = configs_of(config, tmp_path)
    own, other = configs["light_default"], configs["light_paper"]
    assert own.light == load_config(config).light
    assert (own.light.estimate.length, other.light.estimate.length) == (0.25, 0.1)
    assert (own.data, own.training, own.model) == (other.data, other.training, other.model)
    given = configs_of(config, tmp_path, "--light-config", f"paper={config}")
    assert given["light_paper"].light == own.light
    assert given["light_default"] == own


@pytest.mark.parametrize(("quality", "seconds"), [(0.5, 1.0), (0.6, 2.0), (0.75, 2.0), (0.9, None)])
def test_time_to_a_quality_is_that_of_the_first_point_that_has_it(quality: float, seconds: float | None) -> None:
    assert peers.time_to([[1.0, 0.55], [2.0, 0.8], [3.0, 0.7]], quality) == seconds


def test_time_to_a_quality_is_of_the_seeds_that_were_watched(results: dict[str, Any]) -> None:
    cell = results["cells"]["depth"][0]
    cells = {0: cell, 1: {**cell, "curve": []}}
    assert peers.over_seeds(cells, cells)["seconds_to_quality"]["of"] == 1
    assert peers.over_seeds({1: cells[1]}, cells)["seconds_to_quality"] is None


def test_curve_does_not_count_its_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(peer_cells.time, "perf_counter", lambda: clock.now)

    def measure(model: Any) -> float:
        clock.now += 100
        return 0.5

    curve = peer_cells.Curve(measure, 2, tmp_path / "curve.json")
    state: Any = SimpleNamespace(max_steps=4, global_step=0)
    curve.on_train_begin(None, state, None)  # type: ignore[arg-type]
    for step in range(1, 5):
        clock.now, state.global_step = clock.now + 1, step
        curve.on_step_end(None, state, None, model=None)  # type: ignore[arg-type]
    clock.now += 3
    curve.on_train_end(None, state, None)  # type: ignore[arg-type]
    seen = read(tmp_path / "curve.json")
    assert seen["points"] == [[2.0, 0.5], [4.0, 0.5]]
    assert (seen["spent"], seen["lasted"]) == (200, 7)


# -- what is pruned before training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(bench: Workbench) -> tuple[pipeline.Workspace, LoadedModel, peer_pruning.Goal]:
    work = pipeline.prepare(bench.config("peer", method="plain", **{"light.remove.heads": 0.5}))
    loaded = work.dense_model()
    loaded.model.eval()
    return work, loaded, peer_pruning.goal_of(loaded, work.config.light)


def decided(
    work: pipeline.Workspace, loaded: LoadedModel, goal: peer_pruning.Goal, by: Any
) -> tuple[Tensor, PrunePlan]:
    """The logits of the model that lightpeft cuts as `by` decides, and the plan."""
    blocks = by(work, loaded.model, goal)
    model = add_peft(LoadedModel(copy.deepcopy(loaded.model), loaded.new_modules, loaded.head), work.config)
    plan = peer_pruning.apply_to_peft(model, blocks, "test")
    apply_plan(model, plan)
    return answers(model), plan


def answers(model: Any) -> Tensor:
    """Logits of two rows, one of them padded."""
    ids = torch.arange(4, 22).view(2, 9)
    real = torch.ones_like(ids)
    real[1, 5:] = 0
    return model.eval()(input_ids=ids, attention_mask=real).logits.detach()


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_torch_pruning_cuts_the_same_model(prepared: Any, criterion: str) -> None:
    work, loaded, goal = prepared
    logits, plan = decided(work, loaded, goal, partial(peer_pruning.by_torch_pruning, criterion=criterion))
    own = copy.deepcopy(loaded.model)
    pruner = peer_pruning.torch_pruned(work, own, goal, criterion)
    for spec in plan.specs:
        attention = own.get_submodule(spec.attention)
        attention.num_attention_heads = pruner.num_heads[own.get_submodule(spec.projections["q"])]
        attention.all_head_size = attention.num_attention_heads * spec.head_dim
        assert attention.num_attention_heads == spec.heads - goal.heads
    assert relative_difference(answers(own), logits) < 1e-5
    assert relative_difference(answers(loaded.model), logits) > 1e-3
    assert {len(kept.neurons) for kept in plan.blocks} == {48 - goal.neurons(plan.specs)}


def test_torch_pruning_by_different_criteria_differs(prepared: Any) -> None:
    work, loaded, goal = prepared
    by = [peer_pruning.by_torch_pruning(work, loaded.model, goal, name) for name in ("magnitude", "taylor")]
    assert by[0] != by[1]


def test_torch_pruning_cuts_heads_that_a_table_of_positions_has_entries_for(prepared: Any) -> None:
    """MPNet's attention is given a bias with an entry a head, which has to stay whole while the library looks."""
    work, loaded, _ = prepared
    mpnet = replace(loaded, model=make("mpnet", vocab_size=loaded.model.config.vocab_size))
    goal = peer_pruning.goal_of(mpnet, work.config.light)
    assert goal.heads
    _, plan = decided(work, mpnet, goal, peer_pruning.by_torch_pruning)
    assert {len(kept.heads) for kept in plan.blocks} == {4 - goal.heads}
    assert plan.removed_parameters == pytest.approx(goal.removed, rel=0.02)


def test_a_peer_of_another_size_is_not_compared(prepared: Any) -> None:
    work, loaded, goal = prepared

    def one_head(*_: Any) -> tuple[BlockPlan, ...]:
        return tuple(BlockPlan((0, 1, 2), (0, 1, 2), tuple(range(48))) for _ in block_specs(loaded.model))

    own = replace(loaded, model=copy.deepcopy(loaded.model))
    with pytest.raises(LightPeftError, match=r"one_head removes .* parameters, and .* are to go"):
        peer_methods.pruned_lora(work, own, goal, decide=one_head, by="one_head")
    assert not work.run.plan.exists()


def test_slimformers_cuts_the_same_model(prepared: Any) -> None:
    work, loaded, goal = prepared
    logits, plan = decided(work, loaded, goal, peer_pruning.by_slimformers)
    own = copy.deepcopy(loaded.model)
    peer_pruning.slimmed(work, own, goal)
    assert relative_difference(answers(own), logits) < 1e-5
    assert {len(kept.heads) for kept in plan.blocks} == {4 - goal.heads}


def test_magnitude_keeps_the_largest_norms(prepared: Any) -> None:
    _, loaded, goal = prepared
    model = copy.deepcopy(loaded.model)
    spec = block_specs(model)[0]
    with torch.no_grad():
        for slot, name in spec.projections.items():
            if slot.startswith("ffn"):
                continue
            weight = model.get_submodule(name).weight
            rows = weight if slot != "o" else weight.T
            rows[: spec.head_dim] *= 10  # the first head is large
            rows[spec.head_dim : 2 * spec.head_dim] *= 0.01
    kept = peer_pruning.by_magnitude(SimpleNamespace(config=SimpleNamespace(seed=0)), model, goal)[0]  # type: ignore[arg-type]
    assert 0 in kept.heads
    assert 1 not in kept.heads


def test_random_depends_on_the_seed_alone(prepared: Any) -> None:
    _, loaded, goal = prepared
    by_seed = [
        peer_pruning.by_random(SimpleNamespace(config=SimpleNamespace(seed=seed)), loaded.model, goal)  # type: ignore[arg-type]
        for seed in (0, 0, 1)
    ]
    assert by_seed[0] == by_seed[1] != by_seed[2]


def test_peers_go_to_processes_of_their_own(prepared: Any) -> None:
    """Also where processes are not forked, so what makes the model is pickled."""
    for peer in peer_methods.PEERS.values():
        assert len(ForkingPickler.dumps(peer.subject(prepared[2]))) > 0


def test_grouped_queries_are_refused_by_libraries_that_do_not_know_them(bench: Workbench, tmp_path: Path) -> None:
    llama = Workbench(tmp_path, "llama")
    work = pipeline.prepare(llama.config("peer", method="plain"))
    loaded = work.dense_model()
    model, goal = loaded.model, peer_pruning.goal_of(loaded, work.config.light)
    for by in (peer_pruning.by_torch_pruning, peer_pruning.by_slimformers):
        with pytest.raises(LightPeftError, match="head"):
            by(work, model, goal)
    assert goal.blocks == sum(parameter.numel() for parameter in model.model.layers.parameters())


# -- plots and tables --------------------------------------------------------------------------------------------------


def test_names_of_points_overlap_neither_each_other_nor_a_point() -> None:
    """Twelve methods of which most are close together."""
    points = []
    for index in range(12):
        x, y = (100 + index % 4, 80 + index / 8) if index < 9 else (150 + 30 * index, 84.0)
        ranges = ((x - 3, x + 3), (y - 0.6, y + 0.6))
        points.append(plots.Point(f"a method's name {index}", ("plain", "pruned", "light")[index % 3], x, y, *ranges))
    figure = plots.scatter([plots.Panel("", "x", "y", points)], "")
    axes = figure.axes[0]
    names = [text for text in axes.texts if text.get_text()]
    assert {text.get_text() for text in names} == {point.label for point in points}
    boxes = [text.get_window_extent() for text in names]
    inside = axes.get_window_extent()
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    for point in points:
        x, y = axes.transData.transform((point.x, point.y))
        assert not any(box.contains(x, y) for box in boxes)


def test_cuts_are_labeled_beside_their_points_and_nothing_covers_a_label() -> None:
    """Two lines that cross, and a point where three labels do not fit."""
    lines = {
        ("A", "one way"): [(2.0, 80.0, "90%"), (4.0, 86.0, "60%"), (8.0, 88.0, "")],
        ("A", "another"): [(2.0, 86.0, "3"), (4.2, 85.8, "4"), (4.21, 85.81, "5"), (4.22, 85.82, "6"), (8.0, 88.0, "")],
    }
    marks = [plots.Point("A", "plain", 8.0, 88.0, (8.0, 8.0), (87.0, 89.0))]
    axes = plots.frontier([plots.FrontierPanel("", "accuracy", marks, lines)], "ms").axes[0]
    shown = {text: text.get_window_extent() for text in axes.texts if text.get_text() and text.get_visible()}
    assert {"90%", "60%", "3", "A"} <= {text.get_text() for text in shown}
    for (_, box), (_, other) in itertools.combinations(shown.items(), 2):
        assert not box.overlaps(other)
    for line in lines.values():
        places = axes.transData.transform([point[:2] for point in line])
        for place in np.linspace(places[:-1], places[1:], 50).reshape(-1, 2):
            assert not any(box.contains(*place) for box in shown.values())


def test_a_plot_of_peers_says_how_much_each_of_them_removes() -> None:
    figure = peer_tables.plot(json.loads((ROOT / "benchmarks/minilm_default.peers.results.json").read_text()))
    for axes in figure.axes:
        names = {text.get_text() for text in axes.texts if text.get_text()}
        assert {"LoRA on q, v", "lightpeft fast, 40%", "lightpeft default, 60%"} <= names


def test_plots_can_be_read_on_a_phone() -> None:
    """360 pixels wide, they have letters of 10 pixels or more, and panels one below the other."""
    points = [plots.Point("a method", "light", 1.0, 2.0, (0.9, 1.1), (1.9, 2.1))]
    figure = plots.scatter([plots.Panel(title, "seconds", "accuracy", points) for title in "ab"], "title")
    first, second = (axes.get_position() for axes in figure.axes)
    assert second.y1 < first.y0 and first.x0 == pytest.approx(second.x0) and first.width > 0.7
    pixels_a_point = 360 / (72 * figure.get_figwidth())
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert min(text.get_fontsize() for text in texts) * pixels_a_point >= 10
    drawn = figure.get_window_extent()
    legend = figure.legends[0].get_texts()
    around = [each for axes in figure.axes for each in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)]
    boxes = [text.get_window_extent() for text in (*around, *legend)]
    assert all(drawn.x0 <= box.x0 and box.x1 <= drawn.x1 for box in boxes)


def readme_with(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README.md that scripts write into instead of their own."""
    readme = folder / "README.md"
    readme.write_text(text)
    monkeypatch.setattr(publishing, "README", readme)
    return readme


def place(name: str) -> str:
    """Where a table goes."""
    return f"<!-- results: {name} -->\n<!-- /results: {name} -->\n"


def test_results_go_to_their_place_in_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = "before\n<!-- results: a -->\nold\n<!-- /results: a -->\nafter\n<!-- results: b -->\n"
    readme = readme_with(before, tmp_path, monkeypatch)
    publishing.publish("a", "new", "a.json", {"a": 1})
    publishing.publish("a", "newer", "a.json", {"a": 2})
    text = readme.read_text()
    assert text == ("before\n<!-- results: a -->\n\nnewer\n\n<!-- /results: a -->\nafter\n<!-- results: b -->\n")
    for missing in ("b", "c"):
        with pytest.raises(LightPeftError, match=f"no place for these results; add .*results: {missing}"):
            publishing.publish(missing, "text", "numbers.json", {})
    assert readme.read_text() == text
    assert read(tmp_path / "a.json")["a"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "a.json"}, "nothing is half-written"


def test_readme_has_a_place_for_every_script(
    compared: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = readme_with(publishing.README.read_text() + place("peers tiny"), tmp_path, monkeypatch)
    for name in ("peers minilm_default", "steps minilm_default", "gpu"):
        publishing.publish(name, f"table of {name}", "tiny.peers.results.json", {})
        assert f"table of {name}" in readme.read_text()
    assert compare(config, compared, "--seeds", 0, "--methods", "lora", "depth", "--write-readme", "--curve", 2) == 0
    assert "![quality against time and against inference speed](tiny.peers.png)" in readme.read_text()
    assert "| fewer layers, LoRA |" in readme.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "tiny.peers.png", "tiny.peers.results.json"}
    published = read(tmp_path / "tiny.peers.results.json")
    logs = {f"{name}/0": checksums(cell_folder(compared, name))["log.jsonl"] for name in ("lora", "depth")}
    assert published["logs"] == logs
    assert published["command"].endswith("--seeds 0 --methods lora depth --write-readme --curve 2")


PUBLISHED = sorted(path for folder in ("benchmarks", "configs") for path in (ROOT / folder).rglob("*.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_results_say_how_to_make_them_again(path: Path) -> None:
    """By a command whose files are there, and with a checksum of the log of every run."""
    results = read_json(path)
    assert "checksum" in path.read_text()
    words = shlex.split(results["command"], comments=True)
    program = next(index for index, word in enumerate(words) if "=" not in word)
    assert words[program] in ("python", "lightpeft")
    assert all((ROOT / word).is_file() for word in words if word.endswith((".py", ".yaml")))
    logs = results.get("logs", {})
    assert all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in logs.values())
    if "reports" in results:
        assert set(logs) == set(results["reports"])
    if ".peers." in path.name:
        assert set(logs) == {f"{name}/{cell['seed']}" for name, cells in results["cells"].items() for cell in cells}
        peers.options_of(peers.parser().parse_args(words[program + 2 :]), "")


# -- steps.py, inference.py ------------------------------------------------------------------------


@thorough
def test_subjects_of_a_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, out = readme_with(place("steps tiny"), tmp_path, monkeypatch), tmp_path / "out.json"
    monkeypatch.chdir(tmp_path)
    words = (str(config), "--rounds", "1", "--steps", "1", "--out", str(out), "--write-readme")
    assert steps.main(list(words)) == 0
    results = read(out)
    assert read(tmp_path / "tiny.steps.json") == results
    first, *others = results["memory_bytes"]
    assert others
    for subject in (first, *others):
        assert len(results["values"][subject]) == 1
        assert results["samples_per_second"][subject]["median"] > 0
        assert f"| {subject} |" in readme.read_text()
    assert results["time_ratio"][first]["median"] == 1
    assert steps.main([str(tmp_path / "missing.yaml")]) == 2
    assert "steps: config file" in capsys.readouterr().err


# -- needs.py ------------------------------------------------------------------------------------------------


def test_needs(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "needs.json"
    assert needs.main([str(config), "--steps", "2", "--out", str(out)]) == 0
    (stages,) = read(out)["results"].values()
    assert list(stages) == ["plain", "estimate", "train"]
    assert stages["plain"]["said_flops"] == stages["plain"]["measured_flops"] > 0
    assert all(stage["measured_bytes"] > 0 for stage in stages.values())
    assert "tiny, estimate" in capsys.readouterr().out
    assert needs.main([str(tmp_path / "missing.yaml")]) == 2
    assert needs.main([str(config), "--steps", "2", "--dense", "--out", str(out)]) == 0
    (stages,) = read(out)["results"].values()
    assert list(stages) == ["plain", "estimate"] and stages["plain"]["measured_bytes"] > 0


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_inference(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path / "bench", family)
    monkeypatch.chdir(tmp_path)
    config = bench.yaml("tiny", **{"training.epochs": 1, "light.preset": "paper"})
    assert inference.main([str(config), "--rounds", "2", "--steps", "1", "--out", str(tmp_path / "out.json")]) == 0
    results = read(tmp_path / "out.json")
    for size in ("1", "32"):
        assert list(results["values"][size]) == list(inference.KINDS)
        assert results["speed_ratio"][size]["plain, merged"]["median"] == 1
        assert all(speed["median"] > 0 for speed in results["samples_per_second"][size].values())
    caches = results["kv_cache_bytes_per_token"]
    assert (set(caches.values()) == {None}) == (family == "bert")
    assert family == "bert" or caches["light, merged"] < caches["plain, merged"] == caches["plain, unmerged"]


# -- gguf_speed.py -----------------------------------------------------------------------------------------------------


def test_gguf_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path, "llama", "causal-lm")
    monkeypatch.setattr(workbench, "POSITIONS", 128)
    texts = bench.train.read_text(encoding="utf-8").splitlines()
    save_base(bench.base, "llama", tokenizer=tokenizer_of_bytes(texts=texts))
    light, plain = (
        bench.config(name, **{"method": name, "data.max_length": 128, "light.remove.heads": 0.5})
        for name in ("light", "plain")
    )
    pipeline.run(light)
    out = tmp_path / "out.json"
    sizes = ["--rows", "3", "--tokens", "5", "--types", "f32", "q8_0"]
    assert gguf_speed.main([light.output, *sizes, "--out", str(out)]) == 0
    found = read(out)["results"][light.output]["types"]
    assert found["f32"]["same_texts"] == found["f32"]["texts"] == 3
    for each in found.values():
        assert each["file_bytes"]["light"] < each["file_bytes"]["dense"]
        assert all(speed > 0 for speeds in each["values"].values() for speed in speeds)
    pipeline.run(plain)
    assert gguf_speed.main([plain.output]) == 2
    assert "has no light model" in capsys.readouterr().err


# -- vllm_speed.py -----------------------------------------------------------------------------------------------------


class Asked:
    """What stands in for vLLM's process: PyTorch."""

    version = "0"

    def __init__(self, python: str, log: Any) -> None:
        assert python == "python of vLLM"

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, model: Path, prompts: list[list[int]], tokens: int, **options: Any) -> Any:
        assert options["enable_prefix_caching"] is False and options["max_model_len"] >= max(map(len, prompts)) + tokens
        whole = load_merged(model) if model.name == "light" else AutoModelForCausalLM.from_pretrained(model)
        return vllm_engine.Written([gguf_speed.continued(whole.float(), each, tokens) for each in prompts], 0.5)


def test_vllm_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path, "llama", "causal-lm")
    light, plain = (bench.config(name, **{"method": name, "light.remove.heads": 0.5}) for name in ("light", "plain"))
    for config in (light, plain):
        pipeline.run(config)
    monkeypatch.setattr(vllm_speed, "Vllm", Asked)
    sizes = ["--rows", "5", "--tokens", "4", "--rounds", "2"]
    monkeypatch.delenv(vllm_engine.PYTHON, raising=False)
    assert vllm_speed.main([light.output, *sizes]) == 2
    assert "does not say which Python has vLLM" in capsys.readouterr().err
    monkeypatch.setenv(vllm_engine.PYTHON, "python of vLLM")
    out = tmp_path / "out.json"
    assert vllm_speed.main([light.output, *sizes, "--out", str(out)]) == 0
    found = read(out)["results"][light.output]
    assert found["same_texts"] == found["texts"] == 5
    assert found["bytes"]["light"] < found["bytes"]["dense"]
    assert found["tokens_per_second"] == {
        "all at once": {"light": [40.0] * 2, "dense": [40.0] * 2},
        "one after another": {"light": [8.0] * 2, "dense": [8.0] * 2},
    }
    assert vllm_speed.main([plain.output, *sizes]) == 2
    assert "has no light model" in capsys.readouterr().err

    def refused(*_: Any, **__: Any) -> None:
        raise vllm_engine.Refused("it does not like it")

    monkeypatch.setattr(Asked, "ask", refused)
    assert vllm_speed.main([light.output, *sizes]) == 2
    assert "vLLM does not serve this: it does not like it" in capsys.readouterr().err


# -- serving.py --------------------------------------------------------------------------------------------------------


@thorough
def test_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path)
    light, plain = (bench.config(name, method=name) for name in ("light", "plain"))
    pipeline.run(light)
    ways = {name: serving.WAYS[name] for name in ("PyTorch, f32", "ONNX Runtime, f32")}
    monkeypatch.setattr(serving, "WAYS", ways)
    out = tmp_path / "out.json"
    sizes = ["--rounds", "2", "--batches", "2"]
    assert serving.main([light.output, *sizes, "--out", str(out)]) == 0
    found = read(out)["results"][light.output]
    assert set(found["same_as_pytorch"].values()) == {found["rows"]} == {40}
    measured = read(Path(light.output) / "metrics.json")["metrics"]["accuracy"]
    assert all(accuracy == pytest.approx(measured) for accuracy in found["accuracy"].values())
    for size in ("1", "32"):
        assert found["over_pytorch"][size]["PyTorch, f32"]["median"] == 1
        assert all(len(values) == 2 and min(values) > 0 for values in found["values"][size].values())
    assert found["bytes"]["ONNX Runtime, f32"]["light"] < found["bytes"]["ONNX Runtime, f32"]["dense"]
    assert "| ONNX Runtime, f32 |" in capsys.readouterr().out
    pipeline.run(plain)
    assert serving.main([plain.output]) == 2
    assert "has no light model" in capsys.readouterr().err


# -- row_counts.py, frontier.py ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()),
        ("B-a I-a O", {("a", 0, 2)}),
        ("B-a B-a I-a", {("a", 0, 1), ("a", 1, 3)}),
        ("B-a I-b", {("a", 0, 1), ("b", 1, 2)}),
        ("I-a I-a O B-b", {("a", 0, 2), ("b", 3, 4)}),
    ],
)
def test_entities_of_tags(tags: str, found: set[tuple[str, int, int]]) -> None:
    assert row_counts.spans(tags.split()) == found


def test_f1_of_entities_counts_whole_ones() -> None:
    """Of three entities one is found whole and one in part; what has no label does not count."""
    names = ["B-a", "I-a", "O"]
    labels = torch.tensor([[-100, 0, 1, 2, 0], [0, 2, 2, -100, -100]])
    answers = torch.tensor([[0, 0, 2, 2, 0], [2, 2, 2, 0, 0]])
    counts = row_counts.entities(names, torch.eye(3)[answers], labels)
    assert counts.tolist() == [[1, 2, 2], [0, 0, 1]]
    assert row_counts.value("entity_f1", counts) == pytest.approx(2 / 5)  # precision 1 / 2, recall 1 / 3


@pytest.mark.parametrize(
    ("name", "counted", "metric"), [("accuracy", "right", accuracy), ("matthews", "confusion", matthews)]
)
def test_counts_give_the_differences_that_answers_give(name: str, counted: str, metric: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (300,), generator=draw)
    noise = [torch.rand(300, 2, generator=draw) for _ in range(2)]
    sides = [each + weight * torch.eye(2)[labels] for each, weight in zip(noise, (0.2, 0.6), strict=True)]
    counts = [getattr(row_counts, counted)(side, labels) for side in sides]
    first, second = (Answers(side.argmax(-1).tolist(), labels.tolist()) for side in sides)
    known = statistics.compare(first, second, metric)[name]
    assert row_counts.value(name, counts[0]) == pytest.approx(known.first)
    found = row_counts.paired(name, {0: counts[0], 1: counts[0]}, {1: counts[1]})
    assert found is not None and found.seeds == 1
    assert found.mean == pytest.approx(known.difference)
    assert known.interval is not None
    assert (found.low, found.high) == pytest.approx(known.interval, abs=0.02)
    assert found.p < 0.01 and found.low > 0
    same = row_counts.paired(name, {0: counts[0]}, {0: counts[0]})
    assert same is not None and (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert row_counts.paired(name, {0: counts[0]}, {1: counts[1]}) is None


def test_differences_are_means_over_the_seeds_that_both_have() -> None:
    """And a row that is drawn twice is drawn twice for every seed."""
    worse, better = (np.stack([np.array(right, float), np.ones(4)], -1) for right in ([1, 1, 0, 0], [1, 1, 1, 0]))
    found = row_counts.paired("accuracy", {0: worse, 1: worse, 2: better}, {0: better, 1: worse})
    assert found is not None
    assert (found.mean, found.seeds) == (pytest.approx(0.125), 2)


GRID: dict[str, Any] = {
    "full": {"training": {"learning_rate": 1e-3}},
    "lora": None,
    "60%": {"from": "light-lora", "light": {"remove": {"blocks": 0.6}}},
    "60%, all": {"from": "light-lora", "light": {"remove": {"blocks": 0.6}, "train": "all"}},
    "30%, all": {"from": "light-lora", "light": {"remove": {"blocks": 0.3}, "train": "all"}},
}


def grid_of_methods(bench: Workbench, methods: dict[str, Any], **changes: Any) -> Path:
    """A grid of short runs on the tiny model and on its first layer."""
    settings = bench.settings(**{"training.epochs": 1, **changes})
    light = {"estimate": {"length": 0.25}, "remove": {"multiple_of": 1}}
    run = {name: settings[name] for name in ("peft", "training", "trainer")} | {"light": light}
    small = bench.folder / "small"
    if not small.exists():
        siblings.write_first(bench.base, 1, small)
    models = {"large": {"model": {"name": str(bench.base)}}, "small": {"model": {"name": str(small)}}}
    file = bench.folder / "grid.yaml"
    grid = {
        "run": run,
        "models": models,
        "tasks": {"words": {"data": settings["data"]}},
        "methods": methods,
        "seeds": [0],
    }
    file.write_text(yaml.safe_dump(grid, sort_keys=False))
    return file


class InPyTorch:
    """What stands in for a session of ONNX Runtime, whose graphs `test_serving` writes: PyTorch."""

    def __init__(self, model: Any, tokenizer: Any, dtype: str, folder: Path) -> None:
        self.model = model
        folder.mkdir()
        sizes = b"0" * sum(p.numel() for p in model.parameters())
        (folder / "model.onnx").write_bytes(sizes)

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": serving.in_pytorch(self.model, inputs)}


def test_frontier_and_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "exported", InPyTorch)
    bench, out = Workbench(tmp_path / "bench"), tmp_path / "out"
    file = grid_of_methods(bench, GRID)
    assert not reproduce(load_grid(file), tmp_path / "grid", ["model=large"], launch=in_this_process).failures
    reproduce(load_grid(file), tmp_path / "grid", ["model=small", "method=full"], launch=in_this_process)
    words = [str(tmp_path / "grid"), "--rounds", "2", "--rows", "8", "--out", str(out)]
    assert frontier.main(words) == 0
    results = read(out / "frontier.results.json")
    points = {(point["model"], point["method"]): point for point in results["points"]}
    assert set(points) == {("small", "full"), *(("large", name.replace("%,", "").replace("%", "")) for name in GRID)}
    for (model, name), point in points.items():
        metrics = read(tmp_path / f"grid/cells/{model}/words/{name.replace(' ', '_')}/0/metrics.json")
        assert point["quality"] == pytest.approx(metrics["metrics"]["accuracy"])
        assert set(point["ms"]) == {"f32 1", "f32 32", "int8 1", "int8 32"} and min(point["ms"].values()) > 0
        assert 0 <= point["int8"]["0"] <= 1
        assert point["measures"]["trained"] == [metrics["parameters"]["trained"]]
    shapes = {name: point["shape"] for (model, name), point in points.items() if model == "large"}
    assert shapes["full"] == shapes["lora"] and shapes["60"] == shapes["60 all"]
    assert len({*shapes.values(), points["small", "full"]["shape"]}) == 4
    assert points["large", "60"]["ms"] == points["large", "60 all"]["ms"], "latency depends on the plan alone"
    assert points["large", "60"]["mib"]["f32"] < points["large", "full"]["mib"]["f32"]
    pairs = {(each["cut"], each["other"]): each for each in results["comparisons"]}
    whole = {(f"large, {cut}", f"large, {other}") for cut in ("60", "60 all", "30 all") for other in ("full", "lora")}
    assert whole <= set(pairs)
    for (cut, other), each in pairs.items():
        of = [points[model, name]["quality"] for model, _, name in (side.partition(", ") for side in (cut, other))]
        assert each["difference"]["mean"] == pytest.approx(of[0] - of[1])
    table = (out / "frontier.md").read_text()
    assert all(f"| {point['model']}, {point['method']} | 1 | " in table for point in results["points"])
    assert all((out / f"frontier.{suffix}").stat().st_size > 5000 for suffix in ("png", "svg"))
    monkeypatch.setattr(frontier, "opened", pytest.fail)
    assert frontier.main([*words, "--figure", "words"]) == 0, "nothing is asked or measured again"
    assert frontier.main([*words, "--figure", "neither"]) == 2
    assert read(out / "frontier.results.json")["points"] == results["points"]
    # a cut has its shapes as soon as estimation ends, and one estimation is enough for budgets that share it
    shutil.copy(tmp_path / "grid/results.json", file.with_suffix(".results.json"))
    words = [str(file), "--task", "words", "--rounds", "2", "--rows", "8", "--out", str(tmp_path / "latency")]
    assert latency.main(words) == 0
    found = {(each["model"], each["method"]): each for each in read(tmp_path / "latency/latency.json")["points"]}
    assert set(found) == set(points)
    for key, each in found.items():
        point = points[key]
        assert each["mib"] == point["mib"] and set(each["ms"]) == set(point["ms"])
        assert each["by_seed"] == pytest.approx(point["by_seed"])
    assert found["large", "full"]["ms"] == found["large", "lora"]["ms"] != found["large", "60 all"]["ms"]
    assert "| small | " in (tmp_path / "latency/latency.md").read_text()
    cells = tmp_path / "latency/grid/cells/large/words"
    estimated = {folder.parents[1].name for folder in cells.glob("*/0/estimation")}
    assert estimated == {"60", "60_all"} and not [*cells.glob("*/0/pruned")], "nothing else is trained"
    monkeypatch.setattr(latency, "opened", pytest.fail)
    assert latency.main([*words, "--figure", "words"]) == 0, "nothing is measured again"
    assert latency.main([*words, "--task", "other"]) == 2


def point(model: str, method: str, ms: float, right: list[int]) -> frontier.Point:
    """A model on one task, of some latency, and the rows that it has right."""
    counts = np.stack([np.array(right, float), np.ones(len(right))], -1)
    return frontier.Point("t", model, method, "accuracy", counts={0: counts}, ms={"f32 1": ms})


def drawn(points: list[frontier.Point]) -> list[plots.FrontierPanel]:
    """The panels of the figure."""
    return [*frontier.panels(frontier.shown_by_task([frontier.written(point) for point in points], "f32 1"))]


def test_a_smaller_model_is_compared_with_the_cut_of_its_latency() -> None:
    """Of every larger model and way of training; not with cuts of smaller models."""
    points = [
        point("small", "full", 2.0, [1, 0, 0, 0]),
        point("large", "full", 8.0, [1, 1, 1, 1]),
        point("large", "20 all", 6.0, [1, 1, 1, 0]),
        point("large", "80 all", 1.9, [1, 1, 0, 0]),
        point("large", "90", 1.0, [0, 0, 0, 0]),
        point("large", "FineGates 80", 1.9, [1, 1, 0, 1]),
        point("small", "60 all", 1.0, [1, 0, 0, 0]),
    ]
    found = {(each["cut"], each["other"]): each for each in frontier.comparisons(points)}
    assert {cut for cut, other in found if other == "small, full"} == {"large, 80 all", "large, 90", "small, 60 all"}
    assert not [pair for pair in found if pair[1] == "large, full" and pair[0].startswith("small")]
    assert found["large, 80 all", "small, full"]["difference"]["mean"] == pytest.approx(0.25)
    assert found["large, 80 all", "large, FineGates 80"]["difference"]["mean"] == pytest.approx(-0.25)
    assert ("large, 90", "large, FineGates 80") not in found
    assert found["large, 80 all", "small, full"]["of_its_latency"] == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("minilm", "MiniLM-L6"),
        ("minilm_first3", "MiniLM-L6, first 3 layers"),
        ("full, taught", "all weights, taught"),
        ("60", "60% cut, LoRA"),
        ("60 all, taught", "60% cut, all weights, taught"),
        ("FineGates 60", "FineGates 60"),
    ],
)
def test_names_of_models_and_methods(name: str, shown: str) -> None:
    assert frontier.named(name) == shown


def test_an_overview_has_one_row_for_each_way_of_training() -> None:
    """Qualities with their spread, the mean of what was run on all tasks, and medians of time."""

    def entry(task: str, method: str, qualities: list[float], seconds: list[float]) -> dict[str, Any]:
        of_seeds = {"by_seed": qualities, "seeds": [*range(len(qualities))], "measures": {"seconds": seconds}}
        return {
            "task": task,
            "model": "minilm",
            "method": method,
            "quality": sum(qualities) / len(qualities),
        } | of_seeds

    points = [
        entry("sst2", "full", [0.8, 0.9], [10.0, 30.0]),
        entry("rte", "full", [0.6], [10.0]),
        entry("sst2", "60 all", [0.8], [4.0]),
    ]
    assert frontier.overview(points).splitlines()[2:] == [
        "| MiniLM-L6, all weights | 85.0 ± 7.1 | 60.0 (1) | 72.5 | 1.00 |",
        "| MiniLM-L6, 60% cut, all weights | 80.0 (1) |  |  | 0.20 |",
    ]


def test_the_figure_begins_with_the_mean_of_what_was_run_on_all_tasks() -> None:
    points = [
        point("minilm", "full", 4.0, [1, 1, 1, 1]),
        point("minilm", "60 all", 2.0, [1, 1, 0, 0]),
        point("minilm", "60", 2.0, [1, 0, 0, 0]),
        replace(point("minilm", "full", 8.0, [1, 1, 0, 0]), task="sst2"),
        replace(point("minilm", "60 all", 4.0, [1, 0, 0, 0]), task="sst2"),
        replace(point("mpnet", "full", 40.0, [1, 1, 1, 1]), task="sst2"),
    ]
    mean, first, second = drawn(points)
    assert (mean.title, first.title, second.title) == ("mean of 2 tasks", "t", "SST-2")
    assert [(mark.label, mark.x, mark.y) for mark in mean.marks] == [("MiniLM-L6", 6.0, 75.0)]
    assert mean.lines == {("MiniLM-L6", "all weights"): [(3.0, 37.5, "60%"), (6.0, 75.0, "")]}
    assert first.lines["MiniLM-L6", "LoRA"] == [(2.0, 25.0, "60%")], "no whole model was trained with LoRA"
    assert [mark.label for mark in second.marks] == ["MiniLM-L6", "MPNet-base"]


def test_first_layers_begin_at_the_whole_model_and_gates_stand_alone() -> None:
    points = [
        point("minilm", "full", 4.0, [1, 1, 1, 1]),
        point("minilm_first3", "full", 2.0, [1, 1, 0, 0]),
        point("minilm", "FineGates 60 own recipe", 2.0, [1, 0, 0, 0]),
        point("minilm_l3", "full", 2.0, [1, 0, 0, 0]),
    ]
    (panel,) = drawn(points)
    assert [mark.label for mark in panel.marks] == ["MiniLM-L6", "MiniLM-L3"]
    assert panel.lines == {
        ("MiniLM-L6", "all weights"): [(4.0, 100.0, "")],
        ("MiniLM-L6", "first layers, all weights"): [(2.0, 50.0, "3"), (4.0, 100.0, "")],
        ("MiniLM-L6", "FineGates own recipe"): [(2.0, 25.0, "60%")],
        ("MiniLM-L3", "all weights"): [(2.0, 25.0, "")],
    }


def test_frontier_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert frontier.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "frontier: no finished cell in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- finegates.py ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_gates_that_are_closed_can_be_removed(prepared: Any, threshold: float) -> None:
    """The narrow model answers what the gated one does, with exactly as many parameters as are said to be left."""
    model = copy.deepcopy(prepared[1].model)
    torch.manual_seed(0)
    before = answers(model)
    specs = finegates.gate(model)
    gated = [module for module in model.modules() if isinstance(module, finegates.Gated)]
    with torch.no_grad():
        for each in gated:
            for side in (each.rows, each.columns):
                side.copy_(torch.where(torch.rand(len(side)) < 0.3, -2.0, torch.rand(len(side)) - 0.2))
            each.threshold = threshold
    masked = answers(model)
    assert relative_difference(before, masked) > 1e-2
    parts, (spec, *_) = finegates.open_parts(model, specs, threshold), specs
    q, k, v, o = (parts[spec.projections[slot]] for slot in "qkvo")
    assert q[0].equal(k[0]) and v[0].equal(o[1]), "what is dead on one side goes on the other"
    count = finegates.left(model, specs, threshold)
    finegates.remove_closed(model, specs, threshold)
    narrow = [module for module in model.modules() if isinstance(module, finegates.Narrow)]
    assert sum(p.numel() for each in narrow for p in each.parameters()) == count
    assert relative_difference(masked, answers(model)) < 1e-5


def test_the_threshold_is_the_lowest_that_leaves_no_more_than_wanted(prepared: Any) -> None:
    model = copy.deepcopy(prepared[1].model)
    torch.manual_seed(0)
    specs = finegates.gate(model)
    whole = finegates.left(model, specs, -1.0)
    assert whole == sum(
        p.numel()
        for spec in specs
        for n in spec.projections.values()
        for p in model.get_submodule(n).layer.parameters()
    )
    threshold = finegates.threshold_of(model, specs, whole // 2)
    just_below = float(np.nextafter(np.float32(threshold), np.float32(-1)))
    assert finegates.left(model, specs, threshold) <= whole // 2 < finegates.left(model, specs, just_below)


def test_finegates_are_cells_of_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At lightpeft's size; what trains are gates and head; the model is there again as it was measured."""
    bench = Workbench(tmp_path / "bench")
    methods = {"FineGates, 60%": {"from": "full", "training": {"learning_rate": 0.05}}}
    file = grid_of_methods(bench, methods, **{"training.save_steps": 10**6})

    def run(cell: Any, devices: int, log: Path, module: list[str]) -> str | None:
        assert module[0] == "finegates"
        return "failed" if finegates.main(module[1:]) else None

    assert finegates.main([str(file), "--only", "model=large", "--out", str(tmp_path / "out")], run) == 0
    folder = tmp_path / "out/cells/large/words/FineGates_60/0"
    report = read(folder / "metrics.json")
    work = pipeline.prepare(RunFolder.at(folder).config)
    goal = peer_pruning.goal_of(work.dense_model(), run_config_from_dict({"light": 0.6}).light)
    sizes, found = report["parameters"], report["finegates"]
    assert sizes["base_dense"] - sizes["base"] == pytest.approx(goal.removed, rel=0.02)
    assert sizes["trained"] - goal.head == 2 * (5 * 32 * 2 + 0) + 2 * 2 * (32 + 48) - 2 * 2 * 32
    assert sizes["base_dense"] - sizes["base"] >= goal.removed and found["wanted"] > 0
    model = finegates.reopened(RunFolder.at(folder), work)
    assert (
        pipeline.report(work, model, peer_cells.scores_of(pipeline.measure(work, model), work.task))["metrics"]
        == report["metrics"]
    )
    assert finegates.main([str(tmp_path / "none.yaml")]) == 2
    assert "finegates: " in capsys.readouterr().err


# -- wnut17.py, siblings.py --------------------------------------------------------------------------------------------


def test_wnut17(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "demo/cache/minilm")
    for split, seed in {"train": 1, "test": 2, "validation": 3}.items():
        rows = [row["text"].split() for row in workbench.labeled(256 if split == "train" else 40, seed)]
        tagged = [{"tokens": words, "tags": ["B-x" if w.startswith("good") else "O" for w in words]} for words in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    words = ["--data", str(tmp_path), "--seeds", "0", "--out", "out", "--methods"]
    monkeypatch.setattr(wnut17, "RATES", {"minilm": (1e-2, 3e-2, 8)})
    assert wnut17.main([*words, "full", "lora on all projections", "60%, all"]) == 0
    names = ("full", "lora_on_all_projections", "60_all")
    reports = {name: read(tmp_path / f"out/cells/minilm/wnut17/{name}/0/metrics.json") for name in names}
    assert reports["full"]["metrics"]["entity_f1"] > 0.9
    assert all(report["training"]["train"]["peak_memory_bytes"] >= 0 for report in reports.values())
    assert reports["60_all"]["parameters"]["base"] < reports["full"]["parameters"]["base"]
    before = stamps(tmp_path / "out/cells")
    assert wnut17.main([*words, "full"]) == 0 and stamps(tmp_path / "out/cells") == before
    teacher = [
        "--teacher",
        "out/cells/minilm/wnut17/full/0/model",
        "--rate",
        "0.02",
        "--prior",
        "--split",
        "validation",
    ]
    words[words.index("out")] = "taught"
    assert wnut17.main([*words, "full", "60%, all", *teacher]) == 0
    folder = tmp_path / "taught/cells/minilm/wnut17/full/0"
    scored, config = (read(folder / "metrics.json")[name] for name in ("metrics", "config"))
    assert scored["entity_f1"] == wnut17.quality(folder, tmp_path, "validation")
    assert config["training"]["teacher"] and config["training"]["learning_rate"] == 0.02 and config["prior"]
    monkeypatch.setattr(frontier, "exported", InPyTorch)
    assert frontier.main(["out", "--rounds", "1", "--rows", "8", "--out", "frontier"]) == 0
    for each in read(tmp_path / "frontier/frontier.results.json")["points"]:
        told = reports[each["method"].replace(" ", "_")]["metrics"]["entity_f1"]
        assert each["quality"] == pytest.approx(told)
    capsys.readouterr()


def test_weights_of_an_onnx_file_get_their_names() -> None:
    """Of a matrix that has none, from the node that multiplies with it."""
    onnx = pytest.importorskip("onnx")
    weight, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.float32)
    node = onnx.helper.make_node(
        "MatMul", ["x", "onnx::MatMul_1"], ["y"], "/model/model.0/auto_model/encoder/layer.0/output/dense/MatMul"
    )
    named = {"onnx::MatMul_1": weight, "model.0.auto_model.encoder.layer.0.output.dense.bias": bias}
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in named.items()]
    found = siblings.weights_of(onnx.helper.make_graph([node], "g", [], [], tensors))
    assert set(found) == {"encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.bias"}
    assert found["encoder.layer.0.output.dense.weight"].tolist() == weight.T.tolist()


def test_data_are_linked_where_grids_read_them(tmp_path: Path) -> None:
    source, cache = tmp_path / "data", tmp_path / "cache"
    for name in ("cola", "rte", "sst2", "banking77", "wnut17"):
        (source / name).mkdir(parents=True)
        for split in ("train", "validation"):
            (source / name / f"{split}.jsonl").write_text(f'{{"of": "{name}"}}\n' * (siblings.SST2_ROWS + 1))
    cache.mkdir()
    for _ in range(2):
        siblings.link_data(source, cache)
    assert (cache / "glue/cola").resolve() == (source / "cola").resolve()
    assert (cache / "glue/sst2_part/train.jsonl").read_text().count("sst2") == siblings.SST2_ROWS
    assert (cache / "wnut17/train.jsonl").is_file()


# -- solving.py --------------------------------------------------------------------------------------------------------


def test_solving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The last number of a text counts, up to a question that the model asks itself; solved rows can be kept."""
    assert solving.result_of("6 * 7 = 42 dollars\n#### 1,042") == 1042
    assert solving.result_of("It is -3.5.\nQuestion: what is 4?") == -3.5
    assert solving.result_of("nothing") is None
    bench = Workbench(tmp_path / "bench", "llama", "causal-lm")
    questions = tmp_path / "questions.jsonl"
    rows = [
        {"question": f"{word} word1", "answer": f"so #### {number}"} for word, number in (("good1", 70), ("bad1", 71))
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--questions", str(questions), "--answer-tokens", "4", "--out", str(tmp_path / "out.json")]
    assert solving.main([str(bench.base), *given]) == 0
    (of,) = read(tmp_path / "out.json")["results"].values()
    assert of["solved"] == 0 and of["questions"] == 2 and of["tokens_per_second"] > 0 and of["interval"][0] == 0
    assert "tokens/s" in capsys.readouterr().out
    monkeypatch.setattr(solving, "written", lambda *given: (["I say 70\nQuestion: 5", "I say 7"], 10.0))
    assert solving.main([str(bench.base), *given, "--write", str(tmp_path / "own" / "train.jsonl")]) == 0
    assert (tmp_path / "own" / "train.jsonl").read_text() == '{"question": "good1 word1", "answer": "I say 70"}\n'
    questions.write_text('{"prompt": "one"}\n')
    assert solving.main([str(bench.base), *given]) == 2


# -- writers.py --------------------------------------------------------------------------------------------------------


def test_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path / "bench", "llama", "causal-lm")
    monkeypatch.chdir(tmp_path)
    config = bench.yaml("tiny", **{"light.after.keep": "full", "light.remove.head_unit": "group"})  # has few heads
    assert writers.main([str(config), "--rounds", "2", "--steps", "1", "--out", str(tmp_path / "out.json")]) == 0
    results = read(tmp_path / "out.json")
    weights = list(results["weights_bytes"].values())
    assert weights[-1] < weights[-2] < weights[-3] < weights[2], "the more is cut, the less there is"
    assert set(results["values"]) == set(results["memory_bytes"])
    assert results["run_time_ratio"][writers.PLAIN][0]["median"] == 1
    assert all(sum(share.values()) == pytest.approx(1) for share in results["shares"].values())


# -- sft.py ------------------------------------------------------------------------------------------------------------


def test_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms train on the same batches: their losses agree where their modules do."""
    bench = Workbench(tmp_path / "bench", "llama", "causal-lm")
    monkeypatch.chdir(tmp_path)
    config = bench.yaml("tiny", **{"peft.lora_dropout": 0.0})
    words = [str(config), "--rounds", "1", "--steps", "1", "--out", str(tmp_path / "out.json")]
    assert sft.main(words) == 0
    found = read(tmp_path / "out.json")["results"]
    assert set(found["seconds_per_step"]) == set(found["memory_bytes"]) == set(sft.ARMS)
    everywhere = [loss for name, loss in found["loss"].items() if sft.ARMS[name].everywhere]
    elsewhere = [loss for name, loss in found["loss"].items() if not sft.ARMS[name].everywhere]
    assert everywhere == pytest.approx([everywhere[0]] * len(everywhere), rel=2e-3)
    assert elsewhere == pytest.approx([elsewhere[0]] * len(elsewhere), rel=2e-3)
    assert everywhere[0] != pytest.approx(elsewhere[0], rel=1e-4)


def test_shapes_count_their_parameters() -> None:
    for shape in (gpu.SHAPES["roberta-tiny"], gpu.SHAPES["llama-tiny"]):
        case = synthetic.Case(shape, 1, 8, 1, run_config_from_dict({}).light)
        model = synthetic.random_model(case)
        weights = sum(p.numel() for spec in block_specs(model) for p in _weights(model, spec))
        embeddings = model.get_input_embeddings().weight.numel()
        assert weights + embeddings == shape.parameters


def _weights(model: Any, spec: Any) -> list[Any]:
    return [model.get_submodule(name).weight for name in spec.projections.values()]


# -- gpu.py ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_ends_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "none")]) == 0
    error = capsys.readouterr().err
    assert error.startswith("gpu: no CUDA device")
    assert error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_gpu_measures_tiny_shapes_on_the_cpu(tmp_path: Path) -> None:
    sizes = ("--batch", "2", "--length", "12", "--rounds", "1", "--steps", "1")
    assert gpu.main(["--device", "cpu", "--shapes", "roberta-tiny", "llama-tiny", *sizes, "--out", str(tmp_path)]) == 0
    results = read(tmp_path / "gpu.results.json")
    assert [result["case"]["shape"]["name"] for result in results["shapes"]] == ["roberta-tiny", "llama-tiny"]
    for result in results["shapes"]:
        assert set(result["subjects"]) == {"plain", "estimation", "light"}
        flops = {name: subject["flops"]["training"] for name, subject in result["subjects"].items()}
        assert flops["light"] < flops["plain"] < flops["estimation"]
        assert result["subjects"]["estimation"]["inference_seconds"] is None
        assert result["ideal"]["inference"] > 1
    assert (tmp_path / "gpu.md").read_text().count("| llama-tiny |") == 3
    assert results["quality"] == {}


def test_gpu_says_the_quality_beside_the_speed(bench: Workbench, config: Path, tmp_path: Path) -> None:
    sizes = ("--device", "cpu", "--shapes", "--limit", "32", "--out", str(tmp_path))
    assert gpu.main([*sizes, "--quality", str(config)]) == 0
    reports = read(tmp_path / "gpu.results.json")["quality"]["tiny"]
    assert {method: report["method"] for method, report in reports.items()} == {"plain": "plain", "light": "light"}
    lines = (tmp_path / "gpu.md").read_text().splitlines()[2:]
    for report, line in zip(reports.values(), lines, strict=True):
        assert report["config"]["training"]["precision"] == "bf16" and report["config"]["training"]["epochs"] == 1
        assert report["config"]["data"]["limit_train"] == 32
        speed = report["training"]["train"]["samples_per_second"]
        assert speed > 0 and f"| accuracy {report['metrics']['accuracy']:.1%} |" in line and f"| {speed:,.0f} |" in line
    assert list(reports["light"]["training"]) == ["estimate", "train"]


def test_gpu_says_what_could_not_be_measured(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--shapes", "--out", str(tmp_path), "--limit", "32"]
    assert gpu.main(words) == 2
    assert capsys.readouterr().err == "gpu: nothing to measure; give --shapes, --quality or both\n"
    missing = str(tmp_path / "none.yaml")
    assert gpu.main([*words, "--quality", missing]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err and not (tmp_path / "gpu.md").exists()
    assert gpu.main([*words, "--quality", str(config), missing]) == 1
    results = read(tmp_path / "gpu.results.json")
    assert list(results["quality"]) == ["tiny"] and "does not exist" in results["failures"]["none"]
