"""Credential plugins: programs such as ``aws eks get-token`` or ``gke-gcloud-auth-plugin`` that print credentials.

The protocol is client-go's: the environment variable ``KUBERNETES_EXEC_INFO`` tells the program which version of the
format to print, and it prints an ``ExecCredential`` with a token, or a client certificate and its key, and perhaps when
they expire. What it printed is used until shortly before then, or until the API server answers 401.

A plugin takes a second or more, and a process may follow dozens of names: those who run on one event loop share one run
of each program. It is given no terminal, half a minute, and a megabyte for its answer.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Final

import anyio
from anyio.abc import ByteReceiveStream, Process
from anyio.lowlevel import RunVar

from ...core.errors import ConfigurationError, shown
from .entries import Plugin

__all__ = ["Identity", "PluginRunner", "parse_credential", "runner_of"]

TIMEOUT: Final = 30.0
"""Seconds for one run. client-go waits for ever; a watch that hangs in a plugin would never say why."""
LARGEST: Final = 1024 * 1024
EARLY: Final = (60.0, 0.1)
"""Seconds before the end, or the part of the lifetime if that is less, at which credentials are fetched anew."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What is shown to the API server.

    Attributes:
        authorization: The value of the header, or nothing.
        certificate, key: A client certificate with its key in PEM, or nothing.
    """

    authorization: str = field(default="", repr=False)
    certificate: bytes = field(default=b"", repr=False)
    key: bytes = field(default=b"", repr=False)


class PluginRunner:
    """Runs one plugin when its credentials are needed.

    Args:
        plugin: Which.
        environ: The environment that it gets, beside its own additions.
        wall: The wall clock, in seconds since the epoch; plugins speak of expiry in its terms.
    """

    def __init__(self, plugin: Plugin, environ: Mapping[str, str], wall: Callable[[], float] = time.time) -> None:
        self.plugin = plugin
        self._environ = environ
        self._wall = wall
        self._lock = anyio.Lock()
        self._identity: Identity | None = None
        self._until: float | None = None

    async def identity(self) -> Identity:
        """The credentials: those of the last run, while they are good.

        Raises:
            ConfigurationError: The program is not there, fails, hangs, or prints something else.
        """
        async with self._lock:
            if self._identity is None or (self._until is not None and self._wall() >= self._until):
                began = self._wall()
                identity, expires = parse_credential(await self._run(), self.plugin)
                early = min(EARLY[0], EARLY[1] * max(0.0, expires - began)) if expires is not None else 0.0
                self._identity, self._until = identity, None if expires is None else expires - early
            return self._identity

    def forget(self, identity: Identity | None = None) -> None:
        """The API server did not accept it. What a later run has printed stays; nothing does when none is named."""
        if identity is None or self._identity == identity:
            self._identity = None

    async def _run(self) -> bytes:
        plugin = self.plugin
        info: dict[str, Any] = {"interactive": False}
        if plugin.cluster:
            info["cluster"] = json.loads(plugin.cluster)
        told = {"apiVersion": plugin.version, "kind": "ExecCredential", "spec": info}
        environ = {**self._environ, **dict(plugin.env), "KUBERNETES_EXEC_INFO": json.dumps(told)}
        try:
            process = await anyio.open_process(
                [plugin.command, *plugin.args], stdin=subprocess.DEVNULL, env=environ, start_new_session=True
            )
        except (OSError, ValueError) as error:
            hint = f"; {shown(plugin.hint, 1000)}" if plugin.hint else ""
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"{plugin.where}: cannot run {plugin.command!r}: {reason}{hint}") from error
        printed = _Tail(LARGEST + 1), _Tail(2000)
        try:
            with anyio.move_on_after(TIMEOUT) as scope:
                await _talk(process, printed)
        finally:
            await _end(process)
        out, err = (tail.text for tail in printed)
        said = f"; it said: {shown(err.decode('utf-8', 'replace').strip(), 500)}" if err.strip() else ""
        if scope.cancelled_caught:
            raise ConfigurationError(f"{plugin.where}: {plugin.command!r} did not end in {TIMEOUT:g} s{said}")
        if len(out) > LARGEST:
            raise ConfigurationError(f"{plugin.where}: {plugin.command!r} printed more than {LARGEST} bytes")
        if process.returncode:
            raise ConfigurationError(f"{plugin.where}: {plugin.command!r} ended with status {process.returncode}{said}")
        return out


class _Tail:
    """The first bytes of a stream; the rest is read and dropped, so that the program can end."""

    def __init__(self, limit: int) -> None:
        self.text = b""
        self._limit = limit

    async def take(self, stream: ByteReceiveStream | None) -> None:
        if stream is not None:
            async for chunk in stream:
                self.text += chunk[: self._limit - len(self.text)]


async def _talk(process: Process, printed: tuple[_Tail, _Tail]) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(printed[0].take, process.stdout)
        group.start_soon(printed[1].take, process.stderr)
    await process.wait()


async def _end(process: Process) -> None:
    """Leave no process behind, however the wait for it ended."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    with anyio.CancelScope(shield=True):
        await process.aclose()


def parse_credential(data: bytes, plugin: Plugin) -> tuple[Identity, float | None]:
    """What a plugin printed: the credentials, and when they expire (seconds since the epoch) if it said so.

    Raises:
        ConfigurationError: It is no ``ExecCredential`` of the version that was asked for, or has nothing in it.
    """

    def wrong(problem: str) -> ConfigurationError:
        return ConfigurationError(f"{plugin.where}: {plugin.command!r} printed no credentials: {problem}")

    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise wrong(f"not JSON: {shown(str(error))}") from error
    if not isinstance(content, dict) or content.get("kind") != "ExecCredential":
        raise wrong("expected an object of kind ExecCredential")
    if content.get("apiVersion") != plugin.version:
        raise wrong(f"apiVersion is {shown(str(content.get('apiVersion')))!r}, and {plugin.version} was asked for")
    status = content.get("status")
    if not isinstance(status, dict):
        raise wrong("it has no status")
    parts = [status.get(key) or "" for key in ("token", "clientCertificateData", "clientKeyData")]
    if not all(isinstance(part, str) for part in parts):
        raise wrong("token, clientCertificateData and clientKeyData must be text")
    token, certificate, key = (part.strip() for part in parts)
    if bool(certificate) != bool(key):
        raise wrong("clientCertificateData and clientKeyData come together or not at all")
    if not (token or certificate):
        raise wrong("its status has neither a token nor a client certificate")
    identity = Identity(bearer(token, repr(plugin.command)) if token else "", certificate.encode(), key.encode())
    expires = status.get("expirationTimestamp")
    return identity, None if expires is None else _moment(expires, wrong)


def _moment(text: object, wrong: Callable[[str], ConfigurationError]) -> float:
    try:
        moment = datetime.fromisoformat(str(text))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()  # noqa: UP017 - 3.11 on
    except (ValueError, OverflowError) as error:
        raise wrong(f"expirationTimestamp is {shown(str(text))!r}; expected RFC 3339") from error


def bearer(token: str, source: str) -> str:
    """The header for a token.

    Raises:
        ConfigurationError: It could not stand in a header, so it is no token.
    """
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ConfigurationError(f"{source} holds no token: expected one line of printable ASCII")
    return f"Bearer {token}"


_runners: RunVar[dict[Plugin, PluginRunner]] = RunVar("meshlib_kubernetes_plugins")


def runner_of(plugin: Plugin, environ: Mapping[str, str]) -> PluginRunner:
    """The one runner of this plugin on this event loop."""
    runners = _runners.get(None)
    if runners is None:
        runners = {}
        _runners.set(runners)
    return runners.setdefault(plugin, PluginRunner(plugin, environ))
