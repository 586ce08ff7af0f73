"""Which nodes may be used now, and which of them a request goes to. Pure: told of nodes and times, it answers.

* Of all nodes the open ones are used. When they are fewer than the panic threshold, all that can serve are: the few
  would break under the load of the many, and so many cannot all be ill (Envoy: panic threshold, 50 %).
* With a zone, part of the traffic stays in it (`zone.py`), and a picker of its own chooses for each part.
* New and revived nodes warm up: a pick of one is accepted with a probability that rises to 1 (Envoy: slow start). A
  factor on the cost, as Envoy has, would give an idle client's warm nodes everything until the window is nearly over.

A change of one node's health is O(1). What follows from it is worked out at the next pick, which is O(n), so in a large
cluster not for each change: until then picks of nodes that are not open any more are drawn again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from ..core.env import Env
from ..core.service import Status
from .choose import Picker, picker_of
from .node import Node
from .zone import local_share

__all__ = ["Routing"]

COLDEST: Final = 0.1
"""The least share of its traffic that a node gets while it warms up (Envoy: min_weight_percent 10)."""
AT_ONCE: Final = 100
"""Up to so many nodes, each change is worked out at once."""
PER_NODE: Final = 1e-5
"""Seconds for each node, from one time to the next: some 5 % of one core at worst, 0.1 s for 10,000 nodes."""
REDRAWS: Final = 4
OPEN: Final = Status.OPEN


class Routing:
    """The nodes of one name as one client sees them.

    Args:
        env: The client's.
        chooser: How to choose among the nodes that may be used.
        panic: The share of nodes that must be open, or all that can serve are used; 0 for never.
        slow_start: Seconds in which new and revived nodes warm up; 0 for none.
        zone: Where this client is; empty for anywhere.

    Attributes:
        stale: Some node has changed since this was last worked out.
        panicking: Nodes that are not open are used as well.
    """

    def __init__(self, env: Env, chooser: object, panic: float, slow_start: float, zone: str) -> None:
        self._rng, self._panic, self._window, self._zone = env.rng, panic, slow_start, zone
        self._picker = picker_of(chooser, env)
        self._beyond = picker_of(chooser, env.evolve(metrics=env.metrics.scope("beyond"))) if zone else None
        self._local: float | None = None
        self._warm_until = float("-inf")
        self._at = float("-inf")
        self.stale = True
        self.panicking = False
        self.pick = self._picker.pick
        self.watches_load = self._picker.watches_load

    @property
    def pickers(self) -> tuple[Picker, ...]:
        """The picker, or the zone's own and the one for the rest."""
        return (self._picker,) if self._local is None or self._beyond is None else (self._picker, self._beyond)

    @property
    def nodes(self) -> Sequence[Node]:
        """Those that are picked from now."""
        return [node for picker in self.pickers for node in picker.nodes]

    def due(self, count: int, now: float) -> bool:
        """Is it time to work out what has changed?"""
        return count <= AT_ONCE or now - self._at >= count * PER_NODE or not self._picker.nodes

    def refresh(self, everyone: Collection[Node], now: float) -> None:
        """Work out which nodes may be used, at least one of which serves."""
        self.stale, self._at = False, now
        usable = [node for node in everyone if node.health.status is OPEN]
        few = len(usable) < self._panic * len(everyone) or not usable
        serving = [node for node in everyone if node.health.serves] if few else usable
        self.panicking = len(serving) > len(usable)
        usable = serving
        self._local = local_share(self._zone, usable, everyone) if self._zone else None
        if self._local is None or self._beyond is None:
            self._picker.update(usable, everyone)
            pick = self._picker.pick
        else:
            for picker, inside in (self._picker, True), (self._beyond, False):
                mine = [node for node in everyone if (node.zone == self._zone) is inside]
                picker.update([node for node in usable if (node.zone == self._zone) is inside], mine)
            pick = self._in_zone
        self._warm_until = max((node.warm_from for node in usable), default=float("-inf")) + self._window
        self.pick = self._warming if now < self._warm_until else pick
        self._inner = pick

    def _in_zone(self, now: float) -> Node:
        beyond = self._beyond
        if beyond is None or self._local is None or self._rng.random() < self._local:
            return self._picker.pick(now)
        return beyond.pick(now)

    def _warming(self, now: float) -> Node:
        if now >= self._warm_until:
            self.pick = self._inner
        node = self._inner(now)
        age = now - node.warm_from
        if age < self._window and self._rng.random() >= max(COLDEST, age / self._window):
            return self._inner(now)
        return node

    def open_one(self, node: Node, everyone: Collection[Node], now: float) -> Node:
        """``node`` was picked, and is not open. If nobody knew, draw again; else it is as good as any."""
        if not self.stale:
            return node
        for _ in range(REDRAWS):
            other = self.pick(now)
            if other.health.status is OPEN:
                return other
        self.refresh(everyone, now)
        return self.pick(now)

    def members_changed(self) -> None:
        """Nodes have come or gone, or their weights are others: the next pick must know."""
        self.stale, self._at = True, float("-inf")

    def fresh_one(self, node: Node, tried: Collection[object], now: float) -> Node:
        """One that is not among ``tried``, as ``node`` is, if there is one."""
        for _ in range(REDRAWS):
            other = self.pick(now)
            if other.address not in tried:
                return other
        # Few can have been tried, so a walk from anywhere soon meets one that was not.
        for picker in self.pickers:
            nodes = picker.nodes
            start = int(self._rng.random() * len(nodes))
            for k in range(min(len(nodes), len(tried) + 1)):
                other = nodes[(start + k) % len(nodes)]
                if other.address not in tried and other.health.status is OPEN:
                    return other
        return node

    def changed(self, node: Node, delta: int, now: float) -> None:
        """Tell the picker that the load of ``node`` has changed."""
        beyond = self._beyond
        if beyond is not None and self._local is not None and node.zone != self._zone:
            beyond.changed(node, delta, now)
        else:
            self._picker.changed(node, delta, now)

    def why(self, node: Node, now: float) -> str:
        """Why ``node``, which has just been picked."""
        beyond = self._beyond
        if beyond is None or self._local is None:
            return self._picker.why(node, now)
        if node.zone == self._zone:
            return f"of zone {self._zone!r}, which gets {self._local:.0%}; {self._picker.why(node, now)}"
        return f"outside of zone {self._zone!r}, which gets {self._local:.0%}; {beyond.why(node, now)}"
