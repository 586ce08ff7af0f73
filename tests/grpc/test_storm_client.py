"""Ten thousand calls and streams that are cancelled in every way there is, and what is left of them: nothing."""

import asyncio
import random

import anyio
import pytest
from grpclib.exceptions import GRPCError

import meshlib
import meshlib.grpc

from .servers import aio_server

CALLS, AT_ONCE = 10_000, 250


@pytest.fixture(scope="module", params=[("asyncio", {"use_uvloop": False})], ids=["asyncio"])
def anyio_backend(request):
    """Ten seconds are enough."""
    return request.param


async def test_ten_thousand_cancelled_calls_and_streams_leave_nothing():
    from meshprotos import interop_pb2 as pb
    from meshprotos.interop_grpc import InteropStub

    rng = random.Random(7)
    outcomes = {"cancelled": 0, "failed": 0, "answered": 0}

    async def unary(stub):
        await stub.UnaryCall(pb.SimpleRequest(delay=rng.choice((0, 0.002, 30))))

    async def limited(stub):
        await stub.Read(pb.SimpleRequest(delay=30), timeout=0.001 * rng.random())

    async def down(stub):
        async with stub.StreamingOutput.open() as stream:
            await stream.send_message(pb.StreamRequest(sizes=[10, 10, 10], interval=0.01), end=True)
            async for _ in stream:
                if rng.random() < 0.2:
                    return

    async def both(stub):
        async with stub.FullDuplex.open() as stream:
            await stream.send_message(pb.StreamRequest(sizes=[1]))
            await stream.recv_message()
            if rng.random() < 0.5:
                await stream.cancel()
            await stream.recv_message()

    async def one(stub):
        work = rng.choice((unary, unary, limited, down, both))
        how = rng.randrange(3)
        task = asyncio.current_task()
        try:
            if how == 0:
                with anyio.move_on_after(0.02 * rng.random()) as scope:
                    await work(stub)
                outcomes["cancelled"] += scope.cancelled_caught
            elif how == 1:
                async with asyncio.timeout(0.02 * rng.random()):
                    await work(stub)
            else:
                inner = asyncio.create_task(work(stub))
                await asyncio.wait([inner], timeout=0.02 * rng.random())
                inner.cancel()
                await inner
            outcomes["answered"] += 1
        except GRPCError:
            outcomes["failed"] += 1
        except (TimeoutError, asyncio.CancelledError):
            outcomes["cancelled"] += 1
        assert task.cancelling() == 0

    async with aio_server() as (address, servicer):
        before = asyncio.all_tasks()
        async with meshlib.grpc.Channel(address, meshlib.failure_accrual(failures=None, success_rate=0.01)) as channel:
            stub = InteropStub(channel)
            await stub.EmptyCall(pb.Empty())
            standing = len(asyncio.all_tasks())
            limit = asyncio.Semaphore(AT_ONCE)

            async def bounded():
                async with limit:
                    await one(stub)

            async with asyncio.TaskGroup() as group:
                for _ in range(CALLS):
                    group.create_task(bounded())
            assert sum(outcomes.values()) >= CALLS
            assert outcomes["cancelled"] > CALLS / 4, outcomes
            with anyio.fail_after(20):
                while servicer.under_way:  # noqa: ASYNC110 - the other side tells nobody
                    await anyio.sleep(0.01)
            (node,) = channel.endpoints
            assert node.load == 0
            sessions = [o for o in sessions_of(channel) if o.status is meshlib.Status.OPEN]
            assert sessions
            for session in sessions:
                assert session.exchanges == {}
                assert session._h2.streams == {}
                assert len(session._wheel) == 0
                assert not session._later
            # Each further connection has a few standing tasks of its own; no call has one.
            assert len(asyncio.all_tasks()) <= standing + 6 * len(sessions)
            assert await stub.EmptyCall(pb.Empty()) == pb.Empty()
        assert asyncio.all_tasks() - before <= {asyncio.current_task()}


def sessions_of(channel):
    """The connections that the channel has, found among all objects: it does not tell."""
    import gc

    from meshlib.grpc.calling.session import GrpcSession

    return [each for each in gc.get_objects() if type(each) is GrpcSession]
