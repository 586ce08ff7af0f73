"""A real DNS server for tests: dnsmasq on a free port, whose names change while it runs."""

from __future__ import annotations

import getpass
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dns.message
import dns.query

from .conftest import missing

__all__ = ["Dnsmasq", "dnsmasq"]


class Dnsmasq:
    """The server. ``port`` is where it listens, on UDP and TCP."""

    def __init__(self, folder: Path, ttl: int, lines: list[str]) -> None:
        program = shutil.which("dnsmasq") or shutil.which("dnsmasq", path="/usr/sbin")
        if program is None:
            missing("dnsmasq is not installed: apt install dnsmasq-base")
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port: int = sock.getsockname()[1]
        self._hosts = folder / "names"
        self._hosts.write_text("")
        self._version = 0
        self._command = [
            program, "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", f"--user={getpass.getuser()}",
            "--no-resolv", "--no-hosts", f"--addn-hosts={self._hosts}", "--local=/test/", f"--local-ttl={ttl}",
            "--listen-address=127.0.0.1", "--bind-interfaces", f"--port={self.port}", "--no-daemon", *lines,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def server(self) -> str:
        """As in a target's ``server=``."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        query, end = dns.message.make_query("ready.test.", "A"), time.monotonic() + 10
        while True:
            try:
                dns.query.udp(query, "127.0.0.1", port=self.port, timeout=0.2)
                return
            except Exception:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise
                time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def names(self, **addresses: list[str]) -> None:
        """From now on there are these hosts in the domain ``test``, and no others."""
        self._version += 1
        # A name of its own for each version tells when the server has read it: that something is gone tells as well.
        known = {**addresses, f"version{self._version}": ["127.0.0.99"]}
        lines = [f"{each} {name}.test" for name, found in known.items() for each in found]
        self._hosts.write_text("\n".join(lines) + "\n")
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)
            end = time.monotonic() + 10
            while any(self._has(name) != set(found) for name, found in known.items()):
                assert time.monotonic() < end, "dnsmasq does not read its names again"
                time.sleep(0.01)

    def _has(self, name: str) -> set[str]:
        found: set[str] = set()
        for kind in ("A", "AAAA"):
            query = dns.message.make_query(f"{name}.test.", kind)
            reply = dns.query.tcp(query, "127.0.0.1", port=self.port, timeout=1)
            found |= {each.to_text() for records in reply.answer for each in records}
        return found


@contextmanager
def dnsmasq(folder: Path, *lines: str, ttl: int = 1) -> Iterator[Dnsmasq]:
    """A server whose records live for ``ttl`` seconds."""
    server = Dnsmasq(folder, ttl, list(lines))
    try:
        server.start()
        yield server
    finally:
        server.stop()
