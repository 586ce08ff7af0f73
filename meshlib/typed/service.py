"""Serving ``@rpc`` objects: from a path and bytes to a method call and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..core.errors import ConfigurationError, UnknownMethod, UnknownService, shown
from ..mux import Request, Response
from .codec import ExceptionCodec, MethodCodec
from .contract import contracts_of, methods_of
from .formats import MSGPACK, Format

__all__ = ["RAISED", "TypedService"]

RAISED = b"meshlib.raised"
"""The response context that names the declared exception that the body is."""


class TypedService:
    """A service that calls the ``@rpc`` methods of one or several objects: `Request` in, `Response` out.

    Args:
        implementations: The objects. Each is offered under the name of every contract it implements.
        form: What the bodies are.

    Attributes:
        services: The names of the methods of each service, by its name.

    Raises:
        ConfigurationError: One has no ``@rpc`` methods, or two offer the same contract.
    """

    def __init__(self, *implementations: Any, form: Format = MSGPACK) -> None:
        self._methods: dict[str, tuple[Any, MethodCodec]] = {}
        self.services: dict[str, list[str]] = {}
        for implementation in implementations:
            if isinstance(implementation, type):
                raise ConfigurationError(f"serve an instance, not the class: {implementation.__name__}(…)")
            contracts = contracts_of(type(implementation))
            if not contracts:
                raise ConfigurationError(f"{type(implementation).__name__} has no @rpc methods to serve")
            for contract in contracts:
                if contract.__name__ in self.services:
                    raise ConfigurationError(f"two services of the name {contract.__name__}")
                methods = methods_of(contract)
                self.services[contract.__name__] = sorted(methods)
                for name, method in methods.items():
                    self._methods[method.dest] = (getattr(implementation, name), MethodCodec(method, form))

    async def __call__(self, request: Request) -> Response:
        """Call the method that the request names.

        Raises:
            UnknownService: There is no such service.
            UnknownMethod: It has no such method.
            InvalidArgument: An argument does not fit.
        """
        found = self._methods.get(request.dest)
        if found is None:
            raise self._unknown(request.dest)
        function, codec = found
        arguments = codec.decode_arguments(request.body)
        try:
            result = await function(**arguments)
        except Exception as error:
            exception = codec.exception_codec(error)
            if exception is None:
                raise
            return self.raised(exception, error)
        return Response(codec.encode_result(result))

    def raised(self, codec: ExceptionCodec, error: Exception) -> Response:
        """How a declared exception is told."""
        return Response(codec.encode(error), ((RAISED, codec.kind.__name__.encode()),))

    def codec(self, dest: str) -> MethodCodec:
        """The codec of the method with that path.

        Raises:
            UnknownService: There is no such service.
            UnknownMethod: It has no such method.
        """
        found = self._methods.get(dest)
        if found is None:
            raise self._unknown(dest)
        return found[1]

    def idempotent(self, dest: str) -> bool:
        """Does the contract say that the method with that path may be called twice? No, where there is none."""
        found = self._methods.get(dest)
        return found is not None and found[1].method.idempotent

    @property
    def codecs(self) -> Iterable[MethodCodec]:
        """Those of all methods."""
        return [codec for _, codec in self._methods.values()]

    def _unknown(self, dest: str) -> UnknownService | UnknownMethod:
        service, _, method = dest.removeprefix("/").partition("/")
        if service in self.services:
            return UnknownMethod(
                f"service {service} has no method {shown(method)!r}; it has {_listed(self.services[service])}"
            )
        return UnknownService(f"no service {shown(service)!r} here; there is {_listed(self.services)}")

    def __repr__(self) -> str:
        return f"TypedService({_listed(self.services)})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
