"""What is released: the files in a wheel, the description on an index, the version at all places, and its workflows."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import yaml

import lightpeft

ROOT = Path(__file__).parents[1]
RELEASE = runpy.run_path(str(ROOT / ".ci" / "release.py"))
TRIED = runpy.run_path(str(ROOT / ".ci" / "try_packages.py"))
prepare, check, notes, committed = (RELEASE[name] for name in ("prepare", "check", "notes", "committed"))
Refused = RELEASE["ReleaseError"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CHANGES = "# Changelog\n\n## [Unreleased]\n\n- All is new.\n"


@pytest.fixture(scope="module", params=[".", "plugins/vllm"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built without an index from a copy of the sources, beside which lie tests and numbers."""
    folder: Path = tmp_path_factory.mktemp("build")
    source = ROOT / request.param
    for name in ("src", "tests"):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "numbers.results.json").write_text("{}")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", folder / "dist", folder], check=True)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_a_wheel_has_the_package_alone(wheel: Path) -> None:
    assert not TRIED["foreign"](wheel)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = wheel.name.split("-")[0]
    source = ROOT / ("src" if package == "lightpeft" else "plugins/vllm/src")
    modules = {path.relative_to(source).as_posix() for path in (source / package).rglob("*.py")}
    assert modules <= names and f"{package}/py.typed" in names
    if package == "lightpeft":
        assert "lightpeft/app/runs/report/templates/run.html.jinja" in names


@pytest.mark.parametrize("name", ["tests/test_masks.py", "lightpeft_tests/__init__.py", "benchmarks/results.json"])
def test_files_that_are_no_part_of_a_package(tmp_path: Path, name: str) -> None:
    path = tmp_path / "lightpeft-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lightpeft/__init__.py", "")
        archive.writestr(name, "")
    assert TRIED["foreign"](path) == [name]


def test_metadata(wheel: Path) -> None:
    told = metadata(wheel)
    assert told["Version"] == lightpeft.__version__ and told["Author"] == "lightpeft contributors"
    assert told["License-Expression"] == "Apache-2.0"
    urls = dict(url.split(", ") for url in told.get_all("Project-URL") or ())
    assert {"Documentation", "Repository", "Issues", "Changelog"} <= urls.keys()
    assert all(url.startswith("https://github.com/lightpeft/lightpeft") for url in urls.values())


def test_the_description_on_an_index_has_no_relative_link(wheel: Path) -> None:
    """And each link leads to a file that is here."""
    text = str(metadata(wheel).get_payload())
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and all(target.startswith("https://") for target in targets)
    inside = re.compile(
        rf"https://github\.com/lightpeft/lightpeft/(?:raw|blob)/(?:v{lightpeft.__version__}|main)/([^#]+)"
    )
    files = [found[1] for found in map(inside.match, targets) if found]
    assert files and all((ROOT / name).exists() for name in files)
    assert all("/raw/" in target for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The places that a release writes to."""
    for name in RELEASE["PLACES"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(CHANGES)
    return tmp_path


def contents(tree: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in tree.rglob("*") if path.is_file()}


def test_the_versions_here_are_one() -> None:
    (lines,) = ({RELEASE["only"](RELEASE["read"](ROOT, name), of, name)[1] for name, of in RELEASE["PLACES"].items()},)
    assert lines == {lightpeft.__version__}


def test_a_release_is_written_to_all_places(tree: Path) -> None:
    prepare(tree, "7.1.0", "2031-05-06")
    assert (tree / "CHANGELOG.md").read_text() == CHANGES.replace("d]\n", "d]\n\n## [7.1.0] - 2031-05-06\n")
    assert '__version__ = "7.1.0"' in (tree / "src/lightpeft/__init__.py").read_text()
    assert 'version = "7.1.0"' in (tree / "plugins/vllm/pyproject.toml").read_text()
    assert yaml.safe_load((tree / "CITATION.cff").read_text())["version"] == "7.1.0"
    check(tree, "v7.1.0")
    assert notes(tree, "v7.1.0") == "- All is new."
    (tree / "CHANGELOG.md").write_text((tree / "CHANGELOG.md").read_text().replace("d]\n", "d]\n\n- More.\n", 1))
    prepare(tree, "7.2.0", "2031-06-07")
    assert notes(tree, "v7.2.0") == "- More." and notes(tree, "v7.1.0") == "- All is new."
    assert str(yaml.safe_load((tree / "CITATION.cff").read_text())["date-released"]) == "2031-06-07"


@pytest.mark.parametrize(
    ("version", "changelog", "says"),
    [
        ("", CHANGES, "VERSION= is no version; write one such as"),
        ("v7.1.0", CHANGES, "VERSION=v7.1.0 is no version"),
        ("7.1", CHANGES, "VERSION=7.1 is no version"),
        ("7.1.0", "# Changelog\n\n## [Unreleased]\n\n## [7.0.0] - 2030-01-01\n\n- Old.\n", "nothing is under"),
        ("7.1.0", f"{CHANGES}\n## [7.1.0] - 2030-01-01\n\n- Old.\n", "has 7.1.0 already"),
    ],
)
def test_releases_that_cannot_be(tree: Path, version: str, changelog: str, says: str) -> None:
    (tree / "CHANGELOG.md").write_text(changelog)
    before = contents(tree)
    with pytest.raises(Refused, match=re.escape(says)) as refused:
        prepare(tree, version, "2031-05-06")
    assert "\n" not in str(refused.value) and contents(tree) == before


def test_a_place_without_a_version(tree: Path) -> None:
    (tree / "CITATION.cff").write_text("title: lightpeft\n")
    before = contents(tree)
    with pytest.raises(Refused, match="CITATION.cff has 0 lines of the form"):
        prepare(tree, "7.1.0", "2031-05-06")
    assert contents(tree) == before


def test_tags_of_something_else(tree: Path) -> None:
    with pytest.raises(Refused, match=r"the tag v7\.1\.0 is not the version of src"):
        check(tree, "v7.1.0")
    with pytest.raises(Refused, match=r"says nothing of v0\.1\.0"):
        check(tree, f"v{lightpeft.__version__}")


def test_a_release_begins_with_all_committed(tree: Path) -> None:
    """`git restore .` takes a version back, and must take back nothing else."""

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tree, check=True)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    (tree / "beside").write_text("not tracked")
    committed(tree)
    (tree / "CITATION.cff").write_text("title: mine\n")
    with pytest.raises(Refused, match=r"CITATION\.cff is changed and not committed; commit it, or put it aside"):
        committed(tree)


@pytest.mark.parametrize("arguments", [[], ["0.2.0", "--tag", "v0.2.0"], ["--tag", "v99.0.0"], ["99"]], ids=" ".join)
def test_the_script_refuses_in_one_line(arguments: list[str]) -> None:
    said = subprocess.run([sys.executable, ROOT / ".ci/release.py", *arguments], capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.startswith("release: ") and said.stderr.count("\n") == 1


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_take_nothing_that_can_change(workflow: Path) -> None:
    """Actions by the hash of a commit, with its version beside it; jobs with the rights that they name alone."""
    text = workflow.read_text()
    uses = re.findall(r"uses: (.+)$", text, re.MULTILINE)
    assert all(re.fullmatch(r"[\w/.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each) for each in uses)
    told = yaml.safe_load(text)
    assert told["permissions"] == {}
    assert all({"permissions", "timeout-minutes"} <= job.keys() for job in told["jobs"].values())


def test_workflows_call_what_is_here() -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(workflow.read_text() for workflow in WORKFLOWS)
    lanes = [f"test-{lane}" for lane in yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
             ["versions"]["strategy"]["matrix"]["lane"]]  # fmt: skip
    called = [word for line in re.findall(r"run: make ([\w -]+)", text) for word in line.split() if "=" not in word]
    assert {"docs", "lint", "test-core", "test-release"} <= set(called)
    for target in (*(name for name in called if name not in ("PYTHON", "WORKERS")), *lanes):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_a_bug_report_asks_for_what_the_command_prints() -> None:
    forms = [path.read_text() for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")]
    assert sum("`lightpeft --version --verbose`" in form for form in forms) == 2


def test_each_check_that_is_left_out_has_a_reason() -> None:
    left_out = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["repo-review"]["ignore"]
    reasons = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"^\| ([A-Z][^|]*) \|", reasons, re.MULTILINE)
    checks = re.findall(r"[A-Z]{2,3}\d[\dx]{2}", " ".join(named))
    assert left_out and all(any(re.fullmatch(check.replace("x", r"\d"), name) for check in checks) for name in left_out)
