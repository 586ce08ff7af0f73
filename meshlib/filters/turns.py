"""How many retries and hedges are under way at once: a fifth of the first tries under way, or ten.

A budget of tokens bounds how many extra tries are begun; it says nothing of how long they take. When latency explodes,
a second's worth of affordable retries stays for a minute and takes what room the servers have left. So both forms must
allow an extra try: tokens, and a turn. The share is Envoy's (retry_budget: 20 %, at least 3 at once).

Three things differ from Envoy. A retry that finds no turn waits for one, in order, instead of failing: a server that
dies takes all its calls with it at once, a third of all where there are three, and these must not be lost because they
failed together. Tokens are taken first, so no more can wait than are affordable; and it waits at most half of what is
left until its deadline (`patience`), since a try that is begun in the last moment only makes load. A hedge never waits.
Second, only calls on their first try count: if those that wait counted as well, a long line would allow itself more.
And the least is 10, as the tokens' is 10 a second, so that a small client's calls come back in a round or two.
"""

from __future__ import annotations

from collections import deque
from math import inf

import anyio

__all__ = ["Turns", "patience"]


def patience(deadline: float | None, now: float) -> float:
    """Seconds that an extra try may wait for its turn: it keeps as long for itself as it waits at most."""
    return inf if deadline is None else max(0.0, deadline - now) / 2


class Turns:
    """Counts, and whoever waits for them to fall.

    Args:
        share: Extra tries under way for each call that is on its first try.
        least: How many may be under way whatever the traffic, 1 or more.

    Attributes:
        calls: Tries under way, extra ones included, and calls that wait to be tried again.
        taken: Extra tries under way.
    """

    __slots__ = ("_waiting", "calls", "least", "share", "taken")

    def __init__(self, share: float = 0.2, least: int = 10) -> None:
        self.share, self.least = share, least
        self.calls = 0
        self.taken = 0
        self._waiting: deque[anyio.Event] = deque()

    @property
    def free(self) -> bool:
        """May one more extra try be under way?"""
        return self.taken < self.least or self.taken < self.share * (self.calls - self.taken - len(self._waiting))

    @property
    def waiting(self) -> int:
        """How many wait for a turn."""
        return len(self._waiting)

    def try_take(self) -> bool:
        """Take a turn if there is one and nobody waits for it."""
        if self._waiting or not self.free:
            return False
        self.taken += 1
        return True

    async def take(self) -> None:
        """Take a turn, in the order of asking. `give_back` must follow, unless this was cancelled."""
        if self.try_take():
            return
        turn = anyio.Event()
        self._waiting.append(turn)
        self._hand_on()  # there may be more calls than when the first in the line began to wait
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():
                self.give_back()  # it came in the same moment; the next one has it
            else:
                self._waiting.remove(turn)
            raise

    def give_back(self) -> None:
        """The extra try has ended, in whatever way."""
        self.taken -= 1
        self._hand_on()

    def _hand_on(self) -> None:
        while self._waiting and self.free:
            self.taken += 1
            self._waiting.popleft().set()

    def __repr__(self) -> str:
        return f"<Turns: {self.taken} taken, {self.waiting} wait, {self.calls} calls>"
