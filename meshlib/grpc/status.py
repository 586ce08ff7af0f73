"""gRPC's statuses and this library's errors, each in terms of the other. Pure.

=====================================  ==================  =====================================================
status                                 error               tried again
=====================================  ==================  =====================================================
UNAVAILABLE with ``meshlib-nack``      `Rejected`          elsewhere at once, unless it says ``final``
UNAVAILABLE, INTERNAL, UNKNOWN,        `RemoteError`       if the call is idempotent
CANCELLED
RESOURCE_EXHAUSTED, ABORTED            `Rejected`, else    if it is, and the server says when
                                       `RemoteError`
DEADLINE_EXCEEDED                      `DeadlineExceeded`  no
INVALID_ARGUMENT                       `InvalidArgument`   no
UNIMPLEMENTED                          `UnknownMethod`     no
every other                            `RemoteError`       no
=====================================  ==================  =====================================================

UNKNOWN is what a Python server says when a handler raised, as HTTP's 500 is, and one bad instance among good ones says
just that; INTERNAL likewise. CANCELLED, of a call that nobody here has cancelled, is what gRPC's core says when it
stops with calls that it has not handed to a handler yet. What trying again costs where all instances say so, the retry
budget bounds.

``grpc-retry-pushback-ms`` says when to come again; negative or malformed it says never (gRFC A6). Statuses that an
application answers with, as NOT_FOUND, are no failures of the server that says them: see `judge`. Neither is an answer
that is larger than this side takes, which is RESOURCE_EXHAUSTED as well, but no refusal: see `Excess`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from grpclib.const import Status
from grpclib.exceptions import GRPCError

from ..core.classify import ResponseClass
from ..core.errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidArgument,
    MeshError,
    NoEndpoints,
    Rejected,
    RemoteError,
    ResolutionError,
    ServiceClosed,
    UnknownMethod,
    UnknownService,
)
from ..core.pushback import LONGEST_WAIT

__all__ = [
    "FAILURES", "NACK", "PUSHBACK", "Excess", "excess", "judge", "pushback", "raised", "status_of", "to_mesh",
    "to_status",
]  # fmt: skip

PUSHBACK: Final = "grpc-retry-pushback-ms"
NACK: Final = "meshlib-nack"
"""Trailing metadata of a request that no handler has seen: ``true``, or ``final`` when nobody should try again."""

FAILURES: Final = frozenset(
    (
        Status.UNKNOWN,
        Status.DEADLINE_EXCEEDED,
        Status.INTERNAL,
        Status.UNAVAILABLE,
        Status.DATA_LOSS,
        Status.RESOURCE_EXHAUSTED,
    )
)
"""Statuses that say something of the server rather than of the request."""
_PASSING: Final = frozenset((Status.UNAVAILABLE, Status.INTERNAL, Status.UNKNOWN, Status.CANCELLED))

_STATUSES: Final[tuple[tuple[type[MeshError], Status], ...]] = (
    (DeadlineExceeded, Status.DEADLINE_EXCEEDED),
    (Rejected, Status.UNAVAILABLE),
    (ConnectError, Status.UNAVAILABLE),
    (ConnectionLost, Status.UNAVAILABLE),
    (NoEndpoints, Status.UNAVAILABLE),
    (ResolutionError, Status.UNAVAILABLE),
    (ServiceClosed, Status.CANCELLED),
    (InvalidArgument, Status.INVALID_ARGUMENT),
    (UnknownService, Status.UNIMPLEMENTED),
    (UnknownMethod, Status.UNIMPLEMENTED),
    (RemoteError, Status.UNKNOWN),
    (MeshError, Status.INTERNAL),
)
"""The first that fits. ServiceClosed is CANCELLED as C core's "Channel closed!" is: trying again would not help."""


def pushback(value: str | None) -> float | None:
    """Seconds that a ``grpc-retry-pushback-ms`` asks for; negative when it says never; ``None`` without one."""
    if value is None:
        return None
    text = value.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        return -1.0
    return min(int(text) / 1e3, LONGEST_WAIT)


class Exhausted(Rejected):
    """A server has had too much of something. It has said neither that nobody saw the call, nor when to come again."""

    retryable = False
    processed: bool | None = None
    by_peer = True


class Excess(RemoteError):
    """More came, or would have been sent, than this side allows. The server has refused nothing, and is to be blamed
    for nothing: breakers, throttle and balancer learn from it that the server answers.
    """


def excess(text: str, endpoint: str = "", *, sent: bool = True) -> MeshError:
    """The error of a limit of our own: RESOURCE_EXHAUSTED.

    Args:
        text: Which limit, and by how much.
        endpoint: Whose answer it was.
        sent: A server has handled the call.
    """
    return answered(Excess(text, processed=sent, endpoint=endpoint), Status.RESOURCE_EXHAUSTED, text)


def to_mesh(
    status: Status,
    message: str | None = None,
    details: Any = None,
    trailers: Mapping[str, str] | None = None,
    metadata: Any = None,
    endpoint: str = "",
) -> MeshError:
    """The error that a status other than OK is.

    Args:
        status: It.
        message: What the server said, as it said it.
        details: The rich details, decoded.
        trailers: The headers that the status came in, as they came.
        metadata: The trailing metadata that was in them.
        endpoint: Who said it.

    Returns:
        An error that also has ``status``, ``details``, ``said`` (the message, or ``None``) and ``trailing_metadata``.
    """
    trailers = trailers or {}
    asked = pushback(trailers.get(PUSHBACK))
    nack = trailers.get(NACK) if status in (Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED) else None
    text = message or f"the server answered {status.name}"
    error: MeshError
    if nack is not None:
        error = Rejected(text, retryable=nack != "final")
        error.by_peer = True
        error.over_rate = status is Status.RESOURCE_EXHAUSTED
        if asked == 0:
            asked = None  # that is for those who could only come back to the same server
    elif status is Status.RESOURCE_EXHAUSTED:
        error = Exhausted(text, retryable=True if asked is not None else None)
    elif status is Status.DEADLINE_EXCEEDED:
        error = DeadlineExceeded(text)
    elif status is Status.INVALID_ARGUMENT:
        error = InvalidArgument(text)
    elif status is Status.UNIMPLEMENTED:
        error = UnknownMethod(text)
    else:
        # A plain "no" is left to the class, so that a policy which names the status can still say yes.
        passing = status in _PASSING or (status is Status.ABORTED and asked is not None)
        error = RemoteError(text, retryable=passing or None)
        error.processed = None if status in (Status.UNAVAILABLE, Status.CANCELLED) else True
    error.retry_after = asked
    error.endpoint = endpoint
    return answered(error, status, message, details, metadata)


def answered(
    error: MeshError, status: Status, said: str | None = None, details: Any = None, metadata: Any = None
) -> MeshError:
    """``error``, with the status that it is, and what the server said with it."""
    facts = vars(error)
    facts["status"], facts["said"], facts["details"] = status, said, details
    facts["trailing_metadata"] = metadata
    return error


def status_of(error: BaseException | None) -> Status:
    """The status that an outcome is; OK for none."""
    if error is None:
        return Status.OK
    status = getattr(error, "status", None)
    if isinstance(status, Status):
        return status
    if not isinstance(error, MeshError):
        return Status.UNKNOWN
    if isinstance(error, Rejected) and error.over_rate:
        return Status.RESOURCE_EXHAUSTED
    return next(status for kind, status in _STATUSES if isinstance(error, kind))


def to_status(error: MeshError) -> tuple[Status, str]:
    """The status and message that an error travels as."""
    return status_of(error), error.message


def judge(request: Any, reply: Any, error: BaseException | None) -> ResponseClass | None:
    """A partial classifier: what the application answered says nothing bad of the server."""
    if error is None:
        return ResponseClass.SUCCESS
    if isinstance(error, Excess) and error.processed:
        return ResponseClass.SUCCESS
    status = vars(error).get("status") if isinstance(error, MeshError) else None
    if status is None or status in FAILURES or (isinstance(error, MeshError) and error.retryable):
        return None
    return ResponseClass.SUCCESS


class _Face(GRPCError):
    """What makes an error of this library one of grpclib's; the first base of the classes that `raised` makes.

    Attributes:
        status: See `grpclib.const.Status`.
        details: The rich details, decoded, if the server sent any.
        initial_metadata: What came before, if a server had begun to answer a call that does not stream.
        trailing_metadata: What came with the status.
    """

    initial_metadata: Any = None

    _said: str | None
    _told: str

    def __init__(self, *args: Any) -> None:  # `raised` fills it in
        Exception.__init__(self, *args)

    @property
    def message(self) -> str | None:  # type: ignore[override]  # an attribute there, which may be set
        """The server's own words; where no server said anything, what happened, with where and why."""
        return self._said

    def __str__(self) -> str:
        return self._told


_KINDS: Final[dict[type[MeshError], type[_Face]]] = {}


def raised(error: MeshError) -> GRPCError:
    """An exception that is both ``error`` and what grpclib's callers catch; ``str`` of it says where and why."""
    kind = _KINDS.get(type(error))
    if kind is None:
        if isinstance(error, GRPCError):
            return error
        name = type(error).__name__
        kind = _KINDS[type(error)] = type(name, (_Face, type(error)), {"__module__": "meshlib.grpc"})
    both: Any = kind.__new__(kind, *error.args)
    both.args = error.args
    facts = vars(both)
    facts.update(vars(error))
    told = facts["_told"] = str(error)
    if "status" in facts:
        facts["_said"] = facts.pop("said", None)
    else:
        facts["status"], facts["details"], facts["trailing_metadata"] = status_of(error), None, None
        facts["_said"] = told
    both.__cause__ = error.__cause__
    if hasattr(error, "__notes__"):
        both.__notes__ = error.__notes__
    return both  # type: ignore[no-any-return]
