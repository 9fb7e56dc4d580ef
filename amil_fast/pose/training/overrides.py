"""Frozen dataclasses from nested dicts, and ``section.key=value`` overrides of them.

Keys and types are checked against the dataclass: an unknown key raises an error that suggests the closest known one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from amil_fast.utils.files import DataError, brief, parse_json

_Config = TypeVar("_Config")


def parse_override(text: str) -> tuple[str, Any]:
    """Splits ``"section.key=value"`` into name and value; the value is parsed as JSON, or else kept as a string."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set: expected section.key=value, got {text!r}")
    try:
        return name.strip(), parse_json(value, name)
    except DataError:
        return name.strip(), None if value in ("None", "none") else value


def build(kind: type[_Config], content: Any, prefix: str = "") -> _Config:
    """Builds the dataclass ``kind`` from nested dicts; missing fields keep their defaults.

    Args:
        kind: a dataclass; fields may be dataclasses, scalars, tuples of fixed length, or a union of one with None.
        content: the dict.
        prefix: ``"section."``, put in front of the keys in error messages.

    Raises:
        ValueError: unknown key, or value of another type.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'configuration'}: expected a dict, got {brief(content)}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        _check_key(kind, key, prefix + key)
        values[key] = _convert(hints[key], value, prefix + key)
    return kind(**values)


def place(kind: type, content: dict[str, Any], name: str, value: Any) -> None:
    """Sets the entry ``name`` (``"section.key"``) of nested dicts that represent the dataclass ``kind``.

    Raises:
        ValueError: unknown section or key.
    """
    path = name.split(".")
    entries, section = content, kind
    for depth, key in enumerate(path[:-1]):
        at = ".".join(path[: depth + 1])
        _check_key(section, key, at)
        if entries.get(key) is None:  # an optional section that is switched off
            entries[key] = {}
        nested = _dataclass_of(section, key)
        if nested is None:
            raise ValueError(f"{name}: {at} has no fields")
        entries, section = entries[key], nested
    _check_key(section, path[-1], name)
    entries[path[-1]] = value


def suggestion(key: str, names: Iterable[str]) -> str:
    """``", did you mean 'NAME'?"`` with the closest of ``names``; empty if none is close."""
    near = difflib.get_close_matches(key, list(names), 1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _dataclass_of(kind, key):
    """The dataclass in the type of a field, or None."""
    hint = typing.get_type_hints(kind)[key]
    options = typing.get_args(hint) or (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _check_key(kind, key, name):
    names = [f.name for f in dataclasses.fields(kind)]
    if key not in names:
        raise ValueError(f"{name}: unknown setting{suggestion(key, names)}; known here: {', '.join(names)}")


def _convert(hint, value, name):
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise ValueError(f"{name}: expected {_describe(hint)}, got nothing")
    for option in options:
        if dataclasses.is_dataclass(option):
            return build(option, value, f"{name}.")
        if typing.get_origin(option) is tuple:
            parts = typing.get_args(option)
            if isinstance(value, list | tuple) and len(value) == len(parts):
                return tuple(_convert(part, v, name) for part, v in zip(parts, value, strict=True))
        elif typing.get_origin(option) is dict and isinstance(value, dict):
            part = typing.get_args(option)[1]
            return value if part is Any else {key: _convert(part, v, f"{name}.{key}") for key, v in value.items()}
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif option is not type(None) and type(value) is option:
            return value
    raise ValueError(f"{name}: expected {_describe(hint)}, got {brief(value)}")


def _describe(hint):
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
