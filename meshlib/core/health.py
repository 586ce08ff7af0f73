"""Why an endpoint is, or is not, to be used: one account that every layer below the balancer writes to.

The pool writes "connect refused", the session writes "draining", a breaker will write "5 failures in a row". The
balancer reads one attribute, and an error message reads the reasons.
"""

from __future__ import annotations

from collections.abc import Callable

from .service import Status

__all__ = ["Health"]


class Health:
    """The status of one endpoint: the worst that any layer says of it.

    Attributes:
        status: The worst status any layer has marked; `Status.OPEN` when none has.
        serves: It would serve all the same, if there were no other: no layer has said that it cannot.
    """

    __slots__ = ("_marks", "_on_change", "serves", "status")

    def __init__(self, on_change: Callable[[], None] | None = None) -> None:
        self._marks: dict[str, tuple[Status, str, bool]] = {}
        self._on_change = on_change
        self.status = Status.OPEN
        self.serves = True

    def mark(self, layer: str, status: Status, reason: str = "", *, serves: bool = False) -> None:
        """Say what ``layer`` thinks of the endpoint; `Status.OPEN` withdraws what it said before."""
        if status is Status.OPEN:
            if self._marks.pop(layer, None) is None:
                return
        else:
            self._marks[layer] = (status, reason, serves)
        self.status = min((s for s, _, _ in self._marks.values()), default=Status.OPEN)
        self.serves = all(s for _, _, s in self._marks.values())
        if self._on_change is not None:
            self._on_change()

    @property
    def reason(self) -> str:
        """Why it is not open, in words; empty when it is."""
        return ", ".join(f"{layer}: {reason}" if reason else layer for layer, (_, reason, _) in self._marks.items())

    def __repr__(self) -> str:
        return f"<Health {self.status.name.lower()}{': ' + self.reason if self.reason else ''}>"
