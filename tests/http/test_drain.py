"""SIGTERM, as several that listen for it in one process pass it on."""

from __future__ import annotations

import signal

import anyio
import anyio.lowlevel
import pytest

from meshlib.http import Middleware
from meshlib.http.drain import SignalWatch

from .test_middleware import Client, answer

pytestmark = pytest.mark.anyio


@pytest.fixture
def heard():
    """What the server's own handler has heard."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, before)


async def test_the_first_that_ends_takes_no_signal_with_it(heard):
    told = []
    first, second, third = (SignalWatch(lambda name=name: told.append(name)) for name in "abc")
    first.start()
    second.start()
    first.stop()  # before the one that took the place after it
    assert not first.watching
    signal.raise_signal(signal.SIGTERM)
    with anyio.fail_after(30):
        while not told:
            await anyio.lowlevel.checkpoint()
    assert (told, heard) == (["b"], [])
    second.pass_on()
    assert len(heard) == 1
    signal.raise_signal(signal.SIGTERM)
    assert len(heard) == 2
    first.start()
    third.start()
    first.stop()
    first.start()  # above one that stands above where it was
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # a second goes on at once, to the next
    signal.raise_signal(signal.SIGTERM)
    assert len(heard) == 3
    assert not first.watching
    assert not third.watching
    signal.raise_signal(signal.SIGTERM)
    assert len(heard) == 4


async def test_it_knows_whether_anybody_else_listens(heard):
    below, above = SignalWatch(print), SignalWatch(print)
    below.start()
    above.start()
    assert not above.alone
    below.stop()
    above.stop()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    below.start()
    above.start()
    assert above.alone
    below.stop()
    assert above.alone
    above.stop()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("alone", [True, False])
async def test_where_nobody_else_listens_the_signal_waits_for_what_is_under_way(alone, heard, monkeypatch):
    monkeypatch.setattr(SignalWatch, "alone", property(lambda self: alone))
    inside, go, order = anyio.Event(), anyio.Event(), []
    monkeypatch.setattr(SignalWatch, "pass_on", lambda self: order.append("passed on"))

    async def app(scope, receive, send):
        inside.set()
        await go.wait()
        await answer(send)
        order.append("answered")

    middleware = Middleware(app, linger=0)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(Client(middleware).run)
            await inside.wait()
            signal.raise_signal(signal.SIGTERM)
            with anyio.fail_after(30):
                while not middleware.draining or (not alone and not order):  # noqa: ASYNC110 - it tells nobody
                    await anyio.sleep(0.001)
            await anyio.sleep(0.02)
            go.set()
        with anyio.fail_after(30):
            await middleware.env.supervisor.join()
    finally:
        middleware._signals.stop()
    assert order == (["answered", "passed on"] if alone else ["passed on", "answered"])
