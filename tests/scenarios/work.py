"""A service for scenarios, and ``python -m tests.scenarios.work PORT``, which serves it in a process of its own."""

from __future__ import annotations

import signal
import sys

import anyio

import meshlib
from meshlib import rpc


class Work:
    """Does some, in both ways that a method can be."""

    @rpc(idempotent=True)
    async def repeatable(self, n: int) -> int:
        await anyio.sleep(0.02)
        return n

    @rpc
    async def once(self, n: int) -> int:
        await anyio.sleep(0.02)
        return n


async def main(port: int) -> None:
    async with meshlib.serve(Work(), f"127.0.0.1:{port}") as server:
        print(server.address, flush=True)
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                break


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]))
