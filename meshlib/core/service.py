"""Services, filters, and how they compose.

A *service* is any async callable of one argument: ``await service(request) -> reply``. Nothing more is needed to be
one. A *filter* is a step around a service: ``async def apply(self, request, service)``. ``>>`` composes them, and
composition is folded once, when it is written, into plain nested calls: ``a >> b >> service`` costs one function call
a filter per request and no more.

A *session* is a service on loan, and a *service factory* is where sessions come from: acquire, use, release. Giving
back never waits, so that no cancellation can come between a caller and the release.

The model is Finagle's: Service, ServiceFactory and Filter (finagle-core), and "Your Server as a Function", 2013.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, overload, runtime_checkable

if TYPE_CHECKING:
    from .env import Env

__all__ = ["Call", "Filter", "Lasting", "Service", "ServiceFactory", "Session", "Status", "as_service", "filter"]

Req = TypeVar("Req")
Rep = TypeVar("Rep")
ReqIn = TypeVar("ReqIn")
RepOut = TypeVar("RepOut")
ReqOut = TypeVar("ReqOut")
RepIn = TypeVar("RepIn")
Req_contra = TypeVar("Req_contra", contravariant=True)
Rep_co = TypeVar("Rep_co", covariant=True)
F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


@runtime_checkable
class Service(Protocol[Req_contra, Rep_co]):
    """Any async callable of one argument."""

    def __call__(self, request: Req_contra, /) -> Awaitable[Rep_co]:
        """Handle one request."""
        ...


class Status(IntEnum):
    """How fit something is to be given work. Advisory: nothing is refused by a status alone (Finagle, Status.scala)."""

    CLOSED = 1
    """Gone for good; it will not come back under this object."""
    BUSY = 2
    """Not to be used now if there is another; it may recover."""
    OPEN = 3
    """Ready."""


class Session(Protocol[Req_contra, Rep_co]):
    """A service on loan from a `ServiceFactory`."""

    def __call__(self, request: Req_contra, /) -> Awaitable[Rep_co]:
        """Handle one request."""
        ...

    def release(self) -> None:
        """Give the session back. Never waits; calling it twice is the same as calling it once."""
        ...


class Lasting(Protocol):
    """What goes on after a reply was given: a body that is still being read. Until its end it is load."""

    def on_end(self, callback: Callable[[Exception | None], None]) -> None:
        """Call ``callback`` at its end, with the error that it ended in, if it did."""
        ...


class ServiceFactory(ABC, Generic[Req, Rep]):
    """Where sessions come from: a connection pool, a connector, a fixed service."""

    @property
    def status(self) -> Status:
        """How fit this factory is to give a session now."""
        return Status.OPEN

    @abstractmethod
    async def acquire(self) -> Session[Req, Rep]:
        """Lend a session. The caller must release it.

        Raises:
            ConnectError: No session could be made.
            ServiceClosed: The factory was closed.
        """

    async def aclose(self) -> None:
        """Stop lending and free what is held. Closing twice is the same as closing once."""

    def to_service(self) -> Service[Req, Rep]:
        """A service that acquires, calls and releases for each request."""

        async def acquire_call_release(request: Req) -> Rep:
            session = await self.acquire()
            try:
                return await session(request)
            finally:
                session.release()

        return acquire_call_release


class Call:
    """The request that a filter sees when it decorates a function: its arguments. Prints as the call would be typed."""

    __slots__ = ("args", "function", "kwargs")

    idempotent = True
    """Whoever decorates a function with a retry says that it may be called again."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        given = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs.items()]
        return f"{getattr(self.function, '__qualname__', self.function)}({', '.join(given)})"


async def _invoke(call: Call) -> Any:
    return await call.function(*call.args, **call.kwargs)


class _Folded(functools.partial[Awaitable[Any]]):
    """A filter applied to a service: a service again. A partial: calling it costs no Python frame of its own."""

    def __repr__(self) -> str:
        step = getattr(self.func, "__self__", None)
        name = repr(step) if isinstance(step, Filter) else getattr(self.func, "__name__", repr(self.func))
        return f"{name} >> {self.keywords['service']!r}"


class Filter(Generic[ReqIn, RepOut, ReqOut, RepIn]):
    """A step around a service. Subclass it and define `apply`, or decorate a function with `filter`.

    A filter is also a layer of a client or server: ``place`` names where it stands in their stacks, and `build` makes
    the service that includes it. A filter without a place of its own stands at ``filters``: once per logical call.
    """

    place: ClassVar[str] = "filters"

    async def apply(self, request: ReqIn, service: Service[ReqOut, RepIn]) -> RepOut:
        """Handle ``request`` with the help of ``service``."""
        raise NotImplementedError(f"{type(self).__name__} must define `async def apply(self, request, service)`")

    def build(self, env: Env, service: Any) -> Any:
        """This filter around ``service``, inside the client or server that ``env`` describes."""
        return self.bind(service)

    def bind(self, service: Service[ReqOut, RepIn]) -> Service[ReqIn, RepOut]:
        """This filter around ``service``, on its own."""
        return _Folded(self.apply, service=service)

    @overload
    def and_then(self, other: Filter[ReqOut, RepIn, Req, Rep]) -> Filter[ReqIn, RepOut, Req, Rep]: ...
    @overload
    def and_then(self, other: Service[ReqOut, RepIn]) -> Service[ReqIn, RepOut]: ...
    def and_then(self, other: Any) -> Any:
        """This filter, then ``other``: a filter gives a filter, a service gives a service."""
        if isinstance(other, Filter):
            return _Chain(*_flat(self), *_flat(other))
        return self.bind(as_service(other))

    @overload
    def __rshift__(self, other: Filter[ReqOut, RepIn, Req, Rep]) -> Filter[ReqIn, RepOut, Req, Rep]: ...
    @overload
    def __rshift__(self, other: Service[ReqOut, RepIn]) -> Service[ReqIn, RepOut]: ...
    def __rshift__(self, other: Any) -> Any:
        return self.and_then(other)

    def __call__(self, function: F) -> F:
        """Decorate any async function or method: the filter sees each call as a `Call`."""
        if not callable(function):
            raise TypeError(f"{self!r} decorates async functions, and {function!r} is none")
        around: Any = self.bind(_invoke)  # type: ignore[arg-type]  # a decorating filter takes any request

        @functools.wraps(function)
        async def decorated(*args: Any, **kwargs: Any) -> Any:
            return await around(Call(function, args, kwargs))

        return decorated  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _flat(step: Filter[Any, Any, Any, Any]) -> tuple[Filter[Any, Any, Any, Any], ...]:
    return step.steps if isinstance(step, _Chain) else (step,)


class _Chain(Filter[Any, Any, Any, Any]):
    """Filters in order, outermost first."""

    def __init__(self, *steps: Filter[Any, Any, Any, Any]) -> None:
        self.steps = steps

    def bind(self, service: Any) -> Any:
        for step in reversed(self.steps):
            service = step.bind(service)
        return service

    def build(self, env: Env, service: Any) -> Any:
        for step in reversed(self.steps):
            service = step.build(env, service)
        return service

    async def apply(self, request: Any, service: Any) -> Any:
        return await self.bind(service)(request)

    def __repr__(self) -> str:
        return " >> ".join(repr(step) for step in self.steps)


class _FunctionFilter(Filter[Any, Any, Any, Any]):
    """A filter made from an async function of (request, service)."""

    def __init__(self, function: Callable[[Any, Any], Awaitable[Any]]) -> None:
        self.function = function

    def bind(self, service: Any) -> Any:
        return _Folded(self.function, service=service) if self._takes_keyword else self._closed_over(service)

    @functools.cached_property
    def _takes_keyword(self) -> bool:
        code = getattr(self.function, "__code__", None)
        return code is not None and "service" in code.co_varnames[code.co_posonlyargcount : code.co_argcount]

    def _closed_over(self, service: Any) -> Any:
        function = self.function

        async def around(request: Any) -> Any:
            return await function(request, service)

        return around

    async def apply(self, request: Any, service: Any) -> Any:
        return await self.function(request, service)

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def filter(
    function: Callable[[ReqIn, Service[ReqOut, RepIn]], Awaitable[RepOut]],
) -> Filter[ReqIn, RepOut, ReqOut, RepIn]:
    """Make a filter of an async function ``(request, service) -> reply``."""
    if not callable(function):
        raise TypeError(f"@meshlib.filter makes a filter of an async function, and {function!r} is none")
    return _FunctionFilter(function)


def as_service(service: Any) -> Any:
    """Check at composition, not at the first call, that ``service`` can be one."""
    if not callable(service):
        raise TypeError(f"{service!r} is not a service: a service is an async callable of one argument")
    return service
