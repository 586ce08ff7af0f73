"""What a server says instead of an answer: ``application/problem+json`` (RFC 9457), with what clients need to go on.

=======================  ======  ================================================================================
error                    status  headers
=======================  ======  ================================================================================
`Rejected`               503     Retry-After, and ``finagle-http-nack``: nothing was done, so it may go elsewhere
… that must not be       503     … ``finagle-http-nonretryable-nack`` instead
… never again            503     likewise, without Retry-After: ``retry_after`` is negative
… by a rate limit        429     Retry-After
`DeadlineExceeded`       504
`InvalidArgument`        400     (``path`` says which, and ``kind`` that it is this)
`UnknownService`, …      404     (``kind`` says which)
any other                500     nothing of the server's inside; the nonretryable nack if nobody should try again
=======================  ======  ================================================================================

A plain HTTP client is asked to wait for a second; Finagle's and ours read the nack, and go elsewhere at once. Source of
the nacks: finagle-http, filter/HttpNackFilter.scala.
"""

from __future__ import annotations

import http
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..core.errors import (
    DeadlineExceeded,
    InvalidArgument,
    MeshError,
    Rejected,
    RemoteError,
    UnknownMethod,
    UnknownService,
)
from ..core.pushback import NEVER, pushback
from .status import FINAL_NACK, NACK

__all__ = ["TYPE", "Answer", "answer_to", "problem"]

TYPE: Final = b"application/problem+json"
PAUSE: Final = 1
"""Seconds that a client which knows no nacks is asked to wait."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, all of it.

    Attributes:
        status: Its status.
        body: Its body.
        headers: Its headers, lower case, without the length.
    """

    status: int
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()

    async def send(self, send: Any, *, head: bool = False) -> None:
        """Send it as ASGI has it; without its body, though with the body's length, if ``head``."""
        headers = [*self.headers, (b"content-length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head else self.body})


def problem(
    status: int, detail: str, headers: tuple[tuple[bytes, bytes], ...] = (), more: Mapping[str, Any] | None = None
) -> Answer:
    """A problem detail. Its title is the status's own phrase, as RFC 9457 wants where there is no type.

    Args:
        status: An HTTP status.
        detail: What happened, and what would be right.
        headers: Further ones, lower case.
        more: Further members.
    """
    facts = {"title": http.HTTPStatus(status).phrase, "status": status, "detail": detail, **(more or {})}
    return Answer(status, json.dumps(facts).encode(), ((b"content-type", TYPE), *headers))


def answer_to(error: MeshError) -> Answer:
    """What a server says when it has come to ``error``."""
    if isinstance(error, Rejected):
        asked = pushback(error)
        never = asked == NEVER
        headers = [] if never else [(b"retry-after", b"%d" % max(PAUSE, math.ceil(asked or 0)))]
        if error.over_rate:
            return problem(429, error.message, tuple(headers))
        if error.processed is False or never:
            headers.append((FINAL_NACK if never or not error.retryable else NACK, b"true"))
        return problem(503, error.message, tuple(headers))
    if isinstance(error, DeadlineExceeded):
        return problem(504, error.message)
    if isinstance(error, InvalidArgument):
        path = getattr(error, "path", "")
        return problem(400, error.message, more={"kind": "InvalidArgument", **({"path": path} if path else {})})
    if isinstance(error, UnknownService | UnknownMethod):
        kind = "UnknownService" if isinstance(error, UnknownService) else "UnknownMethod"
        return problem(404, error.message, more={"kind": kind})
    final = ((FINAL_NACK, b"true"),) if error.verdict and not error.retryable else ()
    return problem(500, error.message if isinstance(error, RemoteError) else "internal error", final)
