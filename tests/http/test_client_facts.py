"""What the client's layers know of requests that filters change, of connections that grow old, and of refusals."""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import anyio
import h2.events
import httpx
import pytest

import meshlib
from meshlib import http, timeout
from meshlib.client import Transport as Wire
from meshlib.http import transport as transports

from .peers import Peer, asked, until
from .raw import blackhole, raw_server
from .servers import application, serving
from .test_client_edges import pool_of
from .test_transport import Scripted

# --- filters ----------------------------------------------------------------------------------------------------------


def changed(request: Any, way: str) -> Any:
    if way == "another request":
        return httpx.Request(request.method, request.url, headers=request.headers, extensions=request.extensions)
    if way == "a key":
        request.headers["idempotency-key"] = "1"
    elif way == "says yes":
        request.idempotent = True
    elif way == "says no":
        request.idempotent = False
    return request


@pytest.mark.parametrize(
    ("method", "way", "tries"),
    [
        ("GET", "another request", 2),
        ("POST", "another request", 1),
        ("POST", "a key", 2),
        ("POST", "says yes", 2),
        ("GET", "says no", 1),
        ("POST", "nothing", 1),
    ],
)
async def test_what_a_filter_passes_on_is_what_counts(method, way, tries):
    @meshlib.filter
    async def change(request, service):
        return await service(changed(request, way))

    app = Scripted((503, {}), (200, {}))
    with serving(app) as url:
        async with httpx.AsyncClient(transport=http.Transport(url[7:], change), base_url="http://users") as client:
            reply = await client.request(method, "/")
    assert (len(app.requests), reply.status_code) == (tries, 200 if tries == 2 else 503)


async def test_filters_may_ask_a_reply_for_its_request():
    @meshlib.filter
    async def strict(request, service):
        reply = await service(request)
        reply.raise_for_status()
        return reply

    with serving(application) as url:
        async with httpx.AsyncClient(transport=http.Transport(url[7:], strict), base_url="http://users") as client:
            assert (await client.get("/status/200")).status_code == 200
            with pytest.raises(httpx.HTTPStatusError, match="404"):
                await client.get("/status/404")


# --- the service form -------------------------------------------------------------------------------------------------


async def test_the_service_form_reads_bodies_within_the_total(monkeypatch):
    monkeypatch.setattr(transports, "DEFAULT_TOTAL", 0.3)

    def handle(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
        while connection.recv(65_536):  # the rest never comes
            pass

    with raw_server(handle) as port:
        async with http.client(f"127.0.0.1:{port}") as client:
            with anyio.fail_after(20), pytest.raises(meshlib.DeadlineExceeded):
                await client(httpx.Request("GET", "http://users/"))
        for layers, limit in (((), 0.3), ((timeout(7),), 7), ((timeout(None),), None)):
            assert http.client("users:1", *layers).transport.body_limit == limit


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"retry-after": "3600"}])
async def test_too_many_requests_of_one_kind_hold_back_no_others(headers):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        status = 429 if scope["path"] == "/limited" else 200
        more = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0"), *more]})
        await send({"type": "http.response.body"})

    seen: Counter[tuple[str, int]] = Counter()
    with serving(app) as url:
        transport = http.Transport(url[7:])
        async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
            for _ in range(20):
                for path in ("limited", "limited", "limited", "fine"):
                    seen[path, (await client.post(f"/{path}")).status_code] += 1
            assert transport.metrics()["throttle/throttled"] == 0
    assert seen == {("limited", 429): 60, ("fine", 200): 20}


# --- connects ---------------------------------------------------------------------------------------------------------


async def test_the_haste_of_one_request_takes_no_endpoint_from_the_others():
    with blackhole() as port:
        transport = http.Transport(f"127.0.0.1:{port}", Wire(connect_timeout=0.3), timeout(0.8))
        async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
            for _ in range(3):
                with pytest.raises(httpx.ConnectTimeout) as caught:
                    await client.get("/", timeout=httpx.Timeout(5, connect=0.02))
                assert len(caught.value.attempts) == 1
            assert transport.metrics()["failfast/marked_dead"] == 0
            with pytest.raises(httpx.ConnectTimeout):
                await client.get("/", timeout=5)
            assert transport.metrics()["failfast/marked_dead"] == 1


async def test_a_hasty_request_is_tried_once_with_each_endpoint():
    with blackhole() as one, blackhole() as two:
        transport = http.Transport(f"127.0.0.1:{one},127.0.0.1:{two}")
        async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
            with pytest.raises(httpx.ConnectTimeout) as caught:
                await client.get("/", timeout=httpx.Timeout(5, connect=0.02))
    assert {attempt.endpoint for attempt in caught.value.attempts} == {f"127.0.0.1:{one}", f"127.0.0.1:{two}"}
    assert len(caught.value.attempts) == 2


# --- age --------------------------------------------------------------------------------------------------------------


async def held(peer: Peer, event: Any) -> None:
    """The first request of all is not answered to its end."""
    if isinstance(event, h2.events.RequestReceived):
        await peer.answer(event.stream_id, end=dict(event.headers or ())[b":path"] != b"/held")


async def test_a_shared_connection_that_is_old_has_no_more_requests():
    async with asked(held, http.connections(age=0.2)) as (server, client):
        async with client.stream("GET", "/held"):
            await client.get("/")
            assert len(server.peers) == 1
            pool = pool_of(client)
            [old] = pool._all
            await anyio.sleep(0.25)
            await client.get("/")
            assert len(server.peers) == 2
            assert (old.lent, old.listed) == (1, False)
        await until(lambda: old not in pool._all)


async def test_where_there_is_room_for_one_connection_it_goes_on():
    async with asked(held, http.connections(most=1, age=0.05)) as (server, client):
        async with client.stream("GET", "/held"):
            await anyio.sleep(0.1)
            for _ in range(3):
                await client.get("/", timeout=httpx.Timeout(5, pool=5))
            assert len(server.peers) == 1
        await client.get("/")
        assert len(server.peers) == 2


# --- numbers ----------------------------------------------------------------------------------------------------------


async def test_the_numbers_of_clients_that_share_a_name_are_told_apart():
    with serving(application) as url:
        transport = http.Transport(meshlib.base_dtab(f"/s/users => {url[7:]}"))
        async with httpx.AsyncClient(transport=transport) as client:
            for _ in range(3):
                await client.get("http://users:8080/status/200")
            await client.get("http://users:9090/status/200")
            await client.get(f"{url}/status/200")
            await client.get(f"{url}/status/200", extensions={"sni_hostname": "a.test"})
            numbers = transport.metrics()
    counted = {name: number for name, number in numbers.items() if name.endswith("/requests") and "endp" not in name}
    assert counted == {
        "http://users:8080/s/users/requests": 3,
        "http://users:9090/s/users/requests": 1,
        f"{url}/requests": 1,
        f"{url};sni=a.test/requests": 1,
    }


async def test_with_a_target_the_numbers_keep_their_names():
    with serving(application) as url:
        transport = http.Transport(url[7:], timeout(5))
        async with httpx.AsyncClient(transport=transport) as client:
            await client.get("http://users/status/200")
            assert transport.metrics()["requests"] == 1
            with pytest.raises(httpx.TransportError):
                await client.get("https://users/", timeout=0.2)
            assert (transport.metrics()["requests"], transport.metrics()["https://users/requests"]) == (1, 1)
