"""How one node is chosen among the ready ones. Pure: nodes and a generator in, a node out; no pick looks at all nodes.

Two random nodes, the less loaded of the two: the power of two choices (Mitzenmacher, 2001; Finagle, p2c/P2CPick.scala).
Where weights differ, nodes are drawn in proportion to them, and loads are compared per weight, so that an idle client
keeps the proportions as well as a busy one (Finagle, aperture/WeightedP2CPick.scala).
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from .node import Node

__all__ = ["P2C", "Chooser"]

TRIES = 5
"""How often a second node is drawn that is to differ from the first; one may have nearly all the weight."""


class Chooser(Protocol):
    """A way to choose."""

    def pick(self, nodes: Sequence[Node], rng: random.Random) -> Node:
        """One of ``nodes``, of which there is at least one. The balancer gives a new sequence when they change."""
        ...


class P2C:
    """The power of two choices, over the number of requests under way, in proportion to weight."""

    __slots__ = ("_nodes", "_up_to")

    def __init__(self) -> None:
        self._nodes: Sequence[Node] = ()
        self._up_to: list[float] | None = None
        """The sum of the weights up to each node; ``None`` when all are equal."""

    def pick(self, nodes: Sequence[Node], rng: random.Random) -> Node:
        """The less loaded of two different nodes drawn at random; the first drawn when they are equal."""
        n = len(nodes)
        if n == 1:
            return nodes[0]
        if nodes is not self._nodes:
            self._weigh(nodes)
        if self._up_to is not None:
            return self._weighted(nodes, self._up_to, rng)
        # int(random() * n) is three times as fast as randrange(n), and its bias is below 2**-53.
        draw = rng.random
        i = int(draw() * n)
        j = int(draw() * (n - 1))
        if j >= i:
            j += 1
        a, b = nodes[i], nodes[j]
        return a if a.load <= b.load else b

    def _weigh(self, nodes: Sequence[Node]) -> None:
        weights = [node.address.weight for node in nodes]
        self._nodes = nodes
        self._up_to = None if min(weights) == max(weights) else list(accumulate(weights))

    def _weighted(self, nodes: Sequence[Node], up_to: list[float], rng: random.Random) -> Node:
        draw, total, last = rng.random, up_to[-1], len(nodes) - 1
        a = b = nodes[bisect(up_to, draw() * total, 0, last)]
        for _ in range(TRIES):
            b = nodes[bisect(up_to, draw() * total, 0, last)]
            if b is not a:
                break
        return a if a.load * b.address.weight <= b.load * a.address.weight else b

    def __repr__(self) -> str:
        return "p2c(least loaded)"
