"""The layer rule: a module imports lower layers only. The sources' syntax trees are read, nothing is run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lightpeft"

LAYERS: tuple[set[str], ...] = (
    {"errors", "files", "foreign", "hub", "limits", "meanwhile", "progress", "streams"},
    {"plain_data", "config", "structure", "records"},
    {"layout", "linears", "machine", "quantised", "schedule", "scoring", "planning", "tasks"},
    {"families", "statistics"},
    {"bottleneck"},
    {"sites"},
    {"adapters", "depth", "harness", "labelled", "loading", "masks", "importance", "prediction_files", "profiling"},
    {"batching"},
    {"generating"},
    {"acceleration", "evaluation", "estimation", "prefix", "refit", "surgery", "streaming", "training"},
    {"bases", "discovery", "watching", "whole"},
    {"checkpoint"},
    {"exporting", "pruner", "reuse", "runs", "tables"},
    {"opening", "pipeline"},
    {"bench", "evaluating", "inspecting", "options", "predicting", "reproduce"},
    {"cli", "__main__", "__init__"},
)
"""Modules and sub-packages of lightpeft, lowest layer first."""
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

WITHIN_LAYER = {
    "files": {"errors"},
    "foreign": {"errors", "files"},
    "limits": {"errors"},
    "streams": {"errors"},
    "config": {"plain_data"},
    "records": {"plain_data", "structure"},
    "__main__": {"cli"},
    "linears": {"quantised"},
    "reuse": {"runs"},
}
"""Imports within a layer that are allowed; those of one sub-package among its own modules always are."""
WITHOUT_MODULES = ("scoring", "planning")
"""Pure on tensors or plain data: they never see an `nn.Module`."""


def unit_of(path: Path) -> str:
    """The module or sub-package directly below lightpeft that the file `path` (relative to it) belongs to."""
    return path.parts[0].removesuffix(".py")


def imported_units(tree: ast.AST, path: Path) -> set[str]:
    """Units of lightpeft that the file imports, also inside functions; importing lightpeft itself is `__init__`."""
    package = ["lightpeft", *path.parts[:-1]]
    units = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "lightpeft":
                inside = len(name) > 1 and (name[1] in LEVEL or (SOURCE / name[1]).with_suffix(".py").is_file())
                units.add(name[1] if inside else "__init__")
    return units


def layer_faults(source: str, path: Path) -> list[str]:
    """What breaks the layer rule in the file `path` (relative to lightpeft), one line each."""
    unit = unit_of(path)
    if unit not in LEVEL:
        return [f"{path}: {unit} is in no layer; add it to LAYERS in {Path(__file__).name}"]
    if LEVEL[unit] == len(LAYERS) - 1:
        return []
    allowed = {other for other, level in LEVEL.items() if level < LEVEL[unit]}
    allowed |= WITHIN_LAYER.get(unit, set()) | {unit}
    found = imported_units(ast.parse(source), path) - allowed
    return [f"{path}: {unit} (layer {LEVEL[unit]}) may not import {other}" for other in sorted(found)]


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


def sources() -> dict[Path, str]:
    """Every module of lightpeft: path relative to the package -> source text."""
    found = sorted(path for path in SOURCE.rglob("*.py"))
    return {path.relative_to(SOURCE): path.read_text(encoding="utf-8") for path in found}


def test_modules_import_lower_layers_only() -> None:
    files = sources()
    assert Path("errors.py") in files, f"no sources below {SOURCE}"
    faults = [fault for path, source in files.items() for fault in layer_faults(source, path)]
    assert not faults, "\n".join(faults)


def test_the_design_page_shows_these_layers() -> None:
    page = (SOURCE.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    shown = re.findall(r"^ {4}(.+)$", page.partition("## Layers")[2].partition("## ")[0], re.MULTILINE)
    assert [set(line.split()) for line in shown] == [layer - {"__main__", "__init__"} for layer in LAYERS]


def test_scoring_and_planning_never_see_modules() -> None:
    files = {path: source for path, source in sources().items() if unit_of(path) in WITHOUT_MODULES}
    assert {unit_of(path) for path in files} == set(WITHOUT_MODULES)
    guilty = [str(path) for path, source in files.items() if uses_torch_nn(ast.parse(source))]
    assert not guilty, f"these import torch.nn: {', '.join(guilty)}"


def test_families_are_told_apart_in_families_only() -> None:
    compared = re.compile(r"model_type\s*(==|!=)")
    guilty = [
        str(path) for path, source in sources().items() if unit_of(path) != "families" and compared.search(source)
    ]
    assert not guilty, f"these compare model_type outside families/: {', '.join(guilty)}"


@pytest.mark.parametrize(
    ("path", "source", "faults"),
    [
        ("planning.py", "from lightpeft.records import PrunePlan", 0),
        ("planning.py", "from lightpeft.scoring import ratio", 1),
        ("planning.py", "import lightpeft.surgery", 1),
        ("planning.py", "def late():\n    from lightpeft import masks", 1),
        ("planning.py", "from lightpeft import EarlyPruner", 1),
        ("planning.py", "from .records import PrunePlan", 0),
        ("planning.py", "from . import surgery", 1),
        ("families/bert.py", "from .registry import register\nfrom ..errors import require", 0),
        ("families/bert.py", "from ..sites.base import Site", 1),
        ("families/bert.py", "import torch\nfrom transformers import BertModel", 0),
        ("config.py", "from lightpeft.errors import require", 0),
        ("errors.py", "from lightpeft.config import LightConfig", 1),
        ("cli.py", "from lightpeft.bench import bench\nfrom lightpeft import __version__", 0),
        ("elsewhere.py", "", 1),
    ],
)
def test_layer_rule_itself(path: str, source: str, faults: int) -> None:
    assert len(layer_faults(source, Path(path))) == faults


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
