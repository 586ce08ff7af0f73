"""What may be wrong with one direction of a connection: plain values, changed while the bytes flow.

The set, and most of the names, are toxiproxy's: latency and jitter, bandwidth, slicer, timeout, limit_data, reset_peer
and slow_close. One difference: a stalled direction keeps what it has read, as a network that comes back does, and
hands it on when it is released; toxiproxy's ``timeout`` drops it, which no TCP connection would survive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any, Final

import anyio

from ..core.errors import ConfigurationError

__all__ = ["Direction"]

TICK: Final = 0.02
"""Seconds. Bandwidth is doled out in pieces of this length, so that a change of it is felt at once."""


def _seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _rate(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf)


def _size(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


SECONDS = "seconds, 0 or more"
COUNT = "a number of bytes, 0 or more, or None"
TOXICS: Final[dict[str, tuple[Any, Callable[[Any], bool], str]]] = {
    "latency": (0.0, _seconds, SECONDS),
    "jitter": (0.0, _seconds, SECONDS),
    "bandwidth": (None, _rate, "bytes a second, above 0, or None"),
    "slice_size": (None, _size, "bytes, 1 or more, or None"),
    "slice_delay": (0.0, _seconds, SECONDS),
    "stalled": (False, _flag, "True or False"),
    "close_after": (None, _count, COUNT),
    "reset_after": (None, _count, COUNT),
    "slow_close": (0.0, _seconds, SECONDS),
}
"""Each with what it is when nothing is wrong, what it may be, and how to say that."""


class Direction:
    """One direction of a `FaultProxy`, for all its connections, those that are open included. Assign to change it.

    Attributes:
        latency: Seconds that each byte is under way. Bytes follow each other: it costs no bandwidth.
        jitter: Seconds by which the latency of a chunk may be more or less, evenly drawn. The order stays.
        bandwidth: Bytes a second, for each connection; ``None`` for no limit.
        slice_size: Hand on pieces of this many bytes, give or take a half; ``None``: as they come.
        slice_delay: Seconds between two pieces.
        stalled: Nothing passes; it arrives when this is ``False`` again. The black hole, of one direction or of both.
        close_after: Close a connection when so many bytes have passed it in this direction; ``None`` for never.
        reset_after: Reset it (RST), likewise. 0: by the first byte, which does not arrive.
        slow_close: Seconds for which the end of the stream is held back.
    """

    latency: float
    jitter: float
    bandwidth: float | None
    slice_size: int | None
    slice_delay: float
    stalled: bool
    close_after: int | None
    reset_after: int | None
    slow_close: float
    _changed: anyio.Event
    _name: str

    __slots__ = (*TOXICS, "_changed", "_name")

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_changed", anyio.Event())
        self.heal()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in TOXICS:
            raise AttributeError(f"{self._name} has no {name!r}; it has {', '.join(TOXICS)}")
        _, fits, right = TOXICS[name]
        if not fits(value):
            raise ConfigurationError(f"{self._name}.{name} = {value!r}: give {right}")
        object.__setattr__(self, name, value)
        self._changed.set()
        object.__setattr__(self, "_changed", anyio.Event())

    def heal(self) -> None:
        """Nothing is wrong any more."""
        for name, (normal, _, _) in TOXICS.items():
            setattr(self, name, normal)

    async def change(self) -> None:
        """Wait until something is assigned."""
        await self._changed.wait()

    def under_way(self, rng: Random) -> float:
        """Seconds from here to there, for the next chunk."""
        return max(0.0, self.latency + (rng.uniform(-self.jitter, self.jitter) if self.jitter else 0.0))

    def piece(self, size: int, rng: Random) -> int:
        """How many of ``size`` bytes to hand on at once."""
        if self.slice_size is not None:
            size = min(size, max(1, round(self.slice_size * rng.uniform(0.5, 1.5))))
        if self.bandwidth is not None:
            size = min(size, max(1, int(self.bandwidth * TICK)))
        return size

    def pause(self, size: int) -> float:
        """Seconds to wait after ``size`` bytes were handed on."""
        return self.slice_delay * (self.slice_size is not None) + (size / self.bandwidth if self.bandwidth else 0.0)

    def cut(self, passed: int) -> tuple[int | None, bool]:
        """How many more bytes may pass after ``passed`` (``None``: any number), and does a reset follow them?"""
        ends = [(at, reset) for at, reset in ((self.reset_after, True), (self.close_after, False)) if at is not None]
        if not ends:
            return None, False
        at, reset = min(ends, key=lambda end: end[0])
        return max(0, at - passed), reset

    def __repr__(self) -> str:
        wrong = [f"{name}={getattr(self, name)!r}" for name, (ok, _, _) in TOXICS.items() if getattr(self, name) != ok]
        return f"<{self._name}: {', '.join(wrong) or 'nothing wrong'}>"
