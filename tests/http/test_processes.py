"""Apps in processes of their own, under real servers: what a deploy, a bad server or a leaving client does to them.

Nothing here depends on how fast the machine is: what must come is waited for, and requests go out by the clock whether
or not earlier ones have been answered.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections import Counter
from typing import Any

import anyio
import anyio.abc
import httpx
import pytest

import meshlib
from meshlib.http import Transport

from .processes import Worker, workers

pytestmark = pytest.mark.anyio
KINDS = [("uvicorn", "fastapi"), ("uvicorn", "starlette"), ("hypercorn", "fastapi")]
LONG = 30.0
"""Seconds that a paused machine is allowed."""


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"  # the processes are what differs here


# --- one server -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:2], ids="-".join)
async def test_on_sigterm_the_app_drains_before_the_server_hears_of_it(kind):
    async with workers(Worker(*kind, linger=LONG)) as (worker,), httpx.AsyncClient(timeout=LONG) as client:
        url = f"http://127.0.0.1:{worker.port}"
        assert (await client.get(f"{url}/readyz")).status_code == 200
        assert (await client.get(f"{url}/users/7")).json() == {"number": 7}
        worker.process.send_signal(signal.SIGTERM)
        with anyio.fail_after(LONG):
            while (await client.get(f"{url}/readyz")).status_code != 503:  # noqa: ASYNC110 - it tells nobody
                await anyio.sleep(0.01)
        reply = await client.get(f"{url}/users/8")
        assert reply.json() == {"number": 8}
        assert reply.headers["connection"] == "close"
        worker.process.send_signal(signal.SIGTERM)  # the second is passed on at once
        assert await worker.ended() == ""


async def test_what_is_under_way_at_sigterm_is_finished(kind):
    async with workers(Worker(*kind, linger=0.3)) as (worker,), httpx.AsyncClient(timeout=LONG) as client:
        url = f"http://127.0.0.1:{worker.port}"
        await client.get(f"{url}/users/1")
        async with anyio.create_task_group() as group:

            async def slow() -> None:
                assert (await client.get(f"{url}/slow/1.2")).status_code == 200

            group.start_soon(slow)
            await anyio.sleep(0.3)
            began = time.monotonic()
            worker.process.send_signal(signal.SIGTERM)
        out = await worker.ended()
        assert time.monotonic() - began >= 0.3
        assert out.split() == ["ended"]  # and nothing that looks like a crash


async def test_a_client_that_leaves_ends_the_work(kind):
    async with workers(Worker(*kind, linger=0)) as (worker,):
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.get(f"http://127.0.0.1:{worker.port}/slow/3600", timeout=0.5)
            assert await worker.line() == "ended\n"
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.ended() == ""


# --- several ----------------------------------------------------------------------------------------------------------


class Load:
    """Asks 200 times a second, come what may, and counts what comes."""

    RATE = 200

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.outcomes = Counter[Any]()
        self._client = client

    async def ask(self, number: int) -> None:
        try:
            self.outcomes[(await self._client.get(f"/users/{number}")).status_code] += 1
        except httpx.HTTPError as error:
            self.outcomes[repr(error)] += 1

    async def run(self, most: float = float("inf"), stop: anyio.Event | None = None) -> None:
        """Ask ``most`` times, or until ``stop`` is set; wait for all answers."""
        async with anyio.create_task_group() as group:
            began, number = anyio.current_time(), 0
            while number < most and not (stop is not None and stop.is_set()):
                group.start_soon(self.ask, number)
                number += 1
                await anyio.sleep(max(0.0, began + number / self.RATE - anyio.current_time()))


def client_of(target: str, *layers: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=Transport(target, *layers), base_url="http://users", timeout=LONG)


async def test_a_rolling_restart_of_three_servers_fails_nobody():
    old = [Worker(linger=0.5) for _ in range(3)]
    target = ",".join(f"127.0.0.1:{worker.port}" for worker in old)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(workers(*old))
        client = await stack.enter_async_context(client_of(target))
        load, stop = Load(client), anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(load.run, float("inf"), stop)
            for worker in old:
                await anyio.sleep(0.3)
                worker.process.send_signal(signal.SIGTERM)
                assert await worker.ended() == ""
                await stack.enter_async_context(workers(Worker(port=worker.port, linger=0.5)))
            await anyio.sleep(0.3)
            stop.set()
        assert set(load.outcomes) == {200}
        assert load.outcomes[200] > 300
        [below] = client._transport.clients
        assert below.metrics()["retries/requeues"] + below.metrics()["retries/retries"] < load.outcomes[200] / 20


async def bad_server(how: str) -> tuple[anyio.abc.Listener[Any], Any]:
    """A listener that answers 500, says nothing, or resets what it has accepted."""

    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            if how == "reset":
                raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    await stream.receive()
                    if how == "500":
                        await stream.send(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n")

    return await anyio.create_tcp_listener(local_host="127.0.0.1"), handle


async def test_three_bad_servers_among_three_good_ones_are_not_noticed():
    async with contextlib.AsyncExitStack() as stack:
        good = await stack.enter_async_context(workers(*(Worker() for _ in range(3))))
        ports = [worker.port for worker in good]
        bad_ones = [await bad_server(how) for how in ("500", "hang", "reset")]
        for listener, _ in bad_ones:
            await stack.enter_async_context(listener)
            ports.append(listener.extra(anyio.abc.SocketAttribute.local_port))
        group = await stack.enter_async_context(anyio.create_task_group())
        for listener, handle in bad_ones:
            group.start_soon(listener.serve, handle)
        target = ",".join(f"127.0.0.1:{port}" for port in ports)
        async with client_of(target, meshlib.timeout(attempt=1.0)) as client:
            load = Load(client)
            await load.run(1000)
            [below] = client._transport.clients
            numbers = below.metrics()
        group.cancel_scope.cancel()
    assert load.outcomes[200] >= 999, load.outcomes
    bad = [numbers[f"endpoints/127.0.0.1:{port}/requests"] for port in ports[3:]]
    assert min(bad) > 0  # each was met,
    assert sum(bad) < 100  # and left alone
