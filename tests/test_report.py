"""`lightpeft report`: what it reads of a run's folder, what it draws and says, and that the page needs nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from workbench import Workbench, checksums, edit, lightpeft, read

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import curve, pipeline
from lightpeft.app.runs.report import figures, words
from lightpeft.app.runs.report.drawing import BLUE, STYLED, Drawing
from lightpeft.app.runs.report.facts import MOST_POINTS, read_run
from lightpeft.app.runs.report.page import page, write_report
from lightpeft.errors import LightPeftError
from lightpeft.files import append_line
from lightpeft.plans.prune_plan import PrunePlan

WIDTHS = (390, 1280)
"""Pixels of a phone and of a laptop."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """Runs of all methods; that of method light with steps at full width and a curve, and one half done."""
    bench = Workbench(tmp_path_factory.mktemp("report"))
    light = bench.config("light", **{"light.after.keep": "both", "light.after.full_width_steps": 0.25})
    pipeline.run(light)
    curve.curve(pipeline.prepare(light), rows=24, parts=(0.2, 0.4))
    for method in ("plain", "full"):
        pipeline.run(bench.config(method, method=method))
    pipeline.estimate(pipeline.prepare(bench.config("half")))
    return bench


@pytest.fixture
def light(bench: Workbench, tmp_path: Path) -> Path:
    """A copy of the light run, to be changed."""
    return Path(shutil.copytree(bench.folder / "light", tmp_path / "light"))


def html(*folders: Path) -> str:
    return page([read_run(folder) for folder in folders])


class Reader(HTMLParser):
    """What a browser would make of a page; a tag that is not closed, or closed twice, is an error."""

    VOID = ("meta", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# -- facts ---------------------------------------------------------------------------------------------------------


class TestFacts:
    def test_of_a_finished_run(self, bench: Workbench) -> None:
        run = read_run(bench.folder / "light")
        assert [stage.name for stage in run.stages] == ["estimate", "prune", "train", "widen", "evaluate"]
        assert run.missing == [] and all(stage.seconds is not None for stage in run.stages)
        assert [stage.steps for stage in run.stages] == [6, None, 12, 6, None]
        assert run.cut == 6
        report = read(bench.folder / "light" / "metrics.json")
        assert run.training_seconds == pytest.approx(sum(report["seconds"].values()), abs=0.1)
        assert run.peak_memory_bytes == max(stage["peak_memory_bytes"] for stage in report["training"].values())
        plan = PrunePlan.load(bench.folder / "light" / "plan.json")
        sizes = {name: (before, after) for name, before, after in run.sizes}
        assert sizes["base model"] == (report["parameters"]["base_dense"], report["parameters"]["base"])
        assert sizes["blocks of the base"][0] - sizes["blocks of the base"][1] == plan.removed_parameters
        assert sizes["trained parameters"][1] == report["parameters"]["trained"]

    def test_losses_are_those_of_the_log(self, bench: Workbench) -> None:
        run = read_run(bench.folder / "light")
        logged = RunFolder.at(bench.folder / "light").log_entries()
        found = [(entry["stage"], entry["step"], entry["loss"]) for entry in logged if "loss" in entry]
        steps = {"widen": 18}  # whose own steps begin at 0
        expected = {(stage, steps.get(stage, 0) + step, loss) for stage, step, loss in found}
        assert {(line.stage, *point) for line in run.losses for point in line.points} == expected
        assert [line.stage for line in run.losses] == ["estimate", "train", "widen"]

    def test_what_a_resumed_run_logged_twice_counts_as_it_was_last(self, light: Path) -> None:
        append_line(light / "log.jsonl", {"stage": "train", "step": 8, "loss": 0.125})
        (points,) = (line.points for line in read_run(light).losses if line.stage == "train")
        assert [loss for step, loss in points if step == 8] == [0.125]

    @pytest.mark.parametrize("loss", ["NaN", "Infinity", "1e999"])
    def test_losses_that_are_no_numbers_are_counted(self, light: Path, loss: str) -> None:
        with (light / "log.jsonl").open("a") as log:
            log.write(f'{{"stage": "train", "step": 10, "loss": {loss}}}\n{{"stage": "train", "ste')
        run = read_run(light)
        assert run.broken_losses == 1 and all(step != 10 for line in run.losses for step, _ in line.points)
        assert "1 lines of the log have a loss of NaN or infinity" in Reader(page([run])).text

    def test_long_logs_are_thinned_by_means(self, light: Path) -> None:
        lines = "".join(
            json.dumps({"stage": "train", "step": step, "loss": 1.0 + step % 2}) + "\n" for step in range(7, 2007)
        )
        (light / "log.jsonl").write_text(lines)
        (line,) = read_run(light).losses
        assert len(line.points) == MOST_POINTS
        assert line.points[0] == (9.0, pytest.approx((2 + 1 + 2 + 1 + 2) / 5))

    def test_of_a_run_that_is_half_done(self, bench: Workbench) -> None:
        run = read_run(bench.folder / "half")
        assert [stage.name for stage in run.missing] == ["prune", "train", "evaluate"]
        assert (run.report, run.plan, run.training_seconds, run.cut) == (None, None, None, 6)

    def test_of_a_folder_that_has_just_begun(self, bench: Workbench) -> None:
        RunFolder.open(bench.config("begun")).begin()
        run = read_run(bench.folder / "begun")
        assert run.losses == []
        assert "Stages left: estimation, cut, fine-tuning, evaluation" in Reader(page([run])).text


# -- words ---------------------------------------------------------------------------------------------------------


def test_metrics_without_an_upper_end_are_no_percents() -> None:
    assert words.quality("accuracy", 0.8512) == "85.1%" and words.interval("f1", (0.5, 0.75)) == "50.0 to 75.0"
    assert words.quality("mismatched_loss", 0.5) == "0.5000" and words.interval("loss", None) == ""


# -- the page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["light", "plain", "full", "half"])
def test_pages_are_whole_and_need_nothing_else(bench: Workbench, name: str) -> None:
    text = html(bench.folder / name)
    found = Reader(text)
    assert not found.all("script") and not found.all("img")
    references = [value for _, attributes in found.tags for key, value in attributes.items() if key in ("href", "src")]
    assert all(str(value).startswith(("#", "data:,")) for value in references)
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    labels = [attributes.get("aria-label") for attributes in found.all("svg")]
    assert labels and all(labels)
    identifiers = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_contents_of_a_light_run(bench: Workbench) -> None:
    text = html(bench.folder / "light")
    found, run = Reader(text), read_run(bench.folder / "light")
    assert run.plan and run.report and run.curve
    titles = [
        "Units kept in each layer",
        "Training loss",
        "Quality on the test rows",
        "Quality over the run",
        "Parameters",
        "Time and memory",
        "Loss at each budget",
    ]
    places = [found.text.index(title) for title in titles]
    assert places == sorted(places)
    for spec, kept in run.plan.parts:
        assert f"{len(kept.heads)}/{spec.heads}" in found.text and f"{len(kept.neurons)}/{spec.neurons}" in found.text
    assert "Estimation ends" in found.text and "Training at full width" in found.text
    assert run.report.milestones
    for moment, values in run.report.milestones.metrics.items():
        assert f"{moment.replace('_', ' ')} {100 * values['accuracy']:.1f}%" in found.text
    for point in run.curve["points"]:
        assert f"{100 * point['removed_of_blocks']:.1f}% {point['rise']:+.3f}" in found.text
    assert f"lightpeft run --config {bench.folder}/light/config.yaml --output {bench.folder}/light_again" in found.text
    assert "criterion: fisher" in found.text and "torch" in found.text


def test_every_column_has_a_heading(bench: Workbench) -> None:
    light, plain = (bench.folder / name for name in ("light", "plain"))
    for text in (html(light), html(plain), html(light, plain)):
        headings = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', text)
        assert headings and all(headings)


def test_warnings_stand_above_all_else(light: Path) -> None:
    edit(
        light / "metrics.json", lambda report: report.update(warnings=["all 40 test rows are answered <b>positive</b>"])
    )
    text = html(light)
    assert text.index("<strong>Warning:</strong> all 40 test rows are answered &lt;b&gt;") < text.index("Units kept")


def test_missing_stages_and_how_to_go_on(bench: Workbench) -> None:
    found = Reader(html(bench.folder / "half"))
    assert f"lightpeft run --run {bench.folder}/half" in found.text
    assert "This run is not finished. Stages left: cut, fine-tuning, evaluation" in found.text


HOSTILE = "<script>alert(1)</script>"


def test_nothing_of_a_folder_is_markup(bench: Workbench, tmp_path: Path) -> None:
    settings = {"data.columns.text": HOSTILE, "model.name": f"{tmp_path}/{HOSTILE}\"'&"}
    folder = RunFolder.open(bench.config(f"hostile{HOSTILE.replace('/', '')}", **settings))
    folder.begin()
    append_line(folder.log, {"stage": "estimate", "step": 1, "loss": 1.0, HOSTILE: HOSTILE})
    text = html(folder.path, bench.folder / "light")
    assert Reader(text).all("script") == [] and "&lt;script&gt;alert(1)" in text


def test_labels_in_figures_are_no_markup(bench: Workbench) -> None:
    plan = PrunePlan.load(bench.folder / "light" / "plan.json")
    named = dataclasses.replace(plan, specs=tuple(dataclasses.replace(spec, label=HOSTILE) for spec in plan.specs))
    for drawing in (figures.units(named, "FFN neurons"), figures.modules(named)):
        assert Reader(drawing.__html__()).all("script") == []


def test_a_page_is_made_of_what_is_there(light: Path) -> None:
    for name in ("log.jsonl", "curve.json"):
        (light / name).unlink()
    found = Reader(html(light))
    assert "Training loss" not in found.text and "Units kept" in found.text and "Quality" in found.text
    assert "Loss at each budget" not in found.text


# -- several runs --------------------------------------------------------------------------------------------------


class TestBeside:
    def test_the_page(self, bench: Workbench) -> None:
        folders = [bench.folder / name for name in ("light", "plain", "full", "half")]
        found = Reader(html(*folders))
        assert "Comparison of 4 runs" in found.text
        for run in (read_run(folder) for folder in folders[:2]):
            assert run.report and f"{run.report.parameters.trained:,}" in found.text
            low, high = run.report.intervals["accuracy"] or (0, 0)
            assert f"{100 * run.report.metrics['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f})" in found.text
        links = [str(attributes["href"])[1:] for attributes in found.all("a")]
        assert links == [attributes["id"] for attributes in found.all("article")]

    def test_what_may_not_be_compared_is_said(self, bench: Workbench, light: Path) -> None:
        warning = "on different machines"
        assert warning not in html(bench.folder / "light", bench.folder / "plain")
        edit(light / "metrics.json", lambda report: report["hardware"].update(cpu="another"))
        edit(light / "metrics.json", lambda report: report["training"]["train"].update(others=0.995))
        other = read_run(light)
        other = dataclasses.replace(
            other,
            config=dataclasses.replace(other.config, data=dataclasses.replace(other.config.data, test="other.csv")),
        )
        text = page([read_run(bench.folder / "plain"), other])
        assert "not all measured on the same test rows" in text and warning in text
        assert "Other programs took 99.5% of the processor during a stage" in text
        assert "other programs took 99.5% of the processor" in text


# -- an automatic budget -------------------------------------------------------------------------------------------

AUTO = {
    "blocks": 0.5,
    "tolerance": 0.1,
    "expected": {"blocks": 0.5, "left": 0.04, "upper": 0.08},
    "before": [{"blocks": 0.6, "rise": 0.4}],
    "probed": [
        {"blocks": 0.4, "before": 0.2, "after": 0.05, "error": 0.02},
        {"blocks": 0.6, "before": 0.4, "after": 0.2, "error": 0.03},
    ],
    "rows": 256,
    "steps": 9,
    "seconds": 3.0,
    "confidence": 0.8,
    "points_per_nat": 50.0,
}


class TestAutoBudget:
    def test_what_was_probed_and_is_expected(self, light: Path) -> None:
        edit(light / "metrics.json", lambda report: report.update(budget=AUTO))
        text = Reader(html(light)).text
        assert "tolerance when cut after a probe expected" in text
        assert "cuts 50% of the blocks: that is expected to cost 2 points, at most 4 points with" in text
        assert "the tolerance is 5 points (0.1 nats)" in text and "compared with no cut, in points" in text
        assert "measured on 256 rows in 3 s" in text

    def test_nothing_within_the_tolerance(self, light: Path) -> None:
        budget = {**AUTO, "blocks": 0.0, "expected": None, "points_per_nat": None}
        edit(light / "metrics.json", lambda report: report.update(budget=budget))
        text = Reader(html(light)).text
        assert (
            "cuts nothing of the blocks: 40% would cost 0.05 nats after 9 steps, and the tolerance is 0.1 nats" in text
            and "no cut, in nats" in text
            and "after a probe expected" not in text
        )

    def test_nothing_to_tell(self, light: Path) -> None:
        edit(light / "metrics.json", lambda report: report.update(budget={**AUTO, "expected": None, "probed": []}))
        assert "estimation was too short" in Reader(html(light)).text

    @pytest.mark.parametrize("change", [{"blocks": "half"}, {"probed": 5}, {"expected": {"left": None}}, {"rows": []}])
    def test_what_is_none_is_refused(self, light: Path, change: dict[str, Any]) -> None:
        edit(light / "metrics.json", lambda report: report.update(budget={**AUTO, **change}))
        with pytest.raises(LightPeftError, match="metrics.json does not have the expected content"):
            read_run(light)


# -- figures -------------------------------------------------------------------------------------------------------


def test_blocks_that_are_left_out_whole(bench: Workbench) -> None:
    plan = PrunePlan.load(bench.folder / "light" / "plan.json")
    below = {site.name for site in plan.dense_sites if site.block == 0}
    sites = {name: ranks for name, ranks in plan.sites.items() if name in below}
    shallow = dataclasses.replace(plan, blocks=plan.blocks[:1], sites=sites)
    for what in ("Attention heads", "FFN neurons"):
        assert Reader(figures.units(shallow, what).__html__()).text.count("0/") == 1


def test_many_blocks_stay_on_one_screen(bench: Workbench) -> None:
    plan = PrunePlan.load(bench.folder / "light" / "plan.json")
    specs = tuple(dataclasses.replace(plan.specs[0], index=index, label=str(index)) for index in range(96))
    deep = dataclasses.replace(plan, specs=specs, blocks=plan.blocks[:1] * 96)
    for drawing in (figures.units(deep, "Attention heads"), figures.units(deep, "FFN neurons"), figures.modules(deep)):
        assert drawing.height < 720 and drawing.width <= min(WIDTHS) - 40
        assert len(drawing.__html__()) < 100_000


def test_a_drawing_has_the_pages_colors_and_no_names() -> None:
    @STYLED
    def draw() -> str:
        drawing = Drawing(100, 80, "a <figure> & more", grid="both")
        drawing.axes.plot([0, 1], [0, 1 / 3], "o-", color=BLUE)
        return drawing.__html__()

    text = draw()
    found = Reader(text)
    assert found.all("svg")[0]["viewbox"] == "0 0 100 80" and found.all("svg")[0]["aria-label"] == "a <figure> & more"
    assert "var(--blue)" in text and "var(--rule)" in text and BLUE not in text
    assert not any("id" in attributes for _, attributes in found.tags)
    assert not found.all("use") and not found.all("defs") and len(found.all("path")) > 4


# -- the command line ----------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code, and what was written anywhere."""
    capsys.readouterr()
    code = lightpeft("report", *arguments)
    written = capsys.readouterr()
    return code, written.out + written.err


def test_where_the_page_goes(light: Path, bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, light) == (0, f"wrote the report to {light}/report.html\n")
    first = (light / "report.html").read_text()
    assert first == html(light)
    assert said(capsys, light)[0] == 0  # over the page of earlier
    other = tmp_path / "new" / "both.html"
    assert said(capsys, light, bench.folder / "plain", "--output", other)[0] == 0
    assert other.read_text() == html(light, bench.folder / "plain")
    assert said(capsys, light, bench.folder / "plain")[1] == f"wrote the report to {light}/comparison.html\n"
    assert write_report([light, light]) == light / "report.html" and (light / "report.html").read_text() == first


def test_a_page_goes_with_the_run_it_is_about(light: Path) -> None:
    write_report([light])
    config = dataclasses.replace(RunFolder.at(light).config, seed=1, output=str(light))
    RunFolder.open(config, overwrite=True).start_anew()
    assert not (light / "report.html").exists()


@pytest.mark.parametrize("name", ["metrics.json", "plan.json", "curve.json", "config.yaml"])
def test_damaged_files_are_refused(light: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (light / name).write_text((light / name).read_text().replace("0", "1", 1))
    before = checksums(light)
    code, line = said(capsys, light)
    assert code == 2 and name in line and line.count("\n") == 1 and checksums(light) == before


EDITS: dict[str, tuple[str, Any]] = {
    "no points": ("curve.json", lambda content: content.update(points={"a": 1})),
    "points of text": ("curve.json", lambda content: content["points"][0].update(rise="high")),
    "other programs of text": ("metrics.json", lambda content: content["training"]["train"].update(others="many")),
}
"""Files as who wrote them could have written them."""


@pytest.mark.parametrize("what", EDITS)
def test_files_that_say_something_else_are_refused(light: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, change = EDITS[what]
    edit(light / name, change)
    code, line = said(capsys, light)
    assert code == 2 and str(light) in line and line.count("\n") == 1 and not (light / "report.html").exists()


def test_what_is_no_run_and_no_place(light: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing", light / "adapter", light / "log.jsonl"):
        code, line = said(capsys, folder)
        assert code == 2 and f"{folder} is not the folder of a run" in line and line.count("\n") == 1
    assert not (tmp_path / "missing").exists() and not any((tmp_path / "empty").iterdir())
    before = checksums(light)
    for place, why in ((light, "is a folder"), (light / "metrics.json", "exists and is not a report")):
        code, line = said(capsys, light, "--output", place)
        assert code == 2 and why in line and line.count("\n") == 1
    assert checksums(light) == before
    assert said(capsys)[0] == 2


# -- in a browser --------------------------------------------------------------------------------------------------

PAGES = {"light": ("light",), "half": ("half",), "all": ("light", "plain", "full", "half")}
WIDER = """
const scrolls = ".scroll, pre, svg, details:not([open])", right = document.documentElement.clientWidth + 0.5;
return [...document.querySelectorAll("body *")]
    .filter(each => !each.closest(scrolls) && each.getBoundingClientRect().right > right)
    .map(each => each.outerHTML.slice(0, 200));
"""
"""Elements that stick out of the window, but for what scrolls in its own place."""
COLORS = """
const style = getComputedStyle(document.body);
return [style.backgroundColor, style.color].map(color => color.match(/\\d+/g).slice(0, 3).map(Number));
"""
"""Of paper and ink, as numbers."""
SHRUNK = """
return [...document.querySelectorAll("svg")]
    .map(each => [each.getBoundingClientRect().width, each.viewBox.baseVal.width])
    .filter(([width, _]) => width > 0).map(([width, own]) => width / own);
"""
"""How large the figures that are shown are, as a part of their own size."""


@pytest.fixture(scope="module")
def written(bench: Workbench) -> dict[str, Path]:
    """Files of these pages."""
    places = {name: bench.folder / f"{name}.html" for name in PAGES}
    return {name: write_report([bench.folder / run for run in PAGES[name]], file) for name, file in places.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_in_a_browser(written: dict[str, Path], browser: Any, name: str, width: int, scheme: str) -> None:
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(written[name].as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(WIDER) == []
    paper, ink = map(sum, browser.execute_script(COLORS))
    assert (paper > ink) == (scheme == "light")
    sizes = browser.execute_script(SHRUNK)
    assert sizes and min(sizes) > 0.9  # letters stay legible
