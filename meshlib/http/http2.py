"""One HTTP/2 connection, in place of httpcore's, which requests that are cancelled would break for all others on it.

There each request reads and writes by itself: one that is cancelled while it writes leaves half a frame, one whose read
timeout passes ends its neighbours, and none resets its stream, so that the server goes on sending (httpcore 1.0.9,
``_async/http2.py``). Here a job in the client's supervisor reads, another writes, and a request only changes h2's state
and waits for news of its own stream. Whatever is given up is reset at once, without waiting for the network.

After GOAWAY, streams that the server still answers are read to their end; those that it will not answer were never
processed (RFC 9113 6.8), as those that it refuses (8.7), and go elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

import anyio
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions

from ..client import Liveness
from ..core.env import Env
from ..core.supervisor import Job
from .steps import Steps
from .streams import EMPTY, STREAMS, WINDOW, Body, Machine, Stream, head_of, our_settings

__all__ = ["Http2Connection"]

UNSENT: Final = 256 * 1024
"""Bytes that may wait to be written, above which a request's body waits."""
DEAF: Final = 4 << 20
"""Bytes that may wait to be written in all. A server that sends pings, and reads none of the answers, gets here."""
READ: Final = 65_536
LOOKS: Final = 5
"""How often it is looked, within the interval of pings, whether anything has come."""
FAREWELL: Final = 0.1
"""Seconds that a last GOAWAY may take. The peer hears of the end in any case."""


class Http2Connection:
    """See the module. To a session it looks like httpcore's connections.

    Args:
        core: httpx or httpx2, whose httpcore's errors and responses it speaks in.
        stream: httpcore's stream, whose owner it becomes.
        env: The endpoint's.
        liveness: How to find out that the server is gone without a word.

    Attributes:
        capacity: Requests at once that the server allows, once `open` has returned. It may say something else at any
            time, and 0 is for the time being.
        changed: Called when that changes, and when it takes no more at all.
    """

    def __init__(self, core: Any, stream: Any, env: Env, liveness: Liveness | None) -> None:
        self._core, self._library, self._stream = core, core.httpcore, stream
        self._liveness = liveness
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        self._h2.state_machine = Machine()
        self._streams: dict[int, Stream] = {}
        self._dirty, self._moved = anyio.Event(), anyio.Event()
        self._met, self._done = anyio.Event(), anyio.Event()
        self._out = bytearray()
        self._heard = 0
        self._leaving = self._closed = False
        self._problem: tuple[type[Exception], str] = (self._library.ReadError, "the connection was closed")
        self.capacity = STREAMS
        self.changed: Callable[[], None] | None = None
        self._h2.local_settings = our_settings()
        self._h2.initiate_connection()
        # So that no stream whose reader is slow keeps another from being read.
        self._h2.increment_flow_control_window(STREAMS * WINDOW)
        self._wake()
        self._job: Job = env.supervisor.start(self._run, name=f"HTTP/2 with {env.address}")

    async def open(self, timeout: float) -> None:
        """Wait for the server's settings, which say how many requests it takes at once.

        Raises:
            httpcore.ConnectTimeout: They did not come within ``timeout`` seconds.
            httpcore.ConnectError: The server speaks something else.
        """
        with anyio.CancelScope(deadline=anyio.current_time() + timeout):
            await self._met.wait()
            if self._closed:
                raise self._library.ConnectError(f"no HTTP/2: {self._problem[1]}")
            return
        raise self._library.ConnectTimeout("no HTTP/2 settings")

    # --- the two ends of the wire -------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._write)
                if self._liveness is not None:
                    group.start_soon(self._ping, self._liveness)
                await self._read()
                group.cancel_scope.cancel()
        finally:
            self._end()
            with anyio.CancelScope(shield=True):
                with anyio.move_on_after(FAREWELL):
                    await self._farewell()
                await self._stream.aclose()
            self._done.set()

    async def _read(self) -> None:
        library = self._library
        try:
            while not (self._leaving and not self._streams):
                data = await self._stream.read(READ, None)
                if not data:
                    self._problem = library.RemoteProtocolError, "Server disconnected"
                    return
                self._heard += 1
                for event in self._h2.receive_data(data):
                    self._take(event)
                self._wake()
                if len(self._out) > DEAF:
                    self._problem = library.RemoteProtocolError, "the server talks, and does not listen"
                    return
        except h2.exceptions.ProtocolError as error:
            self._problem = library.RemoteProtocolError, f"not HTTP/2: {error}"
        except (library.NetworkError, library.TimeoutException) as error:
            self._problem = type(error), str(error)

    async def _write(self) -> None:
        library = self._library
        while True:
            if not self._out:
                self._dirty = anyio.Event()
                await self._dirty.wait()
                continue
            data, self._out = bytes(self._out), bytearray()
            try:
                await self._stream.write(data, None)
            except (library.NetworkError, library.TimeoutException) as error:
                self._problem = type(error), str(error)
                self._end()
                self._job.cancel()
                return
            self._tell_senders()

    async def _ping(self, liveness: Liveness) -> None:
        heard, quiet = self._heard, 0
        while True:
            await anyio.sleep(liveness.interval / LOOKS)
            quiet = quiet + 1 if self._streams and self._heard == heard else 0
            heard = self._heard
            if quiet < LOOKS:
                continue
            self._h2.ping(b"alive?\0\0")
            self._wake()
            await anyio.sleep(liveness.timeout)
            if self._heard == heard:
                self._problem = self._library.ReadError, f"no answer to a ping within {liveness.timeout:g} s"
                self._end()
                self._job.cancel()
                return

    async def _farewell(self) -> None:
        try:
            self._h2.close_connection()
            self._wake()
            await self._stream.write(bytes(self._out), FAREWELL)
        except Exception:  # noqa: S110 - it was good manners; what matters follows
            pass

    def _wake(self) -> None:
        """Whatever h2 has to say goes out."""
        self._out += self._h2.data_to_send()
        self._dirty.set()

    def _tell_senders(self) -> None:
        moved, self._moved = self._moved, anyio.Event()
        moved.set()

    def _tell_pool(self) -> None:
        if self.changed is not None:
            self.changed()

    def _end(self) -> None:
        """Nothing more will come for anybody."""
        self._closed = True
        for stream in self._streams.values():
            if not stream.ended and stream.problem is None:
                stream.problem = self._problem
            stream.tell()
        self._met.set()
        self._tell_senders()
        self._tell_pool()

    # --- what comes ---------------------------------------------------------------------------------------------------

    def _take(self, event: Any) -> None:
        stream = self._streams.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, h2.events.RemoteSettingsChanged):
            self.capacity = min(STREAMS, self._h2.remote_settings.max_concurrent_streams)
            self._met.set()
            self._tell_senders()
            self._tell_pool()
        elif isinstance(event, h2.events.WindowUpdated):
            self._tell_senders()
        elif isinstance(event, h2.events.ConnectionTerminated):
            self._leave(event)
        elif stream is None:
            if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:  # nobody will read it
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            return
        elif isinstance(event, h2.events.DataReceived) and not event.data:
            length = event.flow_controlled_length or 0  # padding
            stream.unread += length
            self._acknowledge(stream, length)
            stream.empty += 1
            if stream.empty > EMPTY:
                raise h2.exceptions.ProtocolError(f"more than {EMPTY} empty DATA frames in a row")
        else:
            stream.take(event, self._library)
            if isinstance(event, h2.events.ResponseReceived) and not stream.status:
                self._reset(stream, h2.errors.ErrorCodes.PROTOCOL_ERROR)
        if stream is not None:
            stream.tell()
            self._tell_senders()

    def _leave(self, event: Any) -> None:
        self._leaving = True
        last = event.last_stream_id or 0
        for stream in self._streams.values():
            if stream.id > last and not stream.ended:
                stream.problem = self._library.ConnectionNotAvailable, "the server is leaving"
                stream.tell()
        self._tell_senders()
        self._tell_pool()

    # --- requests -----------------------------------------------------------------------------------------------------

    async def handle_async_request(self, request: Any) -> Any:
        """Send one request; the response's stream is still to be read, and closed.

        Raises:
            httpcore.ConnectionNotAvailable: The server has not processed it.
            httpcore.NetworkError: The connection ended.
            httpcore.TimeoutException: One of the request's timeouts.
            httpcore.ProtocolError: It, or the server, makes no sense.
        """
        steps, timeouts = Steps(request.extensions.get("trace")), request.extensions.get("timeout", {})
        stream, has_body = self._begin(request)
        try:
            facts = {"request": request, "stream_id": stream.id}
            async with steps.of("http2.send_request_headers", **facts):
                pass
            async with steps.of("http2.send_request_body", **facts):
                if has_body:
                    await self._send(stream, request.stream, timeouts.get("write"))
            async with steps.of("http2.receive_response_headers", **facts) as told:
                await self._news(stream, lambda: bool(stream.status), timeouts.get("read"))
                told.value = stream.status, stream.headers
            network = self._stream
            extensions = {"http_version": b"HTTP/2", "network_stream": network, "stream_id": stream.id}
            body = Body(self, stream, timeouts.get("read"), steps)
            return self._library.Response(stream.status, headers=stream.headers, content=body, extensions=extensions)
        except BaseException:
            self.drop(stream)
            raise

    def _begin(self, request: Any) -> tuple[Stream, bool]:
        library = self._library
        if self._closed or self._leaving:
            raise library.ConnectionNotAvailable(self._problem[1] if self._closed else "the server is leaving")
        host = next((value for name, value in request.headers if name.lower() == b"host"), None)
        if host is None:
            raise library.LocalProtocolError("Missing mandatory Host: header")
        head, has_body = head_of(request, host)
        try:
            number = self._h2.get_next_available_stream_id()
            self._h2.send_headers(number, head, end_stream=not has_body)
        except h2.exceptions.NoAvailableStreamIDError:
            self._leaving = True
            raise library.ConnectionNotAvailable("the connection has had all streams that there are") from None
        except h2.exceptions.TooManyStreamsError:
            raise library.ConnectionNotAvailable(f"the server allows {self.capacity} requests at once") from None
        except h2.exceptions.ProtocolError as error:
            raise library.LocalProtocolError(str(error)) from error
        self._wake()
        stream = self._streams[number] = Stream(number)
        stream.sent = not has_body
        return stream, has_body

    async def _send(self, stream: Stream, body: Any, timeout: float | None) -> None:
        async for data in body:
            position, until = 0, None
            while position < len(data):
                if stream.ended or stream.problem is not None:  # the server has said all that it will
                    return
                room = self._room(stream)
                if not room:
                    # Whatever comes for whomever wakes this; the time goes on until some of the body is taken.
                    until = _until(timeout) if until is None else until
                    await self._movement(until)
                    continue
                until = None
                self._h2.send_data(stream.id, data[position : position + room])
                position += room
                self._wake()
        if not (stream.ended or stream.problem is not None):
            self._h2.end_stream(stream.id)
            stream.sent = True
            self._wake()

    def _room(self, stream: Stream) -> int:
        if len(self._out) > UNSENT:
            return 0
        return max(0, min(self._h2.local_flow_control_window(stream.id), self._h2.max_outbound_frame_size))

    async def _movement(self, until: float) -> None:
        with anyio.CancelScope(deadline=until):
            moved = self._moved
            await moved.wait()
            return
        raise self._library.WriteTimeout("the server takes no more of the body")

    async def _news(self, stream: Stream, ready: Callable[[], bool], timeout: float | None) -> None:
        """Wait until ``ready()``."""
        until = _until(timeout)
        while not ready():
            if stream.problem is not None:
                kind, words = stream.problem
                raise kind(words)
            if stream.ended:
                raise self._library.RemoteProtocolError("the stream ended too early")
            stream.news = anyio.Event()
            with anyio.CancelScope(deadline=until) as scope:
                await stream.news.wait()
            if scope.cancelled_caught and not ready() and stream.problem is None:
                raise self._library.ReadTimeout("nothing came")

    async def read(self, stream: Any, timeout: float | None) -> bytes | None:
        """The next part of a body; ``None`` at its end."""
        await self._news(stream, lambda: bool(stream.chunks) or stream.ended, timeout)
        if not stream.chunks:
            return None
        data, length = stream.chunks.popleft()
        self._acknowledge(stream, length)
        return bytes(data)

    def _acknowledge(self, stream: Stream, length: int) -> None:
        stream.unread -= length
        if length and not self._closed:
            self._h2.acknowledge_received_data(length, stream.id)
            self._wake()

    def _reset(self, stream: Stream, code: h2.errors.ErrorCodes) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError):  # it is over on the wire
            self._h2.reset_stream(stream.id, code)

    def drop(self, stream: Stream) -> None:
        """Nobody wants any more of it."""
        if self._streams.pop(stream.id, None) is None or self._closed:
            return
        self._acknowledge(stream, stream.unread)  # the connection's window is the others' too
        if not (stream.ended and stream.sent) and stream.problem is None:
            self._reset(stream, h2.errors.ErrorCodes.CANCEL)
            self._wake()
        if self._leaving and not self._streams:
            self._end()
            self._job.cancel()

    # --- what a session asks ------------------------------------------------------------------------------------------

    def is_available(self) -> bool:
        """Does it take requests?"""
        return not (self._closed or self._leaving)

    def is_closed(self) -> bool:
        """Has it ended?"""
        return self._closed

    def has_expired(self) -> bool:
        """Has the server left it?"""
        return self._closed or self._leaving

    async def aclose(self) -> None:
        """End it, and what is under way on it."""
        self._end()
        self._job.cancel()
        await self._done.wait()

    def info(self) -> str:
        """For people."""
        return f"HTTP/2, {len(self._streams)} streams{', leaving' * self._leaving}{', closed' * self._closed}"


def _until(timeout: float | None) -> float:
    return float("inf") if timeout is None else anyio.current_time() + timeout
