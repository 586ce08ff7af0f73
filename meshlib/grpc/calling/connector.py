"""Connecting: TCP or a Unix socket, TLS with ALPN, and the server's first word.

A certificate must be for the name that the user wrote, not for the address that it stands for: the host of a ``dns://``
target, else the host of the address, unless grpclib's ``Configuration(ssl_target_name_override=…)`` says another.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from typing import Any, ClassVar, Final

import anyio
from grpclib.client import Channel as _Grpclib
from grpclib.config import Configuration
from grpclib.metadata import USER_AGENT

from ...client import Liveness, Transport, describe
from ...core.env import Env
from ...core.errors import ConfigurationError, ConnectError
from ...names.addr import Address, parse_hostport
from ...names.target import Target
from ..h2 import HEADER_LIST
from .exchange import Exchange
from .heads import Options, connection_window
from .keepalive import Keepalive, Policy
from .session import GrpcSession

__all__ = ["GrpcConnector", "connector_for", "tls_context"]

NEVER: Final = 1e9
"""Seconds: no pings where the stack has no layer for them."""


def tls_context(given: Any) -> ssl.SSLContext | None:
    """The context for what grpclib takes as ``ssl``: nothing, ``True``, paths, or a context, which must offer ``h2``.

    Raises:
        ConfigurationError: It is none of these.
    """
    if given is None or given is False:
        return None
    if isinstance(given, ssl.SSLContext):
        return given
    if given is True or isinstance(given, ssl.DefaultVerifyPaths):
        paths = given if isinstance(given, ssl.DefaultVerifyPaths) else None
        # It uses nothing of its object; the same ciphers, authorities and protocols as a bare grpclib channel.
        return _Grpclib._get_default_ssl_context(None, verify_paths=paths)  # type: ignore[arg-type]
    raise ConfigurationError(f"ssl={given!r}: give True, an ssl.SSLContext or ssl.DefaultVerifyPaths")


@functools.lru_cache(maxsize=256)
def named_by(target: str) -> tuple[str, str]:
    """The host, and it with its port, that a target names for all its addresses; empty where there is none."""
    try:
        parsed = Target.parse(target)
        if parsed.scheme != "dns" or "," in parsed.rest.partition("?")[0]:
            return "", ""
        host, port = parse_hostport(parsed.rest.partition("?")[0])
    except ConfigurationError:
        return "", ""
    host = host.removesuffix(".")  # the root is part of the question, and of no certificate
    return host, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class GrpcConnector:
    """Makes the connections of a channel.

    Args:
        options: What they have in common.
        context: For TLS; ``None`` for none.
        config: grpclib's; its windows are in ``options`` already.
    """

    protocol: ClassVar[str] = "grpc"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, options: Options, context: ssl.SSLContext | None, config: Configuration) -> None:
        self.options, self.context = options, context
        self._name = config.ssl_target_name_override or ""
        self._policy = Policy.of_configuration(config)

    @staticmethod
    def lasting(reply: Any) -> Exchange | None:
        """A stream, which goes on after it was begun, or has ended since."""
        return reply if isinstance(reply, Exchange) else None

    async def connect(self, address: Address, env: Env, liveness: Liveness | None) -> GrpcSession:
        """A running session with ``address``.

        Raises:
            ConnectError: There is none.
        """
        timeout = transport.connect_timeout if (transport := env.params.get(Transport)) else 1.0
        if self._policy is None:
            self._policy = Policy(NEVER, NEVER) if liveness is None else Policy(liveness.interval, liveness.timeout)
        endpoint, clock = str(address), env.clock
        keepalive = Keepalive(self._policy, clock.now())
        host, named = named_by(env.name)
        authority = self._name or named or ("localhost" if address.path else endpoint)
        session = GrpcSession(self.options, endpoint, authority, clock, env.metrics.scope("grpc"), keepalive)
        opened = False
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + timeout):
                await self._open(session, address, self._name or host or address.host or "localhost")
                opened = True
            if not opened:
                raise ConnectError(f"no connection within {timeout:g} s", endpoint=endpoint)
            self._check(session, endpoint)
            with anyio.CancelScope(deadline=anyio.current_time() + timeout) as scope:
                await session.ready()
            if scope.cancelled_caught:
                raise ConnectError(f"connected, but no HTTP/2 SETTINGS came within {timeout:g} s", endpoint=endpoint)
            env.supervisor.start(session.run, name=f"gRPC session with {endpoint}")
        except BaseException:
            session.abort()
            raise
        return session

    async def _open(self, session: GrpcSession, address: Address, host: str) -> None:
        loop = asyncio.get_running_loop()
        name = None if self.context is None else host
        try:
            if address.path:
                await loop.create_unix_connection(lambda: session, address.path, ssl=self.context, server_hostname=name)
            else:
                await loop.create_connection(
                    lambda: session, address.host, address.port, ssl=self.context, server_hostname=name
                )
        except ssl.SSLError as error:
            what = getattr(error, "verify_message", "") or error.reason or str(error)
            # A registry's addresses are names of nothing: whose certificate to expect has to be said.
            hint = "" if self._name else "; Configuration(ssl_target_name_override=…) expects another name"
            raise ConnectError(f"TLS failed: {what} (expected a certificate for {name}{hint})") from error
        except OSError as error:
            text = describe(error)
            if isinstance(error, ConnectionError) and not error.errno:  # it was there, and hung up in the handshake
                what = str(error) or type(error).__name__
                text = f"connect failed: {what}: does the server speak TLS, or want a client certificate?"
            raise ConnectError(text) from error

    def _check(self, session: GrpcSession, endpoint: str) -> None:
        tls = session.tls
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            spoken = tls.selected_alpn_protocol() or "nothing"
            raise ConnectError(f"TLS came up, but by ALPN the server speaks {spoken}, not h2", endpoint=endpoint)


def connector_for(
    given: Any, config: Configuration | None, *, compression: str = "", propagate: bool = True
) -> GrpcConnector:
    """The connector of a client whose user said this much.

    Args:
        given: See `tls_context`.
        config: grpclib's; ``None`` for the defaults.
        compression: ``gzip``, or nothing.
        propagate: Send trace, Dtab and the rest along.

    Raises:
        ConfigurationError: ``given`` is nothing that TLS can be made of.
    """
    context, window = tls_context(given), connection_window(config)
    config = (config or Configuration()).__for_client__()
    options = Options(
        scheme="http" if context is None else "https",
        connection_window=window,
        stream_window=config.http2_stream_window_size,
        max_headers=HEADER_LIST,
        compression=compression,
        propagate=propagate,
        user_agent=USER_AGENT,
    )
    return GrpcConnector(options, context, config)
