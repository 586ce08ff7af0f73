"""What users write to say where a client goes, and its reading.

``host:port[,host:port…]`` (static) · ``unix:///path`` · ``file:///path`` · ``dns://host:port`` ·
``srv://_name._tcp.domain`` · ``zk://hosts/path`` · ``k8s://namespace/service:port`` · ``/logical/path``, which Dtabs
make a target of. Other schemes are found among the entry points ``meshlib.resolvers``; one that needs a package which
is not installed says which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..core.errors import ConfigurationError
from .path import Path

__all__ = ["Target", "redacted"]

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_USERINFO = re.compile(r"//[^/\s]*@")
_PROTOCOLS = ("mux", "http", "https", "grpc")


def redacted(text: str) -> str:
    """``text`` without the user and password of any target in it."""
    return _USERINFO.sub("//…@", text) if "@" in text else text


@dataclass(frozen=True, slots=True)
class Target:
    """A target, split at its scheme.

    Attributes:
        scheme: ``static``, ``unix``, ``file``, …; ``path`` for a logical path.
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
            DtabError: It is a malformed path.
        """
        if not isinstance(text, str) or not text.strip():
            raise ConfigurationError(f"target {text!r}: expected something like 'host:port' or 'file:///path'")
        if text.lstrip().startswith("/"):
            path = text.strip()
            Path.parse(path)
            return cls("path", path, path)
        match = _SCHEME.fullmatch(text.strip())
        if match is None or match[1] in _PROTOCOLS:
            return cls("static", text.strip() if match is None else match[2], text)
        return cls(match[1], match[2], text)

    def __str__(self) -> str:
        """As it was written, but for a password, which no log line or message is to show."""
        return redacted(self.text)
