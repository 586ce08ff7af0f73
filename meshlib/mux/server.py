"""Mux servers: `serve`."""

from __future__ import annotations

import contextvars
from typing import Any, ClassVar

from anyio.abc import ByteStream

from ..core.env import Env
from ..core.errors import ConfigurationError
from ..core.service import Service
from ..server import Server
from ..serving import GRACE
from .codec import DEFAULT_LIMITS, Limits
from .connection import Connection
from .request import Request, Response
from .server_session import ServerSession

__all__ = ["MuxAcceptor", "serve"]


class MuxAcceptor:
    """Speaks Mux on accepted connections.

    Args:
        limits: What a client may ask of us.
        trust_context: May a caller's Dtab say where our own calls go, and its priority how much its own matter? Servers
            that face strangers say no.
    """

    protocol: ClassVar[str] = "mux"

    def __init__(self, limits: Limits = DEFAULT_LIMITS, *, trust_context: bool = True) -> None:
        self.limits = limits
        self.trust_context = trust_context

    def accept(self, stream: ByteStream, service: Any, peer: str, env: Env, base: contextvars.Context) -> ServerSession:
        """A session over ``stream``."""
        metrics = env.metrics.scope("mux")
        return ServerSession(
            Connection(stream, self.limits, metrics),
            service,
            peer=peer,
            supervisor=env.supervisor,
            clock=env.clock,
            metrics=metrics,
            trust=self.trust_context,
            base=base,
        )


def serve(
    service: Service[Request, Response],
    address: str = "127.0.0.1:0",
    *layers: Any,
    label: str = "",
    grace: float = GRACE,
    limits: Limits = DEFAULT_LIMITS,
    trust_context: bool = True,
    **options: Any,
) -> Server:
    """Serve ``service`` over Mux: ``async with mux.serve(echo, "127.0.0.1:9000") as server`` or ``await`` it.

    Args:
        service: An async callable from `Request` to `Response`.
        address: ``host:port`` (port 0 takes a free one) or ``unix:///path``.
        layers: Each replaces the default at its place; plain filters are added above the handler.
        label: What the server is called in metrics, spans and logs.
        grace: Seconds that closing waits for requests under way.
        limits: What a client may ask of us.
        trust_context: ``False`` keeps nothing of what travels with a request but the deadline and the trace.
        options: ``announce``, ``advertise``, ``stack``, ``clock``, ``seed``: see `meshlib.server.Server`.

    Raises:
        ConfigurationError: The address or a layer makes no sense.
    """
    if not isinstance(limits, Limits):
        raise ConfigurationError(f"mux.serve(limits={limits!r}): give meshlib.mux.Limits(…)")
    acceptor = MuxAcceptor(limits, trust_context=trust_context)
    return Server(service, address, acceptor, *layers, label=label, grace=grace, **options)
