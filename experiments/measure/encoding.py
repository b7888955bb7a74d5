"""Conversion between results, which are dataclasses in the code, and JSON, which they are in files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from spec_envs.sealed import read_sealed

T = TypeVar("T")


@dataclass(frozen=True)
class Inline:
    """Marks a field (a dictionary or a dataclass) whose items are written beside the other fields of its owner.

    Their keys have a prefix and a suffix: ``over: Annotated[dict[str, Interval], Inline("over_")]``.
    """

    prefix: str = ""
    suffix: str = ""

    def key(self, name: str) -> str:
        """Return the key under which an item is written."""
        return self.prefix + name + self.suffix

    def items(self, content: Mapping[str, object], others: Collection[str]) -> dict[str, object]:
        """Return the items of this field in a JSON object that also has the keys ``others``."""
        return {
            key.removeprefix(self.prefix).removesuffix(self.suffix): item
            for key, item in content.items()
            if key.startswith(self.prefix) and key.endswith(self.suffix) and key not in others
        }


def to_json(value: Any) -> Any:
    """Return a value as JSON: dataclasses become dictionaries, at any depth. A field whose default is None is left out
    if it is None."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if not is_dataclass(value):
        return value
    found: dict[str, object] = {}
    hints = get_type_hints(type(value), include_extras=True)
    for field in fields(value):
        item, inline = to_json(vars(value)[field.name]), inlined(hints[field.name])
        if inline:
            found |= {inline.key(name): inner for name, inner in (item or {}).items()}
        elif item is not None or field.default is not None:
            found[field.name] = item
    return found


def inlined(hint: Any) -> Inline | None:
    """Return the ``Inline`` mark of a field's type, or None."""
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, Inline)), None)


def from_json(kind: type[T], content: Any) -> T:
    """Return the dataclass that ``to_json`` wrote; unknown keys are ignored.

    Raises:
        ValueError: a field is missing or has another type.
    """
    return cast(T, read(kind, content))


def load(kind: type[T], path: Path, remedy: str) -> T:
    """Return the dataclass that a sealed JSON file holds.

    Raises:
        ValueError: the file is missing or damaged; the message names it and ends with ``remedy``.
    """
    content = read_sealed(path, remedy)
    try:
        return from_json(kind, content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from None


def read(kind: Any, content: Any) -> Any:
    """Return JSON as a value of a type, which may be a union or a generic type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return read(arguments[0], content)
    if origin in (Union, UnionType):
        return read_union(arguments, content)
    if kind is Any or (kind is float and type(content) is int) or (origin is Literal and content in arguments):
        return content
    if is_dataclass(kind) and isinstance(content, dict):
        return read_fields(cast(type, kind), content)
    if origin is dict and isinstance(content, dict):
        keys, values = arguments
        return {int(key) if keys is int else key: read(values, item) for key, item in content.items()}
    if origin is list and isinstance(content, list):
        return [read(arguments[0], item) for item in content]
    if origin is tuple and isinstance(content, list):
        return tuple(read(part, item) for part, item in zip(arguments, content, strict=True))
    if origin or not isinstance(content, kind):
        raise ValueError(f"{str(content)[:40]!r} stands where {kind.__name__} is expected")
    return content


def read_union(kinds: tuple[Any, ...], content: Any) -> Any:
    """Return JSON as a value of the first type of a union that it fits."""
    reasons = []
    for kind in kinds:
        try:
            return read(kind, content)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0])


def read_fields(kind: type, content: Mapping[str, object]) -> Any:
    """Return a JSON object as a dataclass."""
    hints, found = get_type_hints(kind, include_extras=True), {}
    apart = {field.name for field in fields(kind) if not inlined(hints[field.name])}
    for field in fields(kind):
        inline, hint = inlined(hints[field.name]), hints[field.name]
        if inline:
            found[field.name] = read(hint, inline.items(content, apart))
        elif field.name in content:
            found[field.name] = read(hint, content[field.name])
        elif field.default is MISSING:
            raise ValueError(f"{field.name} is missing")
    return kind(**found)
