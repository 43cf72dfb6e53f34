"""argparse: what a parser takes."""

from __future__ import annotations

from argparse import ArgumentParser


def options_of(parser: ArgumentParser) -> list[str]:
    """All names of a parser's options, such as --help and -h."""
    return [name for action in parser._actions for name in action.option_strings]
