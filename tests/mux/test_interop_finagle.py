"""Against a real Finagle in a JVM: our client and its server, its client and our server.

One server and one client in Java serve most tests; the few that need a peer of their own start one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import pytest

from meshlib import mux
from meshlib.client import Liveness
from meshlib.core.context import Context, TraceId, current, use
from meshlib.core.env import Env
from meshlib.core.errors import DeadlineExceeded, Rejected, RemoteError
from meshlib.core.supervisor import Supervisor
from meshlib.filters.timeout import timeout
from meshlib.mux import Limits, Request, Response, handshake
from meshlib.mux.client import MuxConnector, open_session
from meshlib.mux.messages import Contexts
from meshlib.names.addr import Address
from meshlib.server import Server
from tests.conftest import missing
from tests.interop.finagle import peer
from tests.interop.finagle.peer import Err, FinagleClient, FinagleServer, Ok, parse_context

from .peer import Call

pytestmark = pytest.mark.timeout(300)
"""The first test waits until Maven has brought Finagle, and javac is done."""
REQUEST_HEADERS = b"com.twitter.finagle.thrift.Request.headers"
RESPONSE_HEADERS = b"com.twitter.finagle.thrift.Response.headers"
REJECTED, NON_RETRYABLE = 1 << 3, 1 << 4
"""Of Finagle's FailureFlags."""


@pytest.fixture(scope="module", params=[pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio")])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """The wire is the same on every event loop; one is enough here."""
    return request.param


@pytest.fixture(scope="session")
def classpath() -> list[str]:
    try:
        return peer.build()
    except peer.PeerUnavailable as error:
        missing(str(error))


@pytest.fixture
def no_task_left() -> None:
    """One server of ours serves the whole module, so its sessions outlive each test."""


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *args)


async def until(condition: Callable[[], Awaitable[bool] | bool]) -> None:
    """Wait for the other process."""
    with anyio.fail_after(20):
        while True:
            result = condition()
            if result if isinstance(result, bool) else await result:
                return
            await anyio.sleep(0.01)


def nested(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"".join(struct.pack(">h", len(part)) + part for pair in pairs for part in pair)


def announce(monkeypatch: pytest.MonkeyPatch, fragment: int) -> None:
    """Let our side ask for smaller fragments than its limit would."""
    ours = handshake.our_headers

    def headers(limits: Limits) -> Contexts:
        return ((b"mux-framer", struct.pack(">i", fragment)), *ours(limits)[1:])

    monkeypatch.setattr(handshake, "our_headers", headers)


# --- our client, Finagle's server -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finagle(classpath: list[str]) -> Iterator[FinagleServer]:
    with FinagleServer(classpath) as server:
        yield server


@asynccontextmanager
async def client_of(server: FinagleServer, *layers: Any) -> AsyncIterator[Any]:
    async with mux.client(f"127.0.0.1:{server.port}", *layers) as client:
        yield client


@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 20])
async def test_finagle_echoes_what_we_send(finagle: FinagleServer, size: int) -> None:
    body = bytes(n % 251 for n in range(size))
    async with client_of(finagle) as client:
        assert await client(Request(body, "/echo")) == Response(body)


async def test_finagle_sees_our_contexts(finagle: FinagleServer) -> None:
    async with client_of(finagle, timeout(60.0)) as client:
        context = Context(
            trace=TraceId(0xFF << 64 | 0xA, 0xB, 0xC, sampled=True),
            dtab=(("/s", "/t"), ("/a/b", "/c | /d")),
            opaque=((b"com.example.Unknown", b"\0\xff"),),
        )
        request = Request(b"body", "/ctx", ((REQUEST_HEADERS, nested((b"key", b"value"))),))
        with use(context):
            seen = parse_context((await client(request)).body)
    assert (seen["body"], seen["dest"]) == ("4", "/ctx")
    assert seen["dtab"] == "/s=>/t;/a/b=>/c | /d"
    assert int(seen["traceIdHigh"], 16) == 0xFF
    assert int(seen["traceId"], 16) == 0xA
    assert int(seen["parentId"], 16) == 0xB, "the call has a span of its own below the caller's"
    assert int(seen["spanId"], 16) not in (0xA, 0xB, 0xC)
    assert (seen["sampled"], seen["flags"]) == ("true", "6")
    assert int(seen["deadlineSpanMs"]) == pytest.approx(60_000, abs=100)
    assert seen["context.com.example.Unknown"] == "00ff"
    assert seen["header.key"] == "value"


async def test_finagle_sees_no_contexts_that_we_do_not_have(finagle: FinagleServer) -> None:
    async with client_of(finagle, timeout(None)) as client:
        seen = parse_context((await client(Request(b"", "/ctx"))).body)
    assert (seen["deadline"], seen["dtab"], seen["retries"], seen["sampled"]) == ("unset", "", "unset", "unset")
    assert (seen["trace"], seen["parentId"]) == ("set", "unset")


async def test_contexts_of_finagles_reply_arrive(finagle: FinagleServer) -> None:
    headers = nested((b"key", b"value"), (b"empty", b""))
    async with client_of(finagle) as client:
        reply = await client(Request(b"x", "/echo", ((REQUEST_HEADERS, headers),)))
    assert reply == Response(b"x", ((RESPONSE_HEADERS, headers),))


async def test_an_exception_in_finagle_is_a_remote_error(finagle: FinagleServer) -> None:
    async with client_of(finagle) as client:
        with pytest.raises(RemoteError) as caught:
            await client(Request("wrong: ünïcode".encode(), "/error"))
        assert caught.value.message == "java.lang.Exception: wrong: ünïcode"
        assert caught.value.endpoint == f"127.0.0.1:{finagle.port}"


async def test_a_nack_of_finagles_goes_out_again_under_its_number(finagle: FinagleServer) -> None:
    async with client_of(finagle) as client:
        seen = parse_context((await client(Request(b"", "/flaky/2/ours"))).body)
        assert seen["retries"] == "2"
        assert client.metrics()["retries/requeues"] == 2


async def test_a_nack_of_finagles_is_known_to_be_one(finagle: FinagleServer) -> None:
    env = Env(supervisor=Supervisor("interop"))
    session = await MuxConnector().connect(Address("127.0.0.1", finagle.port), env, None)
    with pytest.raises(Rejected) as caught:
        await session(Request(b"", "/nack"))
    assert caught.value.requeueable
    assert caught.value.by_peer
    await env.supervisor.aclose()


async def test_what_finagle_forbids_to_retry_is_not_retried(finagle: FinagleServer) -> None:
    async with client_of(finagle) as client:
        with pytest.raises(Rejected, match="rejected for good by /nonretryable") as caught:
            await client(Request(b"", "/nonretryable", idempotent=True))
        assert not caught.value.retryable
        assert client.metrics()["retries/requeues"] == 0


async def test_cancelling_interrupts_finagles_handler(finagle: FinagleServer) -> None:
    async with client_of(finagle) as client, anyio.create_task_group() as group:

        async def interrupts() -> int:
            return int((await client(Request(b"", "/interrupts"))).body)

        before = await interrupts()
        calls = [Call(group, client, Request(b"", "/never")) for _ in range(3)]
        await client(Request(b"", "/sleep/20"))
        for call in calls:
            call.cancel()

        async def all_seen() -> bool:
            return await interrupts() == before + 3

        await until(all_seen)
        last = (await client(Request(b"", "/interrupts/last"))).body.decode()
        assert last.startswith("com.twitter.finagle.mux.ClientDiscardedRequestException")
        assert "the caller cancelled the request" in last
        (node,) = client.endpoints
        assert node.load == 0


async def test_a_deadline_that_passes_here_interrupts_finagles_handler(finagle: FinagleServer) -> None:
    async with client_of(finagle, timeout(0.1)) as client, client_of(finagle) as other:
        before = int((await other(Request(b"", "/interrupts"))).body)
        with pytest.raises(DeadlineExceeded):
            await client(Request(b"", "/never"))

        async def seen() -> bool:
            return int((await other(Request(b"", "/interrupts"))).body) == before + 1

        await until(seen)


async def test_many_calls_to_finagle_at_once(finagle: FinagleServer) -> None:
    async with client_of(finagle) as client, anyio.create_task_group() as group:
        calls = [Call(group, client, Request(b"%d" % n, "/sleep/30" if n % 2 else "/echo")) for n in range(300)]
        assert [(await call.result()).body for call in calls] == [b"%d" % n for n in range(300)]


async def test_finagle_answers_our_pings(finagle: FinagleServer) -> None:
    async with client_of(finagle, Liveness(interval=0.02, timeout=10)) as client:
        await client(Request(b"", "/echo"))
        await until(lambda: client.metrics().get(_ping_of(client), 0) >= 3)
        assert (await client(Request(b"x", "/echo"))).body == b"x"


def _ping_of(client: Any) -> str:
    return next((name for name in client.metrics() if name.endswith("mux/ping_latency_us.count")), "")


async def test_fragments_go_both_ways_between_us_and_finagles_server(
    classpath: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(monkeypatch, 700)
    server = await in_thread(lambda: FinagleServer(classpath, max_frame=1000))
    with server:
        env = Env(supervisor=Supervisor("interop"))
        stream = await anyio.connect_tcp("127.0.0.1", server.port)
        session = await open_session(stream, "finagle", env)
        assert session.connection._fragment == 1000
        frames = _spy(session.connection)
        body = bytes(n % 251 for n in range(100_000))
        async with anyio.create_task_group() as group:
            large = [Call(group, session, Request(body[n:], "/echo")) for n in range(4)]
            small = [Call(group, session, Request(b"%d" % n, "/echo")) for n in range(20)]
            assert [(await call.result()).body for call in small] == [b"%d" % n for n in range(20)]
            assert [(await call.result()).body for call in large] == [body[n:] for n in range(4)]
        assert max(frames) == 700 + 4
        assert frames.count(704) > 4 * 140
        await env.supervisor.aclose()


def _spy(connection: Any) -> list[int]:
    """The sizes of all frames that arrive."""
    sizes: list[int] = []
    feed = connection._framer.feed

    class Framer:
        def feed(self, data: bytes) -> list[bytes]:
            frames: list[bytes] = feed(data)
            sizes.extend(map(len, frames))
            return frames

    connection._framer = Framer()
    return sizes


async def test_no_call_fails_when_one_of_two_finagle_servers_drains(classpath: list[str]) -> None:
    async def start() -> FinagleServer:
        return await in_thread(lambda: FinagleServer(classpath))

    servers = [await start(), await start()]
    with servers[0], servers[1]:
        target = ",".join(f"127.0.0.1:{server.port}" for server in servers)
        async with mux.client(target) as client:
            done = 0
            closed = False

            async def caller(n: int) -> None:
                nonlocal done
                after = 0
                while after < 5:
                    body = b"%d" % n
                    assert (await client(Request(body, f"/sleep/{n % 7 * 10}"))).body == body
                    done += 1
                    after += closed

            async with anyio.create_task_group() as group:
                for n in range(20):
                    group.start_soon(caller, n)
                await until(lambda: done > 100)
                await in_thread(servers[0].close)
                closed = True
            assert client.metrics()["requests"] == client.metrics()["success"] == done


# --- Finagle's client, our server -------------------------------------------------------------------------------------


class Behaviours:
    """What our server does with a request, by its destination; the same as Finagle's does with ours."""

    def __init__(self) -> None:
        self.interrupts = 0
        self.running = 0
        self.seen: dict[str, int] = {}
        self.contexts: list[Context] = []

    async def __call__(self, request: Request) -> Response:
        _, kind, *rest = request.dest.split("/")
        self.seen[request.dest] = self.seen.get(request.dest, 0) + 1
        self.contexts.append(current())
        if kind == "never":
            self.running += 1
            try:
                await anyio.sleep_forever()
            finally:
                self.running -= 1
                self.interrupts += 1
        elif kind == "sleep":
            await anyio.sleep(int(rest[0]) / 1000)
        elif kind == "error":
            raise RemoteError(request.body.decode())
        elif kind == "crash":
            raise ValueError("a secret")
        elif kind == "nack" or (kind == "flaky" and self.seen[request.dest] <= int(rest[0])):
            raise Rejected("nacked by us")
        elif kind == "nonretryable":
            raise Rejected("rejected for good by us", retryable=False)
        elif kind == "headers":
            return Response(request.body, ((RESPONSE_HEADERS, dict(current().opaque)[REQUEST_HEADERS]),))
        return Response(request.body)


@pytest.fixture(scope="module")
async def ours(anyio_backend: Any) -> AsyncIterator[tuple[Server, Behaviours]]:
    behaviours = Behaviours()
    async with mux.serve(behaviours, "127.0.0.1:0") as server:
        yield server, behaviours


@pytest.fixture(scope="module")
def jvm(classpath: list[str], ours: tuple[Server, Behaviours]) -> Iterator[FinagleClient]:
    with FinagleClient(classpath, ours[0].address) as client:
        yield client


async def test_we_echo_what_finagle_sends(jvm: FinagleClient) -> None:
    for size in (0, 1, 1000, 1 << 20):
        body = bytes(n % 251 for n in range(size))
        assert await in_thread(jvm.call, "/echo", body) == Ok(body)


async def test_we_see_finagles_contexts(jvm: FinagleClient, ours: tuple[Server, Behaviours]) -> None:
    behaviours = ours[1]

    async def seen(method: Callable[..., Any], *args: Any) -> Context:
        behaviours.contexts.clear()
        assert await in_thread(method, *args, "/echo", b"x") == Ok(b"x")
        return behaviours.contexts[-1]

    clock = ours[0].env.clock
    context = await seen(jvm.deadline, 60_000)
    assert context.deadline is not None
    assert context.deadline - clock.now() == pytest.approx(60, abs=5)
    assert (context.attempt, context.dtab) == (0, ())
    assert (await seen(jvm.dtab, "/s=>/t;/a/b=>/c|/d")).dtab == (("/s", "/t"), ("/a/b", "/c | /d"))
    trace = (await seen(jvm.trace, "00000000000000ff000000000000000a", "000000000000000b", "000000000000000c")).trace
    assert trace is not None
    assert (trace.trace, trace.parent, trace.sampled) == (0xFF << 64 | 0xA, 0xB, True)
    opaque = (await seen(jvm.headers, {"key": "value"})).opaque
    assert opaque == ((REQUEST_HEADERS, nested((b"key", b"value"))),)


async def test_finagle_sees_the_contexts_of_our_reply(jvm: FinagleClient) -> None:
    reply = await in_thread(jvm.headers, {"key": "value", "empty": ""}, "/headers", b"x")
    assert reply == Ok(b"x", ((b"key", b"value"), (b"empty", b"")))


async def test_our_failures_are_finagles(jvm: FinagleClient, ours: tuple[Server, Behaviours]) -> None:
    """Each is followed by a success: after five failures in a row Finagle would stop to ask."""
    error = await in_thread(jvm.call, "/error", "wrong: ünïcode".encode())
    assert error == Err("com.twitter.finagle.mux.ServerApplicationError", 0, "wrong: ünïcode")
    crash = await in_thread(jvm.call, "/crash")
    assert isinstance(crash, Err)
    assert crash.exception == "com.twitter.finagle.mux.ServerApplicationError"
    assert "secret" not in crash.message
    assert await in_thread(jvm.call, "/echo", b"x") == Ok(b"x")

    final = await in_thread(jvm.call, "/nonretryable")
    assert isinstance(final, Err)
    assert (final.flags, ours[1].seen["/nonretryable"]) == (REJECTED | NON_RETRYABLE, 1)
    assert "rejected for good by us" in final.message
    assert await in_thread(jvm.call, "/echo", b"x") == Ok(b"x")


async def test_an_interrupt_in_finagle_cancels_our_handler(jvm: FinagleClient, ours: tuple[Server, Behaviours]) -> None:
    behaviours = ours[1]
    before = behaviours.interrupts
    for n, interrupt in enumerate((jvm.cancel, jvm.supersede, jvm.deadline), start=1):
        # The deadline is known to our server as well: whoever is first, the handler is cancelled once.
        outcome = await in_thread(interrupt, 100, "/never", b"x")
        assert isinstance(outcome, Err)
        await until(lambda n=n: behaviours.interrupts == before + n)
        assert behaviours.running == 0
        assert await in_thread(jvm.call, "/echo", b"x") == Ok(b"x")
        if interrupt != jvm.deadline:
            assert ours[0].metrics().get("mux/orphaned_tdiscard", 0) == 0


async def test_many_calls_of_finagle_at_once(jvm: FinagleClient) -> None:
    await in_thread(jvm.parallel, 200, 100, "/sleep/20")
    await in_thread(jvm.parallel, 20, 100_000, "/echo")


async def test_our_nack_is_requeued_by_finagle_until_it_is_served(
    jvm: FinagleClient, ours: tuple[Server, Behaviours]
) -> None:
    """The last to use this client: after the failures here, it takes its only server for dead for a while."""
    behaviours = ours[1]
    assert await in_thread(jvm.call, "/flaky/2/finagle", b"x") == Ok(b"x")
    assert behaviours.seen["/flaky/2/finagle"] == 3
    assert behaviours.contexts[-1].attempt == 2

    refused = await in_thread(jvm.call, "/nack")
    assert isinstance(refused, Err)
    assert refused.flags & REJECTED
    assert behaviours.seen["/nack"] > 1


async def test_fragments_go_both_ways_between_finagles_client_and_us(
    classpath: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(monkeypatch, 700)
    async with mux.serve(Behaviours(), "127.0.0.1:0") as server:
        client = await in_thread(lambda: FinagleClient(classpath, server.address, max_frame=1000))
        with client:
            assert await in_thread(client.call, "/echo", b"first") == Ok(b"first")
            (session,) = server.connections
            assert session.connection._fragment == 1000
            frames = _spy(session.connection)
            await in_thread(client.parallel, 8, 20_000, "/echo")
            assert max(frames) == 704
            assert frames.count(704) >= 8 * math.floor(20_000 / 700)
            await in_thread(client.close)


async def test_no_call_of_finagles_fails_when_our_server_drains_and_another_takes_over(
    classpath: list[str],
) -> None:
    behaviours = Behaviours()
    server = await mux.serve(behaviours, "127.0.0.1:0")
    client = await in_thread(lambda: FinagleClient(classpath, server.address))
    with client:
        assert await in_thread(client.call, "/echo", b"x") == Ok(b"x")
        async with anyio.create_task_group() as group:

            async def slow() -> None:
                assert await in_thread(client.call, "/sleep/300", b"slow") == Ok(b"slow")

            group.start_soon(slow)
            await until(lambda: behaviours.seen.get("/sleep/300") == 1)
            await server.aclose()
        assert (server.metrics()["mux/draining"], server.metrics()["mux/drained"]) == (1, 1)
        assert client.running
        async with mux.serve(behaviours, server.address):
            for n in range(10):
                assert await in_thread(client.call, "/echo", b"%d" % n) == Ok(b"%d" % n)
            await in_thread(client.close)
