"""A call on its way through the server's stack, from its first field to its trailers.

Each call runs in a task of its own. What ends it early is one of three things, and whoever comes first counts:

==========  =========================  ==================================================================
cut         because                    the client gets
==========  =========================  ==================================================================
DEADLINE    its caller's time is over  DEADLINE_EXCEEDED, once the handler has ended
GONE        it was reset, or the       nothing: nobody listens
            connection was lost
CLOSING     the grace period is over   UNAVAILABLE at once, and then the handler is cancelled
==========  =========================  ==================================================================

The handler is cancelled as asyncio does it, once: it may still await what it needs to clean up. Only the task of the
call is touched, and it takes its own cancellation back before it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar, Final

from grpclib.const import Cardinality, Status
from grpclib.encoding.base import StatusDetailsCodecBase
from grpclib.events import _DispatchServerEvents
from grpclib.exceptions import GRPCError, StreamTerminatedError

from ...core.clock import Clock
from ...core.context import VAR
from ...core.deadlines import Wheel, passed
from ...core.env import Env
from ...core.errors import DeadlineExceeded, MeshError
from ...core.service import Filter, Service
from ...core.supervisor import Job
from ..status import status_of
from .errors import answer_to
from .limits import Limits
from .methods import Method
from .stream import ServerStream

__all__ = ["Cut", "GrpcDeadline", "Handling", "ServerCall"]

logger = logging.getLogger("meshlib.grpc")

_NO_SCOPE: Final[Any] = contextlib.nullcontext()
INSIST: Final = 0.1
"""Seconds between cancellations of a handler that keeps its server from ending."""
EXPIRED: Final = "the deadline passed while the request was handled"


class Cut(Enum):
    """Why a call was ended early."""

    DEADLINE = "its deadline passed"
    GONE = "its client is gone"
    CLOSING = "the server is closing"


class Handling:
    """What all calls of a server share.

    Args:
        env: The server's.
        limits: See `Limits`.
        details_codec: For rich status details.
        gzip: Compress replies for clients that take it.

    Attributes:
        dispatch: grpclib's events.
        wheel: The deadlines of the calls under way.
    """

    def __init__(self, env: Env, limits: Limits, details_codec: StatusDetailsCodecBase | None, *, gzip: bool) -> None:
        self.env, self.clock, self.limits = env, env.clock, limits
        self.details_codec, self.gzip = details_codec, gzip
        self.dispatch = _DispatchServerEvents()
        self.wheel = Wheel(env.clock, _expire)

    @property
    def listened(self) -> bool:
        """Does anybody listen to grpclib's events?"""
        return bool(self.dispatch._listeners)


def _expire(call: ServerCall) -> None:
    call.cut(Cut.DEADLINE)


class ServerCall(Job):
    """One call, as filters see it, both as request and as reply; and the job that handles it.

    Attributes:
        dest: The path of its method, ``/pkg.Service/Method``.
        method: Its method.
        stream: What its handler is given; ``stream.metadata``, ``stream.peer``, ….
        status: What it ended with, once the handler has ended well; what ended it badly is an exception.
        reason: Why it was ended early, if it was.
        running: Its task has begun, and has not ended.
        idempotent: ``False``: nobody here sends it again.
    """

    __slots__ = ("_stopped", "_tick", "ended", "handling", "method", "reason", "running", "status", "stream")

    idempotent: ClassVar[bool] = False

    def __init__(self, handling: Handling, method: Method, stream: ServerStream) -> None:
        # It is made where no task runs, in which there can be no scope of anyio's; it is cancelled as asyncio does.
        self.name = method.dest
        self.scope = _NO_SCOPE
        self.task = None
        self.handling, self.method, self.stream = handling, method, stream
        self._stopped = False
        self.status: Status | None = None
        self.reason: Cut | None = None
        self.running = False
        self.ended: Callable[[], Any] | None = None
        self._tick: int | None = None

    @property
    def dest(self) -> str:
        """The path of its method."""
        return self.method.dest

    @property
    def cardinality(self) -> Cardinality:
        """How many messages go each way."""
        return self.method.cardinality

    @property
    def metadata(self) -> Any:
        """The client's metadata."""
        return self.stream.metadata

    @property
    def peer(self) -> Any:
        """The client's address and certificate, as ``grpclib.protocol.Peer``."""
        return self.stream.peer

    @property
    def client(self) -> tuple[str, int | None]:
        """The client's host and port."""
        address = self.stream.peer.addr()
        return (str(address[0]), address[1]) if isinstance(address, tuple) and len(address) > 1 else ("", None)

    @property
    def gone(self) -> bool:
        """Is its client, or has it been told already how the call ended?"""
        return self.reason is Cut.GONE or self.reason is Cut.CLOSING

    @property
    def declared(self) -> bool:
        """Is its status an answer, whatever it is?"""
        return self.stream.declared

    def status_name(self, error: BaseException | None) -> str:
        """The status of the call, if it ends with ``error``."""
        if error is None:
            return (self.status or Status.OK).name
        if not isinstance(error, Exception):
            over = self.reason is Cut.DEADLINE or passed(VAR.get().deadline, self.handling.clock)
            return "DEADLINE_EXCEEDED" if over else "CANCELLED"
        return status_of(error).name

    def expire_at(self, deadline: float) -> None:
        """End it then."""
        if self._tick is None:
            self._tick = self.handling.wheel.add(deadline, self)

    def cut(self, reason: Cut) -> None:
        """End it early. The first reason counts."""
        if self.reason is not None:
            return
        self.reason = reason
        task = self.task
        # A task that has not begun looks for itself: cancelled before, it would end without a trace. One that closes
        # the server from within its handler must not be cut down by that.
        if self.running and task is not None and task is not asyncio.current_task():
            task.cancel()

    def cancel(self) -> None:
        """End its task, as the server's supervisor does in the end: again and again, should it not listen."""
        self._stopped = True
        if self.running and self.task is not None:
            self.task.cancel()
            asyncio.get_running_loop().call_later(INSIST, self.cancel)

    async def run(self) -> None:
        """Handle it. Never raises but for a cancellation from outside."""
        error: BaseException | None = None
        try:
            if self.reason is None and not self._stopped:
                self.running = True
                try:
                    await self.method.service(self)
                except asyncio.CancelledError as cancelled:
                    if self._stopped:
                        raise
                    error = cancelled
                except Exception as failure:
                    error = failure
                self._settle()
                await self._answer(error)
        except StreamTerminatedError:
            pass  # in the very moment
        except asyncio.CancelledError:
            if self._stopped or self.reason is None:
                raise
        except Exception:
            # A listener of the user's, or details that cannot be encoded.
            logger.exception("%s: the status of %s cannot be sent", self.handling.env.label, self.dest)
            self.stream.fail()
        finally:
            self.running = False
            if self.ended is not None:
                self.ended()

    def _settle(self) -> None:
        if self._tick is not None:
            self.handling.wheel.discard(self._tick, self)
        if self.reason is not None:
            task = asyncio.current_task()
            while task is not None and task.cancelling():
                task.uncancel()

    async def _answer(self, error: BaseException | None) -> None:
        stream = self.stream
        if self.reason is Cut.DEADLINE and not stream.over:
            await stream.finish(Status.DEADLINE_EXCEEDED, EXPIRED)
        elif stream.over:
            return
        elif error is None:
            await stream.finish(self.status or Status.OK)
        elif isinstance(error, GRPCError):
            if error.status is Status.OK and stream.unanswered:
                logger.error("%s: %s raised OK without an answer", self.handling.env.label, self.dest, exc_info=error)
                await stream.finish(Status.UNKNOWN, "internal error: the handler raised OK without an answer")
                return
            await stream.finish(error.status, error.message, error.details)
        elif isinstance(error, MeshError):
            status, message, fields = answer_to(error)
            await stream.finish(status, message, extra=fields)
        elif isinstance(error, asyncio.CancelledError):
            logger.error(
                "%s: the handler of %s was cancelled, and not by us", self.handling.env.label, self.dest, exc_info=error
            )
            await stream.finish(Status.UNKNOWN, "internal error: the handler was cancelled")
        else:  # a filter of the user's, above the error mapping
            logger.error("%s: a layer failed on %s", self.handling.env.label, self.dest, exc_info=error)
            await stream.finish(Status.UNKNOWN, f"internal error: {type(error).__name__}")

    def __repr__(self) -> str:
        return f"<call of {self.method.name}>"


async def invoke(call: ServerCall) -> ServerCall:
    """Call the handler: what stands below all layers."""
    stream, method = call.stream, call.method
    function = method.function
    handling = call.handling
    if handling.listened:
        stream.metadata, function = await handling.dispatch.recv_request(
            stream.metadata,
            function,
            method_name=method.dest,
            deadline=stream.deadline,
            content_type=stream.content_type,
            user_agent=stream.user_agent,
            peer=stream.peer,
        )
    await function(stream)
    stream.check_answered()
    call.status = stream.sent_status or Status.OK
    return call


class GrpcDeadline(Filter[Any, Any, Any, Any]):
    """Refuses calls whose caller has given up, and ends a handler when its caller does."""

    place: ClassVar[str] = "deadline"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, env: Env | None = None) -> None:
        env = env or Env()
        self._clock: Clock = env.clock
        self._expired = env.metrics.counter("deadline/expired")

    def build(self, env: Env, service: Any) -> Any:
        """On the server's clock."""
        return type(self)(env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Handle the call for as long as somebody waits for the answer.

        Raises:
            DeadlineExceeded: Nobody does any more.
        """
        deadline = VAR.get().deadline
        if deadline is not None:
            if deadline <= self._clock.now():
                self._expired.value += 1
                raise DeadlineExceeded("the deadline had passed before the request was handled", processed=False)
            request.expire_at(deadline)
        return await service(request)

    def __repr__(self) -> str:
        return "deadline()"
