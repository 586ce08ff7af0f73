"""A session with a real ZooKeeper: threads on one side, an event loop on the other. Each trap of kazoo has a test."""

import logging
import os
import threading
import time

import anyio
import anyio.to_thread
import pytest
from kazoo.exceptions import ConnectionLoss, NoNodeError

from meshlib.core.errors import ServiceClosed
from meshlib.names.target import Target
from meshlib.names.zookeeper import session as sessions
from meshlib.names.zookeeper.place import Place
from meshlib.names.zookeeper.session import State, shared

from ..zookeeper import free_ports

THREADS = 5.0


@pytest.fixture(autouse=True)
def no_thread_left(monkeypatch):
    """Sessions do not linger here, and their threads end."""
    monkeypatch.setattr(sessions, "LINGER", 0.0)
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + THREADS
    while left := [t for t in threading.enumerate() if t not in before and not t.name.startswith(("AnyIO", "Trio"))]:
        assert time.monotonic() < end, left
        time.sleep(0.01)


@pytest.fixture
def ensemble(zookeeper):
    return Place.parse(Target.parse(f"zk://{zookeeper.hosts}/x")).ensemble


@pytest.fixture
def nowhere():
    return Place.parse(Target.parse(f"zk://127.0.0.1:{free_ports(1)[0]}/x")).ensemble


async def test_it_calls_and_hears(ensemble, zk):
    with shared(ensemble) as session, anyio.fail_after(10):
        heard = anyio.Event()
        zk.put("a", b"1")
        path = f"{zk.path}/a"
        with session.follow(path, heard.set):
            assert (await session.call("get", path, watch=session.fired))[0] == b"1"
            zk.put("a", b"2")
            await heard.wait()
        with pytest.raises(NoNodeError):
            await session.call("get", f"{path}/b")
        owner = await session.call("create", f"{zk.path}/e", ephemeral=True, include_data=True)
        assert owner[1].ephemeralOwner == session.id != 0
        assert session.state.value is State.CONNECTED
        assert not session._followers


async def test_it_reads_many_without_the_loop(ensemble, zk):
    for number in range(300):
        zk.put(str(number), b"%d" % number)
    with shared(ensemble) as session, anyio.fail_after(20):
        posted = 0
        post = session.post

        def count(*args):
            nonlocal posted
            posted += 1
            post(*args)

        await session.ready()
        session.post = count
        nodes = [(f"{zk.path}/{number}", None) for number in range(301)]
        outcomes = await session.read(nodes, lambda path, data: int(data) if data != b"7" else 1 / 0)
        assert isinstance(outcomes.pop(f"{zk.path}/7"), ZeroDivisionError)
        assert outcomes.pop(f"{zk.path}/300") is None
        assert sorted(outcomes.values()) == [n for n in range(300) if n != 7]
        assert posted == 1
        assert await session.read([], lambda path, data: data) == {}


async def test_one_session_for_all_who_ask_and_a_new_one_when_it_has_been_closed(ensemble):
    with shared(ensemble) as one, shared(ensemble) as two:
        assert one is two
        with anyio.fail_after(10):
            await one.ready()
    with anyio.fail_after(10):
        while not one._closing:  # noqa: ASYNC110 - by a thread
            await anyio.sleep(0.01)
    with shared(ensemble) as three:
        assert three is not one


async def test_it_lingers_for_who_comes_back(ensemble, monkeypatch):
    monkeypatch.setattr(sessions, "LINGER", 0.2)
    with shared(ensemble) as one, anyio.fail_after(10):
        await one.ready()
    with shared(ensemble) as two, anyio.fail_after(10):
        assert two is one
        await anyio.sleep(0.4)
        assert await two.call("exists", "/") is not None


async def test_a_session_that_expired_is_replaced(ensemble, zk):
    with shared(ensemble) as session, anyio.fail_after(20):
        states = []
        session.state.watch(states.append)
        await session.call("create", f"{zk.path}/e", ephemeral=True, makepath=True)
        old = session.id
        await anyio.to_thread.run_sync(zk.end_session, session._client.client_id)
        await session.state.wait_for(lambda state: state is State.LOST)
        await session.ready(writing=True)
        assert session.id not in (0, old)
        assert await session.call("exists", f"{zk.path}/e") is None
        assert states[-2:] == [State.LOST, State.CONNECTED]


async def test_a_client_whose_thread_has_died_is_replaced(ensemble, monkeypatch):
    """kazoo leaves it closed for good."""
    monkeypatch.setattr(sessions, "REVIVE", 0.05)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with shared(ensemble) as session, anyio.fail_after(20):
        await session.ready()
        dead = session._client
        monkeypatch.setattr(dead._connection, "_read_socket", lambda timeout: 1 / 0)
        with pytest.raises(ConnectionLoss):
            await session.call("get", "/")
        await session.state.wait_for(lambda state: state is State.LOST)
        await session.ready()
        assert session._client is not dead
        assert await session.call("exists", "/") is not None


async def test_requests_never_block_the_loop_while_it_connects(nowhere):
    """A blocking pipe would, after some 280 of them."""
    with shared(nowhere) as session:
        started = time.monotonic()
        results = [session._client.get_async("/") for _ in range(3000)]
        assert time.monotonic() - started < 5
        assert len(results) == 3000
        with anyio.move_on_after(0.2) as scope:
            await session.call("get", "/")
        assert scope.cancelled_caught
        with anyio.fail_after(10):
            while not session.problem:  # noqa: ASYNC110 - by a thread
                await anyio.sleep(0.01)
        assert "refused" in session.problem
        assert "connecting" in repr(session)


async def test_a_loop_that_is_busy_does_not_block_kazoo(ensemble, zk):
    zk.put("a", b"1")
    heard = []
    path = f"{zk.path}/a"
    with shared(ensemble) as session, anyio.fail_after(20), session.follow(path, lambda: heard.append(1)):
        await session.call("get", path, watch=session.fired)
        zk.put("a", b"2")
        done = threading.Event()
        session._client.exists_async("/").rawlink(lambda result: done.set())
        assert done.wait(5), "kazoo's threads wait for the loop"  # the loop is blocked here
        assert not heard
        await anyio.sleep(0.2)
        assert heard


async def test_a_watch_that_is_set_again_is_one(ensemble, zk):
    zk.put("a")
    with shared(ensemble) as session, anyio.fail_after(10):
        for _ in range(5):
            await session.call("get_children", zk.path, watch=session.fired)
        assert len(session._client._child_watchers[zk.path]) == 1


async def test_a_cancelled_call_leaves_nothing(ensemble):
    with shared(ensemble) as session, anyio.fail_after(10):
        await session.ready()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await session.call("get", "/")
        await anyio.sleep(0.05)
        assert not session._waiting


def test_a_loop_that_has_ended_is_no_concern(ensemble):
    kept = []

    async def main():
        with shared(ensemble) as session:
            await session.ready()
            kept.append(session)

    for backend in ("asyncio", "trio"):
        anyio.run(main, backend=backend)
    for session in kept:
        session.post(print, "nobody is there")
        session.fired(type("Event", (), {"path": "/"}))


async def test_a_fork_is_refused(ensemble, monkeypatch):
    with shared(ensemble) as session:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with pytest.raises(ServiceClosed, match="of which this one is a fork"):
                await session.call("get", "/")
            with shared(ensemble) as other:
                assert other is not session
            other._pid, other._leases = os.getpid(), 1
        with anyio.fail_after(10):
            await session.ready()
        other._release()
        other._close()


async def test_passwords_are_not_logged(zookeeper, zk, caplog):
    caplog.set_level(logging.DEBUG)
    ensemble = Place.parse(Target.parse(f"zk://user:s3cret@{zookeeper.hosts}{zk.path}")).ensemble
    with shared(ensemble) as session, anyio.fail_after(10):
        await session.call("exists", "/")
        assert "s3cret" not in repr(session)
    assert any("Auth(" in record.getMessage() for record in caplog.records), "the line that used to show it"
    assert "s3cret" not in caplog.text


async def test_kazoo_does_not_warn_at_each_attempt(nowhere, caplog):
    caplog.set_level(logging.INFO)
    with shared(nowhere):
        await anyio.sleep(0.4)
    assert caplog.records == []
