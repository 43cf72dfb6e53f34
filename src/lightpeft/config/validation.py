"""Conversion of YAML and plain data to typed dataclasses; one-line errors for unknown keys and wrong types."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import reprlib
import sys
import typing
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from lightpeft.errors import LightPeftError, nearest, one_line, require
from lightpeft.files import read_text

T = TypeVar("T")

_YAML_LIMIT = 2**20
"""Maximum size of a YAML file in bytes."""
_MOST_NODES = 100_000
"""Maximum number of keys, values and list entries in a YAML file; entries that aliases repeat count every time."""
_LARGEST_INTEGER = 2**63 - 1
"""Maximum of settings that are whole numbers: the largest integer that the libraries below accept."""


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        LightPeftError: the file is missing, not YAML, not a mapping, or larger than the limits.
    """
    path = Path(path)
    require(path.exists(), f"config file {path} does not exist")
    data = parse_yaml(read_text(path, _YAML_LIMIT), path)
    data = {} if data is None else data
    require(isinstance(data, dict), f"{path} must hold a mapping of settings, not a {type(data).__name__}")
    return data


def parse_yaml(text: str, path: str | Path) -> Any:
    """Parse YAML text; `path` names the file in error messages."""
    in_c = yaml.__version__ != "6.0.3" and hasattr(yaml, "CSafeLoader")  # which crashes on a file of open brackets
    try:
        # Inside, because the one in Python reads the text as it is made.
        loader: Any = (yaml.CSafeLoader if in_c else yaml.SafeLoader)(text)
        node = loader.get_single_node()
        _check_size(node, path)
        _check_keys(node, path)
        return None if node is None else loader.construct_document(node)
    except LightPeftError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that is none
        raise LightPeftError(f"{path} is not YAML: {one_line(error, 300)}") from error


def _check_size(root: yaml.Node | None, path: str | Path) -> None:
    """Refuse YAML that aliases expand to too many values, and YAML that contains itself."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_NODES  # what holds itself has no size
            parts = node.value if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) else []
            flat = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
            sizes[id(node)] = 1 + sum(map(size, flat))
        return sizes[id(node)]

    total = 0 if root is None else size(root)
    require(total < _MOST_NODES, f"{path} expands to more than {_MOST_NODES:,} values; remove nested aliases")


def _check_keys(node: yaml.Node | None, path: str | Path) -> None:
    """Refuse a mapping with the same key twice, of which YAML's loader would keep the last."""
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                twice = f"{path}, line {key.start_mark.line + 1}: {key.value} is set twice; keep one"
                require(key.value not in keys, twice)
                keys.add(key.value)
            _check_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, path)


def short_repr(value: Any) -> str:
    """Return the `repr` of a value for an error message, shortened where it is long."""
    try:
        return _short.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a number of more than {sys.get_int_max_str_digits()} digits"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120
_short.maxlevel = 3


def from_dict(cls: type[T], data: dict[str, Any], where: str = "") -> T:
    """Build dataclass `cls` from nested plain data; the error about an unknown key suggests the nearest known key."""
    values = convert_fields(cls, data, where)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    lacking = [each.name for each in fields if each.name not in values and _is_required(each)]
    require(not lacking, f"{where}{lacking[0] if lacking else ''} is missing")
    return cls(**values)


def convert_fields(cls: type, data: dict[str, Any], where: str = "", without: Collection[str] = ()) -> dict[str, Any]:
    """Convert nested plain data to values of the fields of dataclass `cls` that it gives.

    Args:
        without: fields that may not be given.

    Raises:
        LightPeftError: a key is no field, or a value has another type.
    """
    require(
        isinstance(data, dict), f"{where.rstrip('.') or 'the configuration'} must be a mapping, not {short_repr(data)}"
    )
    names = [field.name for field in dataclasses.fields(cls) if field.name not in without]
    hints = _hints(typing.cast(Any, cls))
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in names:
            inner = [f"{where}{name}" for name in _inner_names(cls)]
            raise LightPeftError(unknown_key(f"{where}{key}", [f"{where}{name}" for name in names], inner))
        values[key] = convert(value, hints[key], f"{where}{key}")
    return values


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def _ranges(cls: Any) -> dict[str, list[Within]]:
    """Return field -> the ranges that its type is annotated with, for the fields of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    beside = {name: typing.get_args(hint)[1:] for name, hint in hints.items() if typing.get_origin(hint) is Annotated}
    return {name: [each for each in said if isinstance(each, Within)] for name, said in beside.items()}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _inner_names(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings inside the sections of dataclass `cls`."""
    for name, hint in _hints(cls).items():
        if prefix:
            yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _inner_names(hint, f"{prefix}{name}.")


def unknown_key(key: str, known: list[str], inner: Iterable[str] = (), noun: str = "key") -> str:
    """Return the error message about an unknown key, with the nearest known key.

    Args:
        known: the keys that are allowed.
        inner: dotted names of settings below these keys, which may be meant as well.
        noun: name of such keys in the message.
    """
    key = key if len(key) <= _short.maxstring else f"{key[: _short.maxstring]}..."
    own = key.rpartition(".")[2]
    meant = next((name for name in inner if name.rpartition(".")[2] == own), None) or nearest(key, known)
    hint = f"; did you mean {meant}?" if meant else f"; known {noun}s: {', '.join(known)}"
    return f"unknown {noun} {key}{hint}"


@dataclasses.dataclass(frozen=True)
class Within:
    """Range of a numeric setting, given with its type: `Annotated[int, Within(least=1)]`."""

    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: int | None = None

    def check(self, value: float, where: str) -> None:
        """Raise `LightPeftError` if a number is out of range; `where` names the setting."""
        below = (self.least is not None and value < self.least) or (self.above is not None and value <= self.above)
        if below or (self.below is not None and value >= self.below):
            raise LightPeftError(f"{where} is {short_repr(value)}; it {self._requirement}")
        if self.most is not None and value > self.most:  # which could only end in a lack of memory, or in an overflow
            raise LightPeftError(f"{where} is {short_repr(value)}; it can be at most {self.most:,}")

    @property
    def _requirement(self) -> str:
        if self.below is not None:
            start = f"[{self.least:g}" if self.above is None else f"({self.above:g}"
            return f"must be in {start}, {self.below:,})"
        if self.above is not None:
            return f"must be above {self.above:g}" if self.above else "must be positive"
        return f"must be at least {self.least:g}"


def check_values(config: Any, section: str = "") -> None:
    """Check every field of dataclass `config`: it has its type, and numbers are finite and within their ranges.

    Args:
        section: prefix of the field names in error messages, such as "data.".
    """
    cls = typing.cast(Any, type(config))
    for name, hint in _hints(cls).items():
        value = getattr(config, name)
        convert(value, hint, f"{section}{name}")
        if isinstance(value, (int, float)):
            for within in _ranges(cls).get(name, ()):
                within.check(value, f"{section}{name}")


def _check_number(value: int | float, where: str) -> None:
    finite = math.isfinite(value) if isinstance(value, float) else abs(value) <= _LARGEST_INTEGER
    require(finite, f"{where} is {short_repr(value)}; give a finite number, below 2**63 if it is a whole number")


def _check_text(value: str, where: str) -> None:
    """Refuse NUL and lone surrogates, because text goes into file names and onto screens."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise LightPeftError(f"{where} contains a lone surrogate (half a character); retype the text") from error
    require("\0" not in value, f"{where} contains a NUL character; remove it")


def _literals(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return tuple(value for part in typing.get_args(hint) for value in _literals(part))


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""Numbers such as 3e-4 and 1.5e4, which YAML 1.1 reads as strings because they lack a dot or a sign."""


_TYPE_NAMES: dict[Any, str] = {
    dict: "a mapping",
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    type(None): "unset",
}
"""Type of a setting -> its name in error messages."""


def convert(value: Any, hint: Any, where: str) -> Any:
    """Convert a plain value to the type of a field; integers are accepted for floats.

    Raises:
        LightPeftError: the value has another type, is an infinite or too large number, or text with invalid characters.
    """
    if isinstance(value, (int, float)):
        _check_number(value, where)
    if isinstance(value, str):
        _check_text(value, where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        section = {} if value is None else value  # a heading with nothing below it
        return from_dict(typing.cast(type, hint), section, f"{where}.")
    options = typing.get_args(hint) if typing.get_origin(hint) not in (None, list, tuple, dict, Literal) else (hint,)
    for option in options:
        if option is Any or (option is type(None) and value is None):
            return value
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return from_dict(typing.cast(type, option), value, f"{where}.")
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if _is_list(option) and isinstance(value, (list, tuple)) and _allows_length(len(value), option):
            item = typing.get_args(option)[0]
            return [convert(entry, item, f"{where}[{index}]") for index, entry in enumerate(value)]
        if typing.get_origin(option) is dict and isinstance(value, dict):
            item = typing.get_args(option)[1]
            return {_check_key(key, where): convert(entry, item, f"{where}.{key}") for key, entry in value.items()}
        if isinstance(option, type) and isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
        if option is float and isinstance(value, int) and not isinstance(value, bool) and int not in options:
            return float(value)
        if option is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
            return convert(float(value), hint, where)
    choices = _literals(hint)
    kinds = [_TYPE_NAMES.get(typing.get_origin(option) or option) for option in options]
    known = [f"{'one of ' if len(choices) > 1 else ''}{', '.join(choices)}"] if choices else []
    wanted = " or ".join([*filter(None, kinds), *known])
    # YAML 1.1 reads words such as no, on and 1 as other things than text
    quotes = " (in quotes)" if str in options and isinstance(value, (bool, int, float)) else ""
    raise LightPeftError(f"{where} is {short_repr(value)}; it must be {wanted}{quotes}")


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (list, tuple)


def _allows_length(length: int, hint: Any) -> bool:
    """Return whether the type `hint` allows a list of this length: tuple[float, float] has two entries."""
    of = typing.get_args(hint)
    return typing.get_origin(hint) is list or of[-1] is Ellipsis or len(of) == length


def _check_key(key: Any, where: str) -> str:
    _check_text(str(key), f"a key of {where}")
    return str(key)
