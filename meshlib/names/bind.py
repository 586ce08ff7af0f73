"""From the name that the user wrote to a cluster of endpoints that follows it.

The place where Dtabs will rewrite logical names: each bound name then gets a cluster of its own. Until then a client
has one target and one cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from ..core.env import Env
from .file import path_of
from .resolver import Watch, resolver_for
from .static import parse
from .target import Target

__all__ = ["Bind"]


class Bind:
    """Watches the client's target and builds the cluster below for it."""

    place: ClassVar[str] = "bind"
    keeps_deadline: ClassVar[bool] = True

    def build(self, env: Env, below: Callable[[Watch], Any]) -> Any:
        """Malformed targets are told at once, not on the first call."""
        target = Target.parse(env.name)
        resolver = resolver_for(target)
        if target.scheme in ("static", "unix"):
            parse(target)
        elif target.scheme == "file":
            path_of(target)
        watch = env.shared(Watch, lambda: Watch(target, resolver, env))
        return below(watch)

    def __repr__(self) -> str:
        return "bind()"
