"""The settings of a run on the command line: one option a field, over those of a file or of a run folder."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import yaml

from lightpeft.app.cli.options import Option
from lightpeft.config import LightConfig, RunConfig, merge_settings, run_config_from_dict
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
    "--light",
    "--training.epochs",
)
"""The settings that people need, in the order of `--help`; `--help-all` shows the others."""


def run_config(given: dict[str, Any]) -> RunConfig:
    """The run that is asked for: the settings of `--run` or of `--config`, with the options on top."""
    return run_config_from_dict(run_settings(given))


def run_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The same as far as they are given, nested, before defaults."""
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
    return merge_settings(below, above)


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
    first, *inner = sections_of("", RunConfig(), arguments, without)
    return [first, *inner]


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


def sections_of(
    name: str, usual: Any, arguments: Sequence[str] = (), without: Collection[str] = ()
) -> Iterator[Section]:
    """The options of a section, and of those that are in it: first one for the whole, then one a field.

    Args:
        name: dotted; empty: the run itself, which has none for the whole.
        usual: the section where nobody says anything.
    """
    cls = type(usual)
    fields = [each for each in dataclasses.fields(cls) if each.name not in without]
    inner = [each.name for each in fields if dataclasses.is_dataclass(_hint(cls, each.name))]
    prefix = f"{name}." if name else ""
    own = [_option(usual, each.name, prefix) for each in fields if each.name not in inner]
    whole = [Option(f"--{name}", _whole(cls), type=cls)] if name else []
    yield Section(_title(cls), [*whole, *own, *_keys(own, arguments)])
    for each in inner:
        yield from sections_of(f"{prefix}{each}", getattr(usual, each), arguments)


def _whole(cls: Any) -> str:
    section = "all of this section, as YAML or in a YAML file."
    amount = "Part of the blocks to remove such as 0.4, auto, a preset's name, or"
    return f"{amount} {section}" if cls is LightConfig else f"A{section[1:]}"


def _option(usual: Any, field: str, prefix: str) -> Option:
    name, cls = f"{prefix}{field}", cast(Any, type(usual))
    return Option(f"--{name}", _documented(cls)[field], _hint(cls, field), getattr(usual, field))


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
