"""What httpx documents of connections holds: TLS, HTTP/2, Unix sockets, timeouts, and the errors that servers cause."""

from __future__ import annotations

import contextlib
import importlib
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
import uvicorn

from meshlib import ConfigurationError, MeshError, http, timeout

from ..conftest import BACKENDS
from ..dns_server import dnsmasq
from .processes import Worker, workers
from .raw import blackhole, raw_server, reset
from .servers import application

pytestmark = pytest.mark.anyio
Make = Callable[..., Any]


@pytest.fixture(scope="module", params=[BACKENDS["asyncio"], BACKENDS["trio"]], ids=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """What httpx knows; to it uvloop is asyncio."""
    return request.param


@pytest.fixture(params=["httpx", "httpx2"])
def httpx(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


@pytest.fixture(params=["stock", "ours"])
def ours(request: pytest.FixtureRequest) -> bool:
    return request.param == "ours"


@pytest.fixture
async def make(ours: bool, httpx: Any) -> AsyncIterator[Make]:
    """Makes clients with the same options either way."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(*, verify: Any = False, http2: bool = False, total: float = 30.0, **options: Any) -> Any:
            if ours:
                kind = http.Transport if httpx.__name__ == "httpx" else http.Httpx2Transport
                options["transport"] = kind(timeout(total=total), verify=verify, http2=http2)
            else:
                options |= {"verify": verify, "http2": http2}
            return await stack.enter_async_context(httpx.AsyncClient(**options))

        yield make


# --- timeouts and errors ----------------------------------------------------------------------------------------------


async def test_a_connect_timeout(make, httpx):
    client = await make(timeout=httpx.Timeout(5, connect=0.2))
    with blackhole() as port, anyio.fail_after(4), pytest.raises(httpx.ConnectTimeout) as caught:
        await client.get(f"http://127.0.0.1:{port}/")
    assert isinstance(caught.value, httpx.TimeoutException)


async def test_a_connect_timeout_bounds_the_search_for_a_name(httpx):
    """Stock httpx looks names up as a part of connecting."""
    kind = http.Transport if httpx.__name__ == "httpx" else http.Httpx2Transport
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        transport = kind(f"dns://nobody.test:80?server=127.0.0.1:{silent.getsockname()[1]}")
        async with httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(5, connect=0.2)) as client:
            with anyio.fail_after(2), pytest.raises(httpx.ConnectTimeout, match=r"has not been resolved within 0\.2 s"):
                await client.get("http://nobody.test/")


async def test_a_host_that_there_is_not_is_a_connect_error_at_once(httpx, tmp_path):
    kind = http.Transport if httpx.__name__ == "httpx" else http.Httpx2Transport
    with dnsmasq(tmp_path) as names:
        transport = kind(f"dns://nobody.test:80?server={names.server}")
        async with httpx.AsyncClient(transport=transport) as client:
            with anyio.fail_after(2), pytest.raises(httpx.ConnectError, match="no such name"):
                await client.get("http://nobody.test/")


# httpx leaves the generator of a body unclosed, stock or not, of which trio warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_write_timeout(make, httpx):
    done = threading.Event()
    client = await make(timeout=httpx.Timeout(5, write=0.2))
    with raw_server(lambda _connection: done.wait(30) and None) as port:
        try:
            with pytest.raises(httpx.WriteTimeout):
                await client.post(f"http://127.0.0.1:{port}/", content=b"x" * 20_000_000)
        finally:
            done.set()


async def test_a_pool_timeout(ours, httpx):
    if ours:
        kind = http.Transport if httpx.__name__ == "httpx" else http.Httpx2Transport
        transport = kind(http.connections(most=1))
    else:
        transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=1))
    begun = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbegun\r\n"
    with raw_server(answers(begun, then=lambda connection: connection.recv(1) and None)) as port:
        url = f"http://127.0.0.1:{port}/"
        async with httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(5, pool=0.1)) as client:
            async with client.stream("POST", url):
                with pytest.raises(httpx.PoolTimeout):
                    await client.post(url)
            async with client.stream("POST", url) as reply:
                assert reply.status_code == 200


def answers(*parts: bytes, then: Callable[[socket.socket], None] | None = None) -> Callable[[socket.socket], None]:
    def handle(connection: socket.socket) -> None:
        connection.recv(65_536)
        for part in parts:
            connection.sendall(part)
        if then is not None:
            then(connection)

    return handle


@pytest.mark.parametrize(
    ("handle", "error"),
    [
        (answers(), "RemoteProtocolError"),
        (answers(b"nonsense\r\n\r\n"), "RemoteProtocolError"),
        (answers(b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"), "RemoteProtocolError"),
        (answers(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab"), "RemoteProtocolError"),
        (answers(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"), "RemoteProtocolError"),
        (answers(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"), "RemoteProtocolError"),
        (answers(b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000), "RemoteProtocolError"),
        (answers(then=reset), "ReadError"),
        (answers(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", then=reset), "ReadError"),
    ],
    ids=["silence", "nonsense", "negative length", "two lengths", "half a body", "bad chunks", "endless headers",
         "a reset", "a reset within a body"],
)  # fmt: skip
async def test_what_servers_do_wrong_has_the_same_name(make, httpx, ours, handle, error):
    client = await make()
    with raw_server(handle) as port, pytest.raises(httpx.TransportError) as caught:
        await client.post(f"http://127.0.0.1:{port}/")
    assert isinstance(caught.value, getattr(httpx, error))
    assert isinstance(caught.value, MeshError) == ours
    assert caught.value.request.url.port == port


async def test_informational_answers_are_passed_over(make):
    parts = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nto the end"
    with raw_server(answers(*parts)) as port:
        assert (await (await make()).get(f"http://127.0.0.1:{port}/")).text == "to the end"


def test_proxies_are_refused_and_say_what_to_do_instead(httpx):
    kind = http.Transport if httpx.__name__ == "httpx" else http.Httpx2Transport
    for option in ({"proxy": "http://p:1"}, {"proxies": {}}):
        with pytest.raises(ConfigurationError, match=r"AsyncClient\(mounts=…\)"):
            kind(**option)


# --- Unix sockets -----------------------------------------------------------------------------------------------------


async def test_unix_sockets(httpx, ours, tmp_path):
    path = str(tmp_path / "socket")
    server = uvicorn.Server(uvicorn.Config(application, uds=path, log_level="critical", lifespan="off"))
    if ours:
        kind = http.Transport if httpx.__name__ == "httpx" else http.Httpx2Transport
        transport = kind(f"unix://{path}")
    else:
        transport = httpx.AsyncHTTPTransport(uds=path)
    with running(server):
        async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
            reply = await client.post("/echo", content=b"body")
            assert dict(reply.json()["headers"])["host"] == "users"
            assert reply.json()["body"] == "body"


@contextlib.contextmanager
def running(server: uvicorn.Server) -> Any:
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        thread.join(10)


# --- TLS --------------------------------------------------------------------------------------------------------------


async def test_certificates_are_for_the_name_that_was_asked_for(make, httpx, ours, certificate):
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    verify = ssl.create_default_context(cafile=certificate[0])
    client, hasty = await make(verify=verify), await make(verify=verify, total=0.5)
    with raw_server(answers(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"), context) as port:
        url = f"https://127.0.0.1:{port}/"
        reply = await client.get(url, extensions={"sni_hostname": "users.test"})
        assert reply.text == "ok"
        assert asked == ["users.test"]
        for extensions in ({}, {"sni_hostname": "elsewhere.test"}):
            with pytest.raises((httpx.ConnectError, httpx.ConnectTimeout)) as caught:
                await hasty.get(url, extensions=extensions)
            assert "certificate is not valid for" in str(caught.value) or not ours  # under trio httpx says nothing


async def test_certificates_of_nobody_known_are_refused_unless_told_otherwise(make, httpx, ours, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    careful, careless = await make(verify=True, total=0.5), await make(verify=False)
    with raw_server(answers(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"), context) as port:
        with pytest.raises((httpx.ConnectError, httpx.ConnectTimeout)) as caught:
            await careful.get(f"https://127.0.0.1:{port}/", extensions={"sni_hostname": "users.test"})
        assert "self-signed" in str(caught.value).replace("self signed", "self-signed") or not ours
        assert (await careless.get(f"https://127.0.0.1:{port}/")).text == "ok"


# --- HTTP/2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def second(anyio_backend: Any, certificate: tuple[str, str]) -> AsyncIterator[str]:
    async with workers(Worker("hypercorn", "plain").with_tls(certificate)) as (worker,):
        yield f"https://127.0.0.1:{worker.port}"


async def test_http2_over_tls(make, second, certificate):
    client = await make(verify=False, http2=True, base_url=second)
    reply = await client.post("/echo", json=[1, 2])
    assert (reply.http_version, reply.json()["body"].replace(" ", "")) == ("HTTP/2", "[1,2]")
    assert len((await client.get("/large?n=3000000")).content) == 3_000_000
    assert (await client.post("/size", content=b"x" * 3_000_000)).text == "3000000"
    async with client.stream("GET", "/stream?n=3") as reply:
        assert b"".join([part async for part in reply.aiter_raw()]) == b"0,1,2,end"
    assert (await client.head("/large?n=1000")).content == b""
    assert (await client.get("/gzip")).text == "unzipped " * 1000

    async def parts():
        for n in range(3):
            yield b"part %d;" % n

    assert (await client.post("/echo", content=parts())).json()["body"] == "part 0;part 1;part 2;"
    async with anyio.create_task_group() as group:
        for _ in range(30):
            group.start_soon(client.get, "/slow?s=0.01")


async def test_http2_errors_and_trace(make, httpx, second):
    client = await make(verify=False, http2=True, base_url=second)
    with pytest.raises(httpx.ReadTimeout):
        await client.post("/slow?s=30", timeout=0.3)
    steps: list[str] = []

    async def trace(name, info):
        steps.append(name)

    await client.get("/status/200", extensions={"trace": trace})
    for step in ("send_request_headers", "receive_response_headers", "response_closed"):
        assert f"http2.{step}.complete" in steps


async def test_http2_is_offered_only_when_asked_for(make, second):
    client = await make(verify=False, base_url=second)
    assert (await client.get("/status/200")).http_version == "HTTP/1.1"
