"""What a server says, frame by frame, and which exchange it is for. `GrpcSession` adds what is done about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from grpclib.const import Status
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.settings import SettingCodes

from ...core.clock import Clock
from ...core.env import Metrics
from ...core.errors import ConnectionLost, MeshError, Rejected, shown
from ..inbound import Inbound
from ..status import excess, to_mesh
from .exchange import Exchange, reset_error
from .heads import Options
from .keepalive import Keepalive
from .wire import Wire

__all__ = ["STREAMS", "Incoming"]

STREAMS: Final = 100
"""Calls at once until the server says otherwise (RFC 9113 6.5.2: servers should allow no fewer)."""
HELD: Final = 32768
"""Bytes of a message that is still coming, after which their room is given back."""
UNREAD: Final = 64 * 1024 * 1024
"""Bytes that nobody has read, of all calls, beyond which the connection's window is not given back. Each stream's own
window holds its sender back (4 MiB as grpclib configures it), so this is only for what many unread streams could amount
to: with it, a connection holds at most so much and a window of its own."""


class Incoming(Wire):
    """See the module.

    Args:
        options: The channel's.
        endpoint: What to call the other side in errors.
        authority: What to call it in requests.
        clock: For deadlines.
        metrics: Below ``grpc/``.
        keepalive: When to ping.

    Attributes:
        limit: Calls at once.
        exchanges: Those under way, by stream.
        on_room: Called when a call has ended, while somebody waits for that.
    """

    def __init__(
        self, options: Options, endpoint: str, authority: str, clock: Clock, metrics: Metrics, keepalive: Keepalive
    ) -> None:
        super().__init__(options, authority, clock, keepalive)
        self.endpoint = endpoint
        self.limit = STREAMS
        self.exchanges: dict[int, Exchange] = {}
        self.on_room: Callable[[], None] | None = None
        self._unread = self._withheld = 0
        self._leaving = ""
        self._drained = metrics.counter("drained")
        self._resets = metrics.counter("resets")
        self._events = {
            DataReceived: self._on_data,
            ResponseReceived: self._on_headers,
            TrailersReceived: self._on_trailers,
            StreamEnded: self._on_end,
            StreamReset: self._on_reset,
            WindowUpdated: self._on_window,
            RemoteSettingsChanged: self._on_settings,
            ConnectionTerminated: self._on_goaway,
        }

    def _on_headers(self, event: Any) -> None:
        exchange = self.exchanges.get(event.stream_id)
        if exchange is None:
            return
        exchange.headers = event.headers
        if self._too_long(exchange, event.headers):
            return
        encoding = next((value for name, value in event.headers if name == "grpc-encoding"), "")
        exchange.inbound = Inbound(exchange.request.max_reply, encoding if encoding == "gzip" else "")
        if exchange.whole is None:
            exchange.wake()

    def _on_trailers(self, event: Any) -> None:
        exchange = self.exchanges.get(event.stream_id)
        if exchange is not None and not self._too_long(exchange, event.headers):
            exchange.trailers = event.headers

    def _too_long(self, exchange: Exchange, headers: Any) -> bool:
        """Fail a call whose server sends more metadata than was allowed, counted as RFC 9113 6.5.2 does."""
        size, most = 32 * len(headers), self._options.max_headers
        for name, value in headers:
            size += len(name) + len(value)
        if size > most:
            text = f"the server sent metadata of {size} bytes, more than the {most} that are allowed"
            self.give_up(exchange, excess(text, self.endpoint))
        return size > most

    def _on_data(self, event: Any) -> None:
        exchange = self.exchanges.get(event.stream_id)
        if exchange is None or exchange.inbound is None:
            self._h2.give_back(event.flow_controlled_length)
            return
        exchange.came = True
        inbound = exchange.inbound
        size = event.flow_controlled_length
        inbound.add(event.data, size)
        # The connection's window is given back now, so that nobody's slow reader stops anybody else.
        self._unread += size
        if self._unread > UNREAD:
            self._withheld += size
        else:
            self._h2.give_back(size)
        if exchange.whole is None:
            exchange.wake()
            return
        if exchange.got is None:
            try:
                exchange.got = exchange.take()
            except MeshError as error:
                self.give_up(exchange, exchange.head_problem() or error)
                return
            if exchange.got is None:
                if inbound.held >= HELD:
                    self.consumed(exchange)
                return
        if inbound.begun:
            # Waiting for more of it would be waiting until the deadline: nobody reads it.
            text = "the server sent more than one message, and the method does not stream"
            self.give_up(exchange, to_mesh(Status.INTERNAL, text, endpoint=self.endpoint))

    def _on_end(self, event: Any) -> None:
        exchange = self.exchanges.get(event.stream_id)
        if exchange is not None:
            if exchange.inbound is not None:
                exchange.inbound.ended = True
            self._finish(exchange)

    def _on_reset(self, event: Any) -> None:
        exchange = self.exchanges.get(event.stream_id)
        if exchange is not None:
            exchange.error = reset_error(event.error_code, self.endpoint, begun=exchange.headers is not None)
            self._finish(exchange)

    def _on_window(self, event: Any) -> None:
        if event.stream_id:
            exchange = self.exchanges.get(event.stream_id)
            if exchange is not None:
                exchange.wake()
        else:
            for exchange in list(self.exchanges.values()):
                exchange.wake()

    def _on_settings(self, event: Any) -> None:
        changed = event.changed_settings
        if SettingCodes.HEADER_TABLE_SIZE in changed:
            self._heads.reset()
        if SettingCodes.INITIAL_WINDOW_SIZE in changed:
            for exchange in list(self.exchanges.values()):
                exchange.wake()
        # Without a word of it there is no limit; one of our own keeps a single connection from being all.
        most = changed.get(SettingCodes.MAX_CONCURRENT_STREAMS)
        if most is not None:
            self.limit = most.new_value
        if not self._settled.is_set():
            self._settled.set()
        if self.on_room is not None:
            self.on_room()

    def _on_goaway(self, event: Any) -> None:
        debug = (event.additional_data or b"").decode("latin-1")
        code = event.error_code
        graceful = code == ErrorCodes.NO_ERROR
        self._keepalive.told(code, debug)
        name = getattr(code, "name", str(code))
        why = f"the server is draining (GOAWAY{'' if graceful else f' {name}'}{f': {shown(debug)}' if debug else ''})"
        if not self._leaving:
            self._drained.value += 1
        for stream_id in [i for i in self.exchanges if i > event.last_stream_id]:
            exchange = self.exchanges[stream_id]
            # Whoever has begun to answer is not to be believed that it never saw the call.
            begun = exchange.headers is not None
            exchange.error = (ConnectionLost if begun else Rejected)(why, endpoint=self.endpoint)
            self._finish(exchange)
        self.leave(why, graceful=graceful)

    def resume_writing(self) -> None:
        """It holds less: whoever has more to send goes on."""
        super().resume_writing()
        for exchange in list(self.exchanges.values()):
            exchange.wake()

    # --- what is done about it ----------------------------------------------------------------------------------------

    def consumed(self, exchange: Exchange) -> None:
        """A message has been read: its stream has room again."""
        inbound = exchange.inbound
        if inbound is None or not inbound.held:
            return
        size = inbound.to_give_back()
        if size:
            inbound.held -= size
            self._freed(size)
            if self._error is None:
                self._h2.give_back_on(exchange.stream_id, size)
                self._flush()

    def _freed(self, size: int) -> None:
        """Bytes have been read, or are their caller's alone. What was kept from the connection until then, it gets."""
        self._unread -= size
        if self._withheld and self._unread <= UNREAD:
            size, self._withheld = self._withheld, 0
            self._h2.give_back(size)

    def give_up(self, exchange: Exchange, error: MeshError | None = None) -> None:
        """End an exchange from this side."""
        raise NotImplementedError

    def leave(self, why: str, *, graceful: bool = False) -> None:
        """Take no more calls."""
        raise NotImplementedError

    def _finish(self, exchange: Exchange) -> None:
        """It is over, in whatever way."""
        raise NotImplementedError
