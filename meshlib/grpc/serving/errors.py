"""What a caller may learn of a handler's failure, as a gRPC status.

=====================================================  ===============================================================
raised                                                 the caller gets
=====================================================  ===============================================================
``GRPCError`` of the handler's own                     it, with its message and details; alone in a group likewise
… that came from a call through a meshlib channel      it, if it is an answer, as NOT_FOUND; a failure, as UNAVAILABLE,
                                                       is true of that call and not of this: an opaque UNKNOWN
`Rejected`                                             UNAVAILABLE, pushback and ``meshlib-nack``: clients go elsewhere
… by a rate limit                                      RESOURCE_EXHAUSTED, likewise
`InvalidArgument`, `UnknownMethod`, …                  INVALID_ARGUMENT, UNIMPLEMENTED, …
anything else                                          UNKNOWN, and the whole story in the server's log, once
=====================================================  ===============================================================

Source of the pushback: gRFC A6. It is 0 for a nack, since nothing speaks against another server, and -1, "never", where
nobody should try again.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final

from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from ...core.classify import ResponseClass, classify
from ...core.env import Env
from ...core.errors import MeshError, Rejected
from ...core.pushback import NEVER, pushback
from ...core.service import Service
from ...filters.mapping import ErrorMapping, is_meant
from ..status import FAILURES, NACK, PUSHBACK, status_of, to_status

__all__ = ["GrpcErrors", "answer_to", "judge_call"]

PAUSE: Final = 1.0
"""Seconds that a caller over its rate is asked to wait, if the limit does not say."""


class GrpcErrors(ErrorMapping):
    """Passes statuses on, makes other failures opaque, and logs them."""

    place: ClassVar[str] = "errors"

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Handle the call.

        Raises:
            GRPCError: What the handler answers.
            MeshError: What the caller is to know.
        """
        try:
            return await service(request)
        except ExceptionGroup as group:
            alone = _alone(group)
            if not _is_meant(alone):
                raise self._opaque(request, group) from group
            raise alone from group
        except Exception as error:
            # A handler that goes on after its cancellation learns from its stream that the client is gone.
            if _is_meant(error) or (isinstance(error, StreamTerminatedError) and getattr(request, "gone", False)):
                raise
            raise self._opaque(request, error) from error

    def build(self, env: Env, service: Any) -> Any:
        """With the server's label in the log."""
        return type(self)(env).bind(service)


def _alone(error: Exception) -> Exception:
    """What a task group has made a group of, if that is one thing."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _is_meant(error: Exception) -> bool:
    if isinstance(error, MeshError):
        called = bool(error.label or error.endpoint)  # it came out of a client that the handler called
        if isinstance(error, GRPCError):
            return not called or (error.message is not None and error.status not in FAILURES)
        return is_meant(error)
    return isinstance(error, GRPCError)


def answer_to(error: MeshError) -> tuple[Status, str, list[tuple[str, str]]]:
    """What a server says when it has come to ``error``: status, message and fields of the trailers."""
    status, message = to_status(error)
    fields: list[tuple[str, str]] = []
    if isinstance(error, Rejected) and error.processed is False:
        asked = pushback(error)
        if asked is None:
            asked = PAUSE if error.over_rate else 0.0
        fields.append((NACK, "true" if error.retryable else "final"))
        again = error.retryable and asked != NEVER
        fields.append((PUSHBACK, str(math.ceil(asked * 1e3)) if again else "-1"))
    elif "retryable" in vars(error) and not error.retryable:
        fields.append((PUSHBACK, "-1"))  # a budget ran dry below: nobody above should try again either
    return status, message, fields


def judge_call(request: Any, reply: Any, error: BaseException | None) -> ResponseClass:
    """What a call's end says of the server: an answer such as NOT_FOUND is one."""
    if error is None:
        failed = getattr(reply, "status", None) in FAILURES and not reply.declared
        return ResponseClass.FAILURE if failed else ResponseClass.SUCCESS
    if isinstance(error, StreamTerminatedError):
        return ResponseClass.IGNORABLE
    if isinstance(error, GRPCError | MeshError) and status_of(error) not in FAILURES:
        return ResponseClass.SUCCESS
    return classify(request, reply, error)
