"""Types as JSON Schema, with names that are told apart and defaults that are true.

msgspec describes types as JSON Schema 2020-12, which is what OpenAPI 3.1 has, but two of one name and module defeat it,
and a signature such as ``count: int = None`` makes a schema that refuses its own default. So each type is described by
itself, and what has one name and one form is one component; a second form of a name is numbered.

What msgspec cannot describe (an argument of a class that JSON has no form for, say) is described as anything at all,
rather than costing the rest of the document.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

__all__ = ["REF", "Schema", "Schemas"]

Schema = dict[str, Any]

REF: Final = "#/components/schemas/{name}"
_VALUES: Final = ("const", "default", "enum", "examples")
"""Keywords whose values are no schemas."""
_IS: Final[dict[str, Callable[[Any], bool]]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list | tuple),
    "object": lambda value: isinstance(value, dict),
}


class Schemas:
    """The schemas of types.

    Args:
        kinds: The types.
        reserved: Names that no component may have.

    Attributes:
        components: Those that have names.
    """

    def __init__(self, kinds: Iterable[Any], reserved: Iterable[str] = ()) -> None:
        self.components: dict[str, Schema] = {}
        self._of: dict[int, Schema] = {}
        self._kinds: list[Any] = []  # kept, since they are known by their identity: not every type is hashable
        described: list[tuple[Any, Schema, dict[str, Schema]]] = []
        for kind in kinds:
            try:
                (schema,), parts = msgspec.json.schema_components([kind], ref_template=REF)
            except (TypeError, ValueError, KeyError):
                continue
            self._kinds.append(kind)
            described.append((kind, schema, parts))
        taken = {*reserved, *(name for _, _, parts in described for name in parts)}
        forms: dict[str, dict[bytes, str]] = {}
        for kind, schema, parts in described:
            names = {name: _named(name, _form(name, parts), forms.setdefault(name, {}), taken) for name in parts}
            refs = {REF.format(name=old): REF.format(name=new) for old, new in names.items()}
            self._of[id(kind)] = _renamed(schema, refs)
            for old, new in names.items():
                if new not in self.components:
                    self.components[new] = _renamed(parts[old], refs)
        self.components = {name: self._sound(schema) for name, schema in self.components.items()}

    def __contains__(self, kind: Any) -> bool:
        return id(kind) in self._of

    def __call__(self, kind: Any) -> Schema:
        """That of a type; of anything at all, if it has none."""
        return self._of.get(id(kind), {})

    def fits(self, schema: Schema, value: Any) -> bool:
        """Is a value what a schema asks for? As far as msgspec's schemas can ask, formats aside."""
        if "$ref" in schema:
            referred = self.components.get(schema["$ref"].rpartition("/")[2], {})
            if not self.fits(referred, value):
                return False
        if "anyOf" in schema and not any(self.fits(each, value) for each in schema["anyOf"]):
            return False
        if value not in schema.get("enum", (value,)) or value != schema.get("const", value):
            return False
        kind = schema.get("type")
        if isinstance(kind, str) and kind in _IS and not _IS[kind](value):
            return False
        if isinstance(value, dict):
            return self._object_fits(schema, value)
        if isinstance(value, list | tuple):
            return self._array_fits(schema, value)
        return _text_fits(schema, value) if isinstance(value, str) else _number_fits(schema, value)

    def _object_fits(self, schema: Schema, value: dict[str, Any]) -> bool:
        required, properties = schema.get("required", ()), schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        return (
            _within(schema, len(value), "Properties")
            and all(name in value for name in required)
            and all(self._item_fits(properties.get(name, others), each) for name, each in value.items())
        )

    def _array_fits(self, schema: Schema, value: Any) -> bool:
        first, rest = schema.get("prefixItems", ()), schema.get("items", True)
        return _within(schema, len(value), "Items") and all(
            self._item_fits(first[i] if i < len(first) else rest, each) for i, each in enumerate(value)
        )

    def _item_fits(self, schema: Schema | bool, value: Any) -> bool:
        return schema if isinstance(schema, bool) else self.fits(schema, value)

    def _sound(self, schema: Schema) -> Schema:
        """Without the defaults that it would refuse, or that JSON has no number for."""
        sound: Schema = {}
        for key, value in schema.items():
            if key == "properties":
                sound[key] = {name: self._sound(each) for name, each in value.items()}
            elif isinstance(value, dict) and key not in _VALUES:
                sound[key] = self._sound(value)
            elif isinstance(value, list | tuple) and key not in _VALUES:
                sound[key] = [self._sound(each) if isinstance(each, dict) else each for each in value]
            elif key != "default" or self.fits(schema, value):
                sound[key] = value
        return sound


def _named(name: str, form: bytes, known: dict[bytes, str], taken: set[str]) -> str:
    """What a component is called: by its name, or with a number if that is another's already."""
    if form not in known:
        given, n = name, 1
        while known and given in taken:
            n += 1
            given = f"{name}_{n}"
        known[form] = given
        taken.add(given)
    return known[form]


def _form(name: str, parts: dict[str, Schema]) -> bytes:
    """All that a component says, with what it refers to."""
    refs = {REF.format(name=each): each for each in parts}
    found, left = {name: parts[name]}, [name]
    while left:
        for each in _strings(parts[left.pop()]):
            more = refs.get(each)
            if more is not None and more not in found:
                found[more] = parts[more]
                left.append(more)
    return msgspec.json.encode(found, order="deterministic")


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _strings(each)


def _renamed(value: Any, refs: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(each, refs) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(each, refs) for each in value]
    return refs.get(value, value) if isinstance(value, str) else value


def _within(schema: Schema, size: int, what: str) -> bool:
    least, most = schema.get(f"min{what}", 0), schema.get(f"max{what}", size)
    return bool(least <= size <= most)


def _text_fits(schema: Schema, value: str) -> bool:
    return _within(schema, len(value), "Length") and re.search(schema.get("pattern", ""), value) is not None


def _number_fits(schema: Schema, value: Any) -> bool:
    if not isinstance(value, int | float):
        return True
    return (
        math.isfinite(value)
        and schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)
    )
