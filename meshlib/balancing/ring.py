"""Which part of the servers each client talks to. Pure arithmetic, the same in every process.

*With a coordinate* (this is client 3 of 10): servers lie on a ring in the order of a hash of their addresses, each with
an arc as long as its weight. Client i of N owns a window that begins i/N further than that of client 0; its length is a
multiple of 1/N, so that every point of the ring is in equally many windows. A server's share of a client's traffic is
the part of its arc that lies in the window, and so every server gets the same from all clients together (Finagle,
WeightedAperture.scala). Where client 0 begins is free, and chosen so that one client more or less moves each window by
half of 1/N at most, half of that on average; from a fixed point it would be twice as much.

*Without one*: each client ranks the servers by a hash of the address and a seed of its own, and uses the first of them
(rendezvous hashing, as gRPC A68). Servers that come and go move none of the others. Load is even on average only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from itertools import accumulate
from math import ceil, log
from typing import Final

__all__ = ["point", "rank", "windows"]

SLIVER: Final = 1e-9
"""Rounding may leave a window this much too long, which must not make it one unit or one server longer."""
SLACK: Final = 0.95
"""A window may be this much shorter than asked for. With as many clients as servers it fits exactly; one client more,
and without slack every window would be a server longer."""


def point(address: object, seed: int = 0) -> float:
    """Where an address lies, from 0 to below 1: the same in every process, unlike `hash`."""
    digest = blake2b(str(address).encode(), digest_size=8, key=seed.to_bytes(8, "big")).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def rank(address: object, weight: float, seed: int) -> float:
    """The place of an address in the order of the client with that seed; least first.

    An exponential of rate ``weight``: the chance to be before another is in proportion to weight.
    """
    return -log(1.0 - point(address, seed)) / weight


def windows(weights: Sequence[float], instance: int, total: int, least: int) -> tuple[int, list[float]]:
    """The part of each server's arc that is in the window of one client.

    Args:
        weights: Of the servers, in the order of the ring.
        instance: Which client, from 0.
        total: Of how many.
        least: Servers that a window should hold at least, if all weigh the same.

    Returns:
        The index of the first server, and the lengths of the parts from there, clockwise. The whole ring has length 1.
    """
    n = len(weights)
    ends = list(accumulate(weights))
    whole = ends[-1]
    units = min(total, max(1, ceil(min(least, n) / n * total * (SLACK if n > least else 1.0) - SLIVER)))
    begin, left = (instance / total + _first(total)) % 1.0, units / total
    index = next((i for i in range(n) if ends[i] / whole > begin + SLIVER), 0)
    first, at = index, begin
    parts: list[float] = []
    for _ in range(n):
        if left <= SLIVER:
            break
        arc_left = ends[index] / whole - at
        parts.append(min(arc_left, left))
        left -= parts[-1]
        at = 0.0 if index == n - 1 else ends[index] / whole
        index = (index + 1) % n
    if left > SLIVER:  # all the way round: the rest is the part of the first arc that lies before the window
        parts[0] += left
    return first, parts


@cache
def _first(total: int) -> float:
    """Where client 0 begins. From one total to the next it moves half as far as the last client does."""
    return sum(0.5 / n for n in range(1, total + 1)) % 1.0
