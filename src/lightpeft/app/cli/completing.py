"""What a shell offers behind a half-written command."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Callable, Collection


def asked() -> bool:
    """Whether a shell wants to know how a command goes on, and nothing is to be done (argcomplete's script asks so)."""
    return "_ARGCOMPLETE" in os.environ


def answer(parser: Callable[[Collection[str]], ArgumentParser]) -> None:
    """Tell the shell, and end the process.

    Args:
        parser: makes what knows all verbs, and of some of them the options.
    """
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    argcomplete.autocomplete(parser(words[1:2]), always_complete_options="long")
