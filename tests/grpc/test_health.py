"""grpc.health.v1 of our server, asked by grpcio-health-checking's client."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from meshlib.filters.limit import concurrency_limit
from meshlib.grpc.serving.rpc import serve_rpc
from meshlib.grpc.serving.server import serve

from .raw import wait_until
from .server_worker import interop_handler

SERVICE = "meshlib.grpctest.Interop"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.UNKNOWN
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def asked(service: str = "") -> Any:
    return health_pb2.HealthCheckRequest(service=service)


async def test_check_and_watch_follow_what_the_application_says() -> None:
    async with serve([interop_handler()]) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(asked())).status == SERVING
        assert (await stub.Check(asked(SERVICE))).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(asked("no.Such"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(asked(SERVICE))
        other = stub.Watch(asked("no.Such"))
        assert (await watch.read()).status == SERVING
        assert (await other.read()).status == SERVICE_UNKNOWN
        server.health.set(SERVICE, False)
        assert (await watch.read()).status == NOT_SERVING
        assert (await stub.Check(asked(SERVICE))).status == NOT_SERVING
        assert (await stub.Check(asked())).status == SERVING
        assert not server.health.serving(SERVICE)
        server.health.set(SERVICE, None)
        assert (await watch.read()).status == UNKNOWN
        server.health.set("no.Such", True)
        assert (await other.read()).status == SERVING
        watch.cancel()
        other.cancel()
        statuses = (await stub.List(health_pb2.HealthListRequest())).statuses
        assert {name: each.status for name, each in statuses.items()} == {
            "": SERVING,
            SERVICE: UNKNOWN,
            "no.Such": SERVING,
        }
        metrics = server.metrics()
    assert metrics["requests"] == metrics["pending"] == 0, "health is none of the server's own traffic"


async def test_a_server_that_drains_says_so_while_it_still_answers() -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    handler = interop_handler()
    server = await serve([handler])
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(asked())
        assert (await watch.read()).status == SERVING
        call = interop_pb2_grpc.InteropStub(channel).UnaryCall(pb.SimpleRequest(delay=0.3))
        await wait_until(lambda: handler.under_way == 1)
        closing = asyncio.create_task(server.aclose())
        assert (await watch.read()).status == NOT_SERVING
        server.health.set("", True)  # too late: that it ends counts
        assert (await call).server == "server"
        assert await watch.code() is grpc.StatusCode.UNAVAILABLE
        await closing
        assert not server.health.serving()


async def test_watches_hold_up_nobodys_end() -> None:
    server = await serve([interop_handler()], grace=30)
    async with grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(asked())
        assert (await watch.read()).status == SERVING
        await asyncio.wait_for(server.aclose(), 10)
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_full_server_is_healthy_all_the_same() -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    handler = interop_handler()
    async with (
        serve([handler], "127.0.0.1:0", concurrency_limit(1)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        call = interop_pb2_grpc.InteropStub(channel).UnaryCall(pb.SimpleRequest(delay=10))
        await wait_until(lambda: handler.under_way == 1)
        for _ in range(5):
            assert (await health_pb2_grpc.HealthStub(channel).Check(asked())).status == SERVING
        call.cancel()


async def test_services_of_bytes_are_probed_by_anybody() -> None:
    async def service(request: Any) -> Any:
        raise AssertionError

    async with (
        serve_rpc(service, {"Echo": ["echo"]}) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        assert (await health_pb2_grpc.HealthStub(channel).Check(asked("Echo"))).status == SERVING


async def test_a_health_handler_of_the_users_own_stands_in_its_place() -> None:
    from grpclib.const import Cardinality, Handler

    class Health:
        async def check(self, stream: Any) -> None:
            await stream.recv_message()
            await stream.send_message(health_pb2.HealthCheckResponse(status=NOT_SERVING))

        def __mapping__(self) -> Any:
            types = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
            return {"/grpc.health.v1.Health/Check": Handler(self.check, Cardinality.UNARY_UNARY, *types)}

    async with serve([interop_handler(), Health()]) as server, grpc.aio.insecure_channel(server.address) as channel:
        assert (await health_pb2_grpc.HealthStub(channel).Check(asked())).status == NOT_SERVING
