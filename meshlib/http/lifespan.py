"""The app's own life: begun before the first connection is accepted, and ended after the last request.

ASGI's lifespan protocol, kept by us rather than by the server below: uvicorn leaves the app's task behind when it is
ended early, and hypercorn and uvicorn differ in what they take for a failure. An app that raises before it has answered
knows no lifespan, and is served without; one that answers ``startup.failed`` is not served.
"""

from __future__ import annotations

from typing import Any

import anyio

from ..core.supervisor import Supervisor

__all__ = ["Lifespan"]


class Lifespan:
    """One app's life.

    Args:
        app: The app.
        supervisor: Where it lives.

    Attributes:
        state: What the app has left for its requests: each finds a copy in ``scope["state"]``.
    """

    def __init__(self, app: Any, supervisor: Supervisor) -> None:
        self._app, self._supervisor = app, supervisor
        self.state: dict[str, Any] = {}
        self._begun, self._ending, self._ended = anyio.Event(), anyio.Event(), anyio.Event()
        self._asked = 0
        self._failure: str | None = None
        self._answered = False

    async def begin(self) -> None:
        """Start the app.

        Raises:
            RuntimeError: It cannot start; says why, in its own words.
        """
        self._supervisor.start(self._live, name="lifespan")
        await self._begun.wait()
        if self._failure is not None:
            raise RuntimeError(self._failure or "its lifespan failed")

    async def end(self) -> None:
        """Let the app end, and wait until it has."""
        self._ending.set()
        await self._ended.wait()

    async def _live(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self._app(scope, self._receive, self._send)
        except Exception:
            if self._answered:
                raise  # the supervisor logs it
        finally:
            self._begun.set()
            self._ended.set()

    async def _receive(self) -> dict[str, Any]:
        self._asked += 1
        if self._asked == 1:
            return {"type": "lifespan.startup"}
        await self._ending.wait()
        if self._asked > 2:
            await anyio.sleep_forever()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Any) -> None:
        kind, _, outcome = message["type"].removeprefix("lifespan.").partition(".")
        self._answered = True
        if kind == "startup":
            if outcome == "failed":
                self._failure = message.get("message", "")
            self._begun.set()
        else:
            self._ended.set()
