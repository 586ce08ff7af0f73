"""The grammar of name trees and Dtabs: Finagle's, with targets as leaves.

::

    dtab     = [ entry { ";" entry } ] [ ";" … ]
    entry    = prefix "=>" tree
    prefix   = "/" [ element { "/" element } ]       element = label | "*"
    tree     = union { "|" union }
    union    = weighted { "&" weighted }
    weighted = [ number "*" ] simple
    simple   = path | target | "(" tree ")" | "~" | "!" | "$"
    target   = scheme "://" …  |  host ":" port { "," host ":" port }

Between these there may be white space, and comments from ``#`` to the end of the line. A target goes on until white
space, ``;``, ``|`` or ``)``: an ``&`` or ``#`` inside belongs to it. Recursive descent, at most `DEEPEST` parentheses
within each other. Source: finagle-core, NameTreeParsers.scala, Dtab.scala.
"""

from __future__ import annotations

import math
import re
from typing import Final, NoReturn

from ..core.errors import ConfigurationError, DtabError, shown
from .path import LABEL, Path, Prefix, read_label
from .static import parse as parse_static
from .target import Target
from .tree import EMPTY, FAIL, NEG, Alt, Leaf, Tree, Union, Weighted

__all__ = ["parse_entries", "parse_tree"]

DEEPEST: Final = 100
LONGEST: Final = 1024 * 1024
"""Characters. Kubernetes and ZooKeeper keep no more than a megabyte in one place either."""
LONGEST_NUMBER: Final = 1100
"""Characters. The smallest number above 0 is written with 1,076 of them at most."""

# What repeats gives nothing back once matched, or a hostile text would take for ever to be refused.
_SPACE = re.compile(r"(?:\s++|#[^\n]*+)*+")
_ELEMENTS = re.compile(rf"/(?:(?:{LABEL}|\*(?![^\s/=#]))(?:/(?:{LABEL}|\*(?![^\s/=#])))*)?")
_PATH = re.compile(rf"/(?:{LABEL}(?:/{LABEL})*)?")
_NUMBER = re.compile(r"[0-9]*+\.[0-9]++|[0-9]++")
_TARGET = re.compile(r"[^\s;|)]+")
_LEAF_ENDS = re.compile(r"[\s;|)&(#]|=>|\Z")
_SECRET = re.compile(r"(?<=//)[^/@\s]+(?=@)")
_SYMBOLS: Final = {"~": NEG, "!": FAIL, "$": EMPTY}


def parse_tree(text: str) -> Tree:
    """Read a name tree.

    Raises:
        DtabError: It is none; says where.
    """
    reader = _Reader(text)
    tree = reader.tree()
    if reader.at < len(text):
        reader.fail("the end, or | or & and another name")
    return tree


def parse_entries(text: str) -> list[tuple[Prefix, Tree]]:
    """Read the entries of a Dtab.

    Raises:
        DtabError: It is none; says where.
    """
    reader = _Reader(text)
    entries: list[tuple[Prefix, Tree]] = []
    while True:
        while reader.took(";"):
            pass
        if reader.at == len(text):
            return entries
        entries.append(reader.entry())
        if reader.at < len(text) and text[reader.at] != ";":
            reader.fail("; before the next entry, or | or & and another name")


class _Reader:
    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise DtabError(f"Dtab {text!r}: expected a text such as '/s => zk://localhost/services'")
        if len(text) > LONGEST:
            raise DtabError(f"a Dtab of {len(text)} characters; the limit is {LONGEST}")
        self.text = text
        self.at = 0
        self._depth = 0
        self._skip()

    def _skip(self) -> None:
        found = _SPACE.match(self.text, self.at)
        assert found is not None  # noqa: S101 - it matches nothing as well
        self.at = found.end()

    def took(self, symbol: str) -> bool:
        """Is this what stands here? If so, go past it and the space behind it."""
        if not self.text.startswith(symbol, self.at):
            return False
        self.at += len(symbol)
        self._skip()
        return True

    def fail(self, expected: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        before = self.text[:at]
        line, column = before.count("\n") + 1, at - (before.rfind("\n") + 1) + 1
        first = max(0, column - 61)
        # One character for each, so that the caret stands under the right one; and no passwords of targets.
        whole = self.text.split("\n")[line - 1].rstrip("\r")
        part = _SECRET.sub(lambda found: "…" * len(found[0]), whole)[first : first + 100]
        part = "".join(each if each.isprintable() else " " if each.isspace() else "?" for each in part)
        caret = " " * (column - 1 - first) + "^"
        raise DtabError(
            f"line {line}, column {column}: expected {expected}\n  {part}\n  {caret}", line=line, column=column
        )

    def entry(self) -> tuple[Prefix, Tree]:
        found = _ELEMENTS.match(self.text, self.at)
        if found is None:
            self.fail("a prefix such as /s or /s/*/users")
        elements = found[0][1:].split("/") if found[0] != "/" else []
        self.at = found.end()
        self._skip()
        if not self.took("=>"):
            self.fail("=> after the prefix")
        return Prefix.of(elements), self.tree()

    def tree(self) -> Tree:
        trees = [self._union()]
        while self.took("|"):
            trees.append(self._union())
        return trees[0] if len(trees) == 1 else Alt(tuple(trees))

    def _union(self) -> Tree:
        parts = [self._weighted()]
        while self.took("&"):
            parts.append(self._weighted())
        return parts[0].tree if len(parts) == 1 and parts[0].weight == 1 else Union(tuple(parts))

    def _weighted(self) -> Weighted:
        start = self.at
        number = _NUMBER.match(self.text, start)
        weight = 1.0
        if number is not None:
            self.at = number.end()
            self._skip()
            if self.took("*"):
                weight = float(number[0]) if len(number[0]) <= LONGEST_NUMBER else math.inf
                if not math.isfinite(weight):
                    self.fail("a weight that a number can hold", start)
            else:
                self.at = start  # no weight, but a target such as 127.0.0.1:80
        return Weighted(weight, self._simple())

    def _simple(self) -> Tree:
        text, at = self.text, self.at
        here = text[at : at + 1]
        if here == "(":
            if self._depth == DEEPEST:
                self.fail(f"no more than {DEEPEST} parentheses within each other")
            self._depth += 1
            self.took("(")
            tree = self.tree()
            if not self.took(")"):
                self.fail(") or | or & and another name")
            self._depth -= 1
            return tree
        if here in _SYMBOLS and here:
            self.took(here)
            return _SYMBOLS[here]
        if here == "/":
            return self._path()
        return self._target()

    def _path(self) -> Tree:
        found = _PATH.match(self.text, self.at)
        assert found is not None  # noqa: S101 - a slash is enough
        if _LEAF_ENDS.match(self.text, found.end()) is None:
            self.fail("letters, digits, _ : . # $ % - and \\xHH in a path, and no empty label", found.end())
        self.at = found.end()
        self._skip()
        text = found[0]
        return Leaf(Path(tuple(map(read_label, text[1:].split("/")))) if text != "/" else Path())

    def _target(self) -> Tree:
        at = self.at
        found = _TARGET.match(self.text, at)
        if found is None:
            self.fail("a path, a target, ( or one of ~ ! $")
        text = found[0]
        if not text.isprintable():
            self.fail("a target without control characters")
        target = Target.parse(text)
        if target.scheme == "static":
            try:
                parse_static(target)
            except ConfigurationError as error:
                why = "white space before the &" if "&" in text else shown(error.message)
                self.fail(f"a path, a target such as zk://host/path or host:port, ( or one of ~ ! $ ({why})")
        self.at = found.end()
        self._skip()
        return Leaf(target)
