"""One clock: real on asyncio and uvloop, trio's own on trio, and so virtual when trio's is."""

import subprocess
import sys
import time

import anyio
import pytest

from meshlib.core.clock import Clock, loop_time
from meshlib.core.context import CLOCK, deadline, remaining
from meshlib.testing import run_virtual


def test_under_a_mock_clock_an_hour_passes_at_once():
    async def main():
        clock = Clock()
        started, real = clock.now(), time.monotonic()
        await anyio.sleep(3600)
        assert clock.now() - started == pytest.approx(3600)
        assert time.monotonic() - real < 60

    run_virtual(main)


def test_deadlines_are_virtual_too():
    async def main():
        with deadline(100):
            await anyio.sleep(30)
            assert remaining() == pytest.approx(70)

    run_virtual(main)


async def test_it_goes_on_with_the_event_loop():
    clock = Clock()
    first = clock.now()
    await anyio.sleep(0.001)
    assert clock.now() > first


def test_it_can_be_given():
    times = iter([1.0, 2.5])
    clock = Clock(now=lambda: next(times), epoch_ns=lambda: 7)
    assert (clock.now(), clock.now(), clock.epoch_ns()) == (1.0, 2.5, 7)


def test_reading_it_outside_an_event_loop_decides_nothing():
    clock = Clock()
    clock.now()

    async def main():
        before = clock.now()
        await anyio.sleep(1000)
        return clock.now() - before

    assert run_virtual(main) == pytest.approx(1000)


def test_the_time_of_the_loop_is_asked_of_whichever_loop_runs():
    clock = Clock(loop_time)

    async def main():
        before = clock.now()
        await anyio.sleep(1000)
        return clock.now() - before

    assert abs(anyio.run(_now, clock, backend="asyncio") - time.monotonic()) < 60
    assert run_virtual(main) == pytest.approx(1000)
    assert abs(anyio.run(_now, clock, backend="asyncio") - time.monotonic()) < 60


async def _now(clock):
    return clock.now()


def test_one_process_may_run_one_kind_of_loop_after_another():
    program = """
import anyio, trio, meshlib
async def main():
    with meshlib.deadline(5):
        assert 0 < meshlib.remaining() <= 5
for backend in ("trio", "asyncio", "trio"):
    anyio.run(main, backend=backend)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=50)


def test_it_prints_where_its_time_comes_from():
    assert repr(Clock(now=time.monotonic)) == "Clock(now=monotonic)"
    assert "Clock(now=" in repr(CLOCK)
