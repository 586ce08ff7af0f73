"""How many connections an HTTP client has with each endpoint, and for how long: the layer that makes its pools."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from ..core.env import Env
from ..core.errors import ConfigurationError
from .pool import WatermarkPool

__all__ = ["Connections", "connections"]

IDLE: Final = 4.0
"""Seconds: less than uvicorn and Node.js, which close an idle connection after 5."""
MOST: Final = 100
"""Connections to one endpoint, as httpx has in all."""


class Connections:
    """The layer. See `connections`."""

    place: ClassVar[str] = "pool"
    keeps_deadline: ClassVar[bool] = False

    def __init__(self, most: int = MOST, idle: float = IDLE, age: float | None = None) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ConfigurationError(f"connections(most={most!r}): give a number of connections, 1 or more")
        if not idle >= 0 or (age is not None and not age > 0):
            raise ConfigurationError(f"connections(idle={idle!r}, age={age!r}): give seconds")
        self.most, self.idle, self.age = most, idle, age

    def build(self, env: Env, below: Any) -> Any:
        """A service over a pool over the connector."""
        pool = WatermarkPool(below, env, self)
        env.closers.append(pool.close)
        return pool.call

    def __repr__(self) -> str:
        age = "" if self.age is None else f", age={self.age:g} s"
        return f"connections(most={self.most}, idle={self.idle:g} s{age})"


def connections(most: int = MOST, idle: float = IDLE, age: float | None = None) -> Connections:
    """How many connections an HTTP client has with each endpoint, and for how long.

    Args:
        most: At once; further requests wait in line.
        idle: Seconds for which an unused one is kept.
        age: Seconds after which one is not lent again; ``None`` for never.

    Raises:
        ConfigurationError: One makes no sense.
    """
    return Connections(most, idle, age)
