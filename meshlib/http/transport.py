"""The transport below an ``httpx.AsyncClient``: each request becomes a call through the client stack.

Without a target, the host in a request's URL is the name: the logical path ``/s/<host>`` where a Dtab has an entry for
it (the base's or the local one), else what DNS says of it. With a target every request goes there, and the URL says
only what is asked for, and whose certificate is expected. Clients are made as they are needed, one for each name.

httpx calls a transport once for each request on the wire: redirects and authentication are above it, connections below.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections import Counter, OrderedDict
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, Final, Self

import anyio

from ..client import Client
from ..core.classify import PartialClassifier, ResponseClass, Rule
from ..core.clock import Clock
from ..core.context import VAR, Context
from ..core.errors import ConfigurationError, MeshError, ServiceClosed
from ..core.service import Status
from ..core.stack import Layer, Stack
from ..core.supervisor import Supervisor
from ..filters.timeout import DEFAULT_TOTAL, TotalTimeout
from ..names.base import BaseDtab
from ..names.bind import Bind
from ..names.path import Path
from ..telemetry.http import HttpClientTracing
from .account import ACCOUNT, Account
from .answers import Answers
from .connection import SourceFailed
from .connector import BUFFER, HttpConnector, context_of
from .core import Core, core_of
from .facts import note
from .logical import LogicalNames
from .policy import Connections

__all__ = ["MeshTransport"]

MOST_NAMES: Final = 1000
"""Clients: when there are more, those end that were used least recently and have nothing to do."""

Key = tuple[bytes, bytes, int | None, str, bool]


class MeshTransport:
    """See `meshlib.http.Transport`. What is the same for httpx and httpx2.

    Args:
        module: ``httpx`` or ``httpx2``.
        target: Where requests go; ``None`` to go by each request's host.
        layers: Each replaces the default at its place; plain filters are added, and see ``Request`` and ``Response``.
        label: What the client is called in metrics, spans and errors; by default the name.
        verify: As for httpx: ``True``, ``False``, or an ``ssl.SSLContext``; or the path of the certificates to trust.
        http1: Speak HTTP/1.1.
        http2: Speak HTTP/2 (needs the package ``h2``): where servers choose it, in TLS; everywhere without ``http1``.
        prefix: Of the logical paths that hosts are looked up under.
        buffer: Bodies of at most so many bytes, which say so, are read within the call, and retried with it.
        propagate: Send deadline, trace, Dtab and the rest along; ``False`` for servers that are none of yours.
        classifier: Which outcomes are failures; the default decides what it leaves open.
        stack: Changes the stack in ways that a layer alone cannot say.
        clock: What time it is; for tests.
        seed: Of the client's random choices; for tests.

    Attributes:
        total: Seconds that a call may take by its total timeout, ``None`` for no limit.
        body_limit: Seconds from the beginning of a call for which a body may be read, ``None`` for no limit.

    Raises:
        ConfigurationError: The target, a layer or an option makes no sense, or a package is missing.
    """

    def __init__(
        self,
        module: ModuleType | str,
        target: str | None = None,
        *layers: Any,
        label: str = "",
        verify: bool | str | ssl.SSLContext = True,
        http1: bool = True,
        http2: bool = False,
        prefix: str = "/s",
        buffer: int = BUFFER,
        propagate: bool = True,
        classifier: PartialClassifier | None = None,
        stack: Callable[[Stack], Stack] | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            proxies = "; requests go straight to endpoints, so give proxies to AsyncClient(mounts=…)"
            hint = proxies if "proxy" in unknown or "proxies" in unknown else ""
            raise ConfigurationError(f"Transport({', '.join(unknown)}): there is no such option{hint}")
        if target is not None and not isinstance(target, str):
            if not isinstance(target, Layer):
                raise ConfigurationError(f"Transport({target!r}): give a target, such as 'dns://users:8080', or none")
            target, layers = None, (target, *layers)
        self._core: Core = core_of(module)
        self._target, self._layers, self._label = target, layers, label
        self._verify, self._http1, self._http2 = verify, http1, http2
        self._buffer, self._propagate = buffer, propagate
        self._prefix = Path.parse(prefix)
        self._classifier = Rule(_judge) if classifier is None else Rule(classifier).or_else(_judge)
        self._stack, self._clock, self._seed = stack, clock or Clock(), seed
        self._clients: OrderedDict[Key, Client[Any, Any]] = OrderedDict()
        self._under_way: Counter[Client[Any, Any]] = Counter()
        self._default_total = TotalTimeout(DEFAULT_TOTAL)
        self._context: ssl.SSLContext | None = None
        self._supervisor = Supervisor(f"transport {label or target or 'by host'}")
        self._closed = False
        self._names: LogicalNames | None = None
        self._memory = self._core.httpx.ByteStream
        # What makes no sense is told now, and not by the first request.
        trial = self._client("http", target or "localhost:80", "", "")
        if not isinstance(verify, bool):
            self._tls()
        bind = trial.stack.find("bind")
        total = trial.stack.find("timeout")
        # What the user gave is for all of it, bodies included; the default is for the head of the response.
        self.total: float | None = getattr(total, "seconds", None)
        self.body_limit = None if total is self._default_total else self.total
        if target is None:
            base = BaseDtab(bind.base if isinstance(bind, Bind) else None)
            self._names = LogicalNames(self._prefix, base, self._clock, self._supervisor)

    # --- requests -----------------------------------------------------------------------------------------------------

    async def handle_async_request(self, request: Any) -> Any:
        """Send one request.

        Raises:
            httpx.TransportError: As httpx's own transport would; every error is one of ours as well.
            ConfigurationError: The request belongs to the other one of httpx and httpx2.
        """
        core = self._core
        if not core.is_request(request):
            raise ConfigurationError(
                f"a request of {type(request).__module__.partition('.')[0]} for a transport of {core.name}; "
                "meshlib.http.Transport is for httpx, meshlib.http.Httpx2Transport for httpx2"
            )
        if self._closed:
            raise core.error(ServiceClosed("the transport is closed"), request)
        url = request.url
        scheme = url.scheme
        if scheme not in ("http", "https"):
            raise core.httpx.UnsupportedProtocol(
                f"Request URL has an unsupported protocol '{scheme}://'."
                if scheme
                else "Request URL is missing an 'http://' or 'https://' protocol.",
                request=request,
            )
        note(request, core)
        context = VAR.get()
        until = context.deadline
        if self.body_limit is not None:
            limit = self._clock.now() + self.body_limit
            until = limit if until is None else min(limit, until)
        account, reply = Account(self._supervisor, self._memory, until), None
        token = ACCOUNT.set(account)
        try:
            client = await self._client_of(request, context)
            under_way = self._under_way
            under_way[client] += 1
            try:
                reply = await client(request)
            finally:
                under_way[client] -= 1
                if not under_way[client]:
                    del under_way[client]
            return reply
        except MeshError as error:
            if isinstance(error, SourceFailed) and error.__cause__ is not None:
                raise error.__cause__ from None
            if isinstance(error, core.httpx.TransportError):
                raise
            raise core.error(error, request) from error
        finally:
            ACCOUNT.reset(token)
            account.end(reply)

    async def _client_of(self, request: Any, context: Context) -> Client[Any, Any]:
        url = request.url
        sni = request.extensions.get("sni_hostname", "")
        if self._target is not None:
            logical = False
            key: Key = (
                (b"", b"", None, sni or url.host, False) if url.scheme == "https" else (b"", b"", None, "", False)
            )
        else:
            logical = await self._is_logical(request, context)
            key = (url.raw_scheme, url.raw_host, url.port, sni, logical)
        client = self._clients.get(key)
        if client is None:
            client = self._clients[key] = self._client(url.scheme, self._name(url, logical), sni or url.host, url.host)
            while len(self._clients) > MOST_NAMES and self._forget_one(client):
                pass
        else:
            self._clients.move_to_end(key)
        return client

    def _name(self, url: Any, logical: bool) -> str:
        if self._target is not None:
            return self._target
        if logical:
            return f"{self._prefix}/{url.host}"
        host, port = url.host, url.port or (443 if url.scheme == "https" else 80)
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return f"dns://{host}:{port}"
        return f"[{host}]:{port}" if address.version == 6 else f"{host}:{port}"

    async def _is_logical(self, request: Any, context: Context) -> bool:
        names = self._names
        if names is None or not (context.dtab or names.any):
            return False
        until = context.deadline
        if self.total is not None:
            limit = self._clock.now() + self.total
            until = limit if until is None else min(limit, until)
        found = await names.has(request.url.host, context.dtab, request, until)
        if self._closed:  # meanwhile
            raise ServiceClosed("the transport is closed")
        return found

    # --- clients ------------------------------------------------------------------------------------------------------

    def _client(self, scheme: str, name: str, server_name: str, host: str) -> Client[Any, Any]:
        context = self._tls() if scheme == "https" else None
        connector = HttpConnector(
            self._core,
            scheme,
            server_name,
            context,
            http1=self._http1,
            http2=self._http2,
            buffer=self._buffer,
            propagate=self._propagate,
            accounts=True,
        )
        client = Client[Any, Any](
            name,
            connector,
            Connections(),
            HttpClientTracing(),
            self._default_total,
            *self._layers,
            label=self._label or (host if self._target is None else ""),
            stack=self._arranged,
            classifier=self._classifier,
            clock=self._clock,
            seed=self._seed,
        )
        client.env.params[HttpConnector] = connector
        return client

    def _arranged(self, stack: Stack) -> Stack:
        stack = stack.insert_before("retry", Answers(self._core))
        return stack if self._stack is None else self._stack(stack)

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:  # 20 to 50 ms, hence one for all
            self._context = context_of(self._core, self._verify)
        return self._context

    def _forget_one(self, wanted: Client[Any, Any]) -> bool:
        """End the client that was used least recently, of those that have nothing under way."""
        for key, client in self._clients.items():
            if client is not wanted and client not in self._under_way and not any(n.load for n in client.endpoints):
                del self._clients[key]
                self._supervisor.start(client.aclose, name=f"close {client.env.label}")
                return True
        return False

    @property
    def clients(self) -> tuple[Client[Any, Any], ...]:
        """The client of each name that has been asked for; each has ``endpoints``, ``metrics()`` and ``events``."""
        return tuple(self._clients.values())

    @property
    def status(self) -> Status:
        """Closed, or fit to be used."""
        return Status.CLOSED if self._closed else Status.OPEN

    def metrics(self) -> dict[str, float]:
        """Every number of every client.

        By host they are ``http://users:8080/<metric>``, and ``http://users:8080/s/users/<metric>`` where a Dtab has an
        entry; with a target ``<metric>``, and in TLS ``https://<name that the certificate must have>/<metric>``.
        """
        return {
            f"{self._prefix_of(key)}{name}": number
            for key, client in self._clients.items()
            for name, number in client.metrics().items()
        }

    def _prefix_of(self, key: Key) -> str:
        scheme, raw, port, sni, logical = key
        if self._target is not None:
            return f"https://{sni}/" if sni else ""
        host = raw.decode("ascii", "replace")
        origin = f"{scheme.decode()}://{f'[{host}]' if ':' in host else host}{'' if port is None else f':{port}'}"
        return f"{origin}{f';sni={sni}' if sni else ''}{f'{self._prefix}/{host}' if logical else ''}/"

    async def aclose(self) -> None:
        """Close every connection. Twice is the same as once."""
        self._closed = True
        if self._names is not None:
            self._names.close()
        with anyio.CancelScope(shield=True):
            for client in tuple(self._clients.values()):
                await client.aclose()
            await self._supervisor.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        where = self._target or f"each request's host, or {self._prefix}/<host> where a Dtab has it"
        return "\n".join([f"transport to {where} ({self._core.name})", *map(repr, self._clients.values())])


def _judge(request: Any, reply: Any, error: BaseException | None) -> ResponseClass | None:
    status = getattr(reply, "status_code", 0)
    return ResponseClass.FAILURE if status >= 500 or status == 429 else None
