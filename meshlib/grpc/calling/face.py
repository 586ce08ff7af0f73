"""What a client of another shape shows of the `Client` below it: its life, and what can be seen of it.

`Channel` and `RpcClient` are called in ways of their own; begun, watched and closed they are as any client.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio

from ...balancing.node import Node
from ...client import Client
from ...core.env import Env
from ...core.events import Decisions
from ...core.service import Status

if TYPE_CHECKING:
    from ...names.delegation import Delegation

__all__ = ["Face"]


class Face:
    """See the module.

    Attributes:
        client: What is below.
    """

    client: Client[Any, Any]

    @property
    def env(self) -> Env:
        """Its label, name and the rest."""
        return self.client.env

    def start(self) -> None:
        """Begin to resolve the target. Needs a running event loop; the first call does it as well."""
        self.client.start()

    async def aclose(self) -> None:
        """Close every connection, and wait until that is done. Calls under way fail; twice is the same as once."""
        with anyio.CancelScope(shield=True):
            await self.client.aclose()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def status(self) -> Status:
        """Closed, or the best of its endpoints' statuses."""
        return self.client.status

    @property
    def events(self) -> Decisions:
        """What its layers decide, and why: ``channel.events.listen(print)``."""
        return self.client.events

    @property
    def endpoints(self) -> tuple[Node, ...]:
        """Its endpoints; each prints its status, the reason for it, and its load."""
        return self.client.endpoints

    def metrics(self) -> dict[str, float]:
        """Every number it keeps, by name."""
        return self.client.metrics()

    async def delegate(self) -> Delegation:
        """Where a call made here and now would go, and why; see `meshlib.delegate`."""
        return await self.client.delegate()

    def __repr__(self) -> str:
        return repr(self.client)
