"""A verb of the command line: its options, its help and what it does, in one place."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightpeft.app.cli.options import Help, Option, Parser, nested
from lightpeft.app.cli.settings import SOURCES, USUAL, Section, print_config, sections


@dataclass(frozen=True)
class Verb:
    """One verb. A new one is a module of `cli/verbs` that makes it, and a line in `cli/verbs/__init__.py`."""

    name: str
    help: str
    """What it does, in a sentence."""
    do: Callable[..., None]
    """Called with the options that were given, by name; on runs, with the given settings first, nested."""
    options: Sequence[Option] = ()
    """Its own options and places."""
    on_runs: bool = False
    """It takes the settings of a run as well: --config, --run, and an option for every setting."""
    without: Sequence[str] = ()
    """Settings of a run that it does not take."""

    def call(self, arguments: Sequence[str], begin: Callable[[], None]) -> None:
        """Do what a command line says.

        Args:
            arguments: the words behind the verb.
            begin: called when they are understood, before anything is done.

        Raises:
            LightPeftError: one is unknown, or lacks its value, or has a wrong one; or what `do` raises.
        """
        settings, own = self._read(arguments)
        if settings.pop("print_config", False):
            print_config(settings)
            return
        begin()
        self.do(*([settings] if self.on_runs else []), **own)

    def _read(self, arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings of a run that a command line gives, nested, and the verb's own options by name."""
        run = self._sections(arguments)
        parser = self._parser(run)
        words = parser.words(arguments)
        settings = [*SOURCES, *(option for section in run for option in section.options)]
        plain = {each.target: each.plain(words[each.name], parser.known) for each in settings if each.name in words}
        return nested(plain), {each.target: each.value(words[each.name]) for each in self.options if each.name in words}

    def parser(self) -> Parser:
        """What reads its command line and shows its help."""
        return self._parser(self._sections(()))

    def declare(self, parser: ArgumentParser) -> None:
        """Declare all that it takes to a parser."""
        self._declare(parser, self._sections(()))

    def _sections(self, arguments: Sequence[str]) -> list[Section]:
        """The settings of a run that it takes, those included that only this command line names."""
        return sections(arguments, without=self.without) if self.on_runs else []

    def _parser(self, run: Sequence[Section]) -> Parser:
        parser = self._empty()
        self._declare(parser, run)
        return parser

    def _empty(self) -> Parser:
        places = [f"[{option.names}]" for option in self.options if option.is_place]
        usage = " ".join(["%(prog)s", *places, "[options]"]) if self.on_runs else None  # there are a hundred of them
        return Parser(prog=f"lightpeft {self.name}", usage=usage, description=self.help, add_help=False)

    def _declare(self, parser: ArgumentParser, run: Sequence[Section]) -> None:
        for option in (*(SOURCES if run else ()), *self.options):
            option.add_to(parser)
        for section in run:
            group = parser.add_argument_group(section.title)
            for option in section.options:
                option.add_to(group)
        self._add_help(parser, run)

    def _add_help(self, parser: ArgumentParser, run: Sequence[Section]) -> None:
        if not run:
            parser.add_argument("-h", "--help", action="help", help="Show this and exit.")
            return
        usual, whole = partial(self._usual, run), partial(self._parser, run)
        parser.add_argument("-h", "--help", action=Help, of=usual, help="Show the options that most people need.")
        parser.add_argument(
            "--help-all", action=Help, of=whole, help="Show all options, one for each setting of a run."
        )

    def _usual(self, run: Sequence[Section]) -> Parser:
        """What shows the help that most people need."""
        parser = self._empty()
        settings = {option.name: option for section in run for option in section.options}
        for option in (*self.options, *(settings[name] for name in USUAL), *SOURCES):
            if not option.rare:
                option.add_to(parser)
        self._add_help(parser, run)
        return parser
