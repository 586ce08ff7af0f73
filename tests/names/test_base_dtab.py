"""The base Dtab: where it comes from, what happens when it changes, and what when it cannot be read."""

import importlib.util
import logging
import random

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.core.env import Env
from meshlib.core.supervisor import Supervisor
from meshlib.names import resolver, sources
from meshlib.names.addr import Pending
from meshlib.names.base import VARIABLE, BaseDtab
from meshlib.names.binder import PATIENCE
from meshlib.names.sources import FileTexts, source_for
from meshlib.names.target import Target
from meshlib.telemetry.metrics import Registry
from meshlib.testing import Network, run_virtual

pytestmark = pytest.mark.anyio
GOOD = "/s => memory://a"


class Scripted:
    """A source that says what a test says, and ends when the test says an exception."""

    def __init__(self):
        self.send, self.receive = anyio.create_memory_object_stream(100)
        self.runs = 0
        self.checked = None

    def check(self, target):
        self.checked = target

    async def texts(self, target):
        self.runs += 1
        async for step in self.receive:
            if isinstance(step, Exception):
                raise step
            yield step


@pytest.fixture
def scripted(monkeypatch):
    source = Scripted()
    monkeypatch.setattr(sources, "_of_others", lambda target: source)
    yield source
    source.send.close()
    source.receive.close()


def following(test):
    """Run an async test of (base, say) in virtual time; ``say`` waits until the source's word has been heard."""

    def run(scripted):
        async def main():
            base = BaseDtab("scripted://x")
            env = Env(supervisor=Supervisor("test"), rng=random.Random(1))
            base.start(env)
            base.start(env)

            async def say(step):
                scripted.send.send_nowait(step)
                await anyio.sleep(3)

            try:
                await test(base, say)
            finally:
                await env.supervisor.aclose()

        run_virtual(main, seed=1)

    return run


# --- what may be given ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["/s => /x", " /s => /x ; ", "# comment\n/s => /x", meshlib.Dtab("/s => /x")])
def test_a_dtab_or_its_text(given):
    base = BaseDtab(given)
    assert base.current.value == meshlib.Dtab("/s => /x")
    assert base.target is None


def test_nothing_is_an_empty_dtab(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert BaseDtab().current.value == meshlib.Dtab()
    assert BaseDtab("").current.value == BaseDtab("  # nothing\n").current.value == meshlib.Dtab()


def test_the_environment_says_where_nothing_is_given(monkeypatch):
    monkeypatch.setenv(VARIABLE, "/s => /x")
    assert BaseDtab().current.value == meshlib.Dtab("/s => /x")
    assert BaseDtab("/s => /y").current.value == meshlib.Dtab("/s => /y")
    monkeypatch.setenv(VARIABLE, "file:///etc/mesh/dtab")
    assert BaseDtab().target == Target.parse("file:///etc/mesh/dtab")


def test_what_cannot_be_read_is_told_when_the_client_is_made(monkeypatch):
    with pytest.raises(meshlib.DtabError, match=r"(?s)base_dtab\(…\): .*line 2") as caught:
        meshlib.base_dtab("/a => /b ;\n/s = /x")
    assert caught.value.line == 2
    monkeypatch.setenv(VARIABLE, "/s =>")
    with pytest.raises(meshlib.DtabError, match=VARIABLE):
        mux.client("/s/x")
    mux.client("127.0.0.1:1")  # a target that is no path has no use for it


@pytest.mark.parametrize("wrong", [3, None, ["/s => /x"], b"/s => /x"])
def test_what_is_no_dtab_at_all_is_told(wrong, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    if wrong is None:
        assert repr(meshlib.base_dtab(wrong)) == "bind()"
        return
    with pytest.raises(meshlib.ConfigurationError, match="is no Dtab"):
        meshlib.base_dtab(wrong)


@pytest.mark.parametrize("wrong", ["file://etc/dtab", "consul://x", "file://"])
def test_a_target_that_nobody_can_follow_is_told(wrong):
    with pytest.raises(meshlib.ConfigurationError, match=r"base_dtab\(…\): "):
        meshlib.base_dtab(wrong)


@pytest.mark.parametrize(
    ("target", "package", "extra"), [("zk://h/p", "kazoo", "zookeeper"), ("k8s://n/c:k", "httpx", "kubernetes")]
)
def test_a_missing_package_is_told_with_what_to_install(target, package, extra, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(resolver, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(meshlib.ConfigurationError, match=rf"needs {package}: pip install 'meshlib-rpc\[{extra}\]'"):
        meshlib.base_dtab(target)


def test_a_source_is_asked_whether_it_understands_the_target(scripted):
    assert source_for(Target.parse("scripted://x")) is scripted
    assert scripted.checked == Target.parse("scripted://x")


# --- changes ----------------------------------------------------------------------------------------------------------


@following
async def test_each_text_takes_the_place_of_the_one_before(base, say):
    assert base.current.value is None
    assert "not read yet" in repr(base)
    await say("/s => /a")
    assert base.current.value == meshlib.Dtab("/s => /a")
    version = base.current.version
    await say("/s => /a  # the same, with a remark")
    assert base.current.version == version
    await say("/s => /b")
    assert base.current.value == meshlib.Dtab("/s => /b")
    assert base.updates == 2


@following
async def test_one_that_cannot_be_read_is_refused_and_told_once_with_its_place(base, say):
    await say("/s => /a")
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("meshlib.names").addHandler(handler)
    try:
        for _ in range(3):
            await say("/s => /a ;\n/t => (/b")
    finally:
        logging.getLogger("meshlib.names").removeHandler(handler)
    assert base.current.value == meshlib.Dtab("/s => /a")
    assert base.refused == 3
    assert len(records) == 1
    assert "line 2" in records[0]
    assert "the last good one stays" in records[0]
    assert "source broken" in repr(base)
    await say("/s => /b")
    assert base.current.value == meshlib.Dtab("/s => /b")
    assert base.problem == ""


@following
async def test_nothing_but_space_is_taken_for_a_file_that_is_being_written(base, say):
    await say("/s => /a")
    await say(" \n")
    assert base.current.value == meshlib.Dtab("/s => /a")
    assert "# no entries" in base.problem
    await say("# no entries")
    assert base.current.value == meshlib.Dtab()


def test_a_source_that_breaks_is_asked_again_and_what_it_said_stays(scripted):
    @following
    async def test(base, say):
        await say("/s => /a")
        for n in range(4):
            await say(OSError("gone"))
            assert base.current.value == meshlib.Dtab("/s => /a")
            assert base.problem == "OSError: gone"
            assert scripted.runs == n + 2  # within 3 s
        await say("/s => /b")
        assert base.current.value == meshlib.Dtab("/s => /b")
        assert base.problem == ""

    test(scripted)


def test_how_it_fares_is_exported(scripted):
    @following
    async def test(base, say):
        metrics = Registry()
        base.show(metrics)
        await say("/s => /a ; /t => /b")
        assert metrics.snapshot() == {"dtab_entries": 2, "dtab_broken": 0, "dtab_refused": 0, "dtab_updates": 1}
        await say("(")
        assert metrics.snapshot() == {"dtab_entries": 2, "dtab_broken": 1, "dtab_refused": 1, "dtab_updates": 1}

    test(scripted)


# --- and the calls ----------------------------------------------------------------------------------------------------


def network_of(*names):
    network = Network(wire="direct")
    for n, name in enumerate(names, 1):

        async def answer(request, name=name):
            return mux.Response(name.encode())

        address = f"10.0.0.{n}:80"
        network.listen(meshlib.server.Server(answer, address, network.acceptor), address)
        network.name(name, [address])
    return network


def test_calls_wait_for_the_first_dtab_but_not_for_ever(scripted):
    async def main():
        network = network_of("a", "b")
        async with network.client("/s", meshlib.base_dtab("scripted://x")) as client:
            began = anyio.current_time()
            with pytest.raises(meshlib.ResolutionError, match="there is no base Dtab yet: scripted://x: nothing was"):
                await client(mux.Request(b""))
            assert anyio.current_time() - began == pytest.approx(PATIENCE, abs=0.02)
            with pytest.raises(meshlib.ResolutionError):
                await client(mux.Request(b""))
            assert anyio.current_time() - began == pytest.approx(PATIENCE, abs=0.03)
            scripted.send.send_nowait(GOOD)
            await anyio.sleep(0.1)
            assert (await client(mux.Request(b""))).body == b"a"
            scripted.send.send_nowait("(")
            await anyio.sleep(0.1)
            assert (await client(mux.Request(b""))).body == b"a"
            assert client.metrics()["name/dtab_broken"] == 1
            assert "source broken" in repr(client)
            scripted.send.send_nowait("/s => memory://b")
            await anyio.sleep(0.1)
            assert (await client(mux.Request(b""))).body == b"b"
        for server in network.servers.values():
            await server.aclose(grace=0)

    run_virtual(main, seed=1)


def test_a_call_whose_base_comes_late_is_made_all_the_same(scripted):
    async def main():
        network = network_of("a")
        async with (
            network.client("/s", meshlib.base_dtab("scripted://x")) as client,
            anyio.create_task_group() as group,
        ):

            async def later():
                await anyio.sleep(1)
                scripted.send.send_nowait(GOOD)

            group.start_soon(later)
            assert (await client(mux.Request(b""))).body == b"a"
            assert anyio.current_time() >= 1
        for server in network.servers.values():
            await server.aclose(grace=0)

    run_virtual(main, seed=1)


def test_calls_go_on_as_before_until_a_new_base_is_resolved(scripted):
    async def main():
        network = network_of("a", "b")
        network.name("b").state.set(Pending())
        async with network.client("/s", meshlib.base_dtab("scripted://x")) as client:
            scripted.send.send_nowait(GOOD)
            assert (await client(mux.Request(b""))).body == b"a"
            scripted.send.send_nowait("/s => memory://b")
            for _ in range(10):
                began = anyio.current_time()
                assert (await client(mux.Request(b""))).body == b"a"
                assert anyio.current_time() == began
                await anyio.sleep(0.1)
            network.name("b").set(["10.0.0.2:80"])
            await anyio.sleep(0.2)
            assert (await client(mux.Request(b""))).body == b"b"
            scripted.send.send_nowait("/s => memory://c")  # which is never resolved, and was wanted all the same
            network.name("c").state.set(Pending())
            await anyio.sleep(PATIENCE + 0.1)
            with pytest.raises(meshlib.ResolutionError, match=r"/s has not been resolved within 3 s: /s -> memory://c"):
                await client(mux.Request(b""))
            scripted.send.send_nowait("/s => consul://x")
            await anyio.sleep(0.1)
            with pytest.raises(meshlib.ConfigurationError, match="no resolver"):
                await client(mux.Request(b""))
            scripted.send.send_nowait(GOOD)
            await anyio.sleep(0.1)
            assert (await client(mux.Request(b""))).body == b"a"
        for server in network.servers.values():
            await server.aclose(grace=0)

    run_virtual(main, seed=1)


async def test_a_file_is_followed(tmp_path):
    file = tmp_path / "dtab"
    file.write_text("/s => /a")
    texts = FileTexts().texts(Target.parse(f"file://{file}"))
    with anyio.fail_after(10):
        assert await anext(texts) == "/s => /a"
        new = tmp_path / "new"
        new.write_text("/s => /b ; # longer")
        new.replace(file)
        assert await anext(texts) == "/s => /b ; # longer"
        file.unlink()
        with pytest.raises(FileNotFoundError):
            await anext(texts)
    await texts.aclose()


async def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "dtab"
    file.write_bytes(b"/s => \xff")
    texts = FileTexts().texts(Target.parse(f"file://{file}"))
    with pytest.raises(UnicodeDecodeError):
        await anext(texts)
