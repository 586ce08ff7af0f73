"""Prefer the endpoints of one's own zone, as far as they can carry it. Pure. Envoy: zone aware routing.

If every caller kept to its zone, a zone with few endpoints and many callers would be overloaded. Callers are taken to
be spread evenly over the zones, so that each zone's fair share of the endpoints is one in as many as there are zones.
Where the ready ones here have less than that, the rest of the traffic goes to the other zones: with a third of the
traffic and a quarter of the capacity, three quarters stay.

When fewer than half of the zone's own endpoints are ready, it is in trouble, and zones are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

from .node import Node

__all__ = ["local_share"]

TOO_FEW = 0.5
"""The share of a zone's endpoints that must be ready (as Envoy's panic threshold)."""


def local_share(zone: str, ready: Iterable[Node], everyone: Iterable[Node]) -> float | None:
    """What part of the traffic is to stay in ``zone``; ``None`` when zones are not to be looked at.

    Args:
        zone: Where the caller is.
        ready: The nodes that may be used.
        everyone: All nodes of the name.
    """
    zones: dict[str, float] = {}
    for node in everyone:
        where = node.zone
        zones[where] = zones.get(where, 0.0) + node.address.weight
    known = len(zones) - ("" in zones)
    if zone not in zones or known < 2:
        return None
    here = total = 0.0
    for node in ready:
        total += node.address.weight
        if node.zone == zone:
            here += node.address.weight
    if here < zones[zone] * TOO_FEW or here >= total:
        return None
    return min(1.0, here / total * known)
