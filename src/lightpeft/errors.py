"""The exception for invalid input: one line that says what is wrong, where, and what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LightPeftError(ValueError):
    """Invalid input or an impossible request; `str(error)` is one line for the user.

    Example:
        try:
            model = load_light("adapter")
        except LightPeftError as error:
            print(error)
    """


def require(condition: object, message: str) -> None:
    """Raise `LightPeftError(message)` unless `condition` holds."""
    if not condition:
        raise LightPeftError(message)


def one_line(text: object, limit: int | None = None) -> str:
    """Return an error of a library, or any text, on one line, cut to `limit` characters if that is given."""
    return " ".join(str(text).split())[:limit]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most similar to a misspelt one; None: no word is similar."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)
