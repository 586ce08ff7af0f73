"""How one node is chosen among the ready ones. Pure: nodes and a generator in, a node out; no pick looks at all nodes.

Two random nodes, the less loaded of the two: the power of two choices (Mitzenmacher, 2001; Finagle, p2c/P2CPick.scala).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from .node import Node

__all__ = ["P2C", "Chooser"]


class Chooser(Protocol):
    """A way to choose."""

    def pick(self, nodes: Sequence[Node], rng: random.Random) -> Node:
        """One of ``nodes``, of which there is at least one."""
        ...


class P2C:
    """The power of two choices, over the number of requests under way, in proportion to weight."""

    def pick(self, nodes: Sequence[Node], rng: random.Random) -> Node:
        """The less loaded of two different nodes drawn at random; the first drawn when they are equal."""
        n = len(nodes)
        if n == 1:
            return nodes[0]
        # int(random() * n) is three times as fast as randrange(n), and its bias is below 2**-53.
        draw = rng.random
        i = int(draw() * n)
        j = int(draw() * (n - 1))
        if j >= i:
            j += 1
        a, b = nodes[i], nodes[j]
        if a.address.weight == b.address.weight:
            return a if a.load <= b.load else b
        return a if (a.load + 1) * b.address.weight <= (b.load + 1) * a.address.weight else b

    def __repr__(self) -> str:
        return "p2c(least loaded)"
