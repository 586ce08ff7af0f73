"""``@rpc`` services as an ASGI app, so that curl, a browser and other languages can call them.

==========================  ==========================================================================================
request                     answer
==========================  ==========================================================================================
POST /Greeter/hello         a JSON object of arguments, by name; the result as JSON
GET /Greeter/hello?name=x   likewise, for idempotent methods whose arguments are all simple: numbers, text, dates, enums
HEAD, likewise              its headers alone
GET /openapi.json           the OpenAPI 3.1 document, made of the types
==========================  ==========================================================================================

A declared exception is problem+json (RFC 9457) with its own status, its name in ``raised`` and what it carries in
``error``; every other failure is one of those in ``http/problem.py``. Whatever a caller can get wrong is a 4xx that
says what would be right, and is no crash. A body is bounded before it is read, in length and in time.

An app of its own: mount it in a larger one, or let `meshlib.serve` run it below the server stack.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import types
import uuid
from collections.abc import Iterable
from typing import Any, Final, Literal, Union, get_args, get_origin
from urllib.parse import parse_qsl

import anyio
import msgspec

from ..core.env import Env
from ..core.errors import InvalidArgument, MeshError
from ..core.stack import Layer, Stack
from ..filters.mapping import ErrorMapping
from ..http.problem import TYPE, Answer, answer_to, problem
from ..mux import Request, Response
from ..server import PLACES
from .codec import ExceptionCodec, MethodCodec
from .formats import JSON
from .handlers import Handlers
from .openapi import document
from .service import RAISED, TypedService

__all__ = ["ABOVE", "LARGEST", "RpcApp"]

LARGEST: Final = 16 * 1024 * 1024
"""Bytes of a request's body: as many as Mux allows (`Limits.max_frame`)."""
PATIENCE: Final = 30.0
"""Seconds for a request's body: one that trickles in holds a place under the limit meanwhile."""
MOST_PARAMETERS: Final = 1000
"""Of a query string."""
MOST_ROOTS: Final = 16
"""Places that an app is mounted at, each with a document of its own."""
ABOVE: Final = "timeout"
"""The last place of a server's stack that is HTTP's: above it, requests are exchanges."""
DOCUMENT: Final = "/openapi.json"
STATUS: Final = b"meshlib.status"
_PLACES: Final = ("errors", *(place for place in PLACES if place != "errors"))
"""Of the app alone: whatever a layer raises there is mapped."""
_JSON: Final = ((b"content-type", b"application/json"),)
_SIMPLE: Final = (bool, int, float, str, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)


class RpcApp:
    """See the module.

    Args:
        implementations: The objects with ``@rpc`` methods.
        layers: Layers around each call: they see the `Request` with its path as ``dest``, and the `Response`.
        title: Of the OpenAPI document; by default the services' names.
        version: Of the API, likewise.
        largest: Bytes that a request's body may have.
        patience: Seconds that it may take to arrive.
        health: Further paths that are answered with 200, for those who ask whether somebody is there.
        label: What the server is called in logs.

    Attributes:
        handlers: The services and the layers directly around them.

    Raises:
        ConfigurationError: An object has no ``@rpc`` methods, or two offer the same contract.
    """

    def __init__(
        self,
        *implementations: Any,
        layers: Iterable[Layer] = (),
        title: str = "",
        version: str = "1",
        largest: int = LARGEST,
        patience: float = PATIENCE,
        health: Iterable[str] = (),
        label: str = "",
    ) -> None:
        self._typed = _OverHttp(*implementations, form=JSON)
        self.handlers = Handlers(self._typed, ABOVE)
        own = Stack(_PLACES, [ErrorMapping()]).with_layers(*layers)
        self.handlers.alone(own, Env(kind="server", label=label or "http", protocol="http"))
        self._largest, self._patience = largest, patience
        self._health = frozenset(health) - {codec.method.dest for codec in self._typed.codecs} - {DOCUMENT}
        self._by_query = frozenset(codec.method.dest for codec in self._typed.codecs if _is_simple(codec))
        self._title, self._version = title or ", ".join(self.services), version
        self._documents: dict[str, bytes] = {}
        self._document("")  # what cannot be described is told now

    @property
    def services(self) -> dict[str, list[str]]:
        """The names of the methods of each service."""
        return self._typed.services

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            await (await self._answer(scope, receive)).send(send, head=scope["method"] == "HEAD")
        elif scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        else:  # a WebSocket; closed before it is accepted, which servers answer with 403
            await receive()
            await send({"type": "websocket.close"})

    async def _answer(self, scope: Any, receive: Any) -> Answer:
        root: str = scope.get("root_path", "")
        path: str = scope["path"].removeprefix(root)
        method: str = scope["method"]
        if path == DOCUMENT or path in self._health:
            if method not in ("GET", "HEAD"):
                return _not_allowed("GET, HEAD")
            if path == DOCUMENT:
                scope["path_template"] = _route(scope, path)
                return Answer(200, self._document(root), _JSON)
            return Answer(200, b"ok\n", ((b"content-type", b"text/plain"),))
        try:
            codec = self._typed.codec(path)
            scope["path_template"] = _route(scope, path)
            if method == "POST":
                refused = _unreadable(scope["headers"])
                if refused is not None:
                    return refused
                body = None
                with anyio.move_on_after(self._patience) as patience:
                    body = await self._body(scope["headers"], receive)
                if patience.cancelled_caught:
                    return problem(408, f"the body took more than {self._patience:g} s", ((b"connection", b"close"),))
                if body is None:
                    return problem(413, f"the body may have {self._largest} bytes at most")
            elif method in ("GET", "HEAD") and path in self._by_query:
                body = codec.encode_texts(_query(scope["query_string"]))
            else:
                return _not_allowed("GET, HEAD, POST" if path in self._by_query else "POST")
            response = await self.handlers(Request(body or b"{}", path))
        except _Gone:
            return Answer(499)  # nobody will read it
        except MeshError as error:
            return answer_to(error)
        contexts = dict(response.contexts)
        if RAISED in contexts:
            return Answer(int(contexts[STATUS]), response.body, ((b"content-type", TYPE),))
        return Answer(200, response.body, _JSON)

    def _document(self, root: str) -> bytes:
        found = self._documents.get(root)
        if found is None:
            if len(self._documents) >= MOST_ROOTS:
                self._documents.clear()
            codecs = list(self._typed.codecs)
            found = self._documents[root] = document(self._title, self._version, codecs, self._by_query, root)
        return found

    async def _body(self, headers: Iterable[tuple[bytes, bytes]], receive: Any) -> bytes | None:
        """The body; ``None`` if it is too large."""
        length = next((value for name, value in headers if name == b"content-length"), b"0")
        if not length.isdigit():  # servers have seen to that, HTTP/1.1's at least
            raise InvalidArgument("the content-length is no number")
        if len(length) > 18 or int(length) > self._largest:
            return None
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._largest:
                return None
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def __repr__(self) -> str:
        return f"RpcApp({', '.join(sorted(self.services))})"


class _Gone(Exception):
    """The client has left."""


class _OverHttp(TypedService):
    """Tells declared exceptions as problems."""

    def raised(self, codec: ExceptionCodec, error: Exception) -> Response:
        name = codec.kind.__name__
        status = codec.status_of(error)
        facts = {
            "type": f"#{name}",  # beside the method's own URL
            "title": name,
            "status": status,
            "detail": str(error) or name,
            "raised": name,
            "error": msgspec.Raw(codec.encode(error)),
        }
        return Response(JSON.encode(facts), ((RAISED, name.encode()), (STATUS, b"%d" % status)))


def _route(scope: Any, path: str) -> str:
    """What the request is called in metrics and spans, with the place that a framework has mounted the app at."""
    inner, outer = scope.get("root_path", ""), scope.get("app_root_path")
    return path if outer is None else f"{inner.removeprefix(outer)}{path}"


def _not_allowed(allow: str) -> Answer:
    return problem(405, f"the method must be {allow.replace(', ', ' or ')}", ((b"allow", allow.encode()),))


def _unreadable(headers: Iterable[tuple[bytes, bytes]]) -> Answer | None:
    """What to answer to a body that is not as it must be, before it is read."""
    headers = tuple(headers)
    if not _is_json(headers):
        return problem(415, "send the arguments as a JSON object, with content-type: application/json")
    for name, value in headers:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            return problem(415, "send the arguments as they are, not compressed", ((b"accept-encoding", b"identity"),))
    return None


def _is_json(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Is the body JSON, or nothing said of it? A form's type is refused: browsers send those without asking first."""
    for name, value in headers:
        if name == b"content-type":
            kind = value.partition(b";")[0].strip().lower()
            return kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))
    return True


def _query(query: bytes) -> dict[str, str]:
    try:
        pairs = parse_qsl(
            query.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(query),
            errors="strict",
            max_num_fields=MOST_PARAMETERS,
        )
    except ValueError as error:
        raise InvalidArgument(f"the query string cannot be read: {error}") from error
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InvalidArgument("an argument is given twice in the query string")
    return found


def _is_simple(codec: MethodCodec) -> bool:
    """May it be called by GET? An idempotent method is what RFC 9110 9.2.2 means by that; safe is for it to say."""
    return codec.method.idempotent and all(
        _fits_a_query(field.type) for field in msgspec.structs.fields(codec.arguments)
    )


def _fits_a_query(kind: Any) -> bool:
    kind = getattr(kind, "__supertype__", kind)  # of a NewType
    origin = get_origin(kind)
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType):
        return all(each is types.NoneType or _fits_a_query(each) for each in get_args(kind))
    if origin is not None and hasattr(kind, "__metadata__"):  # Annotated
        return _fits_a_query(get_args(kind)[0])
    return isinstance(kind, type) and (kind in _SIMPLE or issubclass(kind, enum.Enum | datetime.datetime))
