"""peers.py and finegates.py, end to end on tiny models: what they write, that they go on, what the peers are."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finegates
import numpy as np
import peer_cells
import peer_methods
import peer_pruning
import peer_tables
import peers
import publishing
import pytest
import torch
from benchmarking import place, readme_with, short_run
from lanes import thorough
from peer_speeds import Speeds
from tiny import make, relative_difference
from torch import Tensor
from workbench import Workbench, checksums, forked, in_this_process, read, stamps

from lightpeft.app.runs import pipeline
from lightpeft.app.runs.subject import Subject
from lightpeft.config import RunConfig, load_config
from lightpeft.errors import LightPeftError
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.loading import LoadedModel
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.surgery import apply_plan

pytestmark = thorough
ROOT = Path(__file__).parents[1]

PRUNED = {"random", "magnitude", "tp_magnitude", "tp_taylor", "slimformers"}


@pytest.fixture(scope="module", autouse=True)
def forking() -> Any:
    with forked():
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def config(bench: Workbench) -> Path:
    return short_run(bench)


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


# -- peers.py ----------------------------------------------------------------------------------------------------------


def test_every_method_has_a_result(results: dict[str, Any], compared: Path) -> None:
    assert set(results["methods"]) == set(METHODS)
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
    for name in PRUNED & sizes.keys():  # to the nearest head and neuron
        assert sizes[name]["removed"] == pytest.approx(goal["removed"], rel=0.05)
    for name in {"random", "magnitude", "light_paper"} & sizes.keys():
        assert sizes[name]["removed"] == goal["removed"]
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


def test_tight_batches_have_no_more_than_their_longest_row(bench: Workbench, prepared: Any) -> None:
    """Those of a dense model are widened to a multiple of 8 tokens."""
    widths = {}
    for name in ("lora", "lora_tight"):
        config = bench.config(name, method="plain")
        subject = Subject(peer_methods.PEERS[name].subject(prepared[2]), config, 4)
        widths[name] = [
            (batch["input_ids"].shape[1], int(batch["attention_mask"].sum(1).max())) for batch in subject.batches
        ]
    assert all(width % 8 == 0 for width, _ in widths["lora"])
    assert all(width == longest for width, longest in widths["lora_tight"]) and widths["lora_tight"] != widths["lora"]


@pytest.mark.parametrize(
    ("names", "groups"),
    [("lora", ["lora"]), ("lora a b", ["lora a b"]), ("lora a b c", ["lora a b", "lora c"])],
)
def test_speeds_are_measured_in_groups(names: str, groups: list[str], tmp_path: Path, prepared: Any) -> None:
    """Plain LoRA is in each of them, and in none alone unless it is all there is."""
    measured = []
    speeds = Speeds(tmp_path, rounds=1, steps=1, together=3, goal=prepared[2])
    speeds._measure = lambda runs: measured.append(" ".join(runs))  # type: ignore[method-assign]
    speeds.measure(dict.fromkeys(names.split(), RunConfig()))
    assert measured == groups


def test_grouped_queries_are_refused_by_libraries_that_do_not_know_them(bench: Workbench, tmp_path: Path) -> None:
    llama = Workbench(tmp_path, "llama")
    work = pipeline.prepare(llama.config("peer", method="plain"))
    loaded = work.dense_model()
    model, goal = loaded.model, peer_pruning.goal_of(loaded, work.config.light)
    for by in (peer_pruning.by_torch_pruning, peer_pruning.by_slimformers):
        with pytest.raises(LightPeftError, match="head"):
            by(work, model, goal)
    assert goal.blocks == sum(parameter.numel() for parameter in model.model.layers.parameters())


def test_a_plot_of_peers_says_how_much_each_of_them_removes() -> None:
    figure = peer_tables.plot(json.loads((ROOT / "benchmarks/minilm_default.peers.results.json").read_text()))
    for axes in figure.axes:
        names = {text.get_text() for text in axes.texts if text.get_text()}
        assert {"LoRA on q, v", "lightpeft fast, 40%", "lightpeft default, 60%"} <= names


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
