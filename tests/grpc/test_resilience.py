"""Real grpcio servers that restart, are slow, fail, come and go; and what callers of a channel see of it: nothing."""

import asyncio
import contextlib
import itertools
import json

import anyio
import pytest
from grpclib.exceptions import GRPCError

import meshlib.grpc
from meshlib import balance, least_loaded, p2c
from meshlib.core.var import Var
from meshlib.names import resolver
from meshlib.names.addr import Address, Bound

from .servers import Process, aio_server

RATE = 200
"""Calls a second."""


@pytest.fixture(scope="module", params=[("asyncio", {"use_uvloop": False})], ids=["asyncio"])
def anyio_backend(request):
    """Processes are the same on any loop."""
    return request.param


@pytest.fixture
def pb():
    from meshprotos import interop_pb2

    return interop_pb2


def stub_of(channel):
    from meshprotos.interop_grpc import InteropStub

    return InteropStub(channel)


@contextlib.asynccontextmanager
async def processes(protos, *kinds):
    """Servers in processes of their own, started at once; each kind is the options of one."""
    started = list(await asyncio.gather(*(asyncio.to_thread(Process, protos, **kind) for kind in kinds)))
    try:
        yield started  # whoever replaces one puts its successor there
    finally:
        for each in started:
            each.kill()


class Load:
    """Calls at a steady rate, whatever becomes of them."""

    def __init__(self, call):
        self.call = call
        self.done = 0
        self.errors = []
        self.servers = {}

    async def one(self):
        try:
            reply = await self.call()
        except GRPCError as error:
            self.errors.append(str(error))
        else:
            self.done += 1
            self.servers[reply.server] = self.servers.get(reply.server, 0) + 1

    async def run(self, group):
        begun = anyio.current_time()
        for n in itertools.count():
            group.start_soon(self.one)
            await anyio.sleep(max(0, begun + (n + 1) / RATE - anyio.current_time()))


async def test_a_rolling_restart_fails_no_call_and_cuts_no_stream(protos, pb):
    names = ("a", "b", "c")
    async with processes(protos, *({"name": name} for name in names)) as servers:
        target = ",".join(server.address for server in servers)
        async with meshlib.grpc.Channel(target) as channel:
            stub = stub_of(channel)
            # gRPC's core, as it stops, answers CANCELLED to calls that it has read and no handler has seen; nothing
            # tells them from calls that one has. So it takes an idempotent method to be sure of every single call.
            load = Load(lambda: stub.Read(pb.SimpleRequest(delay=0.005, reply_size=10), timeout=10))
            streams = []

            async def stream():
                replies = await stub.StreamingOutput(pb.StreamRequest(sizes=[10] * 20, interval=0.04))
                streams.append(len(replies))

            async with anyio.create_task_group() as group, anyio.create_task_group() as watching:
                load_scope = anyio.CancelScope()

                async def steady():
                    with load_scope:
                        await load.run(group)

                group.start_soon(steady)
                await anyio.sleep(0.3)
                for n, server in enumerate(servers):
                    for _ in range(4):
                        watching.start_soon(stream)
                    await anyio.sleep(0.1)
                    server.terminate()
                    await asyncio.to_thread(server.wait)
                    servers[n] = await asyncio.to_thread(Process, protos, port=server.port, name=f"{names[n]}2")
                    server.kill()
                    await anyio.sleep(0.6)
                await anyio.sleep(0.5)
                load_scope.cancel()
            assert load.errors == []
            assert load.done > 500
            assert streams == [20] * 12
            assert {"a2", "b2", "c2"} & load.servers.keys()
            assert not any(node.load for node in channel.endpoints)


async def test_one_slow_server_and_one_that_fails_cost_no_idempotent_call(pb):
    async with contextlib.AsyncExitStack() as stack:
        kinds = (
            {"name": "good", "delay": 0.005},
            {"name": "slow", "delay": 0.05},
            {"name": "bad", "fail": "UNAVAILABLE"},
        )
        kinds = (*kinds, {"name": "fine", "delay": 0.005})
        addresses = [(await stack.enter_async_context(aio_server(**kind)))[0] for kind in kinds]
        channel = await stack.enter_async_context(meshlib.grpc.Channel(",".join(addresses)))
        stub = stub_of(channel)
        load = Load(lambda: stub.Read(pb.SimpleRequest(), timeout=5))
        async with anyio.create_task_group() as group:
            with anyio.move_on_after(2.5):
                await load.run(group)
        assert load.done + len(load.errors) >= 400
        assert load.done / (load.done + len(load.errors)) >= 0.999, load.errors[:3]
        assert load.servers["slow"] < load.servers["good"]


class Told:
    """A resolver that says what it is told to."""

    def __init__(self, *addresses):
        self.word = Var(Bound.of(map(Address.parse, addresses)))

    def say(self, *addresses):
        self.word.set(Bound.of(map(Address.parse, addresses)))

    async def watch(self, target):
        seen = -1
        while True:
            seen = await self.word.changed(seen)
            yield self.word.value


async def test_new_endpoints_get_calls_within_a_second_of_the_resolvers_word_and_removed_ones_none(pb, monkeypatch):
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(aio_server(name=name)) for name in "abc"]
        (a, first), (b, _), (c, third) = servers
        told = Told(a, b)
        monkeypatch.setattr(resolver, "_of_others", lambda target: told)
        channel = await stack.enter_async_context(meshlib.grpc.Channel("told://servers", balance(p2c(least_loaded()))))
        stub = stub_of(channel)
        load = Load(lambda: stub.UnaryCall(pb.SimpleRequest(), timeout=5))
        async with anyio.create_task_group() as group:
            group.start_soon(load.run, group)
            await anyio.sleep(0.3)
            assert load.servers.keys() == {"a", "b"}
            told.say(b, c)
            began = anyio.current_time()
            while not third.calls:  # noqa: ASYNC110 - a server tells nobody
                await anyio.sleep(0.005)
            took = anyio.current_time() - began
            await anyio.sleep(0.05)
            then = first.calls
            load.servers.clear()
            await anyio.sleep(0.5)
            assert first.calls == then
            assert load.servers.keys() == {"b", "c"}
            group.cancel_scope.cancel()
        assert took < 1  # the word; it is some milliseconds
        assert load.errors == []


async def test_a_file_of_endpoints_is_followed(pb, tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        (a, _), (b, _) = [await stack.enter_async_context(aio_server(name=name)) for name in "ab"]
        where = anyio.Path(tmp_path / "servers.json")
        await where.write_text(json.dumps([a]))
        channel = await stack.enter_async_context(meshlib.grpc.Channel(f"file://{where}"))
        stub = stub_of(channel)
        assert (await stub.UnaryCall(pb.SimpleRequest())).server == "a"
        await where.write_text(json.dumps([b]))
        with anyio.fail_after(20):
            while (await stub.UnaryCall(pb.SimpleRequest())).server != "b":  # noqa: ASYNC110 - asking is the test
                await anyio.sleep(0.02)
        assert [str(node.address) for node in channel.endpoints] == [b]
