"""`meshlib.serve`: ``@rpc`` services over any of the protocols, or an ASGI app, behind one address.

The scheme of the address says the protocol: ``mux://``, ``http://`` or ``https://``, ``grpc://``. Whatever it is, the
server has the one stack, the one way to be announced, and the one way to close (``meshlib/serving.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from ..core.errors import ConfigurationError
from ..core.stack import Layer, Stack
from ..filters.mapping import ErrorMapping
from ..mux import serve as mux_serve
from ..serving import GRACE, BaseServer
from .contract import contracts_of
from .handlers import Handlers
from .service import TypedService

__all__ = ["asgi", "serve"]

Server = TypeVar("Server", bound=BaseServer)
_PROTOCOLS: Final = ("mux", "http", "https", "grpc", "unix")
_DOCUMENTED: Final = ("title", "version", "largest", "patience")
"""What the app that services become over HTTP is told."""
_SHARED: Final = ("announce", "advertise", "trust_context", "stack", "clock", "seed")
_OWN: Final = {
    "mux": ("limits",),
    "http": ("ssl", "http2", "linger", "health", "ready", "route", *_DOCUMENTED),
    "grpc": ("ssl", "limits", "compression", "reflection", "config", "status_details_codec"),
}


def serve(
    services: Any,
    address: str = "mux://127.0.0.1:0",
    *layers: Any,
    label: str = "",
    grace: float = GRACE,
    **options: Any,
) -> BaseServer:
    """Serve one object with ``@rpc`` methods, a list of them, or an ASGI app: ``async with`` it, or ``await`` it.

    Args:
        services: The objects; or, for ``http://``, an ASGI app.
        address: ``mux://host:port`` (port 0 takes a free one), ``http://host:port``, ``https://host:port`` (with
            ``ssl=``), ``grpc://host:port``; ``host:port`` and ``unix:///path`` are Mux.
        layers: Each replaces the default at its place; plain filters are added above the handlers. See
            `default_layers` in ``meshlib/server.py``.
        label: What the server is called in metrics, spans and logs; by default its services' names.
        grace: Seconds that closing waits for requests under way.
        options: ``announce``, ``advertise``, ``trust_context``, ``stack``, ``clock``, ``seed``, and the protocol's own:
            see `meshlib.mux.serve` (``limits``), `meshlib.http.serve` (``ssl``, ``http2``), `meshlib.grpc.Server`.
            Services over HTTP also have those of `asgi`.

    Raises:
        ConfigurationError: A service, the address or a layer makes no sense; says why.
    """
    scheme, slashes, rest = address.partition("://")
    if slashes and scheme not in _PROTOCOLS:
        expected = "mux://host:port, http://host:port, grpc://host:port or unix:///path"
        raise ConfigurationError(f"serve(…, {address!r}): expected {expected}")
    given = tuple(services) if isinstance(services, list | tuple) else (services,)
    protocol = {"https": "http", "unix": "mux"}.get(scheme, scheme) if slashes else "mux"
    _check(address, protocol, options)
    options["grace"] = grace
    if protocol == "http":
        return _over_http(given, address, layers, label, options)
    if len(given) == 1 and _is_app(given[0]):
        raise ConfigurationError(
            f"serve({given[0]!r}, {address!r}): it has no @rpc methods; an ASGI app is served at http://host:port"
        )
    typed = TypedService(*given)
    label = label or ", ".join(typed.services)
    handlers = Handlers(typed, direct=protocol == "mux")
    options["stack"] = _arranged(handlers, options.get("stack"))
    if protocol == "grpc":
        from ..grpc import serve_rpc  # which needs grpclib

        return _shown(serve_rpc(handlers, typed.services, rest, *layers, label=label, **options), handlers)
    where = rest if scheme == "mux" else address
    return _shown(mux_serve(typed, where, *layers, label=label, **options), handlers)


def _check(address: str, protocol: str, options: Any) -> None:
    """Refuse what no server has, or none of this protocol."""
    unknown = [name for name in options if name not in _SHARED and name not in _OWN[protocol]]
    if unknown and unknown != ["limits"]:  # which is told more about below
        owners = [each for each, own in _OWN.items() if unknown[0] in own]
        whose = f"that is for {' and '.join(f'{each}://' for each in owners)}" if owners else "there is no such option"
        known = ", ".join(("grace", "label", *_SHARED, *_OWN[protocol]))
        raise ConfigurationError(f"serve(…, {address!r}, {unknown[0]}=…): {whose}; {protocol}:// has {known}")


def _arranged(handlers: Handlers, change: Callable[[Stack], Stack] | None, *more: Layer) -> Callable[[Stack], Stack]:
    def arranged(given: Stack) -> Stack:
        for layer in more:
            given = given if given.find(layer.place) else given.with_layers(layer)
        return handlers.arrange(given if change is None else change(given))

    return arranged


def _shown(server: Server, handlers: Handlers) -> Server:
    if handlers.whole is not None:
        server.stack = handlers.whole
    return server


def _over_http(given: tuple[Any, ...], address: str, layers: tuple[Any, ...], label: str, options: Any) -> BaseServer:
    from ..http import serve as http_serve  # which needs a server

    if "limits" in options:
        raise ConfigurationError(
            f"serve(…, {address!r}, limits={options['limits']!r}): limits are Mux's and gRPC's; "
            "over HTTP give the layer meshlib.concurrency_limit(…)"
        )
    if len(given) == 1 and _is_app(given[0]):
        of_services = [name for name in _DOCUMENTED if name in options]
        if of_services:
            raise ConfigurationError(f"serve(…, {address!r}, {of_services[0]}=…): that is for @rpc services, not apps")
        return http_serve(given[0], address, *layers, label=label, **options)
    from ..http.asgi import HEALTH, READY
    from .asgi import RpcApp

    # No framework answers those who ask whether it is alive, so the app does; `Middleware` says when it is not ready.
    health = (*options.get("health", HEALTH), *options.get("ready", READY))
    described = {name: options.pop(name) for name in _DOCUMENTED if name in options}
    app = RpcApp(*given, label=label, health=health, **described)
    options["stack"] = _arranged(app.handlers, options.get("stack"), ErrorMapping())
    server = http_serve(app, address, *layers, label=label or ", ".join(app.services), **options)
    return _shown(server, app.handlers)


def _is_app(thing: Any) -> bool:
    """May it be an ASGI app? A class is none: somebody has forgotten to make an object of it."""
    return callable(thing) and not isinstance(thing, type) and not contracts_of(type(thing))


def asgi(*services: Any, **options: Any) -> Any:
    """Objects with ``@rpc`` methods as an ASGI app, to be mounted in a larger one.

    The server stack is not around it: ``app.add_middleware(meshlib.http.Middleware)`` puts it around the whole.

    Args:
        services: The objects.
        options: ``title`` and ``version`` of the OpenAPI document, ``largest`` body and its ``patience``, ``layers``,
            ``health``, ``label``.

    Raises:
        ConfigurationError: An object has no ``@rpc`` methods, or two offer the same contract.
    """
    from .asgi import RpcApp

    return RpcApp(*services, **options)
