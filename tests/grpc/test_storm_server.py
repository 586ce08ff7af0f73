"""10,000 cancelled calls and streams leave nothing on the server: no stream, no task, no connection."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import anyio.to_thread
import grpc
import pytest

from meshlib.grpc.serving.server import serve

from ..conftest import BACKENDS
from .raw import wait_until
from .server_worker import interop_handler

CALLS = 10_000
AT_ONCE = 64


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    """C core's client takes most of the time; one event loop shows it."""
    return BACKENDS["asyncio"]


def storm(address: str, seed: int) -> dict[str, int]:
    """Cancel `CALLS` calls of all kinds, each somewhere between its first byte and its last."""
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    rng = random.Random(seed)
    ends: dict[str, int] = {}
    with grpc.insecure_channel(address) as channel:
        stub = interop_pb2_grpc.InteropStub(channel)
        room = threading.Semaphore(AT_ONCE)
        asked = pb.SimpleRequest(payload=b"x" * 100, delay=30)
        long = pb.StreamRequest(sizes=[10] * 10_000, interval=0.001)
        under_way: list[Any] = []

        def ended(call: Any) -> None:
            room.release()
            code = call.code().name
            ends[code] = ends.get(code, 0) + 1

        for n in range(CALLS):
            room.acquire()
            kind = n % 10
            if kind < 6:
                call = stub.UnaryCall.future(asked)
            elif kind < 9:
                call = stub.StreamingOutput(long)
            else:
                call = stub.FullDuplex(iter([long]))
            call.add_done_callback(ended)
            under_way.append(call)
            if len(under_way) > rng.randrange(AT_ONCE):
                under_way.pop(rng.randrange(len(under_way))).cancel()
        for call in under_way:
            call.cancel()
        for _ in range(AT_ONCE):
            room.acquire()
    return ends


async def test_a_storm_of_cancellations_leaves_nothing_behind() -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    handler = interop_handler()
    async with serve([handler]) as server:
        idle = len(asyncio.all_tasks())
        ends = await anyio.to_thread.run_sync(storm, server.address, 7)
        assert ends == {"CANCELLED": CALLS}
        await wait_until(lambda: server.metrics()["connections"] == server.metrics()["streams"] == 0)
        metrics = server.metrics()
        assert metrics["broken_connections"] == metrics["refused_streams"] == 0
        assert metrics["pending"] == metrics["limit/concurrency"] == 0
        assert handler.under_way == 0
        assert handler.calls > CALLS * 0.2, "most of them were under way"
        assert handler.cancelled == handler.calls
        assert server.env.supervisor.jobs == 2, "deadlines, and connections that say nothing"
        assert len(asyncio.all_tasks()) == idle
        # What is left works as before, for the server's tasks and for a task that has timeouts of its own.
        async with asyncio.timeout(10), grpc.aio.insecure_channel(server.address) as channel:
            assert await interop_pb2_grpc.InteropStub(channel).EmptyCall(pb.Empty()) == pb.Empty()
