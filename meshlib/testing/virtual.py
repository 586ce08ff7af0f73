"""Virtual time: minutes of waiting in milliseconds, and the same run again from the same seed.

The event loop is trio's, with its ``MockClock``: whenever every task waits, the clock jumps to the next timer. Nothing
has to be told, since the library's own clock is the event loop's, and so are the timers of anyio.

trio runs the tasks that are ready at the same moment in an order of chance, so that nobody comes to depend on one. With
a ``seed`` that chance is seeded, as trio arranges it for Hypothesis (``trio._core._run``, used by pytest-trio): other
seeds try other orders, and the same seed tries the same.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ..core.errors import ConfigurationError

__all__ = ["run_virtual"]

T = TypeVar("T")


def run_virtual(function: Callable[..., Awaitable[T]], *args: Any, seed: int | None = None) -> T:
    """Run ``function(*args)`` in virtual time, and return its result.

    Args:
        function: An async function. It runs on trio; anyio code needs no change for that.
        args: Its arguments.
        seed: Of the order in which tasks run that are ready at the same moment; ``None`` for another each time.

    Raises:
        ConfigurationError: trio is not installed.
    """
    trio = _trio()
    with _order(trio, seed):
        result: T = trio.run(function, *args, clock=trio.testing.MockClock(autojump_threshold=0))
    return result


def _trio() -> Any:
    try:
        import trio
        import trio.testing
    except ImportError as error:
        message = 'virtual time runs on trio, which is not installed: pip install "meshlib-rpc[testing]"'
        raise ConfigurationError(message) from error
    return trio


@contextmanager
def _order(trio: Any, seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    scheduler = trio._core._run
    chance: random.Random = scheduler._r
    kept, state = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, chance.getstate()
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    chance.seed(seed)
    try:
        yield
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = kept
        chance.setstate(state)
