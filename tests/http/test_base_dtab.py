"""A base Dtab that is not known yet: how long a request waits for it, and how it fails. In virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import httpx
import pytest

import meshlib
from meshlib import http, timeout
from meshlib.names.sources import FileTexts
from meshlib.testing import run_virtual


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """What the source says, and after how many seconds; nothing, for as long as it is empty."""
    says: list[tuple[float, str]] = []

    async def texts(self: FileTexts, target: Any) -> AsyncIterator[str]:
        for seconds, text in says:
            await anyio.sleep(seconds)
            yield text
        await anyio.sleep_forever()

    monkeypatch.setattr(FileTexts, "texts", texts)
    return says


def played(play: Callable[[Any], Awaitable[None]], *layers: Any) -> None:
    """``await play(transport)`` in virtual time."""

    async def main() -> None:
        async with http.Transport(meshlib.base_dtab("file:///etc/mesh/dtab"), *layers) as transport:
            await play(transport)

    run_virtual(main)


async def ask(transport: Any, connect: float | None = None) -> tuple[Exception, float]:
    """What comes of a request, and after how many seconds."""
    request = httpx.Request("GET", "http://users/", extensions={"timeout": {"connect": connect}})
    began = anyio.current_time()
    with pytest.raises(httpx.TransportError) as caught:
        await transport.handle_async_request(request)
    return caught.value, anyio.current_time() - began


def test_it_is_waited_for_as_long_as_for_an_endpoint_and_once(say):
    async def play(transport):
        for seconds in (3.0, 0.0, 0.0):
            error, took = await ask(transport)
            assert (type(error).__name__, took) == ("ConnectError", pytest.approx(seconds))
            assert isinstance(error, meshlib.ResolutionError)
            assert "there is no base Dtab yet: file:///etc/mesh/dtab" in str(error)
        assert transport.clients == ()  # DNS is not asked either: the host may be a name

    played(play)


def test_those_who_come_later_wait_no_longer_than_the_first(say):
    async def play(transport):
        async with anyio.create_task_group() as group:
            group.start_soon(ask, transport)
            await anyio.sleep(2)
            assert (await ask(transport))[1] == pytest.approx(1.0)

    played(play)


def test_a_request_that_is_less_patient_fails_sooner(say):
    async def play(transport):
        error, took = await ask(transport, connect=0.2)
        assert (type(error).__name__, took) == ("ConnectTimeout", pytest.approx(0.2))

    played(play)


@pytest.mark.parametrize("way", ["deadline", "timeout"])
def test_nobody_waits_longer_than_there_is_time(say, way):
    async def play(transport):
        if way == "deadline":
            with meshlib.deadline(0.2):
                error, took = await ask(transport)
        else:
            error, took = await ask(transport)
        assert isinstance(error, meshlib.DeadlineExceeded)
        assert "the base Dtab file:///etc/mesh/dtab" in str(error)
        assert took == pytest.approx(0.2)

    played(play, *[timeout(0.2)] * (way == "timeout"))


def test_once_it_has_been_read_the_name_is_what_it_says(say):
    say += [(2.0, "/s/users => 127.0.0.1:1"), (5.0, "/s/others => 127.0.0.1:1")]

    async def play(transport):
        _, took = await ask(transport, connect=2.5)
        assert took >= 2.0
        assert [client.env.name for client in transport.clients] == ["/s/users"]

    played(play)


def test_a_transport_that_is_closed_meanwhile_sends_nothing(say):
    async def play(transport):
        outcomes = []

        async def one():
            outcomes.append(await ask(transport))

        async with anyio.create_task_group() as group:
            group.start_soon(one)
            await anyio.sleep(0.5)
            await transport.aclose()
        [(error, took)] = outcomes
        assert isinstance(error, meshlib.ServiceClosed)
        assert took == pytest.approx(0.5)
        assert transport.clients == ()

    played(play)
