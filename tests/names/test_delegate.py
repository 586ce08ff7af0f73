"""``meshlib.delegate``: the whole way of a name, as a tree, and as text."""

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.names import explain
from meshlib.names.addr import Address, Bound, Failed, Neg, Pending
from meshlib.names.base import VARIABLE
from meshlib.names.dtab import Dtab
from meshlib.names.interpreter import follow
from meshlib.names.path import Path
from meshlib.testing import Network, run_virtual

pytestmark = pytest.mark.anyio

BASE = """
/srv   => file:///nowhere/services ;
/users => 9 * /v1 & 1 * /v2 ;
/v1    => 10.0.0.1:80,10.0.0.2:80 ;
/v2    => 10.0.0.3:80 ;
/s     => / ;
"""


async def test_the_whole_way_is_told():
    with meshlib.dtab("/s/users/admin => ~ | /v2"):
        found = await meshlib.delegate("/s/users/admin", base=BASE)
    assert str(found) == (
        "/s/users/admin\n"
        "├─ [local] /s/users/admin => ~ | /v2\n"
        "│  └─ the first of\n"
        "│     ├─ ~ (no such name)\n"
        "│     └─ /v2\n"
        "│        └─ [base] /v2 => 10.0.0.3:80\n"
        "│           └─ 10.0.0.3:80 (1 endpoint: 10.0.0.3:80) <- 100 % of calls\n"
        "└─ [base] /s => /\n"
        "   └─ /users/admin\n"
        "      └─ [base] /users => 9 * /v1 & /v2\n"
        "         └─ shared among\n"
        "            ├─ 90 % /v1/admin\n"
        "            │  └─ [base] /v1 => 10.0.0.1:80,10.0.0.2:80\n"
        "            │     └─ 10.0.0.1:80,10.0.0.2:80/admin (2 endpoints: 10.0.0.1:80, 10.0.0.2:80)\n"
        "            └─ 10 % /v2/admin\n"
        "               └─ [base] /v2 => 10.0.0.3:80\n"
        "                  └─ 10.0.0.3:80/admin (1 endpoint: 10.0.0.3:80)"
    )


async def test_without_resolving_nothing_is_said_of_endpoints_or_shares():
    found = await meshlib.delegate("/s/users", base=BASE, resolve=False)
    assert "endpoint" not in str(found)
    assert "<-" not in str(found)
    assert found.share is None
    assert [target.text for target in found.targets()] == ["10.0.0.1:80,10.0.0.2:80", "10.0.0.3:80"]


async def test_a_name_that_leads_nowhere_says_where_it_ends():
    found = await meshlib.delegate("/s/orders", base=BASE)
    assert str(found).splitlines()[-1] == "   └─ /orders (no entry applies)"


async def test_a_target_that_cannot_be_resolved_says_why():
    found = await meshlib.delegate("/srv", base=BASE)
    assert "No such file or directory" in str(found)
    found = await meshlib.delegate("/x", "/x => consul://x", base=BASE)
    assert "no resolver for consul://" in str(found)


async def test_the_base_is_that_of_the_environment_unless_it_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "/s => h:1")
    assert "h:1" in str(await meshlib.delegate("/s", resolve=False))
    file = tmp_path / "dtab"
    file.write_text("/s => h:2")
    assert "h:2" in str(await meshlib.delegate("/s", base=f"file://{file}", resolve=False))


async def test_wrong_words_are_told():
    with pytest.raises(meshlib.ConfigurationError, match="give a logical path"):
        await meshlib.delegate("10.0.0.1:80")
    with pytest.raises(meshlib.DtabError):
        await meshlib.delegate("/s//x")
    with pytest.raises(meshlib.DtabError):
        await meshlib.delegate("/s", "/s =>")


async def test_a_base_that_cannot_be_read_is_told(monkeypatch):
    monkeypatch.setattr(explain, "PATIENCE", 0.5)
    with pytest.raises(meshlib.ResolutionError, match="there is no base Dtab: file:///no/such/dtab: FileNotFound"):
        await meshlib.delegate("/s", base="file:///no/such/dtab")


def test_a_client_tells_its_own_view():
    async def main():
        network = Network(wire="direct")
        network.name("a", ["10.0.0.1:80"])
        network.name("b").state.set(Neg("moved"))
        base = meshlib.base_dtab("/s => memory://b | memory://a")
        async with network.client("/s", base) as client:
            told = str(await client.delegate())
            assert "memory://b (no such name: moved)" in told
            assert "memory://a (1 endpoint: 10.0.0.1:80) <- 100 % of calls" in told
            with meshlib.dtab("/s => memory://c"):
                network.name("c").state.set(Pending())
                began = anyio.current_time()
                assert "memory://c (not resolved yet)" in str(await client.delegate())
                assert anyio.current_time() - began == pytest.approx(3, abs=0.1)
        async with network.client("memory://a") as client:
            with pytest.raises(meshlib.ConfigurationError, match="is bound already"):
                await client.delegate()
        with pytest.raises(meshlib.ServiceClosed):
            await client.delegate()

    run_virtual(main, seed=1)


async def test_a_typed_client_tells_it_as_well():
    class Greeter:
        @meshlib.rpc
        async def hello(self) -> str:
            return "hello"

    async with meshlib.serve(Greeter()) as server:
        client = meshlib.client(Greeter, "/s/greeter", meshlib.base_dtab(f"/s/greeter => {server.address}"))
        async with client as greeter:
            assert await greeter.hello() == "hello"
            assert f"{server.address} (1 endpoint" in str(await client.delegate())


# --- shares, as the calls have them -----------------------------------------------------------------------------------

STATES = {
    "up": Bound((Address("h", 1),)),
    "empty": Bound(()),
    "neg": Neg(),
    "failed": Failed("on fire"),
    "pending": Pending(),
}


def shares(dtab):
    found = follow(Dtab(dtab), Path.parse("/s")).resolved(lambda target: STATES[target.rest.rstrip("123")])
    flat = {}

    def walk(node):
        if node.bound is not None and node.share:
            flat[node.bound.rest] = round(node.share, 3)
        for child in node.children:
            walk(child)

    walk(found)
    return flat


@pytest.mark.parametrize(
    ("dtab", "expected"),
    [
        ("/s => t://neg | t://up", {"up": 1}),
        ("/s => t://empty | t://up", {"empty": 1}),
        ("/s => t://failed | t://up", {"failed": 1}),
        ("/s => t://pending | t://up", {"pending": 1}),
        ("/s => ! | t://up", {}),
        ("/s => t://up ; /s => (t://neg | !)", {}),
        ("/s => 3 * t://up1 & t://up2", {"up1": 0.75, "up2": 0.25}),
        ("/s => 3 * t://up1 & t://up2 & 6 * t://empty & 6 * t://failed & 6 * t://neg", {"up1": 0.75, "up2": 0.25}),
        ("/s => 3 * t://up1 & 1 * (t://up2 & t://up3)", {"up1": 0.75, "up2": 0.125, "up3": 0.125}),
        ("/s => (t://neg1 & t://neg2) | t://up", {"up": 1}),
        ("/s => (! & !) | t://up", {"up": 1}),
        ("/s => 0 * t://up1 & t://up2", {"up2": 1}),
    ],
)
def test_shares_follow_the_rules_of_the_calls(dtab, expected):
    assert shares(dtab) == expected


def test_in_one_line_it_is_no_longer_than_an_error_can_be():
    entries = " ; ".join(f"/s => /some/long/name/{n}" for n in range(100))
    assert len(follow(Dtab(entries), Path.parse("/s")).brief()) < 500


def test_it_is_not_confused_by_mux():
    assert mux.client("/s", meshlib.base_dtab("/s => h:1")).endpoints == ()
