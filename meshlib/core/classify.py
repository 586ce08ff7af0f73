"""From (request, reply or error) to what it means: success, failure, retryable failure, or nothing at all.

One classifier serves the counters, the retries and (when they come) the breakers, so that all of them agree on what a
failure is. The default reads the facts that the library's own errors carry; an error it does not know is a failure
that must not be repeated. Finagle: ResponseClassifier, with the same four outcomes.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from .errors import MeshError

__all__ = ["Classifier", "ResponseClass", "classify", "is_idempotent"]


class ResponseClass(Enum):
    """What the outcome of a request means."""

    SUCCESS = "success"
    FAILURE = "failure"
    """Failed, and trying again would not help or would not be safe."""
    RETRYABLE = "retryable failure"
    """Failed, and may be tried again if the request allows it."""
    IGNORABLE = "ignorable"
    """Says nothing about the service: the caller changed its mind."""


Classifier = Callable[[Any, Any, BaseException | None], ResponseClass]
"""``(request, reply, error) -> ResponseClass``; ``error`` is ``None`` when there is a reply."""


def classify(request: Any, reply: Any, error: BaseException | None) -> ResponseClass:
    """The default classifier."""
    if error is None:
        return ResponseClass.SUCCESS
    if isinstance(error, MeshError):
        return ResponseClass.RETRYABLE if error.retryable else ResponseClass.FAILURE
    if isinstance(error, Exception):
        return ResponseClass.FAILURE
    return ResponseClass.IGNORABLE


def is_idempotent(request: Any) -> bool:
    """May ``request`` be processed twice without harm? Requests say so by an attribute ``idempotent``."""
    return bool(getattr(request, "idempotent", False))
