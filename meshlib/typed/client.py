"""Typed clients: an object whose methods are calls, over any of the protocols.

=========  =============================  ===============================================================
protocol   target                         on the wire
=========  =============================  ===============================================================
mux        any; ``mux://…``               MessagePack
http       any; ``http://…``              JSON; anybody can call it
grpc       any; ``grpc://…``              MessagePack, between meshlib's own peers
=========  =============================  ===============================================================
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

from ..balancing.node import Node
from ..core.env import Env
from ..core.errors import ConfigurationError, InvalidArgument, InvalidReply, MeshError, RemoteError, shown
from ..core.events import Decisions
from ..core.service import Status
from ..mux import Request
from ..mux import client as mux_client
from .codec import MethodCodec
from .contract import contracts_of, methods_of
from .formats import JSON, MSGPACK, Format
from .service import RAISED

if TYPE_CHECKING:
    from ..names.delegation import Delegation

__all__ = ["Protocol", "TypedClient", "client"]

T = TypeVar("T")
Protocol = Literal["mux", "http", "grpc"]
_SCHEMES: Final[dict[str, Protocol]] = {"http": "http", "https": "http", "grpc": "grpc"}


class Raw(typing.Protocol):
    """What a protocol's client is to a typed one: bytes in, bytes out, and the face of `Client`."""

    @property
    def env(self) -> Env:
        """Its label and name."""
        ...

    @property
    def status(self) -> Status:
        """As `Client`."""
        ...

    @property
    def endpoints(self) -> tuple[Node, ...]:
        """As `Client`."""
        ...

    @property
    def events(self) -> Decisions:
        """As `Client`."""
        ...

    async def __call__(self, request: Request) -> Any:
        """Make one call; the reply has ``body`` and ``contexts``, as a `Response` has."""
        ...

    async def delegate(self) -> Delegation:
        """As `Client`."""
        ...

    def metrics(self) -> dict[str, float]:
        """As `Client`."""
        ...

    async def aclose(self) -> None:
        """As `Client`."""
        ...

    async def __aenter__(self) -> Any:
        """As `Client`."""
        ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """As `Client`."""
        ...


class TypedClient(Generic[T]):
    """A client of a contract.

    ``async with`` gives an object with the contract's methods, typed as the contract. Used bare, `stub` is that object,
    and the methods can be called on the client itself as well; it starts with the first call, and `aclose` ends it.
    """

    stub: T
    """The object whose methods are calls."""

    def __init__(self, contract: type[T], raw: Raw, form: Format = MSGPACK) -> None:
        self.contract = contract
        self.raw = raw
        stub = _Stub(contract.__name__, raw)
        for name, method in methods_of(contract).items():
            setattr(stub, name, _calling(raw, MethodCodec(method, form)))
        self.stub = stub  # type: ignore[assignment]

    async def __aenter__(self) -> T:
        await self.raw.__aenter__()
        return self.stub

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.raw.__aexit__(kind, error, traceback)

    async def aclose(self) -> None:
        """Close every connection. Calls under way fail; closing twice is the same as closing once."""
        await self.raw.aclose()

    @property
    def status(self) -> Status:
        """How fit the client is to be used."""
        return self.raw.status

    @property
    def endpoints(self) -> tuple[Node, ...]:
        """Its endpoints; each prints its status, the reason for it, and its load."""
        return self.raw.endpoints

    @property
    def events(self) -> Decisions:
        """What its layers decide, and why: ``client.events.listen(print)``."""
        return self.raw.events

    async def delegate(self) -> Delegation:
        """Where a call made here and now would go, and why; see `meshlib.delegate`."""
        return await self.raw.delegate()

    def metrics(self) -> dict[str, float]:
        """Every number this client keeps, by name."""
        return self.raw.metrics()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "stub" not in vars(self):
            raise AttributeError(name)
        return getattr(self.stub, name)

    def __repr__(self) -> str:
        return f"{self.contract.__name__} {self.raw!r}"


class _Stub:
    """Has the methods of a contract."""

    def __init__(self, name: str, raw: Raw) -> None:
        self.__dict__["_name"] = name
        self.__dict__["_raw"] = raw

    def __getattr__(self, name: str) -> Any:
        methods = ", ".join(sorted(n for n in vars(self) if not n.startswith("_")))
        raise AttributeError(f"{vars(self)['_name']} has no @rpc method {name!r}; it has {methods}")

    def __repr__(self) -> str:
        return f"<client of {vars(self)['_name']} at {vars(self)['_raw'].env.name}>"


def _calling(raw: Raw, codec: MethodCodec) -> Callable[..., Coroutine[Any, Any, Any]]:
    dest, idempotent = codec.method.dest, codec.method.idempotent

    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            body = codec.encode_arguments(args, kwargs)
        except InvalidArgument as error:
            error.label = raw.env.label  # so that a server whose handler made this call does not pass it on as its own
            raise
        reply = await raw(Request(body, dest, (), idempotent))
        if reply.contexts:
            for key, value in reply.contexts:
                if key == RAISED:
                    raised = _raised(codec, value.decode(errors="replace"), reply.body)
                    if isinstance(raised, MeshError):
                        raised.label = raw.env.label
                    raise raised
        try:
            return codec.decode_result(reply.body)
        except InvalidReply as error:
            error.label = raw.env.label
            raise

    call.__name__ = codec.method.name
    call.__qualname__ = f"{codec.method.service}.{codec.method.name}"
    call.__doc__ = codec.method.function.__doc__
    call.__signature__ = codec.method.signature  # type: ignore[attr-defined]
    return call


def _raised(codec: MethodCodec, name: str, body: bytes) -> Exception:
    exception = codec.exceptions.get(name)
    if exception is None:
        return RemoteError(f"the server raised {shown(name)}, which {codec.method} does not declare on this side")
    return exception.decode(body)


def client(
    contract: type[T], target: str, *layers: Any, protocol: Protocol | None = None, label: str = "", **options: Any
) -> TypedClient[T]:
    """A client of the services that implement ``contract``.

    Args:
        contract: A class with ``@rpc`` methods: the implementation itself, or the contract that both sides share.
        target: Where: ``host:port[,host:port…]``, ``unix:///path``, ``file:///path``,
            ``dns://…``, ``srv://…``, ``zk://…``, ``k8s://…``, or a logical path, which Dtabs make one of these of.
            ``http://host:port`` and ``grpc://host:port`` say the protocol as well.
        layers: Each replaces the default at its place (`default_layers` in ``meshlib/client.py``); plain filters are
            added.
        protocol: ``mux``, ``http`` or ``grpc``; by default what the target says, else ``mux``.
        label: What the client is called in metrics, spans and errors; by default the contract's name.
        options: ``stack``, ``classifier``, ``clock``, ``seed``, and the protocol's own: see `meshlib.mux.client`
            (``limits``), `meshlib.typed.over_http.http_client` (``ssl``, ``server_name``, ``http2``),
            `meshlib.grpc.calling.rpc.rpc_client` (``ssl``, ``config``, ``max_message``).

    Raises:
        ConfigurationError: The contract, the target or a layer makes no sense; says why.
    """
    if not isinstance(contract, type):
        raise ConfigurationError(f"client({contract!r}, …): give the class with the @rpc methods first")
    if not contracts_of(contract):
        raise ConfigurationError(f"{contract.__name__} has no @rpc methods")
    label = label or contract.__name__
    scheme = target.partition("://")[0] if isinstance(target, str) else ""
    chosen = protocol or _SCHEMES.get(scheme, "mux")
    if chosen in ("http", "grpc") and "limits" in options:
        own = "over gRPC give max_message=" if chosen == "grpc" else "over HTTP a client has none"
        raise ConfigurationError(f"client(…, limits={options['limits']!r}): limits are Mux's; {own}")
    if chosen == "mux":
        return TypedClient(contract, mux_client(target, *layers, label=label, **options))
    if chosen == "http":
        from .over_http import http_client  # which needs httpx

        return TypedClient(contract, http_client(target, *layers, label=label, **options), JSON)
    if chosen == "grpc":
        from ..grpc import rpc_client  # which needs grpclib

        return TypedClient(contract, rpc_client(target, *layers, label=label, **options))
    raise ConfigurationError(f"client(…, protocol={protocol!r}): expected 'mux', 'http' or 'grpc'")
