"""What a circuit is to do, written as plainly as it can be: failure accrual and the circuit breaker are held to it.

It keeps everything that happened since the last change and counts it anew each time. Its waits have no jitter, and its
window is longer than any test.
"""

from __future__ import annotations

from meshlib import ConnectionLost, Rejected

FAILURES, RATE, AT_LEAST, WINDOW = 3, 0.5, 6, 1e5
WAITS = (5.0, 10.0, 20.0, 40.0, 40.0)


def too_busy() -> Rejected:
    """A refusal by the peer."""
    error = Rejected("too busy")
    error.by_peer = True
    return error


OUTCOMES = {
    "success": lambda: None,
    "failure": lambda: ValueError("wrong"),
    "lost": lambda: ConnectionLost("reset"),
    "refused": too_busy,
    "nothing": lambda: Rejected("never left"),
}


class Model:
    """Calls begin and end; `state` is what it comes to."""

    def __init__(self) -> None:
        self.state = "closed"
        self.era = 0
        self.history: list[str] = []
        self.losses = 0
        self.opened = 0
        self.until = 0.0

    def begin(self, now: float) -> tuple[int, int] | None:
        """A call: what it was told, or ``None`` if it is one too many."""
        self.look(now)
        if self.state in ("open", "probing"):
            return None
        if self.state == "probe due":
            self._enter("probing")
        return self.era, self.losses

    def look(self, now: float) -> None:
        """Time has passed."""
        if self.state == "open" and now >= self.until:
            self.state = "probe due"

    def end(self, told: tuple[int, int] | None, outcome: str, now: float) -> None:
        """It has ended."""
        if told is None or told[0] != self.era or self.state not in ("closed", "probing"):
            return
        if self.state == "probing":
            if outcome == "success":
                self.opened = 0
                self._enter("closed")
            elif outcome == "nothing":
                self.state = "probe due"
            else:
                self._open(now)
            return
        if outcome == "nothing":
            return
        if outcome in ("failure", "lost") and told[1] < self.losses:
            outcome = "known loss"  # the loss that it was under way with has been counted
        if outcome == "lost":
            self.losses += 1
        self.history.append(outcome)
        if outcome == "success":
            return
        run = 0
        for one in self.history:
            run = 0 if one == "success" else run + (one in ("failure", "lost"))
        good = self.history.count("success")
        enough = len(self.history) >= AT_LEAST
        if (run >= FAILURES and outcome != "refused") or (enough and good < RATE * len(self.history)):
            self._open(now)

    def _open(self, now: float) -> None:
        self.until = now + WAITS[min(self.opened, len(WAITS) - 1)]
        self.opened += 1
        self._enter("open")

    def _enter(self, state: str) -> None:
        self.state = state
        self.era += 1
        self.history = []
        self.losses = 0
