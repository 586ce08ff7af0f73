"""Sockets that are bound before anybody serves on them, so that the address is known, and known to be free."""

from __future__ import annotations

import socket
from pathlib import Path

import anyio

__all__ = ["bind"]

BACKLOG = 2048
"""Connections that wait to be accepted: uvicorn's default."""


async def bind(unix: str, host: str, port: int) -> tuple[list[socket.socket], str]:
    """Bind and listen; every address that the host has, on one port.

    Args:
        unix: The path of a Unix socket; empty for TCP. A socket that is there already is replaced.
        host: A name or an address; empty for all.
        port: 0 for a free one.

    Returns:
        The sockets, not blocking, and the address: ``host:port`` or ``unix:///path``.

    Raises:
        OSError: It cannot be bound.
    """
    if unix:
        return [await anyio.to_thread.run_sync(_unix, unix)], f"unix://{unix}"
    found = await anyio.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, number, _, place in dict.fromkeys(found):
            bound = socket.socket(family, kind, number)
            sockets.append(bound)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind((place[0], port, *place[2:]))
            port = port or bound.getsockname()[1]
            bound.setblocking(False)
            bound.listen(BACKLOG)
    except BaseException:
        for each in sockets:
            each.close()
        raise
    name, number = sockets[0].getsockname()[:2]
    return sockets, f"[{name}]:{number}" if ":" in name else f"{name}:{number}"


def _unix(path: str) -> socket.socket:
    bound, file = socket.socket(socket.AF_UNIX), Path(path)
    try:
        if file.is_socket():
            file.unlink()
        bound.bind(path)
        bound.setblocking(False)
        bound.listen(BACKLOG)
    except BaseException:
        bound.close()
        raise
    return bound
