"""What goes wrong only where two things meet: hedges and files, many names at once, lengths that lie, a full pool."""

from __future__ import annotations

import copy
import io
import pickle
import socket
from collections import Counter
from typing import Any

import anyio
import httpx
import httpx2
import pytest

import meshlib
from meshlib import http, retry, timeout
from meshlib.http import transport as transports
from meshlib.http.pool import WatermarkPool

from .raw import raw_server
from .servers import application, read_body, serving


def only(client: httpx.AsyncClient) -> Any:
    [one] = client._transport.clients  # type: ignore[attr-defined]
    return one


def pool_of(client: httpx.AsyncClient) -> WatermarkPool:
    [node] = only(client).endpoints
    return next(each.__self__ for each in node._env.closers if isinstance(each.__self__, WatermarkPool))


def client_of(*args: Any, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=http.Transport(*args, **options), base_url="http://users")


# --- hedges and files -------------------------------------------------------------------------------------------------


async def test_two_copies_never_read_one_file():
    bodies: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await read_body(receive)
        if scope["method"] == "PUT":
            bodies.append(body)
            await anyio.sleep(0.3)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    with serving(app) as url:
        async with client_of(url[7:], meshlib.hedge(0.5)) as client:
            for _ in range(60):
                await client.get("/")
            await anyio.sleep(0.15)  # the quantile is read that often
            await client.get("/")
            reply = await client.put("/", files={"file": ("name", io.BytesIO(b"x" * 100_000))})
            assert (reply.status_code, len(bodies)) == (200, 1)
            sent = only(client).metrics()["hedges/sent"]
            await client.put("/", content=b"bytes")
            assert (bodies.count(b"bytes"), only(client).metrics()["hedges/sent"]) == (2, sent + 1)


# --- many names -------------------------------------------------------------------------------------------------------


async def test_a_name_with_requests_under_way_is_not_forgotten(monkeypatch):
    monkeypatch.setattr(transports, "MOST_NAMES", 2)
    with serving(application) as url:
        async with httpx.AsyncClient(transport=http.Transport()) as client:
            replies: list[str] = []

            async def one(number: int) -> None:  # the name that a certificate must have makes it another client
                extensions = {"sni_hostname": f"users{number}.test"}
                replies.append((await client.get(f"{url}/slow?s=0.3", extensions=extensions)).text)

            async with anyio.create_task_group() as group:
                for number in range(6):
                    group.start_soon(one, number)
            assert replies == ["late"] * 6
            assert len(client._transport.clients) == 6  # type: ignore[attr-defined]
            async with client.stream("GET", f"{url}/stream?n=9&s=0.01", extensions={"sni_hostname": "read"}) as reply:
                await client.get(f"{url}/status/200")
                assert len(client._transport.clients) == 2  # type: ignore[attr-defined]
                await client.get(f"{url}/status/200", extensions={"sni_hostname": "another"})
                assert (await reply.aread())[-3:] == b"end"
            assert len(client._transport.clients) == 2  # type: ignore[attr-defined]


# --- lengths ----------------------------------------------------------------------------------------------------------


# httpx leaves the generators of bodies unclosed, stock or not, of which trio warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_length_beside_a_transfer_coding_says_nothing():
    """Such a body is read as a stream, and not gathered for as long as it goes on."""

    def handle(connection: socket.socket) -> None:
        connection.recv(65_536)
        head = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head + b"3\r\nabc\r\n")
        while connection.recv(65_536):  # the rest never comes
            pass

    with raw_server(handle) as port:
        async with client_of(f"127.0.0.1:{port}") as client:
            with anyio.fail_after(10):
                async with client.stream("GET", "/") as reply:
                    async for part in reply.aiter_raw():
                        assert part == b"abc"
                        break


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "limit"),
    [((), None), ((timeout(30),), 30), ((timeout(7),), 7), ((timeout(None),), None), ((timeout(attempt=1),), None)],
)
def test_a_total_that_the_user_gives_is_for_bodies_too_whatever_it_is(layers, limit):
    assert http.Transport("users:1", *layers).body_limit == limit
    assert http.Transport("users:1", stack=lambda stack: stack.with_layers(*layers)).body_limit == limit


async def test_the_default_total_does_not_bound_a_body(monkeypatch):
    monkeypatch.setattr(transports, "DEFAULT_TOTAL", 0.3)
    with serving(application) as url:
        async with client_of(url[7:], propagate=False) as client:
            assert (await client.get("/stream?n=10&s=0.06")).text.endswith("end")
            with pytest.raises(httpx.TimeoutException):
                await client.get("/slow?s=5")


# --- errors and answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [httpx, httpx2])
async def test_errors_can_be_pickled_and_copied(module):
    kind = http.Transport if module is httpx else http.Httpx2Transport
    async with module.AsyncClient(transport=kind("127.0.0.1:1", timeout(total=0.3))) as client:
        with pytest.raises(module.TransportError) as caught:
            await client.get("http://users/x")
    for again in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert type(again) is type(caught.value)
        assert str(again) == str(caught.value)
        assert again.attempts == caught.value.attempts
        assert str(again.request.url) == "http://users/x"


async def test_an_answer_says_what_was_tried():
    with serving(application) as url:
        async with client_of(url[7:], retry(attempts=2)) as client:
            reply = await client.get("/status/503")
    attempts = reply.extensions["meshlib"]["attempts"]
    assert [each.endpoint for each in attempts] == [url[7:]] * 2
    assert all("503" in each.outcome for each in attempts)


# --- a full pool ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "callers"), [(1, 4), (3, 10)])
async def test_a_full_pool_serves_all_in_turn(most, callers):
    turns = Counter[int]()
    with serving(application) as url:
        async with client_of(url[7:], http.connections(most=most)) as client, anyio.create_task_group() as group:

            async def caller(number: int) -> None:
                while True:
                    await client.get("/status/200")
                    turns[number] += 1
                    if turns.total() >= 20 * callers:
                        group.cancel_scope.cancel()

            for number in range(callers):
                group.start_soon(caller, number)
    # In strict turn none can be ahead of another by more than the requests that are under way, which may overtake.
    assert len(turns) == callers
    assert max(turns.values()) - min(turns.values()) <= most + 1


async def test_a_turn_that_is_not_wanted_any_more_is_the_next_ones():
    with serving(application) as url:
        async with client_of(url[7:], http.connections(most=1)) as client, anyio.create_task_group() as group:
            replies: list[int] = []
            gone = anyio.CancelScope()

            async def leaves() -> None:
                with gone:
                    await client.get("/status/200")
                    replies.append(0)

            async def stays() -> None:
                replies.append((await client.get("/status/200")).status_code)

            async with client.stream("GET", "/large?n=100000") as reply:
                pool = pool_of(client)
                for task in (leaves, stays):
                    before = len(pool._waiting)
                    group.start_soon(task)
                    while len(pool._waiting) == before:  # noqa: ASYNC110 - it tells nobody
                        await anyio.sleep(0.001)
                body: Any = reply.stream
                while hasattr(body, "_stream"):
                    body = body._stream
                body.on_end(lambda _error: gone.cancel())  # right after the connection was given to the first in line
                await reply.aread()
            with anyio.fail_after(10):
                while not replies:  # noqa: ASYNC110 - it tells nobody
                    await anyio.sleep(0.001)
            assert replies == [200]
            assert (len(pool._waiting), pool._connecting) == (0, 0)
            assert all(session.lent == 0 for session in pool._all)
