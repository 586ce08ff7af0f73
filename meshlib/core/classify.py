"""From (request, reply or error) to what it means: success, failure, retryable failure, or nothing at all.

One classifier serves the counters, the retries and the breakers, so that all of them agree on what a failure is. The
default reads the facts that the library's own errors carry; an error it does not know is a failure that must not be
repeated. A `Rule` decides some cases and leaves the rest open, to the next rule and in the end to the default. Whatever
users write is completed in that way, and a rule that raises has decided nothing (Finagle: ResponseClassifier, a partial
function with the same four outcomes, always completed by the default).

Whether a request may be sent twice is not decided here: requests declare it themselves, see `is_idempotent`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

from .errors import ConfigurationError, DeadlineExceeded, MeshError, RemoteError

__all__ = [
    "Classifier",
    "PartialClassifier",
    "ResponseClass",
    "Rule",
    "classifier",
    "classify",
    "complete",
    "is_idempotent",
    "retry_connection_losses",
    "retry_server_errors",
    "retry_timeouts",
]

logger = logging.getLogger("meshlib")


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

PartialClassifier = Callable[[Any, Any, BaseException | None], ResponseClass | None]
"""The same, with ``None`` for what it leaves open."""


def classify(request: Any, reply: Any, error: BaseException | None) -> ResponseClass:
    """The default classifier."""
    if error is None:
        return ResponseClass.SUCCESS
    if isinstance(error, MeshError):
        return ResponseClass.RETRYABLE if error.retryable else ResponseClass.FAILURE
    if isinstance(error, Exception):
        return ResponseClass.FAILURE
    return ResponseClass.IGNORABLE


class Rule:
    """A classifier that may leave a case open, by giving ``None``. Immutable; `classifier` makes one of a function.

    Args:
        decide: ``(request, reply, error) -> ResponseClass | None``.
        name: What it prints as.
    """

    __slots__ = ("_decide", "_name")

    def __init__(self, decide: PartialClassifier, name: str = "") -> None:
        if not callable(decide):
            raise ConfigurationError(f"classifier({decide!r}): give a function of (request, reply, error)")
        self._decide = decide
        self._name = name or getattr(decide, "__name__", repr(decide))

    def __call__(self, request: Any, reply: Any, error: BaseException | None) -> ResponseClass | None:
        """What it means, or ``None``."""
        return self._decide(request, reply, error)

    def or_else(self, other: PartialClassifier) -> Rule:
        """This rule, and ``other`` for what it leaves open."""
        second = other if isinstance(other, Rule) else Rule(other)

        def either(request: Any, reply: Any, error: BaseException | None) -> ResponseClass | None:
            first = self._decide(request, reply, error)
            return second(request, reply, error) if first is None else first

        return Rule(either, f"{self!r}.or_else({second!r})")

    def __repr__(self) -> str:
        return self._name


def classifier(function: PartialClassifier) -> Rule:
    """Make a rule of a function ``(request, reply, error) -> ResponseClass | None``. A decorator.

    Raises:
        ConfigurationError: It is no function.
    """
    return Rule(function)


def _retry(kinds: tuple[type[BaseException], ...], name: str) -> Rule:
    def decide(request: Any, reply: Any, error: BaseException | None) -> ResponseClass | None:
        if not isinstance(error, kinds):
            return None
        # What somebody below has marked as final stays so: else a spent budget would be retried further up.
        final = "retryable" in vars(error) and not getattr(error, "retryable", True)
        return ResponseClass.FAILURE if final else ResponseClass.RETRYABLE

    return Rule(decide, name)


retry_timeouts: Final = _retry((DeadlineExceeded, TimeoutError), "retry_timeouts")
"""Whatever ran out of time may be tried again; by default only what an attempt timeout cut short."""
retry_connection_losses: Final = _retry((ConnectionError,), "retry_connection_losses")
"""A broken or refused connection may be tried again, the operating system's own errors included."""
retry_server_errors: Final = _retry((RemoteError,), "retry_server_errors")
"""A handler that failed may be asked again; by default it is not."""


def complete(given: PartialClassifier) -> Classifier:
    """A classifier that always decides: ``given`` first, and the default for what it leaves open or fails at.

    Raises:
        ConfigurationError: ``given`` is no function.
    """
    if given is classify:
        return classify
    if not callable(given):
        raise ConfigurationError(f"classifier={given!r}: give a function of (request, reply, error)")
    failed = False

    def completed(request: Any, reply: Any, error: BaseException | None) -> ResponseClass:
        nonlocal failed
        try:
            verdict = given(request, reply, error)
            if isinstance(verdict, ResponseClass):
                return verdict
            problem = (
                None if verdict is None else TypeError(f"a classifier gave {verdict!r}, which is no ResponseClass")
            )
        except Exception as raised:
            problem = raised
        if problem is not None and not failed:
            failed = True  # once is enough: it may fail a thousand times a second
            logger.error("classifier %r failed; the default decides instead", given, exc_info=problem)
        return classify(request, reply, error)

    return completed


def is_idempotent(request: Any) -> bool:
    """May ``request`` be processed twice without harm? Requests say so by an attribute ``idempotent``."""
    return bool(getattr(request, "idempotent", False))
