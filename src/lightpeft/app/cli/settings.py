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
    Option("--run", "Folder of a run to continue, with the settings of its config.yaml."),
    Option("--print_config", "Print the resulting settings as YAML and exit.", flag=True, rare=True),
)
"""Options that name where settings come from, which other options override, and the one that prints them."""
COMMON_SETTINGS = (
    "--model.name",
    "--data.train",
    "--data.columns",
    "--output",
    "--light",
    "--training.epochs",
)
"""The common settings, in the order of `--help`; `--help-all` shows the others."""


def run_config(given: dict[str, Any]) -> RunConfig:
    """Return the settings of a run with defaults: those of `--run` or `--config`, overridden by the options."""
    return run_config_from_dict(run_settings(given))


def run_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `--run` or `--config`, overridden by the options: nested, without defaults."""
    above = dict(given)
    file, folder = above.pop("config", None), above.pop("run", None)
    require(
        not (file and folder),
        "--config and --run exclude each other: a run folder has its own config.yaml; give one of them",
    )
    below: dict[str, Any] = {}
    if folder is not None:
        from lightpeft.app.folders.stored_config import check_run, stored_settings

        check_run(Path(folder))
        below = {**stored_settings(Path(folder)), "output": str(folder)}
    elif file is not None:
        below = load_yaml(file)
    return merge_settings(below, above)


def print_config(given: dict[str, Any]) -> None:
    """Print the resulting settings of a run as YAML."""
    print(yaml.safe_dump(dataclasses.asdict(run_config(given)), sort_keys=False, allow_unicode=True), end="")  # noqa: T201


# -- one option a field ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of options under one heading of `--help-all`."""

    title: str
    options: Sequence[Option]


def sections(arguments: Sequence[str] = (), without: Collection[str] = ()) -> list[Section]:
    """List the options for all settings of a run, by section.

    Args:
        arguments: a command line, which may name keys of settings that are mappings, such as --peft.use_dora.
        without: settings to leave out.
    """
    first, *inner = sections_of("", RunConfig(), arguments, without)
    return [first, *inner]


def _key_options(options: Sequence[Option], arguments: Sequence[str]) -> list[Option]:
    """Make an option for each key of a mapping that a command line names, such as --peft.r."""
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
    """Yield a section and those inside it, each with an option for the whole section and one for each field.

    Args:
        name: dotted name of the section; empty: the run itself, which has no option for the whole.
        usual: the section with its default values.
    """
    cls = type(usual)
    fields = [each for each in dataclasses.fields(cls) if each.name not in without]
    inner = [each.name for each in fields if dataclasses.is_dataclass(_hint(cls, each.name))]
    prefix = f"{name}." if name else ""
    own = [_option(usual, each.name, prefix) for each in fields if each.name not in inner]
    whole = [Option(f"--{name}", _section_help(cls), type=cls)] if name else []
    yield Section(_title(cls), [*whole, *own, *_key_options(own, arguments)])
    for each in inner:
        yield from sections_of(f"{prefix}{each}", getattr(usual, each), arguments)


def _section_help(cls: Any) -> str:
    section = "all of this section, as YAML or in a YAML file."
    amount = "Part of the blocks' parameters to remove, such as 0.4; auto; the name of a preset; or"
    return f"{amount} {section}" if cls is LightConfig else f"A{section[1:]}"


def _option(usual: Any, field: str, prefix: str) -> Option:
    name, cls = f"{prefix}{field}", cast(Any, type(usual))
    return Option(f"--{name}", _field_docs(cls)[field], _hint(cls, field), getattr(usual, field))


def _title(cls: Any) -> str:
    return (cls.__doc__ or "").partition("\n")[0].rstrip(".")


def _hint(cls: Any, name: str) -> Any:
    return _hints(cls)[name]


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def _field_docs(cls: type) -> dict[str, str]:
    """Map each field of a class, inherited ones included, to the docstring below it, on one line."""
    if cls is object:
        return {}
    found = {name: text for base in reversed(cls.__bases__) for name, text in _field_docs(base).items()}
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = node.body if isinstance(node, ast.ClassDef) else []
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found
