r"""Paths: what logical names are made of. ``/s/users`` is two labels.

A label is a string of bytes that is not empty. The bytes that can be shown are written as they are, and others as
``\xHH``; so every path has a text that reads back as the same path. ``/`` alone is the path without labels. Source:
finagle-core, Path.scala.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..core.errors import DtabError, shown

__all__ = ["ANY", "LABEL", "Path", "Prefix", "label_text", "read_label"]

LABEL: Final = r"(?:[0-9A-Za-z_:.#$%-]|\\x[0-9A-Fa-f]{2})+"
"""One label, as text."""
_SHOWN: Final = frozenset(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_:.#$%-")
_PATH: Final = re.compile(rf"/(?:{LABEL}(?:/{LABEL})*)?")
_ESCAPED: Final = re.compile(rb"\\x([0-9A-Fa-f]{2})")
LONGEST: Final = 64 * 1024
"""Characters of a path's text; names are far shorter, and what comes from a network must end somewhere."""


def read_label(text: str) -> bytes:
    """The bytes that a label's text stands for."""
    raw = text.encode("ascii")
    return _ESCAPED.sub(lambda found: bytes((int(found[1], 16),)), raw) if b"\\" in raw else raw


def label_text(label: bytes) -> str:
    """A label's text."""
    return "".join(chr(byte) if byte in _SHOWN else f"\\x{byte:02x}" for byte in label)


@dataclass(frozen=True, slots=True)
class Path:
    """A path. Immutable, and equal to another of the same labels.

    Attributes:
        labels: Its parts, none of them empty.
    """

    labels: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if not all(isinstance(label, bytes) and label for label in self.labels):
            raise DtabError(f"path of {self.labels!r}: labels are bytes, and none is empty")

    @classmethod
    def parse(cls, text: str) -> Path:
        """Read a path.

        Raises:
            DtabError: It is none.
        """
        if not isinstance(text, str):
            raise DtabError(f"path {text!r}: expected a text such as '/s/users'")
        if len(text) > LONGEST:
            raise DtabError(f"path '{shown(text, 40)}': it has {len(text)} characters; the limit is {LONGEST}")
        if _PATH.fullmatch(text) is None:
            raise DtabError(
                f"path '{shown(text)}': expected /label/label…, of letters, digits, _ : . # $ % - and \\xHH"
            )
        return cls(tuple(map(read_label, text[1:].split("/")))) if text != "/" else cls()

    def __add__(self, other: Path) -> Path:
        return Path(self.labels + other.labels) if other.labels else self

    def __len__(self) -> int:
        return len(self.labels)

    def drop(self, count: int) -> Path:
        """What is left without the first ``count`` labels."""
        return Path(self.labels[count:])

    def startswith(self, prefix: Prefix) -> bool:
        """Does ``prefix`` match the beginning?"""
        elements = prefix.elements
        if len(self.labels) < len(elements):
            return False
        return all(want is ANY or want == mine for want, mine in zip(elements, self.labels, strict=False))

    def __str__(self) -> str:
        return "/" + "/".join(map(label_text, self.labels))


ANY: Final = None
"""In a prefix: any one label, written ``*``."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The left side of a Dtab's entry: labels, of which some may be `ANY`."""

    elements: tuple[bytes | None, ...] = ()

    @classmethod
    def of(cls, elements: Iterable[str]) -> Prefix:
        """From the texts between the slashes."""
        return cls(tuple(ANY if text == "*" else read_label(text) for text in elements))

    def __len__(self) -> int:
        return len(self.elements)

    def __str__(self) -> str:
        return "/" + "/".join("*" if element is None else label_text(element) for element in self.elements)
