"""Circuit breaker: stop calling what keeps failing, say so at once, and try again with one call after a while.

For any code: a client, a server, or an async function that has nothing to do with this library. Its rules are those of
`meshlib.core.thresholds`, its states those of `meshlib.core.breaking`; failure accrual, which every client has for each
of its endpoints, is the same machine. The difference: accrual turns traffic to another endpoint and refuses nothing,
and a breaker has nowhere else to go, so it refuses.

A count of calls that have ended is blind to calls that do not end (go-zero's breaker). So a call that has been under
way for a whole window counts as a failure then, at the next call; how it ends later changes nothing. A probe likewise.

A cancelled call says nothing, and a cancelled probe leaves the circuit as it was: the next call is the probe. (Polly
takes a cancelled probe for a success, and closes.) What began before the circuit opened changes nothing either.
"""

from __future__ import annotations

import logging
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Final
from weakref import WeakValueDictionary

from ..core.backoff import Backoff
from ..core.breaking import CLOSED, Circuit, Outcome, State, in_words, outcome_of
from ..core.classify import classify
from ..core.context import VAR
from ..core.deadlines import passed
from ..core.env import Env
from ..core.errors import CircuitOpen, ConfigurationError, MeshError
from ..core.service import Call, Filter, Service
from ..core.thresholds import FIRST_OUT, LAST_OUT, Thresholds, backoff_of, shown_backoff

__all__ = ["CircuitBreaker", "circuit_breaker"]

logger = logging.getLogger("meshlib")

REMEMBERED: Final = 5
"""Failures that the error of a refused call tells of."""

On = Callable[[Exception], bool] | type[Exception] | tuple[type[Exception], ...] | None


class _Guarded:
    """A circuit and the calls under way through it: what those share who guard the same thing."""

    __slots__ = ("__weakref__", "backoff", "begun", "circuit", "n", "recent", "thresholds")

    def __init__(self, thresholds: Thresholds, backoff: Backoff) -> None:
        self.thresholds = thresholds
        self.backoff = backoff
        self.circuit = Circuit(thresholds, backoff)
        self.recent: deque[str] = deque(maxlen=REMEMBERED)
        self.begun: dict[int, tuple[float, int]] = {}
        """When each call under way began, and its pass, by number; the oldest comes first."""
        self.n = 0

    def begin(self, now: float, mine: int) -> int:
        """A call begins; its number."""
        self.n += 1
        self.begun[self.n] = now, mine
        return self.n

    def overdue(self, now: float) -> int | None:
        """The pass of a call that should have ended long ago, which is forgotten by that; ``None`` if there is none."""
        if self.begun:
            n = next(iter(self.begun))
            began, mine = self.begun[n]
            if now - began >= self.thresholds.window:
                del self.begun[n]
                return mine
        return None


_named: WeakValueDictionary[str, _Guarded] = WeakValueDictionary()


class CircuitBreaker(Filter[Any, Any, Any, Any]):
    """Refuses calls to what keeps failing. See `circuit_breaker`."""

    place: ClassVar[str] = "filters"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, name: str | None, guarded: _Guarded, on: On, env: Env | None = None) -> None:
        self.name = name
        self.on = on
        self._guarded = guarded
        self._env = env = env or Env()
        self._clock = env.clock
        self._judge_replies = env.classifier is not classify
        metrics = env.metrics.scope("circuit_breaker", *([name] if name else []))
        self._opened, self._closed = metrics.counter("opened"), metrics.counter("closed")
        self._probes, self._refused = metrics.counter("probes"), metrics.counter("refused")

    def build(self, env: Env, service: Any) -> Any:
        """A named breaker is the same one everywhere; an unnamed one is each client's or server's own."""
        known = self._guarded
        guarded = known if self.name is not None else _Guarded(known.thresholds, known.backoff)
        built = type(self)(self.name, guarded, self.on, env)
        env.metrics.gauge(
            f"circuit_breaker/{self.name + '/' if self.name else ''}open",
            lambda: 0 if guarded.circuit.state is State.CLOSED else 1,
        )
        return built.bind(service)

    @property
    def state(self) -> str:
        """``closed``, ``open``, ``probe due`` or ``probing``, of this value and of what it decorates."""
        return self._guarded.circuit.state.value

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Make the call, unless the circuit is open.

        Raises:
            CircuitOpen: It is, or its one probe is under way. The call was not made.
        """
        guarded, now = self._guarded, self._clock.now()
        circuit = guarded.circuit
        while (stuck := guarded.overdue(now)) is not None:
            self._failed(stuck, Outcome.FAILURE, f"no end within {guarded.thresholds.window:g} s")
        mine = circuit.now_valid if circuit.state is CLOSED else self._pass(request, now)
        n = guarded.begin(now, mine)
        try:
            reply = await service(request)
        except Exception as error:
            if guarded.begun.pop(n, None) is not None:
                self._ended(mine, request, None, error)
            raise
        except BaseException:
            # A deadline that passed while an answer was awaited is a failure; a caller that changed its mind is none.
            if guarded.begun.pop(n, None) is not None:
                if passed(VAR.get().deadline, self._clock):
                    self._failed(mine, Outcome.FAILURE, "no reply before the deadline")
                else:
                    circuit.nothing(mine)
            raise
        if guarded.begun.pop(n, None) is not None:
            if self._judge_replies:
                self._ended(mine, request, reply, None)
            else:
                self._succeeded(mine)
        return reply

    def _pass(self, request: Any, now: float) -> int:
        circuit = self._guarded.circuit
        mine = circuit.probe(now)
        if mine is not None:
            self._probes.value += 1
            self._env.events.note("break", "half_open", circuit.reason)
            return mine
        self._refused.value += 1
        error = self._refusal(now)
        self._env.events.note("break", "refused", error.message)
        if isinstance(request, Call):
            # The call of a function was refused, which need not be the whole of the request that is being served.
            error.processed = None
        raise error

    def _refusal(self, now: float) -> CircuitOpen:
        circuit = self._guarded.circuit
        if circuit.state is State.OPEN:
            left = max(0.0, circuit.until - now)
            when = f"the next call may pass in {left:.1f} s"
        else:
            left = None
            when = "one call is under way to see whether it has recovered"
        tally = Tally(self._guarded.recent)
        last = "; ".join(what if n == 1 else f"{what} ({n} times)" for what, n in tally.items())
        whose = f"circuit {self.name!r}" if self.name else "the circuit"
        error = CircuitOpen(f"{whose} is open: {circuit.reason}; {when}; last failures: {last}")
        error.retry_after = left
        return error

    def _ended(self, mine: int, request: Any, reply: Any, error: Exception | None) -> None:
        outcome = outcome_of(self._env.classifier, request, reply, error)
        if error is not None and self.on is not None:
            if not _matches(self.on, error):
                outcome = Outcome.SUCCESS
            elif outcome in (Outcome.SUCCESS, Outcome.NOTHING):
                outcome = Outcome.FAILURE
        if outcome is Outcome.SUCCESS:
            self._succeeded(mine)
        elif outcome is Outcome.NOTHING:
            self._guarded.circuit.nothing(mine)
        else:
            asked = error.retry_after if isinstance(error, MeshError) else None
            self._failed(mine, outcome, in_words(error), asked or 0.0)

    def _succeeded(self, mine: int) -> None:
        if self._guarded.circuit.succeeded(mine, self._clock.now()):
            self._guarded.recent.clear()
            self._closed.value += 1
            self._env.events.note("break", "closed", "the probe succeeded")

    def _failed(self, mine: int, outcome: Outcome, what: str, asked: float = 0.0) -> None:
        circuit = self._guarded.circuit
        if circuit.heeds(mine):
            self._guarded.recent.append(what)
        code = circuit.failed(mine, outcome, self._clock.now(), self._env.rng, what, asked)
        if code:
            self._opened.value += 1
            self._env.events.note("break", code, circuit.reason)

    def __repr__(self) -> str:
        given = [repr(self.name)] if self.name is not None else []
        given += [str(self._guarded.thresholds), f"open_for={shown_backoff(self._guarded.backoff)}"]
        if self.on is not None:
            given.append(f"on={_shown(self.on)}")
        return f"circuit_breaker({', '.join(given)})"


def circuit_breaker(
    name: str | None = None,
    *,
    failures: int | None = 5,
    success_rate: float | None = 0.8,
    window: float = 30.0,
    min_requests: int = 5,
    open_for: tuple[float, float] | Backoff = (FIRST_OUT, LAST_OUT),
    on: On = None,
) -> CircuitBreaker:
    """Refuse calls to what keeps failing, and let one through now and then to see whether it has recovered.

    Args:
        name: Breakers of one name are one circuit, everywhere in the process, for as long as any of them is in use. A
            breaker without a name is one of its own: one for each client or server that it is given to, and one for
            all the functions that the value decorates.
        failures: Opens after so many failures in a row; ``None`` for whatever number.
        success_rate: Opens when a lower share of calls succeeds within ``window``, between 0 and 1; ``None`` for
            whatever share.
        window: Seconds over which that share is counted. A call that takes longer has failed.
        min_requests: The share says nothing below so many calls within ``window``.
        open_for: Seconds until the first probe, and at most: equal-jittered, doubled with each probe that fails, and
            small again after one that succeeds. Or any `Backoff`.
        on: Which exceptions are failures, types or a function of the exception; others count as success. By default
            all are that the classifier calls failures.

    Raises:
        ConfigurationError: A parameter makes no sense, or a breaker of that name is in use with other ones.
    """
    if name is not None and not (isinstance(name, str) and name):
        raise ConfigurationError(f"circuit_breaker({name!r}): give a name, or none; functions are decorated by a value")
    thresholds = Thresholds(failures, success_rate, window, min_requests)
    backoff = backoff_of("open_for", open_for)
    kinds = on if isinstance(on, tuple) else (on,) if isinstance(on, type) else ()
    if on is not None and not (all(map(_is_exception, kinds)) if kinds else callable(on)):
        raise ConfigurationError(f"circuit_breaker(on={on!r}): give exception types, or a function of the exception")
    if name is None:
        return CircuitBreaker(None, _Guarded(thresholds, backoff), on)
    guarded = _named.get(name)
    if guarded is None:
        guarded = _named[name] = _Guarded(thresholds, backoff)
    elif (thresholds, backoff) not in ((guarded.thresholds, guarded.backoff), _DEFAULTS):
        theirs = f"{guarded.thresholds}, open_for={shown_backoff(guarded.backoff)}"
        raise ConfigurationError(
            f"circuit_breaker({name!r}): one of that name is in use with {theirs}; give the same, or the name alone"
        )
    return CircuitBreaker(name, guarded, on)


_DEFAULTS: Final = (Thresholds(), backoff_of("open_for", (FIRST_OUT, LAST_OUT)))


def _is_exception(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Exception)


def _matches(on: Any, error: Exception) -> bool:
    if isinstance(on, tuple | type):
        return isinstance(error, on)
    try:
        return bool(on(error))
    except Exception:  # the caller is to have the error of the call, and a probe must have an outcome
        logger.exception("%r failed; what it was asked of counts as a failure", on)
        return True


def _shown(on: Any) -> str:
    kinds = on if isinstance(on, tuple) else (on,)
    names = [getattr(kind, "__name__", repr(kind)) for kind in kinds]
    return names[0] if not isinstance(on, tuple) else f"({', '.join(names)}{',' * (len(names) == 1)})"
