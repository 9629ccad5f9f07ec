"""Reads the fields of a JSON configuration. Tables say which values each field may have; an error is one line."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from reft_jax.types import InputError


class Kind(NamedTuple):
    """The values that a field may have, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


class Field(NamedTuple):
    """One field: its default if it is absent (REQUIRED: it may not be), and whether null means the default."""

    kind: Kind
    default: Any
    null: bool = False


REQUIRED = object()


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number. true and false are not; NaN is, but it is in no range."""
    return type(value) in (int, float)


SIZE = Kind("a whole number from 1 to 2147483647", lambda value: type(value) is int and 1 <= value < 2**31)
POSITIVE = Kind("a number from 1e-6 to 1e18", lambda value: is_number(value) and 1e-6 <= value <= 1e18)
FLAG = Kind("true or false", lambda value: type(value) is bool)
OBJECT = Kind("an object or null", lambda value: type(value) is dict)


def read_field(raw: Mapping[str, Any], name: str, field: Field, source: str, within: str = "") -> Any:
    """Return the value of field `name` of `raw`. `within` is the field that holds `raw`, for the message.

    Raises InputError, naming `source`, the field, its value and what is allowed.
    """
    shown_name = f"{within}.{name}" if within else name
    if name not in raw:
        if field.default is REQUIRED:
            raise InputError(f"{source}: field '{shown_name}' is missing; it must be {field.kind.words}")
        return field.default
    value = raw[name]
    if value is None and field.null:
        return field.default
    if not field.kind.holds(value):
        raise InputError(f"{source}: field '{shown_name}' is {shown(value)}; allowed: {field.kind.words}")
    return value


def shown(value: Any) -> str:
    """The value as JSON, at most 80 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
