"""TLS: who offers which HTTP on a context that several share, and certificates that are not accepted."""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest

from meshlib import http, timeout
from meshlib.core.errors import ConfigurationError

from .raw import raw_server
from .servers import application, serving


class Door:
    """A TLS server that speaks HTTP/1.1 alone, chooses HTTP/2 if it is offered, and notes what it has chosen."""

    def __init__(self, certificate: tuple[str, str], *, knows: tuple[str, ...] = ("h2", "http/1.1")) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(*certificate)
        self.context.set_alpn_protocols(knows)
        self.context.sni_callback = lambda *_: self.dialled.append(1)  # type: ignore[assignment]
        self.dialled: list[int] = []
        self.chosen: list[str | None] = []

    def handle(self, connection: Any) -> None:
        self.chosen.append(connection.selected_alpn_protocol())
        if self.chosen[-1] == "h2":
            return
        while connection.recv(65_536):
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    @contextlib.contextmanager
    def open(self) -> Iterator[str]:
        with raw_server(self.handle, self.context) as port:
            yield f"127.0.0.1:{port}"


async def chosen(door: Door, target: str, verify: ssl.SSLContext, **options: Any) -> str | None:
    """What the server chooses of what a new client offers."""
    before = len(door.chosen)
    transport = http.Transport(target, timeout(1.5), verify=verify, **options)
    async with httpx.AsyncClient(transport=transport) as client:
        with contextlib.suppress(httpx.TransportError):
            await client.post("https://users.test/", timeout=5)
    return door.chosen[before]


async def test_each_client_offers_its_own_on_a_context_that_others_share(certificate):
    door = Door(certificate)
    verify = ssl.create_default_context(cafile=certificate[0])
    with door.open() as target:
        transport = http.Transport(target, http.connections(idle=0), verify=verify)
        async with httpx.AsyncClient(transport=transport) as client:
            for protocols in (["h2"], ["h2", "http/1.1"]):
                assert (await client.get("https://users.test/")).http_version == "HTTP/1.1"
                verify.set_alpn_protocols(protocols)  # as stock httpx does for each connection
            assert await chosen(door, target, verify, http2=True) == "h2"
            assert (await client.get("https://users.test/")).http_version == "HTTP/1.1"
        assert await chosen(door, target, verify) == "http/1.1"


async def test_without_http1_nothing_but_http2_is_offered(certificate):
    door = Door(certificate, knows=("http/1.1",))
    verify = ssl.create_default_context(cafile=certificate[0])
    with door.open() as target:
        assert await chosen(door, target, verify, http2=True) == "http/1.1"
        assert await chosen(door, target, verify, http1=False, http2=True) is None


async def test_without_tls_http2_is_spoken_only_where_http1_is_not():
    with serving(application) as url:
        async with httpx.AsyncClient(transport=http.Transport(url[7:], http2=True), base_url="http://users") as client:
            assert (await client.get("/status/200")).http_version == "HTTP/1.1"
        alone = http.Transport(url[7:], http1=False, http2=True)
        async with httpx.AsyncClient(transport=alone, base_url="http://users") as client:
            with pytest.raises(httpx.TransportError):  # uvicorn knows it not
                await client.get("/status/200", timeout=0.5)


def test_what_cannot_be_is_told_at_construction(monkeypatch):
    with pytest.raises(ConfigurationError, match="nothing left to speak"):
        http.Transport(http1=False)
    for verify in ("/no/such/file.pem", 7, None):
        with pytest.raises(ConfigurationError, match="verify="):
            http.Transport(verify=verify)
    monkeypatch.setitem(sys.modules, "h2", None)
    with pytest.raises(ConfigurationError, match=r"pip install .*http2"):
        http.Transport(http2=True)
    http.Transport()


async def test_a_certificate_that_is_not_accepted_is_told_at_once(certificate):
    """The same one would be shown again, and there is nobody else to ask."""
    door = Door(certificate)
    with door.open() as target, anyio.fail_after(20):
        transport = http.Transport(target)
        async with httpx.AsyncClient(transport=transport) as client:
            for tries in range(1, 8):
                with pytest.raises(httpx.ConnectError, match=r"^TLS failed: self-signed certificate") as caught:
                    await client.get("https://users.test/", timeout=30)
                assert (len(caught.value.attempts), len(door.dialled)) == (1, tries)
            assert transport.metrics()["https://users.test/failfast/marked_dead"] == 0


async def test_another_endpoint_is_asked_first_where_there_is_one(certificate):
    one, other = Door(certificate), Door(certificate)
    with one.open() as first, other.open() as second:
        transport = http.Transport(f"{first},{second}")
        async with httpx.AsyncClient(transport=transport) as client:
            with pytest.raises(httpx.ConnectError, match="TLS failed"):
                await client.get("https://users.test/", timeout=30)
            assert (len(one.dialled), len(other.dialled)) == (1, 1)


async def test_those_who_wait_for_the_same_connect_are_told_the_same(certificate):
    door = Door(certificate)
    with door.open() as target, anyio.fail_after(20):
        transport = http.Transport(target, http2=True)
        async with httpx.AsyncClient(transport=transport) as client, anyio.create_task_group() as group:

            async def one() -> None:
                with pytest.raises(httpx.ConnectError, match=r"^TLS failed: self-signed certificate"):
                    await client.get("https://users.test/", timeout=30)

            for _ in range(10):
                group.start_soon(one)
    assert len(door.dialled) < 4


@pytest.fixture(scope="module")
def listener() -> Iterator[int]:
    """A port at which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


async def test_of_many_names_that_share_a_target_the_one_used_last_stays(monkeypatch, listener):
    from meshlib.http import transport as transports

    monkeypatch.setattr(transports, "MOST_NAMES", 2)
    transport = http.Transport(f"127.0.0.1:{listener}")
    async with httpx.AsyncClient(transport=transport) as client:
        for name in ("a", "b", "a", "c"):
            with pytest.raises(httpx.TransportError):
                await client.get(f"https://{name}/", timeout=0.05)
        names = {key.rpartition("/requests")[0] for key in transport.metrics() if key.count("/") == 3}
        assert names - {""} == {"https://a", "https://c"}
