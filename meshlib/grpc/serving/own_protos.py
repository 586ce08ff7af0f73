"""The messages of gRPC's own services, health and reflection, in a pool that is nobody else's.

protobuf takes each message once in a process, whoever brings it; grpclib, grpcio-health-checking and
grpcio-reflection all bring these. A server must not end a program that uses two of them, so ours are made here and
kept from the default pool. On the wire they are the same.

Source: grpc/grpc-proto, grpc/health/v1/health.proto and grpc/reflection/v1/reflection.proto.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

__all__ = ["POOL", "message"]

POOL: Final = DescriptorPool()
"""Where they are."""

_KINDS: Final = {
    "string": FieldDescriptorProto.TYPE_STRING,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
    "int32": FieldDescriptorProto.TYPE_INT32,
}
_HEALTH: Final[dict[str, tuple[tuple[str, int, str], ...]]] = {
    "HealthCheckRequest": (("service", 1, "string"),),
    "HealthCheckResponse": (("status", 1, ".ServingStatus"),),
    "HealthListRequest": (),
    "HealthListEntry": (("key", 1, "string"), ("value", 2, "HealthCheckResponse")),
    "HealthListResponse": (("statuses", 1, "*HealthListEntry"),),
}
_REFLECTION: Final[dict[str, tuple[tuple[str, int, str], ...]]] = {
    "ExtensionRequest": (("containing_type", 1, "string"), ("extension_number", 2, "int32")),
    "ServerReflectionRequest": (
        ("host", 1, "string"),
        ("file_by_filename", 3, "|string"),
        ("file_containing_symbol", 4, "|string"),
        ("file_containing_extension", 5, "|ExtensionRequest"),
        ("all_extension_numbers_of_type", 6, "|string"),
        ("list_services", 7, "|string"),
    ),
    "FileDescriptorResponse": (("file_descriptor_proto", 1, "*bytes"),),
    "ExtensionNumberResponse": (("base_type_name", 1, "string"), ("extension_number", 2, "*int32")),
    "ServiceResponse": (("name", 1, "string"),),
    "ListServiceResponse": (("service", 1, "*ServiceResponse"),),
    "ErrorResponse": (("error_code", 1, "int32"), ("error_message", 2, "string")),
    "ServerReflectionResponse": (
        ("valid_host", 1, "string"),
        ("original_request", 2, "ServerReflectionRequest"),
        ("file_descriptor_response", 4, "|FileDescriptorResponse"),
        ("all_extension_numbers_response", 5, "|ExtensionNumberResponse"),
        ("list_services_response", 6, "|ListServiceResponse"),
        ("error_response", 7, "|ErrorResponse"),
    ),
}
"""Messages by name, their fields as name, number and kind: ``*`` for repeated, ``|`` for one of, ``.`` for an enum.
A map is a list of entries, to those who write it out."""
SERVING_STATUS: Final = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def _file(package: str, path: str, messages: dict[str, tuple[tuple[str, int, str], ...]]) -> FileDescriptorProto:
    file = FileDescriptorProto(name=path, package=package, syntax="proto3")
    for name, fields in messages.items():
        made = file.message_type.add(name=name)
        if any(kind[0] == "|" for _, _, kind in fields):
            made.oneof_decl.add(name="message")
        for field, number, kind in fields:
            bare = kind.lstrip("*|.")
            one = made.field.add(name=field, number=number)
            one.label = FieldDescriptorProto.LABEL_REPEATED if kind[0] == "*" else FieldDescriptorProto.LABEL_OPTIONAL
            if kind[0] == "|":
                one.oneof_index = 0
            if kind[0] == ".":
                one.type, one.type_name = FieldDescriptorProto.TYPE_ENUM, f".{package}.{name}.{bare}"
                values = made.enum_type.add(name=bare).value
                for number_of, text in enumerate(SERVING_STATUS):
                    values.add(name=text, number=number_of)
            elif bare in _KINDS:
                one.type = _KINDS[bare]
            else:
                one.type, one.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{package}.{bare}"
    return file


def _service(file: FileDescriptorProto, name: str, methods: tuple[tuple[str, str, str, bool, bool], ...]) -> None:
    service = file.service.add(name=name)
    for method, asked, answered, many, streams in methods:
        service.method.add(
            name=method,
            input_type=f".{file.package}.{asked}",
            output_type=f".{file.package}.{answered}",
            client_streaming=many,
            server_streaming=streams,
        )


def _fill() -> None:
    health = _file("grpc.health.v1", "grpc/health/v1/health.proto", _HEALTH)
    check = "HealthCheckRequest", "HealthCheckResponse"
    listed = "HealthListRequest", "HealthListResponse"
    methods = (
        ("Check", *check, False, False),
        ("List", *listed, False, False),
        ("Watch", *check, False, True),
    )
    _service(health, "Health", methods)
    POOL.AddSerializedFile(health.SerializeToString())
    for version in ("v1", "v1alpha"):
        path = f"grpc/reflection/{version}/reflection.proto"
        file = _file(f"grpc.reflection.{version}", path, _REFLECTION)
        asked = "ServerReflectionRequest", "ServerReflectionResponse"
        _service(file, "ServerReflection", (("ServerReflectionInfo", *asked, True, True),))
        POOL.AddSerializedFile(file.SerializeToString())


_fill()


def message(name: str) -> Any:
    """The class of a message, by its full name."""
    return GetMessageClass(POOL.FindMessageTypeByName(name))
