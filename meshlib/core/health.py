"""Why an endpoint is, or is not, to be used: one account that every layer below the balancer writes to.

The pool writes "connect refused", the session writes "draining", failure accrual writes "5 failures in a row". The
balancer reads one attribute, and an error message reads the reasons. `Peers` is what the endpoints of one client know
of each other, for layers that act differently when there is nowhere else to go.
"""

from __future__ import annotations

from collections.abc import Callable

from .service import Status

__all__ = ["Health", "Peers"]


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


class Peers:
    """The endpoints of one client, as far as each must know of the others: ``env.shared(Peers, Peers)``.

    Layers let an endpoint join as they are built and leave as it closes; joining twice is joining once. Who has no
    connection, and waits before it tries again, says so with `down`.
    """

    __slots__ = ("_down", "_members")

    def __init__(self) -> None:
        self._members: set[Health] = set()
        self._down: dict[Health, Callable[[], object]] = {}

    @property
    def count(self) -> int:
        """How many endpoints there are."""
        return len(self._members)

    @property
    def all_down(self) -> bool:
        """Is there none that could serve?"""
        return len(self._down) >= len(self._members)

    @property
    def downs(self) -> int:
        """How many cannot serve."""
        return len(self._down)

    def join(self, health: Health) -> None:
        """There is an endpoint with that health."""
        self._members.add(health)

    def leave(self, health: Health) -> None:
        """There is no more."""
        self._members.discard(health)
        self._down.pop(health, None)
        self._last_gone()

    def down(self, health: Health, hurry: Callable[[], object]) -> None:
        """It cannot serve until `up`. ``hurry`` is called when no endpoint is left that can."""
        if health in self._members and health not in self._down:
            self._down[health] = hurry
            self._last_gone()

    def up(self, health: Health) -> None:
        """It can serve again."""
        self._down.pop(health, None)

    def _last_gone(self) -> None:
        if self._down and self.all_down:
            for hurry in tuple(self._down.values()):
                hurry()

    def __repr__(self) -> str:
        return f"<Peers: {len(self._members)}, {len(self._down)} down>"
