"""Decisions: what a layer chose to do with a call, and why, in a form that counters, spans and errors all can show.

A layer that decides something out of the ordinary (retries or does not, ejects an endpoint, sheds a request, hedges,
routes in panic) says so with `Decisions.note`. Each decision

* counts as ``decisions/<kind>/<code>`` in the metrics (both are from small fixed sets, so the labels are bounded),
* joins the account of the call that it concerns (`CallRecord.decisions`), from where it goes into the call's span and
  into the error that it ends with, and
* reaches whoever listens: ``client.events.listen(print)``.

Ordinary picks are thousands a second and say little, so they are told only while `Decisions.wanted` says that somebody
listens; the rest is rare and always told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from .context import VAR

if TYPE_CHECKING:
    from .clock import Clock
    from .env import Counter, Metrics

__all__ = ["Decision", "Decisions"]

PER_CALL = 32
"""A call keeps this many decisions and then the last ones; a runaway loop must not keep its whole history."""


class Decision(msgspec.Struct, frozen=True):
    """One choice that a layer made.

    Attributes:
        kind: What was decided: ``pick``, ``retry``, ``no_retry``, ``requeue``, ``hedge``, ``no_hedge``, ``panic``,
            ``eject``, ``revive``, ``probe``, ``shed``, ``throttle``, ``break``, ``fault``, …
        code: Why, in a word from a small set: ``budget``, ``deadline``, ``not_idempotent``, ``chain``, …
        detail: Why, in a sentence with the numbers.
        endpoint: Which endpoint it concerns; empty for none.
        at: When, on `Clock.now`.
    """

    kind: str
    code: str
    detail: str = ""
    endpoint: str = ""
    at: float = 0.0

    def __str__(self) -> str:
        where = f" {self.endpoint}" if self.endpoint else ""
        why = f"{self.code}: {self.detail}" if self.detail else self.code
        return f"{self.kind}{where} ({why})"


class Decisions:
    """Where the layers of one client or server say what they decided.

    Attributes:
        wanted: Somebody listens, so that even an ordinary pick is worth telling.
    """

    __slots__ = ("_clock", "_counters", "_listeners", "_metrics", "wanted")

    def __init__(self, clock: Clock, metrics: Metrics) -> None:
        self._clock = clock
        self._metrics = metrics
        self._counters: dict[tuple[str, str], Counter] = {}
        self._listeners: tuple[Callable[[Decision], object], ...] = ()
        self.wanted = False

    def note(self, kind: str, code: str, detail: str = "", *, endpoint: object = "", call: bool = True) -> Decision:
        """Say what was decided.

        Args:
            kind: See `Decision`.
            code: See `Decision`.
            detail: See `Decision`.
            endpoint: See `Decision`.
            call: It concerns the call that is being made; ``False`` for what concerns an endpoint or the whole client.
        """
        decision = Decision(kind, code, detail, str(endpoint), self._clock.now())
        counter = self._counters.get((kind, code))
        if counter is None:
            counter = self._counters[kind, code] = self._metrics.counter(f"decisions/{kind}/{code}")
        counter.value += 1
        if call:
            record = VAR.get().record
            if record is not None:
                record.decisions = (*record.decisions[-PER_CALL + 1 :], decision)
        for listener in self._listeners:
            listener(decision)
        return decision

    def listen(self, listener: Callable[[Decision], object]) -> Callable[[], None]:
        """Call ``listener`` with each decision from now on, ordinary picks included, until the result is called."""
        self._listeners += (listener,)
        self.wanted = True

        def stop() -> None:
            self._listeners = tuple(other for other in self._listeners if other is not listener)
            self.wanted = bool(self._listeners)

        return stop

    def __repr__(self) -> str:
        return f"<Decisions: {sum(c.value for c in self._counters.values())} told>"
