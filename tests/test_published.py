"""What benchmark scripts make of results, and the published files and plots."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import found_budgets
import numpy as np
import peers
import plots
import publishing
import pytest
import ridge
import sizes
import solving
import yaml
from benchmarking import readme_with
from matplotlib.text import Text
from workbench import Workbench, lightpeft, read

from lightpeft.app.cli.verbs import VERBS
from lightpeft.app.runs.reproduce import Results, Row, read_results
from lightpeft.app.runs.reproduce.results import SeedSpread
from lightpeft.errors import LightPeftError
from lightpeft.files import read_json
from lightpeft.prune.depth_probes import read_out

ROOT = Path(__file__).parents[1]

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


def of_size(
    model: str, parameters: float, qualities: dict[str, float], metric: str = "accuracy", seeds: int = 1
) -> Results:
    """Seeds of each method on one task, all alike; every interval is two points to each side."""
    size = {"parameters": SeedSpread(parameters, None)}
    numbers = [*range(seeds)]
    rows = [Row(model, "t", name, metric, numbers, [v] * seeds, None, None, size) for name, v in qualities.items()]
    of = {name: {"intervals": {metric: [v - 0.02, v + 0.02]}} for name, v in qualities.items()}
    reports = {f"{model}/t/{name}/{seed}": report for name, report in of.items() for seed in numbers}
    return Results(rows, "lora", len(rows), "", reports)


def test_costs_by_size_fall_on_their_line() -> None:
    points = of_size("m", 1e8, {"lora": 0.8, "20% of the blocks": 0.77, "no cut": 0.9, "60%, depth auto": 0.1})
    (cost,) = sizes.costs_of(points)
    assert (cost.unit, cost.blocks, cost.cost) == ("points", 0.2, pytest.approx(3.0)), "against lora, not no cut"
    assert cost.high - cost.cost == pytest.approx(100 * 0.02 * 2**0.5)
    (of_three,) = sizes.costs_of(of_size("m", 1e8, {"lora": 0.8, "20% of the blocks": 0.77}, seeds=3))
    assert (of_three.low, of_three.high) == pytest.approx((cost.low, cost.high)), "the test rows are the same"
    nats = [
        next(sizes.costs_of(of_size("m", 1e8 * 4**k, {"no cut": math.e, "20% of the blocks": rise}, "perplexity")))
        for k, rise in enumerate((math.exp(1.4), math.exp(1.2)))
    ]
    assert [(each.unit, each.cost) for each in nats] == [("nats", pytest.approx(0.4)), ("nats", pytest.approx(0.2))]
    line = sizes.trend(nats)
    assert line is not None and line.at(1.6e9) == pytest.approx(0.1)
    assert sizes.trend(nats[:1]) is None
    better = [replace(nats[0], cost=0.1), replace(nats[1], cost=-0.1)]
    assert sizes.trend(better) is None, "noise gives the slope through two sizes"
    better.append(replace(nats[1], parameters=1.6e9, cost=-0.3))
    assert sizes.trend(better).at(6.4e9) == pytest.approx(-0.5), "no logarithm of a cut that is better"  # type: ignore[union-attr]


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


def test_results_go_to_their_place_in_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = "before\n<!-- results: a -->\nold\n<!-- /results: a -->\nafter\n<!-- results: b -->\n"
    readme = readme_with(before, tmp_path, monkeypatch)
    publishing.publish("a", "new", "a.json", {"a": 1})
    publishing.publish("a", "newer", "a.json", {"a": 2})
    text = readme.read_text()
    assert text == (
        "before\n<!-- results: a -->\n\nnewer\n\nEvery number: [a.json](a.json).\n\n<!-- /results: a -->\n"
        "after\n<!-- results: b -->\n"
    )
    for missing in ("b", "c"):
        with pytest.raises(LightPeftError, match=f"no place for these results; add .*results: {missing}"):
            publishing.publish(missing, "text", "numbers.json", {})
    assert readme.read_text() == text
    assert read(tmp_path / "a.json")["a"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "a.json"}, "nothing is half-written"


PUBLISHED = sorted(path for folder in ("benchmarks", "configs") for path in (ROOT / folder).rglob("*.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_results_say_how_to_make_them_again(path: Path) -> None:
    """By a command that is understood and whose files are there, and with a checksum of the log of every run."""
    results = read_json(path)
    assert "checksum" in path.read_text()
    words = shlex.split(results["command"], comments=True)
    program = next(index for index, word in enumerate(words) if "=" not in word)
    assert words[program] in ("python", "lightpeft")
    assert all((ROOT / word).is_file() for word in words if word.endswith((".py", ".yaml")))
    if words[program] == "lightpeft":
        VERBS[words[program + 1]]._read(words[program + 2 :])
    logs = results.get("logs", {})
    assert all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in logs.values())
    if "reports" in results:
        assert set(logs) == set(results["reports"])
    if ".peers." in path.name:
        assert set(logs) == {f"{name}/{cell['seed']}" for name, cells in results["cells"].items() for cell in cells}
        peers.options_of(peers.parser().parse_args(words[program + 2 :]), "")


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


# -- ridge.py ----------------------------------------------------------------------------------------------------------


def test_ridge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training rows choose the block, with the errors that `depth: auto` finds, and test rows measure it."""
    bench, out = Workbench(tmp_path, "llama"), tmp_path / "out.json"
    settings = bench.settings()
    grid = {
        "run": {"training": settings["training"]},
        "models": {"tiny": {"model": settings["model"]}},
        "tasks": {"words": {"data": settings["data"]}},
        "methods": ["lora"],
        "seeds": [3],
    }
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(grid))
    assert ridge.main([str(file), "--task", "words", "--out", str(out)]) == 0
    (found,) = read(out)["results"].values()
    assert (found["training_rows"], found["test_rows"]) == (64, 40)
    (states, labels), _ = ridge.states_and_labels(ridge.configs_of(file, "words", None)["tiny"])
    expected = [2 * float(read_out(of_block, labels).errors.mean()) for of_block in states]
    assert [block["left_out_error"] for block in found["blocks"]] == pytest.approx(expected, rel=0.02)
    chosen = found["blocks"][found["block"] - 1]
    assert chosen["left_out_error"] == min(block["left_out_error"] for block in found["blocks"])
    assert found["accuracy"] == chosen["right"] / 40 > 0.8
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]
    assert f"{found['block']} of 2" in capsys.readouterr().out
    assert ridge.main([str(file), "--task", "sst2"]) == 2
    assert ridge.main([str(file), "--task", "words", "--models", "large"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        f"ridge: {file} has no task sst2; give one of words",
        f"ridge: {file} has no model large; give some of tiny",
    ]
