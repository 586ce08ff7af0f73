"""One deadline, two ways: around a block it binds the calls made there, as a filter it also stops waiting."""

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.client import Client
from meshlib.core.context import current, remaining
from meshlib.core.errors import ConfigurationError, DeadlineExceeded
from meshlib.filters.deadline import deadline
from meshlib.filters.timeout import TotalTimeout
from meshlib.testing import Network, run_virtual


async def sleeper(seconds):
    await anyio.sleep(seconds)
    return remaining()


def test_around_a_block_it_binds_the_calls_and_does_not_interrupt_the_code():
    async def main():
        with deadline(0.25) as inner:
            assert current() is inner
            assert remaining() == pytest.approx(0.25)
            await anyio.sleep(1)
            assert remaining() == pytest.approx(-0.75)
        assert remaining() is None

    run_virtual(main)


def test_the_nearer_one_wins_and_the_outer_comes_back():
    async def main():
        with deadline(1):
            with deadline(5):
                assert remaining() == pytest.approx(1)
                with deadline(0.5):
                    assert remaining() == pytest.approx(0.5)
                assert remaining() == pytest.approx(1)
            assert remaining() == pytest.approx(1)
        assert current().deadline is None

    run_virtual(main)


def test_many_tasks_may_be_in_blocks_of_one_value_and_leave_them_in_any_order():
    async def main():
        half = deadline(0.5)

        async def one(wait, stay):
            await anyio.sleep(wait)
            with half:
                assert remaining() == pytest.approx(0.5)
                with half:
                    await anyio.sleep(stay)
                assert remaining() == pytest.approx(0.5 - stay)
            assert remaining() is None

        async with anyio.create_task_group() as group:
            for wait, stay in ((0, 0.3), (0.1, 0.1), (0.2, 0.4)):
                group.start_soon(one, wait, stay)

    run_virtual(main)


def test_it_is_taken_back_when_the_block_raises_and_swallows_nothing():
    with pytest.raises(KeyError), deadline(1):
        raise KeyError
    assert current().deadline is None


@pytest.mark.parametrize("way", ["decorator", "composed"])
def test_as_a_filter_it_ends_what_takes_too_long(way):
    async def main():
        service = deadline(0.25)(sleeper) if way == "decorator" else deadline(0.25) >> sleeper
        assert await service(0.1) == pytest.approx(0.15)
        started = anyio.current_time()
        with pytest.raises(DeadlineExceeded, match=r"no reply within the deadline of 0\.25 s"):
            await service(5)
        assert anyio.current_time() - started == pytest.approx(0.25)
        with deadline(0.1), pytest.raises(DeadlineExceeded, match="inherited deadline passed"):
            await service(5)

    run_virtual(main)


def test_as_a_layer_it_bounds_the_calls_of_a_client_and_its_servers_see_it():
    seen = []

    async def work(request):
        seen.append(remaining())
        await anyio.sleep(float(request.body))
        return mux.Response()

    async def main():
        network = Network()
        server = mux.serve(work, "10.0.0.1:80")
        address = network.listen(server, "10.0.0.1:80")
        async with network.client(address, deadline(0.5)) as client:
            await client(mux.Request(b"0.1"))
            assert client.stack.find("timeout") is not None
            started = anyio.current_time()
            late = r"no reply within the deadline of 0\.5 s \[client"
            with pytest.raises(DeadlineExceeded, match=late):
                await client(mux.Request(b"5"))
            assert 0.5 <= anyio.current_time() - started <= 0.52
        await server.aclose()
        assert isinstance(client, Client)

    run_virtual(main)
    assert all(0.45 < left <= 0.5 for left in seen)


def test_it_is_a_timeout_among_the_filters():
    assert isinstance(deadline(1), TotalTimeout)
    assert deadline(1).place == "filters"
    assert repr(deadline(0.25)) == "deadline(0.25 s)"
    assert meshlib.deadline is deadline


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), 1e9, "1", None, True])
def test_what_is_no_time_is_told_at_construction(wrong):
    with pytest.raises(ConfigurationError, match="give the seconds that are left, a number above 0"):
        deadline(wrong)
