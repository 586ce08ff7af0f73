"""A delegation: the whole way from a path to targets, which entry applied at each step, and what came of it.

The interpreter makes it (``interpreter.py``). `Delegation.tree` is what remains for those who only want to call. Once
somebody has looked what the targets stand for (`Delegation.resolved`) it says as well where calls go, and what part of
them, by the rules of `Binder`; then it prints as people read it who wonder where their requests go::

    /s/users
    └─ [local] /s/users => 9 * /users-v1 & 1 * /users-v2
       └─ shared among
          ├─ 90 % /users-v1
          …

Pure. The picture is that of Linkerd 1's delegator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from .addr import Addr, Bound, Failed, Neg, Pending
from .dtab import Dentry, Residual
from .target import Target, redacted
from .tree import EMPTY, FAIL, NEG, Alt, Constant, Leaf, Tree, Union, Weighted, simplified

__all__ = ["Delegation", "Endless"]


@dataclass(frozen=True, slots=True)
class Endless:
    """A branch that does not end. Only calls that come to it fail (Finagle binds fallbacks when they are needed)."""

    problem: str

    def __str__(self) -> str:
        return f"({self.problem})"


@dataclass(frozen=True, slots=True)
class Delegation:
    """One name on the way, and what it became. Prints as a tree.

    Attributes:
        kind: ``path``, ``target``, ``alt``, ``union``, ``constant``, or ``endless``.
        name: The path, the target, or the constant; empty for alternatives and unions.
        rule: The entry that led here from the path above.
        origin: Where that entry stands: ``base`` or ``local``; empty if nobody said.
        weight: Its share among the branches of a union, as it was written.
        children: What it became: for a path what each entry that applies says, the most wanted first.
        target: For a target, what the path came to.
        constant: For a constant, which.
        addr: What the target stands for, if somebody looked.
        share: Which part of the calls go here, from 0 to 1, as far as ``addr`` tells; ``None`` if nobody looked.
    """

    kind: str
    name: str
    rule: Dentry | None = None
    origin: str = ""
    weight: float = 1.0
    children: tuple[Delegation, ...] = ()
    target: Target | Residual | Endless | None = None
    constant: Constant | None = None
    addr: Addr | None = None
    share: float | None = None

    def tree(self) -> Tree:
        """What the path stands for: a name tree whose leaves are targets."""
        return simplified(self._tree())

    def _tree(self) -> Tree:
        if self.target is not None:
            return Leaf(self.target)
        if self.kind == "constant":
            return self.constant or NEG
        if self.kind == "union":
            return Union(tuple(Weighted(each.weight, each._tree()) for each in self.children))
        return Alt(tuple(each._tree() for each in self.children)) if self.children else NEG

    @property
    def bound(self) -> Target | None:
        """The target that this is."""
        return self.target.target if isinstance(self.target, Residual) else _target(self.target)

    def targets(self) -> list[Target]:
        """Every target in it, in order, each once."""
        found: dict[Target, None] = {} if self.bound is None else {self.bound: None}
        for child in self.children:
            found.update(dict.fromkeys(child.targets()))
        return list(found)

    def resolved(self, state_of: Callable[[Target], Addr | None]) -> Delegation:
        """The same, with what each target stands for, and which part of the calls each name gets."""
        return _shared(_looked(self, state_of), 1.0)

    def brief(self) -> str:
        """In one line: ``/s/users -> /srv/users (no entry applies)``."""
        text = self._brief()
        return text if len(text) <= BRIEF else f"{text[:BRIEF]}…"

    def _brief(self) -> str:
        state = f" ({_state(self.addr)})" if self.addr is not None else ""
        if self.kind == "path":
            if not self.children:
                return f"{self.name} (no entry applies)"
            inner = " | ".join(child._brief() for child in self.children[:FEW])
            return f"{self.name} -> {inner if len(self.children) == 1 else f'({inner})'}"
        if self.kind in ("alt", "union"):
            sign = " | " if self.kind == "alt" else " & "
            return f"({sign.join(child._brief() for child in self.children[:FEW])})"
        return f"{self.name}{state}"

    def __str__(self) -> str:
        return "\n".join(self._lines("", "", 0.0))

    def _lines(self, first: str, rest: str, total: float) -> list[str]:
        words = [f"{100 * self.weight / total:.3g} %"] if total else []
        words.append({"alt": "the first of", "union": "shared among"}.get(self.kind, self.name))
        if self.kind == "path" and not self.children:
            words.append("(no entry applies)")
        if self.kind == "constant":
            words.append(f"({MEANING[self.name]})")
        if self.addr is not None:
            words.append(f"({_state(self.addr)})")
        if self.share and self.kind not in ("path", "alt", "union"):
            words.append(f"<- {100 * self.share:.3g} % of calls")
        lines = [first + " ".join(words)]
        shared = sum(child.weight for child in self.children) if self.kind == "union" else 0.0
        for n, child in enumerate(self.children):
            last = n + 1 == len(self.children)
            branch, under = ("└─ ", "   ") if last else ("├─ ", "│  ")
            if child.rule is not None and self.kind == "path":
                origin = f"[{child.origin}] " if child.origin else ""
                lines.append(f"{rest}{branch}{origin}{redacted(str(child.rule))}")
                lines += child._lines(f"{rest}{under}└─ ", f"{rest}{under}   ", shared)
            else:
                lines += child._lines(rest + branch, rest + under, shared)
        return lines


MEANING: Final = {"~": "no such name", "!": "no such name, and no fallback", "$": "no endpoints, and no fallback"}
BRIEF: Final = 400
"""Characters of a delegation in an error message."""
FEW: Final = 8


def _target(value: object) -> Target | None:
    return value if isinstance(value, Target) else None


def _state(addr: Addr) -> str:
    if not isinstance(addr, Bound) or not addr.addresses:
        return str(addr)
    few = ", ".join(map(str, addr.addresses[:FEW]))
    more = f", and {len(addr.addresses) - FEW} more" if len(addr.addresses) > FEW else ""
    return f"{len(addr.addresses)} endpoint{'s' * (len(addr.addresses) != 1)}: {few}{more}"


def _looked(node: Delegation, state_of: Callable[[Target], Addr | None]) -> Delegation:
    addr = node.addr if node.bound is None else state_of(node.bound)
    return replace(node, addr=addr, children=tuple(_looked(child, state_of) for child in node.children))


def _verdict(node: Delegation) -> int:
    """4: it has endpoints, or nobody looked. 3: not known. 2: it has none. 1: `FAIL`. 0: `NEG`."""
    if node.kind in ("target", "endless"):
        addr = node.addr
        if isinstance(addr, Bound):
            return 4 if addr.addresses else 2
        return 0 if isinstance(addr, Neg) else 3 if isinstance(addr, Pending | Failed) or node.kind == "endless" else 4
    if node.kind == "constant":
        return {EMPTY: 2, FAIL: 1}.get(node.constant or NEG, 0)
    found = [_verdict(child) for child in node.children]
    if node.kind == "union":
        best = max((v for child, v in zip(node.children, found, strict=True) if child.weight > 0), default=0)
        return 0 if best == 1 else best
    return next((v for v in found if v), 0)


def _shared(node: Delegation, share: float) -> Delegation:
    """Calls go to the first alternative that exists, and to all branches of a union that have endpoints."""
    verdicts = [_verdict(child) for child in node.children]
    parts = [0.0] * len(verdicts)
    if node.kind == "union":
        weights = [
            child.weight if v == max(verdicts) > 1 else 0.0 for child, v in zip(node.children, verdicts, strict=True)
        ]
        parts = [share * weight / (sum(weights) or 1.0) for weight in weights]
    else:
        first = next((n for n, v in enumerate(verdicts) if v), None)
        if first is not None:
            parts[first] = share
    children = tuple(_shared(child, part) for child, part in zip(node.children, parts, strict=True))
    return replace(node, share=share, children=children)
