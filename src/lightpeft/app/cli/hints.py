"""Error lines for unknown verbs and options, with the likely one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from lightpeft.errors import nearest


def unknown_verb(word: str, known: Iterable[str]) -> str:
    """Return the error line for an unknown verb, with the verb that is likely meant."""
    meant = nearest(word, known)
    if meant is None:
        return f"unknown verb {word}; lightpeft --help lists all verbs"
    return f"unknown verb {word}; did you mean {meant}?"


def unknown_option(words: Sequence[str], known: Collection[str]) -> str:
    """Return the error line for words that no option takes, with the option that is likely meant.

    Args:
        words: words of a command line that the parser did not take.
    """
    unknown = next((word.partition("=")[0] for word in words if re.match("--?[a-zA-Z]", word)), None)
    if unknown is None:
        return f"unrecognized arguments: {' '.join(words)}; --help lists all options"
    meant = meant_option(unknown, known)
    return f"unknown option {unknown}; " + (f"did you mean {meant}?" if meant else "--help lists all options")


def meant_option(word: str, known: Collection[str]) -> str | None:
    """Return the option (or two, as "A or B") that a wrong one likely means, by section or by spelling."""
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
"""Column names that users often give as options: `--text` for `--data.columns.text`."""
