"""The one exception users see: a single clear line that says what, where, and what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LightPeftError(ValueError):
    """Bad input or an impossible request; `str(error)` is one line meant for the user."""


def require(condition: object, message: str) -> None:
    """Raise `LightPeftError(message)` unless `condition` holds."""
    if not condition:
        raise LightPeftError(message)


def one_line(text: object, limit: int | None = None) -> str:
    """An error of a library, or its text, on one line of so many characters at most."""
    return " ".join(str(text).split())[:limit]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that somebody meant who wrote this one; None: none is alike."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)
