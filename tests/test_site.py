"""The documentation: links lead somewhere, on disk and on the built site, and the site loads nothing from elsewhere."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from documents import blocks
from lanes import telling

import lightpeft
from lightpeft.app.evaluation import milestones
from lightpeft.errors import LightPeftError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

from make_site import collect, entries, links, stage  # noqa: E402

PROJECT = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
PAGES = [ROOT / page for page in entries(PROJECT["nav"])]
PLACED = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
WIDTHS = (400, 1300)
"""Pixels of a phone and of a laptop."""


# -- on disk -----------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    for path, anchor in links(page):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


def test_the_page_of_settings_is_what_the_classes_say() -> None:
    """In a process of its own, since tests change some defaults."""
    assert subprocess.run([sys.executable, ROOT / "docs" / "make_settings.py", "--check"]).returncode == 0, "make docs"


def test_every_page_has_a_place_on_the_site() -> None:
    written = {
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "benchmarks/README.md",
        ROOT / "examples/README.md",
    }
    assert sorted(written) == sorted(PAGES)


def test_every_page_is_within_two_clicks_of_readme() -> None:
    def linked(pages: set[Path]) -> set[Path]:
        return {(page.parent / path).resolve() for page in pages for path, _ in links(page) if path.endswith(".md")}

    once = linked({ROOT / "README.md"})
    assert set((ROOT / "docs").rglob("*.md")) <= once | linked(once)


def test_readme_is_a_pitch() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    install, commands = blocks(ROOT / "README.md", "")
    assert install == "pip install lightpeft\nlightpeft demo\n" and len(commands.splitlines()) == 3
    assert len(blocks(ROOT / "README.md", "python")) == 1 and "make demo" in text and "make test" in text


@pytest.mark.parametrize("page", sorted((ROOT / "docs/how-to").glob("*.md")), ids=lambda page: page.stem)
def test_a_guide_is_short_and_listed(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 60
    listed = {path for path, _ in links(ROOT / "docs/how-to/README.md")}
    assert page.name in {*listed, "README.md"}


def test_the_documentation_is_short() -> None:
    """A reader's time is the limit: what a page adds, another gives up."""
    read = [ROOT / "README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").rglob("*.md")]
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in read) <= 35_000


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_a_page_begins_with_a_title_and_a_paragraph(page: Path) -> None:
    title, empty, first, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ") and not empty and re.match(r"[\w`\[]", first), "a title, and then a paragraph"


def test_every_public_name_has_one_place_in_the_reference() -> None:
    placed = [
        name for page in sorted((ROOT / "docs/reference/api").glob("*.md")) for name in PLACED.findall(page.read_text())
    ]
    public = [name.removeprefix("lightpeft.") for name in placed if name.count(".") == 1]
    assert sorted(public) == sorted(lightpeft.__all__)
    assert len(placed) == len(set(placed))


def documented() -> list[tuple[str, Any]]:
    """Every name of the API pages with its object."""
    pages = sorted((ROOT / "docs/reference/api").glob("*.md"))
    names = [name.rpartition(".") for page in pages for name in PLACED.findall(page.read_text(encoding="utf-8"))]
    return [(f"{home}.{name}", getattr(importlib.import_module(home), name)) for home, _, name in names]


def test_docstrings_of_the_api_stand_alone() -> None:
    """With an example, and for a function all arguments and the result."""
    lacking = []
    for name, value in documented():
        text = inspect.getdoc(value) or ""
        wanted = [] if value is LightPeftError else ["Example"]
        if inspect.isfunction(value) and name != "lightpeft.light_trainer":
            signature = inspect.signature(inspect.unwrap(value))
            wanted += [f"  {argument}: " for argument in signature.parameters]
            wanted += ["Returns:"] * (str(signature.return_annotation) not in ("None", "Iterator[None]"))
        lacking += [f"{name}: {part.strip()}" for part in wanted if part not in text]
    assert not lacking


SETTING = re.compile(r"(?<![\w.-])(?:light|training|data|tasks\.NAME)(?:\.[a-z_]+)+(?![\w(])")
COLUMNS = re.compile(r"data\.columns\.\w+")


def test_settings_that_pages_name_exist() -> None:
    """In prose and in commands; of a mapping, any key will do."""
    table = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| `([\w.]+)`", table, re.MULTILINE))
    known |= {name.rpartition(".")[0] for name in known}
    unknown = {}
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text("utf-8").partition("## Failed experiments")[0]  # of which some settings are gone
        text = COLUMNS.sub("", re.sub(r"\]\([^)]*\)|```python.*?```", "", text, flags=re.DOTALL))
        if found := set(SETTING.findall(text)) - known:
            unknown[page.relative_to(ROOT).as_posix()] = found
    assert not unknown


def test_names_that_the_reference_quotes_exist() -> None:
    def first(page: str, heading: str) -> list[str]:
        section = (ROOT / "docs/reference" / page).read_text("utf-8").partition(heading)[2].partition("\n## ")[0]
        return [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]

    assert [cell.strip(" `") for cell in first("files.md", "## Milestones")] == [
        name for name in milestones.MILESTONES if name != "after_pruning_modules"
    ]
    calls = (ROOT / "docs/reference/python.md").read_text("utf-8").partition("## ")[0]
    named = re.findall(r"`(\w+)(?:\(\w+\))?`", "".join(row.split("|")[2] for row in calls.splitlines() if "|" in row))
    assert named and not {name for name in named if name not in {*lightpeft.__all__, "register_family"}} - {"Trainer"}


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("gone.md", "a.md links to gone.md, which is not in the repository"),
        ("../secret", "a.md links to ../secret, which is not in the repository"),
        ("b.md", "a.md links to b.md, which has no place in the nav of zensical.toml"),
    ],
)
def test_what_is_linked_is_on_the_site_or_refused(link: str, message: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "numbers").mkdir(parents=True)
    for name in ("b.md", "data.json", "numbers/one.json", "../secret"):
        (root / name).touch()
    (root / "a.md").write_text("[x](data.json) [y](numbers/) [z](#here)\n\n```\n[code](no.md)\n```\n")
    found = collect(root, ["a.md"])
    assert found == [Path("a.md"), Path("data.json"), Path("numbers"), Path("numbers/one.json")]
    stage(root, found, tmp_path / "staged")
    assert "[one.json](one.json)" in (tmp_path / "staged/numbers/README.md").read_text()
    (root / "a.md").write_text(f"[x]({link})")
    with pytest.raises(LightPeftError, match=re.escape(message)):
        collect(root, ["a.md"])
    with pytest.raises(LightPeftError, match=re.escape("zensical.toml lists c.md, which does not exist")):
        collect(root, ["c.md"])


# -- the site ----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.loaded, self.links = path, list[str](), list[str]()
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        else:
            self.loaded += [given[name] for name in ("src", "href", "srcset", "data") if name in given]


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    """The site, built as `make docs` does."""
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings_handlers.python")
    done = subprocess.run([sys.executable, "docs/make_site.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "griffe" not in done.stderr, done.stdout + done.stderr
    site = ROOT / PROJECT["site_dir"]
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_there(pages: dict[Path, Page]) -> None:
    site = ROOT / PROJECT["site_dir"]
    for page in (page.relative_to(ROOT) for page in PAGES):
        assert site / (page.with_name("index") if page.stem == "README" else page).with_suffix(".html") in pages
    assert "roberta_large_glue.yaml" in pages[site / "configs/paper/index.html"].links, "folders list their files"


def test_links_of_the_site_lead_to_files_and_headings(pages: dict[Path, Page]) -> None:
    wrong = []
    for page in pages.values():
        for reference in (*page.links, *page.loaded):
            parts = urlsplit(reference)
            if parts.scheme or page.path.name == "404.html":  # whose links begin at the site's root
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            target = target / "index.html" if (target / "index.html").is_file() else target
            known = not parts.fragment or unquote(parts.fragment) in (pages[target].ids if target in pages else ())
            if not target.exists() or not known:
                wrong.append(f"{page.path.name}: {reference}")
    assert not wrong


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    for page in pages.values():
        assert not [reference for reference in page.loaded if urlsplit(reference).netloc], page.path
    for sheet in (ROOT / PROJECT["site_dir"]).rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_public_names_are_described(pages: dict[Path, Page]) -> None:
    described = {name for path, page in pages.items() if path.parent.name == "api" for name in page.ids}
    assert {f"lightpeft.{name}" for name in lightpeft.__all__} <= described
    assert {"lightpeft.LightConfig.remove", "lightpeft.RunConfig.training"} <= described, "fields have places, too"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(pages: dict[Path, Page]) -> Iterator[str]:
    """Where the site is served."""
    handler = partial(Quiet, directory=str(ROOT / PROJECT["site_dir"]))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


LOADED = "return performance.getEntriesByType('resource').map(each => each.name)"
WIDER = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
PAPER = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"


@telling("scheme", ["light", "dark"], {"light"})
def test_pages_in_a_browser(scheme: str, browser: Any, address: str) -> None:
    """Nothing goes wrong, nothing is wider than a window, and colors are those that the reader's system asks for."""
    wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    for name in (
        "index.html",
        "docs/how-to/budget.html",
        "docs/explanation/results.html",
        "docs/reference/families.html",
        "docs/explanation/results.html",
        "docs/reference/api/config.html",
    ):
        for width in WIDTHS:
            window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
            browser.get(f"{address}/{name}")
            assert browser.execute_script(WIDER) <= 0, (name, width)
            assert all(loaded.startswith(address) for loaded in browser.execute_script(LOADED))
            assert (sum(browser.execute_script(PAPER)) > 3 * 128) == (scheme == "light")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
