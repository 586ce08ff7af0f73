"""Watching a name: restarts, the last good state, and what is told while the source is broken."""

import importlib.metadata
import logging
import random
from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace

import anyio
import pytest

import meshlib
from meshlib.core.clock import Clock
from meshlib.core.context import Context, current, use
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError
from meshlib.core.supervisor import Supervisor
from meshlib.names.addr import Address, Bound, Failed, Neg, Pending
from meshlib.names.bind import Bind
from meshlib.names.file import FileResolver
from meshlib.names.resolver import RESTART_FIRST, RESTART_LAST, Resolver, Watch, resolver_for
from meshlib.names.static import StaticResolver, UnixResolver
from meshlib.names.target import Target
from meshlib.telemetry.metrics import Registry
from meshlib.testing import run_virtual

TARGET = Target.parse("zk://z:2181/shops")


def bound(*ports):
    return Bound.of(Address("h", port) for port in ports)


class Scripted:
    """A resolver that does one script a run: states to yield, seconds to wait, exceptions to raise."""

    def __init__(self, *runs):
        self.runs = list(runs)
        self.began = []
        self.contexts = []
        self.ended = 0

    async def watch(self, target):
        self.began.append(anyio.current_time())
        self.contexts.append(current())
        try:
            for step in self.runs.pop(0) if self.runs else ():
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, int | float):
                    await anyio.sleep(step)
                else:
                    yield step
            await anyio.sleep_forever()
        finally:
            self.ended += 1


def watching(*runs, seed=1):
    """Decorate an async test of (watch, resolver, numbers), to run in virtual time."""

    def decorate(test):
        async def main():
            registry, resolver = Registry(), Scripted(*runs)
            env = Env(clock=Clock(), metrics=registry, supervisor=Supervisor("shop"), rng=random.Random(seed))
            watch = Watch(TARGET, resolver, env)
            states = []
            watch.addr.watch(states.append)
            watch.states = states
            watch.start()
            try:
                await test(watch, resolver, registry.snapshot)
            finally:
                await env.supervisor.aclose()

        run_virtual(main)

    return decorate


def test_each_state_is_taken_over():
    @watching([bound(1), 5, bound(1, 2), 5, Neg()])
    async def check(watch, resolver, numbers):
        assert (watch.addr.value, watch.age) == (Pending(), None)
        await anyio.sleep(1)
        assert watch.addr.value == bound(1)
        assert watch.endpoints == (Address("h", 1),)
        await anyio.sleep(20)
        assert watch.states == [Pending(), bound(1), bound(1, 2), Neg()]
        assert watch.endpoints == ()


def test_weights_alone_are_a_change():
    heavy = Bound((Address("h", 1, weight=5.0),))

    @watching([bound(1), 1, heavy, 1, Neg(), 1, Neg()])
    async def check(watch, resolver, numbers):
        await anyio.sleep(10)
        assert len(watch.states) == 4
        assert watch.states[2].addresses[0].weight == 5.0


def test_starting_twice_is_the_same_as_once():
    @watching([bound(1)])
    async def check(watch, resolver, numbers):
        watch.start()
        await anyio.sleep(1)
        assert len(resolver.began) == 1


def test_a_resolver_sees_nothing_of_the_call_that_started_it():
    @watching([bound(1)])
    async def check(watch, resolver, numbers):
        with use(Context(client_id="caller")):
            await anyio.sleep(1)
        assert resolver.contexts == [Context()]


@pytest.mark.parametrize("seed", range(3))
def test_a_resolver_that_breaks_is_run_again_with_growing_jittered_waits(seed):
    @watching(*[[OSError("no route")] for _ in range(20)], seed=seed)
    async def check(watch, resolver, numbers):
        await anyio.sleep(250)
        waits = [b - a for a, b in zip(resolver.began, resolver.began[1:], strict=False)]
        assert len(waits) >= 12
        for n, wait in enumerate(waits):
            longest = min(RESTART_LAST, RESTART_FIRST * 2**n)
            assert longest / 2 - 1e-6 <= wait <= longest + 1e-6
        assert numbers()["name/failures"] == len(resolver.began)


def test_after_a_state_waits_begin_small_again():
    @watching(*[[OSError("x")]] * 8, [bound(1), 1, OSError("y")], [OSError("z")])
    async def check(watch, resolver, numbers):
        await anyio.sleep(120)
        *_, recovered, again, after = resolver.began
        assert again - recovered <= 1 + RESTART_FIRST
        assert after - again <= 2 * RESTART_FIRST


def test_while_the_source_is_broken_the_last_good_state_stays():
    @watching([bound(1), 5, OSError("no route")], [60, bound(2)])
    async def check(watch, resolver, numbers):
        await anyio.sleep(10)
        assert watch.addr.value == bound(1)
        assert watch.problem == "OSError: no route"
        assert numbers()["name/failures"] == 1
        assert repr(watch) == "<zk://z:2181/shops: h:1, 10 s old, source broken: OSError: no route>"
        await anyio.sleep(120)
        assert watch.addr.value == bound(2)
        assert watch.problem == ""


@pytest.mark.parametrize("good", [bound(1), Neg(), Bound(())])
def test_a_failure_that_the_resolver_yields_itself_is_the_same(good):
    @watching([good, 5, Failed("half a file"), 5, Pending()])
    async def check(watch, resolver, numbers):
        await anyio.sleep(60)
        assert watch.addr.value == good
        assert watch.problem == "half a file"
        assert len(resolver.began) == 1


def test_a_source_that_never_said_anything_is_told_as_failed():
    @watching([OSError("no route")], [5, Failed("still none")], [])
    async def check(watch, resolver, numbers):
        await anyio.sleep(1)
        assert watch.addr.value == Failed("OSError: no route")
        assert watch.age is None
        await anyio.sleep(10)
        assert watch.addr.value == Failed("still none")


def test_a_mistake_in_the_target_is_told_in_its_own_words():
    @watching([ConfigurationError("expected zk://host/path")])
    async def check(watch, resolver, numbers):
        await anyio.sleep(0.01)
        assert watch.problem == "expected zk://host/path"


def test_a_problem_is_logged_once_with_what_is_kept_and_so_is_its_end(caplog):
    caplog.set_level(logging.INFO, "meshlib.names")

    @watching([bound(1), 1, OSError("no route")], [OSError("no route")], [OSError("other")], [1, bound(2)])
    async def check(watch, resolver, numbers):
        await anyio.sleep(60)
        assert numbers()["name/failures"] == 3

    assert [record.getMessage() for record in caplog.records] == [
        "zk://z:2181/shops: OSError: no route; keeping h:1",
        "zk://z:2181/shops: OSError: other; keeping h:1",
        "zk://z:2181/shops: resolved again: h:2",
    ]


def test_a_resolver_that_ends_has_said_all_there_is_to_say():
    class Once:
        runs = 0

        async def watch(self, target):
            Once.runs += 1
            yield bound(1)

    async def main():
        env = Env(clock=Clock(), supervisor=Supervisor())
        watch = Watch(TARGET, Once(), env)
        watch.start()
        await anyio.sleep(1000)
        assert (watch.addr.value, Once.runs, env.supervisor.jobs) == (bound(1), 1, 0)

    run_virtual(main)


def test_its_age_counts_from_the_last_word_of_its_source():
    @watching([bound(1), 10, bound(1)])
    async def check(watch, resolver, numbers):
        await anyio.sleep(7)
        assert numbers()["name/age_s"] == pytest.approx(7)
        await anyio.sleep(7)
        assert watch.age == pytest.approx(4)
        assert numbers()["name/endpoints"] == 1


def test_closing_ends_the_resolver_and_keeps_the_state():
    @watching([bound(1)])
    async def check(watch, resolver, numbers):
        await anyio.sleep(1)
        watch.close()
        await anyio.sleep(1)
        assert (resolver.ended, watch.addr.value) == (1, bound(1))


def test_a_watch_that_was_never_started_can_be_closed():
    watch = Watch(TARGET, Scripted(), Env())
    watch.close()
    assert repr(watch) == "<zk://z:2181/shops: not resolved yet>"


# --- finding a resolver -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"), [("h:1", StaticResolver), ("unix:///x", UnixResolver), ("file:///x", FileResolver)]
)
def test_the_house_has_resolvers_of_its_own(text, kind):
    assert type(resolver_for(Target.parse(text))) is kind


class Theirs:
    async def watch(self, target):
        yield Bound((Address("found", len(target.rest)),))


@pytest.fixture
def installed(monkeypatch):
    """Another distribution that brings two resolvers."""
    points = EntryPoints(
        [
            EntryPoint("theirs", f"{__name__}:Theirs", "meshlib.resolvers"),
            EntryPoint("broken", "no_such_module_of_theirs:Resolver", "meshlib.resolvers"),
        ]
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points.select(group=group))


def test_others_come_with_other_distributions(installed):
    resolver: Resolver = resolver_for(Target.parse("theirs://x"))
    assert isinstance(resolver, Theirs)


def test_a_resolver_of_another_distribution_resolves_for_a_client(installed):
    async def main():
        client = meshlib.mux.client("theirs://12345")
        client.start()
        await anyio.sleep(1)
        assert [str(node) for node in client.endpoints] == ["found:5"]
        await client.aclose()

    run_virtual(main)


def test_an_unknown_scheme_is_told_with_those_there_are(installed):
    with pytest.raises(ConfigurationError) as caught:
        resolver_for(Target.parse("consul://x"))
    known = "broken, dns, file, k8s, srv, static, theirs, unix, zk"
    assert str(caught.value) == f"target 'consul://x': no resolver for consul://; there are {known}"


def test_a_resolver_whose_package_is_missing_says_which(installed):
    with pytest.raises(ImportError, match="no_such_module_of_theirs"):
        resolver_for(Target.parse("broken://x"))


@pytest.mark.parametrize("wrong", ["", "h", "h:1,", "consul://x", "unix://x", "file://x", "file://"])
def test_a_target_that_makes_no_sense_is_told_when_the_client_is_made(wrong):
    with pytest.raises(ConfigurationError):
        meshlib.mux.client(wrong)


def test_a_stack_has_one_watch_which_the_layers_below_are_given():
    env, seen = Env(name="h:1"), []

    def below(watch, env):
        seen.append(watch)
        return SimpleNamespace(service=None)

    Bind().build(env, below)
    Bind().build(env, below)
    assert seen[0] is seen[1] is env.params[Watch]
    assert repr(Bind()) == "bind()"
