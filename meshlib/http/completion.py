"""Layers that are done with a request when its response is complete, though the app may go on.

What an app does after its response (background tasks, above all) is part of the same ASGI call. It is no part of the
request: in latency it would be the caller's who has long had the answer, and a failure in it is none of the answer's.
So whoever records a request does so when the response is complete, and does not look at what comes after.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Generator
from typing import Any

from ..core.env import Env
from ..core.service import Service
from ..core.stack import Layer

__all__ = ["Early"]


@types.coroutine
def _in_suspense(request: Any) -> Generator[None, Any, Any]:
    return (yield)


class Early:
    """A layer that is told of the reply as soon as the response is complete.

    Args:
        layer: A layer that looks on: it waits for nothing but what is below it, and passes on what comes of that.
    """

    def __init__(self, layer: Layer) -> None:
        self.place = layer.place
        self._layer = layer

    def build(self, env: Env, below: Any, /) -> Any:
        """The layer stands beside what is below it, and not around it."""
        return functools.partial(_look_on, self._layer.build(env, _in_suspense), below)

    def __repr__(self) -> str:
        return repr(self._layer)


async def _look_on(layer: Callable[[Any], Any], below: Service[Any, Any], request: Any) -> Any:
    # The layer's coroutine waits where the service would be, and is told by hand what has come of it.
    account = layer(request)
    account.send(None)
    done = False

    def tell() -> None:
        nonlocal done
        if not done:
            done = True
            try:
                account.send(request)
            except StopIteration:
                pass
            else:
                raise RuntimeError(f"{layer!r} waits for something: it cannot be told of a reply early")

    request.on_complete(tell)
    try:
        reply = await below(request)
    except BaseException as error:
        if not done:
            done = True
            account.throw(error)
        raise
    tell()
    return reply
