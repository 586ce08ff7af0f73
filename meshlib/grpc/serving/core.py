"""What the connections of a gRPC server share: its methods under their stack, and how a request becomes a call.

A request that cannot be handled is answered here, before any layer sees it: one that is no gRPC, one for a method that
there is not. All others pass the stack of ``meshlib/server.py``. Health passes none of it, and reflection only the
authorization: a server that is full must still be able to say that it is alive.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from grpclib.config import Configuration
from grpclib.const import Handler, Status
from grpclib.encoding.base import CodecBase
from h2.errors import ErrorCodes
from h2.events import RequestReceived

from ...core.context import VAR
from ...core.env import Env, NoMetrics
from ...core.errors import shown
from ...core.stack import Stack
from ..metadata import ContextReader
from .call import Handling, ServerCall, invoke
from .head import ACCEPTED, Head, Malformed, Refused, read_head
from .limits import Limits
from .methods import HEALTH, Method, services_of, unknown
from .stream import ServerStream, status_text

if TYPE_CHECKING:
    from .connection import ServerConnection

__all__ = ["Serving"]

logger = logging.getLogger("meshlib.grpc")

KEPT: Final = {"health": ("deadline", "errors"), "reflection": ("authorize", "deadline", "errors")}
"""The places of the stack that calls of the server's own services pass."""


class Serving:
    """The methods of a server, and the connections that call them.

    Args:
        mapping: The methods, by path.
        stack: The layers around them.
        env: The server's.
        handling: What the calls share.
        limits: See `Limits`.
        config: Windows and keepalive.
        codec: For messages.
        trust: May a caller's Dtab say where our own calls go, and its priority how much its own matter?

    Attributes:
        connections: Those that are open.
        refusing: New connections are turned away.
        base: The context variables that handlers start from; each gets a copy.
    """

    def __init__(
        self,
        mapping: Mapping[str, Handler],
        stack: Stack,
        env: Env,
        handling: Handling,
        limits: Limits,
        config: Configuration,
        *,
        codec: CodecBase,
        trust: bool,
    ) -> None:
        self.env, self.handling, self.limits, self.config = env, handling, limits, config
        self.connections: set[ServerConnection] = set()
        self.refusing = False
        self.base = contextvars.Context()
        self.services = services_of(mapping)
        self._methods = {path.encode(): Method(path, handler, codec) for path, handler in mapping.items()}
        metrics = env.metrics
        self._reader = ContextReader(env.clock, trust=trust, undecodable=metrics.counter("undecodable_metadata"))
        self._connects = metrics.counter("connects")
        self._unknown = metrics.counter("unknown_methods")
        self._malformed = metrics.counter("malformed_requests")
        self._broken = metrics.counter("broken_connections")
        self.refused_streams = metrics.counter("refused_streams")
        metrics.gauge("connections", lambda: len(self.connections))
        metrics.gauge("streams", lambda: sum(len(each.calls) for each in self.connections))
        self._told: set[str] = set()
        self._build(stack)

    def _build(self, stack: Stack) -> None:
        users = stack.build(self.env, invoke)
        quiet = self.env.evolve(metrics=NoMetrics())
        own = {
            kind: Stack(stack.places, (layer for layer in stack if layer.place in places)).build(quiet, invoke)
            for kind, places in KEPT.items()
        }
        for method in self._methods.values():
            if method.ours:
                method.service = own["health" if method.service_name == HEALTH else "reflection"]
            else:
                method.service = users

    # --- connections --------------------------------------------------------------------------------------------------

    def opened(self, connection: ServerConnection) -> None:
        """One was accepted."""
        self._connects.value += 1
        self.connections.add(connection)

    def lost(self, connection: ServerConnection) -> None:
        """One has ended."""
        self.connections.discard(connection)

    def broken(self, connection: ServerConnection, why: str) -> None:
        """The client broke the protocol, or a limit."""
        self._broken.value += 1
        logger.warning(
            "%s: closing the connection with %s: %s",
            self.env.label,
            connection.peer.addr() or "a Unix socket",
            shown(why),
        )

    def left_out(self, dest: str, what: str, size: int, most: int) -> None:
        """Trailers are larger than a client takes. Say so, once for each method."""
        if dest not in self._told:
            self._told.add(dest)
            logger.warning(
                "%s: %s: left out %s, since trailers of %d bytes are more than the %d that the client takes",
                self.env.label,
                dest,
                what,
                size,
                most,
            )

    # --- requests -----------------------------------------------------------------------------------------------------

    def begin(self, connection: ServerConnection, stream_id: int, event: RequestReceived) -> bool:
        """Make a call of a request, or answer it at once. Has a call been made?"""
        fields: Any = event.headers
        try:
            head = read_head(fields, self.limits.max_headers)
        except Malformed as error:
            self._malformed.value += 1
            logger.info("%s: a malformed request: %s", self.env.label, error)
            connection.h2.refuse(stream_id, ErrorCodes.PROTOCOL_ERROR)
            return False
        except Refused as error:
            self._malformed.value += 1
            self._refuse(connection, stream_id, error.http, error.status, error.text)
            return False
        method = self._methods.get(head.raw_path)
        if method is None:
            self._unknown.value += 1
            text = unknown(head.raw_path.decode("utf-8", "replace"), self.services)
            self._refuse(connection, stream_id, 200, Status.UNIMPLEMENTED, text)
            return False
        if head.subtype != method.codec.__content_subtype__:
            self._malformed.value += 1
            text = f"Unacceptable content-type header: {shown(head.content_type, 60)}"
            self._refuse(connection, stream_id, 415, Status.UNKNOWN, text)
            return False
        if self.env.supervisor.closed:  # in this very turn
            connection.h2.refuse(stream_id, ErrorCodes.REFUSED_STREAM)
            return False
        self._call(connection, stream_id, head, method, fields)
        return True

    def _call(self, connection: ServerConnection, stream_id: int, head: Head, method: Method, fields: Any) -> None:
        context = self._reader.read(fields)
        stream = ServerStream(connection, stream_id, head, method, self.handling, context.deadline)
        call = ServerCall(self.handling, method, stream)
        call.ended = partial(connection.release, call)
        variables = self.base.copy()
        variables.run(VAR.set, context)
        connection.accept(call)
        self.env.supervisor.launch(call, call.run, (), variables)

    def _refuse(
        self,
        connection: ServerConnection,
        stream_id: int,
        http: int,
        status: Status | None,
        text: str,
    ) -> None:
        """Answer with nothing but fields."""
        answer = [(":status", str(http))]
        if status is None:
            answer.append(("allow", "POST"))
        else:
            if http == 200:
                answer.append(("content-type", "application/grpc"))
            answer += [("grpc-status", str(status.value)), ("grpc-message", status_text(text)[0])]
            if status is Status.UNIMPLEMENTED:
                answer.append(("grpc-accept-encoding", ACCEPTED))
        if connection.h2.half_open(stream_id):
            connection.h2.answer(stream_id, (), answer, end=True)
            connection.h2.refuse(stream_id, ErrorCodes.NO_ERROR)
