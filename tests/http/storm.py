"""Ten thousand requests, each cancelled at a moment that chance picks: nothing is left of them.

A caller asks one thing after another until it is cancelled: so all are, while they connect, shake hands, send, wait
and read, with bodies half read. The moment is a number of turns of the event loop for some, and a time for others, so
that the short steps are hit as well as the long ones. The servers are processes of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import ssl
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

import meshlib
from meshlib import http
from meshlib.client import Liveness, Transport

MOST = 40
"""Connections to the one endpoint, of which each caller needs one: most wait in line."""
PATHS = (
    "/status/200",
    "/large?n=100000",
    "/stream?n=2",
    "/status/200",
    "/slow?s=0.01",
    "/slow?s=60",
    "/stream?n=999&s=0.02",
)
QUICK = 3
"""The first of them answer at once."""
SHARES = {
    ("h1", "httpx"): 4_100,
    ("h1", "httpx2"): 4_100,
    ("tls", "httpx"): 100,
    ("tls", "httpx2"): 100,
    ("h2", "httpx"): 800,
    ("h2", "httpx2"): 800,
}
"""Of the ten thousand. TLS handshakes take much of the machine, and hypercorn its time."""
OTHERS = 0.1
"""The share of each on the loops other than asyncio's own."""


class Storm:
    """Calls the transport as httpx's client does; that itself would take a third of the time."""

    def __init__(self, httpx: Any, transport: Any, scheme: str, at_once: int, longest: float) -> None:
        self.transport, self.at_once, self.longest = transport, at_once, longest
        self.rng = random.Random(len(httpx.__name__))
        self.requests = [httpx.Request("GET", f"{scheme}://users.test{path}") for path in PATHS]
        self.remake = lambda old: httpx.Request("GET", old.url)
        self.cancelled = self.answered = self.broken_off = 0

    async def ask(self, until_answered: anyio.CancelScope | None = None) -> None:
        while True:
            request = self.remake(self.rng.choice(self.requests[:QUICK] if until_answered else self.requests))
            reply = await self.transport.handle_async_request(request)
            try:
                most = self.rng.choice((0, 1, 5, 1 << 30))
                async with contextlib.aclosing(aiter(reply.stream)) as parts:
                    async for _ in parts:
                        most -= 1
                        if most < 0:
                            self.broken_off += 1
                            break
            finally:
                await reply.aclose()
            self.answered += 1
            if until_answered:
                until_answered.cancel()

    async def one(self) -> None:
        moment = self.rng.random()
        with anyio.CancelScope() as scope:
            if moment < 0.05:
                await self.ask(scope)
            elif moment < 0.5:
                scope.deadline = anyio.current_time() + self.rng.uniform(0, self.longest)
                await self.ask()
            else:
                async with anyio.create_task_group() as group:
                    group.start_soon(self.ask)
                    for _ in range(self.rng.randrange(25)):
                        await anyio.lowlevel.checkpoint()
                    group.cancel_scope.cancel()
        self.cancelled += 1

    async def run(self, times: int) -> None:
        async def caller() -> None:
            for _ in range(times // self.at_once):
                await self.one()

        async with anyio.create_task_group() as group:
            for _ in range(self.at_once):
                group.start_soon(caller)


def sockets(port: int) -> int:
    """Those to that port that this process has open. What else it has open are other tests' threads to close."""
    ours = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - nothing but names is asked for
        with contextlib.suppress(OSError):
            ours.add(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text("ascii").splitlines()[1:]]
    return sum(line[2].endswith(f":{port:04X}") and f"socket:[{line[9]}]" in ours for line in lines)


async def until(holds: Any) -> None:
    with anyio.move_on_after(20):
        while not holds():  # noqa: ASYNC110 - it tells nobody
            await anyio.sleep(0.01)
    assert holds()


async def weather(way: str, name: str, port: int, certificate: tuple[str, str], loop: str) -> None:
    """Run the storm of one kind, and see what it has left."""
    least = 400 if way == "h2" else 100
    times = SHARES[way, name] if loop == "asyncio" else max(least, int(SHARES[way, name] * OTHERS))
    httpx = importlib.import_module(name)
    kind = http.Transport if name == "httpx" else http.Httpx2Transport
    scheme = "https" if way == "tls" else "http"
    verify = ssl.create_default_context(cafile=certificate[0])
    transport = kind(
        f"127.0.0.1:{port}",
        http.connections(most=MOST),
        meshlib.timeout(60.0),
        # Handshakes, and a server that is out of breath, on a machine that does other things as well.
        Transport(connect_timeout=20.0),
        Liveness(30.0, 30.0),
        verify=verify,
        http1=way != "h2",
        http2=way == "h2",
    )
    async with httpx.AsyncClient(transport=transport, timeout=40) as client:
        # hypercorn takes its time, and HTTP/2 has no use for more connections.
        storm = Storm(httpx, transport, scheme, *((80, 0.06) if way == "h2" else (50, 0.03)))
        await storm.run(times)
        assert storm.cancelled == times // storm.at_once * storm.at_once
        assert storm.answered
        assert storm.broken_off

        [below] = transport.clients
        [node] = below.endpoints
        pool = next(
            closer.__self__ for closer in node._env.closers if isinstance(closer.__self__, http.pool.WatermarkPool)
        )
        assert node.load == 0
        assert (pool._connecting, len(pool._waiting)) == (0, 0)
        assert all(session.lent == 0 for session in pool._all)
        assert len(pool._ready) == len(set(pool._ready)) == len(pool._all) <= MOST
        # Every slot can be used again, and no socket is open but those that are kept for that.
        async with anyio.create_task_group() as group:
            for _ in range(2 * MOST):
                group.start_soon(client.get, f"{scheme}://users.test/slow?s=0.01")
        await until(lambda: not pool._doomed and sockets(port) == len(pool._all))
        assert sockets(port) > 0
        assert node.load == 0
    await until(lambda: sockets(port) == 0)
    assert below.env.supervisor.jobs == 0
