"""Options of the command line: declaration, help, and conversion of words to plain values."""

from __future__ import annotations

import dataclasses
import typing
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn

import yaml

from lightpeft.app.cli.hints import meant_option, unknown_option
from lightpeft.compat.argparse import options_of
from lightpeft.config import LightConfig, light_mapping
from lightpeft.config.peft import TYPE
from lightpeft.config.validation import convert, load_yaml, parse_yaml
from lightpeft.errors import LightPeftError


@dataclass(frozen=True)
class Option:
    """One option of a verb, or one positional argument."""

    names: str
    """Names as written, separated by spaces: "--text --data.columns.text"; "model" for a positional argument."""
    help: str
    """Help text; empty: help does not show the option."""
    type: Any = str
    """Type of the value, as the type of a setting."""
    default: Any = None
    """Default value that help shows; None: help shows none."""
    flag: bool = False
    """True: the option takes no value."""
    count: Literal["?", "+"] | None = None
    """Number of values: "?" for at most one, "+" for one or more, None for exactly one."""
    rare: bool = False
    """True: `--help-all` shows the option and `--help` does not, in a verb that takes the settings of a run."""

    @property
    def name(self) -> str:
        """The first name, which identifies the option."""
        return self.names.split()[0]

    @property
    def target(self) -> str:
        """The dotted name of the setting, without dashes."""
        return self.name.lstrip("-")

    @property
    def has_keys(self) -> bool:
        """True if the value may be a mapping with keys of the user's choice."""
        return any(typing.get_origin(part) is dict for part in _union_parts(self.type))

    @property
    def type_of_keys(self) -> Any:
        """The type of the values of such a mapping: str, or Any for whatever YAML reads."""
        mappings = [part for part in _union_parts(self.type) if typing.get_origin(part) is dict]
        return str if all(typing.get_args(part)[1] is str for part in mappings) else Any

    @property
    def is_place(self) -> bool:
        """True for a positional argument."""
        return not self.names.startswith("-")

    def add_to(self, parser: Any) -> None:
        """Add the option to a parser or an argument group, which keeps its value as text."""
        shape: dict[str, Any] = {} if self.is_place else {"dest": self.name}
        shape |= {"action": "store_true"} if self.flag else {"nargs": self.count, "metavar": _metavar(self)}
        described = _help_text(self).replace("%", "%%") if self.help else SUPPRESS
        action = parser.add_argument(*self.names.split(), default=SUPPRESS, help=described, **shape)
        if choices := _choices(self.type):
            action.completer = lambda **_: choices  # what argcomplete asks

    def value(self, given: Any) -> Any:
        """Convert and check the value of an option of a verb; text, such as a file name, stays unchanged.

        Raises:
            LightPeftError: the value has another type.
        """
        return given if self.type is str else convert(self.plain(given), self.type, self.name)

    def plain(self, given: Any, known: Iterable[str] = ()) -> Any:
        """Convert the words of the option to plain data.

        Args:
            given: a word, a list of words, or True for a flag.
            known: all options of the parser, for a hint in the error.

        Raises:
            LightPeftError: the option takes the settings of a section, and the word is no such.
        """
        if not isinstance(given, str):
            return given
        if self.type is LightConfig:
            return read_light(given)
        is_section = dataclasses.is_dataclass(self.type)
        return read_section(given, self.target, known) if is_section else value_of(given, self.type)


def one_of(values: Iterable[str]) -> Any:
    """Make the type of a value that must be one of some words."""
    return Literal.__getitem__(tuple(values))


class Help(Action):
    """An option that prints the help of a parser and ends the command."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, of: Callable[[], ArgumentParser], help: str
    ) -> None:
        super().__init__(option_strings, SUPPRESS, nargs=0, default=SUPPRESS, help=help)
        self.of = of

    def __call__(self, parser: ArgumentParser, *_: Any) -> None:
        self.of().print_help()
        parser.exit()


class Parser(ArgumentParser):
    """argparse's parser, with errors as exceptions instead of usage and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise `LightPeftError` with the line that argparse would print below the usage."""
        raise LightPeftError(message)

    def words(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Parse a command line into option name -> text, list of texts, or True for flags.

        Raises:
            LightPeftError: an option does not exist, or its value is missing.
        """
        given, unknown = self.parse_known_intermixed_args(list(arguments))
        if unknown:
            raise LightPeftError(unknown_option(unknown, self.known))
        return vars(given)

    @property
    def known(self) -> list[str]:
        """The names of all options of the parser."""
        return options_of(self)


def value_of(word: str, wanted: Any) -> Any:
    """Convert a word to plain data: unchanged where the type is text, else as YAML reads it."""
    parts = _union_parts(wanted)
    if all(part in (str, NoneType) or typing.get_origin(part) is Literal for part in parts):
        return None if word == "null" and NoneType in parts else word
    try:
        return parse_yaml(word, word)
    except LightPeftError:
        return word  # the check of the value refuses it with a better message


def read_section(word: str, name: str, known: Iterable[str]) -> dict[str, Any]:
    """Read the settings of a whole section from a word: YAML, or the name of a YAML file.

    Args:
        known: all options of the parser, for a hint in the error.
    """
    value = value_of(word, dict)
    if isinstance(value, dict):
        return value
    if not Path(word).is_file():
        meant = meant_option(name, list(known))
        raise LightPeftError(f"--{name} takes YAML or a YAML file, and {word} is neither; did you mean {meant}?")
    return load_yaml(word)


def read_light(word: str) -> dict[str, Any]:
    """Read the settings of `light` from a word: an amount, a preset, YAML, or the name of a YAML file."""
    return load_yaml(word) if Path(word).is_file() else light_mapping(value_of(word, dict))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn values by dotted names into a tree; a section must come before the names inside it."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        place = tree
        for section in sections:
            above = place.get(section, {})
            place[section] = above if isinstance(above, dict) else {TYPE: above}  # --peft ia3 --peft.setting value
            place = place[section]
        place[key] = value
    return tree


# -- help text --------- ------------------------------------------------------------------------------------------


def _union_parts(wanted: Any) -> tuple[Any, ...]:
    """Return the parts of a union; a tuple of the type itself for any other type."""
    origin = typing.get_origin(wanted)
    return (wanted,) if origin in (None, list, tuple, dict, Literal) else typing.get_args(wanted)


def _metavar(option: Option) -> str | None:
    if option.is_place:
        return None
    choices = _choices(option.type)
    return f"{{{','.join(choices)}}}" if choices else option.target.rpartition(".")[2].upper()


def _choices(wanted: Any) -> list[str]:
    """List all values of a type as text; empty for a type with any number of values."""
    parts = [_CHOICES.get(part, typing.get_args(part)) for part in _union_parts(wanted)]
    named = all(part in _CHOICES or typing.get_origin(part) is Literal for part in _union_parts(wanted))
    return [str(choice) for part in parts for choice in part] if named else []


_CHOICES: dict[Any, tuple[str, ...]] = {bool: ("true", "false"), NoneType: ("null",)}


def _help_text(option: Option) -> str:
    """Return the help text with the type, where choices do not show it, and the default."""
    if option.flag or dataclasses.is_dataclass(option.type):
        return option.help
    facts = [] if option.type is str or _choices(option.type) else [f"type: {type_name(option.type)}"]
    if option.default not in (None, "") or NoneType in _union_parts(option.type):
        facts.append(f"default: {shown_default(option)}")
    return f"{option.help} ({', '.join(facts)})" if facts else option.help


def shown_default(option: Option) -> str:
    """Return the default of an option as YAML."""
    return str(yaml.safe_dump(option.default, default_flow_style=True, allow_unicode=True).splitlines()[0])


def type_name(wanted: Any) -> str:
    """Return a type as help shows it: int, list[str] | null, float | auto."""
    return " | ".join(_part_name(part) for part in _union_parts(wanted))


def _part_name(part: Any) -> str:
    if typing.get_origin(part) is dict:
        return "mapping"
    return " | ".join(_choices(part)) or (str(part) if typing.get_origin(part) else part.__name__)
