"""Bytes that no honest peer would send. ``MESHLIB_FUZZ=1000000`` in the environment makes it a long run.

Each run begins from another seed; what fails says from which, and ``MESHLIB_FUZZ_SEED`` repeats it.
"""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from meshlib.core.clock import Clock
from meshlib.core.context import Context, TraceId
from meshlib.core.env import Env
from meshlib.core.errors import MeshError
from meshlib.core.supervisor import Supervisor
from meshlib.mux import Limits, Request
from meshlib.mux.client import open_session
from meshlib.mux.codec import MuxError, decode, encode, encode_tdispatch
from meshlib.mux.contexts import ContextReader, encode_context
from meshlib.mux.failure import from_wire, to_wire
from meshlib.mux.framer import Fragmenter, Framer, Reassembler
from meshlib.mux.handshake import ClientHandshake, ServerHandshake
from meshlib.mux.messages import (
    MAX_TAG,
    Rdiscarded,
    Rdispatch,
    Rdrain,
    ReplyStatus,
    Rerr,
    Rinit,
    Rping,
    Rreq,
    Tdiscarded,
    Tdispatch,
    Tdrain,
    Tinit,
    Tlease,
    Tping,
    Treq,
)
from meshlib.telemetry.metrics import Counter
from meshlib.testing import MemoryStream, duplex

from .peer import PROBE, RawPeer, echo, server_rig, settle

COUNT = int(os.environ.get("MESHLIB_FUZZ", "100000"))
SEED = int(os.environ.get("MESHLIB_FUZZ_SEED", str(secrets.randbits(32))))
LIMITS = Limits(max_frame=4096, max_contexts=512, max_in_flight=50)

CLOCK = Clock(lambda: 1000.0, lambda: 1_700_000_000 * 10**9)
RECORDINGS = Path(__file__).parents[1] / "interop" / "finagle" / "recordings.json"


def seeds() -> list[bytes]:
    """Streams that an honest peer might send, most of them one frame long."""
    rich = Context(
        deadline=1001.0,
        trace=TraceId(7 << 64 | 5, 8, 7, sampled=True, state="v=1"),
        attempt=2,
        client_id="shop",
        baggage="a=1,b=2",
        opaque=((b"com.example.Unknown", b"\0\xff"),),
    )
    kind = to_wire(MeshError("x"))[1]
    messages = [
        Treq(2, (8, 7, 5), 1, b"body"),
        Rreq(2, ReplyStatus.OK, b"body"),
        Tdispatch(2, ((b"key", b"value"),), "/users/get", (("/s", "/t | /u"), ("/v", "~")), b"body"),
        Tdispatch(3),
        Rdispatch(2, ReplyStatus.OK, ((b"key", b"value"),), b"body"),
        Rdispatch(2, ReplyStatus.NACK, ((b"MuxFailure", bytes(7) + b"\3"),), b"no"),
        Rdispatch(2, ReplyStatus.ERROR, ((b"meshlib.error", b"\x82\xa4kind\xafInvalidArgument\xa4path\xa1x"), *kind)),
        Tdrain(1),
        Rdrain(1),
        Tping(1),
        Rping(1),
        Tdiscarded(0, 2, "no"),
        Rdiscarded(2),
        Tlease(0, 0, 1000),
        Tinit(1, 1, ((b"mux-framer", b"\0\0\1\0"), (b"tls", b"desired"))),
        Rinit(1, 1, ((b"mux-framer", b"\x7f\xff\xff\xff"), (b"tls", b"off"))),
        Rerr(1, "tinit check"),
        Rerr(2, "why"),
    ]
    streams = [encode(message) for message in messages]
    streams.append(encode_tdispatch(4, encode_context(rich, CLOCK), "/rich", (("/s", "/t"),), b"body"))
    fragmenter = Fragmenter(encode(Tdispatch(5, body=bytes(range(200)))), 50)
    pieces = [fragmenter.take() for _ in range(5)]
    streams += [*pieces, b"".join(pieces), pieces[0] + encode(Tdiscarded(0, 5)), PROBE + streams[14]]
    for exchange in json.loads(RECORDINGS.read_text(encoding="utf-8"))["exchanges"]:
        chunks = [bytes.fromhex(chunk["hex"]) for chunk in exchange["connections"][0]]
        streams += [chunk for chunk in chunks if 0 < len(chunk) < 400]
    return streams


SEEDS = seeds()
EDGES = [
    struct.pack(form, number)
    for form, numbers in (
        (">b", (0, 1, -1, 2, -2, 64, 65, 66, -62, 67, 68, -68, 127, -128)),
        (">h", (0, 1, -1, 2, 0x7FFF, -0x8000, 0x4000)),
        (">i", (0, 3, 4, -1, 4096, 4097, 0x7FFFFFFF, -0x80000000)),
        (">q", (0, -1, 2**63 - 1, -(2**63))),
    )
    for number in numbers
]


def mutated(rng: random.Random) -> bytes:
    """A seed with a few things wrong with it; now and then, bytes without any sense."""
    if rng.random() < 0.02:
        return rng.randbytes(rng.randrange(200))
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(8)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif what == 2:
            edge = rng.choice(EDGES)
            data[at : at + len(edge)] = edge
        elif what == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif what == 4:
            del data[at : at + rng.randrange(1, 9)]
        elif what == 5:
            del data[at:]
        elif what == 6:
            data[at:at] = data[at : at + rng.randrange(1, 40)] * rng.randrange(1, 4)
        else:
            data += rng.choice(SEEDS)
    if len(data) > 8 and rng.random() < 0.6:  # make the size right again, so that the fault lies inside
        data[:4] = (len(data) - 4).to_bytes(4, "big")
    return bytes(data)


class Peer:
    """All of this package that bytes from the network pass through, as a connection strings it together."""

    def __init__(self, limits: Limits = LIMITS, *, identity: bool = True) -> None:
        self.limits = limits
        self.identity = identity
        self.framer = Framer(limits.max_frame)
        self.reassembler = Reassembler(limits)
        self.server: ServerHandshake | None = ServerHandshake(limits)
        self.client: ClientHandshake | None = ClientHandshake(limits)
        self.reader = ContextReader(CLOCK, undecodable=Counter())

    def receive(self, data: bytes) -> None:
        for frame in self.framer.feed(data):
            whole = self.reassembler.add(frame)
            if whole is not None:
                self.understand(whole)
        assert self.framer.held <= self.limits.max_frame + 4
        assert self.reassembler.held <= 4 * self.limits.max_frame

    def understand(self, frame: bytes) -> None:
        message = decode(frame, self.limits.max_contexts)
        if self.identity:
            assert decode(encode(message)[4:], self.limits.max_contexts) == message
        if isinstance(message, Tdispatch):
            context = self.reader.read(message.contexts, message.dtab)
            encode_tdispatch(2, encode_context(context, CLOCK), message.dest, context.dtab, message.body)
        elif isinstance(message, Rdispatch):
            to_wire(from_wire(message.status, message.contexts, message.body))
        elif isinstance(message, Rreq):
            to_wire(from_wire(message.status, (), message.body))
        elif isinstance(message, Tdiscarded):
            self.reassembler.forgot(message.which)
        assert 0 <= message.tag <= MAX_TAG
        for handshake in (self.server, self.client):
            if handshake is not None and handshake.result is None:
                handshake.receive(message)


def test_no_bytes_raise_anything_but_what_is_meant_for_them() -> None:
    """A connection goes on from one string of bytes to the next until one of them ends it."""
    rng = random.Random(SEED)
    peer = Peer()
    refused = 0
    for n in range(COUNT):
        data = mutated(rng)
        at = rng.choice((0, 0, rng.randrange(len(data) + 1)))
        try:
            peer.receive(data[:at])
            peer.receive(data[at:])
        except MuxError as error:
            refused += 1
            assert error.kind and error.message  # noqa: PT017, PT018 - it need not be raised
            peer = Peer()
        except BaseException as error:
            error.add_note(f"MESHLIB_FUZZ_SEED={SEED}, string {n}: {data.hex()}")
            raise
        if peer.framer.held and rng.random() < 0.3:
            peer = Peer()  # else most strings would be swallowed as the body of some large frame
    # The mutations are neither all rubbish nor all harmless.
    assert COUNT * 0.05 < refused < COUNT * 0.95


def test_no_bytes_take_more_memory_than_the_limits_allow() -> None:
    rng = random.Random(SEED)
    peer = Peer(identity=False)
    tracemalloc.start()
    try:
        for n in range(min(COUNT, 100_000) // 20):
            data = mutated(rng)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            try:
                peer.receive(data)
            except MuxError:
                peer = Peer(identity=False)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < 6 * LIMITS.max_frame + 64 * LIMITS.max_contexts, (SEED, n, data.hex())
    finally:
        tracemalloc.stop()


def frame(code: int, tag: int, payload: bytes) -> bytes:
    return struct.pack(">ibBH", 4 + len(payload), code, tag >> 16, tag & 0xFFFF) + payload


BIG = Limits(max_frame=256 * 1024, max_contexts=16 * 1024, max_in_flight=1000)
HOSTILE: dict[str, list[bytes]] = {
    "a size of 2 GiB": [b"\x7f\xff\xff\xff", b"\0" * 1000],
    "a negative size": [b"\xff\xff\xff\xff"],
    "the largest frame, a byte at a time": [struct.pack(">i", BIG.max_frame)] + [b"\0"] * 50_000,
    "the largest frame, two bytes at a time": [struct.pack(">i", BIG.max_frame)] + [b"\1\2"] * 50_000,
    "32,767 pairs in a frame of 20 bytes": [frame(2, 2, b"\x7f\xff" + bytes(20))] * 1000,
    "as many empty pairs as fit": [frame(2, 2, struct.pack(">h", 32_000) + bytes(128_000) + bytes(4))],
    "as many empty pairs as are allowed": [frame(2, 2, struct.pack(">h", 4096) + bytes(4 * 4096) + bytes(4))],
    "as many empty rules as are allowed": [frame(2, 2, bytes(4) + struct.pack(">h", 4096) + bytes(4 * 4096))],
    "as many empty pairs in a reply": [frame(-2, 2, b"\0" + struct.pack(">h", 4096) + bytes(4 * 4096))],
    "as many empty headers as are allowed": [PROBE, frame(68, 1, b"\0\1" + bytes(16 * 1024))],
    "255 keys": [frame(1, 2, b"\xff" + b"\x09\0" * 255)],
    "fragments without end": [frame(2, 0x800002, bytes(1000))] * 1000,
    "tiny fragments of one message": [frame(2, 0x800002, b"x")] * 50_000,
    "empty fragments of one message": [frame(2, 0x800002, b"")] * 50_000,
    "empty fragments of all messages": [frame(2, 0x800000 | tag, b"") for tag in range(2, 20_000)],
    "fragments begun and given up": [
        frame(2, 0x800000 | tag, b"x") + frame(66, 0, tag.to_bytes(3, "big")) for tag in range(2, 5000)
    ],
    "large fragments of many messages": [frame(2, 0x800000 | tag, bytes(50_000)) for tag in range(2, 100)],
    "an error as large as a frame": [frame(127, 2, b"\xff" * (BIG.max_frame - 4))],
    "a reason as large as a frame": [frame(-62, 0, bytes(3) + b"\xff" * (BIG.max_frame - 7))],
    "flags nested 10,000 deep": [frame(-2, 2, b"\1\0\1\0\x0dmeshlib.error" + b"\x27\x10" + b"\x91" * 10_000)],
    "a deep map as kind": [frame(-2, 2, b"\1\0\1\0\x0dmeshlib.error" + b"\x27\x10" + b"\x81\xa1k" * 3_333 + b"\0")],
}


@pytest.mark.parametrize("reads", HOSTILE.values(), ids=HOSTILE)
def test_what_was_made_to_hurt_takes_no_more_memory_than_the_limits_allow(reads: list[bytes]) -> None:
    peer = Peer(BIG, identity=False)
    tracemalloc.start()
    try:
        for data in reads:
            peer.receive(data)
    except MuxError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # Four messages in fragments, the one that is joined, its copy; and what 16 kB of empty pairs cost as objects.
    assert peak < 7 * BIG.max_frame + 80 * BIG.max_contexts


# --- whole sessions ---------------------------------------------------------------------------------------------------


async def test_a_server_survives_whatever_its_clients_send(caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(SEED)
    caplog.set_level(logging.ERROR)
    async with server_rig(echo, limits=LIMITS) as rig:
        honest = await rig.open()
        for n in range(max(100, COUNT // 500)):
            peer = await rig.open(negotiate=rng.random() < 0.5)
            data = b"".join(mutated(rng) for _ in range(rng.randrange(1, 6)))
            with anyio.move_on_after(5):
                with suppress(anyio.BrokenResourceError):
                    await peer.stream.send(data)
                await settle(15)
            await rng.choice((peer.stream.aclose, peer.stream.send_eof))()
            await settle(15)
            assert not caplog.records, (SEED, n, data.hex())
        await honest.silent()
        await settle()
        assert len(rig.server.connections) == 1
        assert rig.server.env.supervisor.jobs == 1


async def test_a_client_survives_whatever_its_server_sends(caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(SEED)
    caplog.set_level(logging.ERROR)
    for n in range(max(100, COUNT // 500)):
        here, there = duplex()
        env = Env(supervisor=Supervisor("client"), clock=Clock())
        data = b"".join(mutated(rng) for _ in range(rng.randrange(1, 6)))
        async with anyio.create_task_group() as group:
            if rng.random() < 0.7:
                group.start_soon(RawPeer(there).accept)
            else:
                group.start_soon(say, there, data)
            try:
                session = await open_session(here, "peer", env, LIMITS)
            except MeshError:
                await there.aclose()
                continue
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(expect_an_end, session)
            await settle(5)
            await say(there, data)
        await settle()
        assert env.supervisor.jobs == 0, (SEED, n, data.hex())
        assert not caplog.records, (SEED, n, data.hex())


async def say(stream: MemoryStream, data: bytes) -> None:
    """Send it, and close."""
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        await stream.send(data)
        await settle(15)
    await stream.aclose()


async def expect_an_end(session: object) -> None:
    """Whatever comes of the call, something does, and it is a reply or one of our own errors."""
    with anyio.fail_after(20):
        with suppress(MeshError):
            await session(Request(b"x"))
