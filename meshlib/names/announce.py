"""Announcing: a server says where it is, for as long as it is there.

An *announcer* is one async generator, the mirror image of a resolver: it yields each time it has announced an address,
and withdraws it when it is closed. `Announcement` runs it in the background: a registry that cannot be reached keeps no
server from starting, since it is tried again after jittered waits, and says so meanwhile.

Withdrawing comes first when a server closes: clients learn that it is going while it still answers, so that nobody has
to find out by a refused connection. Finagle: Announcer.scala.
"""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import AsyncGenerator, Iterable
from types import TracebackType
from typing import Final, Protocol

import anyio

from ..core.errors import ConfigurationError
from ..core.supervisor import Job, Supervisor
from .addr import Address
from .resolver import Room, load
from .static import parse_address
from .target import Target, redacted

__all__ = ["Announcement", "Announcements", "Announcer", "announce", "announcer_for", "reachable"]

logger = logging.getLogger("meshlib.names")

GROUP: Final = "meshlib.announcers"
AGAIN_FIRST, AGAIN_LAST = 1.0, 60.0
"""Seconds until a failed announcement is tried again, doubling, jittered by half (Finagle's: 1 s to 1 min)."""
GOODBYE: Final = 2.0
"""Seconds that withdrawing may take. A registry that is down finds out by itself, by the end of a session or a lock."""
ELSEWHERE: Final = ("192.0.2.1", 9)
"""An address of nobody (RFC 5737): asking for the way there sends nothing, and tells which of ours would be used."""


class Announcer(Protocol):
    """How an address is announced in a scheme."""

    def announce(self, target: Target, address: Address) -> AsyncGenerator[None, None]:
        """Announce, yield, and see to it that it stays announced; yield again if it had to be renewed.

        Withdraw it when closed; raise when broken.
        """
        ...


_ROOMS: Final[dict[str, Room]] = {
    "file": Room("members", "FileAnnouncer"),
    "zk": Room("zookeeper", "ZooKeeperAnnouncer", "kazoo", "zookeeper"),
}


def announcer_for(target: Target) -> Announcer:
    """The announcer of the target's scheme.

    Raises:
        ConfigurationError: There is none, its package is missing, or nothing can be announced at the target.
    """
    room = _ROOMS.get(target.scheme)
    if room is None:
        from importlib.metadata import entry_points  # 10 ms, which those who stay with the built-in ones are spared

        found = entry_points(group=GROUP)
        for entry in found:
            if entry.name == target.scheme:
                other: Announcer = entry.load()()
                return other
        known = ", ".join(f"{scheme}://" for scheme in sorted({*_ROOMS, *found.names}))
        raise ConfigurationError(f"announce={str(target)!r}: nobody announces there; it can be done at {known}")
    announcer: Announcer = load(room, target.scheme)
    check = getattr(announcer, "check", None)
    if check is not None:
        check(target)
    return announcer


class Announcement:
    """An address that is being announced.

    Args:
        target: Where.
        address: What.
        supervisor: Where its work is done.
        rng: Its chance.

    Attributes:
        announced: It is, as far as is known.
        problem: Why it is not; empty when it is, or when nothing is known yet.

    Raises:
        ConfigurationError: Nothing can be announced at the target.
    """

    def __init__(self, target: str, address: Address, supervisor: Supervisor, rng: random.Random) -> None:
        self.target = Target.parse(target)
        self.address = address
        self.announced = False
        self.problem = ""
        self.failures = 0
        self._announcer = announcer_for(self.target)
        self._supervisor, self._rng = supervisor, rng
        self._job: Job | None = None
        self._settled = anyio.Event()
        self._ended = anyio.Event()

    def start(self) -> None:
        """Begin. Twice is the same as once."""
        if self._job is None:
            self._job = self._supervisor.start(self._run, name=f"announce at {self.target}")

    async def wait_announced(self) -> None:
        """Wait until it was announced for the first time."""
        await self._settled.wait()

    async def _run(self) -> None:
        wait = AGAIN_FIRST
        try:
            while True:
                source = self._announcer.announce(self.target, self.address)
                try:
                    async for _ in source:
                        wait = AGAIN_FIRST
                        if self.problem:
                            logger.info("%s: announced again at %s", self.address, self.target)
                        self.announced, self.problem = True, ""
                        self._settled.set()
                    return
                except Exception as error:
                    self._broken(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
                finally:
                    self.announced = False
                    with anyio.move_on_after(GOODBYE, shield=True):
                        await source.aclose()
                await anyio.sleep(wait * self._rng.uniform(0.5, 1.0))
                wait = min(2 * wait, AGAIN_LAST)
        finally:
            self._ended.set()

    def _broken(self, problem: str) -> None:
        self.failures += 1
        if problem != self.problem:
            logger.warning("%s is not announced at %s: %s; trying again", self.address, self.target, problem)
        self.problem = problem

    async def withdraw(self) -> None:
        """End it, and wait until it is withdrawn: for a few seconds at most, if nobody answers."""
        if self._job is not None:
            self._job.cancel()
            with anyio.move_on_after(2 * GOODBYE):
                await self._ended.wait()

    def __repr__(self) -> str:
        state = "announced" if self.announced else f"not announced: {self.problem or 'on its way'}"
        return f"<{self.address} at {self.target}: {state}>"


class announce:  # noqa: N801 - reads as a function: async with meshlib.announce(…)
    """Announce an address while the body runs: ``async with meshlib.announce("zk://…/greeter", "10.0.0.7:9000"):``.

    The body begins once it is announced. For a server of this library, ``serve(…, announce="zk://…")`` does it at the
    right moments.

    Args:
        target: Where: ``zk://hosts/path[!endpoint]`` or ``file:///directory/``.
        address: What: ``host:port``, perhaps with settings (``?weight=2&zone=eu-1``), or an `Address`.

    Raises:
        ConfigurationError: One of these makes no sense.
    """

    def __init__(self, target: str, address: str | Address) -> None:
        self._supervisor = Supervisor(f"announce at {redacted(target)}")
        self._address = parse_address(address) if isinstance(address, str) else address
        self._announcement = Announcement(target, self._address, self._supervisor, random.Random())

    async def __aenter__(self) -> Announcement:
        self._announcement.start()
        try:
            await self._announcement.wait_announced()
        except BaseException:
            await self._close()
            raise
        return self._announcement

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._announcement.withdraw()
            await self._supervisor.aclose()


class Announcements:
    """All that one server announces: from when it listens until just before it drains."""

    def __init__(self, targets: str | Iterable[str], label: str, rng: random.Random) -> None:
        self.targets = (targets,) if isinstance(targets, str) else tuple(targets)
        for target in self.targets:
            announcer_for(Target.parse(target))  # what makes no sense is told now
        self._rng = rng
        self._supervisor = Supervisor(f"announcements of {label}")
        self.each: tuple[Announcement, ...] = ()

    def start(self, address: Address) -> None:
        """Begin."""
        self.each = tuple(Announcement(target, address, self._supervisor, self._rng) for target in self.targets)
        for announcement in self.each:
            announcement.start()

    async def withdraw(self) -> None:
        """Withdraw all of them, at the same time."""
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                for announcement in self.each:
                    group.start_soon(announcement.withdraw)
            await self._supervisor.aclose()


def reachable(address: str) -> Address:
    """What others are to be told of a server that listens at ``address``: for all addresses, the one that leads out.

    Raises:
        ConfigurationError: It cannot be known.
    """
    if address.startswith("unix://"):
        return Address.parse(address)
    found = parse_address(address)
    if found.host not in ("0.0.0.0", "::", ""):  # noqa: S104 - it is asked for, not bound
        return found
    family = socket.AF_INET6 if found.host == "::" else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("2001:db8::1", 9) if family == socket.AF_INET6 else ELSEWHERE)
            host = probe.getsockname()[0]
        except OSError as error:
            raise ConfigurationError(
                f"a server that listens at {address} cannot say where it is ({error.strerror}); give the address that "
                "others are to use: serve(…, advertise='10.0.0.7:9000')"
            ) from error
    return Address(host, found.port, weight=found.weight, metadata=found.metadata)
