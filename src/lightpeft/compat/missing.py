"""Names that a release of a library does not have: the features that need them say so, and all others work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightpeft.errors import LightPeftError, one_line

TRIED = {
    "torch": "2.9 to 2.13",
    "transformers": "5.5 to 5.24",
    "peft": "0.18 to 0.21",
    "accelerate": "1.11 to 1.15",
    "datasets": "4.0 to 5.2",
    "huggingface_hub": "1.5 to 2.4",
}
"""Releases of libraries that pyproject.toml allows, up to the newest that there was."""


def unavailable(feature: str, lacking: object) -> LightPeftError:
    """The line that a feature cannot be had with the versions that are installed.

    Args:
        feature: at the beginning of a sentence.
        lacking: what a library does not have, or its error.
    """
    said = one_line(lacking).partition(" (")[0]
    named = [name for name in TRIED if name in said] or list(TRIED)
    tried = ", ".join(f"{name} {TRIED[name]} (here {_installed(name)})" for name in named)
    return LightPeftError(f"{feature} works with {tried}: {said}")


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


@contextmanager
def needed_for(feature: str) -> Iterator[None]:
    """Inside the block, a private name that a library does not have ends in one line.

    Other errors pass, those of public attributes among them.
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
    """What stands for a class, a function or a table that a library does not have.

    It may be a base class, and things may be asked whether they are of it. To call it, or to look into it, ends in one
    line.

    Args:
        feature: as for `unavailable`.
        error: of the import.
        like: which things count as its instances.
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
        if name.startswith("_"):  # those that Python and its libraries look for by themselves
            raise AttributeError(name)
        raise unavailable(cls.feature, cls.error)

    def __contains__(cls, key: object) -> bool:
        raise unavailable(cls.feature, cls.error)

    def __getitem__(cls, key: object) -> Any:
        raise unavailable(cls.feature, cls.error)
