"""A deadline for everything that is called from here on: around a block of code, or as a filter.

``with deadline(0.25):`` sets the deadline of the calls made in the block; they raise when it has passed, and nobody
interrupts the block itself. As a filter it goes one step further, and stops waiting for what is below: that is a
`TotalTimeout` which stands among a client's own filters instead of at ``timeout``. Nearer deadlines win, so neither can
give a call more time than it had.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, ClassVar

from ..core import context
from ..core.clock import Clock
from ..core.context import CLOCK, Context
from ..core.env import Env
from ..core.errors import ConfigurationError
from .timeout import TotalTimeout

__all__ = ["Deadline", "deadline"]

_ENTERED: ContextVar[tuple[AbstractContextManager[Context], ...]] = ContextVar("meshlib.deadlines", default=())
"""The blocks that the running code is in. Not kept in the value: many tasks may be in blocks of one and the same."""


class Deadline(TotalTimeout):
    """See `deadline`."""

    place: ClassVar[str] = "filters"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, seconds: float, clock: Clock = CLOCK, env: Env | None = None) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e9:
            raise ConfigurationError(f"deadline({seconds!r}): give the seconds that are left, a number above 0")
        super().__init__(seconds, env or Env(clock=clock))
        self._block_clock = clock

    def build(self, env: Env, service: Any) -> Any:
        """On the client's clock."""
        return type(self)(self._seconds, env.clock, env).bind(service)

    def __enter__(self) -> Context:
        block = context.deadline(self._seconds, self._block_clock)
        inner = block.__enter__()
        _ENTERED.set((*_ENTERED.get(), block))
        return inner

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        *outer, block = _ENTERED.get()
        _ENTERED.set(tuple(outer))
        block.__exit__(None, None, None)

    @property
    def _seconds(self) -> float:
        return self.seconds or 0.0

    def _whose(self, inherited: bool, left: float) -> str:
        return super()._whose(True, left) if inherited else f"no reply within the deadline of {self.seconds:g} s"

    def __repr__(self) -> str:
        return f"deadline({self.seconds:g} s)"


def deadline(seconds: float, clock: Clock = CLOCK) -> Deadline:
    """Everything called from here on, here and downstream, shares ``seconds`` from now (or less, if less was left).

    ``with deadline(0.25):`` around code: the calls made in the body raise `DeadlineExceeded` once it has passed. Code
    in the body that calls nobody is not interrupted: that is what ``anyio.fail_after`` is for. As a layer, with ``>>``
    or as a decorator: what is below has so long, and is cancelled then.

    Args:
        seconds: How long, above 0.
        clock: What time it is; for tests.

    Raises:
        ConfigurationError: ``seconds`` is no number above 0.
    """
    return Deadline(seconds, clock)
