"""What is meant by a verb or an option that is not there: one line about it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from lightpeft.errors import nearest


def unknown_verb(word: str, known: Iterable[str]) -> str:
    """One line about a verb that there is not, with the one that is likely meant."""
    meant = nearest(word, known)
    if meant is None:
        return f"unknown verb {word}; lightpeft --help shows all that there are"
    return f"unknown verb {word}; did you mean {meant}?"


def unknown_option(words: Sequence[str], known: Collection[str]) -> str:
    """One line about words that no option takes, with the option that is likely meant.

    Args:
        words: what is left of a command line.
        known: the options that there are.
    """
    unknown = next((word.partition("=")[0] for word in words if re.match("--?[a-zA-Z]", word)), None)
    if unknown is None:
        return f"unrecognized arguments: {' '.join(words)}; --help shows what there is"
    meant = meant_option(unknown, known)
    return f"unknown option {unknown}; " + (f"did you mean {meant}?" if meant else "--help shows all that there are")


def meant_option(word: str, known: Collection[str]) -> str | None:
    """Return the option, or the two, that somebody meant: called so in a section, or nearly so."""
    name = word.lstrip("-").replace("-", "_").lower()
    if f"--{name}" in known and f"--{name}" != f"--{word}":
        return f"--{name}"
    column = name.rpartition(".")[2]
    if column in _COLUMNS and "--data.columns" in known:
        return f"--data.columns.{column}"
    in_section = [option for option in known if option.endswith(f".{name}")]
    of_section = [option for option in known if option.startswith(f"--{name}.")]
    if len(in_section) in (1, 2):
        return " or ".join(in_section)
    if of_section:
        return of_section[0]
    return nearest(word, set(known) - {"--help", "-h"})


_COLUMNS = ("text", "text_pair", "label", "prompt", "completion")
"""Columns that people give as options."""
