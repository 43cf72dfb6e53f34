"""The settings of a run on the command line: one option a field, over those of a file or of a run folder."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Collection, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lightpeft.app.cli.options import Option
from lightpeft.config import PRESETS, RunConfig, overlaid, run_config_from_dict, usual_preset
from lightpeft.config.validation import load_yaml
from lightpeft.errors import require

SOURCES = (
    Option("--config", "YAML file with settings."),
    Option("--run", "Folder of a run to go on with; its own config.yaml holds."),
    Option("--print_config", "Show all settings as YAML, as they would be, and exit.", flag=True, rare=True),
)
"""Where settings come from before options go on top, and how they are shown."""
USUAL = (
    "--model.name",
    "--data.train",
    "--data.columns",
    "--output",
    "--preset",
    "--light.blocks",
    "--training.epochs",
)
"""The settings that people need, in the order of `--help`; `--help-all` shows the others."""


def run_config(given: dict[str, Any]) -> RunConfig:
    """The run that is asked for: the settings of `--run` or of `--config`, with the options on top."""
    return run_config_from_dict(run_settings(given))


def run_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The same as far as they are given, nested, before presets and defaults."""
    from lightpeft.app.folders.run_folder import stored_settings

    above = dict(given)
    file, folder = above.pop("config", None), above.pop("run", None)
    require(not (file and folder), "give --config or --run, not both: a run folder has its own config.yaml")
    below: dict[str, Any] = {}
    if folder is not None:
        require((Path(folder) / "config.yaml").is_file(), f"{folder} is not a run folder: it has no config.yaml")
        below = {**stored_settings(Path(folder)), "output": str(folder)}
    elif file is not None:
        below = load_yaml(file)
    return overlaid(below, above)


def print_config(given: dict[str, Any]) -> None:
    """Show all settings as YAML, as they would be."""
    print(yaml.safe_dump(dataclasses.asdict(run_config(given)), sort_keys=False, allow_unicode=True), end="")  # noqa: T201


# -- one option a field ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Section:
    """Options that belong together."""

    title: str
    options: Sequence[Option]


def sections(arguments: Sequence[str] = (), without: Collection[str] = ()) -> list[Section]:
    """Options for all settings of a run.

    Args:
        arguments: a command line, which may name keys of settings that are mappings, such as --peft.use_dora.
        without: settings to leave out.
    """
    fields = [each for each in dataclasses.fields(RunConfig) if each.name not in without]
    inner = [each for each in fields if dataclasses.is_dataclass(_hint(RunConfig, each.name))]
    own = [_option(RunConfig, each) for each in fields if each not in inner]
    whole = [section(each.name, _hint(RunConfig, each.name), arguments) for each in inner]
    return [Section(_title(RunConfig), [*own, *_keys(own, arguments)]), *whole]


def _keys(options: Sequence[Option], arguments: Sequence[str]) -> list[Option]:
    """Options for keys of mappings, as far as a command line names them."""
    written = dict.fromkeys(word.partition("=")[0] for word in arguments)
    mappings = [option for option in options if option.has_keys]
    return [
        Option(name, "", type=option.type_of_keys)
        for option in mappings
        for name in written
        if name.startswith(f"{option.name}.")
    ]


def section(name: str, cls: Any, arguments: Sequence[str] = ()) -> Section:
    """Options for all fields of a class: first one for the whole, below a name, then one a field."""
    whole = Option(f"--{name}", "All of this section, as YAML or in a YAML file.", type=cls)
    own = [_option(cls, each, f"{name}.") for each in dataclasses.fields(cls)]
    return Section(_title(cls), [whole, *own, *_keys(own, arguments)])


def _option(cls: Any, field: dataclasses.Field[Any], prefix: str = "") -> Option:
    name = f"{prefix}{field.name}"
    return Option(f"--{name}", _documented(cls)[field.name], _hint(cls, field.name), _default(field, name))


def _default(field: dataclasses.Field[Any], name: str) -> Any:
    """What holds if nobody says anything, which for `light` is the preset's to say."""
    if name == "preset":  # which its task has a say in
        return None
    section, _, key = name.rpartition(".")
    preset = PRESETS[usual_preset(written=False, measured=True)] if section == "light" else {}
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    return preset.get(key, default)


def _title(cls: Any) -> str:
    return (cls.__doc__ or "").partition("\n")[0].rstrip(".")


def _hint(cls: Any, name: str) -> Any:
    return _hints(cls)[name]


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def _documented(cls: type) -> dict[str, str]:
    """Field -> the string below it in the class, on one line; fields of base classes included."""
    if cls is object:
        return {}
    found = {name: text for base in reversed(cls.__bases__) for name, text in _documented(base).items()}
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = node.body if isinstance(node, ast.ClassDef) else []
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found
