"""Server reflection, grpc.reflection.v1 and v1alpha: what grpcurl and the like ask.

It tells every caller what there is, so servers that face strangers (``trust_context=False``) have it off. Descriptors
come from protobuf's default pool, in which generated modules register themselves, and for health and reflection
themselves from `own_protos`. A file is answered with all that it imports, as grpc-go does.

Source: grpc/doc/server-reflection.md. The two versions differ by their package alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from google.protobuf import descriptor_pool
from grpclib.const import Cardinality, Handler, Status

from .methods import REFLECTION
from .own_protos import POOL, message

__all__ = ["Reflection"]

_Asked: Final = message("grpc.reflection.v1.ServerReflectionRequest")
_Answer: Final = message("grpc.reflection.v1.ServerReflectionResponse")


class Reflection:
    """Tells what services a server has, and what their messages are.

    Args:
        services: Their names.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = sorted(services)
        self._pools: tuple[Any, ...] = (descriptor_pool.Default(), POOL)

    async def _info(self, stream: Any) -> None:
        async for asked in stream:
            answer = _Answer(valid_host=asked.host, original_request=asked)
            try:
                self._fill(asked, answer)
            except KeyError:
                answer.error_response.error_code = Status.NOT_FOUND.value
                answer.error_response.error_message = "not found"
            await stream.send_message(answer)

    def _fill(self, asked: Any, answer: Any) -> None:
        kind = asked.WhichOneof("message")
        if kind == "list_services":
            for name in self._services:
                answer.list_services_response.service.add(name=name)
        elif kind == "file_by_filename":
            self._file(answer, lambda pool: pool.FindFileByName(asked.file_by_filename))
        elif kind == "file_containing_symbol":
            self._file(answer, lambda pool: pool.FindFileContainingSymbol(asked.file_containing_symbol))
        elif kind == "file_containing_extension":
            wanted = asked.file_containing_extension
            self._file(answer, lambda pool: _extension(pool, wanted.containing_type, wanted.extension_number).file)
        elif kind == "all_extension_numbers_of_type":
            self._extensions(answer, asked.all_extension_numbers_of_type)
        else:
            answer.error_response.error_code = Status.INVALID_ARGUMENT.value
            answer.error_response.error_message = "nothing was asked"

    def _find(self, find: Callable[[Any], Any]) -> Any:
        for pool in self._pools:
            try:
                return find(pool)
            except KeyError:
                continue
        raise KeyError

    def _file(self, answer: Any, find: Callable[[Any], Any]) -> None:
        files = [self._find(find)]
        known = {files[0].name}
        for file in files:
            answer.file_descriptor_response.file_descriptor_proto.append(file.serialized_pb)
            for other in file.dependencies:
                if other.name not in known:
                    known.add(other.name)
                    files.append(other)

    def _extensions(self, answer: Any, name: str) -> None:
        def find(pool: Any) -> Any:
            return pool, pool.FindMessageTypeByName(name)

        pool, kind = self._find(find)
        answer.all_extension_numbers_response.base_type_name = kind.full_name
        numbers = sorted(extension.number for extension in pool.FindAllExtensions(kind))
        answer.all_extension_numbers_response.extension_number.extend(numbers)

    def __mapping__(self) -> dict[str, Handler]:
        handler = Handler(self._info, Cardinality.STREAM_STREAM, _Asked, _Answer)
        return {f"/{service}/ServerReflectionInfo": handler for service in REFLECTION}


def _extension(pool: Any, name: str, number: int) -> Any:
    return pool.FindExtensionByNumber(pool.FindMessageTypeByName(name), number)
