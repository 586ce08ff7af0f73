"""Real grpcio servers for tests: in a thread of this process, or ``python -m tests.grpc.servers``.

They serve ``meshprotos.interop_pb2``'s Interop; what a call does, its request says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio

__all__ = ["Process", "aio_server", "interop_service"]


def interop_service(name: str = "server", delay: float = 0.0, fail: str = "") -> Any:
    """A servicer that answers as ``name``, each time after ``delay``; ``fail`` names a status for every unary call."""
    import grpc
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    class Interop(interop_pb2_grpc.InteropServicer):
        def __init__(self) -> None:
            self.calls = 0
            self.under_way = 0
            self.cancelled = 0
            self.metadata: list[Any] = []

        async def _begin(self, context: Any) -> int:
            self.calls += 1
            metadata = dict(context.invocation_metadata())
            self.metadata.append(metadata)
            if "x-initial" in metadata:
                await context.send_initial_metadata((("x-initial", metadata["x-initial"]),))
            if "x-trailing-bin" in metadata:
                context.set_trailing_metadata((("x-trailing-bin", metadata["x-trailing-bin"]),))
            return int(metadata.get("grpc-previous-rpc-attempts", 0))

        async def EmptyCall(self, request: Any, context: Any) -> Any:
            await self._begin(context)
            return pb.Empty()

        async def UnaryCall(self, request: Any, context: Any) -> Any:
            attempts = await self._begin(context)
            self.under_way += 1
            try:
                if delay or request.delay:
                    await asyncio.sleep(delay + request.delay)
                if fail:
                    await context.abort(getattr(grpc.StatusCode, fail), f"{name} always fails")
                if request.status.code:
                    code = next(c for c in grpc.StatusCode if c.value[0] == request.status.code)
                    await context.abort(code, request.status.message)
                return pb.SimpleReply(payload=bytes(request.reply_size), server=name, attempts=attempts)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.under_way -= 1

        Read = UnaryCall

        async def StreamingInput(self, requests: Any, context: Any) -> Any:
            await self._begin(context)
            size = count = 0
            async for request in requests:
                size += len(request.payload)
                count += 1
            return pb.Summary(size=size, count=count)

        async def _answer(self, request: Any, context: Any) -> AsyncIterator[Any]:
            for size in request.sizes:
                if request.interval:
                    await asyncio.sleep(request.interval)
                yield pb.SimpleReply(payload=bytes(size), server=name)
            if request.status.code:
                code = next(c for c in grpc.StatusCode if c.value[0] == request.status.code)
                await context.abort(code, request.status.message)

        async def StreamingOutput(self, request: Any, context: Any) -> AsyncIterator[Any]:
            await self._begin(context)
            self.under_way += 1
            try:
                async for reply in self._answer(request, context):
                    yield reply
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.under_way -= 1

        async def FullDuplex(self, requests: Any, context: Any) -> AsyncIterator[Any]:
            await self._begin(context)
            self.under_way += 1
            try:
                async for request in requests:
                    async for reply in self._answer(request, context):
                        yield reply
            finally:
                self.under_way -= 1

    return Interop()


async def _start(tls: Any, address: str, options: Any, servicer: Any) -> tuple[Any, int]:
    import grpc
    from meshprotos import interop_pb2_grpc

    server = grpc.aio.server(options=options)
    interop_pb2_grpc.add_InteropServicer_to_server(servicer, server)
    if tls is None:
        port = server.add_insecure_port(address)
    else:
        chain, key = await anyio.Path(tls[0]).read_bytes(), await anyio.Path(tls[1]).read_bytes()
        port = server.add_secure_port(address, grpc.ssl_server_credentials([(key, chain)]))
    await server.start()
    servicer.server = server
    return server, port


@functools.cache
def _elsewhere() -> asyncio.AbstractEventLoop:
    """grpc.aio wants one event loop for the life of the process; tests have many. So its servers have a thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="grpcio servers", daemon=True).start()
    return loop


async def on_servers_loop(coroutine: Any) -> Any:
    """Run it where the servers are."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, _elsewhere()))


@contextlib.asynccontextmanager
async def aio_server(
    *,
    tls: tuple[str, str] | None = None,
    address: str = "127.0.0.1:0",
    options: Any = (),
    grace: float | None = None,
    **kind: Any,
) -> AsyncIterator[tuple[str, Any]]:
    """A server in a thread of this process; gives its address and servicer."""
    servicer = interop_service(**kind)
    server, port = await on_servers_loop(_start(tls, address, options, servicer))
    try:
        yield (address if address.startswith("unix:") else f"127.0.0.1:{port}"), servicer
    finally:
        with anyio.CancelScope(shield=True):
            await on_servers_loop(server.stop(grace))


class Process:
    """A server in a process of its own."""

    def __init__(self, protos: Path, *, port: int = 0, name: str = "server", **options: Any) -> None:
        command = [sys.executable, "-m", "tests.grpc.servers", "--port", str(port), "--name", name]
        for option, value in options.items():
            command += [f"--{option}", str(value)]
        environment = {**os.environ, "PYTHONPATH": f"{protos}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.address = f"127.0.0.1:{self.port}"

    def terminate(self) -> None:
        """Ask it to end as it would on a roll-out: what is under way is finished."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 20) -> None:
        self._process.wait(timeout)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--name", default="server")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--fail", default="")
    given = parser.parse_args()
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    address = f"127.0.0.1:{given.port}"
    servicer = interop_service(name=given.name, delay=given.delay, fail=given.fail)
    server, port = await _start(None, address, (), servicer)
    print(port, flush=True)
    await told.wait()
    await server.stop(20)


if __name__ == "__main__":
    asyncio.run(main())
