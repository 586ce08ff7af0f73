"""The things compared, each a module with the same two halves: a server to call and a client that calls it.

A subject is imported by name, in the process that runs it: no process pays for a library it does not measure, and a
library that is not installed costs one subject rather than the run.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, TypeAlias, cast

Call: TypeAlias = Callable[[bytes], Awaitable[bytes]]
Ready: TypeAlias = Callable[[str], None]


class Subject(Protocol):
    """What every module of this package offers."""

    async def serve(self, ready: Ready) -> None:
        """Echo every body until cancelled; ``ready`` is told the address once calls are accepted."""

    def connect(self, address: str) -> AbstractAsyncContextManager[Call]:
        """One client of the server at ``address``; entering it gives the function that makes a call."""


@dataclass(frozen=True, slots=True)
class Entry:
    """How a subject is named in options (``key``), in reports (``title``), and whose version matters (``package``)."""

    key: str
    title: str
    module: str
    package: str


ENTRIES = (
    Entry("raw", "raw anyio frames", "raw", "anyio"),
    Entry("mux", "meshlib mux", "meshlib_mux", "meshlib"),
    Entry("rpc", "meshlib typed rpc", "meshlib_rpc", "meshlib"),
    Entry("grpcio", "grpcio.aio", "grpcio_aio", "grpcio"),
    Entry("grpclib", "grpclib", "grpclib_unary", "grpclib"),
)

#: The subjects every other one is divided by.
REFERENCES = ("raw", "grpcio", "grpclib")

TITLES = {entry.key: entry.title for entry in ENTRIES}


def load(key: str) -> Subject:
    """Import the subject called ``key``."""
    module = next(entry.module for entry in ENTRIES if entry.key == key)
    return cast("Subject", import_module(f"{__name__}.{module}"))
