"""One request under a `Middleware`: what passes between the server and the app, and who sees that the client has gone.

Only a ``receive`` tells that a client has left, and only one may wait in it at a time. While the app reads the body,
that is the app. Afterwards it may be we: `watch` takes the place, and the app's own further calls are answered by what
`watch` has seen. An app that never reads a body that is there is not watched, since the body is not ours to read.

The caller's deadline bounds the head of the response. Once that has been sent in time, how long the body may take is
for the client to say, who leaves if it takes too long. And the request is over when the response is, though the app may
go on: Starlette and FastAPI run background tasks inside the same call. Layers ask to be told (`on_complete`).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio

from ..core.context import VAR
from ..core.supervisor import Job

__all__ = ["Exchange"]

Message = dict[str, Any]
GONE: Final[Message] = {"type": "http.disconnect"}


class Exchange:
    """The request that layers see, and the reply: they have the one object.

    Attributes:
        scope: The ASGI scope.
        method: Its method.
        path: Its path.
        route: What the framework has made of it, once it has.
        status: Of the response, once it has begun; else 0.
        complete: The response has been sent, all of it.
        gone: The client has left.
        began: When it came, on `Clock.now`.
        cancel: What it is handled in.
        deadline: What the app was given as such, on `Clock.now`.
        lifted: The response has begun before its deadline passed, which does not bound it any more.
    """

    __slots__ = (
        "_close",
        "_kept",
        "_more",
        "_news",
        "_reading",
        "_receive",
        "_send",
        "_told",
        "began",
        "cancel",
        "complete",
        "deadline",
        "gone",
        "lifted",
        "method",
        "path",
        "route",
        "scope",
        "status",
        "watcher",
    )

    def __init__(
        self,
        scope: Any,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
        began: float,
        cancel: anyio.CancelScope,
    ) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.route = ""
        self.status = 0
        self.complete = self.gone = self.lifted = False
        self.began, self.cancel = began, cancel
        self.deadline: float | None = None
        self.watcher: Job | None = None
        self._receive, self._send = receive, send
        self._news: anyio.Event | None = None
        self._kept: Message | None = None
        self._more = True
        self._reading = 0
        self._close = False
        self._told: list[Callable[[], None]] = []

    @property
    def dest(self) -> str:
        """What it is called in logs."""
        return f"{self.method} {self.path}"

    @property
    def started(self) -> bool:
        """Has the response begun?"""
        return self.status != 0

    async def receive(self) -> Message:
        """The app's next message."""
        message: Message
        while self._news is not None or self.gone:
            if self._kept is not None:
                message, self._kept = self._kept, None
                return message
            if self.gone or self._news is None:
                return dict(GONE)
            await self._news.wait()
        self._reading += 1
        try:
            message = await self._receive()
        finally:
            self._reading -= 1
        if message["type"] == "http.disconnect":
            self.gone = True
        elif not message.get("more_body", False):
            self._more = False
        return message

    async def send(self, message: Message) -> None:
        """Send for the app."""
        kind = message["type"]
        if kind == "http.response.start":
            self.status = message["status"]
            if self.deadline is None:
                self.lifted = True
            elif not self.cancel.cancel_called:
                self.lifted = True
                self.cancel.deadline = math.inf
            if self._close:
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"connection"]
                message = {**message, "headers": [*headers, (b"connection", b"close")]}
        elif kind == "http.response.pathsend" or (kind == "http.response.body" and not message.get("more_body", False)):
            self.complete = True
            await self._send(message)
            self._completed()
            return
        await self._send(message)

    def on_complete(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the response has been sent, all of it; the app may go on, and fail, after that.

        Those that are asked last, nearest to the app, are told first. None is told if the response is never complete.
        """
        self._told.append(callback)

    def _completed(self) -> None:
        if self.deadline is not None:
            # What the app does from now on is not for the caller; nor are the calls that it makes. (A response that
            # another task of the app's has sent leaves the context of the app's own task alone.)
            context = VAR.get()
            if context.deadline == self.deadline:  # not one that the app has set itself
                VAR.set(context.evolve(deadline=None))
        while self._told:
            self._told.pop()()

    def close_after(self) -> None:
        """Let the connection end with the response. HTTP/2 has no such header; its servers send GOAWAY themselves."""
        self._close = self.scope.get("http_version", "1.1")[:1] == "1"

    # --- the client ---------------------------------------------------------------------------------------------------

    @property
    def watchable(self) -> bool:
        """Is ``receive`` ours to wait in?"""
        return not self._reading and not self.complete and self.watcher is None and not (self._more and self._has_body)

    @property
    def _has_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in self.scope["headers"]
        )

    async def watch(self) -> None:
        """Wait until the client has gone, and cancel the app then."""
        self._news = anyio.Event()
        while not self.gone:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
            elif self._more:  # the empty body of a request without one, which the app has not asked for yet
                self._kept, self._more = message, False
            news, self._news = self._news, anyio.Event()
            news.set()
        if not self.complete:
            self.cancel.cancel()

    def __repr__(self) -> str:
        return f"<{self.dest}: {self.status or 'no response yet'}>"
