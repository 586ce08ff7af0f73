"""One request under a `Middleware`: what passes between the server and the app, and who sees that the client has gone.

Only a ``receive`` tells that a client has left, and only one may wait in it at a time. While the app reads the body,
that is the app. Afterwards it may be we: `watch` takes the place, and the app's own further calls are answered by what
`watch` has seen. An app that never reads a body that is there is not watched, since the body is not ours to read; where
nobody can tell whether there is one, as in HTTP/2, `watch` takes its first part at most, and keeps that for the app.

The caller's deadline bounds the head of the response. Once that has been sent in time, how long the body may take is
for the client to say, who leaves if it takes too long. And the request is over when the response is, though the app may
go on: Starlette and FastAPI run background tasks inside the same call. Layers ask to be told (`on_complete`).

What comes too late is not sent: a response that begins after its deadline, from a thread that nobody could stop, or one
that some task of the app's goes on with after the request has been answered, or its client has left. Frameworks that
handle requests in tasks of their own (Quart, Django) are not reached by a cancellation, but wait in ``receive`` for the
client to leave: to them the end of a request is told as that, shortly before the rest is cancelled.

A response of 500 and more is held back until the app waits for something: Starlette's outermost layer answers 500 to
whatever is raised, and then raises it, and an error of ours has a better answer.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio
import anyio.lowlevel

from ..core.context import VAR
from ..core.deadlines import passed
from ..core.env import Env
from ..core.errors import ServiceClosed
from ..core.supervisor import Job
from .problem import Answer

__all__ = ["NOTICE", "Exchange"]

Message = dict[str, Any]
GONE: Final[Message] = {"type": "http.disconnect"}
NOTICE: Final = 0.1
"""Seconds between the end of a request's time, told to who waits for its client to leave, and the cancellation."""


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
        late: The deadline has passed before the response began, which will not begin any more.
        dismissed: The app has been told that the request is over, since the server ends.
        began: When it came, on `Clock.now`.
        cancel: What it is handled in.
        deadline: What the app was given as such, on `Clock.now`.
        lifted: The response has begun before its deadline passed, which does not bound it any more.
    """

    __slots__ = (
        "_close",
        "_env",
        "_held",
        "_kept",
        "_listening",
        "_more",
        "_mute",
        "_news",
        "_reading",
        "_receive",
        "_releasing",
        "_send",
        "_told",
        "began",
        "cancel",
        "complete",
        "deadline",
        "dismissed",
        "gone",
        "late",
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
        env: Env,
        cancel: anyio.CancelScope,
    ) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.route = ""
        self.status = 0
        self.complete = self.gone = self.late = self.lifted = self.dismissed = False
        self.began, self.cancel = env.clock.now(), cancel
        self.deadline: float | None = None
        self.watcher: Job | None = None
        self._receive, self._send, self._env = receive, send, env
        self._news: anyio.Event | None = None
        self._kept: Message | None = None
        self._more = True
        self._reading = 0
        self._close = self._mute = False
        self._listening: tuple[anyio.CancelScope, ...] = ()
        self._held: list[Message] | None = None
        self._releasing: anyio.Event | None = None
        self._told: list[Callable[[], None]] = []

    @property
    def dest(self) -> str:
        """What it is called in logs."""
        return f"{self.method} {self.path}"

    @property
    def started(self) -> bool:
        """Has the response begun?"""
        return self.status != 0

    @property
    def failed(self) -> bool:
        """Is its response one that says so, or has the app returned without one?"""
        return self.status >= 500 or not self.complete

    # --- what the app is told -----------------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """The app's next message."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return kept
        if self._mute:
            return dict(GONE)
        return await (self._next() if self._more else self._listen())

    async def _next(self) -> Message:
        while self._news is not None:  # `watch` is in our place
            await self._news.wait()
            if self._kept is not None:
                kept, self._kept = self._kept, None
                return kept
            if self.gone:
                return dict(GONE)
        self._reading += 1
        try:
            message: Message = await self._receive()
        finally:
            self._reading -= 1
        if message["type"] == "http.disconnect":
            self.gone = self._mute = True
        elif not message.get("more_body", False):
            self._more = False
        return message

    async def _listen(self) -> Message:
        """Wait for the client to leave, which is all that can still come, or for what is told as that."""
        due = math.inf
        if self.deadline is not None and not self.lifted:
            end = anyio.current_time() + self.deadline - self._env.clock.now()
            due, self.cancel.deadline = end, max(self.cancel.deadline, end + NOTICE)
        with anyio.CancelScope(deadline=due) as scope:
            self._listening += (scope,)
            try:
                return await self._next()
            finally:
                self._listening = tuple(other for other in self._listening if other is not scope)
        if not self._mute and not self.dismissed:
            self.late = self._mute = True
        return dict(GONE)

    def dismiss(self) -> bool:
        """Tell the app that the request is over, as a client that leaves; ``False`` if it does not listen."""
        self.dismissed = bool(self._listening)
        for scope in self._listening:
            scope.cancel()
        return self.dismissed

    def end(self) -> None:
        """Hear no more of the app, and let those of its tasks that go on know."""
        self._mute, self._kept = True, None
        for scope in self._listening:
            scope.cancel()

    # --- what it says -------------------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """Send for the app."""
        if self._mute:
            await anyio.lowlevel.checkpoint()  # who sends without end is to be cancelled, and to let others work
        elif self._held is not None:
            await self._send_after(message)
        elif message["type"] != "http.response.start":
            await self._pass(message)
        elif self.deadline is not None and passed(self.deadline, self._env.clock):
            self.late = self._mute = True
            await anyio.lowlevel.checkpoint()
        elif message["status"] >= 500:
            self._held = [message]
            try:
                self._env.supervisor.start(self.release, name=self.dest)
            except ServiceClosed:
                await self.release()
        else:
            await self._send(self._begin(message))

    async def _send_after(self, message: Message) -> None:
        if self._held is not None and self._releasing is None and _is_last(message):
            self._held.append(message)
            self._unbind()
        else:
            await self.release()
            await self._pass(message)

    async def release(self) -> None:
        """Send what has been held back."""
        if self._releasing is not None:
            await self._releasing.wait()
        elif self._held is not None:
            done = self._releasing = anyio.Event()
            try:
                while self._held:
                    await self._pass(self._held.pop(0))
            finally:
                self._held = self._releasing = None
                done.set()

    def forget(self) -> None:
        """Do not send what has been held back: there is a better answer."""
        if self._releasing is None:
            self._held = None

    async def conclude(self, answer: Answer) -> None:
        """Send ``answer``, as the app has sent none."""
        self._told.clear()
        await answer.send(self._pass)

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._begin(message)
        elif _is_last(message):
            self.complete = True
            await self._send(message)
            self._completed()
            return
        await self._send(message)

    def _begin(self, message: Message) -> Message:
        self.status = message["status"]
        if self.deadline is None:
            self.lifted = True
        elif not self.cancel.cancel_called:
            self.lifted = True
            self.cancel.deadline = math.inf
            for scope in self._listening:
                scope.deadline = math.inf
        if self._close:
            headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"connection"]
            message = {**message, "headers": [*headers, (b"connection", b"close")]}
        return message

    def on_complete(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the response has been sent, all of it; the app may go on, and fail, after that.

        Those that are asked last, nearest to the app, are told first. None is told if the response is never complete.
        """
        self._told.append(callback)

    def _completed(self) -> None:
        self._unbind()
        while self._told:
            self._told.pop()()

    def _unbind(self) -> None:
        """What the app does from now on is not for the caller; nor are the calls that it makes.

        A response that another task of the app's has sent leaves the context of the app's own task alone.
        """
        if self.deadline is not None:
            context = VAR.get()
            if context.deadline == self.deadline:  # not one that the app has set itself
                VAR.set(context.evolve(deadline=None))

    def close_after(self) -> None:
        """Let the connection end with the response. HTTP/2 has no such header; its servers send GOAWAY themselves."""
        self._close = self.scope.get("http_version", "1.1")[:1] == "1"

    # --- the client ---------------------------------------------------------------------------------------------------

    @property
    def watchable(self) -> bool:
        """Is ``receive`` ours to wait in?"""
        return self.watcher is None and self._is_free

    @property
    def _is_free(self) -> bool:
        return not (self._reading or self.complete or self._mute or self._kept or (self._more and self._has_body))

    @property
    def _has_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in self.scope["headers"]
        )

    async def watch(self) -> None:
        """Wait until the client has gone, and cancel the app then."""
        if self._is_free:  # the app may have begun to read meanwhile
            try:
                await self._watch()
            finally:
                news, self._news = self._news, None
                if news is not None:
                    news.set()
        if not self.gone:
            self.watcher = None  # until it has been read
        elif not self.complete:
            self.cancel.cancel()

    async def _watch(self) -> None:
        self._news = anyio.Event()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = self._mute = True
                return
            if self._more:  # most likely the empty body of a request without one, which the app has not asked for yet
                self._kept, self._more = message, message.get("more_body", False)
                if self._more:
                    return
            news, self._news = self._news, anyio.Event()
            news.set()

    def __repr__(self) -> str:
        return f"<{self.dest}: {self.status or 'no response yet'}>"


def _is_last(message: Message) -> bool:
    if message.get("more_body", False):
        return False
    return message["type"] in ("http.response.body", "http.response.pathsend", "http.response.zerocopysend")
