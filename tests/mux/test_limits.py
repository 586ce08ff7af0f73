"""What one connection may ask of us: each breach ends that connection, in words, and nothing else."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from meshlib.core.clock import Clock
from meshlib.core.context import Context, current, use
from meshlib.core.env import Env
from meshlib.core.errors import ConnectionLost, InvalidArgument, RemoteError
from meshlib.core.supervisor import Supervisor
from meshlib.mux import Limits, Request, Response
from meshlib.mux.client import open_session
from meshlib.mux.client_session import ClientSession
from meshlib.mux.codec import encode
from meshlib.mux.messages import Rdiscarded, Rdispatch, ReplyStatus, Rerr, Rping, Tdiscarded, Tdispatch, Tping
from meshlib.telemetry.metrics import Registry
from meshlib.testing import duplex

from .peer import Call, RawPeer, ServerRig, server_rig, settle
from .test_server_session import Gate

LIMITS = Limits(max_frame=1000, max_contexts=100, max_in_flight=3)


def fragment(tag: int, payload: bytes) -> bytes:
    return (4 + len(payload)).to_bytes(4, "big") + b"\x02" + (tag | 0x800000).to_bytes(3, "big") + payload


BREACHES: dict[str, tuple[bytes, str, str]] = {
    "a frame": (
        (1001).to_bytes(4, "big"),
        "frame_too_large",
        "a frame of 1001 bytes; the limit here is 1000 (Limits.max_frame)",
    ),
    "the largest frame there is": (
        b"\x7f\xff\xff\xff",
        "frame_too_large",
        "a frame of 2147483647 bytes; the limit here is 1000 (Limits.max_frame)",
    ),
    "a message in fragments": (
        fragment(9, bytes(900)) + fragment(9, bytes(97)),
        "frame_too_large",
        "fragments of a message over 1000 bytes (Limits.max_frame)",
    ),
    "contexts": (
        encode(Tdispatch(9, ((b"k" * 50, b"v" * 47),))),
        "contexts_too_large",
        "a context section of more than 100 bytes (Limits.max_contexts)",
    ),
    "a Dtab": (
        encode(Tdispatch(9, (), "", (("/k" * 25, "/v" * 25),))),
        "contexts_too_large",
        "a context section of more than 100 bytes (Limits.max_contexts)",
    ),
    "requests at once": (
        b"".join(encode(Tdispatch(tag, body=b"%d" % tag)) for tag in range(10, 14)),
        "too_many_in_flight",
        "more than 3 requests at once (Limits.max_in_flight)",
    ),
    "messages that are incomplete": (
        b"".join(fragment(tag, b"") for tag in range(10, 14)),
        "too_many_in_flight",
        "more than 3 incomplete messages (Limits.max_in_flight)",
    ),
}


@pytest.mark.parametrize(("data", "kind", "text"), BREACHES.values(), ids=BREACHES)
async def test_a_breach_ends_that_connection_alone_in_words(data: bytes, kind: str, text: str) -> None:
    gate = Gate()
    async with server_rig(gate, limits=LIMITS) as rig:
        other = await rig.open()
        await other.send(Tdispatch(2, body=b"other"))
        peer = await rig.open()
        await peer.send(Tdispatch(2, body=b"mine"))
        await settle()

        await peer.send(data)
        await peer.expect(Rerr(1, text), Rerr(2, text))
        while (message := await next_or_none(peer)) is not None:
            assert isinstance(message, Rerr)
            assert message.why == text
        await settle()
        assert b"mine" in gate.cancelled
        assert rig.counter(f"violations/{kind}") == 1

        assert len(rig.server.connections) == 1
        assert b"other" not in gate.cancelled
        gate.let(b"other")
        await other.expect(Rdispatch(2, ReplyStatus.OK, (), b"other"))
        await other.silent()


async def next_or_none(peer: RawPeer) -> object:
    try:
        return await peer.receive()
    except anyio.EndOfStream:
        return None


@pytest.mark.parametrize(
    ("data", "tag"),
    [
        (encode(Tdispatch(9, body=bytes(990))), 9),
        (fragment(9, bytes(900)) + (4 + 96).to_bytes(4, "big") + b"\x02\0\0\x09" + bytes(96), 9),
        (encode(Tdispatch(9, ((b"k" * 50, b"v" * 46),))), 9),
    ],
    ids=["a frame", "a message in fragments", "contexts"],
)
async def test_what_is_just_within_a_limit_is_served(data: bytes, tag: int) -> None:
    async with server_rig(limits=LIMITS) as rig:
        peer = await rig.open()
        await peer.send(data)
        reply = await peer.receive()
        assert isinstance(reply, Rdispatch)
        assert (reply.tag, reply.status) == (tag, ReplyStatus.OK)


async def test_as_many_requests_as_the_limit_says_are_served_at_once_and_again() -> None:
    gate = Gate()
    async with server_rig(gate, limits=LIMITS) as rig:
        peer = await rig.open()
        for turn in (b"1", b"2", b"3"):
            await peer.send(*(Tdispatch(tag, body=turn) for tag in (2, 3, 4)))
            await settle()
            assert rig.session.in_flight == 3
            gate.let(turn)
            await peer.receive_n(3)


async def test_discarding_does_not_make_room_before_the_handler_has_ended() -> None:
    """Else a client could have any number of handlers under way that take their time to be cancelled."""
    release = anyio.Event()

    async def slow_to_go(request: Request) -> Response:
        with anyio.move_on_after(20, shield=True):
            await release.wait()
        return Response()

    async with server_rig(slow_to_go, limits=LIMITS) as rig:
        peer = await rig.open()
        for tag in (2, 3, 4):
            await peer.send(Tdispatch(tag))
            await settle()
            await peer.send(Tdiscarded(0, tag))
            await peer.expect(Rdiscarded(tag))
        assert rig.session.in_flight == 0
        await peer.send(Tdispatch(5))
        await peer.expect(Rerr(1, "more than 3 requests at once (Limits.max_in_flight)"))
        release.set()
        await peer.ended()


@pytest.mark.parametrize("size", [16 * 2**20, 2**31 - 1])
async def test_a_size_alone_takes_no_memory(size: int) -> None:
    async with server_rig() as rig:
        peer = await rig.open()
        await settle()
        tracemalloc.start()
        try:
            await peer.stream.send(size.to_bytes(4, "big"))
            await settle()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 256 * 1024
        assert len(rig.server.connections) == (1 if size == 16 * 2**20 else 0)


async def test_a_connection_holds_no_more_than_four_messages_in_fragments() -> None:
    limits = Limits(max_frame=100_000)
    async with server_rig(limits=limits) as rig:
        peer = await rig.open()
        await settle()

        async def flood() -> None:
            for tag in range(2, 50):
                for _ in range(9):
                    await peer.stream.send(fragment(tag, bytes(10_000)))
                    await settle(5)

        tracemalloc.start()
        try:
            with pytest.raises(anyio.BrokenResourceError):
                await flood()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 10 * limits.max_frame
        assert rig.counter("violations/frame_too_large") == 1


# --- what our own client is told --------------------------------------------------------------------------------------


@asynccontextmanager
async def connected(rig: ServerRig, limits: Limits = Limits()) -> AsyncIterator[tuple[ClientSession, Registry]]:  # noqa: B008
    """Our client over memory to our server."""
    here, there = duplex()
    registry = Registry()
    env = Env(metrics=registry, supervisor=Supervisor("client"), clock=Clock())
    rig.server.env.supervisor.start(rig.server.serve_stream, there)
    session = await open_session(here, "server:1", env, limits)
    try:
        yield session, registry
    finally:
        with anyio.CancelScope(shield=True):
            await env.supervisor.aclose()


OFFENCES = {
    "a frame": (Request(bytes(2000)), "fragments of a message over 1000 bytes (Limits.max_frame)"),
    "contexts": (
        Request(contexts=((b"k", bytes(200)),)),
        "a context section of more than 100 bytes (Limits.max_contexts)",
    ),
}


@pytest.mark.parametrize(("request_", "text"), OFFENCES.values(), ids=OFFENCES)
async def test_a_client_over_a_limit_learns_which(request_: Request, text: str) -> None:
    gate = Gate()
    async with (
        server_rig(gate, limits=LIMITS) as rig,
        connected(rig) as (session, _),
        connected(rig) as (other, _),
        anyio.create_task_group() as group,
    ):
        innocent = Call(group, session, Request(b"innocent"))
        bystander = Call(group, other, Request(b"bystander"))
        await settle()
        error = await Call(group, session, request_).result()
        for failed in (error, await innocent.result()):
            assert isinstance(failed, ConnectionLost)
            assert failed.message == f"the server ended the session: {text}"
        gate.let(b"bystander")
        assert (await bystander.result()).body == b"bystander"


async def test_a_client_with_too_many_requests_under_way_learns_so() -> None:
    gate = Gate()
    async with (
        server_rig(gate, limits=LIMITS) as rig,
        connected(rig) as (session, _),
        anyio.create_task_group() as group,
    ):
        calls = [Call(group, session, Request(b"%d" % n)) for n in range(5)]
        errors = [await call.result() for call in calls]
        assert {type(error) for error in errors} == {ConnectionLost}
        text = "the server ended the session: more than 3 requests at once (Limits.max_in_flight)"
        assert {error.message for error in errors} == {text}


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (Request(bytes(1000)), "over Limits.max_frame"),
        (Request(contexts=((b"k", bytes(100)),)), "over Limits.max_contexts"),
    ],
    ids=["a frame", "contexts"],
)
async def test_a_request_over_the_clients_own_limits_does_not_leave(request_: Request, text: str) -> None:
    """Its server's limits are likely the same, and to break those would end every call on the connection."""
    async with (
        server_rig(limits=LIMITS) as rig,
        connected(rig, LIMITS) as (session, _),
        anyio.create_task_group() as group,
    ):
        error = await Call(group, session, request_).result()
        assert isinstance(error, InvalidArgument)
        assert text in error.message
        assert session.pending == session._tags.in_use == 0
        assert (await session(Request(b"fine"))).body == b"fine"
        assert (await session(Request(bytes(1000 - 10)))).body == bytes(990)


@pytest.mark.parametrize(
    "reply", [Response(bytes(1000)), Response(b"", ((b"k", bytes(100)),))], ids=["a frame", "contexts"]
)
async def test_a_reply_over_the_servers_own_limits_does_not_leave(
    reply: Response, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Request) -> Response:
        return reply if request.body == b"big" else Response(request.body)

    async with (
        server_rig(handler, limits=LIMITS) as rig,
        connected(rig, LIMITS) as (session, _),
        anyio.create_task_group() as group,
    ):
        error = await Call(group, session, Request(b"big")).result()
        assert isinstance(error, RemoteError)
        assert (await session(Request(b"fine"))).body == b"fine"
    assert "cannot be sent" in caplog.text


async def test_what_only_travels_through_is_left_out_before_it_makes_a_request_too_large() -> None:
    seen: list[Context] = []

    async def handler(request: Request) -> Response:
        seen.append(current())
        return Response()

    limits = Limits(max_contexts=200)
    async with server_rig(handler, limits=limits) as rig, connected(rig, limits) as (session, _):
        opaque = ((b"a", bytes(100)), (b"b", bytes(100)), (b"c", bytes(40)))
        with use(Context(client_id="shop", opaque=opaque)):
            await session(Request(contexts=((b"mine", b"1"),)))
    assert seen[0].client_id == "shop"
    assert seen[0].opaque == ((b"a", bytes(100)), (b"mine", b"1"))


@pytest.mark.parametrize("size", [101, 300])
async def test_a_reply_over_the_clients_limit_ends_its_connection_alone(size: int) -> None:
    async def bloat(request: Request) -> Response:
        return Response(bytes(size) if request.body == b"big" else b"small")

    async with (
        server_rig(bloat) as rig,
        connected(rig, Limits(max_frame=100)) as (session, registry),
        connected(rig) as (other, _),
        anyio.create_task_group() as group,
    ):
        assert (await session(Request(b"x"))).body == b"small"
        error = await Call(group, session, Request(b"big")).result()
        assert isinstance(error, ConnectionLost)
        assert error.message == (
            "the server broke the protocol: fragments of a message over 100 bytes (Limits.max_frame)"
        )
        assert registry.counter("mux/violations/frame_too_large").value == 1
        assert len((await other(Request(b"big"))).body) == size


async def test_the_contexts_of_a_reply_count_too() -> None:
    async def chatty(request: Request) -> Response:
        return Response(b"", ((b"k", bytes(200)),))

    async with (
        server_rig(chatty) as rig,
        connected(rig, Limits(max_contexts=100)) as (session, registry),
        anyio.create_task_group() as group,
    ):
        error = await Call(group, session, Request()).result()
        assert isinstance(error, ConnectionLost)
        assert "Limits.max_contexts" in error.message
        assert registry.counter("mux/violations/contexts_too_large").value == 1


async def test_a_ping_is_no_request() -> None:
    gate = Gate()
    async with server_rig(gate, limits=LIMITS) as rig:
        peer = await rig.open()
        await peer.send(*(Tdispatch(tag, body=b"x") for tag in (2, 3, 4)), *(Tping(n) for n in range(10)))
        await peer.expect(*(Rping(n) for n in range(10)))
        gate.let(b"x")
        await peer.receive_n(3)
