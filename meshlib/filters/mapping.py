"""What a caller may learn of a handler's failure: nothing that the handler did not mean to say.

Errors of this library that the handler, or the layer that calls it, raised itself say what they mean: `Rejected`,
`InvalidArgument`, `UnknownMethod`, and so on. Everything else becomes an opaque `RemoteError`; the whole story, with
its traceback, is in this server's log under the request's trace id, which the caller's error names.

An error that came out of a client which the handler called is never passed on as it is: "never processed" is true of
*that* call, and would be a lie about this one.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from ..core.context import VAR
from ..core.deadlines import passed
from ..core.env import Env
from ..core.errors import (
    DeadlineExceeded,
    InvalidArgument,
    MeshError,
    Rejected,
    RemoteError,
    UnknownMethod,
    UnknownService,
    shown,
)
from ..core.service import Filter, Service

__all__ = ["ErrorMapping", "is_meant"]

logger = logging.getLogger("meshlib.server")

MEANT = (Rejected, InvalidArgument, UnknownMethod, UnknownService, DeadlineExceeded, RemoteError)


def is_meant(error: MeshError) -> bool:
    """Did the handler, or a layer around it, raise it to be told? What came out of a client it called was not."""
    return isinstance(error, MEANT) and not (error.label or error.endpoint)


class ErrorMapping(Filter[Any, Any, Any, Any]):
    """Makes handlers' failures opaque, and logs them."""

    place: ClassVar[str] = "errors"

    def __init__(self, env: Env | None = None) -> None:
        self._env = env or Env()

    def build(self, env: Env, service: Any) -> Any:
        """With the server's label in the log."""
        return type(self)(env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Handle the request.

        Raises:
            MeshError: What the caller is to know.
        """
        try:
            return await service(request)
        except MeshError as error:
            if is_meant(error):
                raise
            raise self._opaque(request, error) from error
        except Exception as error:
            raise self._opaque(request, error) from error

    def _opaque(self, request: Any, error: Exception) -> MeshError:
        context = VAR.get()
        if isinstance(error, DeadlineExceeded) and passed(context.deadline, self._env.clock):
            return DeadlineExceeded("the deadline passed while the request was handled", processed=True)
        trace = "" if context.trace is None else f" (trace {context.trace.trace:032x})"
        what = shown(getattr(request, "dest", "")) or "a request"
        logger.error("%s: the handler of %s failed%s", self._env.label, what, trace, exc_info=error)
        opaque = RemoteError(f"internal error{trace}")
        if isinstance(error, MeshError) and "retryable" in vars(error) and not error.retryable:
            opaque.finalize(error.verdict)  # a budget ran dry below: nobody above should try again either
        return opaque

    def __repr__(self) -> str:
        return "errors(opaque)"
