"""An aperture: each client talks to a part of the servers, so that many clients and servers need few connections.

Within the aperture it is the power of two choices, in proportion to shares. How it is chosen is in ``ring.py``:

* With a coordinate, by the window on the ring. Its size is fixed, and every server gets the same from all clients.
* Without, by rank, as many as the load needs: the requests under way, averaged over 15 s, are kept between 0.875 and
  1.125 for each server in the aperture (Finagle, aperture/LoadBand.scala; there any change of the servers starts again
  with an aperture of 1, which here stays as wide as it was).

Of servers outside of the aperture the balancer takes the connection once they have been idle for long.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from math import exp
from typing import Final

from ..core.env import Env
from ..core.errors import ConfigurationError
from .choose import Chooser, P2CPicker, Picker, as_metric
from .load import LoadMetric, PeakEwma
from .node import Node
from .ring import point, rank, windows

__all__ = ["Aperture", "aperture"]

MINIMUM: Final = 12
"""Servers (Finagle's minDeterministicAperture): with fewer, two that fail are a sixth of the traffic."""
LOW, HIGH, SMOOTH = 0.875, 1.125, 15.0
"""Finagle's load band and window (Balancers.scala)."""
COORDINATE: Final = "MESHLIB_COORDINATE"
LOST: Final = 0.5
"""A window of which more than this share cannot be used is extended."""


class Aperture:
    """The chooser that `aperture` makes; see there."""

    expires = True

    def __init__(
        self, metric: LoadMetric | None, coordinate: tuple[int, int] | None, minimum: int, low: float, high: float
    ) -> None:
        self.metric: LoadMetric = metric or PeakEwma(10.0, 5.0)
        self.coordinate = None if coordinate is None else _checked(coordinate, f"aperture(coordinate={coordinate!r})")
        if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 1:
            raise ConfigurationError(f"aperture(minimum={minimum!r}): give a number of servers, 1 or more")
        if not 0 < low < 1 < high:
            raise ConfigurationError(f"aperture(low={low!r}, high={high!r}): give loads with 0 < low < 1 < high")
        self.minimum, self.low, self.high = minimum, float(low), float(high)

    def picker(self, env: Env) -> Picker:
        """By the coordinate, if this process has one."""
        coordinate = self.coordinate or _from_environment()
        inner = P2CPicker(env.rng, explores=self.metric.explores)
        metrics = env.metrics
        metrics.gauge("use_deterministic_ordering", lambda: int(coordinate is not None))
        if coordinate is not None:
            on_ring = OnRing(inner, coordinate, self.minimum)
            metrics.gauge("physical_aperture", lambda: len(on_ring.nodes))
            return on_ring
        ranked = Ranked(inner, env.rng.getrandbits(64), self.minimum, self.low, self.high)
        metrics.gauge("physical_aperture", lambda: len(ranked.nodes))
        metrics.gauge("logical_aperture", lambda: ranked.size)
        metrics.gauge("loadband/offered_load_ema", lambda: ranked.average)
        metrics.gauge("loadband/widen", lambda: ranked.widened)
        metrics.gauge("loadband/narrow", lambda: ranked.narrowed)
        return ranked

    def __repr__(self) -> str:
        where = "" if self.coordinate is None else f", coordinate={self.coordinate!r}"
        band = "" if (self.low, self.high) == (LOW, HIGH) else f", low={self.low:g}, high={self.high:g}"
        return f"aperture({self.metric!r}{where}, minimum={self.minimum}{band})"


class _Within:
    """What both kinds share: a power of two choices among the nodes of the aperture."""

    def __init__(self, inner: P2CPicker) -> None:
        self._inner = inner
        self.pick = inner.pick
        self.why = inner.why

    @property
    def nodes(self) -> Sequence[Node]:
        """Those in the aperture that may be used."""
        return self._inner.nodes


class OnRing(_Within):
    """The aperture of a client that knows which of how many it is."""

    watches_load = False

    def __init__(self, inner: P2CPicker, coordinate: tuple[int, int], minimum: int) -> None:
        super().__init__(inner)
        self._coordinate, self._minimum = coordinate, minimum
        self._points: dict[Node, float] = {}

    def update(self, nodes: Sequence[Node], everyone: Collection[Node]) -> None:
        """Those of the window that may be used; when it has lost too much, the next ones clockwise as well."""
        known = self._points
        self._points = {node: known[node] if node in known else point(node.address) for node in everyone}
        ring = sorted(self._points, key=lambda node: (self._points[node], str(node.address)))
        weights = [node.address.weight for node in ring]
        whole = sum(weights)
        first, parts = windows(weights, *self._coordinate, self._minimum)
        usable = set(nodes)
        chosen: list[Node] = []
        lost = 0.0
        for k in range(len(ring)):
            inside = k < len(parts)
            if not inside and lost <= LOST * sum(parts) and chosen:
                break
            if not inside and len(chosen) >= len(parts):
                break
            node = ring[(first + k) % len(ring)]
            share = parts[k] if inside else node.address.weight / whole
            if node in usable:
                node.share = share
                chosen.append(node)
            elif inside:
                lost += share
        self._inner.spread(_even(chosen))

    def changed(self, node: Node, delta: int, now: float) -> None:
        """The window does not depend on load."""


class Ranked(_Within):
    """The aperture of a client that knows of no others: the first by rank, as many as the load needs.

    Attributes:
        size: How many it should be; there may be fewer.
        average: Requests under way, averaged.
        widened: How often it has become wider.
        narrowed: How often narrower.
    """

    watches_load = True

    def __init__(self, inner: P2CPicker, seed: int, minimum: int, low: float, high: float) -> None:
        super().__init__(inner)
        self._seed, self._minimum, self._low, self._high = seed, minimum, low, high
        self._ranks: dict[Node, tuple[float, float]] = {}
        self._ranked: list[Node] = []
        self._pending = 0
        self._at: float | None = None
        self.size = minimum
        self.average = 0.0
        self.widened = self.narrowed = 0

    def update(self, nodes: Sequence[Node], everyone: Collection[Node]) -> None:
        """The aperture stays as wide as it was."""
        known, self._ranks = self._ranks, {}
        for node in nodes:
            weight = node.address.weight
            node.share = weight
            old = known.get(node)
            place = old[1] if old and old[0] == weight else rank(node.address, weight, self._seed)
            self._ranks[node] = (weight, place)
        self._ranked = sorted(nodes, key=lambda node: (self._ranks[node][1], str(node.address)))
        self._resize(self.size)

    def _resize(self, size: int) -> None:
        self.size = size
        self._inner.spread(self._ranked[:size])

    def changed(self, node: Node, delta: int, now: float) -> None:
        """Average the requests under way over time, and widen or narrow by one where they leave the band."""
        if self._at is not None and now > self._at:
            kept = exp((self._at - now) / SMOOTH)
            self.average = self.average * kept + self._pending * (1.0 - kept)
        self._at = now if self._at is None else max(now, self._at)
        self._pending += delta
        if self.average >= self._high * self.size and self.size < len(self._ranked):
            self.widened += 1
            self._resize(self.size + 1)
        elif self.average <= self._low * self.size and self.size > self._minimum:
            self.narrowed += 1
            self._resize(self.size - 1)


def _even(nodes: list[Node]) -> list[Node]:
    """Shares that differ by rounding alone are made equal, which makes picks cheaper."""
    shares = [node.share for node in nodes]
    if max(shares) - min(shares) < 1e-9 * max(shares):
        for node in nodes:
            node.share = shares[0]
    return nodes


def _checked(coordinate: object, said: str) -> tuple[int, int]:
    match coordinate:
        case (int(instance), int(total)) if 0 <= instance < total and not isinstance(total, bool):
            return instance, total
    raise ConfigurationError(f"{said}: give which client this is, from 0, and of how many: (3, 10)")


def _from_environment() -> tuple[int, int] | None:
    text = os.environ.get(COORDINATE, "")
    if not text:
        return None
    try:
        pair = tuple(int(part) for part in text.split("/"))
    except ValueError:
        pair = ()
    return _checked(pair, f"{COORDINATE}={text!r}, which should be such as 3/10")


def aperture(
    metric: LoadMetric | None = None,
    *,
    coordinate: tuple[int, int] | None = None,
    minimum: int = MINIMUM,
    low: float = LOW,
    high: float = HIGH,
) -> Chooser:
    """The power of two choices over a part of the endpoints, so that each client connects to a dozen and not to all.

    Args:
        metric: How load is measured: `peak_ewma()`, the default, or `least_loaded()`.
        coordinate: Which client this is, from 0, and of how many: ``(3, 10)``. If it is not given, the environment
            variable ``MESHLIB_COORDINATE`` (``3/10``) says; if that is not set, each client chooses for itself.
        minimum: Endpoints that the aperture holds at least.
        low: Without a coordinate: below this many requests under way for each endpoint, it narrows by one.
        high: Likewise: from this many on, it widens by one.

    Raises:
        ConfigurationError: A parameter makes no sense.
    """
    return Aperture(as_metric(metric, "aperture"), coordinate, minimum, low, high)
