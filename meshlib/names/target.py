"""What users write to say where a client goes, and its reading.

``host:port[,host:port…]`` (static) · ``unix:///path`` · ``file:///path``. Other schemes are found among the entry
points ``meshlib.resolvers``; one that needs a package which is not installed says which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..core.errors import ConfigurationError

__all__ = ["Target"]

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_PROTOCOLS = ("mux",)


@dataclass(frozen=True, slots=True)
class Target:
    """A target, split at its scheme.

    Attributes:
        scheme: ``static``, ``unix``, ``file``, …
        rest: What follows the scheme.
        text: All of it, as it was written.
    """

    scheme: str
    rest: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target. A protocol in front (``mux://host:port``) is accepted and means nothing more here.

        Raises:
            ConfigurationError: It is empty, or no target at all.
        """
        if not isinstance(text, str) or not text.strip():
            raise ConfigurationError(f"target {text!r}: expected something like 'host:port' or 'file:///path'")
        match = _SCHEME.fullmatch(text.strip())
        if match is None or match[1] in _PROTOCOLS:
            return cls("static", text.strip() if match is None else match[2], text)
        return cls(match[1], match[2], text)

    def __str__(self) -> str:
        return self.text
