"""One accepted gRPC connection: HTTP/2 frames in, calls out; and its end.

=========  ==================================================================  =========================================
state      entered when                                                        a new stream is
=========  ==================================================================  =========================================
NEW        it is accepted                                                      —
OPEN       the client's preface and SETTINGS have come                         handled
DRAINING   `drain`: GOAWAY with the highest id, and a PING                     handled still: it was on its way
DRAINED    the PING has come back: GOAWAY with the last stream that is         reset with REFUSED_STREAM
           handled. With the last call the connection closes
CLOSED     drained; broken; lost; or the grace period is over                  no more
=========  ==================================================================  =========================================

Two GOAWAYs, since a client that has not heard of the first opens streams all the same (RFC 9113 6.8).

What it sends is in `sending`; when it is silent, idle or alive for too long, `watch` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING, Any, Final, cast

from grpclib.const import Status
from grpclib.exceptions import StreamTerminatedError
from grpclib.protocol import Peer
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    PingAckReceived,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    RequestReceived,
    SettingsAcknowledged,
    StreamEnded,
    StreamReset,
    UnknownFrameReceived,
    WindowUpdated,
)
from h2.settings import SettingCodes

from ...core.errors import shown
from ..h2 import LAST_STREAM, goaway
from .call import Cut, ServerCall
from .h2 import ServerH2
from .limits import Bucket
from .sending import Sending
from .watch import Verdict, Watch

if TYPE_CHECKING:
    from .core import Serving

__all__ = ["ServerConnection"]

logger = logging.getLogger("meshlib.grpc")

LINGER: Final = 1.0
"""Seconds for what a healthy client does at once: answer a PING, close its side, read what is left."""
MOST_ENDING: Final = 3
"""Times `Limits.max_streams`: handlers that have not ended, of streams that have, which no client counts any more. Go's
servers queue as many (golang.org/x/net/http2, maxQueuedHandlers)."""
LOOK_AGAIN: Final = 0.05
"""Seconds after which it is seen whether the last answers have left."""
DRAIN_PING: Final = b"drain..."


class ServerConnection(Sending):
    """Serves one connection.

    Args:
        serving: What all connections of a server share.
    """

    def __init__(self, serving: Serving) -> None:
        super().__init__()
        self.serving = serving
        self.calls: dict[int, ServerCall] = {}
        self.closed = asyncio.Event()
        self._established = self._acknowledged = self._draining = False
        self._last: int | None = None
        limits = serving.limits
        self._resets = Bucket(limits.resets, limits.reset_rate)
        self._control = Bucket(limits.control, limits.control_rate)
        self._busy = 0
        self._finished_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watch = Watch(limits, serving.config, self._loop.time(), serving.env.rng)
        self._react: dict[type, Any] = {
            RequestReceived: self._requested,
            DataReceived: self._data,
            StreamEnded: self._ended,
            StreamReset: self._was_reset,
            WindowUpdated: self._window_updated,
            RemoteSettingsChanged: self._settings,
            PingReceived: self._ping,
            SettingsAcknowledged: self._settings_acknowledged,
            UnknownFrameReceived: self._idle_frame,
            PriorityUpdated: self._priority,
            PingAckReceived: self._ping_back,
            ConnectionTerminated: self._client_drains,
        }

    # --- asyncio's protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client."""
        self._transport = cast(asyncio.Transport, transport)
        self.peer = Peer(self._transport)
        if self.serving.refusing:
            self._closing = True
            self._transport.abort()
            return
        self.serving.opened(self)
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family != getattr(socket, "AF_UNIX", None):
            # A client whose machine is gone says nothing: let the system find out.
            with contextlib.suppress(OSError):  # it may have ended already
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        config = self.serving.config
        self._window, self._stream_window = config.http2_connection_window_size, config.http2_stream_window_size
        self.h2 = ServerH2(self.serving.limits, self._window, self._stream_window)
        self.flush()

    def data_received(self, data: bytes) -> None:
        """Read what has come."""
        if self._closing:
            return
        now = self._loop.time()
        try:
            events = self.h2.receive_data(data)
        except Exception as error:  # h2's own errors, and what HPACK and hyperframe do not foresee
            self.broken(f"{type(error).__name__}: {error}")
            return
        self._watch.heard(now, self.h2.half, bool(events))
        for event in events:
            react = self._react.get(type(event))
            if react is not None:
                react(event)
                if self._closing:
                    return
        self.grant()
        self.flush_soon()

    def eof_received(self) -> bool | None:
        """The client has closed its side: what is under way is of no use to it any more."""
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended; so do its calls."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        for call in tuple(self.calls.values()):
            call.stream.lost("Connection lost")
            call.cut(Cut.GONE)
        self._wake()
        self._react = {}  # a circle
        self.serving.lost(self)
        self.closed.set()

    # --- receiving ----------------------------------------------------------------------------------------------------

    def _requested(self, event: RequestReceived) -> None:
        stream_id = event.stream_id
        if event.priority_updated is not None:
            event.priority_updated.stream_id = 0  # it came with the request, and costs no frame of its own
        refused = self._last is not None and stream_id > self._last
        most = self.serving.limits.max_streams
        if refused or len(self.calls) - len(self._ending) >= most or len(self._ending) >= MOST_ENDING * most:
            self.h2.refuse(stream_id, ErrorCodes.REFUSED_STREAM)
            self.h2.forget(stream_id)
            self.serving.refused_streams.value += 1
            if self._acknowledged or not self._watch.young:  # else it does not know how many it may open
                self._idle_frame(event)
            return
        if not self.serving.begin(self, stream_id, event):
            self.h2.forget(stream_id)

    def accept(self, call: ServerCall) -> None:
        """A call is about to begin. Its task may run at once, to its end even (`asyncio.eager_task_factory`)."""
        self.calls[call.stream.id] = call
        if not call.method.ours:
            self._busy += 1

    def release(self, call: ServerCall) -> None:
        """A call has ended."""
        stream = call.stream
        if self.calls.pop(stream.id, None) is None:
            return
        if not call.method.ours:
            self._busy -= 1
        self._ending.discard(stream.id)
        if self._closing:
            return
        if not stream.over:
            self.reset(stream, ErrorCodes.INTERNAL_ERROR)  # its task was ended from outside
        self.h2.forget(stream.id)
        if stream.inbound.held:
            self.held -= stream.inbound.held
            stream.inbound.held = 0
            self.grant()
        if not self.calls:
            self._watch.idle_since = self._loop.time()
        if not self._busy and self._last is not None:
            self._finish()

    def _data(self, event: DataReceived) -> None:
        call = self.calls.get(event.stream_id)
        if not event.data and event.stream_ended is None:
            self._idle_frame(event)
        if call is not None:
            self.held += event.flow_controlled_length
            call.stream.received(event.data, event.flow_controlled_length)

    def _ended(self, event: StreamEnded) -> None:
        call = self.calls.get(event.stream_id)
        if call is not None:
            call.stream.ended()

    def _was_reset(self, event: StreamReset) -> None:
        call = self.calls.get(event.stream_id)
        if call is None:
            return
        if not call.running and not self._resets.take(self._watch.heard_at):
            self.abusive("too many streams reset before they were handled")
            return
        call.stream.lost(f"Stream reset by remote party, error_code: {event.error_code}")
        self._wake(call.stream)
        call.cut(Cut.GONE)
        self._ending.add(call.stream.id)

    def _window_updated(self, event: WindowUpdated) -> None:
        if self._blocked:
            call = self.calls.get(event.stream_id) if event.stream_id else None
            if not event.stream_id or call is not None:
                self._wake(None if call is None else call.stream)

    def _settings(self, event: RemoteSettingsChanged) -> None:
        self._established = True
        self._idle_frame(event)
        if SettingCodes.HEADER_TABLE_SIZE in event.changed_settings:
            self.h2.table_changed()
        if SettingCodes.INITIAL_WINDOW_SIZE in event.changed_settings or self._blocked:
            self._wake()

    def _priority(self, event: PriorityUpdated) -> None:
        if event.stream_id:
            self._idle_frame(event)

    def _idle_frame(self, event: Any) -> None:
        if not self._control.take(self._watch.heard_at):
            self.abusive("too many frames that carry nothing")

    def _ping(self, event: PingReceived) -> None:
        """Who has got something may ask how long it took: gRPC's clients size their windows by that (gRFC A8)."""
        if not self.h2.spoken:
            self._idle_frame(event)
        self.h2.spoken = False

    def _settings_acknowledged(self, event: SettingsAcknowledged) -> None:
        if self._acknowledged:  # ours are sent once
            self._idle_frame(event)
        self._acknowledged = True

    def _ping_back(self, event: PingAckReceived) -> None:
        if event.ping_data == DRAIN_PING:
            self._drained()
        else:
            self._idle_frame(event)

    def _client_drains(self, event: ConnectionTerminated) -> None:
        """The client opens no more streams. Those that it has go on."""
        self._idle_frame(event)

    # --- ending -------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> int:
        """Calls under way, but for health and reflection."""
        return self._busy

    def drain(self) -> None:
        """End gracefully: no new calls, and the end of those under way is waited for."""
        if self._draining or self._closing:
            return
        self._draining = True
        if not self._established:
            self._finish()
            return
        self.h2.queue(goaway(LAST_STREAM))
        self.h2.ping(DRAIN_PING)
        self.flush_soon()
        self._timer = self._loop.call_later(LINGER, self._drained)

    def _drained(self) -> None:
        if not self._draining or self._last is not None or self._closing:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._last = self.h2.highest_inbound_stream_id
        self.h2.queue(goaway(self._last))
        if self._busy:
            self.flush_soon()
        else:
            self._finish()

    def _finish(self) -> None:
        """The last call has ended. Health watches, and the like, end with the connection."""
        if self._closing:
            return
        self._end_calls()
        self.flush()
        if self._timer is not None:
            self._timer.cancel()
        now = self._loop.time()
        self._finished_at = now if self._finished_at is None else self._finished_at
        slow = now - self._finished_at < self.serving.config._keepalive_timeout
        if slow and self._transport.get_write_buffer_size():  # a slow reader has its last answers
            self._timer = self._loop.call_later(LOOK_AGAIN, self._finish)
        elif self._established and self._transport.can_write_eof():
            # Closing with unread bytes would reset the connection, and could overtake the last answers.
            self._closing = True
            self._transport.write_eof()
            self._timer = self._loop.call_later(LINGER, self.close)
        else:
            self.close()

    def _end_calls(self) -> None:
        for call in tuple(self.calls.values()):
            if not call.stream.over:
                with contextlib.suppress(StreamTerminatedError):
                    call.stream.finish_now(Status.UNAVAILABLE, "the server is closing")
            call.stream.lost("the server is closing")
            call.cut(Cut.CLOSING)
        self._wake()

    def abort(self) -> None:
        """Answer what is under way with UNAVAILABLE, cancel its handlers, and close."""
        if self._closing:
            return
        if self._last is None:
            self._last = self.h2.highest_inbound_stream_id
            self.h2.queue(goaway(self._last))
        self._end_calls()
        self.flush()
        self.close()

    def close(self) -> None:
        """Close, once what was written has left, or after a moment all the same."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(LINGER, self._transport.abort)
        self._transport.close()

    def broken(self, why: str) -> None:
        """The client broke the protocol. h2 has queued the GOAWAY that says so."""
        self.serving.broken(self, why)
        for call in tuple(self.calls.values()):
            call.stream.lost("the connection broke the protocol")
            call.cut(Cut.GONE)
        self._wake()
        self.flush()
        self.close()

    def abusive(self, why: str) -> None:
        """The client does what only a broken or hostile one does."""
        self.h2.queue(goaway(self.h2.highest_inbound_stream_id, ErrorCodes.ENHANCE_YOUR_CALM, why.encode()))
        self.broken(why)

    def tick(self, now: float) -> None:
        """Look whether it has been silent, idle or alive for too long.

        Args:
            now: The event loop's time.
        """
        if self._closing:
            return
        self._watch.deaf_since = self.deaf_since
        verdict, why = self._watch.verdict(now, self._established, self._draining, len(self.calls))
        if verdict is Verdict.BREAK:
            self.broken(why)
        elif verdict is Verdict.DRAIN:
            self.drain()
        elif verdict is Verdict.ABORT:
            self.abort()
        elif verdict is Verdict.PING:
            self.h2.ping(b"alive???")
            self.flush_soon()

    def __repr__(self) -> str:
        state = "closing" if self._closing else "draining" if self._draining else "open"
        return f"<gRPC connection with {shown(str(self.peer.addr()))}: {len(self.calls)} calls, {state}>"
