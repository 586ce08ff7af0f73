"""Streams in memory behave as sockets do."""

from __future__ import annotations

import anyio
import pytest

from meshlib.testing import duplex, run_virtual


async def test_bytes_arrive_in_order_in_chunks_and_then_the_end() -> None:
    a, b = duplex()
    b.chunk = 3
    await a.send(b"hello")
    await a.send_eof()
    assert [await b.receive(), await b.receive(2)] == [b"hel", b"lo"]
    with pytest.raises(anyio.EndOfStream):
        await b.receive()
    await b.send(b"still open")
    assert await a.receive() == b"still open"


async def test_a_full_stream_makes_the_sender_wait_until_somebody_reads() -> None:
    a, b = duplex(capacity=4)
    with anyio.move_on_after(0.01) as scope:
        await a.send(b"123456")
    assert scope.cancelled_caught
    assert b.unread == 4, "what there was room for has gone"
    async with anyio.create_task_group() as group:
        group.start_soon(a.send, b"78")
        assert await b.receive() == b"1234"
        assert await b.receive() == b"78"


@pytest.mark.parametrize("end", ["aclose", "cut"])
async def test_the_end_is_told_to_whoever_waits(end: str) -> None:
    a, b = duplex()
    seen: list[type[BaseException]] = []

    async def read() -> None:
        try:
            await b.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
            seen.append(type(error))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        if end == "aclose":
            await a.aclose()
        else:
            a.cut()
    assert seen == [anyio.EndOfStream if end == "aclose" else anyio.BrokenResourceError]
    with pytest.raises(anyio.BrokenResourceError):
        await b.send(b"x")


def test_latency_delays_and_never_reorders() -> None:
    async def exchange() -> None:
        waits = iter((1.0, 0.2, 0.2))
        a, b = duplex(latency=lambda: next(waits))
        await a.send(b"late")
        await anyio.sleep(0.1)
        await a.send(b"early")
        assert b.unread == 0
        assert await b.receive() == b"lateearly", "the second waits behind the first, as in TCP"
        assert anyio.current_time() == pytest.approx(1.0)
        await a.send(b"x")
        await a.aclose()
        assert await b.receive() == b"x", "what was sent before the end arrives before the end"
        with pytest.raises(anyio.EndOfStream):
            await b.receive()

    run_virtual(exchange)


def test_a_dark_stream_delivers_nothing_until_it_is_light_again() -> None:
    async def exchange() -> None:
        a, b = duplex()
        a.hold()
        await a.send(b"x")
        with anyio.move_on_after(100) as scope:
            await b.receive()
        assert scope.cancelled_caught
        a.hold(False)
        assert await b.receive() == b"x"

    run_virtual(exchange)


def test_what_is_under_way_counts_against_the_capacity() -> None:
    async def exchange() -> None:
        a, b = duplex(capacity=4, latency=lambda: 1.0)
        with anyio.move_on_after(0.5) as scope:
            await a.send(b"123456")
        assert scope.cancelled_caught
        assert await b.receive() == b"1234"

    run_virtual(exchange)
