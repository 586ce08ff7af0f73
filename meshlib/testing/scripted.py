"""Scripted services: the test plays the server, one request at a time, in the order in which things are to happen.

    service, script = scripted()
    ...                                          # the code under test calls ``service``, in another task
    request = await script.next_request()
    request.respond("hello")

A service accepts every request until `Script.allow` says how many more. The model is tower-test's Mock and Handle
(``allow``, ``next_request``, ``send_response``, ``send_error``), with futures that are cancelled instead of dropped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import anyio

from ..core.context import Context, current
from ..core.errors import ConfigurationError, ServiceClosed

__all__ = ["Script", "ScriptedRequest", "scripted"]

Req = TypeVar("Req")
Rep = TypeVar("Rep")

PATIENCE = 5.0
"""Seconds that a script waits for a request. In virtual time a request that never comes is found out at once."""


class ScriptedRequest(Generic[Req, Rep]):
    """A request that waits for the script's answer.

    Attributes:
        request: What the service was called with.
        context: What travelled with it: the deadline, the attempt, the priority, …
        cancelled: The caller gave up before there was an answer.
        answered: The script has answered.
    """

    def __init__(self, request: Req) -> None:
        self.request = request
        self.context: Context = current()
        self.cancelled = False
        self.answered = False
        self._reply: Any = None
        self._error: BaseException | None = None
        self._ended = anyio.Event()

    @property
    def ended(self) -> bool:
        """Nobody waits for the answer any more: it was given, or the caller gave up."""
        return self._ended.is_set()

    def respond(self, reply: Rep) -> None:
        """Answer with ``reply``. Nobody hears it when the caller has given up.

        Raises:
            RuntimeError: It was answered before.
        """
        self._answer(reply, None)

    def fail(self, error: Exception) -> None:
        """Answer by raising ``error``. Nobody hears it when the caller has given up.

        Raises:
            RuntimeError: It was answered before.
        """
        if not isinstance(error, Exception):
            raise TypeError(f"fail({error!r}): give an exception, made: fail(ValueError('…'))")
        self._answer(None, error)

    def _answer(self, reply: Any, error: Exception | None) -> None:
        if self.answered:
            raise RuntimeError(f"{self!r} cannot be answered twice")
        self.answered = True
        self._reply, self._error = reply, error
        self._ended.set()

    async def wait_cancelled(self, within: float = PATIENCE) -> None:
        """Wait until the caller gives up.

        Raises:
            AssertionError: It has not within so many seconds, or the request was answered.
        """
        with anyio.move_on_after(within):
            await self._ended.wait()
        if not self.cancelled:
            raise AssertionError(f"{self!r} was not cancelled within {within:g} s")

    async def _result(self) -> Rep:
        try:
            await self._ended.wait()
        except BaseException:
            if not self.answered:
                self.cancelled = True
                self._ended.set()
            raise
        if self._error is not None:
            raise self._error
        reply: Rep = self._reply
        return reply

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled else "answered" if self.answered else "waiting"
        return f"<request {self.request!r}: {state}>"


class Script(Generic[Req, Rep]):
    """The test's end of a scripted service. ``async with`` it, and a request that nobody answered fails the test."""

    def __init__(self) -> None:
        self._room: float = math.inf
        self._held: deque[ScriptedRequest[Req, Rep]] = deque()
        self._arrived: deque[ScriptedRequest[Req, Rep]] = deque()
        self._taken: list[ScriptedRequest[Req, Rep]] = []
        self._changed = anyio.Event()
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many requests wait at the door, because no more were allowed."""
        return len(self._held)

    def allow(self, requests: int) -> None:
        """Let in this many more requests, counted from now; those beyond wait until it is called again.

        Raises:
            ConfigurationError: It is no whole number, 0 or more.
        """
        if isinstance(requests, bool) or not isinstance(requests, int) or requests < 0:
            raise ConfigurationError(f"allow({requests!r}): give a whole number of requests, 0 or more")
        self._room = requests
        self._admit()

    async def next_request(self, within: float = PATIENCE) -> ScriptedRequest[Req, Rep]:
        """The next request, in the order of arrival; waits for it. One whose caller has given up comes all the same.

        Raises:
            AssertionError: None came within so many seconds.
        """
        with anyio.move_on_after(within):
            while not self._arrived:
                await self._changed.wait()
        if not self._arrived:
            held = f"; {len(self._held)} wait to be allowed" if self._held else ""
            raise AssertionError(f"no request came within {within:g} s{held}")
        request = self._arrived.popleft()
        self._taken = [*(taken for taken in self._taken if not taken.ended), request]
        return request

    async def expect_none(self, within: float = 0.0) -> None:
        """Check that no request comes: within so many seconds, or, for 0, until every other task waits for something.

        Raises:
            AssertionError: One came.
        """
        if within > 0:
            with anyio.move_on_after(within):
                while not self._arrived:
                    await self._changed.wait()
        else:
            await anyio.wait_all_tasks_blocked()
        if self._arrived:
            raise AssertionError(f"no request was expected, and here is {self._arrived[0]!r}")

    def close(self) -> None:
        """Fail everything that waits, and all that comes, with `ServiceClosed`. Closing twice is the same as once."""
        self._closed = True
        for request in (*self._held, *self._arrived, *self._taken):
            if not request.ended:
                request.fail(ServiceClosed("the scripted service was closed"))
        self._held.clear()

    @property
    def unanswered(self) -> tuple[ScriptedRequest[Req, Rep], ...]:
        """Requests that were let in and whose callers still wait."""
        return tuple(r for r in (*self._taken, *self._arrived) if not r.ended)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        left = self.unanswered
        self.close()
        if left and error is None:
            listed = ", ".join(repr(request.request) for request in left[:5]) + (", …" if len(left) > 5 else "")
            raise AssertionError(f"{len(left)} requests were never answered: {listed}")

    async def serve(self, request: Req) -> Rep:
        """The service's end: wait until the script answers.

        Raises:
            ServiceClosed: The script has ended.
            Exception: The script said so.
        """
        if self._closed:
            raise ServiceClosed("the scripted service was closed")
        item: ScriptedRequest[Req, Rep] = ScriptedRequest(request)
        self._held.append(item)
        self._admit()
        try:
            return await item._result()
        finally:
            if item.cancelled and item in self._held:
                self._held.remove(item)

    def _admit(self) -> None:
        while self._held and self._room > 0:
            self._room -= 1
            self._arrived.append(self._held.popleft())
            self._changed.set()
            self._changed = anyio.Event()

    def __repr__(self) -> str:
        room = "any number" if self._room == math.inf else str(self._room)
        return f"<Script: {room} allowed, {len(self._held)} held, {len(self._arrived)} to take>"


def scripted() -> tuple[Callable[[Any], Awaitable[Any]], Script[Any, Any]]:
    """A service for the code under test to call, any number of times at once, and the script that answers for it."""
    script: Script[Any, Any] = Script()
    return script.serve, script
