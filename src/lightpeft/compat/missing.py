"""Names that a release of a library lacks: the features that need them end in one line, and all others work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightpeft.errors import LightPeftError, one_line

TESTED_RELEASES = {
    "torch": "2.9 to 2.13",
    "transformers": "5.5 to 5.24",
    "peft": "0.18 to 0.21",
    "accelerate": "1.11 to 1.15",
    "datasets": "4.0 to 5.2",
    "huggingface_hub": "1.5 to 2.4",
}
"""Supported releases of libraries: from the oldest that pyproject.toml allows to the newest tested."""


def unavailable(feature: str, lacking: object) -> LightPeftError:
    """Return the error that a feature does not work with the installed releases.

    Args:
        feature: subject of the line, with a capital letter.
        lacking: the missing name, or the error of the library.
    """
    said = one_line(lacking).partition(" (")[0]
    named = [name for name in TESTED_RELEASES if name in said] or list(TESTED_RELEASES)
    tried = ", ".join(f"{name} {TESTED_RELEASES[name]} (here {_installed(name)})" for name in named)
    return LightPeftError(f"{feature} works with {tried}: {said}")


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


@contextmanager
def needed_for(feature: str) -> Iterator[None]:
    """Turn errors about missing private names inside the block into one line; other errors pass.

    Args:
        feature: subject of the line, with a capital letter.

    Raises:
        LightPeftError: an import failed, or a private attribute is missing.
    """
    try:
        yield
    except ImportError as error:
        raise unavailable(feature, error) from error
    except AttributeError as error:
        if not (error.name or "").startswith("_"):
            raise
        raise unavailable(feature, error) from error


def missing(feature: str, error: Exception, like: Callable[[Any], bool] = lambda thing: False) -> Any:
    """Return a stand-in for a class, function or table that a library lacks.

    It can be a base class and the second argument of `isinstance`. Calling or indexing it raises `LightPeftError`.

    Args:
        feature: subject of the error line, with a capital letter.
        error: error of the import.
        like: returns True for objects that count as instances.
    """
    return _Missing("Missing", (), {"feature": feature, "error": error, "like": staticmethod(like)})


class _Missing(type):
    feature: str
    error: Exception
    like: Callable[[Any], bool]

    def __instancecheck__(cls, thing: Any) -> bool:
        return cls.like(thing) if cls.__name__ == "Missing" else super().__instancecheck__(thing)

    def __call__(cls, *args: Any, **options: Any) -> Any:
        raise unavailable(cls.feature, cls.error)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):  # Python and libraries look up such names by themselves
            raise AttributeError(name)
        raise unavailable(cls.feature, cls.error)

    def __contains__(cls, key: object) -> bool:
        raise unavailable(cls.feature, cls.error)

    def __getitem__(cls, key: object) -> Any:
        raise unavailable(cls.feature, cls.error)
