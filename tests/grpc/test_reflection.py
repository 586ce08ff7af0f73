"""grpc.reflection of our server, asked by grpcio-reflection's client."""

from __future__ import annotations

from typing import Any

import anyio.to_thread
import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from meshlib.grpc.serving.server import serve

from .server_worker import interop_handler

SERVICE = "meshlib.grpctest.Interop"


async def test_a_client_learns_services_and_messages() -> None:
    async with serve([interop_handler()]) as server:

        def ask() -> Any:
            with grpc.insecure_channel(server.address) as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                services = set(database.get_services())
                method = DescriptorPool(database).FindServiceByName(SERVICE).FindMethodByName("UnaryCall")
                return services, method.input_type.full_name

        services, message = await anyio.to_thread.run_sync(ask)
    assert services == {SERVICE, "grpc.health.v1.Health"}
    assert message == "meshlib.grpctest.SimpleRequest"


async def _answered(server: Any, version: str) -> Any:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo
        if version == "v1":  # the messages are the same, but for their package
            call = channel.stream_stream(
                "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
        asked = call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        return [reply async for reply in asked]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_both_versions_answer_those_who_are_trusted_and_nobody_else(version: str) -> None:
    async with serve([interop_handler()]) as server:
        (reply,) = await _answered(server, version)
        assert SERVICE in {each.name for each in reply.list_services_response.service}
    async with serve([interop_handler()], trust_context=False, reflection=True) as server:
        assert await _answered(server, version)
    for options in ({"trust_context": False}, {"reflection": False}):
        async with (
            serve([interop_handler()], **options) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            # With nothing sent: grpc.aio tells another story when it is refused while it sends.
            call = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")()
            assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_reflection_of_the_users_own_stands_in_its_place() -> None:
    from grpclib.const import Cardinality, Handler

    class Own:
        async def info(self, stream: Any) -> None:
            await stream.send_message(reflection_pb2.ServerReflectionResponse(valid_host="own"))

        def __mapping__(self) -> Any:
            types = reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse
            path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
            return {path: Handler(self.info, Cardinality.STREAM_STREAM, *types)}

    async with serve([interop_handler(), Own()]) as server:
        (reply,) = await _answered(server, "v1")
        assert reply.valid_host == "own"


async def test_every_question_has_its_answer() -> None:
    ask = reflection_pb2.ServerReflectionRequest
    questions = [
        ask(file_by_filename="meshprotos/interop.proto"),
        ask(file_containing_symbol="grpc.health.v1.Health"),
        ask(file_containing_symbol="no.Such"),
        ask(
            file_containing_extension=reflection_pb2.ExtensionRequest(containing_type=f"{SERVICE}x", extension_number=1)
        ),
        ask(all_extension_numbers_of_type="google.protobuf.MethodOptions"),
        ask(all_extension_numbers_of_type="no.Such"),
        ask(),
    ]
    async with serve([interop_handler()]) as server, grpc.aio.insecure_channel(server.address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(questions))
        answers = [answer async for answer in call]
    files = [FileDescriptorProto.FromString(each) for each in answers[0].file_descriptor_response.file_descriptor_proto]
    assert [file.name for file in files] == ["meshprotos/interop.proto"]
    assert answers[0].original_request == questions[0]
    files = [FileDescriptorProto.FromString(each) for each in answers[1].file_descriptor_response.file_descriptor_proto]
    assert [method.name for method in files[0].service[0].method] == ["Check", "List", "Watch"]
    assert [answers[n].error_response.error_code for n in (2, 3, 5, 6)] == [5, 5, 5, 3]
    assert answers[4].all_extension_numbers_response.base_type_name == "google.protobuf.MethodOptions"
