"""A channel with the whole stack beside bare grpclib and grpcio.aio: ``python -m benchmarks.grpc``.

Each server has a process of its own, and all clients share another, where they take turns, several times over. Printed
is the median of each, and its ratio to grpclib's own client and server.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import grpclib.client
import grpclib.server
from grpclib.const import Cardinality, Handler
from grpclib.encoding.base import CodecBase

import meshlib
import meshlib.grpc

BODY = b"x" * 100
PATH = "/benchmarks.Echo/Echo"
OPTIONS = (("grpc.enable_http_proxy", 0),)
Call = Callable[[bytes], Awaitable[Any]]
Opened = Callable[[str], AbstractAsyncContextManager[Call]]


class Bytes(CodecBase):
    """Messages are bytes, so that no message library is measured."""

    @property
    def __content_subtype__(self) -> str:
        return "bytes"

    def encode(self, message: bytes, message_type: object) -> bytes:
        return message

    def decode(self, data: bytes, message_type: object) -> bytes:
        return data


class Echo:
    """Answers with what it was sent."""

    async def echo(self, stream: Any) -> None:
        request = await stream.recv_message()
        if request is not None:
            await stream.send_message(request)

    def __mapping__(self) -> Mapping[str, Handler]:
        return {PATH: Handler(self.echo, Cardinality.UNARY_UNARY, bytes, bytes)}


# --- servers ----------------------------------------------------------------------------------------------------------


async def serve_grpclib() -> None:
    """grpclib's own."""
    server = grpclib.server.Server([Echo()], codec=Bytes())
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    await server.start(sock=listener)
    print(listener.getsockname()[1], flush=True)
    await server.wait_closed()


async def serve_meshlib() -> None:
    """The same handlers, with the server stack around."""
    async with meshlib.grpc.serve([Echo()], "127.0.0.1:0", codec=Bytes()) as server:
        print(server.address.rpartition(":")[2], flush=True)
        await server.wait_closed()


async def serve_grpcio() -> None:
    """grpcio.aio."""

    async def echo(request: bytes, _context: object) -> bytes:
        return request

    server = grpc.aio.server()
    methods = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmarks.Echo", methods),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


SERVERS = {"grpclib": serve_grpclib, "meshlib": serve_meshlib, "grpcio": serve_grpcio}

# --- clients ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def through_grpclib(address: str) -> AsyncIterator[Call]:
    """grpclib's own channel."""
    host, _, port = address.rpartition(":")
    async with grpclib.client.Channel(host, int(port), codec=Bytes()) as channel:
        yield grpclib.client.UnaryUnaryMethod[bytes, bytes](channel, PATH, bytes, bytes)


@asynccontextmanager
async def through_meshlib(address: str) -> AsyncIterator[Call]:
    """The same stub on our channel, with every default."""
    async with meshlib.grpc.Channel(address, codec=Bytes()) as channel:
        stub: Any = grpclib.client.UnaryUnaryMethod
        yield stub(channel, PATH, bytes, bytes)


@asynccontextmanager
async def through_grpcio(address: str) -> AsyncIterator[Call]:
    """grpcio.aio."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        yield channel.unary_unary(PATH)


PAIRS: dict[str, tuple[Opened, str]] = {
    "grpclib -> grpclib": (through_grpclib, "grpclib"),
    "meshlib -> grpclib": (through_meshlib, "grpclib"),
    "meshlib -> meshlib": (through_meshlib, "meshlib"),
    "grpclib -> meshlib": (through_grpclib, "meshlib"),
    "grpcio.aio -> grpcio.aio": (through_grpcio, "grpcio"),
}


async def rate(opened: Opened, address: str, callers: int, seconds: float) -> float:
    """Calls a second."""
    done = 0
    async with opened(address) as call:
        await call(BODY)

        async def caller(until: float) -> None:
            nonlocal done
            while time.perf_counter() < until:
                await call(BODY)
                done += 1

        async def load(seconds: float) -> float:
            nonlocal done
            done = 0
            began = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for _ in range(callers):
                    group.create_task(caller(began + seconds))
            return done / (time.perf_counter() - began)

        await load(seconds / 4)
        gc.collect()
        return await load(seconds)


async def compare(ports: dict[str, int], options: argparse.Namespace) -> None:
    """Print the table."""
    pairs = {name: pair for name, pair in PAIRS.items() if pair[1] in ports and options.only in name}
    for callers in options.callers:
        rates: dict[str, list[float]] = {name: [] for name in pairs}
        for _ in range(options.rounds):
            for name, (opened, server) in pairs.items():
                rates[name].append(await rate(opened, f"127.0.0.1:{ports[server]}", callers, options.seconds))
        medians = {name: statistics.median(each) for name, each in rates.items()}
        bare = medians.get("grpclib -> grpclib")
        print(f"\n{callers} callers, 100 B, {options.loop}, median of {options.rounds} rounds of {options.seconds:g} s")
        for name, median in medians.items():
            ratio = f"{median / bare:5.2f}" if bare else ""
            print(f"  {name:26}{median:9,.0f} /s   {ratio}   (from {min(rates[name]):,.0f} to {max(rates[name]):,.0f})")
        sys.stdout.flush()


def pin(core: int) -> None:
    """Servers on one core, clients on another, where there are two."""
    if hasattr(os, "sched_setaffinity") and len(cores := sorted(os.sched_getaffinity(0))) > 1:
        os.sched_setaffinity(0, {cores[core]})


def run(main: Any, loop: str) -> None:
    """On that event loop."""
    if loop == "uvloop":
        import uvloop

        uvloop.run(main)
    else:
        asyncio.run(main)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 64, 500])
    parser.add_argument("--loops", nargs="+", default=["asyncio", "uvloop"])
    parser.add_argument("--only", default="")
    parser.add_argument("--servers", nargs="+", default=list(SERVERS))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--loop", default="asyncio", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        pin(0)
        run(SERVERS[options.serve](), options.loop)
        return
    pin(1)
    for loop in options.loops:
        options.loop = loop
        with ExitStack() as stack:
            ports = {}
            for name in options.servers:
                command = [sys.executable, "-m", "benchmarks.grpc", "--serve", name, "--loop", options.loop]
                server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
                stack.callback(server.kill)
                assert server.stdout is not None
                line = server.stdout.readline()
                if line:
                    ports[name] = int(line)
            run(compare(ports, options), options.loop)


if __name__ == "__main__":
    main()
