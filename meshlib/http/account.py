"""The account of a call: the bodies of replies that its tries have opened, of which at most one is its caller's.

A try that fails may have a body, and so may the copy that lost a race, and the reply that a filter had before it
raised. Each holds a connection until it is closed, and whoever asked for it may be gone: cancelled, or content with
another. So every body is noted in an account when it is opened, and when the call is over, however it ends, all are
closed but the one that is handed out. Nothing is awaited there, since a cancellation that came in between would lose
that one as well: background jobs close the rest. A body that is opened when the call is over is closed at once.

The account is a context variable: the copy of a hedge inherits it, and a call that is made for another reason, such as
a shadow's, has its own. There is one for all of a call, and within it one for each time that it passes the retries.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import Any, Final

from ..core.errors import ServiceClosed
from ..core.supervisor import Supervisor

__all__ = ["ACCOUNT", "Account"]


class Account:
    """What a call has opened.

    Args:
        supervisor: Where bodies are closed.
        memory: The class of streams that are all in memory, and so hold no connection.
        until: Until when bodies may be read, on the client's clock; ``None`` for ever.
    """

    __slots__ = ("_bodies", "_memory", "_over", "_supervisor", "until")

    def __init__(self, supervisor: Supervisor, memory: type, until: float | None) -> None:
        self._supervisor, self._memory, self.until = supervisor, memory, until
        self._bodies: list[Any] | None = None
        self._over = False

    def add(self, body: Any) -> bool:
        """A body was opened. ``False`` if the call is over, and nobody will read it."""
        if self._over:
            return False
        if self._bodies is None:
            self._bodies = [body]
        else:
            self._bodies.append(body)
        return True

    def end(self, reply: Any, above: Account | None = None) -> None:
        """The call is over, with ``reply``, or with ``None`` when there is none. Does not wait.

        Args:
            reply: Its body stays open. If that is none that was opened here, somebody has wrapped one of them, nobody
                knows which, and all stay open.
            above: Who answers for what stays open.
        """
        self._over = True
        bodies = self._bodies
        if bodies is None:
            return
        self._bodies = None
        stream = None if reply is None else getattr(reply, "stream", None)
        wrapped = stream is not None and not isinstance(stream, self._memory) and stream not in bodies
        for body in bodies:
            if body.closed:
                continue
            if not (wrapped or body is stream) or (above is not None and not above.add(body)):
                with contextlib.suppress(ServiceClosed):  # all connections end in that case
                    self._supervisor.start(body.aclose, name="close a body that nobody reads")


ACCOUNT: Final[ContextVar[Account | None]] = ContextVar("meshlib.http.account", default=None)
"""That of the call which is being made."""
