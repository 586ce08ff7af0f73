"""One connection, as a session: a request goes out over it, and what comes back becomes a response, or our error.

HTTP itself is spoken by httpcore's connection, or by ours (``http2.py``). What travels with a request is added here,
and what a reply says of its connection is read here; a small body is read before the reply is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio

from ..core.clock import Clock
from ..core.context import VAR
from ..core.env import Env
from ..core.errors import ConnectionLost, InvalidArgument, MeshError
from .account import ACCOUNT
from .body import body_class, from_core
from .headers import encode_headers
from .status import judged

if TYPE_CHECKING:
    from .connector import HttpConnector

__all__ = ["HttpSession", "SourceFailed"]


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
            account = ACCOUNT.get() if connector.accounts else None
            until = None if account is None else account.until
            stream = body_class(core)(core, response.stream, request, self._clock, until, self._endpoint)
            if account is not None and not account.add(stream):
                await stream.aclose()
        reply = core.httpx.Response(
            status, headers=response.headers, stream=stream, extensions=dict(response.extensions), request=request
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
