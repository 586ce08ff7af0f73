"""When to leave something alone that fails, and when to try it again: pure, so ``now`` and ``rng`` are given.

::

                    too many failures                       the wait is over
        CLOSED ────────────────────────────► OPEN ────────────────────────────► PROBE_DUE
          ▲                                   ▲                                  │      ▲
          │ it succeeds                       │ it fails: a longer wait          │ one  │ it was cancelled,
          └───────────────────────────────────┴──────────────── PROBING ◄────────┘ call │ or says nothing
                                                                   └────────────────────┘

What opens it is in `meshlib.core.thresholds`. Failure accrual and `circuit_breaker` are two shells around this one
machine. Finagle: FailureAccrualFactory.scala, whose names for the four are Alive, Dead, ProbeOpen and ProbeClosed.
"""

from __future__ import annotations

import random
from enum import Enum
from typing import Any, Final

from .backoff import Backoff
from .classify import Classifier, ResponseClass
from .errors import (
    CircuitOpen,
    ConnectionLost,
    InvalidArgument,
    MeshError,
    Rejected,
    ServiceClosed,
    UnknownMethod,
    UnknownService,
    shown,
)
from .thresholds import LAST_OUT, Thresholds, Window

__all__ = ["Circuit", "Outcome", "State", "in_words", "outcome_of"]


class State(Enum):
    """Where a circuit stands."""

    CLOSED = "closed"
    """Calls pass and are counted."""
    OPEN = "open"
    """Left alone until a moment."""
    PROBE_DUE = "probe due"
    """The next call is the probe."""
    PROBING = "probing"
    """The probe is under way."""


CLOSED: Final = State.CLOSED
"""A member of an enumeration is looked up for each call, and a global is found three times as fast."""


class Outcome(Enum):
    """What the end of a call says of whoever was called."""

    SUCCESS = "success"
    FAILURE = "failure"
    LOST = "lost"
    """The connection ended under it, and under whatever else was on its way: one failure in the run for all of them."""
    REFUSED = "refused"
    """Too much to do (HTTP's 429, a nack): it counts for the rate and not for the run, and a probe has failed."""
    NOTHING = "nothing"
    """It says nothing: cancelled, or ended before anybody was called."""


def outcome_of(classifier: Classifier, request: Any, reply: Any, error: BaseException | None) -> Outcome:
    """What the end of a call says of the endpoint or function that was called.

    Refusals that never left this process say nothing of it, and neither does a caller's wrong argument: one caller's
    mistake must not take an endpoint away from all others.
    """
    what = classifier(request, reply, error)
    if what is ResponseClass.SUCCESS:
        return Outcome.SUCCESS
    if what is ResponseClass.IGNORABLE:
        return Outcome.NOTHING
    if isinstance(error, MeshError):
        if isinstance(error, CircuitOpen):
            return Outcome.NOTHING
        if isinstance(error, Rejected):
            return Outcome.REFUSED if error.by_peer or error.retry_after is not None else Outcome.NOTHING
        if error.retry_after is not None:
            return Outcome.REFUSED
        if isinstance(error, ServiceClosed | InvalidArgument | UnknownService | UnknownMethod):
            return Outcome.NOTHING
        if isinstance(error, ConnectionLost):
            return Outcome.LOST
    return Outcome.FAILURE


def in_words(error: BaseException | None) -> str:
    """A failure, short enough for a reason; ``None`` is a reply that the classifier calls one."""
    if error is None:
        return "a reply that is a failure"
    said = getattr(error, "message", None) or str(error)
    return f"{type(error).__name__}: {shown(said)}" if said else type(error).__name__


class Circuit:
    """The state machine, and the counts that move it.

    A call takes a *pass* when it begins, an integer, and shows it when it ends. Passes of an earlier time than the last
    change are stragglers, and their outcomes are ignored: what began before says nothing of what is now.

    Args:
        thresholds: What opens it.
        backoff: How long it stays open, each time longer until a probe succeeds.

    Attributes:
        state: See `State`.
        now_valid: The pass of a call that begins now, while ``state`` is CLOSED.
        until: While OPEN: when a probe is due.
        since: When it left CLOSED.
        reason: Why it did, and how the last probe failed.
    """

    __slots__ = (
        "_backoff", "_delay", "_oldest", "_run", "_thresholds", "_times", "_window",
        "now_valid", "reason", "since", "state", "until",
    )  # fmt: skip

    STRAGGLER: Final = -1
    """The pass of a call that was sent although nobody should have been; nothing comes of it."""

    def __init__(self, thresholds: Thresholds, backoff: Backoff) -> None:
        self._thresholds = thresholds
        self._backoff = backoff
        self._window = Window(thresholds.window) if thresholds.success_rate is not None else None
        self._run = 0
        self._times = 0
        self._delay = 0.0
        self._oldest = 0
        self.state = State.CLOSED
        self.now_valid = 0
        self.until = self.since = 0.0
        self.reason = ""

    def probe(self, now: float) -> int | None:
        """A pass, if the next call is to be the probe; else ``None``."""
        if self.state is State.OPEN and now >= self.until:
            self.state = State.PROBE_DUE
        if self.state is not State.PROBE_DUE:
            return None
        self.state = State.PROBING
        self.now_valid += 1
        self._oldest = self.now_valid
        return self.now_valid

    def wait_is_over(self, until: float) -> bool:
        """Whoever waited ``until`` then says so. Is a probe due for that?"""
        if self.state is not State.OPEN or self.until != until:
            return False
        self.state = State.PROBE_DUE
        return True

    def succeeded(self, mine: int, now: float) -> bool:
        """A call succeeded. Has that closed the circuit?"""
        if mine < self._oldest:
            return False
        if self.state is CLOSED:
            self._run = 0
            if self._window is not None:
                self._window.success(now)
            return False
        if self.state is not State.PROBING:
            return False
        self._times, self._delay = 0, 0.0
        self._begin(State.CLOSED)
        return True

    def failed(
        self, mine: int, outcome: Outcome, now: float, rng: random.Random, what: str, at_least: float = 0.0
    ) -> str:
        """A call failed: ``outcome`` is FAILURE, LOST or REFUSED. Has that opened the circuit?

        Args:
            mine: The call's pass.
            outcome: How.
            now: When.
            rng: Where jitter comes from.
            what: The failure in a few words.
            at_least: Seconds to stay open at least, if this opens it: whoever failed asked for them.

        Returns:
            What opened it, ``failures``, ``success_rate`` or ``probe``; an empty text if nothing did.
        """
        if mine < self._oldest:
            return ""
        if self.state is State.PROBING:
            self.reason = f"the probe failed: {what}"
            self._open(now, rng, at_least)
            return "probe"
        if self.state is not State.CLOSED:
            return ""
        code = self._count(mine, outcome, now, what)
        if code:
            self.since = now
            self._open(now, rng, at_least)
        return code

    def _count(self, mine: int, outcome: Outcome, now: float, what: str) -> str:
        limits = self._thresholds
        if outcome is not Outcome.REFUSED and mine == self.now_valid:
            self._run += 1
            if outcome is Outcome.LOST:
                self.now_valid += 1  # whoever is under way now fails for the same reason, and that is in the run
            if limits.failures is not None and self._run >= limits.failures:
                self.reason = f"{self._run} failure{'s' * (self._run > 1)} in a row: {what}"
                return "failures"
        if self._window is not None and limits.success_rate is not None:
            self._window.failure(now)
            good, bad = self._window.counts(now)
            if good + bad >= limits.min_requests and good < limits.success_rate * (good + bad):
                share = f"{good} of {good + bad} succeeded within {limits.window:g} s"
                self.reason = f"{share}, below {100 * limits.success_rate:g} %: {what}"
                return "success_rate"
        return ""

    def heeds(self, mine: int) -> bool:
        """Would the outcome of a call with this pass change anything?"""
        return mine >= self._oldest and self.state in (State.CLOSED, State.PROBING)

    def nothing(self, mine: int) -> bool:
        """A call ended in a way that says nothing. Is another probe due for that?"""
        if mine < self._oldest or self.state is not State.PROBING:
            return False
        self.state = State.PROBE_DUE
        return True

    def _open(self, now: float, rng: random.Random, at_least: float) -> None:
        self._times += 1
        self._delay = self._backoff.delay(self._times, rng, self._delay)
        self.until = now + max(self._delay, min(at_least, LAST_OUT))
        self._begin(State.OPEN)

    def _begin(self, state: State) -> None:
        self.state = state
        self.now_valid += 1
        self._oldest = self.now_valid
        self._run = 0
        if self._window is not None:
            self._window.clear()

    def __repr__(self) -> str:
        return f"<Circuit {self.state.value}{': ' + self.reason if self.state is not State.CLOSED else ''}>"
