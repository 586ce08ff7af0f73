"""How one node is chosen among those that may be: what a chooser is, and the power of two choices.

A chooser is a value, and makes one `Picker` for each client. Pickers are pure: nodes, a time and a generator in, a node
out; no pick looks at all nodes.

`P2C` draws two random nodes and takes the less loaded one (Mitzenmacher, 2001; Finagle, p2c/P2CPick.scala). Where
shares differ, nodes are drawn in proportion to them, and costs are compared per share, so that an idle client keeps the
proportions as well as a busy one (Finagle, aperture/WeightedP2CPick.scala).

One pick in `EXPLORE_EVERY` may take the other of the two, if that has not been used for some time: what looked slow or
broken may have healed, and nobody would find out.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any, Final, Protocol

from ..core.env import Env
from ..core.errors import ConfigurationError
from .load import LeastLoaded, LoadMetric, PeakEwma
from .node import Node

__all__ = ["P2C", "Chooser", "P2CPicker", "Picker", "SimpleChooser", "SimplePicker", "metric_of", "p2c", "picker_of"]

TRIES: Final = 5
"""How often a second node is drawn that is to differ from the first (Finagle); one may have nearly all the weight."""
EXPLORE_EVERY: Final = 200
"""0.5 % of requests, so that exploring a slow node cannot show in the p99 (Linkerd's experiment: 0.1 % is p99.9)."""


class Picker(Protocol):
    """The choices of one client."""

    @property
    def nodes(self) -> Sequence[Node]:
        """Those that it picks from now."""
        ...

    def update(self, nodes: Sequence[Node], everyone: Collection[Node]) -> None:
        """From now on pick from ``nodes``, at least one, which are those of ``everyone`` that may be used."""
        ...

    def pick(self, now: float) -> Node:
        """One of the nodes."""
        ...

    def changed(self, node: Node, delta: int, now: float) -> None:
        """A request to ``node`` has begun (``delta`` 1) or ended (-1). Called only if `watches_load` is true."""
        ...

    @property
    def watches_load(self) -> bool:
        """Does it want to be told of each request that begins and ends?"""
        ...

    def why(self, node: Node, now: float) -> str:
        """Why ``node``, which has just been picked, and was not sent anything yet."""
        ...


class Chooser(Protocol):
    """A way to choose. An immutable value: what it needs to remember is in its pickers."""

    @property
    def metric(self) -> LoadMetric:
        """How it measures load."""
        ...

    def picker(self, env: Env) -> Picker:
        """A picker for one client."""
        ...


class SimpleChooser(Protocol):
    """The least that a chooser of one's own must be."""

    def pick(self, nodes: Sequence[Node], rng: random.Random) -> Node:
        """One of ``nodes``, of which there is at least one."""
        ...


class P2C:
    """The power of two choices.

    Args:
        metric: What is compared; the peak EWMA by default.
    """

    def __init__(self, metric: LoadMetric | None = None) -> None:
        self.metric: LoadMetric = metric or PeakEwma(10.0, 5.0)

    def picker(self, env: Env) -> Picker:
        """It draws from the client's generator."""
        return P2CPicker(env.rng, explores=self.metric.explores)

    def __repr__(self) -> str:
        return f"p2c({self.metric!r})"


class P2CPicker:
    """Two nodes at random; the one with less cost for its share."""

    __slots__ = ("_credit", "_draw", "_explores", "_other", "_up_to", "nodes")

    watches_load = False

    def __init__(self, rng: random.Random, *, explores: bool) -> None:
        self.nodes: Sequence[Node] = ()
        self._draw = rng.random
        self._explores = explores
        self._credit = 0
        self._up_to: list[float] | None = None
        """The sum of the shares up to each node; ``None`` when all are equal."""
        self._other: Node | None = None

    def update(self, nodes: Sequence[Node], everyone: Collection[Node]) -> None:
        """Each gets its weight's share."""
        for node in nodes:
            node.share = node.address.weight
        self.spread(nodes)

    def spread(self, nodes: Sequence[Node]) -> None:
        """From now on pick from ``nodes``, each with the share that is written on it."""
        self.nodes = nodes
        self._other = None
        shares = [node.share for node in nodes]
        self._up_to = None if min(shares) == max(shares) else list(accumulate(shares))

    def pick(self, now: float) -> Node:
        """The less costly of two different nodes drawn at random; the first drawn when they are equal."""
        nodes = self.nodes
        n = len(nodes)
        if n == 1:
            return nodes[0]
        draw, up_to = self._draw, self._up_to
        if up_to is None:
            # int(random() * n) is three times as fast as randrange(n), and its bias is below 2**-53.
            i = int(draw() * n)
            j = int(draw() * (n - 1))
            if j >= i:
                j += 1
            a, b = nodes[i], nodes[j]
            if b.meter.cost(now) < a.meter.cost(now):
                a, b = b, a
        else:
            total, last = up_to[-1], n - 1
            a = b = nodes[bisect(up_to, draw() * total, 0, last)]
            for _ in range(TRIES):
                b = nodes[bisect(up_to, draw() * total, 0, last)]
                if b is not a:
                    break
            if b.meter.cost(now) * a.share < a.meter.cost(now) * b.share:
                a, b = b, a
        self._other = b
        if not self._explores:
            return a
        if self._credit < EXPLORE_EVERY:
            self._credit += 1
            return a
        return self._explored(a, b, now) if b.meter.due(now) else a

    def _explored(self, a: Node, b: Node, now: float) -> Node:
        self._credit = 0
        self._other = a
        b.meter.looked()
        return b

    def changed(self, node: Node, delta: int, now: float) -> None:
        """Costs are read when they are compared."""

    def why(self, node: Node, now: float) -> str:
        """Both candidates with their loads."""
        other = self._other
        if other is None or other is node:
            return f"{node.meter.describe(now)}; there was no other"
        more = f"{other} ({other.meter.describe(now)})"
        if node.meter.cost(now) * other.share > other.meter.cost(now) * node.share:
            return f"{node.meter.describe(now)}; to find out how it is now, instead of {more}"
        return f"{node.meter.describe(now)}; not {more}"


class SimplePicker:
    """A chooser that somebody wrote as one method."""

    watches_load = False

    def __init__(self, chooser: SimpleChooser, rng: random.Random) -> None:
        self.nodes: Sequence[Node] = ()
        self._chooser, self._rng = chooser, rng

    def update(self, nodes: Sequence[Node], everyone: Collection[Node]) -> None:
        """It is given them with each pick."""
        self.nodes = nodes

    def pick(self, now: float) -> Node:
        """Whatever it says."""
        return self._chooser.pick(self.nodes, self._rng)

    def changed(self, node: Node, delta: int, now: float) -> None:
        """It reads loads when it likes."""

    def why(self, node: Node, now: float) -> str:
        """It does not say."""
        return f"{self._chooser!r}; {node.meter.describe(now)}"


def metric_of(chooser: Chooser | SimpleChooser) -> LoadMetric:
    """How ``chooser`` measures load; by the requests under way, if it does not say."""
    metric: LoadMetric = getattr(chooser, "metric", None) or LeastLoaded()
    return metric


def picker_of(chooser: Any, env: Env) -> Picker:
    """A picker for one client."""
    if hasattr(chooser, "picker"):
        picker: Picker = chooser.picker(env)
        return picker
    return SimplePicker(chooser, env.rng)


def p2c(metric: LoadMetric | None = None) -> Chooser:
    """The less loaded of two endpoints drawn at random, in proportion to their weights.

    Args:
        metric: How load is measured: `peak_ewma()`, the default, or `least_loaded()`.

    Raises:
        ConfigurationError: ``metric`` is no metric.
    """
    return P2C(as_metric(metric, "p2c"))


def as_metric(metric: LoadMetric | None, who: str) -> LoadMetric | None:
    """Check what a user gave as a metric.

    Raises:
        ConfigurationError: It is none.
    """
    if metric is not None and (isinstance(metric, type) or not hasattr(metric, "meter")):
        raise ConfigurationError(f"{who}({metric!r}): give a load metric, such as peak_ewma() or least_loaded()")
    return metric
