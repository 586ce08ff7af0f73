"""``zk://`` targets against a real ZooKeeper: all forms of members, paths that come and go, and permissions."""

import anyio
import anyio.to_thread
import pytest
from kazoo.security import OPEN_ACL_UNSAFE, make_digest_acl

from meshlib.core.errors import ConfigurationError
from meshlib.names.addr import Bound, Failed, Neg
from meshlib.names.resolver import resolver_for
from meshlib.names.target import Target
from meshlib.names.zookeeper import ZooKeeperTexts
from meshlib.names.zookeeper import session as sessions
from meshlib.names.zookeeper import texts as following

from ..zookeeper import Watching, member


@pytest.fixture(autouse=True)
def no_lingering(monkeypatch):
    monkeypatch.setattr(sessions, "LINGER", 0.0)


async def test_all_forms_in_one_path(zk):
    zk.put("member_0000000007", member(1, shard=1))
    zk.put("plain", b"127.0.0.1:2 weight=2")
    zk.put("127.0.0.1:3")
    zk.put("vector_1", b'{"vector": [{"select": "shard=1", "weight": 4}]}')
    async with Watching(zk.target) as watching:
        state = await watching.until("127.0.0.1:1, 127.0.0.1:2, 127.0.0.1:3")
        assert {a.port: a.weight for a in state.addresses} == {1: 4.0, 2: 2.0, 3: 1.0}
        await anyio.to_thread.run_sync(zk.put, "plain", b"127.0.0.1:2 weight=3")
        await watching.until(lambda s: [a.weight for a in s.addresses if a.port == 2] == [3.0])
        await anyio.to_thread.run_sync(zk.put, "vector_1", b'{"vector": []}')
        await watching.until(lambda s: [a.weight for a in s.addresses if a.port == 1] == [1.0])
        await anyio.to_thread.run_sync(zk.put, "plain", b"127.0.0.1:4")
        await watching.until("127.0.0.1:1, 127.0.0.1:3, 127.0.0.1:4")


async def test_endpoints_by_name(zk):
    zk.join(1, additionalEndpoints={"http": {"host": "127.0.0.1", "port": 8080}})
    async with Watching(f"{zk.target}!http") as watching:
        assert str(await watching.until("127.0.0.1:8080")) == "127.0.0.1:8080"
    async with Watching(f"{zk.target}!admin") as watching:
        state = await watching.until(lambda state: isinstance(state, Neg))
        assert "no endpoint 'admin'; there are endpoints named http" in str(state)


async def test_a_path_that_comes_and_goes_and_comes_again(zk):
    async with Watching(zk.target, brief=0.1, hold=0.3) as watching:
        assert str(await watching.until(lambda state: True)) == f"no such name: there is no {zk.path}"
        for port in (1, 2):
            await anyio.to_thread.run_sync(zk.put, "", b"")
            zk.join(port, ephemeral=False)
            await watching.until(f"127.0.0.1:{port}")
            zk.join(9, ephemeral=False)
            await watching.until(f"127.0.0.1:{port}, 127.0.0.1:9")
            await anyio.to_thread.run_sync(zk.remove)
            assert "there is no" in str(await watching.until(lambda state: isinstance(state, Neg)))


async def test_a_path_that_is_emptied_says_so(zk):
    name = zk.join(1)
    async with Watching(zk.target, hold=0.2) as watching:
        await watching.until("127.0.0.1:1")
        await anyio.to_thread.run_sync(zk.remove, name)
        assert str(await watching.until(lambda state: isinstance(state, Neg))) == "no such name: it has no members"


async def test_nonsense_is_left_out_and_told_once(zk, caplog):
    zk.join(1)
    zk.put("member_0000000099", b"{")
    zk.put("\u202e", b"\xff")
    async with Watching(zk.target, relist=(0.05, 0.1)) as watching:
        await watching.until("127.0.0.1:1")
        zk.join(2)
        await watching.until("127.0.0.1:1, 127.0.0.1:2")
    told = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert len(told) == 2
    assert all(line.isprintable() for line in told)


async def test_permissions(zk):
    """What only a user may read is told to be that, and is read by that user."""
    acl = [make_digest_acl("shop", "s3cret", all=True)]
    zk.client.add_auth("digest", "shop:s3cret")
    zk.client.create(zk.path, acl=acl, makepath=True)
    zk.client.create(f"{zk.path}/h:80", acl=acl)
    async with Watching(zk.target) as watching:
        state = await watching.until(lambda state: isinstance(state, Failed))
        assert "not allowed to read it; give a user that is" in state.cause
    async with Watching(zk.target.replace("zk://", "zk://shop:s3cret@")) as watching:
        assert isinstance(await watching.until("h:80"), Bound)
    zk.client.set_acls(zk.path, [make_digest_acl("other", "x", all=True), *OPEN_ACL_UNSAFE])
    async with Watching(zk.target) as watching:
        state = await watching.until(lambda state: isinstance(state, Failed))
        assert "1 of the 1 nodes" in state.cause
        zk.client.set_acls(f"{zk.path}/h:80", OPEN_ACL_UNSAFE)
        await watching.until("h:80")


def test_a_target_is_checked_when_the_client_is_made():
    with pytest.raises(ConfigurationError, match="the path is missing"):
        resolver_for(Target.parse("zk://z"))


# --- texts ------------------------------------------------------------------------------------------------------------


async def test_a_text_is_followed(zk, caplog, monkeypatch):
    monkeypatch.setattr(following, "PATIENCE", 0.2)
    with pytest.raises(ConfigurationError, match="there is no such node"):
        await anext(ZooKeeperTexts().texts(Target.parse(zk.target)))
    zk.put("", b"/s => /a")
    texts = ZooKeeperTexts().texts(Target.parse(zk.target))
    with anyio.fail_after(10):
        assert await anext(texts) == "/s => /a"
        zk.put("", b"/s => /b")
        assert await anext(texts) == "/s => /b"
        zk.remove()
        with anyio.move_on_after(0.3):
            heard = anyio.Event()
            async with anyio.create_task_group() as tasks:

                async def hear():
                    assert await anext(texts) == "/s => /c"
                    heard.set()

                tasks.start_soon(hear)
                await anyio.sleep(0.15)
                assert not heard.is_set()
                zk.put("", b"/s => /c")
                await heard.wait()
        assert heard.is_set()
        await texts.aclose()
    assert "its last text stays in force" in caplog.text
    zk.put("", b"\xff")
    with pytest.raises(ConfigurationError, match="holds no text"):
        await anext(ZooKeeperTexts().texts(Target.parse(zk.target)))
