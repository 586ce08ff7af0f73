"""Servers in processes of their own, for tests."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio

__all__ = ["Worker", "free_port", "workers"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Worker:
    """A process that runs ``worker.py``."""

    def __init__(
        self,
        server: str = "uvicorn",
        kind: str = "fastapi",
        *,
        port: int = 0,
        linger: float = 0.5,
        out: Any = subprocess.PIPE,
    ) -> None:
        self.port = port or free_port()
        self._command = [sys.executable, "-m", "tests.http.worker", server, kind, str(self.port), str(linger)]
        self._files: tuple[str, ...] = ()
        self._out = out
        self.process: Any = None

    def with_tls(self, files: tuple[str, str]) -> Worker:
        self._files = files
        return self

    def _start(self) -> None:
        command = [*self._command, *self._files]
        self.process = subprocess.Popen(command, stdout=self._out, stderr=subprocess.STDOUT, text=True)

    async def up(self) -> None:
        self._start()
        with anyio.fail_after(30):
            while True:
                try:
                    await (await anyio.connect_tcp("127.0.0.1", self.port)).aclose()
                    return
                except OSError:
                    assert self.process.poll() is None, self.process.stdout and self.process.stdout.read()
                    await anyio.sleep(0.02)

    async def line(self) -> str:
        """The next that it prints."""
        with anyio.fail_after(30):
            line: str = await anyio.to_thread.run_sync(self.process.stdout.readline, abandon_on_cancel=True)
            return line

    async def ended(self) -> str:
        """All else that it prints until it ends."""
        with anyio.fail_after(30):
            out, _ = await anyio.to_thread.run_sync(self.process.communicate, abandon_on_cancel=True)
            return str(out)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()


@contextlib.asynccontextmanager
async def workers(*given: Worker) -> AsyncIterator[tuple[Worker, ...]]:
    """Start them, all at once, and kill them in the end."""
    try:
        async with anyio.create_task_group() as group:
            for each in given:
                group.start_soon(each.up)
        yield given
    finally:
        for each in given:
            each.kill()
