"""Clusters and users, as the entries of a kubeconfig describe them.

An entry is checked when it is used, and not before: a mistake in one that nobody uses harms nobody. Data that stands in
the file (``…-data``) goes before a file's path, and paths are relative to the file that they stand in. A file with an
authority is read here, once; files with credentials change, so `meshlib.names.kubernetes.credentials` reads them.

What is wrong is said with the file and the key, and never with the value: it may be a secret in the wrong place.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from ...core.errors import ConfigurationError

__all__ = ["Cluster", "Entry", "Plugin", "User", "cluster_of", "kind_of", "read_file", "text_of", "user_of"]

LARGEST: Final = 4 * 1024 * 1024
"""Bytes of one file: hundreds of times what kubeconfigs have."""
VERSIONS: Final = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where an API server is, and how it proves to be that.

    Attributes:
        server: Its URL, perhaps with a path in front of the API's own.
        authority: The certificates that sign its own, in PEM; ``None`` for those of the system.
        insecure: Nothing is verified.
        server_name: The name that its certificate bears, where that is not the URL's host.
        proxy: The proxy's URL.
        public: What a credential plugin that asks for it is told of the cluster.
    """

    server: str
    authority: bytes | None = field(default=None, repr=False)
    insecure: bool = False
    server_name: str = ""
    proxy: str = ""
    public: str = field(default="{}", repr=False)


@dataclass(frozen=True, slots=True)
class Plugin:
    """A program that prints credentials (client-go's exec plugins).

    Attributes:
        version: The API version that it speaks, ``client.authentication.k8s.io/…``.
        command: A name to be looked for in ``PATH``, or an absolute path.
        args: Its arguments.
        env: Variables that are added to the environment.
        hint: What to tell those who do not have the program.
        cluster: What it is told of the cluster, as JSON; empty if it does not ask.
        where: File and entry, for messages.
    """

    version: str
    command: str
    args: tuple[str, ...] = field(default=(), repr=False)
    env: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    hint: str = field(default="", repr=False)
    cluster: str = field(default="", repr=False)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class User:
    """What to show to the API server. Nothing secret is in its ``repr``.

    Attributes:
        token: A bearer token.
        token_file: A file with one, which changes.
        certificate, key: A client certificate and its key: PEM, or files with it, which may change.
        plugin: A program that prints either.
        basic: User and password, for a proxy in front: the API server itself has not taken them since 1.19.
        headers: Whom to act for (``Impersonate-User`` and the like).
        where: File and entry, for messages.
    """

    token: str = field(default="", repr=False)
    token_file: Path | None = None
    certificate: bytes | Path | None = field(default=None, repr=False)
    key: bytes | Path | None = field(default=None, repr=False)
    plugin: Plugin | None = None
    basic: tuple[str, str] | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = ()
    where: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """A named entry.

    Attributes:
        body: What is below its name.
        folder: That of its file.
        where: File, section and name, for messages.
    """

    body: Mapping[str, Any]
    folder: Path
    where: str


def read_file(path: Path, what: str, limit: int = LARGEST) -> bytes:
    """A small file. Blocks: for worker threads.

    Raises:
        ConfigurationError: It cannot be read, or is larger than ``limit`` bytes; ``what`` says who wanted it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{what}: cannot read {path}: {reason}") from error
    if len(data) > limit:
        raise ConfigurationError(f"{what}: {path} has more than {limit} bytes")
    return data


def cluster_of(entry: Entry) -> Cluster:
    """The cluster that an entry describes.

    Raises:
        ConfigurationError: It is malformed, or its authority cannot be read.
    """
    body, where = entry.body, entry.where
    server = text_of(body, "server", where)
    if not _is_url(server, ("https", "http")):
        raise ConfigurationError(f"{where}: server: expected a URL such as https://10.0.0.1:6443, found {server!r}")
    authority = _material(entry, "certificate-authority")
    if isinstance(authority, Path):
        authority = read_file(authority, f"{where}: certificate-authority")
    insecure = body.get("insecure-skip-tls-verify") or False
    if not isinstance(insecure, bool):
        raise ConfigurationError(
            f"{where}: insecure-skip-tls-verify: expected true or false, found {kind_of(insecure)}"
        )
    if insecure and authority:
        raise ConfigurationError(f"{where}: insecure-skip-tls-verify and certificate-authority exclude each other")
    name, proxy = text_of(body, "tls-server-name", where), text_of(body, "proxy-url", where)
    if proxy and not _is_url(proxy, ("http", "https", "socks5", "socks5h")):
        raise ConfigurationError(f"{where}: proxy-url: expected a URL with http, https or socks5")
    public: dict[str, Any] = {"server": server, "tls-server-name": name, "proxy-url": proxy}
    public["certificate-authority-data"] = base64.b64encode(authority).decode("ascii") if authority else ""
    public["insecure-skip-tls-verify"] = insecure
    # Extensions under this name are for the plugin alone (client-go's ExecCredential.spec.cluster.config).
    for extension in body.get("extensions") or []:
        if isinstance(extension, dict) and extension.get("name") == "client.authentication.k8s.io/exec":
            public["config"] = extension.get("extension")
    told = json.dumps({key: value for key, value in public.items() if value}, default=str)
    return Cluster(server, authority, insecure, name, proxy, told)


def _is_url(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0 and text.isprintable()
    except ValueError:
        return False


def user_of(entry: Entry, cluster: Cluster) -> User:
    """The user that an entry describes, with what its plugin may want to know of ``cluster``.

    Raises:
        ConfigurationError: It is malformed.
    """
    body, where = entry.body, entry.where
    if body.get("auth-provider"):
        raise ConfigurationError(
            f"{where}: auth-provider: Kubernetes 1.26 took these out; use an exec plugin such as kubelogin"
        )
    certificate, key = _material(entry, "client-certificate"), _material(entry, "client-key")
    if (certificate is None) != (key is None):
        there, gone = ("client-certificate", "client-key")[:: 1 if certificate else -1]
        raise ConfigurationError(f"{where}: {there} without {gone}: both are needed")
    token_file = text_of(body, "tokenFile", where)
    name, password = text_of(body, "username", where), text_of(body, "password", where)
    exec_ = body.get("exec")
    if exec_ is not None and not isinstance(exec_, dict):
        raise ConfigurationError(f"{where}: exec: expected a mapping, found {kind_of(exec_)}")
    return User(
        token=text_of(body, "token", where),
        token_file=entry.folder / token_file if token_file else None,
        certificate=certificate,
        key=key,
        plugin=_plugin(Entry(exec_, entry.folder, f"{where}: exec"), cluster) if exec_ else None,
        basic=(name, password) if name or password else None,
        headers=_impersonation(body, where),
        where=where,
    )


def _impersonation(body: Mapping[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    headers = [("Impersonate-User", text_of(body, "as", where)), ("Impersonate-Uid", text_of(body, "as-uid", where))]
    headers += [("Impersonate-Group", group) for group in _texts(body, "as-groups", where)]
    extra = body.get("as-user-extra") or {}
    if not isinstance(extra, dict):
        raise ConfigurationError(f"{where}: as-user-extra: expected a mapping, found {kind_of(extra)}")
    for key in extra:
        name = f"Impersonate-Extra-{quote(str(key), safe='')}"
        headers += [(name, value) for value in _texts(extra, key, f"{where}: as-user-extra")]
    if not all(value.isprintable() for _, value in headers):
        raise ConfigurationError(f"{where}: as: names must be one line of printable characters")
    return tuple((name, value) for name, value in headers if value)


def _plugin(entry: Entry, cluster: Cluster) -> Plugin:
    body, where = entry.body, entry.where
    version, command = text_of(body, "apiVersion", where), text_of(body, "command", where)
    if version not in VERSIONS:
        raise ConfigurationError(f"{where}: apiVersion: expected {' or '.join(VERSIONS)}, found {version!r}")
    if not command:
        raise ConfigurationError(f"{where}: command: expected the program's name, found nothing")
    if body.get("interactiveMode") == "Always":
        raise ConfigurationError(f"{where}: interactiveMode is Always, and nobody is here to ask; it must be Never")
    if "/" in command or "\\" in command:
        command = str(entry.folder / command)
    env = body.get("env") or []
    if not isinstance(env, list) or not all(isinstance(item, dict) for item in env):
        raise ConfigurationError(f"{where}: env: expected a list of name and value")
    return Plugin(
        version=version,
        command=command,
        args=_texts(body, "args", where),
        env=tuple((text_of(e, "name", f"{where}: env"), text_of(e, "value", f"{where}: env")) for e in env),
        hint=text_of(body, "installHint", where),
        cluster=cluster.public if body.get("provideClusterInfo") is True else "",
        where=where,
    )


def _material(entry: Entry, key: str) -> bytes | Path | None:
    """What stands under ``key-data`` in base64, or else the path under ``key``."""
    data = text_of(entry.body, f"{key}-data", entry.where)
    if data:
        try:
            return base64.b64decode("".join(data.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ConfigurationError(f"{entry.where}: {key}-data: not base64: {error}") from error
    path = text_of(entry.body, key, entry.where)
    return entry.folder / path if path else None


def text_of(body: Mapping[str, Any], key: str, where: str) -> str:
    """The text under ``key``; empty if there is none.

    Raises:
        ConfigurationError: It is something else: YAML takes ``123`` for a number.
    """
    value = body.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigurationError(f"{where}: {key}: expected text, found {kind_of(value)}; put it in quotes")
    if "\x00" in value:
        raise ConfigurationError(f"{where}: {key}: holds a NUL character")
    return value


def _texts(body: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = body.get(key) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ConfigurationError(f"{where}: {key}: expected a list of texts")
    return tuple(values)


def kind_of(value: object) -> str:
    """What a value is, without showing it: it may be a secret that stands in the wrong place."""
    return {dict: "a mapping", list: "a list", str: "text", bool: "true or false"}.get(
        type(value), "a number" if isinstance(value, int | float) else type(value).__name__
    )
