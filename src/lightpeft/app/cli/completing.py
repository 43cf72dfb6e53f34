"""Shell completion of a half-written command."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Callable, Collection


def is_completion() -> bool:
    """Return True if a shell asks for completions (as argcomplete's script does), so that no verb must run."""
    return "_ARGCOMPLETE" in os.environ


def complete(parser: Callable[[Collection[str]], ArgumentParser]) -> None:
    """Print the completions for the shell, and end the process.

    Args:
        parser: makes a parser of all verbs, with the options of the verbs it is called with.
    """
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    argcomplete.autocomplete(parser(words[1:2]), always_complete_options="long")
