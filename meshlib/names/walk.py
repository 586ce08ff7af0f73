"""Which leaf of a bound tree a call goes to, as its targets are at this moment.

- Of alternatives, the first is taken of which the source does not say "no such name". If it says so later, the next one
  is taken from then on; if it takes that back, the first again. An alternative without endpoints, or whose source is
  broken, exists, so there is no fallback from it.
- Of a union, one that has endpoints, drawn by weight. (Finagle lets branches without endpoints keep their share, and
  fails it, unless told otherwise.) One that is not known yet is left out, unless all are as new as it is, and for
  `GRACE` seconds at most: or the first calls of a new client would all go to whichever branch resolved first, a canary
  perhaps.

Pure but for the clusters that it opens, when a walk first comes to their targets. Source: Finagle,
naming/NameTreeFactory.scala.
"""

from __future__ import annotations

import random
from typing import Any, Final

from ..core.clock import Clock
from .addr import Addr, Bound, Failed, Neg, Pending
from .clusters import Clusters, Entry
from .delegation import Endless
from .dtab import Residual
from .target import Target
from .tree import EMPTY, FAIL, Alt, Leaf, Tree, Union, map_leaves

__all__ = ["GRACE", "Walk", "walkable"]

GRACE: Final = 1.0
"""Seconds that a branch of a new union has to become known before calls go to the others only."""


class _Fail(Neg):
    """No such name, and no fallback."""


_PENDING, _NEG, _FAIL, _NONE = Pending(), Neg(), _Fail(), Bound(())


class _Slot:
    """A leaf: a target, and its cluster as it was last found."""

    __slots__ = ("entry", "target")

    def __init__(self, target: Target) -> None:
        self.target = target
        self.entry: Entry | None = None


def walkable(tree: Tree) -> Tree:
    """A tree whose leaves are targets, made ready for walks."""

    def slot(value: Any) -> Tree:
        if isinstance(value, Endless):
            return Leaf(value)
        return Leaf(_Slot(value.target if isinstance(value, Residual) else value))

    return map_leaves(tree, slot)


class Walk:
    """Walks trees.

    Args:
        clusters: Where clusters are.
        rng: Draws among the branches of unions.
        clock: Tells how new a cluster is.
    """

    def __init__(self, clusters: Clusters, rng: random.Random, clock: Clock) -> None:
        self._clusters, self._rng, self._clock = clusters, rng, clock

    def choose(self, tree: Tree) -> Entry | Addr:
        """The cluster to call, or in its place why there is none: what the name comes to.

        Raises:
            ConfigurationError: A target makes no sense.
            ServiceClosed: The client is closed.
        """
        kind = type(tree)
        if kind is Leaf:
            slot = tree.value  # type: ignore[union-attr]
            if type(slot) is not _Slot:
                return Failed(slot.problem)
            entry = slot.entry
            if entry is None or entry.closed:
                entry = slot.entry = self._clusters.entry(slot.target)
            entry.used = self._clusters.tick
            addr = entry.watch.addr.value
            return addr if isinstance(addr, Neg | Pending) else entry
        if kind is Union:
            return self._draw(tree)  # type: ignore[arg-type]
        if kind is Alt:
            for each in tree.trees:  # type: ignore[union-attr]
                found = self.choose(each)
                if not isinstance(found, Neg) or found is _FAIL:
                    return found
            return _NEG
        return _NONE if tree == EMPTY else _FAIL if tree == FAIL else _NEG

    def _draw(self, union: Union) -> Entry | Addr:
        usable: list[tuple[float, Entry]] = []
        other: Entry | Addr = _NEG
        total = 0.0
        for branch in union.weighted:
            if not branch.weight > 0:
                continue
            found = self.choose(branch.tree)
            if type(found) is Entry and found.watch.endpoints:
                total += branch.weight
                usable.append((total, found))
            elif _hope(found) > _hope(other):
                other = found
        if not usable:
            return other
        if isinstance(other, Pending) and self._all_new(usable):
            return other
        if len(usable) > 1:
            drawn = self._rng.random() * total
            for until, entry in usable:
                if drawn < until:
                    return entry
        return usable[-1][1]

    def _all_new(self, usable: list[tuple[float, Entry]]) -> bool:
        now = self._clock.now()
        return all(now - entry.opened < GRACE for _, entry in usable)


def _hope(found: Entry | Addr) -> int:
    """Where no branch of a union has endpoints: the one to wait for, or whose reason is worth most."""
    if isinstance(found, Pending):
        return 4
    if isinstance(found, Entry):
        return 3
    return 2 if isinstance(found, Failed) else 1 if isinstance(found, Bound) else 0
