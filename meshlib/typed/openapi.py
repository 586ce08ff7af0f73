"""The OpenAPI 3.1 document of ``@rpc`` services over HTTP, made of the types in their signatures.

Types are described by ``schemas.py``; what may be said of them with HTTP's own words, where they stand and what comes
back, is said here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from .codec import ExceptionCodec, MethodCodec
from .schemas import REF, Schema, Schemas

__all__ = ["PROBLEM", "document"]

PROBLEM: Final[dict[str, Any]] = {
    "title": "Problem details (RFC 9457)",
    "type": "object",
    "properties": {
        "type": {"type": "string", "default": "about:blank"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "path": {"type": "string", "description": "Which argument, such as order.items[2].price."},
        "raised": {"type": "string", "description": "The name of the declared exception."},
        "error": {"description": "What it carries."},
    },
    "required": ["title", "status"],
}
_PROBLEM: Final = "MeshlibProblem"
"""A name that is no user's."""


def document(
    title: str, version: str, codecs: Sequence[MethodCodec], by_query: frozenset[str], root: str = ""
) -> bytes:
    """The document.

    Args:
        title: What the API is called.
        version: Of the API.
        codecs: Of all methods.
        by_query: The paths of those that can be called by GET.
        root: The path below which they are mounted.
    """
    described = _Described(codecs)
    paths = {codec.method.dest: _path(codec, described, codec.method.dest in by_query) for codec in codecs}
    schemas = {_PROBLEM: PROBLEM, **described.components}
    whole: Schema = {"openapi": "3.1.0", "info": {"title": title, "version": version}}
    if root:
        whole["servers"] = [{"url": root}]
    whole["paths"] = dict(sorted(paths.items()))
    whole["components"] = {"schemas": dict(sorted(schemas.items()))}
    return msgspec.json.format(msgspec.json.encode(whole))


class _Described(Schemas):
    """The schemas of all types that the methods name."""

    def __init__(self, codecs: Iterable[MethodCodec]) -> None:
        kinds: list[Any] = []
        for codec in codecs:
            kinds += [codec.arguments, codec.method.hints.get("return", Any)]
            kinds += [field.type for field in msgspec.structs.fields(codec.arguments)]
            kinds += [each.fields for each in codec.exceptions.values() if each.fields is not None]
        super().__init__(kinds, reserved=[_PROBLEM])

    def arguments(self, codec: MethodCodec) -> Schema:
        """Of an object with all arguments, as far as they can be described."""
        if codec.arguments in self:
            return self(codec.arguments)
        fields = msgspec.structs.fields(codec.arguments)
        return {
            "type": "object",
            "properties": {field.encode_name: self(field.type) for field in fields},
            "required": [field.encode_name for field in fields if field.required],
        }


def _path(codec: MethodCodec, described: _Described, by_query: bool) -> Schema:
    method = codec.method
    summary, _, description = (inspect.getdoc(method.function) or "").partition("\n")
    shared: Schema = {"tags": [method.service]}
    if summary:
        shared["summary"] = summary
    if description.strip():
        shared["description"] = description.strip()
    shared["responses"] = _responses(codec, described)
    body = {"required": True, "content": {"application/json": {"schema": described.arguments(codec)}}}
    path = {"post": {"operationId": f"{method}", **shared, "requestBody": body}}
    if by_query:
        parameters = [_parameter(field, described) for field in msgspec.structs.fields(codec.arguments)]
        path["get"] = {"operationId": f"{method}.get", **shared, "parameters": parameters}
    return path


def _parameter(field: Any, described: _Described) -> Schema:
    schema = dict(described(field.type))
    default = field.default
    if default is msgspec.NODEFAULT and field.default_factory is not msgspec.NODEFAULT:
        default = field.default_factory()
    if default is not msgspec.NODEFAULT and default is not None:
        with contextlib.suppress(TypeError):  # a mark of the handler's own, for "not given"
            told = msgspec.to_builtins(default)
            if described.fits(schema, told):
                schema["default"] = told
    return {"name": field.encode_name, "in": "query", "required": field.required, "schema": schema}


def _responses(codec: MethodCodec, described: _Described) -> Schema:
    result = {"schema": described(codec.method.hints.get("return", Any))}
    responses: Schema = {"200": {"description": "The result.", "content": {"application/json": result}}}
    by_status: dict[str, list[Schema]] = {}
    names: dict[str, list[str]] = {}
    for name, exception in codec.exceptions.items():
        status = str(exception.status)
        by_status.setdefault(status, []).append(_exception(name, exception, described))
        names.setdefault(status, []).append(name)
    for status, variants in sorted(by_status.items()):
        schema = variants[0] if len(variants) == 1 else {"oneOf": variants}
        responses[status] = {
            "description": " or ".join(names[status]),
            "content": {"application/problem+json": {"schema": schema}},
        }
    problem = {"schema": {"$ref": REF.format(name=_PROBLEM)}}
    responses["default"] = {"description": "It failed.", "content": {"application/problem+json": problem}}
    return responses


def _exception(name: str, exception: ExceptionCodec, described: _Described) -> Schema:
    extra: Schema = {"raised": {"const": name}}
    if exception.fields is not None:
        extra["error"] = described(exception.fields)
    return {"allOf": [{"$ref": REF.format(name=_PROBLEM)}, {"type": "object", "properties": extra}]}
