"""A TCP proxy that does to real connections what networks do to them, for tests against real processes.

It listens on a port of its own and hands each connection on. What is wrong is said by assigning to a `Direction`
(``toxics.py``), or by `FaultProxy.reset`, `disable` and `enable`, while it runs. The sockets are its own, not the event
loop's streams: a reset must be a reset (RST by SO_LINGER 0), without the orderly end that streams send first.

Each direction of each connection reads ahead by a bounded number of bytes; beyond it, the sender meets TCP's own
back-pressure. A reset on one side is handed on as a reset, an end as an end, one direction at a time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import socket
import struct
from collections import deque
from types import TracebackType
from typing import Self

import anyio

from ..core.errors import ConfigurationError, ServiceClosed
from ..core.supervisor import Supervisor
from ..names.addr import Address
from .toxics import Direction

__all__ = ["FaultProxy"]

logger = logging.getLogger("meshlib.testing")

CHUNK = 65536
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER, on, for no time: closing sends RST and forgets what was not sent (socket(7))."""
GONE = (OSError, anyio.ClosedResourceError)
"""What a socket says whose peer has reset it, or that we have closed ourselves."""
NOT_NOW = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINPROGRESS, errno.EINTR)


class FaultProxy:
    """A proxy in front of a TCP server. ``async with FaultProxy("127.0.0.1:9000") as proxy``, or start and close it.

    Args:
        target: Where to hand connections on: ``host:port``.
        address: Where to listen; port 0 takes a free one.
        seed: Of jitter and slices.
        buffer: Bytes that a direction of a connection may hold, such as those under way because of its latency. With a
            latency, no more than ``buffer / latency`` bytes a second can pass.

    Attributes:
        upstream: What is wrong from clients to the server.
        downstream: What is wrong from the server to clients.
        accepted: How many connections were accepted, ever.

    Raises:
        ConfigurationError: An address is no ``host:port``, or the buffer is not above 0.
    """

    def __init__(
        self, target: str, address: str = "127.0.0.1:0", *, seed: int | None = None, buffer: int = 1 << 20
    ) -> None:
        self._target, self._listen_on = Address.parse(target), Address.parse(address)
        if self._target.path or self._listen_on.path:
            raise ConfigurationError(f"FaultProxy({target!r}, {address!r}): give host:port; it speaks TCP alone")
        if isinstance(buffer, bool) or not isinstance(buffer, int) or buffer < 1:
            raise ConfigurationError(f"FaultProxy(buffer={buffer!r}): give a number of bytes, 1 or more")
        self.buffer = buffer
        self.rng = random.Random(seed)
        self.upstream = Direction("upstream")
        self.downstream = Direction("downstream")
        self.accepted = 0
        self._supervisor = Supervisor(f"proxy to {target}")
        self._links: set[_Link] = set()
        self._listener: socket.socket | None = None
        self._bound: tuple[str, int] | None = None

    @property
    def address(self) -> str:
        """Where it listens, ``host:port``; the same after `disable` and `enable`.

        Raises:
            ServiceClosed: It has not been started.
        """
        if self._bound is None:
            raise ServiceClosed("the proxy has not been started; use `async with`")
        return str(Address(*self._bound))

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._links)

    def start(self) -> None:
        """Listen. Needs a running event loop; starting twice is the same as starting once.

        Raises:
            OSError: The address cannot be bound.
            ServiceClosed: It has been closed.
        """
        if self._supervisor.closed:
            raise ServiceClosed("the proxy has been closed")
        if self._listener is not None:
            return
        host, port = self._bound or (self._listen_on.host, self._listen_on.port)
        # The port is taken again after `disable`, while old connections linger in TIME_WAIT.
        listener = socket.create_server((host, port), family=_family(host), backlog=128)
        listener.setblocking(False)
        self._listener, self._bound = listener, listener.getsockname()[:2]
        self._supervisor.start(self._accept_from, listener, name="accept")

    def enable(self) -> None:
        """Accept connections again, at the same address."""
        self.start()

    def disable(self) -> None:
        """As a crash of the server's process: connections are reset, and new ones refused, until `enable`."""
        if self._listener is not None:
            _close(self._listener)
            self._listener = None
        self.reset()

    def reset(self) -> None:
        """Reset every connection now, on both sides, as a peer or a middlebox that has lost its memory does."""
        for link in tuple(self._links):
            link.end(reset=True)

    def heal(self) -> None:
        """Nothing is wrong any more; what was held back arrives."""
        self.upstream.heal()
        self.downstream.heal()
        if self._bound is not None:
            self.enable()

    async def aclose(self) -> None:
        """Stop listening and close every connection. Closing twice is the same as closing once."""
        if self._listener is not None:
            _close(self._listener)
            self._listener = None
        for link in tuple(self._links):
            link.end()
        await self._supervisor.aclose()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

    async def _accept_from(self, listener: socket.socket) -> None:
        while listener is self._listener:
            try:
                await anyio.wait_readable(listener)
                client, _ = listener.accept()
            except anyio.ClosedResourceError:
                return
            except OSError as error:
                if listener is not self._listener:
                    return
                if error.errno not in (*NOT_NOW, errno.ECONNABORTED):
                    logger.error("%r cannot accept a connection: %s; waiting", self, error)
                    await anyio.sleep(0.1)
                continue
            self.accepted += 1
            client.setblocking(False)
            link = _Link(self, client)
            self._links.add(link)
            self._supervisor.start(self._run, link, name="connection")

    async def _run(self, link: _Link) -> None:
        try:
            await link.run(self._target)
        finally:
            link.close()
            self._links.discard(link)

    def __repr__(self) -> str:
        where = "not started" if self._bound is None else self.address
        state = "" if self._listener is not None or self._bound is None else ", disabled"
        return (
            f"<FaultProxy {where} -> {self._target}{state}: {len(self._links)} connections, "
            f"{self.upstream!r}, {self.downstream!r}>"
        )


class _Link:
    """One connection: the client's socket, the server's, and what goes between them."""

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server: socket.socket | None = None
        self._scope = anyio.CancelScope()
        self._reset = False

    async def run(self, target: Address) -> None:
        """Connect to the server, and carry bytes until both directions have ended."""
        with self._scope:
            server = await self._connect(target)
            if server is None:
                self.end(reset=True)
                return
            self._server = server
            proxy = self._proxy
            async with anyio.create_task_group() as group:
                for direction, source, sink in (
                    (proxy.upstream, self._client, server),
                    (proxy.downstream, server, self._client),
                ):
                    flow = _Flow(self, direction, source, sink, proxy.buffer, proxy.rng)
                    group.start_soon(flow.read)
                    group.start_soon(flow.write)

    async def _connect(self, target: Address) -> socket.socket | None:
        """A connection to the server, or nothing when there is none to be had."""
        try:
            found = await anyio.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        except OSError as error:
            logger.warning("%r cannot resolve its target: %s", self._proxy, error)
            return None
        for family, kind, proto, _, where in found:
            try:
                server = socket.socket(family, kind, proto)
            except OSError:  # a family that this machine does not speak
                continue
            try:
                server.setblocking(False)
                if server.connect_ex(where) in (0, *NOT_NOW):
                    await anyio.wait_writable(server)
                    if server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                        return server
            except BaseException:
                _close(server)
                raise
            _close(server)
        return None

    def end(self, *, reset: bool = False) -> None:
        """Carry no more, whatever is under way, and close both sides. The first to say how decides."""
        if not self._scope.cancel_called:
            self._reset = reset
            self._scope.cancel()

    def close(self) -> None:
        """Close both sides, when nobody waits on them any more."""
        for side in (self._client, self._server):
            if side is not None:
                _close(side, reset=self._reset)


class _Flow:
    """One direction of one connection. The reader stamps what it reads with a time of arrival; the writer keeps it."""

    def __init__(
        self,
        link: _Link,
        direction: Direction,
        source: socket.socket,
        sink: socket.socket,
        buffer: int,
        rng: random.Random,
    ) -> None:
        self._link = link
        self._direction = direction
        self._source = source
        self._sink = sink
        self._room = buffer
        self._rng = rng
        self._held: deque[tuple[float, bytes]] = deque()
        self._latest = 0.0
        self._passed = 0
        self._changed = anyio.Event()

    async def read(self) -> None:
        """Read ahead, as far as there is room."""
        while True:
            while self._room <= 0:
                await self._changed.wait()
            try:
                await anyio.wait_readable(self._source)
                data = self._source.recv(min(CHUNK, self._room))
            except BlockingIOError:
                continue
            except GONE:
                self._link.end(reset=True)
                return
            # Whatever the jitter, a byte does not overtake those before it.
            self._latest = max(self._latest, anyio.current_time() + self._direction.under_way(self._rng))
            self._held.append((self._latest, data))
            self._room -= len(data)
            self._notify()
            if not data:
                return

    async def write(self) -> None:
        """Hand on what is due."""
        while True:
            while not self._held:
                await self._changed.wait()
            due, data = self._held.popleft()
            wait = due - anyio.current_time() + (0.0 if data else self._direction.slow_close)
            if wait > 0:
                await anyio.sleep(wait)
            if not data:
                await self._flowing()
                with contextlib.suppress(OSError):  # it has ended by itself
                    self._sink.shutdown(socket.SHUT_WR)
                return
            rest = memoryview(data)
            while rest:
                await self._flowing()
                size = self._direction.piece(len(rest), self._rng)
                left, reset = self._direction.cut(self._passed)
                if left is not None:
                    size = min(size, left)
                if size and not await self._send(rest[:size]):
                    return
                self._passed += size
                if left is not None and size == left:
                    self._link.end(reset=reset)
                    return
                rest = rest[size:]
                if pause := self._direction.pause(size):
                    await anyio.sleep(pause)
            self._room += len(data)
            self._notify()

    async def _flowing(self) -> None:
        while self._direction.stalled:
            await self._direction.change()

    async def _send(self, data: memoryview) -> bool:
        while data:
            try:
                await anyio.wait_writable(self._sink)
                data = data[self._sink.send(data) :]
            except BlockingIOError:
                continue
            except GONE:
                self._link.end(reset=True)
                return False
        return True

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _close(side: socket.socket, *, reset: bool = False) -> None:
    if reset:
        with contextlib.suppress(OSError):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    with contextlib.suppress(RuntimeError):  # no event loop runs any more, and so nobody waits
        anyio.notify_closing(side)
    side.close()
