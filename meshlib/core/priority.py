"""How much a request matters: who goes first when not all can.

It travels with the request, so that a server deep below sheds the same work that the edge would have: Google's
criticalities ("Site Reliability Engineering", ch. 21), with the two extremes of their four levels and one between.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Priority"]


class Priority(IntEnum):
    """The higher, the longer it is kept under overload."""

    SHEDDABLE = 0
    """Nobody minds if it fails: prefetching, batches that come again."""
    DEFAULT = 1
    """What says nothing."""
    CRITICAL = 2
    """Somebody waits for it, and notices."""
