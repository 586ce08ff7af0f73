"""Bursts of states, watches that fall silent, and failed connects: when a resolver is asked, and what counts."""

import random
from itertools import pairwise
from types import SimpleNamespace

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib import mux
from meshlib.core.clock import Clock
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError
from meshlib.core.supervisor import Supervisor
from meshlib.names import resolver as registry
from meshlib.names.addr import Address, Bound, Failed, Neg
from meshlib.names.resolver import resolver_for
from meshlib.names.static import parse_address
from meshlib.names.target import Target
from meshlib.names.watch import REFRESH, SETTLE, SETTLE_LAST, Watch
from meshlib.server import Server
from meshlib.telemetry.metrics import Registry
from meshlib.testing import Network, run_virtual

TARGET = Target.parse("zk://z/x")


def bound(*ports):
    return Bound.of(Address("h", port) for port in ports)


class Source:
    """A resolver that says what it is told to."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)
        self.runs, self.ended = 0, 0
        self.say, self.hear = anyio.create_memory_object_stream[object](1000)
        self.first = None

    async def watch(self, target):
        self.runs += 1
        try:
            if self.first is not None:
                yield self.first
            while True:
                said = await self.hear.receive()
                if isinstance(said, Exception):
                    raise said
                if said == "end":
                    return
                yield said
        finally:
            self.ended += 1

    def close(self):
        self.say.close()
        self.hear.close()


def watched(test, **attributes):
    """Run a test of (watch, source, log, numbers) in virtual time; the log has (seconds, state) for each change."""

    async def main():
        metrics, source = Registry(), Source(**attributes)
        env = Env(clock=Clock(), metrics=metrics, supervisor=Supervisor("shop"), rng=random.Random(1))
        watch, log = Watch(TARGET, source, env), []
        watch.addr.watch(lambda addr: log.append((round(anyio.current_time(), 6), addr)))
        log.clear()
        watch.start()
        try:
            await test(watch, source, log, metrics.snapshot)
        finally:
            await env.supervisor.aclose()
            source.close()
        assert source.ended == source.runs

    run_virtual(main)


# --- bursts -----------------------------------------------------------------------------------------------------------


def test_the_first_state_counts_at_once_and_of_a_burst_the_last():
    async def test(watch, source, log, numbers):
        await source.say.send(bound(1))
        await anyio.sleep(1)
        assert log == [(0.0, bound(1))]
        for n in range(5):
            await source.say.send(bound(*range(n)))
            await anyio.sleep(SETTLE / 2)
        await anyio.sleep(1)
        assert log[1:] == [(pytest.approx(1.3, abs=SETTLE), bound(0, 1, 2, 3))]
        assert numbers()["name/updates"] == 2

    watched(test)


def test_an_endpoint_that_moves_from_one_list_to_another_is_never_missed():
    async def test(watch, source, log, numbers):
        for addr in (bound(1, 2), bound(1), bound(1, 2)):
            await source.say.send(addr)
            await anyio.sleep(0.03)
        await anyio.sleep(1)
        assert {addr for _, addr in log} == {bound(1, 2)}

    watched(test)


def test_who_changes_all_the_time_is_followed_all_the_same():
    async def test(watch, source, log, numbers):
        for n in range(100):
            await source.say.send(bound(n))
            await anyio.sleep(SETTLE / 2)
        times = [at for at, _ in log]
        assert max(b - a for a, b in pairwise(times)) <= SETTLE_LAST + SETTLE
        assert len(log) <= 8

    watched(test)


def test_a_source_may_say_that_its_states_count_at_once():
    async def test(watch, source, log, numbers):
        for n in range(5):
            await source.say.send(bound(n))
            await anyio.sleep(0.01)
        assert [addr for _, addr in log] == [bound(n) for n in range(5)]

    watched(test, settle=0.0)


def test_weights_that_change_in_a_burst_count_as_well():
    async def test(watch, source, log, numbers):
        for weight in (1.0, 2.0, 3.0):
            await source.say.send(Bound((Address("h", 1, weight=weight),)))
        await anyio.sleep(1)
        assert watch.endpoints[0].weight == 3.0

    watched(test)


def test_a_watch_that_is_closed_in_a_burst_changes_no_more():
    async def test(watch, source, log, numbers):
        await source.say.send(bound(1))
        await anyio.sleep(0.01)
        await source.say.send(bound(2))
        await anyio.sleep(0.01)
        watch.close()
        await anyio.sleep(1)
        assert [addr for _, addr in log] == [bound(1)]

    watched(test)


# --- asking anew ------------------------------------------------------------------------------------------------------


def test_a_source_that_fell_silent_is_run_anew_and_nothing_changes_until_it_speaks():
    async def test(watch, source, log, numbers):
        await source.say.send(bound(1))
        await anyio.sleep(100 * 1.2 * 3 + 1)
        assert 3 <= source.runs <= 5  # every 80 to 120 s
        assert [addr for _, addr in log] == [bound(1)]
        assert watch.problem == ""
        assert "name/failures" not in numbers() or numbers()["name/failures"] == 0
        await source.say.send(bound(2))
        await anyio.sleep(1)
        assert watch.addr.value == bound(2)

    watched(test, relist=100.0)


def test_a_source_that_does_not_ask_for_it_is_left_alone():
    async def test(watch, source, log, numbers):
        await source.say.send(bound(1))
        await anyio.sleep(10_000)
        watch.refresh()
        await anyio.sleep(10)
        assert source.runs == 1

    watched(test)


def test_failed_connects_ask_anew_at_most_once_a_second():
    async def test(watch, source, log, numbers):
        await anyio.sleep(5)
        for _ in range(100):
            watch.refresh()
            await anyio.sleep(0.1)
        assert 10 <= source.runs <= 1 + 10 / REFRESH + 1
        assert numbers()["name/refreshes"] == source.runs - 1
        assert watch.addr.value == bound(7)

    async def prepared(watch, source, log, numbers):
        source.first = bound(7)
        await test(watch, source, log, numbers)

    watched(prepared, refreshable=True)


def test_a_client_that_cannot_connect_has_its_name_resolved_anew():
    """The servers have moved, and the source would not have told before its next look in an hour."""

    async def main():
        seen, network = [], Network(wire="direct")

        class Slow:
            async def watch(self, target):
                seen.append(anyio.current_time())
                yield Bound.of([Address("old" if len(seen) == 1 else "new", 1)])
                await anyio.sleep(3600)

        async def serve(request):
            return mux.Response(b"here")

        network.listen(Server(serve, "new:1", network.acceptor))
        client = network.client("memory://moved")
        watch = client.env.params[Watch]
        watch._resolver, watch._refreshable = Slow(), True
        with anyio.fail_after(30):
            while True:
                try:
                    assert (await client(mux.Request(b""))).body == b"here"
                    break
                except meshlib.MeshError:
                    await anyio.sleep(0.5)
        await client.aclose()
        await network.servers["new:1"].aclose()
        assert len(seen) == 2

    run_virtual(main)


# --- a model ----------------------------------------------------------------------------------------------------------

EVENTS = st.lists(
    st.one_of(
        st.lists(st.integers(1, 5), max_size=4).map(lambda ports: bound(*ports)),
        st.just(Neg()),
        st.sampled_from([OSError("gone"), ConfigurationError("wrong"), Failed("broken"), "end"]),
        st.sampled_from(["refresh", "wait"]),
        st.floats(0.001, 2.0),
    ),
    max_size=25,
)


@given(EVENTS, st.sampled_from([None, 1.0]), st.sampled_from([0.0, SETTLE]))
def test_whatever_happens_the_last_word_counts_and_failures_empty_nothing(events, relist, settle):
    async def test(watch, source, log, numbers):
        last = None
        for event in events:
            if event == "refresh":
                watch.refresh()
            elif event == "wait":
                await anyio.sleep(5)
            elif isinstance(event, float):
                await anyio.sleep(event)
            elif event == "end":
                continue
            else:
                if isinstance(event, Bound | Neg):
                    last = event
                await source.say.send(event)
                await anyio.lowlevel.checkpoint()
        await anyio.sleep(300)  # every wait before a restart is over
        if last is not None:
            assert watch.addr.value == last
        told = [addr for _, addr in log if isinstance(addr, Failed)]
        first = next((n for n, (_, addr) in enumerate(log) if isinstance(addr, Bound | Neg)), len(log))
        assert len(told) <= first

    watched(test, refreshable=True, relist=relist, settle=settle)


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "package", "extra"),
    [
        ("dns://h:1", "dnspython", "dns"),
        ("srv://_a._tcp.b", "dnspython", "dns"),
        ("zk://z:2181/x", "kazoo", "zookeeper"),
        ("k8s://shop/users:http", "httpx", "kubernetes"),
    ],
)
def test_a_missing_package_is_told_with_what_installs_it(target, package, extra, monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError) as caught:
        meshlib.mux.client(target)
    scheme = target.partition(":")[0]
    assert str(caught.value) == f"{scheme}:// needs {package}: pip install 'meshlib-rpc[{extra}]'"


def test_a_resolver_may_check_its_targets(monkeypatch):
    checked = []
    monkeypatch.setattr(registry, "load", lambda room, scheme: SimpleNamespace(check=checked.append))
    target = Target.parse("zk://z/x")
    resolver_for(target)
    assert checked == [target]


@pytest.mark.parametrize(
    ("text", "address", "weight", "metadata"),
    [
        ("h:1", "h:1", 1.0, ()),
        ("h:1?weight=2.5", "h:1", 2.5, ()),
        ("[::1]:1?zone=eu-1&weight=2&rack=a", "[::1]:1", 2.0, (("rack", "a"), ("zone", "eu-1"))),
    ],
)
def test_static_addresses_have_settings(text, address, weight, metadata):
    found = parse_address(text)
    assert (str(found), found.weight, found.metadata) == (address, weight, metadata)


@pytest.mark.parametrize("text", ["h:1?", "h:1?weight", "h:1?weight=", "h:1?=2", "h:1?weight=x", "h:1?weight=0",
                                  "h:1?weight=1&weight=2", "h:1?weight=inf"])  # fmt: skip
def test_settings_that_make_no_sense_are_told(text):
    if text == "h:1?":
        assert parse_address(text).weight == 1.0
        return
    with pytest.raises(ConfigurationError, match="h:1"):
        parse_address(text)


# --- resolve ----------------------------------------------------------------------------------------------------------


async def test_a_name_can_be_watched_without_calling_anybody(tmp_path):
    file = tmp_path / "users"
    file.write_text("h:1\n")
    async with meshlib.resolve(f"file://{file}") as addrs:
        assert await anext(addrs) == bound(1)
        assert addrs.addr == bound(1)
        new = tmp_path / "new"
        new.write_text("h:1\nh:2\n")
        new.replace(file)
        with anyio.fail_after(10):
            assert await anext(addrs) == bound(1, 2)
        assert "h:1, h:2" in repr(addrs)
        assert addrs.problem == ""


async def test_a_slow_watcher_gets_the_latest():
    async with meshlib.resolve("h:1,h:2") as addrs:
        async for addr in addrs:
            assert addr == bound(1, 2)
            break


def test_a_path_has_no_one_state():
    with pytest.raises(ConfigurationError, match=r"meshlib.delegate\('/s/users'\) shows it"):
        meshlib.resolve("/s/users")
