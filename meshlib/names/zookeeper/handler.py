"""How kazoo runs here: its threads, its sockets and its words, fitted to a process with an event loop.

kazoo's `SequentialThreadingHandler` makes every thread and socket of a client. This one differs in what an event loop
and an operator need:

* A request is announced to kazoo's connection thread by a byte in a pipe. While that thread connects, nobody reads
  the pipe; after some 280 bytes a blocking one would block whoever sends, which is the event loop. This pipe never
  blocks: what does not fit fails at once.
* A connect takes a second at most, so that one host that swallows packets does not hold up the others.
* TLS verifies the server's certificate and its name, against ``ca`` alone where that is given (kazoo trusts the
  system's authorities too, and does not look at names by default).
* The last failure to connect is kept, for those who ask why there is no connection.

kazoo warns at each attempt to connect. `Session` says once what is the matter; all of kazoo's lines are there at DEBUG.
"""

from __future__ import annotations

import logging
import socket
import ssl
from typing import Any, Final

from kazoo.handlers.threading import SequentialThreadingHandler

from .place import Ensemble

__all__ = ["Handler", "Secret", "quiet_logger"]

CONNECT: Final = 1.0
"""Seconds for a TCP connection, and for each step of TLS, as in the rest of the library."""
QUIET: Final = 60.0
"""Seconds until kazoo may report an error of the same kind again."""

_logger = logging.getLogger("meshlib.names.zookeeper.kazoo")


class Secret(str):
    """Text that is sent and never shown: kazoo logs each request's ``repr``, that of the authentication included."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'…'"


class Handler(SequentialThreadingHandler):  # type: ignore[misc]  # kazoo has no types
    """Threads and sockets for one client."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self._ensemble = ensemble
        self.problem = ""

    def create_socket_pair(self) -> Any:
        """The pipe to the connection thread, which cannot block those who write to it."""
        reader, writer = super().create_socket_pair()
        writer.setblocking(False)
        return reader, writer

    def create_connection(self, address: tuple[str, int], hostname: str | None = None, **options: Any) -> Any:
        """A connection to one server.

        Raises:
            OSError: There is none; kazoo goes on to the next server.
        """
        try:
            sock = socket.create_connection(address, min(options.get("timeout") or CONNECT, CONNECT))
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if options.get("use_ssl"):
                    sock = _context(self._ensemble).wrap_socket(sock, server_hostname=hostname)
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            self.problem = f"{address[0]}:{address[1]}: {error.strerror or error}"
            raise
        return sock


def _context(ensemble: Ensemble) -> ssl.SSLContext:
    """Made for each connection: files are read anew, so that certificates can be rotated."""
    context = ssl.create_default_context(cafile=ensemble.ca or None)
    if ensemble.cert:
        context.load_cert_chain(ensemble.cert, ensemble.key or None)
    return context


class _Calm(logging.Filter):
    """Each kind of error once in a while, all else when somebody debugs."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if _logger.isEnabledFor(logging.DEBUG):
            return True
        said = str(record.msg)
        if record.levelno < logging.ERROR or record.created < self._last.get(said, 0.0) + QUIET:
            return False
        self._last[said] = record.created  # kazoo's messages are some twenty templates
        return True


def quiet_logger() -> logging.Logger:
    """The logger for kazoo."""
    if not any(isinstance(each, _Calm) for each in _logger.filters):
        _logger.addFilter(_Calm())
    return _logger
