"""Logical names: which cluster a call goes to, while targets come, go and break; and the clusters that are kept."""

import contextlib
import functools
from collections import Counter

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.core.context import current, use
from meshlib.names.addr import Failed, Neg, Pending
from meshlib.names.bind import Binding
from meshlib.names.binder import PATIENCE, TREES
from meshlib.names.clusters import IDLE, MOST, SWEEP
from meshlib.names.walk import GRACE
from meshlib.server import Server
from meshlib.testing import Network, run_virtual


def virtual(test):
    """Run an async test of a network in virtual time."""

    @functools.wraps(test)
    def run():
        async def main():
            network = Network(wire="direct")
            try:
                await test(network)
            finally:
                for server in tuple(network.servers.values()):
                    await server.aclose(grace=0)

        run_virtual(main, seed=1)

    del run.__wrapped__  # or its parameter would be taken for a fixture
    return run


def serve(network, *names):
    """A server for each name ``memory://name``, which answers with the name."""
    for name in names:
        n = len(network.servers) + 1

        async def answer(request, name=name):
            return mux.Response(name.encode())

        address = f"10.0.0.{n}:80"
        network.listen(Server(answer, address, network.acceptor, seed=n), address)
        network.name(name, [address])


async def call(client, body=b"x"):
    return (await client(mux.Request(body, idempotent=True))).body.decode()


async def calls(client, count=1000):
    return Counter([await call(client) for _ in range(count)])


def base(text):
    return meshlib.base_dtab(text)


# --- which one --------------------------------------------------------------------------------------------------------


@virtual
async def test_a_name_leads_to_its_target_and_the_client_starts_to_resolve_before_the_first_call(network):
    serve(network, "shop/a")
    async with network.client("/s/a", base("/s => memory://shop")) as client:
        await anyio.sleep(1)
        assert client.metrics()["name/clusters"] == 1
        assert await call(client) == "shop/a"
        assert client.status is meshlib.Status.OPEN
        assert [str(node) for node in client.endpoints] == ["10.0.0.1:80"]


@virtual
async def test_shares_are_as_the_weights_say(network):
    serve(network, "a", "b", "c")
    dtab = "/s => 6 * memory://a & (1 * memory://b & 3 * memory://c)"
    async with network.client("/s", base(dtab), seed=3) as client:
        shares = await calls(client, 2000)
    for name, share in {"a": 6 / 7, "b": 1 / 7 / 4, "c": 3 / 7 / 4}.items():
        deviation = (2000 * share * (1 - share)) ** 0.5
        assert abs(shares[name] - 2000 * share) < 4 * deviation


@virtual
async def test_a_branch_without_endpoints_gives_its_share_to_the_others_until_it_has_some(network):
    serve(network, "a", "b")
    network.name("b").set([])
    async with network.client("/s", base("/s => memory://a & memory://b"), seed=3) as client:
        assert await calls(client, 50) == {"a": 50}
        network.name("b").state.set(Neg())
        assert await calls(client, 50) == {"a": 50}
        network.name("b").set(["10.0.0.2:80"])
        await anyio.sleep(1)
        assert (await calls(client, 50)).keys() == {"a", "b"}


@virtual
async def test_a_branch_of_no_weight_gets_nothing(network):
    serve(network, "a", "b")
    async with network.client("/s", base("/s => 0 * memory://a & memory://b")) as client:
        assert await calls(client, 50) == {"b": 50}
        assert client.metrics()["name/clusters"] == 1


@virtual
async def test_a_fallback_is_taken_while_there_is_no_such_name_and_left_when_there_is(network):
    serve(network, "a", "b")
    first = network.name("a")
    async with network.client("/s", base("/s => memory://a | memory://b")) as client:
        assert await call(client) == "a"
        assert client.metrics()["name/clusters"] == 1  # nobody has looked at the fallback yet
        first.state.set(Neg())
        await anyio.sleep(1)
        assert await call(client) == "b"
        first.set(["10.0.0.1:80"])
        await anyio.sleep(1)
        assert await call(client) == "a"


@virtual
async def test_there_is_no_fallback_from_what_exists_without_endpoints(network):
    serve(network, "a", "b")
    network.name("a").set([])
    async with network.client("/s", base("/s => memory://a | memory://b")) as client:
        with pytest.raises(meshlib.NoEndpoints, match="memory://a resolves to no endpoints"):
            await call(client)


@virtual
async def test_a_source_that_is_broken_is_not_taken_for_a_name_that_is_not_there(network):
    serve(network, "a", "b")
    network.name("a").state.set(Failed("on fire"))
    async with network.client("/s", base("/s => memory://a | memory://b")) as client:
        with pytest.raises(meshlib.ResolutionError, match="memory://a cannot be resolved: on fire"):
            await call(client)


@pytest.mark.parametrize(
    "dtab",
    [
        "/s => ! | memory://b",
        "/s => memory://b ; /s => !",
        "/s => (memory://a | !) | memory://b",
        "/s => memory://b ; /s => memory://a | !",
    ],
)
def test_fail_ends_the_search_even_within_another(dtab):
    @virtual
    async def test(network):
        serve(network, "a", "b")
        network.name("a").state.set(Neg())
        async with network.client("/s", base(dtab)) as client:
            with pytest.raises(meshlib.NoEndpoints, match="no such name"):
                await call(client)

    test()


@virtual
async def test_a_retry_draws_again(network):
    serve(network, "good", "bad")
    faults = []

    @meshlib.filter
    async def failing(request, service):
        reply = await service(request)
        if reply.body == b"bad":
            faults.append(1)
            raise meshlib.ConnectionLost("gone")
        return reply

    dtab = base("/s => memory://good & memory://bad")
    stack = lambda whole: whole.insert_after("bind", failing)  # noqa: E731
    async with network.client("/s", dtab, meshlib.retry(attempts=20), stack=stack, seed=8) as client:
        assert await calls(client, 50) == {"good": 50}
    assert 20 < len(faults) < 120


# --- waiting ----------------------------------------------------------------------------------------------------------


@virtual
async def test_calls_wait_until_the_first_alternative_is_known(network):
    serve(network, "a", "b")
    network.name("a").state.set(Pending())
    async with (
        network.client("/s", base("/s => memory://a | memory://b")) as client,
        anyio.create_task_group() as group,
    ):

        async def later():
            await anyio.sleep(2)
            network.name("a").state.set(Neg())

        group.start_soon(later)
        began = anyio.current_time()
        assert await call(client) == "b"
        assert 2 <= anyio.current_time() - began < 2.5


@virtual
async def test_they_do_not_wait_for_ever_and_only_the_first_ones_wait(network):
    serve(network, "a")
    network.name("a").state.set(Pending())
    async with network.client("/s", base("/s => memory://a | memory://b")) as client:
        began = anyio.current_time()
        with pytest.raises(meshlib.ResolutionError, match="/s has not been resolved within 3 s") as caught:
            await call(client)
        assert "memory://a (not resolved yet)" in str(caught.value)
        assert anyio.current_time() - began == pytest.approx(PATIENCE, abs=0.01)
        with pytest.raises(meshlib.ResolutionError):
            await call(client)
        assert anyio.current_time() - began == pytest.approx(PATIENCE, abs=0.02)
        network.name("a").set(["10.0.0.1:80"])
        await anyio.sleep(1)
        assert await call(client) == "a"


@virtual
async def test_a_request_that_is_less_patient_waits_for_as_long_as_it_says(network):
    class Hasty(mux.Request):
        patience = 0.5

    network.name("a").state.set(Pending())
    async with network.client("/s", base("/s => memory://a")) as client:
        began = anyio.current_time()
        with pytest.raises(meshlib.ResolutionError, match=r"/s has not been resolved within 0.5 s") as caught:
            await client(Hasty(b""))
        assert anyio.current_time() - began == pytest.approx(0.5, abs=0.01)
        assert caught.value.impatient


@virtual
async def test_a_call_does_not_wait_longer_than_it_may_take(network):
    network.name("a").state.set(Pending())
    async with network.client("/s", base("/s => memory://a | memory://b"), meshlib.timeout(0.5)) as client:
        began = anyio.current_time()
        with pytest.raises(meshlib.DeadlineExceeded, match="/s to be resolved"):
            await call(client)
        assert anyio.current_time() - began == pytest.approx(0.5, abs=0.02)


@virtual
async def test_a_new_union_waits_a_moment_for_all_and_then_goes_on_with_those_that_are_known(network):
    serve(network, "a", "b")
    network.name("b").state.set(Pending())
    async with network.client("/s", base("/s => memory://a & 99 * memory://b")) as client:
        began = anyio.current_time()
        assert await call(client) == "a"
        assert anyio.current_time() - began == pytest.approx(GRACE, abs=0.05)
        assert await calls(client, 20) == {"a": 20}
        assert anyio.current_time() - began == pytest.approx(GRACE, abs=0.05)


@virtual
async def test_a_branch_that_joins_a_union_in_use_makes_nobody_wait(network):
    serve(network, "a", "b")
    network.name("b").state.set(Pending())
    async with network.client("/s", base("/s => memory://a")) as client:
        await call(client)
        await anyio.sleep(2 * GRACE)
        with meshlib.dtab("/s => memory://a & 99 * memory://b"):
            began = anyio.current_time()
            assert await calls(client, 20) == {"a": 20}
            assert anyio.current_time() == began
            network.name("b").set(["10.0.0.2:80"])
            await anyio.sleep(1)
            assert (await calls(client, 20)).keys() >= {"b"}


@virtual
async def test_those_who_wait_are_told_when_the_client_closes(network):
    network.name("a").state.set(Pending())
    client = network.client("/s", base("/s => memory://a | memory://b"))
    caught = []

    async def one():
        try:
            await call(client)
        except meshlib.ServiceClosed:
            caught.append(anyio.current_time())

    async with anyio.create_task_group() as group:
        group.start_soon(one)
        await anyio.sleep(0.5)
        closed = anyio.current_time()
        await client.aclose()
    assert caught == [closed]


# --- the local Dtab ---------------------------------------------------------------------------------------------------


@virtual
async def test_a_local_dtab_overrides_the_base_for_its_calls_and_shares_the_clusters(network):
    serve(network, "a", "b")
    async with network.client("/s/x", base("/s/x => memory://a")) as client:
        assert await call(client) == "a"
        with meshlib.dtab("/s/x => memory://b"):
            assert await call(client) == "b"
            with meshlib.dtab("/s/x => memory://nowhere | memory://a"):
                network.name("nowhere").state.set(Neg())
                assert await call(client) == "a"
        assert await call(client) == "a"
        assert client.metrics()["name/clusters"] == 3
        assert client.metrics()["name/clusters_opened"] == 3


@virtual
async def test_what_cannot_be_read_of_a_local_dtab_is_left_out_and_counted(network):
    serve(network, "a", "b")
    async with network.client("/s", base("/s => memory://a")) as client:
        with use(current().evolve(dtab=(("/s", "memory://b"), ("s", "/x"), ("/s", "(")))):
            assert await calls(client, 3) == {"b": 3}
        assert client.metrics()["name/dtab_malformed"] == 2
        assert client.metrics()["name/delegations"] == 2  # that of the base, and this one once


@virtual
async def test_local_dtabs_are_remembered_but_not_without_end(network):
    serve(network, "a")
    async with network.client("/s", base("/s => memory://a")) as client:
        for n in range(2 * TREES):
            with meshlib.dtab(f"/unused{n} => ~"):
                await call(client)
        assert client.metrics()["name/delegations"] == 2 * TREES + 1
        assert client.metrics()["name/clusters_opened"] == 1
        assert len(client.env.params[Binding]._routes) <= TREES


# --- what is told -----------------------------------------------------------------------------------------------------


@virtual
async def test_a_name_without_an_entry_is_told_with_the_dtabs_and_the_way(network):
    async with network.client("/s/users", base("/s => /srv")) as client:
        with meshlib.dtab("/x => /y"), pytest.raises(meshlib.NoEndpoints) as caught:
            await call(client)
    assert caught.value.message == (
        "/s/users: no such name: /s/users -> /srv/users (no entry applies); base Dtab /s => /srv, local Dtab /x => /y"
    )
    assert caught.value.name == "/s/users"


@virtual
async def test_a_name_that_no_source_knows_is_told_with_what_each_said(network):
    network.name("a").state.set(Neg())
    async with network.client("/s", base("/s => memory://a | memory://b")) as client:
        network.name("b").state.set(Neg())
        with pytest.raises(meshlib.NoEndpoints) as caught:
            await call(client)
    assert "/s -> (memory://a (no such name) | memory://b (no such name))" in str(caught.value)


@virtual
async def test_a_name_that_does_not_end_is_told_and_does_no_harm_behind_one_that_exists(network):
    serve(network, "a")
    async with network.client("/s", base("/s => /s")) as client:
        with pytest.raises(meshlib.ResolutionError, match="more than 100 steps: /s -> /s"):
            await call(client)
        with meshlib.dtab("/s => memory://a"):
            assert await call(client) == "a"


@virtual
async def test_a_target_of_no_scheme_that_there_is_is_told(network):
    async with network.client("/s", base("/s => consul://x")) as client:
        with pytest.raises(meshlib.ConfigurationError, match="no resolver for consul://"):
            await call(client)


def test_a_path_that_is_none_is_told_when_the_client_is_made():
    with pytest.raises(meshlib.DtabError, match="//x"):
        mux.client("//x")


# --- clusters ---------------------------------------------------------------------------------------------------------


@virtual
async def test_an_idle_cluster_is_closed_and_made_again_for_the_next_call(network):
    serve(network, "a", "b")
    aperture = meshlib.balance(meshlib.aperture())  # which has work of its own in the background
    async with network.client("/s", base("/s => memory://a"), aperture, label="c") as client:
        await call(client)
        idle = client.env.supervisor.jobs
        with meshlib.dtab("/s => memory://b"):
            assert await call(client) == "b"
        other = client.env.params[Binding].clusters.entries[1]
        assert network.connections() == 2
        assert "bound/<memory://b>/loadbalancer/size" in client.metrics()
        for _ in range(int((IDLE + 3 * SWEEP) / 30)):
            await anyio.sleep(30)
            await call(client)
        assert network.connections() == 1
        assert client.metrics()["name/clusters"] == client.metrics()["name/clusters_expired"] == 1
        assert "bound/<memory://b>/loadbalancer/size" not in client.metrics()
        assert "bound/<memory://a>/loadbalancer/size" in client.metrics()
        assert client.env.supervisor.jobs == idle
        assert other.env.supervisor.jobs == 0
        await anyio.sleep(IDLE + 3 * SWEEP)
        assert network.connections() == client.metrics()["name/clusters"] == 0
        assert await call(client) == "a"


@virtual
async def test_a_busy_cluster_is_not_idle(network):
    serve(network, "a")

    async def slow(request):
        await anyio.sleep(3 * IDLE)
        return mux.Response(b"slow")

    network.listen(Server(slow, "10.0.0.9:80", network.acceptor))
    network.name("slow", ["10.0.0.9:80"])
    async with network.client("/s", base("/s => memory://slow"), meshlib.timeout(None)) as client:
        assert await call(client) == "slow"
        assert client.metrics()["name/clusters_expired"] == 0


@virtual
async def test_the_cluster_used_longest_ago_goes_when_there_are_too_many(network):
    names = [f"n{i}" for i in range(MOST + 2)]
    serve(network, *names)
    async with network.client("/s", base("/s => memory://n0")) as client:
        for name in names:
            await call(client)  # n0, over and over
            with meshlib.dtab(f"/s => memory://{name}"):
                assert await call(client) == name
        numbers = client.metrics()
        assert numbers["name/clusters"] == MOST
        assert numbers["name/clusters_evicted"] == 2
        kept = {name.split("/size")[0] for name in numbers if name.endswith("loadbalancer/size")}
        assert "bound/<memory://n0>/loadbalancer" in kept
        assert "bound/<memory://n1>/loadbalancer" not in kept
        await anyio.sleep(1)
        assert network.connections() == MOST


@virtual
async def test_a_tree_of_more_targets_than_are_kept_is_served_whole(network):
    names = [f"n{i}" for i in range(MOST + 6)]
    serve(network, *names)
    dtab = "/s => " + " & ".join(f"memory://{name}" for name in names)
    async with network.client("/s", base(dtab), seed=1) as client:
        seen = await calls(client, 1000)
        assert seen.keys() == set(names)
        assert client.metrics()["name/clusters"] == client.metrics()["name/clusters_opened"] == MOST + 6
        assert client.metrics()["name/clusters_overflow"] == 6
        with meshlib.dtab("/s => memory://n0"):
            for _ in range(3):
                await anyio.sleep(SWEEP)
                await call(client)
        assert client.metrics()["name/clusters"] == MOST


@virtual
async def test_the_numbers_of_one_cluster_leave_without_those_of_another_whose_name_goes_on(network):
    serve(network, "a", "a/b")
    async with network.client("/s", base("/s => memory://a/b")) as client:
        with meshlib.dtab("/s => memory://a"):
            await call(client)
        for _ in range(int((IDLE + 3 * SWEEP) / 30)):
            await anyio.sleep(30)
            await call(client)
        assert "bound/<memory://a>/loadbalancer/size" not in client.metrics()
        assert client.metrics()["bound/<memory://a/b>/loadbalancer/size"] == 1


@virtual
async def test_all_clusters_share_the_budget_of_the_client(network):
    serve(network, "a", "b")
    layers = base("/s => memory://a & memory://b"), meshlib.retry_budget(0.5, min_per_second=1)
    async with network.client("/s", *layers) as client:
        await calls(client, 100)
        names = [name for name in client.metrics() if name.endswith("retries/budget")]
        assert names == ["retries/budget"]
        assert client.metrics()["retries/budget"] == 10 + 50


@virtual
async def test_nothing_is_left_when_the_client_closes(network):
    serve(network, "a", "b")
    layers = base("/s => memory://a & memory://b"), meshlib.balance(meshlib.aperture())
    async with network.client("/s", *layers) as client:
        await calls(client, 20)
        clusters = client.env.params[Binding].clusters.entries
        assert len(clusters) == 2
    assert client.env.supervisor.jobs == 0
    assert [entry.env.supervisor.jobs for entry in clusters] == [0, 0]
    assert network.connections() == 0


# --- for real ---------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_an_override_travels_downstream():
    async def leaf(name, request):
        return mux.Response(name)

    async def serve_leaf(stack, name):
        return await stack.enter_async_context(mux.serve(functools.partial(leaf, name), "127.0.0.1:0"))

    async with contextlib.AsyncExitStack() as stack:
        v1, v2 = await serve_leaf(stack, b"v1"), await serve_leaf(stack, b"v2")
        inner = await stack.enter_async_context(
            mux.client("/s/leaf", base(f"/s/leaf => /v1 ; /v1 => {v1.address} ; /v2 => {v2.address}"))
        )

        async def middle(request):
            return await inner(request)

        front = await stack.enter_async_context(mux.serve(middle, "127.0.0.1:0"))
        outer = await stack.enter_async_context(mux.client("/s/middle", base(f"/s/middle => {front.address}")))
        assert await call(outer) == "v1"
        with meshlib.dtab("/s/leaf => /v2"):
            assert await call(outer) == "v2"
        assert await call(outer) == "v1"
