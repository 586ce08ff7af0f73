"""Credentials: what a user of a kubeconfig, or a pod's service account, shows to the API server.

Credentials change while a process lives. The kubelet writes a new token into a pod's file long before the old one ends
(every 48 minutes by default), certificates are renewed in place, and plugins print new ones when asked. So files are
read again at each request: one small read in a worker thread for a request every few minutes. If such a read fails, the
last good credentials are used once more; the API server will say when they are no longer good.

Of several ways to prove who one is, the first counts, in client-go's order: a token's file, a token, a plugin, a user
and password. A client certificate goes along with any of them.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping
from pathlib import Path

import anyio.to_thread

from ...core.errors import ConfigurationError
from .entries import User, read_file
from .plugin import Identity, PluginRunner, bearer, runner_of

__all__ = ["Credentials"]

logger = logging.getLogger("meshlib.names")

LARGEST = 1024 * 1024


class Credentials:
    """What ``user`` shows.

    Args:
        user: Who.
        environ: The environment of plugins.
    """

    def __init__(self, user: User, environ: Mapping[str, str]) -> None:
        self.user = user
        self._environ = environ
        self._files: tuple[str, bytes, bytes] | None = None
        self._problem = ""

    @property
    def _plugin(self) -> PluginRunner | None:
        user = self.user
        if user.plugin is None or user.token_file or user.token:
            return None
        return runner_of(user.plugin, self._environ)

    @property
    def certificates_change(self) -> bool:
        """May there be another client certificate tomorrow?"""
        return isinstance(self.user.certificate, Path) or isinstance(self.user.key, Path) or self._plugin is not None

    async def identity(self) -> Identity:
        """What to show now.

        Raises:
            ConfigurationError: A file or a plugin has nothing to show, and never had.
        """
        user = self.user
        try:
            self._files = await anyio.to_thread.run_sync(self._read)
            self._problem = ""
        except ConfigurationError as error:
            if self._files is None:
                raise
            if str(error) != self._problem:
                logger.warning("%s; using what it held before", error)
            self._problem = str(error)
        authorization, certificate, key = self._files
        plugin = self._plugin
        if plugin is not None:
            printed = await plugin.identity()
            return Identity(printed.authorization, printed.certificate or certificate, printed.key or key)
        if not authorization and user.basic is not None:
            authorization = "Basic " + base64.b64encode(":".join(user.basic).encode()).decode("ascii")
        return Identity(authorization, certificate, key)

    def forget(self, identity: Identity | None = None) -> None:
        """The API server did not accept it: nothing that was kept is used again, and plugins run anew."""
        self._files = None
        plugin = self._plugin
        if plugin is not None:
            plugin.forget(identity)

    def _read(self) -> tuple[str, bytes, bytes]:
        user = self.user
        authorization = bearer(user.token, f"{user.where}: token") if user.token else ""
        if user.token_file is not None:
            text = read_file(user.token_file, f"{user.where}: tokenFile", LARGEST).decode("utf-8", "replace")
            authorization = bearer(text.strip(), f"{user.where}: tokenFile: {user.token_file}")
        return authorization, self._pem(user.certificate, "certificate"), self._pem(user.key, "key")

    def _pem(self, source: bytes | Path | None, kind: str) -> bytes:
        if isinstance(source, Path):
            return read_file(source, f"{self.user.where}: client-{kind}", LARGEST)
        return source or b""
