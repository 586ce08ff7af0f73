"""Traps that others have fallen into, each by its number in the list that the project keeps of them."""

import statistics

import anyio
import pytest
import tenacity

import meshlib
from meshlib import mux
from meshlib.core.context import current
from meshlib.filters.budget import RetryBudget
from meshlib.filters.hedge import hedge
from meshlib.filters.retry import retry
from meshlib.mux import Request, Response
from meshlib.testing import Network, run_virtual
from tests.filters.test_hedge import Bench

SAFE = Request(idempotent=True)


@pytest.mark.parametrize("percent", range(1, 101))
def test_trap_1_a_share_is_not_rounded_to_a_whole_number_of_requests(percent):
    """Tower: 1/0.3 is truncated to 3 requests a retry, which makes 33 % of 30 %, and 100 % of 70 %."""
    budget = RetryBudget(percent / 100, 0)
    budget.deposit(0.0, 10_000)
    paid = 0
    while budget.try_withdraw(0.0):
        paid += 1
    assert paid == pytest.approx(percent * 100, rel=0.001, abs=1)


def test_trap_2_an_error_does_not_win_the_race():
    """Tower: whichever of the two is done first is returned, be it an error."""
    bench = Bench()
    assert bench.call((0.2, "good"), (0.01, meshlib.RemoteError("quick"))) == "good"
    bench = Bench()
    assert bench.call((0.15, meshlib.RemoteError("quick")), (0.2, "good")) == "good"


def test_trap_6_retries_stay_under_a_budget_and_are_jittered_without_being_told():
    """Polly and resilience4j: no budget at all, and Polly waits for 2 s each time."""
    tries, times = 0, []

    async def main():
        nonlocal tries

        @retry(3, on=OSError)
        async def work():
            nonlocal tries
            tries += 1
            times.append(anyio.current_time())
            raise OSError("away")

        async def one():
            with pytest.raises(OSError, match="away"):
                await work()

        async with anyio.create_task_group() as group:
            for _ in range(500):
                group.start_soon(one)

    run_virtual(main)
    assert tries == 500 + 100
    waits = [time for time in times if time > 0]
    assert len(set(waits)) > 50
    assert statistics.stdev(waits) > 0.001


def test_trap_7_the_loser_of_a_hedge_is_cancelled():
    """Kitex leaves it running."""
    for script in (((5, "slow"), (0.01, "quick")), ((0.15, "first"), (5, "slow"))):
        bench = Bench()
        bench.call(*script)
        assert sorted(bench.outcomes) == ["answered", "cancelled"]


@pytest.mark.parametrize("layers", [(retry(3, wait=0),), (hedge(0.5), retry(1))], ids=["retry", "hedge"])
def test_trap_11_each_try_has_the_less_of_its_own_limit_and_what_is_left(layers):
    """A retry or hedge around a timeout per try must not use up one deadline in the first try, nor outlive the call."""
    began = []

    async def main():
        network = Network()

        async def work(request):
            began.append((anyio.current_time(), meshlib.remaining()))
            await anyio.sleep(0.01 if request.body else 30)
            return Response()

        server = mux.serve(work, "10.0.0.1:80")
        address = network.listen(server, "10.0.0.1:80")
        async with network.client(address, meshlib.timeout(total=0.5, attempt=0.2), *layers) as client:
            for _ in range(50):
                await client(Request(b"quick", idempotent=True))
            await anyio.sleep(0.2)
            await client(Request(b"quick", idempotent=True))
            began.clear()
            started = anyio.current_time()
            with pytest.raises(meshlib.DeadlineExceeded):
                await client(SAFE)
            assert anyio.current_time() - started <= 0.52
        await server.aclose()
        return started

    started = run_virtual(main)
    assert len(began) == (3 if isinstance(layers[0], type(retry())) else 2)
    for at, left in began:
        assert left == pytest.approx(started + 0.5 - at, abs=0.01), "each try was told what is left of the whole"
    if len(began) == 3:
        assert [round(at - started, 1) for at, _ in began] == [0, 0.2, 0.4]


def test_trap_12_each_try_is_balanced_anew():
    """Below the balancer, retries would hit the same bad host again."""
    served = []

    async def main():
        network = Network()
        addresses = [f"10.0.0.{i}:80" for i in range(4)]

        def handler(address):
            async def work(request):
                served.append(address)
                raise meshlib.RemoteError("broken", retryable=True)

            return work

        servers = [mux.serve(handler(address), address) for address in addresses]
        for server, address in zip(servers, addresses, strict=True):
            network.listen(server, address)
        again = retry(4, on=meshlib.RemoteError, wait=0)
        async with network.client(",".join(addresses), again, seed=2) as client:
            with pytest.raises(meshlib.RemoteError, match="4 attempts"):
                await client(SAFE)
        for server in servers:
            await server.aclose()

    run_virtual(main)
    assert len(set(served)) == len(served) == 4


@pytest.mark.parametrize(
    "on", [tenacity.retry_if_not_exception_type(KeyError), tenacity.retry_always, lambda error: True]
)
def test_a_cancellation_is_no_failure_to_tenacitys_predicates(on):
    """tenacity's own loop retries a cancelled task (jd/tenacity#529)."""

    async def main():
        tries = []

        @retry(5, on=on, wait=0)
        async def work():
            tries.append(current().attempt)
            await anyio.sleep(10)

        with anyio.move_on_after(1) as scope:
            await work()
        return scope.cancelled_caught, tries

    assert run_virtual(main) == (True, [0])
