"""From the name that the user wrote to clusters of endpoints that follow it.

A target has one cluster, which is made with the client. A logical path has one for each target that it is bound to,
made when they are needed; see `Binder`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..core.env import Env
from ..core.errors import ConfigurationError
from ..core.service import Status
from .base import BaseDtab
from .dtab import Dtab
from .path import Path
from .resolver import Watch
from .target import Target, redacted
from .watches import watch_of

if TYPE_CHECKING:
    from .clusters import Cluster, MakeCluster
    from .delegation import Delegation

__all__ = ["Bind", "Binding", "base_dtab"]


class Binding(Protocol):
    """What a client's name is bound to."""

    @property
    def status(self) -> Status:
        """The best of all endpoints'."""
        ...

    @property
    def nodes(self) -> tuple[Any, ...]:
        """The endpoints."""
        ...

    def start(self) -> None:
        """Begin to resolve it."""
        ...

    async def delegate(self) -> Delegation:
        """How the name is bound, here and now."""
        ...

    def close(self) -> None:
        """End all connections."""
        ...


class _One:
    """A target: one watch, one cluster."""

    def __init__(self, watch: Watch, cluster: Cluster) -> None:
        self._watch, self._cluster = watch, cluster

    @property
    def status(self) -> Status:
        return self._cluster.status

    @property
    def nodes(self) -> tuple[Any, ...]:
        return self._cluster.nodes

    def start(self) -> None:
        self._cluster.start()

    async def delegate(self) -> Delegation:
        raise ConfigurationError(f"{self._watch.target} is bound already: only logical paths, /s/…, are delegated")

    def close(self) -> None:
        self._cluster.close()

    def __repr__(self) -> str:
        return repr(self._watch)


class Bind:
    """Watches the client's target, or binds its logical path, and builds what is below for each.

    Args:
        base: The base Dtab of a logical path; see `BaseDtab`.
    """

    place: ClassVar[str] = "bind"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, base: Dtab | str | None = None) -> None:
        self.base = base
        if base is not None:
            BaseDtab(base)  # what is wrong with it is told now

    def build(self, env: Env, below: MakeCluster) -> Any:
        """Malformed targets are told at once, not on the first call."""
        target = env.shared(Target, lambda: Target.parse(env.name))
        if target.scheme == "path":
            from .binder import Binder  # 15 ms, which those whose targets are not logical are spared

            binder = Binder(Path.parse(target.rest), BaseDtab(self.base), env, below, self.open_watch)
            env.params[Binding] = binder
            return binder
        watch = env.shared(Watch, lambda: self.open_watch(target, env))
        cluster = below(watch, env)
        env.params[Binding] = _One(watch, cluster)
        return cluster.service

    def open_watch(self, target: Target, env: Env) -> Watch:
        """A watch of ``target``, which is not a path. Simulations replace it by names of their own.

        Raises:
            ConfigurationError: The target makes no sense.
        """
        return watch_of(target, env)

    def __repr__(self) -> str:
        return "bind()" if self.base is None else f"base_dtab({redacted(str(self.base))!r})"


def base_dtab(source: Dtab | str) -> Bind:
    """The base Dtab of a client, which says what logical names mean.

    Args:
        source: A `Dtab`; or its text, such as ``"/s => zk://zk1:2181/services"``; or where to follow a text that
            changes: ``file:///etc/mesh/dtab``, ``zk://host/path``, ``k8s://namespace/configmap:key``.

    Raises:
        ConfigurationError: It is none of these.
        DtabError: The text cannot be read; says where.
    """
    return Bind(source)
