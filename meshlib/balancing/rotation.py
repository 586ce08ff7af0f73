"""Choosers that go by turns: round robin, and the least loaded of all nodes.

Both keep a virtual time for each node, which moves on by one over its share each time it is picked; the node that is
furthest behind is next (earliest deadline first, as in Envoy and in start-time fair queueing), so that the turns of a
heavy node are spread over the round. A node that was away, or too loaded to be picked, does not catch up on what it
missed.

`RoundRobin` goes by that alone. `Heap` goes by load, and by turns where loads are equal; Finagle's heap
(HeapLeastLoaded.scala) ignores weights, looks through all nodes that are down at each pick, and swaps idle nodes at
random so that the first in the heap does not get everything.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

from ..core.env import Env
from .choose import Chooser, Picker
from .load import LeastLoaded, LoadMetric
from .node import Node

__all__ = ["Heap", "RoundRobin", "heap", "round_robin"]

SPARE: Final = 64
"""A heap is made anew when it holds this many entries more than twice the nodes, of which most are then outdated."""

_Entry = tuple[float, float, int, Node]
"""A node in a heap: its load for its share, its turn, its place in the list of nodes."""


class RoundRobin:
    """In turn."""

    metric: LoadMetric = LeastLoaded()

    def picker(self, env: Env) -> Picker:
        """Each client begins somewhere else."""
        return Turns(env.rng)

    def __repr__(self) -> str:
        return "round_robin()"


class Heap:
    """The least loaded of all."""

    metric: LoadMetric = LeastLoaded()

    def picker(self, env: Env) -> Picker:
        """A heap of one client's nodes."""
        return LeastOfAll(env.rng)

    def __repr__(self) -> str:
        return "heap()"


class _ByTurns:
    """What both keep: the virtual time of each node."""

    def __init__(self, rng: random.Random) -> None:
        self.nodes: Sequence[Node] = ()
        self._rng = rng
        self._now = 0.0
        self._times: dict[Node, float] = {}

    def _take(self, nodes: Sequence[Node]) -> None:
        """Those who stay keep their turn; those who come take any turn of the round that is under way."""
        self.nodes = nodes
        old, now, draw = self._times, self._now, self._rng.random
        self._times = {node: max(now, old[node]) if node in old else now + draw() / node.share for node in nodes}

    def _moved_on(self, node: Node) -> float:
        """Its turn was now: when it is next."""
        self._now = max(self._now, self._times[node])
        self._times[node] = then = self._now + 1.0 / node.share
        return then


class Turns(_ByTurns):
    """Round robin. Where all weigh the same the order never changes, so a heap is not needed to know it."""

    watches_load = False

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._heap: list[tuple[float, int, Node]] = []
        self._circle: list[Node] = []
        self._at = 0

    def update(self, nodes: Sequence[Node], everyone: Collection[Node]) -> None:
        """Each gets its weight's share of the turns."""
        for k, node in enumerate(self._circle[self._at :] + self._circle[: self._at]):
            self._times[node] = self._now + k / len(self._circle) / node.share
        for node in nodes:
            node.share = node.address.weight
        self._take(nodes)
        even = len({node.share for node in nodes}) == 1
        self._circle, self._at = sorted(nodes, key=self._times.__getitem__) if even else [], 0
        self._heap = [] if even else [(self._times[node], i, node) for i, node in enumerate(nodes)]
        heapify(self._heap)

    def pick(self, now: float) -> Node:
        """Whose turn it is."""
        circle = self._circle
        if circle:
            node = circle[self._at]
            self._at = self._at + 1 if self._at + 1 < len(circle) else 0
            return node
        _, i, node = self._heap[0]
        heapreplace(self._heap, (self._moved_on(node), i, node))
        return node

    def changed(self, node: Node, delta: int, now: float) -> None:
        """Turns do not depend on load."""

    def why(self, node: Node, now: float) -> str:
        """Load has no part in it."""
        return f"its turn; {node.meter.describe(now)}"


class LeastOfAll(_ByTurns):
    """The node with the fewest requests under way for its share; in turn where these are equal."""

    watches_load = True

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._heap: list[_Entry] = []
        self._entries: dict[Node, _Entry] = {}

    def update(self, nodes: Sequence[Node], everyone: Collection[Node]) -> None:
        """Each gets its weight's share."""
        for node in nodes:
            node.share = node.address.weight
        self._take(nodes)
        self._entries = {
            node: (node.meter.pending / node.share, self._times[node], i, node) for i, node in enumerate(nodes)
        }
        self._rebuild()

    def _rebuild(self) -> None:
        self._heap = list(self._entries.values())
        heapify(self._heap)

    def pick(self, now: float) -> Node:
        """The top of the heap, once what it says is true."""
        heap, entries = self._heap, self._entries
        while True:
            entry = heap[0]
            load, _, i, node = entry
            if entries[node] is not entry:
                heappop(heap)
                continue
            more = node.meter.pending / node.share
            new = (more, entry[1], i, node) if more > load else (load, self._moved_on(node), i, node)
            entries[node] = new
            heapreplace(heap, new)
            if more <= load:
                return node

    def changed(self, node: Node, delta: int, now: float) -> None:
        """An entry may claim too little, since that is seen when it comes to the top. Too much must be mended now."""
        entry = self._entries.get(node)
        if entry is None:
            return  # it has left, or may not be used now
        less = node.meter.pending / node.share
        if less < entry[0]:
            self._entries[node] = new = less, entry[1], entry[2], node
            heappush(self._heap, new)
            if len(self._heap) > 2 * len(self.nodes) + SPARE:
                self._rebuild()

    def why(self, node: Node, now: float) -> str:
        """How many it is the least of."""
        return f"the least of {len(self.nodes)} for its weight; {node.meter.describe(now)}"


def round_robin() -> Chooser:
    """Each endpoint in turn, in proportion to weights, whatever its load. For comparison, and for identical work."""
    return RoundRobin()


def heap() -> Chooser:
    """The endpoint with the fewest requests under way for its weight, of all; in turn where these are equal.

    For one client with few endpoints; a pick costs more the more endpoints there are, as the logarithm. Whoever shares
    the endpoints with many other clients knows too little of their load for the best of all to mean much.
    """
    return Heap()
