"""Options: how they are declared and shown, and how words of the command line become plain values."""

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
    """One option of a verb, or one argument that is told by its place."""

    names: str
    """As they are written, with spaces between them: "--text --data.columns.text", or "model" for a place."""
    help: str
    """What it is; empty: it is not shown."""
    type: Any = str
    """What its value may be, as the type of a setting."""
    default: Any = None
    """What holds without it, as help shows it; None: nothing is shown."""
    flag: bool = False
    """It takes no value: it is there or not."""
    count: Literal["?", "+"] | None = None
    """Values that it takes: none or one, one or more; None: one."""
    rare: bool = False
    """Of a verb that takes the settings of a run: `--help-all` shows it, `--help` does not."""

    @property
    def name(self) -> str:
        """Its first name, by which it is told from all others."""
        return self.names.split()[0]

    @property
    def target(self) -> str:
        """Dotted name of what it sets."""
        return self.name.lstrip("-")

    @property
    def has_keys(self) -> bool:
        """Whether its value may be a mapping with keys of the user's."""
        return any(typing.get_origin(part) is dict for part in _options(self.type))

    @property
    def type_of_keys(self) -> Any:
        """What these may be, where it is text; Any: whatever YAML reads."""
        mappings = [part for part in _options(self.type) if typing.get_origin(part) is dict]
        return str if all(typing.get_args(part)[1] is str for part in mappings) else Any

    @property
    def is_place(self) -> bool:
        """Whether it is told by its place."""
        return not self.names.startswith("-")

    def add_to(self, parser: Any) -> None:
        """Declare it to a parser or a group of one; its value stays text there."""
        shape: dict[str, Any] = {} if self.is_place else {"dest": self.name}
        shape |= {"action": "store_true"} if self.flag else {"nargs": self.count, "metavar": _metavar(self)}
        described = _described(self).replace("%", "%%") if self.help else SUPPRESS
        action = parser.add_argument(*self.names.split(), default=SUPPRESS, help=described, **shape)
        if choices := _choices(self.type):
            action.completer = lambda **_: choices  # what argcomplete asks

    def value(self, given: Any) -> Any:
        """What was given for an option of a verb's own, checked: text is good as it is, such as a file's name.

        Raises:
            LightPeftError: it is of another type.
        """
        return given if self.type is str else convert(self.plain(given), self.type, self.name)

    def plain(self, given: Any, known: Iterable[str] = ()) -> Any:
        """What was given for it, as plain data.

        Args:
            given: a word, a list of words, or True for a flag.
            known: all options that there are.

        Raises:
            LightPeftError: it takes the settings of a section, and these are none.
        """
        if not isinstance(given, str):
            return given
        if self.type is LightConfig:
            return light_of(given)
        is_section = dataclasses.is_dataclass(self.type)
        return section_of(given, self.target, known) if is_section else value_of(given, self.type)


def one_of(values: Iterable[str]) -> Any:
    """The type of what is one of some words."""
    return Literal.__getitem__(tuple(values))


class Help(Action):
    """An option that shows the help of a parser and ends the command."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, of: Callable[[], ArgumentParser], help: str
    ) -> None:
        super().__init__(option_strings, SUPPRESS, nargs=0, default=SUPPRESS, help=help)
        self.of = of

    def __call__(self, parser: ArgumentParser, *_: Any) -> None:
        self.of().print_help()
        parser.exit()


class Parser(ArgumentParser):
    """argparse's parser, with what is wrong as an exception."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below the usage."""
        raise LightPeftError(message)

    def words(self, arguments: Sequence[str]) -> dict[str, Any]:
        """What was given on a command line, by the options' names: text, lists of text, or True for flags.

        Raises:
            LightPeftError: an option that does not exist, or lacks its value.
        """
        given, unknown = self.parse_known_intermixed_args(list(arguments))
        if unknown:
            raise LightPeftError(unknown_option(unknown, self.known))
        return vars(given)

    @property
    def known(self) -> list[str]:
        """All options that there are."""
        return options_of(self)


def value_of(word: str, wanted: Any) -> Any:
    """A word as plain data: as it is where text is wanted, and else what YAML reads in it."""
    parts = _options(wanted)
    if all(part in (str, NoneType) or typing.get_origin(part) is Literal for part in parts):
        return None if word == "null" and NoneType in parts else word
    try:
        return parse_yaml(word, word)
    except LightPeftError:
        return word  # which is refused where the value is checked


def section_of(word: str, name: str, known: Iterable[str]) -> dict[str, Any]:
    """The settings of a whole section, as YAML or in a file of it."""
    value = value_of(word, dict)
    if isinstance(value, dict):
        return value
    if not Path(word).is_file():
        meant = meant_option(name, list(known))
        raise LightPeftError(f"--{name} takes a YAML file, and {word} is none; did you mean {meant}?")
    return load_yaml(word)


def light_of(word: str) -> dict[str, Any]:
    """The settings of `light` from one word: a short form of them, YAML, or a file of it."""
    return load_yaml(word) if Path(word).is_file() else light_mapping(value_of(word, dict))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted names as a tree; what a name stands for comes before what is in it."""
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


# -- how they are shown ------------------------------------------------------------------------------------------


def _options(wanted: Any) -> tuple[Any, ...]:
    """The parts of a union; of any other type, itself."""
    origin = typing.get_origin(wanted)
    return (wanted,) if origin in (None, list, tuple, dict, Literal) else typing.get_args(wanted)


def _metavar(option: Option) -> str | None:
    if option.is_place:
        return None
    choices = _choices(option.type)
    return f"{{{','.join(choices)}}}" if choices else option.target.rpartition(".")[2].upper()


def _choices(wanted: Any) -> list[str]:
    """All values that a type has; empty: there is no end of them."""
    parts = [_CHOICES.get(part, typing.get_args(part)) for part in _options(wanted)]
    named = all(part in _CHOICES or typing.get_origin(part) is Literal for part in _options(wanted))
    return [str(choice) for part in parts for choice in part] if named else []


_CHOICES: dict[Any, tuple[str, ...]] = {bool: ("true", "false"), NoneType: ("null",)}


def _described(option: Option) -> str:
    """The help with the type, where it is not plain from the choices, and the default."""
    if option.flag or dataclasses.is_dataclass(option.type):
        return option.help
    facts = [] if option.type is str or _choices(option.type) else [f"type: {type_name(option.type)}"]
    if option.default not in (None, "") or NoneType in _options(option.type):
        facts.append(f"default: {shown_default(option)}")
    return f"{option.help} ({', '.join(facts)})" if facts else option.help


def shown_default(option: Option) -> str:
    """What holds without an option, as YAML has it."""
    return str(yaml.safe_dump(option.default, default_flow_style=True, allow_unicode=True).splitlines()[0])


def type_name(wanted: Any) -> str:
    """A type as help shows it: int, list[str] | null, float | auto."""
    return " | ".join(_name(part) for part in _options(wanted))


def _name(part: Any) -> str:
    if typing.get_origin(part) is dict:
        return "mapping"
    return " | ".join(_choices(part)) or (str(part) if typing.get_origin(part) else part.__name__)
