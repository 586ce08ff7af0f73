"""Where the API server is, and how to speak to it: what `find` finds, in kubectl's order.

1. ``KUBECONFIG``, one file or several, merged.
2. The pod's own service account, in a pod.
3. ``~/.kube/config``.

`Access` makes httpx clients that need no further care: they verify the server, and give proof of who they are with each
request: a token that is read again from its file, or a plugin's credentials before they expire. After a 401 whatever
was kept is dropped, and if that brings other credentials, the request is sent once more. So a 401 that a caller sees is
final.

A pod goes to its API server directly, whatever ``HTTPS_PROXY`` says: that is for the way out of the cluster. With a
kubeconfig such variables count, as for kubectl, unless it has a ``proxy-url``.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Final

import anyio.to_thread
import httpx

from ...core.errors import ConfigurationError, shown
from .credentials import Credentials
from .entries import Cluster, User, read_file
from .kubeconfig import read
from .plugin import Identity
from .tls import ApiContext, present, verifying

__all__ = ["Access", "explain", "find"]

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet puts a pod's token, authority and namespace."""
TIMEOUT: Final = httpx.Timeout(connect=5.0, read=30.0, write=10.0, pool=10.0)
"""Seconds. A watch says its own for reading."""


class Access:
    """The way to an API server.

    Args:
        cluster: Where it is.
        user: What to show it.
        namespace: The pod's, or the context's.
        source: Where this was found, for messages.
        environ: The environment of plugins.
        proxies: Do the environment's proxies count?

    Attributes:
        server: Its URL, which may have a path.
        namespace: The pod's, or the context's; else ``default``.
        source: Where this was found, for messages.
    """

    def __init__(
        self,
        cluster: Cluster,
        user: User,
        *,
        namespace: str = "default",
        source: str = "",
        environ: Mapping[str, str] | None = None,
        proxies: bool = False,
    ) -> None:
        self.server = cluster.server
        self.namespace = namespace
        self.source = source
        self._cluster = cluster
        self._user = user
        self._credentials = Credentials(user, os.environ if environ is None else environ)
        self._proxies = proxies

    async def client(self) -> httpx.AsyncClient:
        """A new client, which the caller closes. Requests give paths alone.

        Raises:
            ConfigurationError: Certificates or keys cannot be used. Requests raise it too, when credentials are gone.
        """
        context = await anyio.to_thread.run_sync(verifying, self._cluster, self._user.where or self.source)
        # OpenSSL takes another certificate for new connections only, so nobody may keep old ones.
        keep = 0 if self._credentials.certificates_change else None
        return httpx.AsyncClient(
            base_url=self.server,
            verify=context,
            auth=_Auth(self._credentials, context),
            timeout=TIMEOUT,
            limits=httpx.Limits(max_keepalive_connections=keep),
            trust_env=self._proxies and not self._cluster.proxy,
            proxy=self._proxy(),
        )

    async def headers(self) -> httpx.Headers:
        """What a client adds to its next request. A client does it by itself; this is for other ways of asking.

        Raises:
            ConfigurationError: There are no credentials.
        """
        return httpx.Headers(_headers(await self._credentials.identity(), self._user))

    def forget(self) -> None:
        """Drop what is kept of credentials. Clients do it by themselves after a 401."""
        self._credentials.forget()

    @staticmethod
    async def find(environ: Mapping[str, str] | None = None, *, account: Path = ACCOUNT) -> Access:
        """See `meshlib.names.kubernetes.config.find`."""
        return await find(environ, account=account)

    def _proxy(self) -> httpx.Proxy | None:
        url = self._cluster.proxy
        if url.startswith("socks5"):
            try:
                import socksio  # type: ignore[import-not-found,unused-ignore] # noqa: F401
            except ImportError as error:
                raise ConfigurationError(
                    f"{self.source}: proxy-url {url!r} needs: pip install 'httpx[socks]'"
                ) from error
        return httpx.Proxy(url) if url else None

    def __repr__(self) -> str:
        return f"<Access to {self.server}, by {self.source}>"


class _Auth(httpx.Auth):
    """Proves at each request of a client who it is."""

    def __init__(self, credentials: Credentials, context: ApiContext) -> None:
        self._credentials = credentials
        self._context = context
        self._shown: tuple[bytes, bytes] = (b"", b"")

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        identity = await self._show(request)
        response = yield request
        if response.status_code == 401:
            self._credentials.forget(identity)
            if await self._show(request) != identity:
                yield request

    async def _show(self, request: httpx.Request) -> Identity:
        identity = await self._credentials.identity()
        pair = identity.certificate, identity.key
        if pair != self._shown and identity.certificate:
            present(self._context, *pair, self._credentials.user.where)
            self._shown = pair
        for name in ("Authorization", *(name for name, _ in self._credentials.user.headers)):
            request.headers.pop(name, None)
        request.headers = httpx.Headers([*request.headers.raw, *_headers(identity, self._credentials.user)])
        return identity


def _headers(identity: Identity, user: User) -> list[tuple[bytes, bytes]]:
    headers = [("Authorization", identity.authorization)] if identity.authorization else []
    return [(name.encode("ascii"), value.encode("utf-8")) for name, value in (*headers, *user.headers)]


def explain(error: BaseException) -> str:
    """What went wrong, in one line. httpx's own message is often empty: then the story is further down its causes."""
    told: BaseException | None = error
    while told is not None and not str(told).strip():
        told = told.__cause__ or told.__context__
    return type(error).__name__ if told is None else f"{type(error).__name__}: {shown(str(told).strip(), 500)}"


async def find(environ: Mapping[str, str] | None = None, *, account: Path = ACCOUNT) -> Access:
    """The API server of this process.

    Args:
        environ: The environment; by default that of the process.
        account: Where a pod's service account is.

    Raises:
        ConfigurationError: There is none to be found (the message says where it was looked for), or what was found is
            wrong (it says in which file, and under which key).
    """
    # Relative to nothing that changes: all that is read is small, and on this machine.
    return await anyio.to_thread.run_sync(_find, os.environ if environ is None else environ, account)


def _find(environ: Mapping[str, str], account: Path) -> Access:
    tried = []
    named = [Path(part) for part in environ.get("KUBECONFIG", "").split(os.pathsep) if part]
    if named:
        access = _of_files(named, environ)
        if access is not None:
            return access
        raise ConfigurationError(f"KUBECONFIG names {', '.join(map(str, named))}, which is not there")
    tried.append("KUBECONFIG is not set")
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "")
    if not (host and port):
        tried.append("KUBERNETES_SERVICE_HOST is not set, so this is no pod")
    elif not (account / "token").exists():
        tried.append(f"this is a pod, but {account / 'token'} is not there (automountServiceAccountToken: false?)")
    else:
        return _of_pod(host, port, account, environ)
    home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    default = home / ".kube" / "config"
    access = _of_files([default], environ)
    if access is not None:
        return access
    tried.append(f"{default} is not there")
    raise ConfigurationError(f"found no Kubernetes API server: {'; '.join(tried)}")


def _of_pod(host: str, port: str, account: Path, environ: Mapping[str, str]) -> Access:
    where = "the pod's service account"
    authority = read_file(account / "ca.crt", where)
    namespace = read_file(account / "namespace", where).decode("utf-8", "replace").strip()
    server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    user = User(token_file=account / "token", where=where)
    return Access(Cluster(server, authority), user, namespace=namespace or "default", source=where, environ=environ)


def _of_files(paths: list[Path], environ: Mapping[str, str]) -> Access | None:
    context = read(paths)
    if context is None:
        return None
    return Access(
        context.cluster,
        context.user,
        namespace=context.namespace,
        source=f"context {context.name!r} of {context.source}",
        environ=environ,
        proxies=True,
    )
