"""What a response's status means, and how it passes the layers that think in errors.

An answer that may be worth another try goes up the stack as an error that carries it, so that breakers, budgets and
retries see what it is; above the retries it becomes a response again (``answers.py``). What it means (RFC 9110
15.6, RFC 6585 for 429, Finagle's HttpNackFilter for nacks):

==================================================  ====================================================
503 with ``finagle-http-nack``, or Retry-After: 0   never processed: goes elsewhere at once, budget paid
503 with ``finagle-http-nonretryable-nack``         refused, and nobody should try again
500 with it (ours alone)                            failed, and nobody should try again: a budget ran dry below
500, 502, 503, 504                                  may be tried again if the request is idempotent
429 with Retry-After                                likewise, after that time
429 without, and other 5xx                          failed; trying again would not help
==================================================  ====================================================

500 is among them because one bad instance among good ones says just that; Finagle leaves it to the application. What
it costs where all instances say so, the retry budget bounds.
"""

from __future__ import annotations

import datetime
import email.utils
import math
from collections.abc import Iterable
from typing import Any, Final

from ..core.errors import MeshError, Rejected, RemoteError
from ..core.pushback import LONGEST_WAIT

__all__ = ["StatusError", "judged", "retry_after"]

NACK: Final = b"finagle-http-nack"
FINAL_NACK: Final = b"finagle-http-nonretryable-nack"
_PASSING: Final = frozenset((500, 502, 503, 504))


class StatusError(MeshError):
    """A response that counts as a failure, on its way up to `Answers`.

    Attributes:
        response: It.
    """

    response: Any = None


class FailedStatus(StatusError, RemoteError):
    """The server has failed, by its own word."""


class RefusedStatus(StatusError, Rejected):
    """The server did not take it on."""

    by_peer = True
    processed: bool | None = False


def judged(status: int, headers: Iterable[tuple[bytes, bytes]], wall: float) -> StatusError | None:
    """The error that a response is, if it is one.

    Args:
        status: Its status.
        headers: Its headers.
        wall: Seconds since 1970, for a Retry-After that is a date.
    """
    if status < 500 and status != 429:
        return None
    fields = {name.lower(): value for name, value in headers}
    asked = retry_after(fields.get(b"retry-after"), wall)
    error: StatusError
    if status == 503 and FINAL_NACK in fields:
        error = RefusedStatus("the server refused it: 503", retryable=False)
    elif status == 503 and (NACK in fields or asked == 0):
        error = RefusedStatus("the server refused it: 503")
        asked = None  # that is for those who could only come back to the same server
    elif status == 429:
        error = RefusedStatus("too many requests: 429", retryable=asked is not None)
        error.processed, error.over_rate = None, True
    else:
        error = FailedStatus(f"the server answered {status}", retryable=status in _PASSING and FINAL_NACK not in fields)
        error.processed = None if status in _PASSING and status != 500 else True
    error.retry_after = asked
    return error


def retry_after(value: bytes | None, wall: float) -> float | None:
    """Seconds that a Retry-After asks for: a number or a date; ``None`` if it is neither."""
    if value is None or len(value) > 64:
        return None
    text = value.decode("latin-1").strip()
    if text.isdecimal() and text.isascii():
        return min(float(text), LONGEST_WAIT)
    try:
        date = email.utils.parsedate_to_datetime(text)
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        left = date.timestamp() - wall
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(left) else min(max(0.0, left), LONGEST_WAIT)
