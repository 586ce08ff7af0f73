"""A real ZooKeeper for tests: one server or an ensemble of three, on free ports, killed, paused and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
from kazoo.client import KazooClient
from kazoo.retry import KazooRetry

from meshlib.names.target import Target
from meshlib.names.zookeeper import ZooKeeperResolver

from .conftest import missing

__all__ = ["Peer", "Registry", "Watching", "ZooKeeper", "ensemble", "free_ports", "member", "standalone"]

JARS = Path(os.environ.get("ZOOKEEPER_JARS", "/usr/share/java"))
TICK = 500
"""Milliseconds. A session can be as short as two ticks, and an election is over in a few."""
START = 20.0
"""Seconds that a JVM may take to serve."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Peer:
    """One server: a process that can be killed, paused and started again on the same data and ports."""

    def __init__(self, folder: Path, number: int, port: int, lines: list[str], properties: dict[str, str]) -> None:
        self.port = port
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        data = folder / "data"
        data.mkdir(parents=True)
        (data / "myid").write_text(str(number))
        # Without syncs: a crash of the machine is not what is tested, and disks of CI runners are slow.
        settings = {"tickTime": TICK, "dataDir": data, "clientPort": port, "clientPortAddress": "127.0.0.1"} | {
            "admin.enableServer": "false",
            "4lw.commands.whitelist": "*",
            "maxClientCnxns": 0,
            "minSessionTimeout": 2 * TICK,
        }
        config = [f"{name}={value}" for name, value in settings.items()] + lines
        (folder / "zoo.cfg").write_text("\n".join(config) + "\n")
        java = shutil.which("java") or "java"
        quiet = {"zookeeper.forceSync": "no", "org.slf4j.simpleLogger.defaultLogLevel": "warn"} | properties
        self.command = [java, "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"]
        self.command += [f"-D{name}={value}" for name, value in quiet.items()]
        self.command += ["-cp", _classpath(), "org.apache.zookeeper.server.quorum.QuorumPeerMain"]
        self.command += [str(folder / "zoo.cfg")]

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.folder)

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def ask(self, word: str) -> str:
        """What the server answers to a four-letter word; empty when it does not."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as sock:
                sock.sendall(word.encode())
                answer = b""
                while part := sock.recv(65536):
                    answer += part
                return answer.decode()
        except OSError:
            return ""

    @property
    def mode(self) -> str:
        """``leader``, ``follower``, ``standalone``, ``read-only``, or empty when it does not serve."""
        for line in self.ask("srvr").splitlines():
            if line.startswith("Mode: "):
                return line.removeprefix("Mode: ")
        return ""


class ZooKeeper:
    """One server or several that elect a leader."""

    def __init__(self, peers: list[Peer]) -> None:
        self.peers = peers

    @property
    def hosts(self) -> str:
        """What comes between ``zk://`` and the path."""
        return ",".join(f"127.0.0.1:{peer.port}" for peer in self.peers)

    @property
    def leader(self) -> Peer:
        return next(peer for peer in self.peers if peer.process and peer.mode in ("leader", "standalone"))

    def start(self) -> None:
        for peer in self.peers:
            if peer.process is None:
                peer.start()
        self.wait()

    def wait(self, count: int | None = None) -> None:
        """Wait until so many of its peers (by default all) serve."""
        end = time.monotonic() + START
        while sum(peer.mode in ("leader", "follower", "standalone") for peer in self.peers) < (
            count or len(self.peers)
        ):
            if time.monotonic() > end:
                logs = "\n".join((peer.folder / "log").read_text("utf-8", "replace")[-2000:] for peer in self.peers)
                raise TimeoutError(f"ZooKeeper does not serve after {START} s:\n{logs}")
            time.sleep(0.05)

    def kill(self) -> None:
        for peer in self.peers:
            peer.kill()

    def restart(self) -> None:
        self.kill()
        self.start()


def member(port: int, host: str = "127.0.0.1", **more: object) -> bytes:
    """What a serverset's member says of itself."""
    said = {"serviceEndpoint": {"host": host, "port": port}, "additionalEndpoints": {}, "status": "ALIVE"}
    return json.dumps(said | more).encode()


class Registry:
    """What others do with ZooKeeper: a plain client of kazoo's, below one path. Its methods block."""

    def __init__(self, client: KazooClient, hosts: str, path: str) -> None:
        self.client = client
        self.path = path
        self.target = f"zk://{hosts}{path}"

    @classmethod
    @contextmanager
    def at(cls, hosts: str, path: str) -> Iterator[Registry]:
        retry = {"max_tries": -1, "delay": 0.05, "max_delay": 0.2}
        client = KazooClient(hosts, timeout=10, connection_retry=KazooRetry(**retry), command_retry=KazooRetry(**retry))
        client.start(timeout=30)
        try:
            yield cls(client, hosts, path)
        finally:
            client.stop()
            client.close()

    def join(self, port: int, ephemeral: bool = True, **more: object) -> str:
        """Add a serverset member; returns its path."""
        made: str = self.client.retry(
            self.client.create,
            f"{self.path}/member_",
            member(port, **more),
            ephemeral=ephemeral,
            sequence=True,
            makepath=True,
        )
        return made

    def put(self, name: str, data: bytes = b"") -> None:
        """Make or rewrite a node below the path."""
        path = f"{self.path}/{name}" if name else self.path
        if self.client.retry(self.client.exists, path):
            self.client.retry(self.client.set, path, data)
        else:
            self.client.retry(self.client.create, path, data, makepath=True)

    def remove(self, name: str = "") -> None:
        """Delete a node below the path, given by name or whole path, or all of the path."""
        path = name if name.startswith("/") else f"{self.path}/{name}".rstrip("/")
        self.client.retry(self.client.delete, path, recursive=True)

    def end_session(self, identity: tuple[int, bytes]) -> None:
        """End another client's session, as if it had expired."""
        thief = KazooClient(",".join(f"{h}:{p}" for h, p in self.client.hosts), client_id=identity)
        thief.start()
        thief.stop()
        thief.close()


class Watching:
    """A target, watched: its states in order."""

    def __init__(self, target, **options):
        self.states = ZooKeeperResolver(**options).watch(Target.parse(target))

    async def until(self, wanted):
        """The first state that is as wanted: text, or a function."""
        with anyio.fail_after(10):
            while True:
                state = await anext(self.states)
                if wanted(state) if callable(wanted) else sorted(str(state).split(", ")) == sorted(wanted.split(", ")):
                    return state

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        with anyio.CancelScope(shield=True):
            await self.states.aclose()


@contextmanager
def standalone(folder: Path, *lines: str, **properties: str) -> Iterator[ZooKeeper]:
    """One server.

    Args:
        folder: For its data and log.
        lines: More lines of its configuration.
        properties: More Java properties, with ``_`` for ``.``.
    """
    _needs_zookeeper()
    server = ZooKeeper([Peer(folder / "1", 1, free_ports(1)[0], list(lines), _dotted(properties))])
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def ensemble(folder: Path, *lines: str, size: int = 3, **properties: str) -> Iterator[ZooKeeper]:
    """Three servers."""
    _needs_zookeeper()
    ports = free_ports(3 * size)
    common = ["initLimit=10", "syncLimit=4", *lines]
    common += [f"server.{n + 1}=127.0.0.1:{ports[3 * n]}:{ports[3 * n + 1]}" for n in range(size)]
    peers = [Peer(folder / f"{n + 1}", n + 1, ports[3 * n + 2], common, _dotted(properties)) for n in range(size)]
    servers = ZooKeeper(peers)
    try:
        servers.start()
        yield servers
    finally:
        servers.kill()


def _needs_zookeeper() -> None:
    if shutil.which("java") is None:
        missing("ZooKeeper needs java: apt install zookeeper")
    if not any(JARS.glob("zookeeper*.jar")):
        missing(f"no ZooKeeper in {JARS}: apt install zookeeper, or set ZOOKEEPER_JARS to the folder of its jars")


def _classpath() -> str:
    """The few jars that it needs. A whole /usr/share/java takes seconds to open."""
    wanted = ("zookeeper", "zookeeper-jute", "slf4j-api", "slf4j-simple", "metrics-core", "snappy-java", "commons-io")
    jars = [JARS / f"{name}.jar" for name in wanted]
    jars += sorted(JARS.glob("netty-*.jar"))
    found = [str(jar) for jar in jars if jar.exists()]
    return ":".join(found) if len(found) > 4 else f"{JARS}/*"


def _dotted(properties: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "."): value for name, value in properties.items()}
