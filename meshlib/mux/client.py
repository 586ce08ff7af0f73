"""Mux clients: connecting, the handshake, and `client`."""

from __future__ import annotations

from typing import Any, ClassVar

import anyio
from anyio.abc import ByteStream

from ..client import Client, Liveness, Transport
from ..core.env import Env
from ..core.errors import ConfigurationError, ConnectError
from ..names.addr import Address
from .client_session import ClientSession
from .codec import DEFAULT_LIMITS, Limits, MuxError
from .connection import Connection
from .handshake import ClientHandshake
from .request import Request, Response

__all__ = ["MuxConnector", "client", "open_session"]


class MuxConnector:
    """Connects over TCP or a Unix socket and negotiates.

    Args:
        limits: What a server may ask of us.
    """

    protocol: ClassVar[str] = "mux"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self.limits = limits

    async def open(self, address: Address) -> ByteStream:
        """The bytes to and from ``address``. Tests replace it with a network in memory."""
        if address.path:
            return await anyio.connect_unix(address.path)
        return await anyio.connect_tcp(address.host, address.port)

    async def connect(self, address: Address, env: Env, liveness: Liveness | None) -> ClientSession:
        """A running session with ``address``."""
        timeout = transport.connect_timeout if (transport := env.params.get(Transport)) else 1.0
        stream = None
        with anyio.CancelScope(deadline=anyio.current_time() + timeout):
            stream = await self.open(address)
        if stream is None:
            raise ConnectError(f"no connection within {timeout:g} s", endpoint=str(address))
        return await open_session(stream, str(address), env, self.limits, liveness)


async def open_session(
    stream: ByteStream, endpoint: str, env: Env, limits: Limits = DEFAULT_LIMITS, liveness: Liveness | None = None
) -> ClientSession:
    """Negotiate over ``stream`` and run the session in the background of ``env``. Closes the stream if that fails.

    Raises:
        ConnectError: The server closed the connection, or refused the session.
    """
    metrics = env.metrics.scope("mux")
    connection = Connection(stream, limits, metrics)
    try:
        handshake = ClientHandshake(limits)
        await connection.send_now(handshake.start())
        while handshake.result is None:
            answer = handshake.receive(await connection.next_message())
            if answer is not None:
                await connection.send_now(answer)
        connection.fragment_at(handshake.result.fragment)
        session = ClientSession(
            connection,
            endpoint=endpoint,
            clock=env.clock,
            metrics=metrics,
            negotiated=handshake.result.version is not None,
            ping_interval=liveness.interval if liveness else None,
            ping_timeout=liveness.timeout if liveness else 4.0,
        )
        env.supervisor.start(session.run, name=f"mux session with {endpoint}")
    except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
        await connection.aclose()
        raise ConnectError("the server closed the connection during the handshake", endpoint=endpoint) from error
    except MuxError as error:
        connection.violation(error)
        await connection.aclose()
        raise ConnectError(error.message, endpoint=endpoint) from error
    except BaseException:
        await connection.aclose()
        raise
    return session


def client(
    target: str, *layers: Any, label: str = "", limits: Limits = DEFAULT_LIMITS, **options: Any
) -> Client[Request, Response]:
    """Make a Mux client. Call it with a `Request`, and it gives a `Response`.

    Args:
        target: ``host:port[,host:port…]``, ``unix:///path``, ``file:///path``,
            ``dns://…``, ``srv://…``, ``zk://…``, ``k8s://…``, or a logical path, which Dtabs make one of these of.
        layers: Each replaces the default at its place; plain filters are added.
        label: What the client is called in metrics, spans and errors.
        limits: What a server may ask of us.
        options: ``stack``, ``classifier``, ``clock``, ``seed``: see `meshlib.client.Client`.

    Raises:
        ConfigurationError: The target or a layer makes no sense.
    """
    if not isinstance(limits, Limits):
        raise ConfigurationError(f"mux.client(limits={limits!r}): give meshlib.mux.Limits(…)")
    return Client(target, MuxConnector(limits), *layers, label=label, **options)
