"""Makes connections: here, so that nobody else's pool is in the way.

httpcore knows HTTP/1.1 on a stream; its pool looks at every request for each request, and in httpx's version loses a
slot for each connect that is cancelled (encode/httpcore#1093). So streams are opened here, and handed to its
connections one by one. Events that it would have told ``extensions["trace"]`` while connecting are told by us.
"""

from __future__ import annotations

import importlib
import select
import ssl
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Final

import anyio

from ..client import Liveness, Transport, describe
from ..core.env import Env
from ..core.errors import ConfigurationError, ConnectError
from ..names.addr import Address
from .connection import HttpSession
from .core import Core
from .steps import Steps

__all__ = ["BUFFER", "CONNECTING", "HttpConnector", "context_of", "is_impatient", "is_untrusted"]

BUFFER: Final = 65_536
"""Bytes. A body that says it is no larger is read before the call is over, so that a failure in it is retried too."""
CONNECTING: Final[ContextVar[Any]] = ContextVar("meshlib.http.connecting", default=None)
"""The request for which a connection is being made, whose timeouts and trace function count; none in the background."""


class HttpConnector:
    """Makes connections for one origin.

    Args:
        core: httpx or httpx2.
        scheme: ``http`` or ``https``.
        server_name: What the certificate must be for; empty for the address itself.
        context: For TLS.
        http1: Offer HTTP/1.1.
        http2: Offer HTTP/2. In TLS servers choose; without, it is spoken at once where HTTP/1.1 is not offered.
        buffer: See `BUFFER`.
        propagate: Send deadline, trace, Dtab and the rest along.
        accounts: Calls have accounts; see `meshlib.http.account`.

    Raises:
        ConfigurationError: Neither is offered, or h2 is not installed.
    """

    protocol: ClassVar[str] = "http"
    keeps_deadline: ClassVar[bool] = False

    def __init__(
        self,
        core: Core,
        scheme: str = "http",
        server_name: str = "",
        context: ssl.SSLContext | None = None,
        *,
        http1: bool = True,
        http2: bool = False,
        buffer: int = BUFFER,
        propagate: bool = True,
        accounts: bool = False,
    ) -> None:
        if not (http1 or http2):
            raise ConfigurationError("http1=False, http2=False: there is nothing left to speak; leave one of them")
        if http2:
            try:
                importlib.import_module("h2")
            except ImportError as error:
                hint = "pip install 'meshlib-rpc[http2]'"
                raise ConfigurationError(f"http2=True needs h2, which is not installed: {hint}") from error
        self.core, self.scheme, self.server_name, self.context = core, scheme, server_name, context
        self.http1, self.http2, self.buffer, self.propagate = http1, http2, buffer, propagate
        self.accounts = accounts
        self._protocols = ["h2"] * http2 + ["http/1.1"] * http1

    @property
    def shares(self) -> bool:
        """May a connection be shared by requests?"""
        return self.http2 and (self.scheme == "https" or not self.http1)

    @staticmethod
    def lasting(reply: Any) -> Any:
        """The body of a reply that is still to be read; ``None`` for one that has been."""
        stream = getattr(reply, "stream", None)
        return stream if hasattr(stream, "on_end") else None

    async def connect(self, address: Address, env: Env, liveness: Liveness | None) -> HttpSession:
        """A connection to ``address``."""
        core, request = self.core, CONNECTING.get()
        extensions = {} if request is None else request.extensions
        timeout, _ = _times(env, request)
        steps = Steps(extensions.get("trace"))
        backend = core.httpcore.AnyIOBackend()
        stream = None
        try:
            if address.path:
                async with steps.of("connection.connect_unix_socket", path=address.path, timeout=timeout) as told:
                    stream = told.value = await backend.connect_unix_socket(address.path, timeout=timeout)
            else:
                async with steps.of(
                    "connection.connect_tcp", host=address.host, port=address.port, timeout=timeout
                ) as told:
                    stream = told.value = await backend.connect_tcp(address.host, address.port, timeout=timeout)
            if self.scheme == "https":
                assert self.context is not None  # noqa: S101
                name = self.server_name or address.host
                async with steps.of("connection.start_tls", server_hostname=name, timeout=timeout) as told:
                    # Each time, as the context may be another client's too, which offers something else.
                    self.context.set_alpn_protocols(self._protocols)
                    stream = told.value = await stream.start_tls(self.context, server_hostname=name, timeout=timeout)
            return await self._session(stream, address, env, liveness, timeout)
        except BaseException as error:
            if stream is not None:
                with anyio.CancelScope(shield=True):
                    await stream.aclose()
            if isinstance(error, core.httpcore.NetworkError | core.httpcore.TimeoutException):
                raise ConnectError(_said(error, timeout), endpoint=str(address)) from error
            raise

    async def _session(
        self, stream: Any, address: Address, env: Env, liveness: Liveness | None, timeout: float
    ) -> HttpSession:
        library = self.core.httpcore
        port = address.port or (443 if self.scheme == "https" else 80)
        origin = library.Origin(self.scheme.encode(), (address.host or "localhost").encode(), port)
        tls = stream.get_extra_info("ssl_object")
        if self.http1 and (tls is None or tls.selected_alpn_protocol() != "h2"):
            connection = library.AsyncHTTP11Connection(origin, stream)
            return HttpSession(self, connection, origin, str(address), env, False, _readability(stream))
        from .http2 import Http2Connection  # which h2 must be installed for

        connection = Http2Connection(self.core, stream, env, liveness)
        try:
            await connection.open(timeout)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await connection.aclose()
            raise
        return HttpSession(self, connection, origin, str(address), env, True, None)


def context_of(core: Core, verify: bool | str | ssl.SSLContext) -> ssl.SSLContext:
    """What ``verify=`` means. Takes 20 to 50 ms.

    Raises:
        ConfigurationError: It is none of these, or there are no certificates.
    """
    if isinstance(verify, ssl.SSLContext):
        return verify
    try:
        if isinstance(verify, bool):
            made: ssl.SSLContext = core.httpx.create_ssl_context(verify=verify)
            return made
        if isinstance(verify, str):
            folder = Path(verify).is_dir()
            return ssl.create_default_context(cafile=None if folder else verify, capath=verify if folder else None)
    except OSError as error:
        raise ConfigurationError(f"verify={verify!r}: {error}") from error
    raise ConfigurationError(f"verify={verify!r}: give True, False, an ssl.SSLContext, or the path of certificates")


def _times(env: Env, request: Any) -> tuple[float, bool]:
    """Seconds that a connect may take, and whether that is the request's own wish: fewer than the client's."""
    transport = env.params.get(Transport)
    limit = 1.0 if transport is None else transport.connect_timeout
    theirs = None if request is None else request.extensions.get("timeout", {}).get("connect")
    return (theirs, True) if theirs is not None and theirs < limit else (limit, False)


def is_impatient(error: ConnectError, env: Env) -> bool:
    """Did a connect fail for the request's own haste, which says nothing of the endpoint?"""
    return "Timeout" in type(error.__cause__).__name__ and _times(env, CONNECTING.get())[1]


def is_untrusted(error: ConnectError) -> bool:
    """Did a connect fail because of the certificate, which will be the same next time?"""
    cause = error.__cause__
    return cause is not None and isinstance(cause.__cause__, ssl.SSLCertVerificationError)


def _said(error: BaseException, timeout: float) -> str:
    if "Timeout" in type(error).__name__:
        return f"no connection within {timeout:g} s"
    cause = error.__cause__
    if isinstance(cause, ssl.SSLError):
        return f"TLS failed: {getattr(cause, 'verify_message', '') or cause.reason or cause}"
    return describe(cause) if isinstance(cause, OSError) else f"connect failed: {error}"


def _readability(stream: Any) -> Any:
    """What tells whether an idle stream has something to say: nothing but its end would be in order."""
    raw = stream.get_extra_info("socket")
    if raw is None or not hasattr(select, "poll"):  # Windows
        return None
    poll = select.poll()
    poll.register(raw, select.POLLIN)
    return poll
