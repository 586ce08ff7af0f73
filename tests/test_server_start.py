"""How a server starts: once, whoever asks, and never after it was told to end. And what it leaves behind."""

from __future__ import annotations

import socket

import anyio
import pytest

from meshlib import mux
from meshlib.core.errors import ServiceClosed
from meshlib.server import Server
from tests.mux.peer import echo


class Slow:
    """Makes servers bind slowly: each waits at ``go``, and what it has bound is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.binding = anyio.Event(), anyio.Event()
        self.listeners = []
        bind = Server._bind

        async def slow(server):
            listeners = await bind(server)
            self.listeners += listeners
            self.binding.set()
            await self.go.wait()
            return listeners

        monkeypatch.setattr(Server, "_bind", slow)

    @property
    def open_sockets(self) -> int:
        return sum(listener.extra(anyio.abc.SocketAttribute.raw_socket).fileno() >= 0 for listener in self.listeners)


async def start(server, outcomes):
    try:
        await server.start()
    except ServiceClosed as error:
        outcomes.append(error.message)
    else:
        outcomes.append(server.address)


async def test_a_server_that_is_closed_while_it_starts_leaks_no_listener(monkeypatch):
    slow, outcomes = Slow(monkeypatch), []
    server = mux.serve(echo, label="shop")
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(start, server, outcomes)
            await slow.binding.wait()
            await server.aclose()
            slow.go.set()
    assert outcomes == ["server 'shop' has been closed"]
    assert len(slow.listeners) == 1
    assert slow.open_sockets == 0
    host, _, port = server.address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


async def test_a_unix_server_that_is_closed_while_it_starts_leaves_no_socket_behind(monkeypatch, tmp_path):
    slow, outcomes = Slow(monkeypatch), []
    path = tmp_path / "shop.sock"
    server = mux.serve(echo, f"unix://{path}", label="shop")
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(start, server, outcomes)
            await slow.binding.wait()
            await server.aclose()
            slow.go.set()
    assert outcomes == ["server 'shop' has been closed"]
    assert slow.open_sockets == 0
    assert not path.exists()


async def test_whoever_starts_a_server_that_is_starting_waits_until_it_listens(monkeypatch):
    slow, outcomes = Slow(monkeypatch), []
    server = mux.serve(echo)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(start, server, outcomes)
            await slow.binding.wait()
            group.start_soon(start, server, outcomes)
            group.start_soon(start, server, outcomes)
            await anyio.wait_all_tasks_blocked()
            assert outcomes == []
            slow.go.set()
    assert outcomes == [server.address] * 3
    assert len(slow.listeners) == 1
    await server.aclose()
    assert slow.open_sockets == 0


async def test_a_host_name_of_several_addresses_is_started_once(monkeypatch):
    outcomes = []
    server = mux.serve(echo, "localhost:0")
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(start, server, outcomes)
    assert outcomes == [server.address] * 3
    async with mux.client(server.address) as client:
        assert (await client(mux.Request(b"x"))).body == b"x"
    await server.aclose()


async def test_an_old_server_leaves_the_socket_of_the_new_one_on_the_same_path_alone(tmp_path):
    path = tmp_path / "shop.sock"
    replies = []

    def saying(text):
        async def handler(request):
            return mux.Response(text)

        return handler

    old = await mux.serve(saying(b"old"), f"unix://{path}")
    async with mux.client(old.address) as client:
        replies.append((await client(mux.Request())).body)
        new = await mux.serve(saying(b"new"), f"unix://{path}")
        replies.append((await client(mux.Request())).body)
        await old.aclose()
        assert path.is_socket()
        replies.append((await client(mux.Request())).body)
    assert replies == [b"old", b"old", b"new"]
    await mux.serve(saying(b"never started"), f"unix://{path}").aclose()
    assert path.is_socket()
    await new.aclose()
    assert not path.exists()
