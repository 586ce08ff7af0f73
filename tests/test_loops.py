"""A client belongs to the event loop that it was first used on, and says so on another."""

from __future__ import annotations

import time
from typing import Any

import anyio
import pytest

from meshlib import ConfigurationError, mux

LOOPS: list[dict[str, Any]] = [
    {"backend": "asyncio"},
    {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    {"backend": "trio"},
]


async def echo(request: mux.Request) -> mux.Response:
    return mux.Response(request.body)


@pytest.mark.parametrize("second", LOOPS, ids=["asyncio", "uvloop", "trio"])
@pytest.mark.parametrize("first", LOOPS, ids=["asyncio", "uvloop", "trio"])
def test_a_client_left_open_is_told_apart_on_the_next_loop_and_can_be_closed_there(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    made = []

    async def one() -> None:
        async with mux.serve(echo, "127.0.0.1:0") as server:
            made.append(mux.client(server.address))
            assert (await made[0](mux.Request(b"x"))).body == b"x"

    async def two() -> None:
        began = time.monotonic()
        with pytest.raises(ConfigurationError, match="make one for each event loop"):
            await made[0](mux.Request(b"x"))
        assert time.monotonic() - began < 2.5, "it does not wait for what cannot come"
        await made[0].aclose()

    anyio.run(one, **first)
    anyio.run(two, **second)
