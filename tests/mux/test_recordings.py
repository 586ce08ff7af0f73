"""What a real Finagle client and server said to each other, against each part of this package.

The recordings are beside `tests/interop/finagle/record.py`, which made them; no Java is needed to read them.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import msgspec
import pytest

from meshlib.core.errors import ConnectionLost, MeshError, Rejected, RemoteError
from meshlib.mux import Limits, Request, Response
from meshlib.mux.codec import decode, encode
from meshlib.mux.contexts import ContextReader
from meshlib.mux.framer import Fragmenter, Framer, Reassembler
from meshlib.mux.handshake import ClientHandshake, ServerHandshake
from meshlib.mux.messages import (
    Message,
    Rdispatch,
    Rdrain,
    ReplyStatus,
    Rerr,
    Rinit,
    Rping,
    Tdiscarded,
    Tdispatch,
    Tdrain,
    Tinit,
    Tping,
    Unknown,
)
from meshlib.telemetry.metrics import Counter as Count
from meshlib.testing import run_virtual

from .peer import PROBE, RawPeer, client_rig, server_rig, settle
from .test_contexts import clock

FILE = Path(__file__).parents[1] / "interop" / "finagle" / "recordings.json"
EXCHANGES: dict[str, dict[str, Any]] = {
    exchange["name"]: exchange for exchange in json.loads(FILE.read_text(encoding="utf-8"))["exchanges"]
}
every_exchange = pytest.mark.parametrize("name", EXCHANGES)


class Said(NamedTuple):
    """One message of a recording: who said it, what it was, and its frames as they came (with their sizes)."""

    side: str
    message: Message | None
    frames: tuple[bytes, ...]


def transcript(name: str) -> Iterator[Said]:
    """Every message, in the order in which it ended; ``None`` where a side ended its stream."""
    (connection,) = EXCHANGES[name]["connections"]
    framers = {side: Framer() for side in ("client", "server")}
    reassemblers = {side: Reassembler(Limits()) for side in framers}
    parts: dict[tuple[str, int], list[bytes]] = {}
    for chunk in connection:
        side = chunk["from"]
        if not chunk["hex"]:
            assert framers[side].held == reassemblers[side].held == 0
            yield Said(side, None, ())
        for frame in framers[side].feed(bytes.fromhex(chunk["hex"])):
            key = (side, int.from_bytes(frame[1:4], "big") & 0x7FFFFF)
            parts.setdefault(key, []).append(len(frame).to_bytes(4, "big") + frame)
            whole = reassemblers[side].add(frame)
            if whole is not None:
                yield Said(side, decode(whole), tuple(parts.pop(key)))


def stream(name: str, side: str) -> bytes:
    return b"".join(bytes.fromhex(c["hex"]) for c in EXCHANGES[name]["connections"][0] if c["from"] == side)


# --- bytes ------------------------------------------------------------------------------------------------------------


@every_exchange
def test_every_byte_is_understood(name: str) -> None:
    said = list(transcript(name))
    for side in ("client", "server"):
        assert sum(len(frame) for s in said if s.side == side for frame in s.frames) == len(stream(name, side))
    assert not [s for s in said if isinstance(s.message, Unknown)]


@every_exchange
def test_we_would_have_sent_the_same_bytes(name: str) -> None:
    exchange = EXCHANGES[name]
    limits = {"client": exchange["server_max_frame"], "server": exchange["client_max_frame"]}
    fragmented = False
    for side, message, frames in transcript(name):
        if message is None:
            continue
        whole = encode(message)
        limit = limits[side]
        if limit is None or len(whole) - 8 <= limit or not isinstance(message, Tdispatch | Rdispatch):
            assert (whole,) == frames
        else:
            fragmenter = Fragmenter(whole, limit)
            assert tuple(fragmenter.take() for _ in frames) == frames
            assert not fragmenter.left
            fragmented = True
    assert fragmented is (name == "fragments")


@every_exchange
def test_a_byte_at_a_time_says_the_same(name: str) -> None:
    for side in ("client", "server"):
        framer, reassembler = Framer(), Reassembler(Limits())
        data = stream(name, side)
        frames = [frame for at in range(len(data)) for frame in framer.feed(data[at : at + 1])]
        whole = [decode(message) for frame in frames if (message := reassembler.add(frame)) is not None]
        assert whole == [s.message for s in transcript(name) if s.side == side and s.message is not None]


@every_exchange
def test_every_context_is_understood(name: str) -> None:
    undecodable = Count()
    reader = ContextReader(clock(), undecodable=undecodable)
    for said in transcript(name):
        if isinstance(said.message, Tdispatch):
            context = reader.read(said.message.contexts, said.message.dtab)
            assert context.trace is not None
            assert context.dtab == said.message.dtab
    assert undecodable.value == 0


def test_the_contexts_are_what_the_caller_had_set() -> None:
    """By the commands of the recording, one after the other."""
    requests = [s.message for s in transcript("contexts") if isinstance(s.message, Tdispatch)]
    deadline, dtab, trace, wide, everything, _ = [
        ContextReader(clock()).read(request.contexts, request.dtab) for request in requests
    ]
    assert deadline.deadline == 1060.0
    assert dtab.dtab == (
        ("/s", "/t"),
        ("/a/b", "/c | /d"),
        ("/e", "0.70*/f & 0.30*/g"),
        ("/h", "!"),
        ("/i", "~"),
    )
    assert (trace.trace.trace, trace.trace.sampled) == (0xA, True)
    assert trace.trace.parent == 0xB
    assert wide.trace.trace == 0xFF << 64 | 0xA
    assert (everything.deadline, len(everything.dtab), everything.trace.trace) == (1060.0, 2, 0xA)
    assert [c.attempt for c in (deadline, dtab, trace)] == [0, 0, 0]


def test_requeues_carry_their_number() -> None:
    requests = [s.message for s in transcript("nack") if isinstance(s.message, Tdispatch)]
    attempts = [ContextReader(clock()).read(request.contexts).attempt for request in requests]
    assert attempts == [0, 1, 2, 0, 1, 2, 3, 4, 5]


# --- handshakes -------------------------------------------------------------------------------------------------------


@every_exchange
def test_our_client_handshake_comes_to_terms_with_finagles_server(name: str) -> None:
    answers = iter([s.message for s in transcript(name) if s.side == "server"])
    handshake = ClientHandshake(Limits())
    assert encode(handshake.start()) == stream(name, "client")[:19] == PROBE
    offer = handshake.receive(next(answers))
    assert isinstance(offer, Tinit)
    assert handshake.receive(next(answers)) is None
    assert handshake.result.version == 1
    assert handshake.result.fragment == EXCHANGES[name]["server_max_frame"]


@every_exchange
def test_our_server_handshake_comes_to_terms_with_finagles_client(name: str) -> None:
    said = iter([s.message for s in transcript(name) if s.side == "client"])
    handshake = ServerHandshake(Limits())
    assert encode(handshake.receive(next(said))) == stream(name, "server")[:19] == PROBE
    assert isinstance(handshake.receive(next(said)), Rinit)
    assert handshake.result.version == 1
    assert handshake.result.fragment == EXCHANGES[name]["client_max_frame"]
    assert handshake.result.request is None


# --- whole sessions ---------------------------------------------------------------------------------------------------


class Behaviours:
    """What the recorded server did with a request, by its destination."""

    def __init__(self) -> None:
        self.interrupts = 0
        self.seen: Counter[str] = Counter()

    async def __call__(self, request: Request) -> Response:
        _, kind, *rest = request.dest.split("/")
        self.seen[request.dest] += 1
        if kind == "sleep":
            await anyio.sleep(int(rest[0]) / 1000)
        elif kind == "never":
            try:
                await anyio.sleep_forever()
            finally:
                self.interrupts += 1
        elif kind == "interrupts":
            return Response(str(self.interrupts).encode())
        elif kind == "nack" or (kind == "flaky" and self.seen[request.dest] <= int(rest[0])):
            raise Rejected("no")
        elif kind == "nonretryable":
            raise Rejected("rejected for good", retryable=False)
        elif kind in ("error", ""):
            raise RemoteError(request.body.decode())
        return Response(request.body)


def gist(message: Message | None) -> object:
    """What two servers that mean the same must agree on; texts for people are their own."""
    if isinstance(message, Rdispatch):
        flags = dict(message.contexts).get(b"MuxFailure")
        return ("Rdispatch", message.tag, message.status, flags)
    if isinstance(message, Rinit):
        return ("Rinit", message.tag, message.version)
    if isinstance(message, Tdiscarded):
        return ("Tdiscarded", message.tag, message.which)
    return message


async def play_client(name: str) -> list[bytes]:
    """Say to our server what Finagle's client said, and compare the answers. Gives the frames of our server."""
    async with server_rig(Behaviours(), grace=5) as rig:
        peer = await rig.open(negotiate=False)
        for side, turn in groupby(transcript(name), key=lambda said: said.side):
            theirs = list(turn)
            if side == "client":
                for said in theirs:
                    if said.message is None:
                        await peer.stream.aclose()
                        return peer.frames
                    await peer.send(*said.frames)
                continue
            expected = [said.message for said in theirs if said.message is not None]
            if any(isinstance(message, Tdrain) for message in expected):
                rig.server.env.supervisor.start(rig.server.aclose)
            ours = [await peer.receive() for _ in expected]
            assert sorted(map(repr, map(gist, ours))) == sorted(map(repr, map(gist, expected)))
            if theirs[-1].message is None:
                await peer.ended()
        return peer.frames


@every_exchange
def test_our_server_answers_as_finagles_did(name: str) -> None:
    run_virtual(play_client, name)


@pytest.mark.parametrize("name", ["handshake", "concurrent", "fragments", "ping"])
def test_our_server_answers_an_echo_with_the_same_bytes(name: str) -> None:
    """Frames of one tag stay in order, whatever other tags do in between."""

    def by_tag(frames: list[bytes]) -> dict[bytes, list[bytes]]:
        return {tag: [f for f in frames if f[0] == 0xFE and f[2:4] == tag] for tag in {f[2:4] for f in frames}}

    theirs = [frame[4:] for said in transcript(name) if said.side == "server" for frame in said.frames]
    assert by_tag(run_virtual(play_client, name)) == by_tag(theirs)


@every_exchange
def test_our_client_does_with_the_answers_what_finagles_did(name: str) -> None:
    """Each recorded request is made again, each answer played as it was, each interrupt becomes a cancellation."""
    outcomes: list[tuple[str, object]] = []
    expected: list[tuple[str, object]] = []
    calls: dict[int, anyio.CancelScope] = {}
    # Which of two tags was free when Finagle asked for one hung on a race that the recording cannot show.
    ours: dict[int, tuple[int, str]] = {}

    async def play() -> None:
        said = [s for s in transcript(name) if not isinstance(s.message, Tping | Rping)]

        async def accept(peer: RawPeer) -> None:
            await peer.expect(Rerr(1, "tinit check"))
            await peer.send(*said[1].frames)
            assert isinstance(await peer.receive(), Tinit)
            await peer.send(*said[3].frames)

        async with client_rig(accept=accept) as rig, anyio.create_task_group() as group:

            async def call(request: Request, tag: int) -> None:
                with anyio.CancelScope() as calls[tag]:
                    try:
                        outcome: object = (await rig.session(request)).body
                    except MeshError as error:
                        outcome = meaning(error)
                    outcomes.append((request.dest, outcome))

            for side, message, frames in said[4:]:
                await settle()
                if message is None:
                    if side == "server":
                        await rig.peer.stream.send_eof()
                elif side == "server" and isinstance(message, Tdrain):
                    await rig.peer.send(*frames)
                elif side == "server":
                    tag, dest = ours[message.tag]
                    frames = frames if tag == message.tag else (encode(msgspec.structs.replace(message, tag=tag)),)
                    await rig.peer.send(*frames)
                    if isinstance(message, Rdispatch):
                        expected.append((dest, answer_of(message)))
                elif isinstance(message, Tdispatch):
                    group.start_soon(call, Request(message.body, message.dest), message.tag)
                    made = await rig.peer.receive()
                    assert isinstance(made, Tdispatch)
                    assert (made.dest, made.body) == (message.dest, message.body)
                    ours[message.tag] = (made.tag, message.dest)
                elif isinstance(message, Tdiscarded):
                    calls[message.which].cancel()
                    assert gist(await rig.peer.receive()) == ("Tdiscarded", 0, ours[message.which][0])
                elif isinstance(message, Rdrain):
                    await rig.peer.expect(message)
            await settle()
            assert rig.session.pending == 0

    run_virtual(play)
    if name == "drain_expired":
        expected.append(("/never", "lost"))
    assert sorted(outcomes, key=repr) == sorted(expected, key=repr)


def meaning(outcome: MeshError) -> object:
    if isinstance(outcome, Rejected):
        return ("rejected", outcome.requeueable)
    if isinstance(outcome, ConnectionLost):
        return "lost"
    return ("failed", outcome.message)


def answer_of(message: Message) -> object:
    assert isinstance(message, Rdispatch)
    flags = dict(message.contexts).get(b"MuxFailure", b"\0")[-1]
    if message.status is ReplyStatus.OK:
        return message.body
    if flags & 2:
        return ("rejected", bool(flags & 1))
    return ("failed", message.body.decode())


def test_the_recordings_hold_what_the_commands_asked_for() -> None:
    """The recordings themselves: the answers that Finagle's client printed are what the bytes say."""
    replies = [s.message for s in transcript("handshake") if isinstance(s.message, Rdispatch)]
    answers = [command["answer"].split() for command in EXCHANGES["handshake"]["commands"]]
    assert [reply.body for reply in replies] == [base64.b64decode(word.replace("-", "")) for _, word in answers]
