"""`meshlib.serve`: ``@rpc`` services over any of the protocols, or an ASGI app, behind one address.

The scheme of the address says the protocol: ``mux://``, ``http://`` or ``https://``, ``grpc://``. Whatever it is, the
server has the one stack, the one way to be announced, and the one way to close (``meshlib/serving.py``).
"""

from __future__ import annotations

from typing import Any, Final

from ..core.errors import ConfigurationError
from ..mux import serve as mux_serve
from ..serving import GRACE, BaseServer
from .contract import contracts_of
from .service import TypedService

__all__ = ["asgi", "serve"]

_PROTOCOLS: Final = ("mux", "http", "https", "grpc", "unix")


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

    Raises:
        ConfigurationError: A service, the address or a layer makes no sense; says why.
    """
    scheme, slashes, rest = address.partition("://")
    if slashes and scheme not in _PROTOCOLS:
        expected = "mux://host:port, http://host:port, grpc://host:port or unix:///path"
        raise ConfigurationError(f"serve(…, {address!r}): expected {expected}")
    given = tuple(services) if isinstance(services, list | tuple) else (services,)
    options["grace"] = grace
    if slashes and scheme in ("http", "https"):
        return _over_http(given, address, layers, label, options)
    typed = TypedService(*given)
    label = label or ", ".join(typed.services)
    if scheme == "grpc":
        from ..grpc.serving.rpc import serve_rpc  # which needs grpclib

        return serve_rpc(typed, typed.services, rest, *layers, label=label, **options)
    return mux_serve(typed, rest if scheme == "mux" else address, *layers, label=label, **options)


def _over_http(given: tuple[Any, ...], address: str, layers: tuple[Any, ...], label: str, options: Any) -> BaseServer:
    from ..http import serve as http_serve  # which needs a server

    if len(given) == 1 and callable(given[0]) and not contracts_of(type(given[0])):
        return http_serve(given[0], address, *layers, label=label, **options)
    from .asgi import RpcApp

    filters = [layer for layer in layers if getattr(layer, "place", "") == "filters"]
    label = label or ", ".join(TypedService(*given).services)
    app = RpcApp(*given, layers=filters, label=label)
    return http_serve(app, address, *(layer for layer in layers if layer not in filters), label=label, **options)


def asgi(*services: Any, **options: Any) -> Any:
    """Objects with ``@rpc`` methods as an ASGI app, to be mounted in a larger one.

    The server stack is not around it: ``app.add_middleware(meshlib.http.Middleware)`` puts it around the whole.

    Args:
        services: The objects.
        options: ``title`` and ``version`` of the OpenAPI document, ``largest`` body, ``layers``, ``label``.

    Raises:
        ConfigurationError: An object has no ``@rpc`` methods, or two offer the same contract.
    """
    from .asgi import RpcApp

    return RpcApp(*services, **options)
