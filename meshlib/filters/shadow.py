"""Shadowing: a share of the requests goes to a second service as well, and what both answer is compared.

The caller sees the first service alone. Its copy runs in the background with a deadline of its own and as the most
sheddable work there is; when too many copies are under way, the next is dropped, so a slow shadow costs memory for
``limit`` of them and no more. Finagle: DarkTrafficFilter, which does not compare.
"""

from __future__ import annotations

import contextvars
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import anyio

from ..core.context import VAR, Context
from ..core.env import Env
from ..core.errors import ConfigurationError, DeadlineExceeded, ServiceClosed, shown
from ..core.priority import Priority
from ..core.service import Call, Filter, Service
from ..core.supervisor import Supervisor

__all__ = ["Shadow", "shadow"]

LIMIT = 100
"""Copies at once: 1,000 requests a second, a tenth of them mirrored, come to 100 when each copy takes a second."""
TIMEOUT = 10.0
"""Seconds. Nobody waits for a copy; it only has to end."""


class _Pair:
    """One request's two outcomes. The copy waits here for the first service's."""

    __slots__ = ("decided", "outcome", "settled")

    def __init__(self) -> None:
        self.outcome: Any = None
        self.settled = anyio.Event()
        self.decided = False

    def settle(self, outcome: Any) -> None:
        self.outcome = outcome
        self.decided = True
        self.settled.set()

    def abandon(self) -> None:
        """The caller gave up: there is nothing to compare with."""
        self.settled.set()


class Shadow(Filter[Any, Any, Any, Any]):
    """Mirrors requests. Made by `shadow`."""

    keeps_deadline: ClassVar[bool] = True

    def __init__(
        self,
        to: Callable[..., Any],
        share: float,
        compare: Callable[[Any, Any, Any], bool] | None,
        limit: int,
        timeout: float,
        when: Callable[[Any], bool] | None,
        env: Env | None = None,
    ) -> None:
        self.to = to
        self.share = share
        self.compare = compare
        self.limit = limit
        self.timeout = timeout
        self.when = when
        self.active = 0
        self._owner = env
        env = env or Env()
        self._env = env
        self._supervisor = env.supervisor
        self._sent = env.metrics.counter("shadow/sent")
        self._dropped = env.metrics.counter("shadow/dropped")
        self._same = env.metrics.counter("shadow/same")
        self._different = env.metrics.counter("shadow/different")
        self._failed = env.metrics.counter("shadow/failed")

    def build(self, env: Env, service: Any) -> Any:
        """Its copies end with the client or server."""
        return type(self)(self.to, self.share, self.compare, self.limit, self.timeout, self.when, env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Handle the request, and send a copy if it is its turn."""
        if self.share < 1 and self._env.rng.random() >= self.share:
            return await service(request)
        pair = self._mirror(request)
        if pair is None:
            return await service(request)
        try:
            reply = await service(request)
        except Exception as error:
            pair.settle(error)
            raise
        except BaseException:
            pair.abandon()
            raise
        pair.settle(reply)
        return reply

    def _mirror(self, request: Any) -> _Pair | None:
        if self.active >= self.limit:
            self._dropped.value += 1
            return None
        try:
            if self.when is not None and not self.when(request):
                return None
            return self._launch(request)
        except ServiceClosed:  # the client is closing, and the call itself will be told so
            return None
        except Exception as error:
            self._env.events.note("shadow", "broken", _brief("when", error), call=False)
            return None

    def _launch(self, request: Any) -> _Pair:
        if self._owner is None and self._supervisor.elsewhere:
            # Composed by hand, it belongs to no client and may be called on one event loop after another.
            self._supervisor, self.active = Supervisor("shadow"), 0
        context = contextvars.Context()
        context.run(VAR.set, self._context())
        pair = _Pair()
        self._supervisor.start(self._copy, request, pair, self._supervisor, name="shadow", context=context)
        self.active += 1
        self._sent.value += 1
        return pair

    def _context(self) -> Context:
        # The trace stays, so that a difference can be looked up; nothing of the caller's account or time does.
        return VAR.get().evolve(deadline=self._env.clock.now() + self.timeout, record=None, priority=Priority.SHEDDABLE)

    async def _copy(self, request: Any, pair: _Pair, supervisor: Supervisor) -> None:
        try:
            outcome = await self._answer(request)
            if isinstance(outcome, Exception):
                self._failed.value += 1
            await pair.settled.wait()
            if pair.decided:
                self._judge(request, pair.outcome, outcome)
        finally:
            if supervisor is self._supervisor:
                self.active -= 1

    async def _answer(self, request: Any) -> Any:
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + self.timeout):
                if isinstance(request, Call):
                    return await self.to(*request.args, **request.kwargs)
                return await self.to(request)
        except Exception as error:
            return error
        return DeadlineExceeded(f"no reply from the shadow within {self.timeout:g} s")

    def _judge(self, request: Any, first: Any, second: Any) -> None:
        try:
            same = (self.compare or _alike)(request, first, second)
        except Exception as error:
            self._env.events.note("shadow", "broken", _brief("compare", error), call=False)
            return
        if same:
            self._same.value += 1
            return
        self._different.value += 1
        detail = f"{_brief('request', request)}; {_brief('reply', first)}; {_brief('shadow', second)}"
        self._env.events.note("shadow", "different", detail, call=False)

    def __repr__(self) -> str:
        says = [_spelled(self.to), f"share={self.share:g}"]
        if self.compare is not None:
            says.append(f"compare={_spelled(self.compare)}")
        says.append(f"limit={self.limit}")
        says.append(f"timeout={self.timeout:g}")
        if self.when is not None:
            says.append(f"when={_spelled(self.when)}")
        return f"shadow({', '.join(says)})"


def shadow(
    to: Callable[..., Any],
    share: float = 0.1,
    *,
    compare: Callable[[Any, Any, Any], bool] | None = None,
    limit: int = LIMIT,
    timeout: float = TIMEOUT,
    when: Callable[[Any], bool] | None = None,
) -> Shadow:
    """Send a share of the requests to ``to`` as well, and compare what it answers. The caller never notices.

    Args:
        to: Any service, such as a client, which stays its owner's to close. Where the filter decorates a function, a
            function of the same arguments.
        share: Of the requests, above 0, up to 1.
        compare: ``(request, first, second) -> bool``: do these two outcomes, each a reply or an exception, mean the
            same? By default replies must be equal, and errors of one class. It runs on the event loop: keep it short.
        limit: At most so many copies at once; beyond it they are dropped and counted.
        timeout: Seconds for a copy.
        when: Which requests may be copied, such as those that change nothing; by default, all.

    Raises:
        ConfigurationError: One of them makes no sense.
    """
    if not callable(to):
        raise ConfigurationError(f"shadow({to!r}): give a service, an async callable of one request")
    if not _number(share) or not 0 < share <= 1:
        raise ConfigurationError(f"shadow(share={share!r}): give a share of the requests, above 0, up to 1")
    if compare is not None and not callable(compare):
        raise ConfigurationError(f"shadow(compare={compare!r}): give a function of (request, first, second)")
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"shadow(limit={limit!r}): give a whole number of copies above 0")
    if not _number(timeout) or not 0 < timeout < 1e9:
        raise ConfigurationError(f"shadow(timeout={timeout!r}): give seconds, a number above 0")
    if when is not None and not callable(when):
        raise ConfigurationError(f"shadow(when={when!r}): give a function of the request that says True or False")
    return Shadow(to, share, compare, limit, timeout, when)


def _alike(request: Any, first: Any, second: Any) -> bool:
    if isinstance(first, Exception) or isinstance(second, Exception):
        return type(first) is type(second)
    return bool(operator.eq(first, second))


def _brief(what: str, value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = f"<a {type(value).__name__} whose repr fails: {type(error).__name__}>"
    return f"{what} {shown(text, 100)}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _spelled(value: Any) -> str:
    if isinstance(value, type) or not hasattr(value, "__name__"):
        label = getattr(getattr(value, "env", None), "label", "")
        return f"<client {label!r}>" if label else repr(value)
    return str(value.__name__)
