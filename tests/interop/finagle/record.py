"""Records what a Finagle client and a Finagle server say to each other, as golden vectors.

Codec tests need bytes that no code of this project produced. A TCP proxy between two real peers
notes every chunk it passes on; ``recordings.json`` beside this file holds the result, so that the
tests that read it need no Java. To record it anew, from the repository's root::

    python -m tests.interop.finagle.record
"""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from .peer import DEFAULT_CACHE, FinagleClient, FinagleServer, build, encode, finagle_version

RECORDINGS: Final = Path(__file__).resolve().with_name("recordings.json")
#: Time for frames that answer no command, such as a ping's reply or an Rdiscarded, to pass.
SETTLE: Final = 0.3

Side = Literal["client", "server"]

ABOUT: Final = (
    "Bytes between a Finagle Mux client and server, by connection, in the order in which they "
    "passed. A chunk is what one read returned, not a frame; an empty one is the end of a "
    "side's stream. The commands are those of peer.py's client, with its answers."
)


class RecordingProxy:
    """A TCP proxy to ``port`` on the loopback interface that keeps what passes through it."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._pumps: list[threading.Thread] = []
        self.connections: list[list[tuple[Side, bytes]]] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            chunks: list[tuple[Side, bytes]] = []
            self.connections.append(chunks)
            self._sockets += [client, server]
            for side, source, sink in (("client", client, server), ("server", server, client)):
                pump = threading.Thread(target=self._pump, args=(chunks, side, source, sink), daemon=True)
                self._pumps.append(pump)
                pump.start()

    def _pump(self, chunks: list[tuple[Side, bytes]], side: Side, source: socket.socket, sink: socket.socket) -> None:
        try:
            while True:
                chunk = source.recv(65536)
                # Noted before it is sent on: what it causes can then only come after it.
                with self._lock:
                    chunks.append((side, chunk))
                if not chunk:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(chunk)
        except OSError:
            return

    def close(self) -> None:
        """Stop accepting, let both ends finish what they are saying, and drop the connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        for pump in self._pumps:
            pump.join(timeout=2)
        for connection in self._sockets:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Session:
    """One exchange under way: a client that talks to a server through the proxy."""

    server: FinagleServer
    client: FinagleClient
    log: list[dict[str, str]] = field(default_factory=list)

    def ask(self, command: str) -> None:
        self.log.append({"command": command, "answer": self.client.ask(command)})


@dataclass(frozen=True)
class Exchange:
    """What to record: a name, its purpose, and the commands or the steps that bring it about."""

    name: str
    about: str
    commands: Sequence[str] = ()
    steps: Callable[[Session], None] | None = None
    server_max_frame: int | None = None
    client_max_frame: int | None = None


def _drain(session: Session) -> None:
    _close_during(session, f"call /sleep/1000 {encode(b'slow')}")


def _drain_cancelled(session: Session) -> None:
    _close_during(session, f"cancel 1000 /never {encode(b'cancelled')}")


def _drain_expired(session: Session) -> None:
    _close_during(session, f"call /never {encode(b'abandoned')}")


def _close_during(session: Session, command: str) -> None:
    session.ask(f"call /echo {encode(b'first')}")
    session.client.send(command)
    time.sleep(0.4)
    session.server.send("close")
    session.log.append({"command": command, "answer": session.client.read_line()})
    session.server.expect("CLOSED", 20)


def _idle(session: Session) -> None:
    session.ask("call /echo -")
    time.sleep(5.5)  # Finagle pings an idle session every five seconds
    session.ask("call /echo -")


TRACE: Final = "000000000000000a 000000000000000b 000000000000000c"
WIDE_TRACE: Final = "00000000000000ff000000000000000a 000000000000000b 000000000000000c"

EXCHANGES: Final = (
    Exchange(
        "handshake",
        "Negotiation, the first ping, and the first request; then a request without a body.",
        [f"call /echo {encode(b'hello')}", "call /echo -"],
    ),
    Exchange(
        "contexts",
        "Deadline, delegation table and trace, one by one and together; a trace id of 128 bits.",
        [
            f"deadline 60000 /echo {encode(b'deadline')}",
            f"dtab /s=>/t;/a/b=>/c|/d;/e=>0.7*/f&0.3*/g;/h=>!;/i=>~ /echo {encode(b'dtab')}",
            f"trace {TRACE} /echo {encode(b'trace')}",
            f"trace {WIDE_TRACE} /echo {encode(b'wide trace')}",
            f"all 60000 /s=>/t;/a/b=>/c|/d {TRACE} /echo {encode(b'everything')}",
            f"all 60000 /s=>/t;/a/b=>/c|/d {TRACE} /ctx {encode(b'everything')}",
        ],
    ),
    Exchange(
        "expired",
        "A deadline that has passed: by default a server counts such a request and serves it.",
        [f"deadline -500 /ctx {encode(b'late')}"],
    ),
    Exchange(
        "headers",
        "Application headers of a request and of its reply.",
        [f"headers key=value,empty= /echo {encode(b'headers')}"],
    ),
    Exchange(
        "error",
        "An application's failure; one without a destination; a rejection that forbids a retry.",
        [f"call /error {encode('wrong: ünïcode'.encode())}", "call / -", "call /nonretryable -"],
    ),
    Exchange(
        "nack",
        "Rejections that Finagle requeues until one succeeds, and until it gives up.",
        ["call /flaky/2/recorded -", "call /nack -"],
    ),
    Exchange(
        "cancel",
        "Requests interrupted, timed out, and superseded by a backup, and what becomes of their tags.",
        [
            f"cancel 200 /never {encode(b'cancelled')}",
            f"call /echo {encode(b'after')}",
            f"deadline 200 /never {encode(b'timed out')}",
            f"call /echo {encode(b'after')}",
            f"supersede 200 /never {encode(b'superseded')}",
            "call /interrupts -",
            "call /interrupts/last -",
        ],
    ),
    Exchange(
        "concurrent",
        "Requests under way at once, each with a tag of its own.",
        ["parallel 4 8 /sleep/50", "parallel 2 8 /echo"],
    ),
    Exchange(
        "fragments",
        "Messages cut into fragments: at most 256 bytes towards the server, 128 towards the client.",
        [f"call /echo {encode(bytes(range(256)) * 2)}", "parallel 3 300 /echo"],
        server_max_frame=256,
        client_max_frame=128,
    ),
    Exchange("ping", "An idle session.", steps=_idle),
    Exchange("drain", "A server that closes while a request is under way.", steps=_drain),
    Exchange("drain_cancelled", "Draining that a cancelled request brings to its end.", steps=_drain_cancelled),
    Exchange("drain_expired", "A server out of patience hangs up without another word.", steps=_drain_expired),
)


def record(classpath: Sequence[str], exchange: Exchange) -> dict[str, object]:
    """Run one exchange between fresh peers and return it in the form of ``recordings.json``."""
    with (
        FinagleServer(classpath, max_frame=exchange.server_max_frame) as server,
        RecordingProxy(server.port) as proxy,
        FinagleClient(classpath, f"127.0.0.1:{proxy.port}", max_frame=exchange.client_max_frame) as client,
    ):
        session = Session(server, client)
        for command in exchange.commands:
            session.ask(command)
        if exchange.steps is not None:
            exchange.steps(session)
        time.sleep(SETTLE)
        client.close()
        time.sleep(SETTLE)
        return {
            "name": exchange.name,
            "about": exchange.about,
            "server_max_frame": exchange.server_max_frame,
            "client_max_frame": exchange.client_max_frame,
            "commands": session.log,
            "connections": [
                [{"from": side, "hex": chunk.hex()} for side, chunk in chunks] for chunks in proxy.connections
            ],
        }


def main() -> None:
    """Record every exchange and write them all to ``recordings.json``."""
    classpath = build(DEFAULT_CACHE)
    exchanges = []
    for exchange in EXCHANGES:
        exchanges.append(record(classpath, exchange))
        sys.stderr.write(f"recorded {exchange.name}\n")
    recordings = {"finagle": finagle_version(classpath), "about": ABOUT, "exchanges": exchanges}
    RECORDINGS.write_text(json.dumps(recordings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
