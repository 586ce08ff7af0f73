"""Hostile input, byte by byte, at real servers with the middleware: answered with a clear 4xx or by hanging up.

Nothing of it may look like a crash in the server's log, and the next request of somebody else is answered as if nothing
had been. A case is data: the bytes, and what may come of them. Servers read before the middleware does, and differ in
what they take; where more than one outcome is listed, each is what the RFCs allow.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest

from .processes import Worker

CLOSED = "closed"
WAITS = "waits"
"""The server waits for the rest, which is its right; it is the client that hangs up."""

OPEN = "open"
"""What it answers is not HTTP/1.1."""

BAD = frozenset({400, 404, 405, 413, 414, 421, 431, 501, 505, CLOSED})
"""What a request that makes no sense may meet."""
FINE = frozenset({200})
EITHER = BAD | FINE
"""Odd, and yet no harm: it may be taken or refused."""
LATE = frozenset({504})
PARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
DEADLINE = b"Finagle-Ctx-com.twitter.finagle.Deadline"
RETRIES = b"Finagle-Ctx-com.twitter.finagle.Retries"


class Case(NamedTuple):
    """Bytes in, outcome out."""

    name: str
    data: bytes
    allowed: frozenset[Any]
    most: int = 1
    """Responses: more would mean that a request has been smuggled."""


def get(*headers: bytes, start: bytes = b"GET /users/1 HTTP/1.1", host: bytes = b"Host: users") -> bytes:
    lines = [start, *([host] if host else []), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def post(body: bytes, *headers: bytes, path: bytes = b"/echo", length: bytes | None = None) -> bytes:
    length = b"Content-Length: %d" % len(body) if length is None else length
    return get(*headers, *([length] if length else []), start=b"POST " + path + b" HTTP/1.1") + body


def chunked(body: bytes, *headers: bytes) -> bytes:
    return post(body, b"Transfer-Encoding: chunked", *headers, length=b"")


SMUGGLED = get(start=b"GET /users/666 HTTP/1.1")
NUMBERS = b"Content-Type: application/json"

START_LINES = [
    Case("nothing but a newline", b"\r\n\r\n\r\n", BAD | {WAITS}),
    Case("words", b"hello there\r\n\r\n", BAD),
    Case("binary", bytes(range(256)) + b"\r\n\r\n", BAD),
    Case("NULs", b"\0" * 64 + b"\r\n\r\n", BAD),
    Case("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200 + b"\r\n\r\n", BAD),
    Case("no target", get(start=b"GET HTTP/1.1"), BAD),
    Case("no method", get(start=b" /users/1 HTTP/1.1"), BAD),
    Case("no version", get(start=b"GET /users/1"), BAD),
    Case("an empty method", get(start=b"\t/users/1 HTTP/1.1"), BAD),
    Case("a method in Greek", get(start="ΓΕΤ /users/1 HTTP/1.1".encode()), BAD),
    Case("a method with a NUL", get(start=b"G\0T /users/1 HTTP/1.1"), BAD),
    Case("a method with a colon", get(start=b"GE:T /users/1 HTTP/1.1"), BAD),
    Case("an unknown method", get(start=b"BREW /users/1 HTTP/1.1"), BAD),
    Case("a method of 10,000 letters", get(start=b"G" * 10_000 + b" /users/1 HTTP/1.1"), BAD),
    Case("the preface of HTTP/2, and no more", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", BAD | {WAITS, OPEN}),
    Case("the preface of HTTP/2, and rubbish", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64, BAD | {WAITS, OPEN}),
    Case("a space in the target", get(start=b"GET /users/ 1 HTTP/1.1"), BAD),
    Case("a tab in the target", get(start=b"GET /users/\t1 HTTP/1.1"), BAD),
    Case("a NUL in the target", get(start=b"GET /users/\x001 HTTP/1.1"), BAD),
    Case("a NUL, escaped", get(start=b"GET /users/%00 HTTP/1.1"), frozenset({422})),
    Case("broken escapes", get(start=b"GET /users/%zz%4 HTTP/1.1"), frozenset({422, 400})),
    Case("no UTF-8, escaped", get(start=b"GET /users/%ff%fe HTTP/1.1"), frozenset({422, 400})),
    Case("no UTF-8, bare", get(start=b"GET /users/\xff\xfe HTTP/1.1"), BAD | {422}),
    Case("up and up", get(start=b"GET /../../../../etc/passwd HTTP/1.1"), frozenset({404, 400})),
    Case("up and up, escaped", get(start=b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1"), frozenset({404, 400})),
    Case("a target of 100,000 bytes", get(start=b"GET /users/" + b"1" * 100_000 + b" HTTP/1.1"), BAD | {422}),
    Case("a query of 100,000 bytes", get(start=b"GET /users/1?" + b"q" * 100_000 + b" HTTP/1.1"), EITHER),
    Case("10,000 query parameters", get(start=b"GET /users/1?" + b"&" * 10_000 + b" HTTP/1.1"), EITHER),
    Case("a number of 5,000 digits", get(start=b"GET /users/" + b"9" * 5_000 + b" HTTP/1.1"), frozenset({422})),
    Case("a target that is a URL", get(start=b"GET http://elsewhere/users/1 HTTP/1.1"), EITHER),
    Case("a target that is an authority", get(start=b"CONNECT elsewhere:443 HTTP/1.1"), BAD),
    Case("a target that is a star", get(start=b"OPTIONS * HTTP/1.1"), BAD),
    Case("a fragment", get(start=b"GET /users/1#x HTTP/1.1"), EITHER | {422}),
    Case("a backslash", get(start=b"GET \\users\\1 HTTP/1.1"), BAD),
    Case("HTTP/0.9", b"GET /users/1\r\n\r\n", BAD),
    Case("HTTP/1.0", get(start=b"GET /users/1 HTTP/1.0"), FINE),
    Case("HTTP/1.2", get(start=b"GET /users/1 HTTP/1.2"), EITHER),
    Case("HTTP/2.0", get(start=b"GET /users/1 HTTP/2.0"), EITHER),
    Case("HTTP/9.9", get(start=b"GET /users/1 HTTP/9.9"), EITHER),
    Case("HTTP/1", get(start=b"GET /users/1 HTTP/1"), BAD),
    Case("HTTP/1.1.1", get(start=b"GET /users/1 HTTP/1.1.1"), BAD),
    Case("HTTP/-1.1", get(start=b"GET /users/1 HTTP/-1.1"), BAD),
    Case("lower case http", get(start=b"GET /users/1 http/1.1"), BAD),
    Case("another protocol", get(start=b"GET /users/1 ICAP/1.1"), BAD),
]  # fmt: skip

HEADERS = [
    Case("no host", get(host=b""), BAD),
    Case("two hosts", get(b"Host: other"), BAD),
    Case("an empty host", get(host=b"Host:"), EITHER),
    Case("a host of rubbish", get(host=b"Host: a b@/\\?#"), EITHER),
    Case("no colon", get(b"nonsense"), BAD),
    Case("no name", get(b": value"), BAD),
    Case("a space before the colon", get(b"X-A : b"), BAD),
    Case("a space in the name", get(b"X A: b"), BAD),
    Case("a NUL in the name", get(b"X\0A: b"), BAD),
    Case("a NUL in the value", get(b"X-A: b\0c"), BAD),
    Case("a bare CR in the value", get(b"X-A: b\rInjected: c"), BAD),
    Case("a bare LF in the value", get(b"X-A: b\nX-B: c"), EITHER),
    Case("bytes above ASCII", get(b"X-A: \xff\xfe\x80"), EITHER),
    Case("a name in Greek", get("ΧΨ: b".encode()), BAD),
    Case("a folded line", get(b"X-A: b\r\n  c"), EITHER),
    Case("a fold before the first", b"GET /users/1 HTTP/1.1\r\n  folded\r\nHost: users\r\n\r\n", BAD),
    Case("a header of 100,000 bytes", get(b"X-A: " + b"a" * 100_000), BAD),
    Case("a name of 100,000 bytes", get(b"X" * 100_000 + b": a"), BAD),
    Case("10,000 headers", get(*(b"X-%d: a" % n for n in range(10_000))), BAD),
    Case("1,000 headers", get(*(b"X-%d: a" % n for n in range(1_000))), EITHER),
    Case("one header 2,000 times", get(*[b"X: a"] * 2_000), EITHER),
    Case("a million bytes without an end", b"GET /users/1 HTTP/1.1\r\nX: " + b"a" * 1_000_000, BAD),
    Case("an unknown expectation", get(b"Expect: miracles"), EITHER | {417}),
    Case("an upgrade to nothing known", get(b"Connection: upgrade", b"Upgrade: rubbish"), EITHER),
    Case("an upgrade to HTTP/2 with bad settings",
         get(b"Connection: upgrade, http2-settings", b"Upgrade: h2c", b"HTTP2-Settings: !!!"), EITHER | {101}),
    Case("a WebSocket without a key", get(b"Connection: upgrade", b"Upgrade: websocket"), EITHER | {426}),
    Case("a connection of rubbish", get(b"Connection: ,,;;\xff"), EITHER),
]  # fmt: skip

LENGTHS = [
    Case("a negative length", post(b"", length=b"Content-Length: -1"), BAD),
    Case("a length that is a word", post(b"", length=b"Content-Length: many"), BAD),
    Case("a length in hex", post(b"0123456789", length=b"Content-Length: 0xa"), BAD),
    Case("a length with a plus", post(b"abc", length=b"Content-Length: +3"), BAD),
    Case("a length with an underscore", post(b"0123456789", length=b"Content-Length: 1_0"), BAD),
    Case("a length with a fraction", post(b"abc", length=b"Content-Length: 3.0"), BAD),
    Case("a length in other digits", post(b"abc", length="Content-Length: ٣".encode()), BAD),
    Case("an empty length", post(b"", length=b"Content-Length:"), BAD),
    Case("a length of 40 digits", post(b"abc", length=b"Content-Length: " + b"9" * 40), BAD | {WAITS}),
    Case("a length with spaces", post(b"abc", length=b"Content-Length: 3 3"), BAD),
    Case("two lengths, the same", post(b"abc", b"Content-Length: 3"), EITHER),
    Case("two lengths, different", post(b"abc", b"Content-Length: 5"), BAD),
    Case("two lengths in a list", post(b"abc", length=b"Content-Length: 3, 5"), BAD),
    Case("the same length in a list", post(b"abc", length=b"Content-Length: 3, 3"), EITHER),
    Case("a body that is too short", post(b"abc", length=b"Content-Length: 30"), BAD | {WAITS}),
    Case("a body on a GET", get(b"Content-Length: 3") + b"abc", FINE),
    Case("a body that is longer than it says", post(b"abcGET", length=b"Content-Length: 3"), FINE | {WAITS}),
]  # fmt: skip

CHUNKS = [
    Case("chunks, as they should be", chunked(b"3\r\nabc\r\n0\r\n\r\n"), FINE),
    Case("a chunk's size in letters", chunked(b"zz\r\nabc\r\n0\r\n\r\n"), BAD),
    Case("a chunk's size below zero", chunked(b"-3\r\nabc\r\n0\r\n\r\n"), BAD),
    Case("a chunk's size with 0x", chunked(b"0x3\r\nabc\r\n0\r\n\r\n"), BAD),
    Case("a chunk's size with a plus", chunked(b"+3\r\nabc\r\n0\r\n\r\n"), BAD),
    Case("a chunk's size with an underscore", chunked(b"1_0\r\n" + b"a" * 16 + b"\r\n0\r\n\r\n"), BAD),
    Case("a chunk's size of 40 digits", chunked(b"f" * 40 + b"\r\nabc\r\n0\r\n\r\n"), BAD),
    Case("no size", chunked(b"\r\nabc\r\n0\r\n\r\n"), BAD),
    Case("a chunk that is longer than it says", chunked(b"3\r\nabcdef\r\n0\r\n\r\n"), BAD),
    Case("a chunk without its end", chunked(b"3\r\nabc0\r\n\r\n"), BAD | {WAITS}),
    Case("an extension of 100,000 bytes", chunked(b"3;" + b"e" * 100_000 + b"\r\nabc\r\n0\r\n\r\n"), EITHER),
    Case("an extension with a bare LF", chunked(b"3;a\nb\r\nabc\r\n0\r\n\r\n"), EITHER),
    Case("a trailer of rubbish", chunked(b"3\r\nabc\r\n0\r\nrubbish\r\n\r\n"), BAD),
    Case("a trailer of 100,000 bytes", chunked(b"0\r\nX: " + b"a" * 100_000 + b"\r\n\r\n"), EITHER),
    Case("chunks that stop", chunked(b"3\r\nab"), BAD | {WAITS}),
    Case("chunks by HTTP/1.0",
         get(b"Transfer-Encoding: chunked", start=b"POST /echo HTTP/1.0") + b"0\r\n\r\n", EITHER),
]  # fmt: skip

SMUGGLING = [
    Case("a length and chunks", chunked(b"0\r\n\r\n", b"Content-Length: 5"), EITHER),
    Case("a length that hides a request in the chunks",
         chunked(b"0\r\n\r\n" + SMUGGLED, b"Content-Length: %d" % (5 + len(SMUGGLED))), EITHER),
    Case("chunks that hide a request in the length",
         post(b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED), b"Transfer-Encoding: chunked",
              length=b"Content-Length: 4"), EITHER),
    Case("an encoding of the wrong name", post(b"0\r\n\r\n", b"Transfer-Encoding: xchunked"), BAD),
    Case("an encoding twice", chunked(b"0\r\n\r\n", b"Transfer-Encoding: chunked"), BAD),
    Case("two encodings", chunked(b"0\r\n\r\n", b"Transfer-Encoding: identity"), BAD),
    Case("chunked, and then something", post(b"0\r\n\r\n", b"Transfer-Encoding: chunked, gzip"), BAD),
    Case("gzip, then chunked", post(b"0\r\n\r\n", b"Transfer-Encoding: gzip, chunked", length=b""), BAD),
    Case("chunked with a vertical tab", post(b"0\r\n\r\n", b"Transfer-Encoding: \x0bchunked"), BAD),
    Case("chunked in quotes", post(b"0\r\n\r\n", b'Transfer-Encoding: "chunked"'), BAD),
    Case("chunked after a bare LF", post(b"0\r\n\r\n", b"X: y\nTransfer-Encoding: chunked"), EITHER),
    Case("a space before the colon of the encoding", post(b"0\r\n\r\n", b"Transfer-Encoding : chunked"), BAD),
    Case("a space before the colon of the length", post(b"", length=b"Content-Length : 0"), BAD),
    Case("a folded encoding", post(b"0\r\n\r\n", b"Transfer-Encoding:\r\n chunked"), EITHER),
    Case("a request in a header", get(b"X: \r\n" + SMUGGLED), BAD | FINE, most=2),
]  # fmt: skip

CONTEXTS = [
    *[Case(f"traceparent {value[:20]!r}", get(b"traceparent: " + value), FINE) for value in (
        b"", b"rubbish", PARENT[:-1], PARENT.upper(), b"ff" + PARENT[2:],
        b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-00", b"\xff" * 55, b"a" * 9_000)],
    Case("traceparent twice", get(b"traceparent: " + PARENT, b"traceparent: " + PARENT), FINE),
    *[Case(f"tracestate {value[:20]!r}", get(b"traceparent: " + PARENT, b"tracestate: " + value), FINE) for value in (
        b"", b"===,,,", b"\xff\xfe", b"a=b," * 2_000)],
    *[Case(f"b3 {value[:20]!r}", get(b"b3: " + value), FINE) for value in (b"", b"-----", b"x-y-z", b"1" * 9_000)],
    Case("b3 in parts that do not fit", get(b"X-B3-TraceId: zz", b"X-B3-SpanId: ", b"X-B3-Sampled: maybe"), FINE),
    *[Case(f"dtab {value[:20]!r}", get(b"Dtab-Local: " + value), FINE) for value in (
        b"", b"/s", b"/s=>", b"=>/t", b"/s=>(" + b"(" * 5_000, b"\xff\xfe", b"/s=>/t;" * 1_000, b"/s=>9e999*/t",
        b"/s=>/s", b"/$/inet/1/2")],
    *[Case(f"deadline {value[:20]!r}", get(DEADLINE + b": " + value), FINE) for value in (
        b"", b"soon", b"1", b"-1 5", b"1 2 3", b"1e9 2e9", b"nan inf", b"9" * 9_000, b"\xd9\xa1 \xd9\xa2")],
    Case("a deadline far away", get(DEADLINE + b": 0 " + b"9" * 18), FINE),
    Case("a deadline that has passed", get(DEADLINE + b": 2000000000 1000000000"), LATE),
    Case("a deadline of a nanosecond", get(DEADLINE + b": 1 2"), LATE),
    *[Case(f"retries {value[:20]!r}", get(RETRIES + b": " + value), FINE) for value in (
        b"", b"-1", b"many", b"99999999999999999999", b"1" * 9_000)],
    *[Case(f"baggage {value[:20]!r}", get(b"baggage: " + value), FINE) for value in (
        b"", b"=;=;", b"a=\xff", b"a=b," * 4_000)],
    *[Case(f"priority {value[:20]!r}", get(b"Meshlib-Priority: " + value), FINE) for value in (
        b"", b"highest", b"\xff", b"critical, critical", b"c" * 9_000)],
    Case("a client id of rubbish", get(b"Meshlib-Client-Id: \xff\xfe"), FINE),
    Case("all of it at once", get(*(name + b": \xff" for name in (
        b"traceparent", b"tracestate", b"b3", b"Dtab-Local", DEADLINE, RETRIES, b"baggage", b"Meshlib-Priority"))),
         FINE),
]  # fmt: skip

BODIES = [
    *[Case(f"JSON {name}", post(body, NUMBERS, path=b"/numbers"), frozenset({400, 422})) for name, body in (
        ("that is none", b"{nonsense"), ("that stops", b"[1, 2"), ("of another type", b'"text"'),
        ("of wrong items", b'["a", {}]'), ("with NULs", b"[1,\0]"), ("that is no UTF-8", b"[\xff\xfe]"),
        ("of nothing", b""), ("with a number of 5,000 digits", b"[" + b"9" * 5_000 + b"]"),
        ("ten thousand deep", b"[" * 10_000 + b"]" * 10_000), ("a hundred thousand deep", b"[" * 100_000),
        ("objects ten thousand deep", b'{"a":' * 10_000 + b"1" + b"}" * 10_000))],
    Case("a type of rubbish", post(b"[1]", b"Content-Type: \xff/;=;", path=b"/numbers"), frozenset({400, 415, 422})),
    Case("a charset of rubbish", post(b"[1]", NUMBERS + b"; charset=klingon", path=b"/numbers"), EITHER | {415, 422}),
    Case("zipped, it says", post(b"[1]", NUMBERS, b"Content-Encoding: gzip", path=b"/numbers"), EITHER | {415, 422}),
]  # fmt: skip

CASES = [*START_LINES, *HEADERS, *LENGTHS, *CHUNKS, *SMUGGLING, *CONTEXTS, *BODIES]


def test_there_are_enough_of_them():
    assert len(CASES) > 150
    assert len({case.name for case in CASES}) == len(CASES)


# --- servers ----------------------------------------------------------------------------------------------------------


class Server:
    """One with the middleware, and what it has logged."""

    def __init__(self, kind: str, log: Path) -> None:
        self.log = log
        self._read = 0
        with log.open("w") as out:
            self.worker = Worker(kind, linger=0, out=out)
            anyio.run(self.worker.up)

    def exchange(self, data: bytes, patience: float = 10.0, after: float = 0.0) -> tuple[list[int], str]:
        """Send it, and read one response; then, for ``after`` seconds, whatever else comes.

        Gives the statuses of all responses, and how it ended: `CLOSED`, `WAITS`, or else `OPEN`.
        """
        with socket.create_connection(("127.0.0.1", self.worker.port)) as connection:
            connection.settimeout(patience)
            got, ended = b"", CLOSED
            try:
                connection.sendall(data)
                while chunk := connection.recv(65_536):
                    got += chunk
                    if complete(got):
                        if not after:
                            ended = OPEN
                            break
                        connection.settimeout(after)
            except TimeoutError:
                ended = OPEN if got else WAITS
            except OSError:  # it has closed without having read all
                pass
            return [int(status) for status in re.findall(rb"^HTTP/1\.[01] (\d{3})", got, re.MULTILINE)], ended

    def complaints(self) -> list[str]:
        """New ones."""
        text = self.log.read_text(errors="replace")
        text, self._read = text[self._read :], len(text)
        return [line for line in text.splitlines() if re.search(r"Traceback|ERROR|CRITICAL|Exception", line)]


def complete(got: bytes) -> bool:
    """Has a whole response come?"""
    head, found, body = got.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)^content-length: *(\d+)", head, re.MULTILINE)
    return bool(found) and (length is None or len(body) >= int(length[1]))


@pytest.fixture(scope="module", params=["uvicorn", "hypercorn"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(request.param, tmp_path_factory.mktemp("hostile") / "log.txt")
    try:
        yield server
    finally:
        server.worker.kill()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_input_is_refused_or_ignored_and_the_next_request_is_answered(server, case):
    # The answer to a request that was smuggled would come a moment later.
    more = 0.05 if case.data.partition(b"\r\n\r\n")[2] else 0.0
    statuses, ended = server.exchange(case.data, 0.2 if WAITS in case.allowed else 10.0, more)
    outcome = next((status for status in statuses if status != 100), ended)
    assert outcome in case.allowed, (statuses, ended, server.log.read_text()[-2000:])
    assert len([status for status in statuses if status < 400]) <= case.most
    assert server.exchange(get()) == ([200], OPEN)
    assert not server.complaints()
