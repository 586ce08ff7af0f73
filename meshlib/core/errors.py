"""Every exception of the library, and what may be done about each.

Two facts decide whether a failed call may be tried again, and each error carries both:

* ``processed``: did a handler see the request? ``False`` is a proof that none did, ``None`` means nobody can tell.
* ``retryable``: may anybody try again? A budget that ran dry sets it to ``False``, so that callers further up do not
  multiply what was just refused (Finagle's NonRetryable flag).

A request that was provably never processed may always be sent again (a *requeue*); any other retryable failure only
when the call is idempotent (a *retry*).

::

    MeshError
    ├─ Rejected              refused before a handler saw it: nacked, over a limit, draining, out of tags
    │  └─ CircuitOpen        a circuit breaker is open, and the call was not made
    ├─ ConnectError          no connection could be made                    (also a ConnectionError)
    ├─ ConnectionLost        the connection ended while a reply was awaited (also a ConnectionError)
    ├─ DeadlineExceeded      time ran out                                   (also a TimeoutError)
    │  └─ AttemptTimeout     one try took too long; others may follow
    ├─ NoEndpoints           the name has no endpoint that can be used now
    ├─ ResolutionError       the name could not be resolved at all
    ├─ ServiceClosed         the client, server or session was closed
    ├─ RemoteError           the handler failed; details stay in the server's log
    ├─ InvalidArgument       an argument does not fit its declared type     (also a ValueError)
    ├─ InvalidReply          a reply does not fit its declared type         (also a ValueError)
    ├─ UnknownService        the server has no such service                 (also a LookupError)
    ├─ UnknownMethod         the service has no such method                 (also a LookupError)
    ├─ ProtocolError         the peer broke the protocol; that connection is closed
    └─ ConfigurationError    wrong parameters, said at construction         (also a ValueError)
       └─ DtabError             a path or Dtab that cannot be read, and where
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .events import Decision

__all__ = [
    "Attempt",
    "AttemptTimeout",
    "CircuitOpen",
    "ConfigurationError",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "DtabError",
    "InvalidArgument",
    "InvalidReply",
    "MeshError",
    "NoEndpoints",
    "ProtocolError",
    "Rejected",
    "RemoteError",
    "ResolutionError",
    "ServiceClosed",
    "UnknownMethod",
    "UnknownService",
]


def shown(text: str, limit: int = 200) -> str:
    """``text`` from a peer, fit for a log line or a message: cut, and without line breaks or control characters."""
    cut = text[:limit]
    if not cut.isprintable():
        cut = cut.encode("unicode_escape").decode("ascii")
    return f"{cut}…" if len(text) > limit else cut


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a call: where it went, and how it ended (``None`` while it has not, or when it succeeded)."""

    endpoint: str
    outcome: str | None = None

    def __str__(self) -> str:
        return f"{self.endpoint}: {self.outcome}" if self.outcome else self.endpoint


class MeshError(Exception):
    """The root of every error raised by this library.

    Attributes:
        retryable: May anybody try this again (a requeue if ``processed is False``, else only when idempotent)?
        processed: ``False``: provably no handler saw it. ``True``: a handler did. ``None``: unknown.
        label: The client or server that raised it.
        name: The target or path the call was made to, as the user wrote it.
        endpoint: The address of the last try, ``host:port``.
        attempts: Every try that was made, in order.
        elapsed: Seconds from the start of the call to this error.
        verdict: Why it was not tried (again), when somebody decided so.
        decisions: What the layers decided about the call, and why, in order; see `Decision`.
        retry_after: Seconds for which the server asked to be left alone (HTTP's Retry-After, gRPC's pushback); ``None``
            when it did not say.
    """

    retryable: bool = False
    processed: bool | None = None

    def __init__(
        self, message: str = "", *, retryable: bool | None = None, processed: bool | None = None, endpoint: str = ""
    ) -> None:
        super().__init__(message)
        if retryable is not None:
            self.retryable = retryable
        if processed is not None:
            self.processed = processed
        self.label = ""
        self.name = ""
        self.endpoint = endpoint
        self.attempts: tuple[Attempt, ...] = ()
        self.elapsed: float | None = None
        self.verdict = ""
        self.decisions: tuple[Decision, ...] = ()
        self.retry_after: float | None = None

    def finalize(self, verdict: str) -> None:
        """Nobody should try this again, and ``verdict`` says why. It travels: callers further up see it too."""
        self.retryable = False
        self.verdict = verdict

    @property
    def message(self) -> str:
        """What happened, without where and when."""
        return (str(self.args[0]) if self.args else "") or type(self).__name__

    @property
    def requeueable(self) -> bool:
        """Is it safe to send the request again, whatever it does, because it was provably never processed?"""
        return self.retryable and self.processed is False

    def __str__(self) -> str:
        facts = []
        if self.label:
            facts.append(f"client {self.label!r}")
        if self.name and self.name != self.label:
            facts.append(f"name {self.name}")
        if self.attempts:
            tries = "; ".join(str(a) for a in self.attempts[-5:])
            more = "… " if len(self.attempts) > 5 else ""
            facts.append(f"{len(self.attempts)} attempt{'s' * (len(self.attempts) != 1)} ({more}{tries})")
        elif self.endpoint:
            facts.append(f"endpoint {self.endpoint}")
        if self.elapsed is not None:
            facts.append(f"after {self.elapsed:.3f} s")
        if self.verdict:
            facts.append(f"not retried: {self.verdict}")
        return f"{self.message} [{', '.join(facts)}]" if facts else self.message


class Rejected(MeshError):
    """The request was refused before any handler saw it. It may be sent elsewhere at once.

    Attributes:
        by_peer: A server said so, so the request has cost it something; else it never left this process.
        over_rate: It was too many of a caller's, and not too many for the server: others would refuse it as well.
    """

    retryable = True
    processed: bool | None = False
    by_peer = False
    over_rate = False


class CircuitOpen(Rejected):
    """A circuit breaker is open, so the call was not made; ``retry_after`` says when one may pass.

    Nobody should try again at once: what is behind the circuit fails, and the circuit would still be open.
    """

    retryable = False


class ConnectError(MeshError, ConnectionError):
    """No connection to the endpoint could be made, so nothing was sent."""

    retryable = True
    processed: bool | None = False


class ConnectionLost(MeshError, ConnectionError):
    """The connection ended while a reply was awaited. The request may or may not have been processed."""

    retryable = True


class DeadlineExceeded(MeshError, TimeoutError):
    """The call's time ran out: its own timeout, or the deadline that it inherited."""

    kept_here: str | None = None
    """Set by a layer of this process that keeps the deadline of the call: what it was waiting for, if not the reply."""


class AttemptTimeout(DeadlineExceeded):
    """One try took longer than the attempt timeout; the call as a whole may still have time for another."""

    retryable = True


class NoEndpoints(MeshError):
    """The name resolved, but to nothing that can be used now. The message lists each endpoint and why not.

    Attributes:
        impatient: The request would not wait for as long as a client does.
    """

    processed = False
    impatient = False


class ResolutionError(MeshError):
    """The name could not be resolved: no such name, or its source is broken and never gave an answer.

    Attributes:
        impatient: The request would not wait for as long as a client does.
    """

    processed = False
    impatient = False


class ServiceClosed(MeshError):
    """The client, server or session that was called has been closed."""

    processed = False


class RemoteError(MeshError):
    """The handler failed. By design the reply says nothing of its internals: the server's log has the full story.

    Attributes:
        contexts: The response contexts that came with the failure, where the protocol has them.
    """

    processed: bool | None = True

    def __init__(
        self,
        message: str = "",
        *,
        retryable: bool | None = None,
        processed: bool | None = None,
        endpoint: str = "",
        contexts: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message, retryable=retryable, processed=processed, endpoint=endpoint)
        self.contexts = contexts


class InvalidArgument(MeshError, ValueError):
    """An argument does not fit its declared type.

    Attributes:
        path: Where in the arguments, such as ``order.items[2].price``; empty when it is the call as a whole.
    """

    processed = False

    def __init__(self, message: str = "", *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class InvalidReply(MeshError, ValueError):
    """The reply does not fit the type that the caller's contract declares.

    Attributes:
        path: Where in the reply; empty when it is the reply as a whole.
    """

    processed = True

    def __init__(self, message: str = "", *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class UnknownService(MeshError, LookupError):
    """The server has no service of that name; the message lists those it has."""

    processed = False


class UnknownMethod(MeshError, LookupError):
    """The service has no method of that name; the message lists those it has."""

    processed = False


class ProtocolError(MeshError):
    """The peer sent what the protocol does not allow, or more than a limit allows. That connection is closed."""


class ConfigurationError(MeshError, ValueError):
    """Wrong parameters. Raised at construction, with a sentence that says what would be right."""

    processed = False


class DtabError(ConfigurationError):
    """A path or Dtab cannot be read. The message shows the line, with a caret under the place.

    Attributes:
        line: Counted from 1; 0 where there are no lines.
        column: Counted from 1.
    """

    def __init__(self, message: str, *, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.line, self.column = line, column
