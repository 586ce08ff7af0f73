"""The lower part of a typed server's stack: what stands around the methods themselves, whatever the protocol.

A protocol's server puts its stack around what it has: a Mux request, an exchange of HTTP, a stream of gRPC's. The last
two cannot be handled twice, and none of them says what the contract does: may the call be repeated? So the layers that
repeat calls, or fail them on purpose, stand below that, around a `Request` that says so. Over HTTP the users' filters
and the mapping of errors do as well, since above them a body has not been read yet.

All the same it is one stack: with one `Env`, so one clock, one seed, one place for numbers and events.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, ClassVar

from ..core.env import Env
from ..core.stack import Layer, Stack
from ..mux import Request, Response
from .service import TypedService

__all__ = ["Handlers"]


class Handlers:
    """A typed service and the layers directly around it; in the server's stack, a layer at its bottom.

    Args:
        typed: The service.
        above: The last place that is the protocol's.
        direct: The protocol's requests are `Request`s, so that this layer can stand for the service itself. Otherwise
            the protocol's own bottom calls it.

    Attributes:
        whole: The stack as its user sees it, once it is arranged.
    """

    place: ClassVar[str] = "methods"

    def __init__(self, typed: TypedService, above: str = "filters", *, direct: bool = False) -> None:
        self._typed, self._above, self._direct = typed, above, direct
        self._service: Any = typed
        self._lower: tuple[Layer, ...] = ()
        self.whole: Stack | None = None

    def arrange(self, whole: Stack) -> Stack:
        """The protocol's part of a stack, with this in the place of the rest."""
        upper, lower = whole.split(self._above)
        self.whole, self._lower, self._service = whole, lower.layers, self._typed
        return Stack((*upper.places, self.place), (*upper.layers, self)) if self._lower else whole

    def alone(self, stack: Stack, env: Env) -> None:
        """Have all layers of a stack, with no server's above it."""
        self._lower = stack.layers
        self.build(env, None)

    def build(self, env: Env, below: Any) -> Any:
        """Build the lower part, with the server's own surroundings."""
        service: Any = self._typed
        for layer in reversed(self._lower):
            service = layer.build(env, service)
        self._service = self._declared(service)
        return self._service if self._direct else below

    def _declared(self, service: Any) -> Any:
        typed = self._typed

        def declared(request: Any) -> Awaitable[Response]:
            idempotent = typed.idempotent(request.dest)
            handled: Awaitable[Response] = service(Request(request.body, request.dest, request.contexts, idempotent))
            return handled

        return declared

    def __call__(self, request: Any) -> Awaitable[Response]:
        """Handle a request: anything with ``body``, ``dest`` and ``contexts``."""
        handled: Awaitable[Response] = self._service(request)
        return handled

    def __repr__(self) -> str:
        return " > ".join(repr(layer) for layer in self._lower) or repr(self._typed)
