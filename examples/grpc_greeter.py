"""A greeter over gRPC: an ordinary stub of grpclib's, over three servers, of which one drains and one dies.

    python -m examples.grpc_greeter                    the whole story
    python -m examples.grpc_greeter --serve PORT       one server by hand; Ctrl-C or SIGTERM drains it
    python -m examples.grpc_greeter --connect TARGET   a client by hand; TARGET is host:port,… or file:///path

The story: three servers start as processes of their own. The stub is what grpclib's plugin generates; its channel is
`meshlib.grpc.Channel` instead of grpclib's, and the handlers are run by `meshlib.grpc.Server` instead of grpclib's, and
that is all there is to it. While calls and streams run, one server is stopped with SIGTERM and one is killed with
SIGKILL. The table at the end counts what the callers saw.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from grpclib.exceptions import GRPCError
from grpclib.utils import graceful_exit

import meshlib
from examples.protos.greeter_grpc import GreeterBase, GreeterStub
from examples.protos.greeter_pb2 import CountReply, CountRequest, HelloReply, HelloRequest

if TYPE_CHECKING:
    from grpclib.server import Stream

CALLERS = 16
SECONDS = 4.0
NUMBERS = 30


class Greeter(GreeterBase):
    """The service, as one writes it for grpclib."""

    async def SayHello(self, stream: Stream[HelloRequest, HelloReply]) -> None:
        """Greet."""
        request = await stream.recv_message()
        assert request is not None
        await stream.send_message(HelloReply(message=f"Hello, {request.name}, from process {os.getpid()}"))

    async def Count(self, stream: Stream[CountRequest, CountReply]) -> None:
        """Count, slowly."""
        request = await stream.recv_message()
        assert request is not None
        for number in range(1, request.to + 1):
            await stream.send_message(CountReply(number=number))
            await asyncio.sleep(request.pause)


def stub_on(channel: Any) -> GreeterStub:
    """The stub, which to type checkers wants a channel of grpclib's own."""
    return GreeterStub(channel)


# --- the two halves, by hand ------------------------------------------------------------------------------------------


async def serve(port: int) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain."""
    server = meshlib.grpc.Server([Greeter()])
    with graceful_exit([server]):
        await server.start("127.0.0.1", port)
        print(server.address, flush=True)
        await server.wait_closed()


async def connect(target: str) -> None:
    """Greet once."""
    async with meshlib.grpc.Channel(target) as channel:
        print((await stub_on(channel).SayHello(HelloRequest(name="world"))).message)


# --- the story --------------------------------------------------------------------------------------------------------


def start() -> tuple[str, subprocess.Popen[str]]:
    """Start a server on a free port."""
    command = [sys.executable, "-m", "examples.grpc_greeter", "--serve", "0"]
    # A session of its own: Ctrl-C in the terminal is ours to handle, and must not hit the servers directly.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    if not address:
        raise SystemExit("a server did not start; its error is above")
    return address, process


class Callers:
    """Greets as fast as the answers come, and counts streams meanwhile."""

    def __init__(self, stub: GreeterStub, until: float) -> None:
        self.stub, self.until = stub, until
        self.answers: Counter[int] = Counter()
        self.failed = self.streams = 0

    async def greet(self) -> None:
        """One caller."""
        while asyncio.get_running_loop().time() < self.until:
            try:
                reply = await self.stub.SayHello(HelloRequest(name="world"))
                self.answers[int(reply.message.rpartition(" ")[2])] += 1
            except GRPCError as error:
                self.failed += 1
                print(f"  failed: {error}")

    async def count(self) -> None:
        """One stream, to its end."""
        numbers = [each.number async for each in self._numbers()]
        if numbers == list(range(1, NUMBERS + 1)):
            self.streams += 1
        else:
            self.failed += 1
            print(f"  a stream ended after {len(numbers)} numbers")

    async def _numbers(self) -> AsyncIterator[CountReply]:
        try:
            async with self.stub.Count.open() as stream:
                await stream.send_message(CountRequest(to=NUMBERS, pause=1 / NUMBERS), end=True)
                async for each in stream:
                    yield each
        except GRPCError as error:
            print(f"  a stream failed: {error}")


async def story() -> int:
    """Tell it; give the number of calls that failed."""
    servers: dict[str, subprocess.Popen[str]] = {}
    try:
        servers |= dict(await asyncio.gather(*(asyncio.to_thread(start) for _ in range(3))))
        first, second, third = servers
        print(f"three servers: {first}, {second}, {third}")
        async with meshlib.grpc.Channel(",".join(servers), label="greeter") as channel:
            stub = stub_on(channel)
            print("  " + (await stub.SayHello(HelloRequest(name="world"))).message)
            print(f"now {CALLERS} callers at once for {SECONDS:g} s, and {len(servers)} streams")
            callers = Callers(stub, asyncio.get_running_loop().time() + SECONDS)
            async with asyncio.TaskGroup() as group:
                for _ in range(CALLERS):
                    group.create_task(callers.greet())
                streams = [group.create_task(callers.count()) for _ in servers]
                await asyncio.sleep(SECONDS * 0.1)
                print(f"  stopping {first} gracefully")
                servers[first].send_signal(signal.SIGTERM)
                await asyncio.wait(streams)
                code = await asyncio.to_thread(servers[first].wait, 15)
                print(f"  it has ended with {code}, and its streams had been finished before: {callers.streams} of 3")
                print(f"  killing {second} with SIGKILL")
                servers[second].kill()
            table(channel.metrics(), callers, servers)
            return callers.failed
    finally:
        for process in servers.values():
            process.kill()
            process.wait()


def table(numbers: dict[str, float], callers: Callers, servers: dict[str, subprocess.Popen[str]]) -> None:
    """What the callers saw, and who answered them."""
    total = sum(callers.answers.values())
    p50, p99 = "request_latency_ms.p50", "request_latency_ms.p99"
    retried = int(numbers["retries/requeues"] + numbers["retries/retries"])
    print(f"\n{'calls':>21} {'streams':>9} {'failed':>7} {'retried':>8} {'p50':>9} {'p99':>9}")
    print(
        f"{total:>21} {callers.streams:>9} {callers.failed:>7} {retried:>8} "
        f"{numbers[p50]:>6.2f} ms {numbers[p99]:>6.2f} ms"
    )
    print(f"\n{'server':>21} {'share':>9} {'answers':>9}")
    for address, process in servers.items():
        answers = callers.answers[process.pid]
        print(f"{address:>21} {answers / total:>9.1%} {answers:>9}")


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.grpc_greeter", description=__doc__.split("\n")[0])
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--serve", type=int, metavar="PORT", help="run one server on this port of 127.0.0.1")
    half.add_argument("--connect", metavar="TARGET", help="greet the servers at TARGET once")
    options = parser.parse_args()
    try:
        if options.serve is not None:
            asyncio.run(serve(options.serve))
            return 0
        if options.connect is not None:
            asyncio.run(connect(options.connect))
            return 0
        return min(1, asyncio.run(story()))
    except KeyboardInterrupt:
        print()
        return 130
    except GRPCError as error:
        print(f"{error.status.name}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cannot listen on port {options.serve}: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
