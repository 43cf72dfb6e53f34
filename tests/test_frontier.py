"""frontier.py, latency.py, wnut17.py and what they read, on tiny models."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import finegates
import frontier
import frontier_table
import latency
import numpy as np
import peer_cells
import peer_pruning
import plots
import pytest
import row_counts
import serving
import siblings
import torch
import wnut17
import workbench
import yaml
from lanes import thorough
from torch import Tensor
from workbench import Workbench, in_this_process, read, save_base, stamps

from lightpeft.app.evaluation import statistics
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reproduce import load_grid, reproduce
from lightpeft.app.tasks.answers import Answers
from lightpeft.app.tasks.metrics import accuracy, matthews
from lightpeft.config import run_config_from_dict
from lightpeft.files import read_json, write_json

ROOT = Path(__file__).parents[1]


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
    "full, smoothed": {"from": "full", "trainer": {"label_smoothing_factor": 0.1}},
    "0%, all": {"from": "light-lora", "light": {"remove": {"blocks": 0}, "train": "all"}},
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


@thorough
def test_frontier_and_latency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frontier, "exported", InPyTorch)
    bench, out = Workbench(tmp_path / "bench"), tmp_path / "out"
    file = grid_of_methods(bench, GRID)
    assert not reproduce(load_grid(file), tmp_path / "grid", ["model=large"], launch=in_this_process).failures
    reproduce(load_grid(file), tmp_path / "grid", ["model=small", "method=full"], launch=in_this_process)
    words = [str(tmp_path / "grid"), "--rounds", "2", "--rows", "8", "--out", str(out)]
    assert frontier.main(words) == 0
    results = read(out / "frontier.results.json")
    points = {(point["model"], point["method"]): point for point in results["points"]}
    assert set(points) == {("small", "full"), *(("large", latency.method_name(name)) for name in GRID)}
    for (model, name), point in points.items():
        metrics = read(tmp_path / f"grid/cells/{model}/words/{name.replace(' ', '_')}/0/metrics.json")
        assert point["quality"] == pytest.approx(metrics["metrics"]["accuracy"])
        assert set(point["ms"]) == {"f32 1", "f32 32", "int8 1", "int8 32"} and min(point["ms"].values()) > 0
        assert 0 <= point["int8"]["0"] <= 1
        assert point["measures"]["trained"] == [metrics["parameters"]["trained"]]
    shapes = {name: point["shape"] for (model, name), point in points.items() if model == "large"}
    assert shapes["full"] == shapes["lora"] == shapes["0 all"] and shapes["60"] == shapes["60 all"]
    assert len({*shapes.values(), points["small", "full"]["shape"]}) == 4
    assert points["large", "60"]["ms"] == points["large", "60 all"]["ms"], "latency depends on the plan alone"
    assert points["large", "60"]["mib"]["f32"] < points["large", "full"]["mib"]["f32"]
    pairs = {(each["cut"], each["other"]): each for each in results["comparisons"]}
    whole = {(f"large, {cut}", f"large, {other}") for cut in ("60", "60 all", "30 all") for other in ("full", "lora")}
    cuts = ("0 all", "30 all", "60 all")
    assert whole | {(f"large, {cut}", "large, full smoothed") for cut in cuts} <= set(pairs)
    assert ("large, 60", "large, full smoothed") not in pairs
    for (cut, other), each in pairs.items():
        of = [points[model, name]["quality"] for model, _, name in (side.partition(", ") for side in (cut, other))]
        assert each["difference"]["mean"] == pytest.approx(of[0] - of[1])
    table = (out / "frontier.md").read_text()
    assert all(f"| {point['model']}, {point['method']} | 1 | " in table for point in results["points"])
    assert all((out / f"frontier.{suffix}").stat().st_size > 5000 for suffix in ("png", "svg"))
    monkeypatch.setattr(frontier, "opened", pytest.fail)
    assert frontier.main([*words, "--figure", "words"]) == 0, "nothing is asked or measured again"
    before = stamps(out)
    assert frontier.main([*words, "--figure", "neither"]) == 2 and frontier.main([*words, "--rounds", "0"]) == 2
    assert stamps(out) == before
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
    assert found["large", "full"]["ms"] == found["large", "0 all"]["ms"] != found["large", "60 all"]["ms"]
    assert "| small | " in (tmp_path / "latency/latency.md").read_text()
    cells = tmp_path / "latency/grid/cells/large/words"
    estimated = {folder.parents[1].name for folder in cells.glob("*/0/estimation")}
    assert estimated == {"60", "60_all"} and not [*cells.glob("*/0/pruned")], "nothing else is trained"
    monkeypatch.setattr(latency, "opened", pytest.fail)
    assert latency.main([*words, "--figure", "words"]) == 0, "nothing is measured again"
    # more seeds need no new measurement; what was not measured is named, and left out
    file, known = tmp_path / "latency/latency.json", tmp_path / "known.json"
    earlier = read_json(file)
    part = [point for point in earlier["points"] if point["method"] != "60 all"]
    write_json(known, {**earlier, "points": part})
    again = [*words[:-1], str(tmp_path / "again"), "--known", str(known)]
    assert latency.main(again) == 0
    assert "has no latency of words, large, 60%, all; they are left out" in capsys.readouterr().err
    assert read(tmp_path / "again/latency.json")["points"] == part
    assert read(tmp_path / "again/latency.json")["measured_by"] == earlier["command"]
    for wrong in ({**earlier, "points": []}, {"points": part}):
        write_json(known, wrong)
        assert latency.main(again) == 2
    assert latency.main([*words, "--task", "other"]) == 2 and latency.main([*words, "--figure", "other"]) == 2
    monkeypatch.setattr(frontier, "timed", lambda openers, rounds, rows: pytest.fail(f"{rounds} of {rows}"))
    with pytest.raises(pytest.fail.Exception, match="3 of 8"):
        frontier.main([str(tmp_path / "grid"), "--rounds", "3", "--rows", "8", "--out", str(out)])
    with pytest.raises(SystemExit):
        frontier.main([str(tmp_path / "grid"), "--way", "f32 8"])


def point(model: str, method: str, ms: float, right: list[int]) -> frontier.Point:
    """A model on one task, of some latency, and the rows that it has right."""
    counts = np.stack([np.array(right, float), np.ones(len(right))], -1)
    return frontier.Point("t", model, method, "accuracy", counts={0: counts}, ms={"f32 1": ms})


def drawn(points: list[frontier.Point]) -> list[plots.FrontierPanel]:
    """The panels of the figure."""
    return [*frontier.panels(frontier.shown_by_task([frontier.written(point) for point in points], "f32 1"))]


def test_cuts_are_compared_with_whole_models_that_were_trained_alike() -> None:
    methods = ("full", "full smoothed", "full, taught", "60", "60 all", "60 all, taught", "0 all")
    found: dict[str, list[str]] = {}
    for each in frontier.comparisons([point("large", method, 2.0, [1, 0]) for method in methods]):
        found.setdefault(each["cut"].partition(", ")[2], []).append(each["other"].partition(", ")[2])
    alike = ["full", "full smoothed"]
    assert found == {"60": ["full"], "60 all": alike, "60 all, taught": [*alike, "full, taught"], "0 all": alike}


def test_a_smaller_model_is_compared_with_the_cut_of_its_latency() -> None:
    """Of every larger model and way of training; not with cuts of smaller models."""
    points = [
        point("small", "full", 2.0, [1, 0, 0, 0]),
        point("large", "full", 8.0, [1, 1, 1, 1]),
        point("large", "20 all", 6.0, [1, 1, 1, 0]),
        point("large", "80 all", 1.9, [1, 1, 0, 0]),
        point("large", "90", 1.0, [0, 0, 0, 0]),
        point("large", "0 all tokens of the task", 2.0, [0, 0, 0, 0]),
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
        ("full smoothed", "all weights, smoothed labels"),
        ("0 all", "0% cut, all weights"),
        ("60 all, taught", "60% cut, all weights, taught"),
        ("FineGates 60", "FineGates 60"),
    ],
)
def test_names_of_models_and_methods(name: str, shown: str) -> None:
    assert frontier.named(name) == shown


def test_the_documented_tables_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever publishes other scores writes the tables of docs/explanation/results.md anew."""
    assert frontier_table.main() == 0
    page = (ROOT / "docs/explanation/results.md").read_text()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 2 and all(f"\n\n{table}\n\n" in page for table in tables)


def test_a_table_of_scores_gives_means_of_what_was_run_on_all_tasks() -> None:
    scores = {
        ("minilm", "60%, all"): {"sst2": [80.0, 82.0], "rte": [60.0]},
        ("minilm", "full"): {"sst2": [85.0]},
        ("other", "full"): {"sst2": [1.0]},
    }
    assert frontier_table.table(scores, ["minilm"], ["sst2", "rte"]).splitlines()[2:] == [
        "| MiniLM-L6, all weights | 85.0 |  |  |",
        "| MiniLM-L6, 60% cut, all weights | 81.0±1.4 | 60.0 | 70.5 |",
    ]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("full", "all weights"),
        ("full, smoothed", "all weights, smoothed"),
        ("lora on all projections", "LoRA on all projections"),
        ("60%", "60% cut, LoRA"),
        ("60%, all, tokens of the task", "60% cut, all weights, tokens of the task"),
        ("FineGates, 60%", "FineGates, 60%"),
    ],
)
def test_methods_have_names_in_the_tables(method: str, name: str) -> None:
    assert frontier_table.named(method) == name


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
        point("minilm", "0 all", 4.0, [1, 1, 0, 1]),
    ]
    (panel,) = drawn(points)
    assert [mark.label for mark in panel.marks] == ["MiniLM-L6", "MiniLM-L3"]
    assert panel.lines == {
        ("MiniLM-L6", "all weights"): [(4.0, 100.0, "")],
        ("MiniLM-L6", "first layers, all weights"): [(2.0, 50.0, "3"), (4.0, 100.0, "")],
        ("MiniLM-L6", "FineGates own recipe"): [(2.0, 25.0, "60%")],
        ("MiniLM-L3", "all weights"): [(2.0, 25.0, "")],
        ("MiniLM-L6", "0% cut, all weights"): [(4.0, 75.0, "")],
    }


def test_frontier_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert frontier.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "frontier: no finished cell in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@thorough
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
    command = read(tmp_path / "out/results.json")["command"]
    assert shlex.split(command)[-6:] == [
        "benchmarks/finegates.py",
        str(file),
        "--only",
        "model=large",
        "--out",
        str(tmp_path / "out"),
    ]
    assert finegates.main([str(tmp_path / "none.yaml")]) == 2
    assert "finegates: " in capsys.readouterr().err
    file = grid_of_methods(bench, {"FineGates": {"from": "full"}})
    assert finegates.main([str(file), "--out", str(tmp_path / "none")], pytest.fail) == 2
    assert 'method "FineGates" says no per cent' in capsys.readouterr().err and not (tmp_path / "none").exists()


# -- wnut17.py, siblings.py --------------------------------------------------------------------------------------------


@thorough
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
    capsys.readouterr()
    for wrong, reason in {
        "--rate 0.5": "was made with other settings",
        "--rows 8": "was made with other settings",
        "--models minilm_l3": "demo/cache/minilm_l3 is no folder of a model",
        "--models bert": "no rate is known but for minilm",
        "--split dev": "dev.jsonl does not exist",
        "--teacher nowhere": "nowhere is no folder of a model",
    }.items():
        assert wnut17.main([*words, "full", *wrong.split()]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
    assert stamps(tmp_path / "out/cells") == before
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
    assert wnut17.main([*words, "full", *teacher]) == 0
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


def test_data_are_linked_where_grids_read_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, cache = tmp_path / "data", tmp_path / "cache"
    names = ("sst2", "banking77", "cola", "rte", "wnut17")
    words = ["--data", str(source), "--cache", str(cache)]
    assert siblings.main(words) == 2 and "run demo/fetch.py first" in caplog.text
    (cache / "minilm").mkdir(parents=True)
    for name in names:
        assert siblings.main(words) == 2 and [path.name for path in cache.iterdir()] == ["minilm"]
        (source / name).mkdir(parents=True)
        for split in ("train", "validation"):
            (source / name / f"{split}.jsonl").write_text(f'{{"of": "{name}"}}\n' * (siblings.SST2_ROWS + 1))
    assert len(caplog.records) == 1 + len(names) and not any("\n" in record.message for record in caplog.records)
    for _ in range(2):
        siblings.take_data(source, cache)
    assert (cache / "glue/cola").resolve() == (source / "cola").resolve()
    assert (cache / "glue/sst2_part/train.jsonl").read_text().count("sst2") == siblings.SST2_ROWS
    assert (cache / "wnut17/train.jsonl").is_file()
