"""Typed calls over HTTP: what turns a call into a POST, and its answer back, inside the client stack.

`Posts` stands directly above the connections of an endpoint. Above it everything is as for Mux: layers see the
`Request` and the `Response`, and errors of the library's own; below it, everything is as for any HTTP client. So an
answer that is a declared exception is an answer to all of them, a nack goes elsewhere, and a 500 is a `RemoteError`.
"""

from __future__ import annotations

import contextlib
import re
import ssl as tls
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, Final

import anyio
import msgspec

from ..client import Client
from ..core.errors import (
    ConfigurationError,
    DeadlineExceeded,
    InvalidArgument,
    InvalidReply,
    MeshError,
    Rejected,
    RemoteError,
    UnknownMethod,
    UnknownService,
    shown,
)
from ..core.service import Filter, Service
from ..core.stack import Stack
from ..http.connector import HttpConnector
from ..http.core import Core, core_of
from ..http.policy import Connections
from ..http.status import StatusError
from ..mux import Request, Response
from ..names.target import Target, redacted
from .service import RAISED

__all__ = ["http_client"]

LARGEST: Final = 16 * 1024 * 1024
"""Bytes of a reply's body: as many as Mux allows."""
_HEADERS: Final = {"content-type": "application/json", "accept": "application/json, application/problem+json"}


class _Problem(msgspec.Struct):
    detail: str = ""
    path: str = ""
    kind: str = ""
    raised: str = ""
    error: msgspec.Raw = msgspec.Raw(b"")


_PROBLEM: Final = msgspec.json.Decoder(_Problem)


class Posts(Filter[Any, Any, Any, Any]):
    """See the module.

    Args:
        core: httpx or httpx2.
        origin: What precedes the path: ``http://greeter``.
        largest: Bytes that a reply may have.
    """

    place: ClassVar[str] = "filters"

    def __init__(self, core: Core, origin: str, largest: int = LARGEST) -> None:
        self._core, self._origin, self._largest = core, origin, largest
        self._urls: dict[str, Any] = {}

    async def apply(self, request: Request, service: Service[Any, Any]) -> Response:
        """Make one call.

        Raises:
            MeshError: It failed, and what the server said of that.
        """
        httpx = self._core.httpx
        url = self._urls.get(request.dest)
        if url is None:  # 20 µs; a contract has few methods
            url = self._urls[request.dest] = httpx.URL(self._origin + request.dest)
        try:
            reply = await service(httpx.Request("POST", url, content=request.body, headers=_HEADERS))
        except StatusError as error:
            problem = _problem(error.response, await self._read(error.response))
            if problem.raised:
                return _declared(problem)
            raise _named(error, error.response.status_code, problem) from None
        body = await self._read(reply)
        status: int = reply.status_code
        if status == 200:
            return Response(body)
        problem = _problem(reply, body)
        if problem.raised:
            return _declared(problem)
        raise _refused(status, problem)

    async def _read(self, reply: Any) -> bytes:
        stream = reply.stream
        chunks: list[bytes] = []
        size = 0
        try:
            if "content-encoding" in reply.headers:
                raise InvalidReply("the server compressed the reply, which it was not asked for")
            async for chunk in stream:
                size += len(chunk)
                if size > self._largest:
                    raise InvalidReply(f"the reply has more than {self._largest} bytes")
                chunks.append(chunk)
        finally:
            with anyio.CancelScope(shield=True):  # local work, without which the connection would not be given back
                await stream.aclose()
        return b"".join(chunks)

    def __repr__(self) -> str:
        return f"posts({self._origin})"


def _problem(reply: Any, body: bytes) -> _Problem:
    """What a reply that is no result says of itself; nothing if it is from somebody else, a proxy perhaps."""
    if not reply.headers.get("content-type", "").startswith("application/problem+json"):
        return _Problem()
    try:
        return _PROBLEM.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _Problem()


def _declared(problem: _Problem) -> Response:
    return Response(bytes(problem.error), ((RAISED, problem.raised.encode()),))


def _named(error: StatusError, status: int, problem: _Problem) -> MeshError:
    """The error of a 429 or 5xx."""
    said = shown(problem.detail) or error.message
    named: MeshError
    if isinstance(error, Rejected):
        named = Rejected(said, retryable=error.retryable)
        named.processed = error.processed
        named.by_peer, named.over_rate = True, status == 429
    elif status == 504:
        named = DeadlineExceeded(said, processed=error.processed)
    else:
        # A handler that failed would most likely fail again; what stands between says 502 and 503.
        named = RemoteError(said, retryable=error.retryable and status != 500, processed=error.processed)
    named.retry_after, named.endpoint = error.retry_after, error.endpoint
    return named


def _refused(status: int, problem: _Problem) -> MeshError:
    """The error of any other status."""
    said = shown(problem.detail, 1000)
    if status == 404 and problem.kind in ("UnknownService", "UnknownMethod"):
        return UnknownMethod(said) if problem.kind == "UnknownMethod" else UnknownService(said)
    if problem.kind == "InvalidArgument" or status in (413, 415):
        return InvalidArgument(said or f"the server refused the arguments: {status}", path=problem.path)
    return RemoteError(f"the server answered {status}{': ' if said else ''}{said}")


def http_client(
    target: str,
    *layers: Any,
    label: str = "",
    ssl: bool | tls.SSLContext | None = None,
    server_name: str = "",
    http2: bool = False,
    propagate: bool = True,
    module: ModuleType | str | None = None,
    stack: Callable[[Stack], Stack] | None = None,
    **options: Any,
) -> Client[Request, Response]:
    """A client whose calls are POSTs.

    Args:
        target: Where to; after ``http://host:port``, the path may stand below which the services are mounted.
        layers: Each replaces the default at its place; plain filters are added.
        label: What the client is called in metrics, spans and errors.
        ssl: ``True``, or an ``ssl.SSLContext``, for HTTPS.
        server_name: What the certificate must be for, and the ``Host`` header; by default the target's host, where it
            has one, and else ``rpc``.
        http2: Offer HTTP/2 in TLS, and speak it at once without.
        propagate: Send deadline, trace, Dtab and the rest along.
        module: ``httpx`` or ``httpx2``; by default the one that is installed.
        stack: Changes the stack in ways that a layer alone cannot say.
        options: ``classifier``, ``clock``, ``seed``: see `meshlib.client.Client`.

    Raises:
        ConfigurationError: The target, a layer or an option makes no sense, or httpx is not installed.
    """
    core = _installed() if module is None else core_of(module)
    secure = bool(ssl) or target.startswith("https://")
    context: tls.SSLContext | None = None
    if secure:
        context = ssl if isinstance(ssl, tls.SSLContext) else core.httpx.create_ssl_context()
    target, base = _based(target)
    name = server_name or _host(Target.parse(target))
    scheme = "https" if secure else "http"
    connector = HttpConnector(core, scheme, name, context, http1=secure or not http2, http2=http2, propagate=propagate)
    posts = Posts(core, f"{scheme}://{name or 'rpc'}{base}")

    def arranged(given: Stack) -> Stack:
        given = given.insert_before("pool", posts)
        return given if stack is None else stack(given)

    return Client(target, connector, Connections(), *layers, label=label, stack=arranged, **options)


def _installed() -> Core:
    try:
        return core_of("httpx")
    except ConfigurationError:
        with contextlib.suppress(ConfigurationError):
            return core_of("httpx2")
        raise


def _based(target: str) -> tuple[str, str]:
    """A target, and the path that it has after the hosts, if it is a URL."""
    scheme, slashes, rest = target.strip().partition("://")
    if not slashes or scheme not in ("http", "https"):
        return target, ""
    hosts, _, path = rest.partition("/")
    if "?" in path or "#" in path:
        raise ConfigurationError(f"target {redacted(target)!r}: a query or fragment means nothing here")
    if _ALONE.fullmatch(hosts):
        port = 443 if scheme == "https" else 80
        raise ConfigurationError(f"target {redacted(target)!r}: say the port too: {scheme}://{hosts}:{port}")
    return f"{scheme}://{hosts}", f"/{path}".rstrip("/")


_ALONE: Final = re.compile(r"[a-zA-Z0-9._-]+|\[[0-9a-fA-F:.]+\]")
"""A host without a port."""
_HOST: Final = re.compile(r"(?:[^@/]*@)?([a-zA-Z0-9._-]+|\[[0-9a-fA-F:.]+\])(?::\d+)?/?")


def _host(target: Target) -> str:
    """The host of a target that names just one."""
    match = _HOST.fullmatch(target.rest) if target.scheme in ("static", "dns") else None
    return match[1] if match else ""
