"""What travels with a request.

One immutable `Context` per call, held in one context variable: the deadline, the trace, the local Dtab, which attempt
this is, who the client is, and whatever else came over the wire that nobody here understands (passed through
unchanged, as Finagle does). Protocols read it to fill their headers and set it for the handlers they run, so a
handler's own calls inherit all of it, on any protocol.

Not everything in it leaves the process: ``record`` is the account of the one logical call that is being made.

The deadline is an instant on this process's own monotonic clock. On the wire it travels as a remaining time, so the
clocks of two hosts need not agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec

from .clock import Clock, loop_time
from .errors import Attempt, ConfigurationError
from .priority import Priority

if TYPE_CHECKING:
    from .events import Decision

__all__ = ["CLOCK", "CallRecord", "Context", "TraceId", "current", "deadline", "remaining", "use"]

CLOCK: Final = Clock(loop_time)
"""The clock that deadlines are measured on, for code that has no client or server to ask."""


class TraceId(msgspec.Struct, frozen=True):
    """Where in which trace a call stands. Ids travel whether or not anybody records spans.

    Attributes:
        trace: The trace's id, 128 bits; a peer that only knows 64 uses the low ones.
        span: This call's own id, 64 bits. Client and server share it, as in Finagle.
        parent: The id of the span that this one is a child of; ``None`` at the root.
        sampled: Is the trace recorded? ``None``: not decided yet.
        debug: Record it whatever the sampling rate.
        state: W3C ``tracestate``, unchanged.
    """

    trace: int
    span: int
    parent: int | None = None
    sampled: bool | None = None
    debug: bool = False
    state: str = ""

    def __str__(self) -> str:
        return f"{self.trace:032x}.{self.span:016x}"


class CallRecord:
    """The account of one logical call: what was tried, and how each try ended. Never leaves the process.

    Attributes:
        started: When the call began, on `Clock.now`.
        chained: The call serves a request that is itself a retry, so retrying it again would multiply.
        endpoint: The endpoint of the latest try.
        tried: Endpoints that failed this call, which another try avoids when it can.
        attempts: How each failed try ended.
        retries: How many tries followed the first.
        last_try: No other try can follow the one under way.
        decisions: What layers decided about it, and why; see `Decision`.
        opened: The layer that signs errors keeps it; a call made from within this one needs an account of its own.
    """

    __slots__ = ("attempts", "chained", "decisions", "endpoint", "last_try", "opened", "retries", "started", "tried")

    def __init__(self, started: float, chained: bool = False) -> None:
        self.started = started
        self.chained = chained
        self.endpoint: Any = None
        self.tried: tuple[Any, ...] = ()
        self.attempts: tuple[Attempt, ...] = ()
        self.decisions: tuple[Decision, ...] = ()
        self.retries = 0
        self.last_try = True
        self.opened = False

    def fork(self) -> CallRecord:
        """An account for another try, made while the latest is under way. It knows where that one went."""
        other = CallRecord(self.started, self.chained)
        other.tried = self.tried if self.endpoint is None else (*self.tried, self.endpoint)
        other.last_try, other.opened = self.last_try, self.opened
        return other

    def join(self, other: CallRecord) -> None:
        """Take over what a `fork` has to tell, once its try has ended or been given up."""
        if other.endpoint is not None:
            other.attempts += (Attempt(str(other.endpoint), "no reply by then"),)
        self.attempts += other.attempts
        self.tried += tuple(endpoint for endpoint in other.tried if endpoint not in self.tried)
        self.decisions += other.decisions
        self.retries += other.retries

    def failed(self, error: BaseException) -> None:
        """Note that the latest try failed."""
        if self.endpoint is not None:
            message = getattr(error, "message", None) or str(error)
            outcome = f"{type(error).__name__}: {message}" if message else type(error).__name__
            self.tried += (self.endpoint,)
            self.attempts += (Attempt(str(self.endpoint), outcome),)
            self.endpoint = None


class Context(msgspec.Struct, frozen=True):
    """What travels with a request. Immutable: `evolve` makes the next one.

    A ``msgspec.Struct`` because several are made for every call: 0.08 µs each, where a frozen dataclass takes 0.95 µs.

    Attributes:
        deadline: When the answer stops being wanted, on `Clock.now`; ``None`` for never.
        trace: See `TraceId`.
        dtab: The local Dtab's entries, as ``(prefix, tree)`` texts.
        attempt: How many times this request has been sent before (0 for the first try).
        client_id: Who is calling, in their own words.
        baggage: W3C ``baggage``, unchanged.
        opaque: Contexts that nobody here understands; they travel on unchanged.
        record: The logical call being made. Stays in this process, and is not inherited by a handler's own calls.
        priority: Who goes first when not all can; see `Priority`.
        waited: On a server: seconds that the request had waited when it was read.
    """

    deadline: float | None = None
    trace: TraceId | None = None
    dtab: tuple[tuple[str, str], ...] = ()
    attempt: int = 0
    client_id: str = ""
    baggage: str = ""
    opaque: tuple[tuple[bytes, bytes], ...] = ()
    record: CallRecord | None = None
    priority: Priority = Priority.DEFAULT
    waited: float = 0.0

    def evolve(self, **changes: Any) -> Context:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)

    def distrusted(self) -> Context:
        """What is left of it when the caller is not believed: how long an answer is wanted, and the trace.

        Not where our own calls go (the Dtab), who goes first (the priority), who calls (the client id), whether our
        calls may be tried again (the attempt), nor what others make of the baggage and of opaque contexts.
        """
        return Context(self.deadline, self.trace, record=self.record, waited=self.waited)


EMPTY: Final = Context()
VAR: Final[ContextVar[Context]] = ContextVar("meshlib.context", default=EMPTY)

SCOPE: Final[ContextVar[anyio.CancelScope | None]] = ContextVar("meshlib.scope", default=None)
"""On a server: the cancel scope that a request is handled in, whose owner answers when it expires."""

current = VAR.get
"""The context of the code that is running."""


@contextmanager
def use(context: Context) -> Iterator[Context]:
    """Run the body under ``context``."""
    token = VAR.set(context)
    try:
        yield context
    finally:
        VAR.reset(token)


def remaining(clock: Clock = CLOCK) -> float | None:
    """Seconds until the current deadline, negative when it has passed; ``None`` without one."""
    at = current().deadline
    return None if at is None else at - clock.now()


@contextmanager
def deadline(seconds: float, clock: Clock = CLOCK) -> Iterator[Context]:
    """Everything called in the body, here and downstream, shares ``seconds`` from now (or less, if less was left).

    The calls made in the body raise `DeadlineExceeded` once it has passed. Code in the body that calls nobody is not
    interrupted: that is what ``anyio.fail_after`` is for.
    """
    if not 0 < seconds < 1e9:
        raise ConfigurationError(f"deadline({seconds!r}): give the seconds that are left, a number above 0")
    at = clock.now() + seconds
    context = current()
    if context.deadline is not None and context.deadline < at:
        at = context.deadline
    with use(context.evolve(deadline=at)) as inner:
        yield inner
