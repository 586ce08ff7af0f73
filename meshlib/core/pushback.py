"""For how long a server asks to be left alone, as a number that every protocol can carry."""

from __future__ import annotations

from typing import Final

from .errors import MeshError

__all__ = ["LONGEST_WAIT", "NEVER", "pushback"]

LONGEST_WAIT: Final = 3600.0
"""Seconds for which a server may ask to be left alone. One that asks for more gets as much."""
NEVER: Final = -1.0
"""Not again at all."""


def pushback(error: MeshError) -> float | None:
    """What ``error.retry_after`` asks for.

    Returns:
        Seconds, 0 to `LONGEST_WAIT`; `NEVER` for any negative number; ``None`` if it says nothing, or not a number.
    """
    seconds = error.retry_after
    if seconds is None or seconds != seconds:
        return None
    return NEVER if seconds < 0 else float(min(seconds, LONGEST_WAIT))
