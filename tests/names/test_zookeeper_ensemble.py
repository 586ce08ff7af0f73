"""What ZooKeeper may do to a running client: nothing. Leaders die and hang, sessions expire, paths and quorums vanish.

Calls flow all the time, through the library's own client, to servers of the library; none may fail. After each event
the members change, and the client's addresses have to be the new ones within two seconds of the ensemble's return.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import anyio.to_thread
import pytest

from meshlib import mux
from meshlib.names.target import Target
from meshlib.names.zookeeper import ZooKeeperResolver
from meshlib.names.zookeeper import session as sessions
from meshlib.names.zookeeper.place import Place
from meshlib.names.zookeeper.resolver import GRACE
from meshlib.names.zookeeper.session import State, shared

from ..zookeeper import Registry, ensemble

CONVERGED = 2.0
"""Seconds: what is promised."""


@pytest.fixture(scope="module")
def anyio_backend():
    """Once is enough: what is different among event loops is tested with sessions."""
    return "asyncio"


@pytest.fixture(autouse=True)
def no_lingering(monkeypatch):
    monkeypatch.setattr(sessions, "LINGER", 0.0)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    with ensemble(tmp_path_factory.mktemp("three")) as servers:
        yield servers


class Traffic:
    """Calls that flow, and what became of them."""

    def __init__(self, client, registry):
        self.client = client
        self.registry = registry
        self.calls = 0
        self.failures = []
        self.stopped = False

    async def flow(self):
        while not self.stopped:
            try:
                await self.client(mux.Request(b"x"))
            except Exception as error:
                self.failures.append(error)
            self.calls += 1
            await anyio.sleep(0.01)

    @property
    def ports(self):
        return {node.address.port for node in self.client.endpoints}


async def answer(request):
    return mux.Response(b"y")


@asynccontextmanager
async def traffic(hosts, path, count=3):
    """Servers, a registry that lists them, a client that follows it, and calls."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(await mux.serve(answer)) for _ in range(count)]
        ports = [int(server.address.rpartition(":")[2]) for server in servers]
        registry = stack.enter_context(Registry.at(hosts, path))
        names = [registry.join(port, ephemeral=False) for port in ports]
        client = await stack.enter_async_context(mux.client(registry.target))
        await client(mux.Request(b"first"))
        flowing = Traffic(client, registry)
        flowing.all_ports, flowing.names = ports, names
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flowing.flow)
            yield flowing
            flowing.stopped = True
        assert flowing.calls > 20
        assert flowing.failures == []


async def converges(flowing, ports, within=CONVERGED):
    started = time.monotonic()
    with anyio.move_on_after(within):
        while flowing.ports != ports:  # noqa: ASYNC110
            await anyio.sleep(0.01)
    assert flowing.ports == ports, f"after {time.monotonic() - started:.2f} s"
    return time.monotonic() - started


async def follows(flowing):
    """ZooKeeper serves: one member leaves, then it returns, and the client's addresses follow."""
    name, port = flowing.names[0], flowing.all_ports[0]
    await in_thread(flowing.registry.remove, name)
    await converges(flowing, set(flowing.all_ports) - {port})
    flowing.names[0] = await in_thread(lambda: flowing.registry.join(port, ephemeral=False))
    await converges(flowing, set(flowing.all_ports))


async def in_thread(function, *args):
    return await anyio.to_thread.run_sync(function, *args)


def session_of(hosts):
    """The client's own session, found by asking for it."""
    return shared(Place.parse(Target.parse(f"zk://{hosts}/x")).ensemble)


async def test_the_leader_is_killed(three):
    async with traffic(three.hosts, "/killed") as flowing:
        leader = await in_thread(lambda: three.leader)
        await in_thread(leader.kill)
        await in_thread(three.wait, 2)
        await follows(flowing)
        await in_thread(three.start)
        await follows(flowing)


async def test_the_leader_is_paused(three):
    async with traffic(three.hosts, "/paused") as flowing:
        leader = await in_thread(lambda: three.leader)
        leader.pause()
        try:
            await anyio.sleep(0.5)
            others = [peer for peer in three.peers if peer is not leader]
            with anyio.fail_after(20):
                while "leader" not in [await in_thread(lambda p=peer: p.mode) for peer in others]:  # noqa: ASYNC110
                    await anyio.sleep(0.05)
            await follows(flowing)
        finally:
            leader.resume()
        await in_thread(three.wait)
        await follows(flowing)


async def test_all_are_killed_and_started_again(three):
    async with traffic(three.hosts, "/restarted") as flowing:
        with session_of(three.hosts) as session:
            await in_thread(three.kill)
            with anyio.fail_after(10):
                await session.state.wait_for(lambda state: not state.usable)
            await anyio.sleep(GRACE + 0.5)
            assert "source broken: no connection to zk://" in repr(flowing.client)
            await in_thread(three.start)
        await follows(flowing)
        assert "source broken" not in repr(flowing.client)


async def test_a_member_that_left_during_the_outage_is_gone_after_it(three):
    async with traffic(three.hosts, "/absent") as flowing:
        with session_of(three.hosts) as session:
            peer = three.peers[0]
            with anyio.fail_after(20):
                identity = session._client.client_id
                # The client is kept out while the member leaves: its connection is cut, and its hosts are none.
                session._client.hosts, kept = [("127.0.0.1", 1)], session._client.hosts
                while session.state.value is not State.SUSPENDED:
                    with contextlib.suppress(OSError, AttributeError):  # it may be connecting in this very moment
                        session._client._connection._socket.shutdown(2)
                    await anyio.sleep(0.1)
                await in_thread(flowing.registry.remove, flowing.names[0])
                await anyio.sleep(0.5)
                assert flowing.ports == set(flowing.all_ports)
                session._client.hosts = kept
                await session.ready()
                await converges(flowing, set(flowing.all_ports[1:]))
                assert session._client.client_id == identity
                assert peer.process is not None


async def test_the_session_expires(zookeeper):
    async with traffic(zookeeper.hosts, "/expired") as flowing:
        with session_of(zookeeper.hosts) as session:
            await in_thread(flowing.registry.end_session, session._client.client_id)
            with anyio.fail_after(10):
                await session.state.wait_for(lambda state: state is State.LOST)
                await session.ready()
        await follows(flowing)


async def test_the_path_is_deleted_and_made_again(zookeeper):
    """kazoo's ChildrenWatch would end with its path. All members are held meanwhile, as Finagle's are not."""
    async with traffic(zookeeper.hosts, "/deleted") as flowing:
        for _ in range(2):
            await in_thread(flowing.registry.remove)
            await anyio.sleep(1.5)
            assert flowing.ports == set(flowing.all_ports)
            flowing.names = [
                await in_thread(lambda port=port: flowing.registry.join(port, ephemeral=False))
                for port in flowing.all_ports
            ]
            await converges(flowing, set(flowing.all_ports))
        await follows(flowing)


async def test_one_that_is_cut_off_is_read(tmp_path):
    """A server alone admits new sessions only where they are its own; see ZooKeeper's ``localSessionsEnabled``."""
    local = ("localSessionsEnabled=true", "localSessionsUpgradingEnabled=true")
    with ensemble(tmp_path, *local, readonlymode_enabled="true") as servers:
        with Registry.at(servers.hosts, "/cut") as registry:
            registry.put("h:80")
        last = servers.peers[0]
        for peer in servers.peers[1:]:
            peer.kill()
        target = Target.parse(f"zk://{servers.hosts}/cut")
        with shared(Place.parse(target).ensemble) as session, anyio.fail_after(40):
            watching = ZooKeeperResolver().watch(target)
            states = [str(await anext(watching))]
            while states[-1] != "h:80":
                states.append(str(await anext(watching)))
            assert session.state.value is State.READ_ONLY
            assert last.mode == "read-only"
            await in_thread(servers.start)
            await session.ready(writing=True)
            await session.call("set", "/cut/h:80", b"h:81")
            while states[-1] != "h:81":
                states.append(str(await anext(watching)))
            await watching.aclose()
