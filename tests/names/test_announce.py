"""Announcing: once a server listens, for as long as it lives, and never after it has begun to drain."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from kazoo.security import READ_ACL_UNSAFE

import meshlib
from meshlib import ConfigurationError, mux
from meshlib.core.supervisor import Supervisor
from meshlib.names import announce as module
from meshlib.names.addr import Address, Bound, Neg
from meshlib.names.announce import Announcement, reachable
from meshlib.names.members import SUFFIX, read_members
from meshlib.names.zookeeper.announcer import member_data
from meshlib.testing import run_virtual

HERE = "10.0.0.1:80"


async def serve(request):
    return mux.Response(b"done")


async def until(condition, seconds=10.0):
    with anyio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await anyio.sleep(0.02)


def listed(directory):
    addr, problems = read_members(Path(directory))
    assert problems == []
    return addr


# --- what can be announced, and where ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("h:1", "nobody announces there; it can be done at file://, zk://"),
        ("dns://h:1", "nobody announces there"),
        ("/s/users", "nobody announces there"),
        ("file:///etc/users", "with a slash at the end: file:///etc/users/"),
        ("file://users/", "absolute"),
        ("zk://z:2181", "the path is missing"),
        ("", "expected something like"),
    ],
)
def test_what_makes_no_sense_is_told_when_the_server_is_made(target, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        mux.serve(serve, announce=target)
    with pytest.raises(ConfigurationError, match=complaint):
        meshlib.announce(target, HERE)


def test_an_address_that_is_none_is_told():
    with pytest.raises(ConfigurationError):
        meshlib.announce("file:///tmp/x/", "nowhere")
    with pytest.raises(ConfigurationError):
        mux.serve(serve, announce="file:///tmp/x/", advertise="nowhere")


@pytest.mark.parametrize(
    ("listens", "told"), [("10.0.0.7:80", "10.0.0.7:80"), ("[::1]:80", "[::1]:80"), ("unix:///run/x", "unix:///run/x")]
)
def test_others_are_told_where_the_server_listens(listens, told):
    assert str(reachable(listens)) == told


def test_of_all_addresses_the_one_that_leads_out_is_told():
    try:
        found = reachable("0.0.0.0:80")
    except ConfigurationError:  # a machine without a network
        with pytest.raises(ConfigurationError, match="advertise="):
            reachable("0.0.0.0:80")
        return
    assert found.host not in ("0.0.0.0", "")
    assert found.port == 80


# --- trying again -----------------------------------------------------------------------------------------------------


class Fails:
    """An announcer that fails so many times."""

    def __init__(self, times):
        self.times, self.tries, self.withdrawn = times, [], 0

    async def announce(self, target, address):
        self.tries.append(anyio.current_time())
        if len(self.tries) <= self.times:
            raise OSError("registry down")
        try:
            yield
            await anyio.sleep_forever()
        finally:
            self.withdrawn += 1


def test_a_registry_that_is_down_is_tried_again_after_growing_waits(monkeypatch, caplog):
    announcer = Fails(4)
    monkeypatch.setattr(module, "announcer_for", lambda target: announcer)

    async def main():
        supervisor = Supervisor("test")
        one = Announcement("zk://z/x", Address.parse(HERE), supervisor, random.Random(1))
        one.start()
        await anyio.sleep(0.1)
        assert (one.announced, one.problem) == (False, "OSError: registry down")
        assert repr(one) == "<10.0.0.1:80 at zk://z/x: not announced: OSError: registry down>"
        await one.wait_announced()
        assert (one.announced, one.problem, one.failures) == (True, "", 4)
        waits = [b - a for a, b in zip(announcer.tries, announcer.tries[1:], strict=False)]
        assert all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits))
        await one.withdraw()
        assert (one.announced, announcer.withdrawn, supervisor.jobs) == (False, 1, 0)
        await supervisor.aclose()

    run_virtual(main)
    assert sum("trying again" in record.message for record in caplog.records) == 1


def test_one_that_was_never_announced_can_be_withdrawn(monkeypatch):
    monkeypatch.setattr(module, "announcer_for", lambda target: Fails(99))

    async def main():
        async with anyio.create_task_group() as group:
            with anyio.move_on_after(5):
                async with meshlib.announce("zk://z/x", HERE):
                    raise AssertionError
            group.cancel_scope.cancel()

    run_virtual(main)


# --- files ------------------------------------------------------------------------------------------------------------


async def test_a_member_is_there_while_the_body_runs(tmp_path):
    directory = f"{tmp_path}/greeter/"
    assert isinstance(listed(directory), Neg)
    async with meshlib.announce(f"file://{directory}", f"{HERE}?weight=2&zone=eu-1") as announcement:
        assert announcement.announced
        (address,) = listed(directory).addresses
        assert (str(address), address.weight, address.metadata) == (HERE, 2.0, (("zone", "eu-1"),))
        async with meshlib.announce(f"file://{directory}", "unix:///run/x"):
            assert {str(each) for each in listed(directory).addresses} == {HERE, "unix:///run/x"}
    assert listed(directory) == Bound(())
    assert [*os.scandir(directory)] == []


async def test_a_file_that_somebody_removed_is_put_back(tmp_path):
    async with meshlib.announce(f"file://{tmp_path}/", HERE):
        (file,) = tmp_path.iterdir()
        file.unlink()
        await until(lambda: listed(tmp_path) == Bound.of([Address.parse(HERE)]))


def test_a_process_that_is_killed_is_gone_at_once(tmp_path):
    code = (
        "import anyio, meshlib\n"
        "async def main():\n"
        f"    async with meshlib.announce('file://{tmp_path}/', '{HERE}'):\n"
        "        print('there', flush=True)\n"
        "        await anyio.sleep_forever()\n"
        "anyio.run(main)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        assert len(listed(tmp_path).addresses) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert listed(tmp_path) == Bound(())
    assert list(tmp_path.iterdir()) == []


async def test_what_is_no_member_is_left_out_and_told(tmp_path):
    here, there = (meshlib.announce(f"file://{tmp_path}/", address) for address in (HERE, "10.0.0.2:80"))
    async with here, there:
        spoilt = next(file for file in tmp_path.iterdir() if "10.0.0.2" in file.name)
        (tmp_path / "notes.txt").write_text("not a member")
        (tmp_path / f"link{SUFFIX}").symlink_to("/etc/passwd")
        for text in ("{", "[]", '{"host": 3}', "x" * 100_000, '{"address": "nowhere"}'):
            spoilt.write_text(text)
            addr, problems = read_members(tmp_path)
            assert addr == Bound.of([Address.parse(HERE)])
            assert len(problems) == 2  # the link as well
        assert (tmp_path / "notes.txt").exists()


async def test_a_client_follows_servers_that_announce_themselves(tmp_path):
    target = f"file://{tmp_path}/"
    client = mux.client(target)
    async with mux.serve(serve, announce=target) as one:
        await until(lambda: one.announcements[0].announced)
        assert (await client(mux.Request(b""))).body == b"done"
        async with mux.serve(serve, announce=[target], advertise="127.0.0.1:0?weight=3") as two:
            await until(lambda: len(client.endpoints) == 2)
            assert {str(node.address) for node in client.endpoints} == {one.address, two.address}
            assert {node.address.weight for node in client.endpoints} == {1.0, 3.0}
            assert two.registry.snapshot()["announce/announced"] == 1
        await until(lambda: len(client.endpoints) == 1)
    await client.aclose()


# --- closing ----------------------------------------------------------------------------------------------------------


class Remembers:
    """An announcer that tells when it was withdrawn, and what the server did by then."""

    def __init__(self):
        self.server = None
        self.seen = []

    async def announce(self, target, address):
        try:
            yield
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.1)
                async with mux.client(self.server.address) as client:
                    self.seen.append((await client(mux.Request(b""))).body)


async def test_a_server_withdraws_before_it_stops_to_answer(monkeypatch):
    announcer = Remembers()
    monkeypatch.setattr(module, "announcer_for", lambda target: announcer)
    async with mux.serve(serve, announce="zk://z/x") as server:
        announcer.server = server
        await until(lambda: server.announcements[0].announced)
    assert announcer.seen == [b"done"]


async def test_a_registry_that_hangs_does_not_keep_a_server_from_closing(monkeypatch):
    class Hangs:
        async def announce(self, target, address):
            try:
                yield
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.2)

    monkeypatch.setattr(module, "announcer_for", lambda target: Hangs())
    monkeypatch.setattr(module, "GOODBYE", 0.02)
    server = await mux.serve(serve, announce="zk://z/x")
    await until(lambda: server.announcements[0].announced)
    with anyio.fail_after(5):
        await server.aclose()


# --- ZooKeeper --------------------------------------------------------------------------------------------------------


def nodes(zk):
    if not zk.client.retry(zk.client.exists, zk.path):
        return {}
    found = {}
    for name in zk.client.retry(zk.client.get_children, zk.path):
        data, stat = zk.client.retry(zk.client.get, f"{zk.path}/{name}")
        found[name] = (json.loads(data), stat)
    return found


@pytest.mark.parametrize(
    ("address", "endpoint", "said"),
    [
        (Address("h", 1), "", {}),
        (Address("h", 1), "admin", {"additionalEndpoints": {"admin": {"host": "h", "port": 1}}}),
        (Address("h", 1, weight=2.5), "", {"metadata": {"weight": "2.5"}}),
        (Address("h", 1, metadata=(("shard", "3"), ("zone", "a"))), "", {"shard": 3, "metadata": {"zone": "a"}}),
    ],
)
def test_what_a_member_says(address, endpoint, said):
    expected = {"serviceEndpoint": {"host": "h", "port": 1}, "additionalEndpoints": {}, "status": "ALIVE"} | said
    assert json.loads(member_data(address, endpoint)) == expected


async def test_a_server_is_a_member_while_it_lives(zk):
    async with mux.serve(serve, announce=f"{zk.target}") as server:
        await until(lambda: server.announcements[0].announced)
        ((name, (said, stat)),) = (await anyio.to_thread.run_sync(nodes, zk)).items()
        assert name.startswith("member_")
        assert said["serviceEndpoint"] == {"host": "127.0.0.1", "port": int(server.address.rpartition(":")[2])}
        assert stat.ephemeralOwner
        async with mux.client(zk.target) as client:
            assert (await client(mux.Request(b""))).body == b"done"
    assert await anyio.to_thread.run_sync(nodes, zk) == {}


async def test_a_node_that_somebody_deleted_is_made_again(zk):
    async with meshlib.announce(zk.target, HERE):
        (name,) = await anyio.to_thread.run_sync(nodes, zk)
        await anyio.to_thread.run_sync(zk.remove, name)
        with anyio.fail_after(10):
            while not (found := await anyio.to_thread.run_sync(nodes, zk)):  # noqa: ASYNC110 - as above
                await anyio.sleep(0.02)
        assert name not in found


async def test_the_node_of_a_dead_session_with_this_address_is_removed_and_others_stay(zk):
    stale = await anyio.to_thread.run_sync(lambda: zk.join(80, host="10.0.0.1"))
    other = await anyio.to_thread.run_sync(lambda: zk.join(81, host="10.0.0.1"))
    async with meshlib.announce(zk.target, HERE):
        found = await anyio.to_thread.run_sync(nodes, zk)
        assert stale.rpartition("/")[2] not in found
        assert other.rpartition("/")[2] in found
        assert len(found) == 2


async def test_with_a_user_only_that_user_may_change_the_node(zk):
    target = zk.target.replace("zk://", "zk://shop:secret@")
    async with meshlib.announce(target, HERE) as announcement:
        (name,) = await anyio.to_thread.run_sync(nodes, zk)
        acl, _ = await anyio.to_thread.run_sync(lambda: zk.client.get_acls(f"{zk.path}/{name}"))
        assert READ_ACL_UNSAFE[0] in acl
        assert {each.id.scheme for each in acl} == {"digest", "world"}
        assert "secret" not in repr(announcement)
