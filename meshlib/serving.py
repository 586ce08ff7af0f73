"""What servers of every protocol share: numbers, announcements, and the order in which a server begins and ends.

==============  ====================================================================================================
step            what happens
==============  ====================================================================================================
start           bind, accept, announce (in the background)
withdraw        the announcement first, while requests are still answered: nobody comes to a closed door
stop accepting  the listener closes; a Unix socket's file is removed if it is still ours
drain           connections end gracefully, for as long as the grace period lasts
abort           what is left is ended, and every background task with it
==============  ====================================================================================================

A protocol's server says how each step is done there; `meshlib.server.Server` does so for protocols on anyio's streams,
HTTP and gRPC for the servers that they are built upon.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Generator, Iterable
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import anyio

from .core.clock import Clock
from .core.env import Env
from .core.errors import ConfigurationError, ServiceClosed
from .core.events import Decisions
from .core.stack import Stack
from .core.supervisor import Supervisor
from .names.addr import Address, parse_hostport
from .names.announce import Announcement, Announcements, reachable
from .names.static import parse_address
from .telemetry.metrics import Registry

__all__ = ["GRACE", "BaseServer", "server_env"]

logger = logging.getLogger("meshlib.server")

GRACE: Final = 10.0
"""Seconds that closing waits for requests under way. Kubernetes kills 30 s after SIGTERM; this leaves room for more."""


def server_env(label: str, name: str, protocol: str, clock: Clock | None, seed: int | None, **more: Any) -> Env:
    """The surroundings of a server's layers, whose ``metrics`` are a `Registry`.

    Args:
        label: What it is called in metrics, spans and logs.
        name: The address it was given.
        protocol: ``mux``, ``http``, ``grpc``.
        clock: What time it is.
        seed: Of random choices.
        more: Further fields of the `Env`.
    """
    clock, registry = clock or Clock(), Registry()
    return Env(
        kind="server",
        label=label or name,
        name=name,
        protocol=protocol,
        clock=clock,
        rng=random.Random(seed),
        metrics=registry,
        events=Decisions(clock, registry),
        supervisor=Supervisor(f"server {label or name!r}"),
        **more,
    )


class BaseServer:
    """A server of some protocol. ``async with`` it, or ``await`` it; `aclose` ends it, in any task.

    Args:
        address: ``host:port`` (port 0 takes a free one) or ``unix:///path``.
        env: See `server_env`.
        stack: The layers around its handler, to be shown.
        grace: Seconds that `aclose` waits for requests under way.
        announce: Where to announce the address, such as ``zk://host/path``, or several such targets. The server
            announces itself once it listens, in the background, and withdraws before it drains.
        advertise: The address to announce, if it is not the one that the server listens on; may have settings:
            ``10.0.0.7:9000?weight=2&zone=eu-1``. With ``host:0`` the port is the one that it listens on.

    Attributes:
        grace: As given.
        stack: As given.

    Raises:
        ConfigurationError: The address, or what is to be announced, makes no sense.
    """

    keyword: ClassVar[str] = "serve"
    """What users type to make one, for errors."""

    def __init__(
        self,
        address: str,
        env: Env,
        stack: Stack,
        *,
        grace: float = GRACE,
        announce: str | Iterable[str] = (),
        advertise: str = "",
    ) -> None:
        if not grace >= 0:
            raise ConfigurationError(f"{self.keyword}(grace={grace!r}): give seconds, 0 or more")
        self.env, self.stack, self.grace = env, stack, grace
        self._unix = address.removeprefix("unix://") if address.startswith("unix://") else ""
        self._host, self._port = ("", 0) if self._unix else parse_hostport(address)
        self._announcements = Announcements(announce, f"server {env.label!r}", env.rng)
        self._advertise = parse_address(advertise) if advertise else None
        self._address = f"unix://{self._unix}" if self._unix else ""
        self._closing = self._refusing = False
        self._closed: anyio.Event | None = None
        self._bound = anyio.Event()
        self._socket: tuple[int, int] | None = None
        if self._announcements.targets:
            metrics = env.metrics
            metrics.gauge("announce/announced", lambda: sum(each.announced for each in self.announcements))
            metrics.gauge("announce/failures", lambda: sum(each.failures for each in self.announcements))

    # --- how it is done: for each protocol ----------------------------------------------------------------------------

    async def _open(self) -> str:
        """Bind, and give the address: ``host:port`` or ``unix:///path``.

        Raises:
            OSError: The address cannot be bound.
        """
        raise NotImplementedError

    def _accept(self) -> None:
        """Begin to accept. Not called if the server has been closed while it was bound."""

    async def _stop_accepting(self) -> None:
        """Close the listener. Called once, and never cancelled."""
        raise NotImplementedError

    async def _drain(self) -> None:
        """End every connection gracefully, and wait for the last. Cancelled when the grace period is over."""
        raise NotImplementedError

    async def _abort(self) -> None:
        """End what is left at once. Called once, and never cancelled; background tasks are cancelled after it."""
        raise NotImplementedError

    @property
    def _busy(self) -> str:
        """What is still open, for the log when the grace period was not enough."""
        return "requests"

    # --- beginning ----------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where it listens: ``host:port``, or ``unix:///path``.

        Raises:
            ServiceClosed: It has not been started.
        """
        if not self._address:
            raise ServiceClosed("the server has not been started; use `async with` or `await` it")
        return self._address

    @property
    def announcements(self) -> tuple[Announcement, ...]:
        """What it announces; each says whether it is announced, and why not."""
        return self._announcements.each

    async def start(self) -> None:
        """Bind and accept. Starting twice is the same as starting once.

        Raises:
            OSError: The address cannot be bound.
            ServiceClosed: It has been closed.
        """
        if self._closing:
            raise ServiceClosed(f"server {self.env.label!r} has been closed")
        if self._closed is not None:
            await self._bound.wait()
            if self._closed is None or self._closing:  # the first could not bind, or was told to end meanwhile
                await self.start()
            return
        self._closed, self._bound = anyio.Event(), anyio.Event()
        try:
            self._address = await self._open()
            if self._unix:
                await self._remember_socket()
        except BaseException:
            self._closed = None
            raise
        finally:
            self._bound.set()
        if self._closing:  # meanwhile, by another task, which found nothing to close yet
            await self._close_listener()
            raise ServiceClosed(f"server {self.env.label!r} has been closed")
        self._accept()
        if self._announcements.targets:
            self._announcements.start(self._announced_address())

    async def _remember_socket(self) -> None:
        try:
            with anyio.CancelScope(shield=True):  # one look at a local file, without which it could not be removed
                made = await anyio.Path(self._unix).stat()
                self._socket = (made.st_dev, made.st_ino)
        except BaseException:
            await self._close_listener()
            raise

    def _announced_address(self) -> Address:
        given = self._advertise
        if given is None:
            return reachable(self.address)
        port = given.port or Address.parse(self.address).port
        return Address(given.host, port, given.path, given.weight, given.metadata)

    # --- ending -------------------------------------------------------------------------------------------------------

    async def aclose(self, grace: float | None = None) -> None:
        """Stop accepting, drain, wait for what is under way, cancel the rest. In any task; twice is the same as once.

        Args:
            grace: Seconds to wait, if not those of the server.
        """
        first, self._closing = not self._closing, True
        if not first:
            if self._closed is not None:
                await self._closed.wait()
            return
        try:
            # First, so that clients hear of it while they are still answered: nobody comes to a closed door.
            await self._announcements.withdraw()
            self._refusing = True
            await self._close_listener()
            with anyio.move_on_after(self.grace if grace is None else grace) as scope:
                await self._drain()
            if scope.cancelled_caught:
                logger.warning("%s: %s still busy after the grace period", self.env.label, self._busy)
        finally:
            self._refusing = True
            with anyio.CancelScope(shield=True):
                await self._abort()
                await self.env.supervisor.aclose()
            closed = self._closed = self._closed or anyio.Event()
            closed.set()

    async def _close_listener(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._stop_accepting()
            if self._socket is not None:
                await self._remove_socket(anyio.Path(self._unix), self._socket)

    async def _remove_socket(self, path: anyio.Path, ours: tuple[int, int]) -> None:
        with contextlib.suppress(OSError):
            found = await path.stat()
            if (found.st_dev, found.st_ino) == ours:  # a successor may have put its own there
                await path.unlink()

    async def wait_closed(self) -> None:
        """Wait until the server has been closed."""
        if self._closed is None:
            await self.start()
        assert self._closed is not None  # noqa: S101
        await self._closed.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

    def __await__(self) -> Generator[Any, Any, Self]:
        return self.__aenter__().__await__()

    # --- what it says of itself ---------------------------------------------------------------------------------------

    @property
    def registry(self) -> Registry:
        """Where its numbers are."""
        return self.env.metrics  # type: ignore[return-value]  # `server_env` made it

    @property
    def events(self) -> Decisions:
        """What its layers decide, and why: ``server.events.listen(print)``."""
        return self.env.events

    def metrics(self) -> dict[str, float]:
        """Every number this server keeps, by name."""
        return self.registry.snapshot()

    def __repr__(self) -> str:
        where = self._address or self.env.name
        state = "closed" if self._closing else self._busy
        return f"server {self.env.label!r} on {where} ({self.env.protocol}, {state})\n" + self.stack.describe()
