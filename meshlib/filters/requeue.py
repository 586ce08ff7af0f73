"""Requeue: what was provably never processed is sent again, whatever it does, because that is always safe.

A request that never left this process (no connection, a session that closed in that moment) goes elsewhere for
nothing, up to `LIMIT` times; one that a server refused has cost that server something, so it is charged to the retry
budget, of which one call may spend a fifth. The first requeue goes at once, to an endpoint that has not failed the call
if there is one; later ones wait a little, jittered. A server that says for how long it wants to be left alone
(`MeshError.retry_after`) is: other endpoints are tried meanwhile, and when all have had their turn the wait is to the
number. When the budget is dry the failure is marked so that nobody further up tries again.

The budget's deposits are made here, one for each call that succeeds, so that an outage pays for no retries, and the
calls under way are counted here. Source: Finagle, service/RequeueFilter.scala and Retries.scala (25 acquisition
retries, free of charge).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final

import anyio

from ..core.context import VAR
from ..core.env import Env
from ..core.errors import MeshError
from ..core.health import Peers
from ..core.service import Filter, Service
from .budget import budget_of
from .turns import patience

__all__ = ["Requeue"]

LIMIT: Final = 25
ONE_CALL: Final = 0.2
"""The share of the budget, as it is when the first requeue is due, that one call may spend: 20 at rest (Finagle)."""
FIRST_WAIT, LAST_WAIT = 0.005, 0.2


class Requeue(Filter[Any, Any, Any, Any]):
    """Sends again what was never processed."""

    place: ClassVar[str] = "requeue"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, env: Env | None = None) -> None:
        env = env or Env()
        self._clock = env.clock
        self._rng = env.rng
        self._note = env.events.note
        self._budget = budget_of(env)
        self._budget.fed = True
        self._turns = self._budget.turns
        self._peers = env.shared(Peers, Peers)
        self._requeues = env.metrics.counter("retries/requeues")
        self._exhausted = env.metrics.counter("retries/budget_exhausted")
        self._limited = env.metrics.counter("retries/request_limit")

    def build(self, env: Env, service: Any) -> Any:
        """With the client's budget."""
        return type(self)(env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Send it, again if need be."""
        turns = self._turns
        turns.calls += 1
        try:
            reply = await service(request)
        except MeshError as error:
            if not error.requeueable:
                raise
            reply = await self._again(request, service, error)
        finally:
            turns.calls -= 1
        self._budget.deposit(self._clock.now())
        return reply

    async def _again(self, request: Any, service: Service[Any, Any], error: MeshError) -> Any:
        context = VAR.get()
        record = context.record
        refused = 0
        most = max(1, math.ceil(ONE_CALL * self._budget.balance(self._clock.now())))
        for n in range(1, LIMIT + 1):
            charged = bool(getattr(error, "by_peer", False))
            asked = error.retry_after
            if asked is not None and asked < 0:
                error.finalize("the server asked not to be tried again")
                raise self._given_up(error, "pushback")
            if asked is not None and record is not None and self._peers.count > len(set(record.tried)):
                asked = None  # it asked for itself; there are others
            usual = 0.0 if n == 1 else self._rng.uniform(0, min(LAST_WAIT, FIRST_WAIT * 2 ** (n - 1)))
            wait = usual if asked is None else asked
            now = self._clock.now()
            if context.deadline is not None and now + wait >= context.deadline:
                error.verdict = "the deadline would pass first"
                raise self._given_up(error, "deadline")
            if charged:
                if refused >= most:
                    self._limited.value += 1
                    error.verdict = f"servers refused it {refused + 1} times"
                    raise self._given_up(error, "attempts")
                if not self._budget.try_withdraw(now):
                    self._exhausted.value += 1
                    error.finalize("the retry budget is spent")
                    raise self._given_up(error, "budget")
            if wait:
                await anyio.sleep(wait)
            if charged and not await self._turn(context.deadline):
                error.verdict = f"no turn within the deadline, with {self._turns.taken} other retries under way"
                raise self._given_up(error, "deadline")
            self._requeues.value += 1
            refused += charged
            if record is not None:
                record.retries += 1
            code = "pushback" if asked is not None else "refused" if charged else "unsent"
            self._note("requeue", code, f"after {error.message}", endpoint=error.endpoint)
            # To the servers this is a retry only if one of them has seen it before.
            token = VAR.set(context.evolve(attempt=context.attempt + refused))
            try:
                return await service(request)
            except MeshError as again:
                if not again.requeueable:
                    raise
                error = again
            finally:
                VAR.reset(token)
                if charged:
                    self._turns.give_back()
        self._limited.value += 1
        error.verdict = f"requeued {LIMIT} times"
        raise self._given_up(error, "attempts")

    async def _turn(self, deadline: float | None) -> bool:
        """Wait for a turn; ``False`` if the deadline is too near by then."""
        if self._turns.try_take():
            return True
        with anyio.CancelScope(deadline=anyio.current_time() + patience(deadline, self._clock.now())):
            await self._turns.take()
            return True
        return False

    def _given_up(self, error: MeshError, code: str) -> MeshError:
        left = self._budget.balance(self._clock.now())
        told = f"{error.verdict}; the retry budget has {left} left"
        self._note("no_requeue", code, told, endpoint=error.endpoint)
        return error

    def __repr__(self) -> str:
        return f"requeue(limit={LIMIT}, {self._budget!r})"
