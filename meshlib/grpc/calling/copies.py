"""gRFC A6's hedging: copies of a call, sent a fixed time apart, until one succeeds or fails for good.

It differs from `meshlib.hedge`, which learns what slow is and sends one copy: here the config says when and how many.
A copy that fails with a status which is not fatal sends the next one at once; a fatal one ends the call. A server's
pushback says when the next may go, or that none may. The client's retry budget and turns must allow every copy.
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any

import anyio

from ...core.context import VAR, CallRecord, Context
from ...core.env import Env
from ...core.errors import MeshError
from ...core.service import Service
from ...filters.budget import budget_of
from ..status import status_of

if TYPE_CHECKING:
    from .configured import Tokens
    from .methodconfig import Hedging

__all__ = ["Copies"]


class Copies:
    """Sends the copies of one policy.

    Args:
        policy: How many, when, and which failures are not fatal.
        tokens: The config's throttling, if it has one.
        env: The client's.
    """

    def __init__(self, policy: Hedging, tokens: Tokens | None, env: Env) -> None:
        self._policy, self._tokens, self._env = policy, tokens, env
        self._budget = budget_of(env)
        self._sent = env.metrics.counter("hedges/sent")
        self._won = env.metrics.counter("hedges/won")

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Make the call, and copies of it.

        Raises:
            MeshError: All of them failed, or one failed for good.
        """
        race = _Race(self, request, service)
        async with anyio.create_task_group() as group:
            await race.run(group)
            group.cancel_scope.cancel()
        return race.result()

    def affordable(self) -> bool:
        """May one more copy be sent? If so it is paid for, and has its turn."""
        if self._tokens is not None and not self._tokens.allows:
            return False
        if not self._budget.turns.try_take():
            return False
        if not self._budget.try_withdraw(self._env.clock.now()):
            self._budget.turns.give_back()
            return False
        self._sent.value += 1
        return True

    def over(self) -> None:
        """A copy has ended."""
        self._budget.turns.give_back()

    def passing(self, error: Exception) -> bool:
        """May the next copy still succeed after that?"""
        passes = status_of(error) in self._policy.passing
        if passes and self._tokens is not None:
            self._tokens.failed()
        return passes

    def succeeded(self, copy: bool) -> None:
        """One has."""
        self._won.value += copy
        if self._tokens is not None:
            self._tokens.succeeded()

    @property
    def policy(self) -> Hedging:
        """What it was made with."""
        return self._policy


class _Race:
    """One call and its copies."""

    def __init__(self, copies: Copies, request: Any, service: Service[Any, Any]) -> None:
        self._copies, self._request, self._service = copies, request, service
        self._context = VAR.get()
        self._records: list[CallRecord] = []
        self._changed = anyio.Event()
        self._under_way = 0
        self._reply: Any = None
        self._answered = False
        self._final: Exception | None = None
        self._last: Exception | None = None
        self._asked: float | None = None
        self._failed = 0

    async def run(self, group: Any) -> None:
        """Send the copies; over when the call is decided."""
        policy = self._copies.policy
        for n in range(policy.attempts):
            if n and not self._copies.affordable():
                break
            self._send(group, n)
            failed = self._failed
            delay = policy.delay
            with anyio.CancelScope(deadline=anyio.current_time() + delay):
                while not self._decided and self._failed == failed:
                    await self._next()
            if self._asked is not None and not self._decided:
                if self._asked < 0:
                    break
                with anyio.CancelScope(deadline=anyio.current_time() + self._asked):
                    while not self._decided:
                        await self._next()
                self._asked = None
            if self._decided:
                return
        while self._under_way and not self._decided:
            await self._next()

    @property
    def _decided(self) -> bool:
        return self._answered or self._final is not None

    async def _next(self) -> None:
        self._changed = anyio.Event()
        await self._changed.wait()

    def _send(self, group: Any, n: int) -> None:
        context, record = self._context, self._context.record
        if record is not None:
            if n:
                record.retries += 1
                before = self._records[-1] if self._records else record
                record = before.fork()
                self._records.append(record)
            context = context.evolve(record=record, attempt=context.attempt + n)
        self._under_way += 1
        contextvars.copy_context().run(group.start_soon, self._try, context, n)

    async def _try(self, context: Context, n: int) -> None:
        VAR.set(context)
        try:
            reply = await self._service(self._request)
        except Exception as error:
            self._last = error
            asked = error.retry_after if isinstance(error, MeshError) else None
            if asked is not None:
                self._asked = asked
            self._failed += 1
            if not self._copies.passing(error):
                self._final = self._final or error
        else:
            if not self._answered:
                self._answered, self._reply = True, reply
                self._copies.succeeded(n > 0)
        finally:
            self._under_way -= 1
            if n:
                self._copies.over()
            self._changed.set()

    def result(self) -> Any:
        """What it came to."""
        record = self._context.record
        if record is not None:
            for other in self._records:
                record.join(other)
        if self._answered:
            return self._reply
        error = self._final or self._last
        assert error is not None  # noqa: S101
        raise error
