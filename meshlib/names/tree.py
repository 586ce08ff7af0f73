"""Name trees: what a name may stand for, with fallbacks and shares. Finagle: NameTree.scala.

========  ===========  ================================================================
written   here         meaning
========  ===========  ================================================================
``a | b``  `Alt`       the first that exists; ``!`` ends the search
``2 * a & b``  `Union`  all that exist, by weight
``/x``    `Leaf`       a path or a target
``~``     `NEG`        no such name
``!``     `FAIL`       no such name, and no fallback
``$``     `EMPTY`      a name without endpoints; there is no fallback from it either
========  ===========  ================================================================

Pure. A tree prints as it parses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from ..core.errors import DtabError

__all__ = ["EMPTY", "FAIL", "NEG", "Alt", "Constant", "Leaf", "Tree", "Union", "Weighted", "evaluate", "map_leaves",
           "simplified"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Constant:
    """A tree that is what it is: `NEG`, `FAIL` or `EMPTY`."""

    symbol: str

    def __str__(self) -> str:
        return self.symbol


NEG: Final = Constant("~")
FAIL: Final = Constant("!")
EMPTY: Final = Constant("$")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One name: a `Path`, or a target."""

    value: Any

    def __str__(self) -> str:
        # A target prints without its password, which must be there when the tree is read again.
        return str(getattr(self.value, "text", self.value))


@dataclass(frozen=True, slots=True)
class Alt:
    """Alternatives, the most wanted first."""

    trees: tuple[Tree, ...]

    def __str__(self) -> str:
        # Of none or one there is no text but that of what it comes to, and an Alt in an Alt needs parentheses.
        if len(self.trees) < 2:
            return str(simplified(self))
        return " | ".join(f"({tree})" if isinstance(tree, Alt) else str(tree) for tree in self.trees)


@dataclass(frozen=True, slots=True)
class Weighted:
    """A branch of a union, and its weight: its share relative to those of the others."""

    weight: float
    tree: Tree

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise DtabError(f"a branch of weight {self.weight!r}: expected a number that is not below 0")

    def __str__(self) -> str:
        inner = f"({self.tree})" if isinstance(self.tree, Alt | Union) else str(self.tree)
        return inner if self.weight == 1 else f"{_number(self.weight)} * {inner}"


@dataclass(frozen=True, slots=True)
class Union:
    """Branches that share the traffic by their weights."""

    weighted: tuple[Weighted, ...]

    def __str__(self) -> str:
        if not self.weighted:
            return str(NEG)
        if len(self.weighted) == 1:
            # Alone its weight means nothing, but it was written.
            only = self.weighted[0]
            return str(only) if only.weight != 1 or not isinstance(only.tree, Alt | Union) else str(only.tree)
        return " & ".join(map(str, self.weighted))


Tree: TypeAlias = Alt | Union | Leaf | Constant


def _number(weight: float) -> str:
    """A weight as the grammar has numbers, digits and a point without exponent, that reads as the same weight."""
    digits, _, exponent = repr(float(weight)).partition("e")
    if not exponent:
        return digits.removesuffix(".0")
    whole, _, fraction = digits.partition(".")
    shift = int(exponent)
    if shift < 0:
        return "0." + "0" * (-shift - 1) + whole + fraction
    return whole + fraction.ljust(shift, "0")  # repr uses an exponent from 1e16 on, and has 16 places at most


def simplified(tree: Tree) -> Tree:
    """The same tree with fewer nodes: alternatives and unions of none or one are what is in them, or `NEG`."""
    if isinstance(tree, Alt):
        trees: list[Tree] = []
        for each in map(simplified, tree.trees):
            if each is NEG or each == NEG:
                continue
            trees.append(each)
            if each in (FAIL, EMPTY):
                break
        return NEG if not trees else trees[0] if len(trees) == 1 else Alt(tuple(trees))
    if isinstance(tree, Union):
        parts = [Weighted(each.weight, simplified(each.tree)) for each in tree.weighted]
        parts = [each for each in parts if each.tree not in (NEG, FAIL)]
        return NEG if not parts else parts[0].tree if len(parts) == 1 else Union(tuple(parts))
    return tree


def map_leaves(tree: Tree, change: Callable[[Any], Tree]) -> Tree:
    """The same tree with what ``change`` makes of each leaf's value in its place."""
    if isinstance(tree, Leaf):
        return change(tree.value)
    if isinstance(tree, Alt):
        return Alt(tuple(map_leaves(each, change) for each in tree.trees))
    if isinstance(tree, Union):
        return Union(tuple(Weighted(each.weight, map_leaves(each.tree, change)) for each in tree.weighted))
    return tree


def evaluate(tree: Tree) -> frozenset[Any] | None:
    """The values that the tree comes to: ``None`` if there is no such name, none if it is empty. Finagle: eval."""
    found = _evaluated(tree)
    if found in (NEG, FAIL):
        return None
    values: set[Any] = set()
    _collect(found, values)
    return frozenset(values)


def _evaluated(tree: Tree) -> Tree:
    if isinstance(tree, Alt):
        for each in tree.trees:
            found = _evaluated(each)
            if found != NEG:
                return found
        return NEG
    if isinstance(tree, Union):
        parts = [Weighted(each.weight, _evaluated(each.tree)) for each in tree.weighted]
        parts = [each for each in parts if each.tree not in (NEG, FAIL)]
        return Union(tuple(parts)) if parts else NEG
    return tree


def _collect(tree: Tree, values: set[Any]) -> None:
    if isinstance(tree, Leaf):
        values.add(tree.value)
    elif isinstance(tree, Union):
        for each in tree.weighted:
            _collect(each.tree, values)
