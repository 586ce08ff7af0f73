"""No body of a try stays open that nobody will read: not of one that failed, lost a race, or was cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest

import meshlib
from meshlib import http, retry
from meshlib.core.supervisor import Supervisor
from meshlib.http import body as bodies
from meshlib.http.account import Account
from meshlib.http.core import core_of
from meshlib.http.pool import WatermarkPool

from ..conftest import BACKENDS
from .peers import until
from .raw import raw_server


def answer(status: int, *, whole: bool = True, more: bytes = b"") -> bytes:
    """A response with a transfer coding, so that its body is read after the call; perhaps it never ends."""
    head = b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n%s\r\n2\r\nok\r\n" % (status, more)
    return head + b"0\r\n\r\n" * whole


@contextlib.contextmanager
def answers(say: Callable[[int, bytes], bytes]) -> Iterator[str]:
    """A server that answers the n-th request as ``say(n, head)`` says; gives the address."""
    lock, count = threading.Lock(), 0

    def handle(connection: socket.socket) -> None:
        nonlocal count
        data = b""
        while more := connection.recv(65_536):
            data += more
            while b"\r\n\r\n" in data:
                head, _, data = data.partition(b"\r\n\r\n")
                with lock:
                    count += 1
                    number = count
                connection.sendall(say(number, head))

    with raw_server(handle) as port:
        yield f"127.0.0.1:{port}"


def in_use(transport: Any) -> list[int]:
    """Of each endpoint its load, and how many requests have a connection."""
    numbers = []
    for client in transport.clients:
        for node in client.endpoints:
            owners = (getattr(closer, "__self__", None) for closer in node._env.closers)
            [pool] = (owner for owner in owners if isinstance(owner, WatermarkPool))
            numbers += [node.load, sum(session.lent for session in pool._all)]
    return numbers


async def nothing_is_left(transport: Any) -> None:
    await until(lambda: not any(in_use(transport)))


async def test_failed_tries_of_a_filter_that_asks_twice():
    @meshlib.filter
    async def relogin(request, service):
        reply = await service(request)
        if reply.status_code == 401:
            await reply.aclose()
            reply = await service(request)
        return reply

    statuses = [401, 503, 200]
    with answers(lambda n, _: answer(statuses[(n - 1) % 3])) as target:
        transport = http.Transport(target, relogin, http.connections(most=2))
        async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
            for _ in range(5):
                assert (await client.get("/", timeout=5)).status_code == 200
            await nothing_is_left(transport)


@pytest.mark.parametrize("way", ["raises", "raises for the status", "is cancelled", "answers itself"])
async def test_a_reply_that_a_filter_does_not_pass_on(way):
    @meshlib.filter
    async def picky(request, service):
        reply = await service(request)
        if way == "raises for the status":
            reply.raise_for_status()
        if way == "is cancelled":
            await anyio.sleep(60)
        if way == "answers itself":
            return httpx.Response(200, content=b"mine")
        raise ValueError("no")

    with answers(lambda n, head: answer(404)) as target:
        transport = http.Transport(target, picky)
        async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
            for _ in range(3):
                if way == "is cancelled":
                    with anyio.move_on_after(0.1):
                        await client.get("/")
                elif way == "answers itself":
                    assert (await client.get("/")).text == "mine"
                else:
                    kind = httpx.HTTPStatusError if way == "raises for the status" else ValueError
                    with pytest.raises(kind):
                        await client.get("/")
            await nothing_is_left(transport)


async def test_a_filter_may_wrap_a_body():
    class Doubled(httpx.AsyncByteStream):
        def __init__(self, stream):
            self.stream = stream

        async def __aiter__(self):
            async for part in self.stream:
                yield part * 2

        async def aclose(self):
            await self.stream.aclose()

    @meshlib.filter
    async def doubled(request, service):
        reply = await service(request)
        return httpx.Response(reply.status_code, stream=Doubled(reply.stream))

    with answers(lambda n, head: answer(200)) as target:
        transport = http.Transport(target, doubled)
        async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
            assert (await client.get("/")).text == "okok"
            await nothing_is_left(transport)


async def test_a_shadow_is_sent_the_same_request_and_has_an_account_of_its_own():
    def say(number: int, head: bytes) -> bytes:
        time.sleep(0.01)  # the shadow is quicker
        return answer(503 if number % 3 else 200)

    with answers(say) as target, answers(lambda n, head: answer(200)) as dark:
        async with http.client(dark) as mirror:
            transport = http.Transport(target, meshlib.shadow(mirror, share=1))
            async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
                for _ in range(5):
                    assert (await client.get("/")).status_code == 200
                await nothing_is_left(transport)
                await nothing_is_left(mirror.transport)


async def test_both_copies_of_a_hedge_are_answered_in_one_moment():
    """Whichever reply the caller gets, the other's body is closed; a copy has won only if it is the copy's."""
    held: list[socket.socket] = []
    both = threading.Lock()

    def handle(connection: socket.socket) -> None:
        while head := connection.recv(65_536):
            if b"/slow" not in head:
                connection.sendall(answer(200))
                continue
            with both:
                held.append(connection)
                if len(held) == 2:
                    for each in held:
                        each.sendall(answer(200))
                    held.clear()

    with raw_server(handle) as port:
        transport = http.Transport(f"127.0.0.1:{port}", meshlib.hedge(extra_load=1.0))
        async with httpx.AsyncClient(transport=transport, base_url="http://users", timeout=10) as client:
            for _ in range(60):
                await client.get("/quick")
            await anyio.sleep(0.15)  # the quantile is read that often
            for _ in range(10):
                await client.get("/quick")
                assert (await client.get("/slow")).text == "ok"
            await nothing_is_left(transport)
            numbers = transport.metrics()
            assert numbers["hedges/sent"] >= 10 >= numbers["hedges/won"]


async def test_a_body_that_comes_when_the_call_is_over():
    """A filter has left a try behind, in the background."""
    jobs = Supervisor("test")
    outcomes: list[Any] = []
    over = anyio.Event()

    @meshlib.filter
    async def hasty(request, service):
        async def late():
            await over.wait()
            outcomes.append(await service(request))

        jobs.start(late, context=contextvars.copy_context())
        return httpx.Response(200, content=b"mine")

    with answers(lambda n, head: answer(200, whole=False)) as target:
        transport = http.Transport(target, hasty)
        async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
            assert (await client.get("/")).text == "mine"
            over.set()
            await until(lambda: outcomes)
            await nothing_is_left(transport)
        await jobs.aclose()


async def test_what_is_closed_already_is_not_closed_again():
    class Closed:
        closed = True

        async def aclose(self):
            raise AssertionError

    account = Account(Supervisor("test"), core_of("httpx").httpx.ByteStream, None)
    assert account.add(Closed())
    account.end(None)
    assert not account.add(Closed())


# --- cancellations that no scope of ours shields from -----------------------------------------------------------------


on_asyncio = pytest.mark.parametrize(
    "anyio_backend", [BACKENDS["asyncio"], BACKENDS["uvloop"]], ids=["asyncio", "uvloop"], indirect=True
)


@on_asyncio
async def test_a_cancellation_while_the_bodies_of_failed_tries_are_closed(monkeypatch):
    """Where one comes, the reply that was chosen is lost as well."""
    task: asyncio.Task[Any] | None = None
    close = bodies.Body.aclose

    async def closing(self: Any) -> None:
        nonlocal task
        if task is not None:
            asyncio.get_running_loop().call_soon(task.cancel)
            task = None
        await close(self)

    monkeypatch.setattr(bodies.Body, "aclose", closing)
    with answers(lambda n, head: answer(200) if n % 2 == 0 else answer(503, whole=False)) as target:
        transport = http.Transport(target, retry(attempts=2, wait=0), http.connections(most=1000))
        async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
            for _ in range(20):
                task = asyncio.ensure_future(client.get("/"))
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await nothing_is_left(transport)


@on_asyncio
async def test_cancellations_at_any_moment():
    def say(number: int, head: bytes) -> bytes:
        return answer(503, whole=False) if number % 2 else answer(200)

    with answers(say) as target:
        transport = http.Transport(target, retry(attempts=2, wait=0), http.connections(most=1000))
        async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
            for turns in range(120):
                task = asyncio.ensure_future(client.get("/"))
                for _ in range(turns):
                    await asyncio.sleep(0)
                    if turns > 60:
                        await asyncio.sleep(0.0002)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await nothing_is_left(transport)
