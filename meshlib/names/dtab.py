"""Dtabs: delegation tables, which rewrite logical names into others, and in the end into targets.

::

    /s => zk://zk1:2181,zk2:2181/services ;
    /s/users => 9 * /s/users-v1 & 1 * /s/users-v2

An entry applies to every path that begins with its prefix; the rest of the path is appended to each name of its tree.
The last entry that applies is wanted most, and those before it are its fallbacks. So adding an entry at the end, for
one call or for one process, overrides what is there and keeps it as the fallback. Pure. Source: finagle-core,
Dtab.scala.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ..core.errors import DtabError
from .grammar import parse_entries
from .path import Path, Prefix
from .target import Target, redacted
from .tree import NEG, Alt, Leaf, Tree, map_leaves

__all__ = ["EMPTY_DTAB", "Dentry", "Dtab", "Residual", "extended"]


@dataclass(frozen=True, slots=True)
class Residual:
    """A target, and the part of the path that it has no use for: of ``/s/users/admin``, perhaps ``/admin``."""

    target: Target
    path: Path

    def __str__(self) -> str:
        return f"{self.target}{self.path}"


@dataclass(frozen=True, slots=True)
class Dentry:
    """One entry: what a prefix stands for."""

    prefix: Prefix
    tree: Tree

    def __str__(self) -> str:
        return f"{self.prefix} => {self.tree}"


class Dtab:
    """Entries in order. Immutable; ``a + b`` has those of ``b`` after, and so above, those of ``a``.

    Args:
        text: The entries, with ``;`` between them.

    Raises:
        DtabError: It cannot be read; says in which line and column.
    """

    __slots__ = ("_hash", "entries")

    entries: tuple[Dentry, ...]

    def __init__(self, text: str = "") -> None:
        self.entries = tuple(Dentry(prefix, tree) for prefix, tree in parse_entries(text))
        self._hash = hash(self.entries)

    @classmethod
    def of(cls, entries: Iterable[Dentry]) -> Dtab:
        """Of entries that were read before."""
        made = cls.__new__(cls)
        made.entries = tuple(entries)
        made._hash = hash(made.entries)
        return made

    @staticmethod
    def of_pairs(pairs: tuple[tuple[str, str], ...]) -> tuple[Dtab, int]:
        """What travels with a request, pairs of prefix and tree, and how many cannot be read and are left out.

        Cheap when it is the same as lately, as it mostly is.
        """
        if not pairs:
            return EMPTY_DTAB, 0
        size = sum(len(prefix) + len(tree) for prefix, tree in pairs)
        return _remembered(pairs) if size <= REMEMBERED else _of_pairs(pairs)

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """As it travels with a request."""
        return tuple((str(entry.prefix), str(entry.tree)) for entry in self.entries)

    def matches(self, path: Path) -> list[tuple[Dentry, Tree]]:
        """The entries that apply to ``path``, the last one first, and what each makes of it."""
        return [
            (entry, _appended(entry.tree, path.drop(len(entry.prefix))))
            for entry in reversed(self.entries)
            if path.startswith(entry.prefix)
        ]

    def lookup(self, path: Path) -> Tree:
        """What ``path`` stands for, one step on: `NEG` if no entry applies, else what those say, the last one first."""
        found = tuple(tree for _, tree in self.matches(path))
        return NEG if not found else found[0] if len(found) == 1 else Alt(found)

    def __add__(self, other: Dtab) -> Dtab:
        if not isinstance(other, Dtab):
            return NotImplemented
        return Dtab.of(self.entries + other.entries) if other.entries else self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dtab) and self.entries == other.entries

    def __hash__(self) -> int:
        return self._hash

    def __iter__(self) -> Iterator[Dentry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        return " ; ".join(map(str, self.entries))

    def pretty(self) -> str:
        """One entry a line; reads back as the same Dtab."""
        return "".join(f"{entry} ;\n" for entry in self.entries)

    def __repr__(self) -> str:
        # Whoever prints it to a log wants no passwords there; `str` has them, for it is what travels.
        return f"Dtab({redacted(str(self))!r})"


EMPTY_DTAB: Final = Dtab()

REMEMBERED: Final = 4096
"""Characters of a local Dtab that is remembered once read. Callers choose it, and what is read is far larger."""


def _of_pairs(pairs: tuple[tuple[str, str], ...]) -> tuple[Dtab, int]:
    entries: list[Dentry] = []
    malformed = 0
    for prefix, tree in pairs:
        try:
            read = parse_entries(f"{prefix} => {tree}")
            if len(read) != 1 or ";" in prefix or "=>" in prefix:
                raise DtabError(f"{prefix!r} is no prefix")
            entries.append(Dentry(*read[0]))
        except DtabError:
            malformed += 1
    return Dtab.of(entries), malformed


_remembered = functools.lru_cache(maxsize=128)(_of_pairs)


def _appended(tree: Tree, residual: Path) -> Tree:
    if not residual:
        return tree

    def append(value: Any) -> Tree:
        if isinstance(value, Path):
            return Leaf(value + residual)
        if isinstance(value, Residual):
            return Leaf(Residual(value.target, value.path + residual))
        if value.scheme == "file" and not _DOTS.isdisjoint(residual.labels):
            return (
                NEG  # there is no such name in this directory, and what is elsewhere is none of the caller's business
            )
        target, left = extended(value, residual)
        return Leaf(Residual(target, left) if left else target)

    return map_leaves(tree, append)


_DOTS: Final = frozenset((b".", b".."))
PARTS_OF_A_SERVICE: Final = 2
"""``k8s://namespace/service:port``."""


def extended(target: Target, residual: Path) -> tuple[Target, Path]:
    """The target with ``residual`` appended to its path, and what it has no place for.

    ``host:port``, ``unix://``, ``dns://`` and ``srv://`` have no path. ``k8s://`` has two parts. Everything else is a
    path, up to the ``?`` of its settings, or the ``!`` before the endpoint in ``zk://``.
    """
    scheme, rest = target.scheme, target.rest
    if scheme in ("static", "unix", "dns", "srv"):
        return target, residual
    left = Path()
    ends = {"file": "", "zk": "!?"}.get(scheme, "?")
    end = min((at for at in map(rest.find, ends) if at >= 0), default=len(rest))
    if scheme == "k8s":
        has = len([part for part in rest[:end].split("/") if part])
        room = max(0, PARTS_OF_A_SERVICE - has)
        residual, left = Path(residual.labels[:room]), residual.drop(room)
        if not residual:
            return target, left
    path = rest[:end].rstrip("/") + str(residual)
    rest = path.removeprefix("/") + rest[end:] if scheme == "k8s" else path + rest[end:]
    return Target(scheme, rest, f"{scheme}://{rest}"), left
