"""Connections: made here, so that nobody else's pool is in the way, and spoken over by httpcore.

httpcore knows HTTP/1.1 and HTTP/2 on a stream; its pool looks at every request for each request, and in httpx's version
loses a slot for each connect that is cancelled (encode/httpcore#1093). So streams are opened here, and handed to its
connections one by one. Events that it would have told ``extensions["trace"]`` while connecting are told by us.
"""

from __future__ import annotations

import select
import ssl
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar, Final

import anyio

from ..client import Liveness, Transport, describe
from ..core.clock import Clock
from ..core.context import VAR
from ..core.env import Env
from ..core.errors import ConnectError, ConnectionLost, InvalidArgument, MeshError
from ..names.addr import Address
from .body import body_class, from_core
from .core import Core
from .headers import encode_headers
from .status import judged
from .steps import Steps

__all__ = ["BODY_UNTIL", "CONNECTING", "HttpConnector", "HttpSession", "SourceFailed"]

CONNECTING: Final[ContextVar[Any]] = ContextVar("meshlib.http.connecting", default=None)
"""The request for which a connection is being made, whose timeouts and trace function count; none in the background."""
BODY_UNTIL: Final[ContextVar[float | None]] = ContextVar("meshlib.http.body_until", default=None)
"""Until when the body of the reply may be read."""
BUFFER: Final = 65_536
"""Bytes. A body that says it is no larger is read before the call is over, so that a failure in it is retried too."""


class SourceFailed(InvalidArgument):
    """Whoever gave a request's body raised; its ``__cause__`` is what they raised."""


class _Source:
    """A request's body that is no bytes: notes whether it has been read, and what its source raised.

    Args:
        stream: httpx's stream.
        again: It can be read once more from its beginning.
    """

    __slots__ = ("again", "fault", "started", "stream")

    def __init__(self, stream: Any, again: bool = False) -> None:
        self.stream, self.again = stream, again
        self.started = False
        self.fault: BaseException | None = None

    async def __aiter__(self) -> Any:
        self.started = True
        chunks = aiter(self.stream)
        while True:
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except Exception as error:
                self.fault = error
                raise
            yield chunk


class HttpConnector:
    """Makes connections for one origin.

    Args:
        core: httpx or httpx2.
        scheme: ``http`` or ``https``.
        server_name: What the certificate must be for; empty for the address itself.
        context: For TLS.
        http2: Offer HTTP/2 in TLS, and speak it at once without.
        buffer: See `BUFFER`.
        propagate: Send deadline, trace, Dtab and the rest along.
    """

    protocol: ClassVar[str] = "http"
    keeps_deadline: ClassVar[bool] = False

    def __init__(
        self,
        core: Core,
        scheme: str = "http",
        server_name: str = "",
        context: ssl.SSLContext | None = None,
        *,
        http2: bool = False,
        buffer: int = BUFFER,
        propagate: bool = True,
    ) -> None:
        self.core, self.scheme, self.server_name, self.context = core, scheme, server_name, context
        self.http2, self.buffer, self.propagate = http2, buffer, propagate

    @staticmethod
    def lasting(reply: Any) -> Any:
        """The body of a reply that is still to be read; ``None`` for one that has been."""
        stream = getattr(reply, "stream", None)
        return stream if hasattr(stream, "on_end") else None

    async def connect(self, address: Address, env: Env, liveness: Liveness | None) -> HttpSession:
        """A connection to ``address``."""
        core, request = self.core, CONNECTING.get()
        extensions = {} if request is None else request.extensions
        limit = transport.connect_timeout if (transport := env.params.get(Transport)) else 1.0
        theirs = extensions.get("timeout", {}).get("connect")
        timeout = limit if theirs is None else min(limit, theirs)
        steps = Steps(extensions.get("trace"))
        backend = core.httpcore.AnyIOBackend()
        stream = None
        try:
            if address.path:
                async with steps.of("connection.connect_unix_socket", path=address.path, timeout=timeout) as told:
                    stream = told.value = await backend.connect_unix_socket(address.path, timeout=timeout)
            else:
                async with steps.of(
                    "connection.connect_tcp", host=address.host, port=address.port, timeout=timeout
                ) as told:
                    stream = told.value = await backend.connect_tcp(address.host, address.port, timeout=timeout)
            if self.scheme == "https":
                assert self.context is not None  # noqa: S101
                name = self.server_name or address.host
                async with steps.of("connection.start_tls", server_hostname=name, timeout=timeout) as told:
                    stream = told.value = await stream.start_tls(self.context, server_hostname=name, timeout=timeout)
            return await self._session(stream, address, env, liveness, timeout)
        except BaseException as error:
            if stream is not None:
                with anyio.CancelScope(shield=True):
                    await stream.aclose()
            if isinstance(error, core.httpcore.NetworkError | core.httpcore.TimeoutException):
                raise ConnectError(_said(error, timeout), endpoint=str(address)) from error
            raise

    async def _session(
        self, stream: Any, address: Address, env: Env, liveness: Liveness | None, timeout: float
    ) -> HttpSession:
        library = self.core.httpcore
        port = address.port or (443 if self.scheme == "https" else 80)
        origin = library.Origin(self.scheme.encode(), (address.host or "localhost").encode(), port)
        tls = stream.get_extra_info("ssl_object")
        if tls.selected_alpn_protocol() != "h2" if tls is not None else not self.http2:
            connection = library.AsyncHTTP11Connection(origin, stream)
            return HttpSession(self, connection, origin, str(address), env, False, _readability(stream))
        from .http2 import Http2Connection  # which h2 must be installed for

        connection = Http2Connection(self.core, stream, env, liveness)
        try:
            await connection.open(timeout)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await connection.aclose()
            raise
        return HttpSession(self, connection, origin, str(address), env, True, None)


def _said(error: BaseException, timeout: float) -> str:
    if "Timeout" in type(error).__name__:
        return f"no connection within {timeout:g} s"
    cause = error.__cause__
    if isinstance(cause, ssl.SSLError):
        return f"TLS failed: {getattr(cause, 'verify_message', '') or cause.reason or cause}"
    return describe(cause) if isinstance(cause, OSError) else f"connect failed: {error}"


class HttpSession:
    """One connection.

    Attributes:
        lent: Requests that it has under way.
        shared: May it have several (HTTP/2)?
        listed: Is it among those that its pool lends?
        born: When it was made, on `Clock.now`.
        idle_since: Since when nobody uses it.
        idle_limit: Seconds for which the server says that it keeps idle connections; ``None`` if it does not say.
    """

    __slots__ = (
        "_clock",
        "_connection",
        "_connector",
        "_endpoint",
        "_origin",
        "_poll",
        "_used",
        "born",
        "idle_limit",
        "idle_since",
        "lent",
        "listed",
        "shared",
    )

    def __init__(
        self, connector: HttpConnector, connection: Any, origin: Any, endpoint: str, env: Env, shared: bool, poll: Any
    ) -> None:
        self._connector, self._connection, self._origin = connector, connection, origin
        self._endpoint = endpoint
        self._clock: Clock = env.clock
        self._used = False
        self._poll = poll
        self.lent, self.listed, self.shared = 0, False, shared
        self.born = self.idle_since = env.clock.now()
        self.idle_limit: float | None = None

    @property
    def capacity(self) -> int:
        """How many requests it may have under way: 1 over HTTP/1.1, else what the server allows now, which may be 0."""
        return self._connection.capacity if self.shared else 1

    @property
    def fresh(self) -> bool:
        """Has it had no request yet?"""
        return not self._used

    @property
    def usable(self) -> bool:
        """Does it take requests, if it has not as many as it may have?"""
        connection = self._connection
        return bool(connection.is_available() or (not self._used and not connection.is_closed()))

    def watch(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` whenever the server allows more or fewer requests, or will take no more at all."""
        if self.shared:
            self._connection.changed = changed

    @property
    def stale(self) -> bool:
        """Has the server closed it meanwhile? Asked of the system: a look through httpcore and anyio costs 10 µs."""
        poll = self._poll
        return bool(self._connection.has_expired() if poll is None else poll.poll(0))

    async def __call__(self, request: Any) -> Any:
        """Send one request; the response's body may still have to be read.

        Raises:
            StatusError: The response is a failure; the error carries it.
            ConnectionLost: The connection ended.
            AttemptTimeout: One of httpx's timeouts.
            InvalidArgument: The request cannot be sent, whoever tries.
        """
        core = self._connector.core
        self._used = True
        body = request.stream
        if not isinstance(body, core.httpx.ByteStream):
            body = _Source(body, vars(request).get("replayable", False))
        library = core.httpcore
        url = request.url
        try:
            response = await self._connection.handle_async_request(
                library.Request(
                    request.method,
                    library.URL(
                        scheme=self._origin.scheme, host=self._origin.host, port=self._origin.port, target=url.raw_path
                    ),
                    headers=self._headers(request),
                    content=body,
                    extensions=request.extensions,
                )
            )
            return await self._reply(request, response)
        except Exception as error:
            ours = self._error(error, body)
            if ours is error:
                raise
            raise ours from error

    def _headers(self, request: Any) -> list[tuple[bytes, bytes]]:
        raw: list[tuple[bytes, bytes]] = request.headers.raw
        if not self._connector.propagate:
            return raw
        more = encode_headers(VAR.get(), self._clock)
        if not more:
            return raw
        # What the caller wrote itself stays: its own instrumentation may know better.
        given = {name.lower() for name, _ in raw}
        return raw + [pair for pair in more if pair[0].lower() not in given]

    async def _reply(self, request: Any, response: Any) -> Any:
        connector, core = self._connector, self._connector.core
        length, chunked = -1, False
        for name, value in response.headers:
            lowered = name.lower()
            if lowered == b"content-length" and value.isdigit() and len(value) < 19:
                length = int(value)
            elif lowered == b"transfer-encoding":
                chunked = True
            elif lowered == b"keep-alive":
                self.idle_limit = _kept_for(value)
        status = response.status
        if chunked:
            length = -1  # which overrides what the length says (RFC 9112 6.3)
        if request.method == "HEAD" or status in (204, 304):
            length = 0
        stream: Any
        if 0 <= length <= connector.buffer and status != 101:
            stream = core.httpx.ByteStream(await self._whole(response))
        else:
            stream = body_class(core)(core, response.stream, request, self._clock, BODY_UNTIL.get(), self._endpoint)
            opened = vars(request).get("meshlib_opened")
            if opened is not None:
                opened.append(stream)
        reply = core.httpx.Response(
            status, headers=response.headers, stream=stream, extensions=dict(response.extensions)
        )
        if status >= 429:
            failure = judged(status, response.headers, self._clock.epoch_ns() / 1e9)
            if failure is not None:
                failure.response = reply
                failure.endpoint = self._endpoint
                raise failure
        return reply

    async def _whole(self, response: Any) -> bytes:
        """The body of a response that says it is small. Who says so and sends more is not believed."""
        chunks, room = [], self._connector.buffer
        parts = aiter(response.stream)
        try:
            async for chunk in parts:
                room -= len(chunk)
                if room < 0:
                    raise self._connector.core.httpcore.RemoteProtocolError("the body is longer than its head says")
                chunks.append(chunk)
        except BaseException:
            with anyio.CancelScope(shield=True):  # nothing but local work
                await parts.aclose()
                await response.aclose()
            raise
        await response.aclose()
        return b"".join(chunks)

    def _error(self, error: Exception, body: Any) -> Exception:
        if isinstance(body, _Source) and body.fault is error:
            return SourceFailed("the source of the request's body failed")
        library = self._connector.core.httpcore
        ours = from_core(self._connector.core, error, "the answer was awaited")
        if ours is not None:
            ours.endpoint = self._endpoint
            if isinstance(ours, ConnectionLost) and isinstance(error, library.ConnectionNotAvailable):
                ours.processed = False  # nothing of it was sent, or the server says that it did nothing
        told = error if ours is None else ours
        spent = isinstance(body, _Source) and body.started and not body.again
        if spent and isinstance(told, MeshError) and told.requeueable:
            # Only its rest, or nothing, could be sent now, which a server would take for the whole.
            told.finalize("the request's body was a stream, and has been read")
        return told

    def release(self) -> None:
        """Nothing: the pool keeps count."""

    async def aclose(self) -> None:
        """End it, and what is under way on it."""
        with anyio.CancelScope(shield=True):
            await self._connection.aclose()

    def __repr__(self) -> str:
        return f"<HttpSession with {self._endpoint}: {self._connection.info()}>"


def _kept_for(value: bytes) -> float | None:
    """``Keep-Alive: timeout=5``."""
    for part in value[:200].split(b","):
        name, _, number = part.strip().partition(b"=")
        if name.lower() == b"timeout" and number.isdigit() and len(number) < 8:
            return float(number)
    return None


def _readability(stream: Any) -> Any:
    """What tells whether an idle stream has something to say: nothing but its end would be in order."""
    raw = stream.get_extra_info("socket")
    if raw is None or not hasattr(select, "poll"):  # Windows
        return None
    poll = select.poll()
    poll.register(raw, select.POLLIN)
    return poll
