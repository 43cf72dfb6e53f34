"""Damage to files and to plain data, at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]


def _flip(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def _piece(data: bytes, draw: random.Random) -> tuple[int, int]:
    first, last = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return first, last


def _cut_out(data: bytes, draw: random.Random) -> bytes:
    first, last = _piece(data, draw)
    return data[:first] + data[last:]


def _zeros(data: bytes, draw: random.Random) -> bytes:
    first, last = _piece(data, draw)
    return data[:first] + bytes(last - first) + data[last:]


def _twice(data: bytes, draw: random.Random) -> bytes:
    first, last = _piece(data, draw)
    return data[:last] + data[first:]


def _digit(data: bytes, draw: random.Random) -> bytes:
    places = [at for at, letter in enumerate(data) if chr(letter).isdigit()]
    at = draw.choice(places) if places else 0
    return data[:at] + str(draw.randrange(10)).encode() + data[at + 1 :]


MUTATING: dict[str, Mutation] = {
    "flip": _flip,
    "cut off": lambda data, draw: data[: draw.randrange(len(data))],
    "cut out": _cut_out,
    "zeros": _zeros,
    "twice": _twice,
    "digit": _digit,
    "garbage": lambda data, draw: draw.randbytes(draw.randrange(200)),
}


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values in plain data."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from leaves(value, (*path, key))


ODD = [None, True, -1, 0, 5, 1.5, 1e308, 10**30, "", "x", "../..", "0-99999999999", [], [1], [[]], {}, {"a": 1}]


def rewrite(data: dict[str, Any], draw: random.Random) -> None:
    """Take a value out of plain data, or put an odd one in its place."""
    *way, last = draw.choice(list(leaves(data)))
    place: Any = data
    for key in way:
        place = place[key]
    if draw.random() < 0.25:
        del place[last]
    else:
        place[last] = draw.choice(ODD)


def damage(folder: Path, draw: random.Random) -> str:
    """Change one file below a folder at random; says what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    path = draw.choice(files)
    what = draw.choice([*MUTATING, "gone"])
    if what == "gone":
        path.unlink()
    elif path.stat().st_size:
        path.write_bytes(MUTATING[what](path.read_bytes(), draw))
    return f"{what}: {path.relative_to(folder)}"
