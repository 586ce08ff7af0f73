"""Clients that have the same target share what is known of it, and nobody asks once nobody wants to know."""

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.core.env import Env
from meshlib.core.supervisor import Supervisor
from meshlib.names import watches
from meshlib.names.addr import Address, Bound, Failed, Pending
from meshlib.names.target import Target
from meshlib.names.watch import Watch
from meshlib.telemetry.metrics import Registry
from meshlib.testing import run_virtual

TARGET = Target.parse("zk://z/x")


def bound(*ports):
    return Bound.of(Address("h", port) for port in ports)


class Source:
    """A resolver that counts how often it was run, and says what it is told to."""

    settle = 0.0
    refreshable = True

    def __init__(self):
        self.runs = self.ended = 0
        self.say, self.hear = anyio.create_memory_object_stream[object](100)

    def __call__(self, target):
        return self

    async def watch(self, target):
        self.runs += 1
        try:
            yield bound(self.runs)
            while True:
                said = await self.hear.receive()
                if isinstance(said, Exception):
                    raise said
                yield said
        finally:
            self.ended += 1


@pytest.fixture
def source(monkeypatch):
    made = Source()
    monkeypatch.setattr(watches, "resolver_for", made)
    yield made
    made.say.close()
    made.hear.close()


def watching(label):
    registry = Registry()
    env = Env(label=label, metrics=registry, supervisor=Supervisor(label))
    return watches.watch_of(TARGET, env), registry


def test_two_share_one_run_and_each_has_its_numbers(source):
    async def main():
        (one, first), (two, second) = watching("one"), watching("two")
        one.start()
        await anyio.sleep(1)
        two.start()
        assert two.addr.value == bound(1)  # at once: the other knows
        await source.say.send(bound(5, 6))
        await anyio.sleep(1)
        assert one.addr.value == two.addr.value == bound(5, 6)
        await source.say.send(OSError("down"))
        await anyio.sleep(0.01)
        assert one.problem == two.problem == "OSError: down"
        assert "source broken: OSError: down" in repr(two)
        await anyio.sleep(1)
        assert source.runs == 2
        assert first.snapshot()["name/failures"] == second.snapshot()["name/failures"] == 1
        assert first.snapshot()["name/updates"] == 3
        assert second.snapshot()["name/updates"] == 2
        assert (first.snapshot()["name/endpoints"], second.snapshot()["name/endpoints"]) == (1, 1)
        one.close()
        await source.say.send(bound(7))
        await anyio.sleep(1)
        assert one.addr.value == bound(2)
        assert two.addr.value == bound(7)
        assert two.age == pytest.approx(1, abs=0.1)
        two.close()
        two.close()
        await anyio.sleep(1)
        assert source.ended == source.runs
        assert not watches._SOURCES.get()

    run_virtual(main)


def test_who_comes_after_the_last_has_left_asks_anew(source):
    async def main():
        for n in range(1, 4):
            one, _ = watching("one")
            assert isinstance(one.addr.value, Pending)
            one.start()
            one.start()
            await anyio.sleep(1)
            assert source.runs == n
            one.close()
        await anyio.sleep(1)
        assert source.ended == 3

    run_virtual(main)


def test_two_that_cannot_connect_ask_once(source):
    async def main():
        (one, _), (two, _) = watching("one"), watching("two")
        one.start()
        two.start()
        await anyio.sleep(5)
        one.refresh()
        two.refresh()
        await anyio.sleep(0.5)
        assert source.runs == 2
        one.close()
        two.close()
        await anyio.sleep(1)

    run_virtual(main)


def test_one_that_was_never_started_can_be_closed(source):
    one, _ = watching("one")
    one.close()
    one.refresh()
    assert (one.problem, one.age) == ("", None)


def test_addresses_are_not_shared():
    assert type(watches.watch_of(Target.parse("h:1"), Env())) is Watch


def test_each_event_loop_has_watches_of_its_own(source):
    async def main():
        one, _ = watching("one")
        one.start()
        await anyio.sleep(0.01)
        assert one.addr.value == bound(source.runs)
        one.close()
        await anyio.sleep(0.01)

    for _ in range(2):
        anyio.run(main)
        anyio.run(main, backend="trio")
    assert source.runs == source.ended == 4


async def test_clients_of_one_file_look_at_it_once_and_both_follow(tmp_path):
    file = tmp_path / "users"
    file.write_text("127.0.0.1:1\n")
    one, two = (mux.client(f"file://{file}") for _ in range(2))
    async with one, two:
        with anyio.fail_after(10):
            while not (one.endpoints and two.endpoints):  # noqa: ASYNC110 - there is no event
                await anyio.sleep(0.01)
        assert len(watches._SOURCES.get()) == 1
        file.write_text("127.0.0.1:2\n127.0.0.1:3\n")
        with anyio.fail_after(10):
            while not (len(one.endpoints) == len(two.endpoints) == 2):  # noqa: ASYNC110 - there is no event
                await anyio.sleep(0.01)
        with pytest.raises(meshlib.MeshError):
            await one(mux.Request(b""))
    assert not watches._SOURCES.get()


def test_what_is_not_known_is_told_to_all(source):
    async def main():
        broken = Target.parse("zk://z/y")
        one = watches.watch_of(broken, Env(supervisor=Supervisor("one")))
        source.watch = failing
        one.start()
        await anyio.sleep(0.01)
        assert one.addr.value == Failed("OSError: down")
        one.close()
        await anyio.sleep(1)

    async def failing(target):
        raise OSError("down")
        yield

    run_virtual(main)
