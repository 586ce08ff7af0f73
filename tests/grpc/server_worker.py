"""grpclib handlers for tests of our own server, and a process that serves them: ``python -m tests.grpc.server_worker``.

What a call does, its request says; see protos/interop.proto.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["Worker", "interop_handler"]


def interop_handler(name: str = "server") -> Any:
    """The Interop service, as a grpclib handler that counts what happens to it."""
    from grpclib.const import Status
    from grpclib.exceptions import GRPCError
    from meshprotos import interop_grpc
    from meshprotos import interop_pb2 as pb

    class Interop(interop_grpc.InteropBase):
        def __init__(self) -> None:
            self.calls = self.under_way = self.cancelled = 0
            self.metadata: list[Any] = []

        async def _begin(self, stream: Any) -> None:
            self.calls += 1
            self.metadata.append(stream.metadata)
            if "x-initial" in stream.metadata:
                await stream.send_initial_metadata(metadata={"x-initial": stream.metadata["x-initial"]})

        async def _end(self, stream: Any, status: Any = None) -> None:
            if status is not None and status.code:
                raise GRPCError(Status(status.code), status.message)
            if "x-trailing-bin" in stream.metadata:
                await stream.send_trailing_metadata(metadata={"x-trailing-bin": stream.metadata["x-trailing-bin"]})

        async def EmptyCall(self, stream: Any) -> None:
            await stream.recv_message()
            await self._begin(stream)
            await stream.send_message(pb.Empty())

        async def UnaryCall(self, stream: Any) -> None:
            request = await stream.recv_message()
            await self._begin(stream)
            self.under_way += 1
            try:
                if request.delay:
                    await asyncio.sleep(request.delay)
                if request.status.code:
                    raise GRPCError(Status(request.status.code), request.status.message)
                await stream.send_message(pb.SimpleReply(payload=bytes(request.reply_size), server=name))
                await self._end(stream)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.under_way -= 1

        async def Read(self, stream: Any) -> None:
            await self.UnaryCall(stream)

        async def StreamingInput(self, stream: Any) -> None:
            await self._begin(stream)
            self.under_way += 1
            size = count = 0
            try:
                async for request in stream:
                    size += len(request.payload)
                    count += 1
                await stream.send_message(pb.Summary(size=size, count=count))
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.under_way -= 1

        async def _answer(self, stream: Any, request: Any) -> None:
            for size in request.sizes:
                if request.interval:
                    await asyncio.sleep(request.interval)
                await stream.send_message(pb.SimpleReply(payload=bytes(size), server=name))
            await self._end(stream, request.status)

        async def StreamingOutput(self, stream: Any) -> None:
            request = await stream.recv_message()
            await self._begin(stream)
            self.under_way += 1
            try:
                await self._answer(stream, request)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.under_way -= 1

        async def FullDuplex(self, stream: Any) -> None:
            await self._begin(stream)
            self.under_way += 1
            try:
                async for request in stream:
                    await self._answer(stream, request)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.under_way -= 1

        async def UnimplementedCall(self, stream: Any) -> None:
            raise GRPCError(Status.UNIMPLEMENTED, "not yet")

    return Interop()


class Worker:
    """The server in a process of its own.

    Args:
        protos: The folder of ``meshprotos``.
        name: What it calls itself.
        grace: Seconds that its end may take.
    """

    def __init__(
        self, protos: Path, *, name: str = "server", grace: float = 10.0, python: str = sys.executable
    ) -> None:
        command = [python, "-m", "tests.grpc.server_worker", "--name", name, "--grace", str(grace)]
        environment = {**os.environ, "PYTHONPATH": f"{protos}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def wait(self, seconds: float = 20.0) -> tuple[int, str]:
        """Its exit code, and what it said on standard error."""
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said


async def main() -> None:
    """Serve until SIGTERM, and end gracefully."""
    from grpclib.utils import graceful_exit

    from meshlib.grpc.serving.server import Server

    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="server")
    parser.add_argument("--grace", type=float, default=10.0)
    options = parser.parse_args()
    server = Server([interop_handler(options.name)], grace=options.grace)
    with graceful_exit([server]):
        await server.start("127.0.0.1", 0)
        print(server.address, flush=True)
        await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main())
