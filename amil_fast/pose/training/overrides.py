"""Nested dataclasses from dicts, and ``section.key=value`` overrides.

An unknown key raises an error that names the closest known one; so does a value of the wrong type.
"""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any


def parse_override(text: str) -> tuple[str, Any]:
    """``"section.key=value"`` -> (name, value); the value is parsed as JSON, or kept as a string."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set: expected section.key=value, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), None if value in ("None", "none") else value


def place(kind, content, path, value, name):
    """Sets the value at ``path`` of nested dicts that hold the fields of dataclass ``kind``."""
    here, known = content, kind
    for depth, key in enumerate(path[:-1]):
        _known(known, key, ".".join(path[: depth + 1]))
        if here.get(key) is None:  # a discriminator that was switched off
            here[key] = {}
        here, known = here[key], _section(known, key)
        if known is None:
            raise ValueError(f"{name}: {'.'.join(path[: depth + 1])} has no fields")
    _known(known, path[-1], name)
    here[path[-1]] = value


def _section(known, key):
    """The dataclass that is the type of a field, or None."""
    hint = typing.get_type_hints(known)[key]
    options = typing.get_args(hint) or (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _known(known, key, name):
    names = [f.name for f in dataclasses.fields(known)]
    if key not in names:
        raise ValueError(f"{name}: unknown setting{nearest(key, names)}; known here: {', '.join(names)}")


def nearest(key, names):
    """Returns a hint with the closest known name for an error message, or an empty string."""
    near = difflib.get_close_matches(key, list(names), 1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def build(kind, content, prefix):
    """Builds a dataclass from nested dicts; ``prefix`` precedes the names in error messages."""
    if not isinstance(content, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'configuration'}: expected a dict, got {content!r}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        _known(kind, key, prefix + key)
        values[key] = _convert(hints[key], value, prefix + key)
    return kind(**values)


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
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif option is not type(None) and type(value) is option:
            return value
    raise ValueError(f"{name}: expected {_describe(hint)}, got {value!r}")


def _describe(hint):
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
