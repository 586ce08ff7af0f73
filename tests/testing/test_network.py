"""Networks in memory. Both wires must do the same in every case, so each test runs on both."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.client import Liveness
from meshlib.core.priority import Priority
from meshlib.names.addr import Address, Neg
from meshlib.server import Server
from meshlib.testing import Network, constant, run_virtual

HERE = "10.0.0.1:80"
THERE = "10.0.0.2:80"

pytestmark = pytest.mark.parametrize("wire", ["mux", "direct"])


def server(network: Network, handler: Any, *layers: Any, address: str = HERE, **options: Any) -> Server:
    made = Server(handler, address, network.acceptor, *layers, **options)
    network.listen(made)
    return made


def play(wire: Any, body: Callable[[Network], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        network = Network(wire=wire, **options)
        await body(network)
        for each in network.servers.values():
            await each.aclose(grace=0.1)
            assert each.env.supervisor.jobs == 0
        assert network.connections() == 0

    run_virtual(main, seed=1)


async def echo(request: mux.Request) -> mux.Response:
    return mux.Response(request.body)


async def sleep(request: mux.Request) -> mux.Response:
    await anyio.sleep(float(request.body))
    return mux.Response(request.body)


def test_a_call_is_answered_and_the_context_crosses_without_the_account(wire: Any) -> None:
    async def body(network: Network) -> None:
        seen: list[meshlib.Context] = []

        async def look(request: mux.Request) -> mux.Response:
            seen.append(meshlib.current())
            return await echo(request)

        server(network, look)
        async with network.client(HERE) as client:
            mine = meshlib.Context(client_id="me", priority=Priority.CRITICAL, dtab=(("/a", "/b"),), baggage="k=v")
            with meshlib.use(mine), meshlib.deadline(5):
                assert await client(mux.Request(b"x")) == mux.Response(b"x")
        [there] = seen
        assert there.record is None
        assert (there.client_id, there.dtab, there.baggage, there.attempt) == ("me", (("/a", "/b"),), "k=v", 0)
        assert there.priority is Priority.CRITICAL
        assert there.deadline == pytest.approx(anyio.current_time() + 5, abs=0.01)
        assert there.trace is not None

    play(wire, body)


@pytest.mark.parametrize(
    ("raised", "kind", "by_peer"),
    [
        (ValueError("secret"), meshlib.RemoteError, False),
        (meshlib.Rejected("full"), meshlib.Rejected, True),
        (meshlib.InvalidArgument("no"), meshlib.InvalidArgument, False),
        (meshlib.RemoteError("broken"), meshlib.RemoteError, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_cross_as_over_the_wire(wire: Any, raised: Exception, kind: type, by_peer: bool) -> None:
    async def body(network: Network) -> None:
        async def fail(request: mux.Request) -> mux.Response:
            raise raised

        server(network, fail)
        async with network.client(HERE, stack=lambda s: s.remove("requeue").remove("retry")) as client:
            with pytest.raises(kind) as caught:
                await client(mux.Request())
            assert "secret" not in str(caught.value)
            assert getattr(caught.value, "by_peer", False) is by_peer
            assert caught.value.endpoint == HERE
            assert caught.value is not raised

    play(wire, body)


def test_a_reply_that_is_none_is_an_error_and_not_a_hang(wire: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body(network: Network) -> None:
        async def nothing(request: mux.Request) -> Any:
            return None

        server(network, nothing)
        async with network.client(HERE) as client:
            with pytest.raises(meshlib.RemoteError, match="the reply cannot be sent"):
                await client(mux.Request())

    play(wire, body)


def test_a_deadline_ends_the_call_and_the_handler(wire: Any) -> None:
    async def body(network: Network) -> None:
        ended: list[float] = []

        async def forever(request: mux.Request) -> mux.Response:
            try:
                await anyio.sleep_forever()
            finally:
                ended.append(anyio.current_time())
            raise AssertionError

        server(network, forever)
        async with network.client(HERE, meshlib.timeout(1.0)) as client:
            with pytest.raises(meshlib.DeadlineExceeded, match=r"no reply within the timeout of 1 s"):
                await client(mux.Request())
            assert anyio.current_time() == pytest.approx(1.0, abs=0.02)
            await anyio.sleep(0.05)
        assert ended == [pytest.approx(1.0, abs=0.03)]

    play(wire, body)


def test_a_cancelled_call_cancels_its_handler(wire: Any) -> None:
    async def body(network: Network) -> None:
        ended = anyio.Event()

        async def forever(request: mux.Request) -> mux.Response:
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()
            raise AssertionError

        server(network, forever)
        async with network.client(HERE) as client:
            with anyio.move_on_after(1):
                await client(mux.Request())
            with anyio.fail_after(0.1):
                await ended.wait()

    play(wire, body)


def test_cut_connections_are_lost_and_made_again(wire: Any) -> None:
    async def body(network: Network) -> None:
        server(network, sleep)
        async with network.client(HERE, stack=lambda s: s.remove("retry")) as client:
            async with anyio.create_task_group() as group:
                group.start_soon(_lost, client)
                await anyio.sleep(1)
                assert network.connections(HERE) == 1
                assert network.cut(THERE) == 0
                assert network.cut(HERE) == 1
            await anyio.sleep(1)
            assert (await client(mux.Request(b"0"))).body == b"0"

    async def _lost(client: Any) -> None:
        with pytest.raises(meshlib.ConnectionLost):
            await client(mux.Request(b"60"))

    play(wire, body)


def test_nobody_listens(wire: Any) -> None:
    async def body(network: Network) -> None:
        seen: list[tuple[str, str, bool]] = []
        network.on_connect = lambda *facts: seen.append(facts)
        async with network.client(HERE, meshlib.timeout(0.5), label="me") as client:
            with pytest.raises(meshlib.MeshError, match=r"(?i)connection refused"):
                await client(mux.Request())
        assert set(seen) == {("me", HERE, False)}

    play(wire, body)


def test_a_closing_server_answers_what_it_has_and_takes_no_more(wire: Any) -> None:
    async def body(network: Network) -> None:
        old = server(network, sleep)
        replies: list[bytes] = []
        async with network.client(HERE) as client:

            async def call() -> None:
                replies.append((await client(mux.Request(b"2"))).body)

            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await anyio.sleep(0.5)
                network.leave(HERE)
                group.start_soon(old.aclose)
                await anyio.sleep(0.5)
                server(network, echo)
                assert (await client(mux.Request(b"new"))).body == b"new"
            assert replies == [b"2"]

    play(wire, body)


def test_in_the_dark_nothing_arrives_and_liveness_gives_the_session_up(wire: Any) -> None:
    async def body(network: Network) -> None:
        server(network, echo)
        async with network.client(HERE, Liveness(5, 4), stack=lambda s: s.remove("retry"), seed=1) as client:
            await client(mux.Request(b"x"))
            network.darken(HERE)
            began = anyio.current_time()
            with pytest.raises(meshlib.ConnectionLost):
                await client(mux.Request(b"x"))
            assert 4 <= anyio.current_time() - began <= 9.1
            with pytest.raises(meshlib.MeshError, match=r"no connection within 1 s|connect"), meshlib.deadline(20):
                await client(mux.Request(b"x"))
            network.lighten(HERE)
            await anyio.sleep(60)
            assert (await client(mux.Request(b"x"))).body == b"x"

    play(wire, body)


def test_what_was_on_its_way_in_the_dark_arrives_when_it_is_over(wire: Any) -> None:
    async def body(network: Network) -> None:
        server(network, echo)
        async with network.client(HERE, label="me") as client:
            await client(mux.Request(b"x"))
            network.darken(client="somebody else")
            await client(mux.Request(b"x"))
            network.darken(client="me")
            async with anyio.create_task_group() as group:
                group.start_soon(client, mux.Request(b"x"))
                await anyio.sleep(2)
                network.darken(HERE, "me")
                network.lighten(client="me")
                await anyio.sleep(1)
                assert anyio.current_time() == pytest.approx(3, abs=0.1)
                network.lighten(HERE, "me")
            assert anyio.current_time() == pytest.approx(3, abs=0.1)

    play(wire, body)


def test_latency_is_paid_for_the_connect_and_each_way(wire: Any) -> None:
    async def body(network: Network) -> None:
        server(network, echo)
        async with network.client(HERE) as client:
            await client(mux.Request(b"x"))
            began = anyio.current_time()
            await client(mux.Request(b"x"))
            assert anyio.current_time() - began == pytest.approx(0.2, abs=0.001)

    play(wire, body, latency=constant(0.1))


def test_a_name_is_followed(wire: Any) -> None:
    async def body(network: Network) -> None:
        async def named(request: mux.Request, name: bytes) -> mux.Response:
            return mux.Response(name)

        server(network, lambda request: named(request, b"here"))
        server(network, lambda request: named(request, b"there"), address=THERE)
        name = network.name("users", [HERE])
        assert network.name("memory://users") is name
        async with network.client("memory://users") as client:
            assert (await client(mux.Request())).body == b"here"
            name.add(Address.parse(THERE, weight=3))
            name.remove(HERE)
            await anyio.wait_all_tasks_blocked()
            assert (await client(mux.Request())).body == b"there"
            assert [node.address.weight for node in client.endpoints] == [3]
            name.state.set(Neg())
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(meshlib.NoEndpoints, match="no such name"):
                await client(mux.Request())

    play(wire, body)


def test_a_client_that_closes_tells_whoever_waits(wire: Any) -> None:
    async def body(network: Network) -> None:
        server(network, sleep)
        client = network.client(HERE)
        failures: list[meshlib.MeshError] = []

        async def call() -> None:
            try:
                await client(mux.Request(b"60"))
            except meshlib.MeshError as error:
                failures.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await anyio.sleep(1)
            await client.aclose()
        assert anyio.current_time() < 2
        assert [type(error) for error in failures] == [meshlib.ConnectionLost]
        assert client.env.supervisor.jobs == 0

    play(wire, body)


def test_an_unknown_wire_is_refused(wire: Any) -> None:
    with pytest.raises(meshlib.ConfigurationError, match="there are 'mux' and 'direct'"):
        Network(wire=wire + "!")  # type: ignore[arg-type]
