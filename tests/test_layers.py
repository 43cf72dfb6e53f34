"""What import-linter cannot hold: pure modules see no `torch.nn`, families are told apart in one place, and the design
page shows the layers that pyproject.toml has."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lightpeft"
WITHOUT_MODULES = sorted(path.relative_to(SOURCE).as_posix() for path in (SOURCE / "plans").glob("*.py"))
"""Pure on tensors or plain data: they never see an `nn.Module`."""


def uses_torch_nn(tree: ast.AST) -> bool:
    """Whether the code imports `torch.nn` or anything in it, or reaches for the attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        if any(name == "torch.nn" or name.startswith("torch.nn.") for name in names):
            return True
    return False


def layers() -> list[list[list[str]]]:
    """The layers of pyproject.toml, lowest first, without the entry point: of the package, and of `app`."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = [each for each in settings["tool"]["importlinter"]["contracts"] if each["type"] == "layers"]
    named = [
        [re.findall(r"lightpeft(?:\.app)?\.(\w+)", line) for line in reversed(each["layers"])] for each in contracts
    ]
    return [[line for line in contract if line != ["__main__"]] for contract in named]


def test_every_module_has_a_layer() -> None:
    for folder, contract in zip((SOURCE, SOURCE / "app"), layers(), strict=True):
        there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
        assert there - {"__init__", "__main__"} == {name for line in contract for name in line}


def test_the_architecture_page_shows_these_layers() -> None:
    page = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Layers")[2].partition("## ")[0]
    tables = [re.findall(r"^\| `([^|]+)` \|", table, re.MULTILINE) for table in section.split("| folder")[1:]]
    method, app = ([re.findall(r"\w+", line) for line in reversed(table)] for table in tables)
    assert [[*method, ["app"]], sorted(app)] == [layers()[0], sorted([name] for line in layers()[1] for name in line)]


def test_plans_never_see_modules() -> None:
    guilty = [name for name in WITHOUT_MODULES if uses_torch_nn(ast.parse((SOURCE / name).read_text("utf-8")))]
    assert not guilty, f"these import torch.nn: {', '.join(guilty)}"


def test_families_are_told_apart_in_families_only() -> None:
    compared = re.compile(r"model_type\s*(==|!=)\s*[\"']")
    elsewhere = [path for path in SOURCE.rglob("*.py") if "families" not in path.parts]
    guilty = [str(path) for path in elsewhere if compared.search(path.read_text(encoding="utf-8"))]
    assert not guilty, f"these compare model_type outside families/: {', '.join(guilty)}"


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("import torch\ntorch.topk", False),
        ("from torch import nn", True),
        ("import torch.nn.functional as F", True),
        ("from torch.nn import Module", True),
        ("import torch\ndef f(x: torch.nn.Module): ...", True),
    ],
)
def test_torch_nn_rule_itself(source: str, used: bool) -> None:
    assert uses_torch_nn(ast.parse(source)) is used
