"""Records from untrusted JSON: every field is present and of its type, or a ValueError names the one that is not."""

import dataclasses
import inspect
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

Record = TypeVar("Record")
LARGEST = 2**63  # of a number; counts, times and sizes stay below it


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it is none, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether this is a finite number of a size that anything measured here has."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def record(kind: type[Record], content: Any, *, finite: bool = True) -> Record:
    """A dataclass or NamedTuple from the fields of an object that it knows; the others are passed over.

    Args:
      kind: its annotations may be made of str, int, float, bool, None, Any, unions, Literal, tuple, Mapping, and further records.
      finite: whether NaN and infinity are refused.

    Raises:
      ValueError: a field is missing or of another type; names it.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"an object is wanted, found {_shown(content)}")
    hints = typing.get_type_hints(kind)
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is parameter.empty and name not in content:
            raise ValueError(f"it has no field {name}")
    return kind(**{name: _value(name, hint, content[name], finite) for name, hint in hints.items() if name in content})


def _value(name: str, wanted: Any, value: Any, finite: bool) -> Any:
    """The value as the type says: lists as tuples, objects as records."""
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for part in sorted(parts, key=lambda part: part is not type(value)):  # of int | float the one that it is
            try:
                return _value(name, part, value, finite)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in parts:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        if len(parts) == 2 and parts[1] is Ellipsis:
            return tuple(_value(name, parts[0], one, finite) for one in value)
        if len(parts) == len(value):
            return tuple(_value(name, part, one, finite) for part, one in zip(parts, value, strict=True))
    elif origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return {
                _value(name, parts[0], key, finite): _value(name, parts[1], one, finite) for key, one in value.items()
            }
    elif wanted in (int, float):
        if is_number(value) and isinstance(value, int | wanted):
            return wanted(value)
        if wanted is float and not finite and isinstance(value, float) and not math.isfinite(value):
            return value
    elif wanted is types.NoneType:
        if value is None:
            return None
    elif dataclasses.is_dataclass(wanted) or hasattr(wanted, "_fields"):
        return record(wanted, value, finite=finite)  # pyright: ignore[reportArgumentType] - a class, as hints are
    elif isinstance(wanted, type) and type(value) is wanted:  # bool is an int, but not one here
        if wanted is not str or value.isascii() or _is_text(value):
            return value
    raise ValueError(f"{name} is {_shown(value)}")


def _is_text(value: str) -> bool:
    """Whether it can be written: JSON can hold half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    """Short, on one line and in ASCII. Python refuses to write integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= LARGEST:
        return "a number that is too large"
    if isinstance(value, list | Mapping):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
