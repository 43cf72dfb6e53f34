"""A verb of the command line: its options, its help and what it does, in one place."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightpeft.app.cli.options import Help, Option, Parser, nested
from lightpeft.app.cli.settings import COMMON_SETTINGS, SOURCES, Section, print_config, run_config, sections
from lightpeft.app.folders.stored_config import is_run
from lightpeft.config.places import check_places


@dataclass(frozen=True)
class Verb:
    """One verb. A new one is a module of `cli/verbs` that makes it, and a line in `cli/verbs/__init__.py`."""

    name: str
    help: str
    """One sentence for help: the task of the verb."""
    do: Callable[..., None]
    """Function of the verb: takes its options as keywords and, if `on_runs`, the nested settings first."""
    options: Sequence[Option] = ()
    """Options and positional arguments of this verb alone."""
    check: Callable[..., None] | None = None
    """Function that checks these options before PyTorch loads, which takes seconds."""
    on_runs: bool = False
    """True: the verb takes the settings of a run as well (--config, --run, and an option for every setting)."""
    without: Sequence[str] = ()
    """Settings of a run that the verb does not take."""

    def call(self, arguments: Sequence[str], begin: Callable[[], None]) -> None:
        """Parse a command line and run the verb.

        Args:
            arguments: the words behind the verb.
            begin: called before the verb runs, after its options and settings are checked.

        Raises:
            LightPeftError: an option is unknown, or its value is missing or wrong; or an error of `do`.
        """
        settings, own = self._read(arguments)
        if settings.pop("print_config", False):
            print_config(settings)
            return
        if self.on_runs:
            config = run_config(settings)
            if not is_run(Path(config.output)):  # one that goes on may need its files no more
                check_places(config)
        if self.check is not None:
            self.check(**own)
        begin()
        self.do(*([settings] if self.on_runs else []), **own)

    def _read(self, arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the settings of a run on a command line, nested, and the verb's own options by name."""
        run = self._sections(arguments)
        parser = self._parser(run)
        words = parser.words(arguments)
        settings = [*SOURCES, *(option for section in run for option in section.options)]
        plain = {each.target: each.plain(words[each.name], parser.known) for each in settings if each.name in words}
        return nested(plain), {each.target: each.value(words[each.name]) for each in self.options if each.name in words}

    def parser(self) -> Parser:
        """Make the parser of the verb, with all its options."""
        return self._parser(self._sections(()))

    def declare(self, parser: ArgumentParser) -> None:
        """Add all options of the verb to a parser."""
        self._declare(parser, self._sections(()))

    def _sections(self, arguments: Sequence[str]) -> list[Section]:
        """List the settings of a run that the verb takes, with the mapping keys that this command line names."""
        return sections(arguments, without=self.without) if self.on_runs else []

    def _parser(self, run: Sequence[Section]) -> Parser:
        parser = self._bare_parser()
        self._declare(parser, run)
        return parser

    def _bare_parser(self) -> Parser:
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
            parser.add_argument("-h", "--help", action="help", help="Show this help and exit.")
            return
        usual, whole = partial(self._common_parser, run), partial(self._parser, run)
        parser.add_argument("-h", "--help", action=Help, of=usual, help="Show the common options and exit.")
        parser.add_argument(
            "--help-all", action=Help, of=whole, help="Show all options, one for each setting of a run, and exit."
        )

    def _common_parser(self, run: Sequence[Section]) -> Parser:
        """Make the parser whose help shows the common options alone."""
        parser = self._bare_parser()
        settings = {option.name: option for section in run for option in section.options}
        for option in (*self.options, *(settings[name] for name in COMMON_SETTINGS), *SOURCES):
            if not option.rare:
                option.add_to(parser)
        self._add_help(parser, run)
        return parser
