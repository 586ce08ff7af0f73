"""Programs as people write them for grpclib's server: unchanged but for where ``Server`` comes from, they do the same.

Each program runs twice, with grpclib's own server and with ours, and both are asked the same by grpclib's client.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from grpclib.client import Channel

from ..conftest import BACKENDS

SERVERS = {"grpclib": "grpclib.server", "meshlib": "meshlib.grpc"}

GREETER = """
import asyncio
import os
import ssl
import sys

from grpclib.utils import graceful_exit
from {module} import Server

from meshprotos.greeter_grpc import GreeterBase
from meshprotos.greeter_pb2 import HelloReply


class Greeter(GreeterBase):
    async def SayHello(self, stream):
        request = await stream.recv_message()
        await stream.send_message(HelloReply(message=f"Hello, {{request.name}}!"))

    async def SayHelloGoodbye(self, stream):
        request = await stream.recv_message()
        await stream.send_message(HelloReply(message=f"Hello, {{request.name}}!"))
        await stream.send_message(HelloReply(message=f"Goodbye, {{request.name}}!"))

    async def SayHelloToManyAtOnce(self, stream):
        names = [request.name async for request in stream]
        await stream.send_message(HelloReply(message="Hello, {{}}!".format(" and ".join(names))))

    async def SayHelloToMany(self, stream):
        async for request in stream:
            await stream.send_message(HelloReply(message=f"Hello, {{request.name}}!"))


async def main():
    context = None
    if len(sys.argv) > 1:  # both sides show certificates
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(sys.argv[1], sys.argv[2])
        context.load_verify_locations(sys.argv[1])
        context.set_alpn_protocols(["h2"])
    {services}
    server = Server(services)
    with graceful_exit([server]):
        await server.start("127.0.0.1", 0, ssl=context)
        port = server._server.sockets[0].getsockname()[1]
        print(port, flush=True)
        await server.wait_closed()
        print("closed", flush=True)


asyncio.run(main())
"""
PLAIN = "services = [Greeter()]"
WITH_ALL = """
    from grpclib.health.check import ServiceCheck, ServiceStatus
    from grpclib.health.service import OVERALL, Health
    from grpclib.reflection.service import ServerReflection

    async def checked():
        return True

    greeter = Greeter()
    status = ServiceStatus()
    status.set(True)
    health = Health({OVERALL: [status], greeter: [ServiceCheck(checked)]})
    services = ServerReflection.extend([greeter, health])
"""


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    return BACKENDS["asyncio"]


@contextmanager
def program(module: str, services: str, protos: Path, *arguments: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    text = GREETER.format(module=SERVERS[module], services=services)
    process = subprocess.Popen(
        [sys.executable, "-c", text, *arguments],
        env={"PYTHONPATH": f"{protos}:{Path(__file__).parents[2]}", "PATH": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@asynccontextmanager
async def stub_on(port: int, **options: Any) -> AsyncIterator[Any]:
    from meshprotos.greeter_grpc import GreeterStub

    channel = Channel("127.0.0.1", port, **options)
    try:
        yield GreeterStub(channel)
    finally:
        channel.close()


async def all_kinds(stub: Any) -> list[list[str]]:
    from meshprotos.greeter_pb2 import HelloRequest

    names = [HelloRequest(name=name) for name in ("Ann", "Bob")]
    return [
        [(await stub.SayHello(names[0])).message],
        [reply.message for reply in await stub.SayHelloGoodbye(names[0])],
        [(await stub.SayHelloToManyAtOnce(names)).message],
        [reply.message for reply in await stub.SayHelloToMany(names)],
    ]


WANTED = [
    ["Hello, Ann!"],
    ["Hello, Ann!", "Goodbye, Ann!"],
    ["Hello, Ann and Bob!"],
    ["Hello, Ann!", "Hello, Bob!"],
]


@pytest.mark.parametrize("module", SERVERS)
async def test_a_greeter_greets_in_all_four_ways_and_ends_on_sigterm(module: str, protos: Path) -> None:
    with program(module, PLAIN, protos) as (port, process):
        async with stub_on(port) as stub:
            assert await all_kinds(stub) == WANTED
        process.send_signal(signal.SIGTERM)
        out, _ = await anyio.to_thread.run_sync(process.communicate)
        assert (process.returncode, out) == (0, "closed\n")


@pytest.mark.parametrize("module", SERVERS)
async def test_both_sides_show_certificates(module: str, protos: Path, certificate: tuple[str, str]) -> None:
    import ssl

    from grpclib.config import Configuration

    context = ssl.create_default_context(cafile=certificate[0])
    context.load_cert_chain(*certificate)
    context.set_alpn_protocols(["h2"])
    with program(module, PLAIN, protos, *certificate) as (port, _):
        config = Configuration(ssl_target_name_override="greeter.test")
        async with stub_on(port, ssl=context, config=config) as stub:
            assert await all_kinds(stub) == WANTED
        stranger = ssl.create_default_context(cafile=certificate[0])
        stranger.set_alpn_protocols(["h2"])
        async with stub_on(port, ssl=stranger, config=config) as stub:
            with pytest.raises((OSError, Exception)) as caught:
                await all_kinds(stub)
            assert not isinstance(caught.value, AssertionError)


@pytest.mark.parametrize("module", SERVERS)
async def test_grpclibs_own_health_and_reflection_are_served(module: str, protos: Path) -> None:
    text = """
import asyncio, sys
from grpclib.client import Channel
from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest
from grpclib.reflection.v1.reflection_grpc import ServerReflectionStub
from grpclib.reflection.v1.reflection_pb2 import ServerReflectionRequest

async def main():
    channel = Channel("127.0.0.1", int(sys.argv[1]))
    for service in ("", "greeter.Greeter"):
        print((await HealthStub(channel).Check(HealthCheckRequest(service=service))).status)
    (reply,) = await ServerReflectionStub(channel).ServerReflectionInfo([ServerReflectionRequest(list_services="")])
    print(sorted(service.name for service in reply.list_services_response.service))
    channel.close()

asyncio.run(main())
"""
    with program(module, WITH_ALL, protos) as (port, _):
        command = [sys.executable, "-c", text, str(port)]
        done = await anyio.run_process(command, check=True)
    assert done.stdout.decode() == "1\n1\n['greeter.Greeter', 'grpc.health.v1.Health']\n"
