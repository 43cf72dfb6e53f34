"""argparse: the options of a parser."""

from __future__ import annotations

from argparse import ArgumentParser


def options_of(parser: ArgumentParser) -> list[str]:
    """Return all names of a parser's options, such as --help and -h."""
    return [name for action in parser._actions for name in action.option_strings]
