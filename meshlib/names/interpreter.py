"""The interpreter: follows a path through a Dtab, step by step, until only targets are left.

At each step the entries that apply are looked up, and each path that they lead to is followed in the same way. A path
that no entry applies to is a name of the system (``/$/inet/host/port``, …) or no name at all. Finagle's rules exactly,
with its limit of `DEEPEST` steps; a branch that exceeds it is `Endless`, and says which way it went. Depth alone bounds
little where two entries apply at each step, and Dtabs come from the network, so names, nesting and labels are counted
as well. Pure. Source: Finagle, naming/DefaultInterpreter.scala, Namer.scala.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from ..core.errors import ConfigurationError, shown
from .addr import parse_hostport
from .delegation import Delegation, Endless
from .dtab import Dentry, Dtab, Residual, extended
from .path import Path
from .target import Target
from .tree import EMPTY, FAIL, NEG, Alt, Leaf, Tree, Union

__all__ = ["DEEPEST", "follow", "system_name"]

DEEPEST: Final = 100
"""Steps from the path to a target (Finagle: namerMaxDepth)."""
MOST: Final = 1000
"""Names in all: two entries for each prefix double them with each step."""
NESTED: Final = 200
"""Trees within each other, over all steps: Python calls no deeper than it has stack."""
LOOKED: Final = 200_000
"""Entries looked at, over all steps: some 0.3 s, which a Dtab of a thousand entries does not come near."""
LONGEST: Final = 500
"""Labels of a path on the way: an entry that leads below itself makes it longer with each step."""


def follow(dtab: Dtab, path: Path, base: int | None = None) -> Delegation:
    """Follow ``path`` through ``dtab`` to the end. A branch without one, in `DEEPEST` steps, is `Endless`.

    Args:
        dtab: The entries.
        path: The name.
        base: How many of the entries are those of the base, if the delegation is to say; the others are local.
    """
    try:
        return _Follower(dtab, base).path(path, None, 0)
    except _TooMuch as too_much:
        problem = str(too_much)
        return Delegation("path", str(path), children=(Delegation("endless", f"({problem})", target=Endless(problem)),))


class _TooMuch(Exception):
    """All of it is too much, not a branch."""


class _Follower:
    def __init__(self, dtab: Dtab, base: int | None) -> None:
        self._dtab = dtab
        self._base = None if base is None else {id(entry) for entry in dtab.entries[:base]}
        self._chain: list[Path] = []
        self._count = self._nesting = self._looked = 0

    def path(self, path: Path, rule: Dentry | None, depth: int) -> Delegation:
        self._chain.append(path)
        try:
            if depth > DEEPEST:
                return self._endless(rule, f"more than {DEEPEST} steps")
            if len(path) > LONGEST:
                return self._endless(rule, f"a path of more than {LONGEST} labels")
            self._looked += len(self._dtab)
            if self._looked > LOOKED:
                raise _TooMuch(self._told(f"more than {LOOKED} entries looked at"))
            found = self._dtab.matches(path)
            children = [self._expand(tree, entry, depth + 1) for entry, tree in found]
            if not found:
                named = system_name(path)
                if named != NEG:
                    children = [self._expand(named, None, depth + 1)]
            return Delegation("path", str(path), rule, children=tuple(children))
        finally:
            self._chain.pop()

    def _expand(self, tree: Tree, rule: Dentry | None, depth: int) -> Delegation:
        self._count += 1
        self._nesting += 1
        try:
            if self._count > MOST:
                raise _TooMuch(self._told(f"more than {MOST} names"))
            if self._nesting > NESTED:
                return self._endless(rule, f"more than {NESTED} trees within each other")
            node = self._node(tree, rule, depth)
        finally:
            self._nesting -= 1
        if rule is None or self._base is None:
            return node
        return replace(node, rule=rule, origin="base" if id(rule) in self._base else "local")

    def _node(self, tree: Tree, rule: Dentry | None, depth: int) -> Delegation:
        if isinstance(tree, Leaf):
            value: Any = tree.value
            if isinstance(value, Path):
                return self.path(value, rule, depth)
            return Delegation("target", str(value), rule, target=value)
        if isinstance(tree, Alt):
            return Delegation("alt", "", rule, children=tuple([self._expand(each, None, depth) for each in tree.trees]))
        if isinstance(tree, Union):
            branches = [replace(self._expand(each.tree, None, depth), weight=each.weight) for each in tree.weighted]
            return Delegation("union", "", rule, children=tuple(branches))
        return Delegation("constant", str(tree), rule, constant=tree)

    def _endless(self, rule: Dentry | None, problem: str) -> Delegation:
        problem = self._told(problem)
        return Delegation("endless", f"({problem})", rule, target=Endless(problem))

    def _told(self, problem: str) -> str:
        chain = self._chain if len(self._chain) <= 6 else self._chain[:5]
        way = " -> ".join(shown(str(path), 60) for path in chain)
        return f"{problem}: {way}{' -> …' if chain is not self._chain else ''}"


def system_name(path: Path) -> Tree:
    """What Finagle's names below ``/$/`` stand for; `NEG` for those that are none.

    ``/$/inet/host/port`` and ``/$/inet/port`` (this machine), ``/$/nil``, ``/$/fail``, and
    ``/$/com.twitter.serverset/hosts/path``, so that Dtabs written for Finagle mean the same here. (Its other names are
    those of classes.)
    """
    labels = path.labels
    if len(labels) < 2 or labels[0] != b"$":
        return NEG
    kind = labels[1].decode("latin-1")
    words = [label.decode("latin-1") for label in labels[2:]]
    if kind == "nil":
        return EMPTY
    if kind == "fail":
        return FAIL
    try:
        if kind in ("inet", "fixedinet") and words:
            if words[0].isdigit():
                parse_hostport(f"127.0.0.1:{words[0]}")
                return _leaf(f"127.0.0.1:{words[0]}", path.drop(3))
            if len(words) > 1:
                literal = words[0].replace(".", "").isdigit()
                scheme = "" if literal or kind == "fixedinet" else "dns://"
                parse_hostport(f"{words[0]}:{words[1]}")
                return _leaf(f"{scheme}{words[0]}:{words[1]}", path.drop(4))
        if kind == "com.twitter.serverset" and words:
            return Leaf(extended(Target.parse(f"zk://{words[0]}"), path.drop(3))[0])
    except ConfigurationError:
        return NEG
    return NEG


def _leaf(text: str, residual: Path) -> Tree:
    target = Target.parse(text)
    return Leaf(Residual(target, residual) if residual else target)
