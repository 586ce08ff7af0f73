"""Between the filters and the retries: there errors, here answers.

What comes up as an error that carries a response (``status.py``) becomes that response again, since that is what
callers of an HTTP client expect. What goes down may be another request than the filters were given: its facts are noted
here (``facts.py``).
"""

from __future__ import annotations

from typing import Any, ClassVar

from ..core.context import VAR
from ..core.env import Env
from ..core.service import Filter, Service
from ..core.supervisor import Supervisor
from .account import ACCOUNT, Account
from .core import Core
from .facts import note
from .status import StatusError

__all__ = ["Answers"]


class Answers(Filter[Any, Any, Any, Any]):
    """A failure that is a response becomes one again. Bodies of tries that nobody will read are closed.

    Args:
        core: httpx or httpx2.
        supervisor: The client's.
    """

    place: ClassVar[str] = "filters"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, core: Core, supervisor: Supervisor | None = None) -> None:
        self._core, self._memory = core, core.httpx.ByteStream
        self._supervisor = supervisor or Supervisor("answers")

    def build(self, env: Env, service: Any) -> Any:
        """With the client's supervisor."""
        return type(self)(self._core, env.supervisor).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Make the call."""
        if self._core.is_request(request):
            note(request, self._core)
        above, reply = ACCOUNT.get(), None
        account = Account(self._supervisor, self._memory, None if above is None else above.until)
        token = ACCOUNT.set(account)
        try:
            reply = await service(request)
        except StatusError as error:
            reply = error.response
            if reply is None:
                raise
            record = VAR.get().record  # which the error itself is told only above this layer
            attempts = error.attempts if record is None else record.attempts
            reply.extensions["meshlib"] = {"attempts": attempts, "verdict": error.verdict}
        finally:
            ACCOUNT.reset(token)
            account.end(reply, above)
        return reply

    def __repr__(self) -> str:
        return "answers()"
