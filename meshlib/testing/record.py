"""What happened in a simulation, as it happens: numbers in arrays, since there are hundreds of thousands of them."""

from __future__ import annotations

from array import array
from typing import Final

__all__ = ["OK", "UNSENT", "Events", "Record"]

OK: Final = 0
"""The outcome of a request that was answered; others are errors, by their place in `Record.kinds`."""
UNSENT: Final = 0xFFFF
"""Instead of a server: the attempt never left the client."""


class Events:
    """Moments, each with the number of the server that it concerns."""

    __slots__ = ("at", "host")

    def __init__(self) -> None:
        self.at = array("d")
        self.host = array("H")

    def add(self, at: float, host: int) -> int:
        """Note one; give its number."""
        self.at.append(at)
        self.host.append(host)
        return len(self.at) - 1

    def __len__(self) -> int:
        return len(self.at)


class Record:
    """Everything that a report is made of. Times are seconds from the beginning.

    Attributes:
        at: When each request came.
        took: How long it took to be answered or to fail.
        outcome: `OK`, or which of the `kinds` of errors.
        load: Which load it is part of.
        kinds: The names of errors, in the order in which they first came; the first place is that of success.
        sent: Attempts that left a client, by the server that they went to.
        handled: Requests that reached a handler, past the server's own layers.
        connects: Connections made.
        refused: Connects that nobody answered.
    """

    def __init__(self) -> None:
        self.at = array("d")
        self.took = array("d")
        self.outcome = array("H")
        self.load = array("H")
        self.kinds = ["ok"]
        self.sent = Events()
        self.handled = Events()
        self.connects = Events()
        self.refused = Events()
        self._numbers = {"ok": OK}

    def request(self, at: float, took: float, error: str, load: int) -> None:
        """One request has ended; ``error`` is empty when it was answered."""
        self.at.append(at)
        self.took.append(took)
        self.load.append(load)
        self.outcome.append(self._number(error) if error else OK)

    def _number(self, error: str) -> int:
        number = self._numbers.get(error)
        if number is None:
            number = self._numbers[error] = len(self.kinds)
            self.kinds.append(error)
        return number

    def __len__(self) -> int:
        return len(self.at)
