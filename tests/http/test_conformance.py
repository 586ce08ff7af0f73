"""What httpx documents holds: the same tests through its own transport and through ours."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import anyio
import pytest

from meshlib import http

from ..conftest import BACKENDS
from .servers import application, serving


@pytest.fixture(scope="module", params=[BACKENDS["asyncio"], BACKENDS["trio"]], ids=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """What httpx knows; to it uvloop is asyncio."""
    return request.param


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(application) as url:
        yield url


@pytest.fixture(params=["httpx", "httpx2"])
def httpx(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


def ours(httpx: Any, *args: Any, **options: Any) -> Any:
    kind = http.Transport if httpx.__name__ == "httpx" else http.Httpx2Transport
    return kind(*args, **options)


@pytest.fixture(params=["stock", "by host", "by target"])
async def client(request: pytest.FixtureRequest, httpx: Any, server: str) -> AsyncIterator[Any]:
    if request.param == "stock":
        transport = None
    elif request.param == "by host":
        transport = ours(httpx)
    else:
        transport = ours(httpx, server.removeprefix("http://"))
    # Nothing here speaks TLS, and reading the root certificates for each of stock's clients takes longer than a test.
    async with httpx.AsyncClient(transport=transport, base_url=server, verify=False) as client:
        yield client


async def test_a_request_arrives_as_it_was_written(client):
    reply = await client.post("/echo", params={"q": "a b"}, json={"x": [1, 2]}, headers={"X-Own": "yes"})
    told = reply.json()
    headers = dict(told["headers"])
    assert reply.status_code == 200
    assert (reply.http_version, reply.reason_phrase) == ("HTTP/1.1", "OK")
    assert (told["method"], told["query"], json.loads(told["body"])) == ("POST", {"q": ["a b"]}, {"x": [1, 2]})
    assert headers["x-own"] == "yes"
    assert headers["host"] == client.base_url.netloc.decode()
    assert str(reply.request.url) == str(client.base_url.join("/echo?q=a+b"))
    assert reply.elapsed.total_seconds() > 0


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"])
async def test_every_method(client, method):
    reply = await client.request(method, "/echo")
    assert reply.status_code == 200
    assert (reply.content == b"") == (method == "HEAD")


@pytest.mark.parametrize("status", [204, 301, 304, 400, 401, 403, 404, 409, 418, 429, 500, 501, 502, 503, 504])
async def test_every_status_is_a_response_and_no_error(client, status):
    reply = await client.get(f"/status/{status}")
    assert reply.status_code == status
    if status not in (204, 304):
        assert reply.text == "status"
    assert reply.is_error == (status >= 400)


async def test_redirects_are_followed_when_asked_for(client):
    assert (await client.get("/redirect")).status_code == 302
    reply = await client.get("/redirect", follow_redirects=True)
    assert reply.json()["query"] == {"moved": ["1"]}
    assert [each.status_code for each in reply.history] == [302]


async def test_cookies_are_kept(client):
    await client.get("/cookie")
    assert dict((await client.get("/echo")).json()["headers"])["cookie"] == "taste=sweet"


async def test_authentication(client):
    assert (await client.get("/basic")).status_code == 401
    assert (await client.get("/basic", auth=("user", "pass"))).status_code == 200


async def test_authentication_by_digest(client, httpx):
    for user, status in (("user", 200), ("nobody", 401)):
        reply = await client.get("/digest", auth=httpx.DigestAuth(user, "pass"))
        assert reply.status_code == status
        assert [each.status_code for each in reply.history] == [401]


async def test_authentication_by_a_flow_of_ones_own(client, httpx):
    class Ticket(httpx.Auth):
        requires_response_body = True

        def auth_flow(self, request):
            reply = yield request
            if reply.status_code == 401:
                request.headers["x-ticket"] = reply.text
                yield request

    reply = await client.post("/ticket", content=b"body", auth=Ticket())
    assert (reply.status_code, reply.text) == (200, "42")


async def test_a_base_url_may_have_a_path(client, httpx):
    client.base_url = f"{client.base_url}/status/"
    assert (await client.get("201")).status_code == 201
    assert (await client.get("/202")).status_code == 202


async def test_redirects_without_end_are_an_error(client, httpx):
    with pytest.raises(httpx.TooManyRedirects):
        await client.get("/around", follow_redirects=True)


async def test_event_hooks_see_requests_and_responses(client):
    seen: list[str] = []

    async def on_request(request):
        seen.append(request.method)

    async def on_response(response):
        await response.aread()
        seen.append(str(response.status_code))

    client.event_hooks = {"request": [on_request], "response": [on_response]}
    await client.get("/status/201")
    assert seen == ["GET", "201"]


async def test_downloads_can_be_streamed(client):
    async with client.stream("GET", "/stream?n=3") as reply:
        assert reply.is_stream_consumed is False
        assert b"".join([part async for part in reply.aiter_bytes()]) == b"0,1,2,end"
    async with client.stream("GET", "/large?n=200000") as reply:
        assert sum([len(part) async for part in reply.aiter_raw(1000)]) == 200_000
        assert reply.num_bytes_downloaded == 200_000


async def test_lines_texts_and_chunks(client):
    async with client.stream("GET", "/stream?n=3") as reply:
        assert [line async for line in reply.aiter_lines()] == ["0,1,2,end"]
    async with client.stream("GET", "/stream?n=3") as reply:
        assert [part async for part in reply.aiter_text(4)] == ["0,1,", "2,en", "d"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as below
async def test_gzip_is_unzipped_and_raw_is_raw(client, httpx):
    assert (await client.get("/gzip")).text == "unzipped " * 1000
    async with client.stream("GET", "/gzip") as reply:
        raw = b"".join([part async for part in reply.aiter_raw()])
        assert raw[:2] == b"\x1f\x8b"
        assert len(raw) == int(reply.headers["content-length"])
    with pytest.raises(httpx.DecodingError):
        await client.get("/not-gzip")


async def test_head_says_how_long_and_sends_nothing(client):
    reply = await client.head("/large?n=1000000")
    assert (reply.headers["content-length"], reply.content) == ("1000000", b"")
    assert (await client.get("/status/200")).text == "status"


async def test_large_bodies_both_ways(client):
    assert len((await client.get("/large?n=5000000")).content) == 5_000_000
    assert (await client.post("/size", content=b"x" * 5_000_000)).text == "5000000"

    async def parts():
        for _ in range(50):
            yield b"x" * 100_000

    assert (await client.put("/size", content=parts())).text == "5000000"


async def test_a_stream_is_read_once(client, httpx):
    async with client.stream("GET", "/stream?n=1") as reply:
        async for _ in reply.aiter_raw():
            pass
        with pytest.raises(httpx.StreamConsumed):
            async for _ in reply.aiter_raw():
                pass
    async with client.stream("GET", "/stream?n=1") as reply:
        pass
    with pytest.raises(httpx.StreamClosed):
        await reply.aread()


# httpx leaves the generators below its own unclosed, stock or not, of which trio warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_stream_that_is_left_early_does_no_harm(client):
    for _ in range(3):
        async with client.stream("GET", "/stream?n=1000&s=0.001") as reply, aclosing(reply.aiter_raw()) as parts:
            async for _part in parts:
                break
    assert (await client.get("/status/200")).status_code == 200


async def test_uploads_can_be_streamed(client):
    async def parts():
        for n in range(3):
            yield b"part %d;" % n

    reply = await client.post("/echo", content=parts())
    assert reply.json()["body"] == "part 0;part 1;part 2;"
    assert dict(reply.json()["headers"])["transfer-encoding"] == "chunked"
    reply = await client.post("/echo", files={"file": ("name", io.BytesIO(b"in a file"))}, data={"a": "b"})
    assert "in a file" in reply.json()["body"]


async def test_a_body_whose_source_fails_raises_what_that_raised(client):
    async def parts():
        yield b"one"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await client.post("/echo", content=parts())
    assert (await client.get("/status/200")).status_code == 200


async def test_a_read_timeout(client, httpx):
    with pytest.raises(httpx.ReadTimeout) as caught:
        await client.post("/slow?s=5", timeout=0.1)
    assert isinstance(caught.value, httpx.TimeoutException)
    assert caught.value.request.url.path == "/slow"


async def test_a_read_timeout_within_a_body(client, httpx):
    async with client.stream("GET", "/stream?n=2&s=5", timeout=0.2) as reply:
        with pytest.raises(httpx.ReadTimeout):
            await reply.aread()


async def test_an_answer_that_breaks_off(client, httpx):
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post("/break")


async def test_headers_that_make_no_sense_are_refused(client, httpx):
    for headers in ({"x y": "z"}, {"x": "a\r\nb: c"}):
        with pytest.raises(httpx.LocalProtocolError):
            await client.get("/status/200", headers=headers)
    assert (await client.get("/status/200")).status_code == 200


async def test_unknown_protocols_are_refused(client, httpx):
    with pytest.raises(httpx.UnsupportedProtocol):
        await client.get("ftp://127.0.0.1/")


async def test_trace_tells_each_step(client, server):
    steps: list[str] = []

    async def trace(name, info):
        steps.append(name)

    await client.get("/status/200", extensions={"trace": trace})
    assert steps[:2] == ["connection.connect_tcp.started", "connection.connect_tcp.complete"]
    assert "http11.send_request_headers.complete" in steps
    assert "http11.receive_response_headers.complete" in steps
    assert "http11.response_closed.complete" in steps


async def test_the_network_stream_is_told(client, server):
    async with client.stream("GET", "/stream?n=1") as reply:
        address = reply.extensions["network_stream"].get_extra_info("server_addr")
    assert address[1] == int(server.rpartition(":")[2])


async def test_many_at_once(client):
    async def one(n: int) -> None:
        assert (await client.get(f"/echo?n={n}")).json()["query"] == {"n": [str(n)]}

    async with anyio.create_task_group() as group:
        for n in range(50):
            group.start_soon(one, n)
