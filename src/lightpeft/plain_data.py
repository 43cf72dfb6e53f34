"""YAML and plain data to typed dataclasses: what is unknown or of another type is refused in one line."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from lightpeft.errors import LightPeftError, require

T = TypeVar("T")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        LightPeftError: the file is missing, not YAML, or not a mapping.
    """
    path = Path(path)
    require(path.is_file(), f"config file {path} does not exist")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LightPeftError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    require(isinstance(data, dict), f"{path} must hold a mapping of settings, not a {type(data).__name__}")
    return data


def from_dict(cls: type[T], data: dict[str, Any], where: str = "") -> T:
    """Build dataclass `cls` from nested plain data; unknown keys are errors that name the nearest key."""
    require(isinstance(data, dict), f"{where or 'the configuration'} must be a mapping, not {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in fields:
            raise LightPeftError(unknown_key(f"{where}{key}", [f"{where}{name}" for name in fields]))
        values[key] = _coerce(value, hints[key], f"{where}{key}")
    return cls(**values)


def unknown_key(key: str, known: list[str]) -> str:
    """The one line about an unknown key, with the nearest known one."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else f"; known keys: {', '.join(known)}"
    return f"unknown key {key}{hint}"


def check_choices(config: Any) -> None:
    """Check that every field of dataclass `config` whose type names literal choices holds one of them."""
    for name, hint in typing.get_type_hints(type(config)).items():
        options = _literals(hint)
        value = getattr(config, name)
        if options and isinstance(value, str) and value not in options:
            raise LightPeftError(f'{name} is "{value}"; choose one of {", ".join(map(str, options))}')


def _literals(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return tuple(value for part in typing.get_args(hint) for value in _literals(part))


_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
"""Numbers such as 3e-4, which YAML 1.1 reads as strings because they have no dot."""


_KINDS: dict[Any, str] = {
    dict: "a mapping",
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    type(None): "unset",
}
"""Types of settings as error messages call them."""


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Check a plain value against a field's type; YAML's integers are fine where floats are asked for."""
    if dataclasses.is_dataclass(hint):
        section = {} if value is None else value  # a heading with nothing below it
        return from_dict(typing.cast(type, hint), section, f"{where}.")
    options = typing.get_args(hint) if typing.get_origin(hint) not in (None, list, dict, Literal) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if typing.get_origin(option) is list and isinstance(value, list):
            item = typing.get_args(option)[0]
            return [_coerce(entry, item, f"{where}[{index}]") for index, entry in enumerate(value)]
        if typing.get_origin(option) is dict and isinstance(value, dict):
            item = typing.get_args(option)[1]
            return {str(key): _coerce(entry, item, f"{where}.{key}") for key, entry in value.items()}
        if isinstance(option, type) and isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
        if option is float and isinstance(value, int) and not isinstance(value, bool) and int not in options:
            return float(value)
        if option is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
            return float(value)
    choices = _literals(hint)
    kinds = [_KINDS.get(typing.get_origin(option) or option) for option in options]
    wanted = " or ".join([kind for kind in kinds if kind] + ([f"one of {', '.join(choices)}"] if choices else []))
    # YAML 1.1 reads words such as no, on and 1 as other things than text
    quotes = " (in quotes)" if str in options and isinstance(value, (bool, int, float)) else ""
    raise LightPeftError(f"{where} is {value!r}; it must be {wanted}{quotes}")
