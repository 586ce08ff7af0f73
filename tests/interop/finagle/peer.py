"""A Finagle Mux server or client in a JVM of its own, for tests to talk to.

The wire format has no official conformance suite, so the reference is Finagle itself: these
helpers compile the small Java program beside this file against the released Finagle jars, start
it as a child process and drive it by lines of text. Everything is synchronous and needs nothing
but the standard library; an asynchronous test calls it in a worker thread.
"""

import base64
import fcntl
import hashlib
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

HERE: Final = Path(__file__).resolve().parent
DEFAULT_CACHE: Final = HERE.parents[2] / ".cache" / "finagle"
MAIN_CLASS: Final = "meshlib.interop.FinaglePeer"

BUILD_TIMEOUT: Final = 900.0
START_TIMEOUT: Final = 60.0
#: Longer than the 30 s after which the Java program itself gives up on an answer.
ANSWER_TIMEOUT: Final = 40.0

#: A test peer lives for seconds: start fast, stay small, skip the optimising compiler. Java's own
#: sockets instead of Netty's native ones, which unpack a library into the temporary directory.
JVM_FLAGS: Final = (
    "-Xmx256m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Xshare:auto",
    "-Dcom.twitter.finagle.netty4.useNativeEpoll=false",
)


class PeerUnavailable(RuntimeError):
    """This machine cannot provide the peer: the tests that need it should be skipped."""


class PeerError(RuntimeError):
    """The peer was there but did not behave: a failure, not a reason to skip."""


# -- building ----------------------------------------------------------------------------------


def build(cache_dir: Path = DEFAULT_CACHE) -> list[str]:
    """Compile the peer when its sources have changed, and return its class path.

    All output goes to ``cache_dir``; the jars stay in Maven's local repository.
    """
    maven = _maven()
    cache_dir.mkdir(parents=True, exist_ok=True)
    stamp = cache_dir / "stamp.json"
    fingerprint = _fingerprint()
    with _locked(cache_dir / "lock"):
        classpath = _cached(stamp, fingerprint)
        if classpath is None:
            classpath = _compile(maven, cache_dir.resolve())
            stamp.write_text(
                json.dumps({"fingerprint": fingerprint, "classpath": classpath}, indent=1),
                encoding="utf-8",
            )
    return classpath


def finagle_version(classpath: Iterable[str]) -> str:
    """The version of Finagle on the class path, read off the name of its Mux jar."""
    for entry in classpath:
        name = Path(entry).name
        if name.startswith("finagle-mux_") and name.endswith(".jar"):
            return name.removesuffix(".jar").rpartition("-")[2]
    raise PeerError("there is no finagle-mux jar on the class path")


def _maven() -> str:
    java, maven = shutil.which("java"), shutil.which("mvn")
    if java is None or maven is None:
        raise PeerUnavailable("java or mvn is missing: the Finagle peer needs both on PATH")
    return maven


def _fingerprint() -> str:
    digest = hashlib.sha256()
    sources = sorted((HERE / "src").rglob("*.java"))
    for path in (HERE / "pom.xml", *sources):
        digest.update(path.relative_to(HERE).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _cached(stamp: Path, fingerprint: str) -> list[str] | None:
    try:
        content: object = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, Mapping) or content.get("fingerprint") != fingerprint:
        return None
    entries = content.get("classpath")
    if not isinstance(entries, list):
        return None
    classpath = [str(entry) for entry in entries]
    return classpath if all(Path(entry).exists() for entry in classpath) else None


def _compile(maven: str, cache_dir: Path) -> list[str]:
    target = cache_dir / "target"
    listing = cache_dir / "classpath.txt"
    shutil.rmtree(target, ignore_errors=True)
    listing.unlink(missing_ok=True)
    command = [
        maven,
        "-q",
        "-B",
        f"--file={HERE / 'pom.xml'}",
        f"-Dpeer.build.directory={target}",
        "compile",
        "dependency:build-classpath",
        f"-Dmdep.outputFile={listing}",
    ]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise PeerUnavailable(f"mvn did not finish within {BUILD_TIMEOUT:.0f} s") from error
    if done.returncode != 0 or not listing.exists():
        tail = "\n".join(done.stdout.strip().splitlines()[-20:])
        if "COMPILATION ERROR" in done.stdout:
            raise PeerError(f"the Finagle peer does not compile:\n{tail}")
        raise PeerUnavailable(f"mvn could not build the Finagle peer:\n{tail}")
    jars = listing.read_text(encoding="utf-8").strip().split(os.pathsep)
    return [str(target / "classes"), *jars]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process build at a time; the others then find the work done."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- running -----------------------------------------------------------------------------------


class PeerProcess:
    """A running peer: write it lines, read lines back, each within a time limit."""

    def __init__(self, classpath: Sequence[str], arguments: Sequence[str]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - kill() closes it
        self._process = subprocess.Popen(
            ["java", *JVM_FLAGS, "-cp", os.pathsep.join(classpath), MAIN_CLASS, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            bufsize=1,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        for line in stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def send(self, line: str) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(line + "\n")
        stdin.flush()

    def read_line(self, timeout: float = ANSWER_TIMEOUT) -> str:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise PeerError(f"no line from the peer within {timeout} s{self._said()}") from None
        if line is None:
            self._lines.put(None)
            raise PeerError(f"the peer's output has ended{self._said()}")
        return line

    def ask(self, line: str, timeout: float = ANSWER_TIMEOUT) -> str:
        """Send one command line and return the line that answers it."""
        self.send(line)
        return self.read_line(timeout)

    def expect(self, prefix: str, timeout: float) -> str:
        line = self.read_line(timeout)
        if not line.startswith(prefix):
            raise PeerError(f"the peer said {line!r} instead of {prefix}…{self._said()}")
        return line.removeprefix(prefix).strip()

    def close(self, timeout: float = ANSWER_TIMEOUT) -> None:
        """Close gracefully, and insist on the peer's saying so; then it is gone for good."""
        try:
            self.send("close")
            self.expect("CLOSED", timeout)
            self._process.wait(timeout)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerError(f"the peer did not close: {error}{self._said()}") from error
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process without ceremony, whatever its state, and release its pipes."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            if pipe is not None:
                with suppress(OSError):  # closing flushes, and the other end may be gone
                    pipe.close()

    def _said(self) -> str:
        if self._stderr.closed:
            return ""
        # The child writes at the offset it shares with this process, so read without moving it.
        descriptor = self._stderr.fileno()
        size = os.fstat(descriptor).st_size
        text = os.pread(descriptor, 2000, max(0, size - 2000)).decode("utf-8", "replace").strip()
        return f"; on standard error:\n{text}" if text else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


class FinagleServer(PeerProcess):
    """A ``Mux.server()`` listening on ``port`` of the loopback interface.

    What it does with a request depends on the request's destination:

    ================== ==========================================================================
    ``/echo``          replies with the same body and the same application headers
    ``/ctx``           replies with text that tells what arrived (``parse_context`` reads it)
    ``/error``         fails with an exception whose message is the body
    ``/nack``          fails with a retryable rejection
    ``/flaky/<n>/<k>`` rejects the first ``n`` requests to this path like ``/nack``, then ``/ctx``
    ``/nonretryable``  fails with a rejection that forbids a retry
    ``/never``         never replies, and counts the interrupts it sees
    ``/interrupts``    replies with that count; ``/interrupts/last`` with the last one's failure
    ``/sleep/<ms>``    replies with the same body after that time
    ================== ==========================================================================
    """

    def __init__(self, classpath: Sequence[str], *, max_frame: int | None = None) -> None:
        super().__init__(classpath, [*_frame_flag(max_frame), "server"])
        self.port = int(_or_kill(self, "PORT"))


@dataclass(frozen=True)
class Ok:
    """A reply: its body and its application headers."""

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True)
class Err:
    """A failure as a user of Finagle's client sees it; ``flags`` are Finagle's ``FailureFlags``."""

    exception: str
    flags: int
    message: str


class FinagleClient(PeerProcess):
    """A ``Mux.client()`` of ``address``, with Finagle's default retries, doing one call at a time.

    It connects at the first call. The endpoint is its only one, so after five failures in a row
    Finagle's failure accrual reports the client ``Busy`` for a while and requeues nothing.
    """

    def __init__(self, classpath: Sequence[str], address: str, *, max_frame: int | None = None) -> None:
        super().__init__(classpath, [*_frame_flag(max_frame), "client", address])
        _or_kill(self, "READY")

    def call(self, dest: str, body: bytes = b"") -> Ok | Err:
        return parse_reply(self.ask(f"call {dest} {encode(body)}"))

    def deadline(self, millis: int, dest: str, body: bytes = b"") -> Ok | Err:
        """Call with a request timeout; one that is not positive only sends a deadline in the past."""
        return parse_reply(self.ask(f"deadline {millis} {dest} {encode(body)}"))

    def dtab(self, dtab: str, dest: str, body: bytes = b"") -> Ok | Err:
        """Call under a local delegation table, such as ``/s=>/t;/a=>/b``."""
        return parse_reply(self.ask(f"dtab {_packed(dtab)} {dest} {encode(body)}"))

    def trace(self, trace: str, span: str, parent: str, dest: str, body: bytes = b"") -> Ok | Err:
        """Call within a sampled trace; the ids are hexadecimal, and Finagle sends a child span."""
        return parse_reply(self.ask(f"trace {trace} {span} {parent} {dest} {encode(body)}"))

    def headers(self, headers: Mapping[str, str], dest: str, body: bytes = b"") -> Ok | Err:
        """Call with application headers, whose keys and values hold no blanks, commas or ``=``."""
        pairs = ",".join(f"{key}={value}" for key, value in headers.items())
        return parse_reply(self.ask(f"headers {pairs} {dest} {encode(body)}"))

    def cancel(self, after_millis: int, dest: str, body: bytes = b"") -> Ok | Err:
        """Call, and interrupt the call after that time."""
        return parse_reply(self.ask(f"cancel {after_millis} {dest} {encode(body)}"))

    def supersede(self, after_millis: int, dest: str, body: bytes = b"") -> Ok | Err:
        """Like ``cancel``, with the failure by which a backup request withdraws the slower one."""
        return parse_reply(self.ask(f"supersede {after_millis} {dest} {encode(body)}"))

    def parallel(self, count: int, size: int, dest: str = "/echo") -> None:
        """Make ``count`` calls at once, with random bodies that must come back as they went."""
        answer = self.ask(f"parallel {count} {size} {dest}")
        if answer != f"OK {count}":
            raise PeerError(f"parallel calls failed: {answer}")

    def status(self) -> str:
        """``Open``, ``Busy`` or ``Closed``."""
        return self.ask("status").removeprefix("OK ")


def parse_reply(line: str) -> Ok | Err:
    """Read the line by which the client answers a call."""
    kind, _, rest = line.partition(" ")
    if kind == "OK":
        body, *headers = rest.split(" ")
        pairs = (header.partition(",") for header in headers)
        return Ok(decode(body), tuple((decode(key), decode(value)) for key, _, value in pairs))
    if kind == "ERR":
        exception, flags, message = rest.split(" ", 2)
        return Err(exception, int(flags), message)
    raise PeerError(f"the peer said {line!r} instead of a reply")


def parse_context(body: bytes) -> dict[str, str]:
    """Read a reply of ``/ctx``: one ``key=value`` a line."""
    pairs = (line.partition("=") for line in body.decode("utf-8").splitlines())
    return {key: value for key, _, value in pairs}


def encode(body: bytes) -> str:
    """A body as one word of a command line; the empty one is ``-``."""
    return base64.b64encode(body).decode("ascii") or "-"


def decode(word: str) -> bytes:
    return b"" if word == "-" else base64.b64decode(word, validate=True)


def _packed(dtab: str) -> str:
    return "".join(dtab.split())


def _frame_flag(max_frame: int | None) -> list[str]:
    return [] if max_frame is None else ["--max-frame", str(max_frame)]


def _or_kill(process: PeerProcess, prefix: str) -> str:
    try:
        return process.expect(prefix, START_TIMEOUT)
    except BaseException:
        process.kill()
        raise
