"""ZooKeeper without ZooKeeper: targets, what nodes say, smoothing, and any order of events against a scripted one."""

import json
import logging
import random
from contextlib import contextmanager

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kazoo.exceptions import ConnectionLoss, NoNodeError
from kazoo.protocol.states import EventType, KeeperState, WatchedEvent

from meshlib import mux
from meshlib.core.errors import ConfigurationError
from meshlib.core.var import Var
from meshlib.names.addr import Address, Bound, Neg
from meshlib.names.target import Target
from meshlib.names.zookeeper.members import LARGEST, Entry, Members, Vector, parse
from meshlib.names.zookeeper.place import Ensemble, Place
from meshlib.names.zookeeper.resolver import Follower
from meshlib.names.zookeeper.session import State
from meshlib.names.zookeeper.smoothing import BRIEF, HOLD, Smoothing
from meshlib.testing import run_virtual

from ..zookeeper import member


def place(text):
    return Place.parse(Target.parse(text))


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hosts", "path", "endpoint"),
    [
        ("zk://z/a", [("z", 2181)], "/a", ""),
        ("zk://z:99/a/b/", [("z", 99)], "/a/b", ""),
        ("zk://z2,z1:99/a!http", [("z1", 99), ("z2", 2181)], "/a", "http"),
        ("zk://[::1]:99,[::2]/a", [("::1", 99), ("::2", 2181)], "/a", ""),
        ("zk://u:p@z/a", [("z", 2181)], "/a", ""),
    ],
)
def test_targets(text, hosts, path, endpoint):
    read = place(text)
    assert (list(read.ensemble.hosts), read.path, read.endpoint) == (hosts, path, endpoint)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("zk:///a", "a host is missing"),
        ("zk://z,,y/a", "a host is missing"),
        ("zk://z", "the path is missing"),
        ("zk://z/", "the path is missing"),
        ("zk://z:0/a", "a port above 0"),
        ("zk://z:x/a", "with a port from 0 to 65535"),
        ("zk://::1/a", "brackets"),
        ("zk://z/a//b", "no path of ZooKeeper"),
        ("zk://z/a/../b", "no path of ZooKeeper"),
        ("zk://z/a\0b", "no path of ZooKeeper"),
        ("zk://z/a!", "name of an endpoint is missing"),
        ("zk://user@z/a", "user:password@"),
        ("zk://:p@z/a", "user:password@"),
        ("zk://z/a?x=1", "the settings are"),
        ("zk://z/a?tls", "the settings are"),
        ("zk://z/a?tls=yes", "true or false"),
        ("zk://z/a?ca=/nowhere.pem", "no such file"),
        ("zk://z/a?timeout=x", "expected seconds"),
        ("zk://z/a?timeout=0", "expected seconds"),
        ("zk://z/a?timeout=nan", "expected seconds"),
    ],
)
def test_malformed_targets_are_told(text, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        place(text)


def test_settings(tmp_path):
    ca, cert = tmp_path / "ca.pem", tmp_path / "cert.pem"
    ca.touch(), cert.touch()
    ensemble = place(f"zk://z/a?ca={ca}&cert={cert}&timeout=7.5").ensemble
    assert (ensemble.tls, ensemble.ca, ensemble.cert, ensemble.key, ensemble.timeout) == (
        True,
        str(ca),
        str(cert),
        "",
        7.5,
    )
    assert place("zk://z/a?tls=true").ensemble.tls
    with pytest.raises(ConfigurationError, match="certificates are given"):
        place(f"zk://z/a?tls=false&ca={ca}")
    with pytest.raises(ConfigurationError, match="key= needs cert="):
        place(f"zk://z/a?key={cert}")


def test_hosts_in_another_order_are_the_same_ensemble():
    assert place("zk://a,b/x").ensemble == place("zk://b,a:2181/y!http").ensemble
    assert place("zk://a/x").ensemble != place("zk://u:p@a/x").ensemble


def test_a_password_is_shown_nowhere():
    read = place("zk://user:s3cret%40home@z/a")
    assert read.ensemble.secret == "user:s3cret@home"
    assert "s3cret" not in f"{read} {read!r} {read.ensemble} {read.ensemble!r}"
    with pytest.raises(ConfigurationError) as caught:
        place("zk://user:s3c@ret@z")
    assert "ret" not in str(caught.value)
    assert "s3cret" not in f"{Target.parse('zk://user:s3cret@z/a')}{mux.client('zk://user:s3cret@z/a')!r}"


# --- what nodes say ---------------------------------------------------------------------------------------------------


def address_of(data, name="member_0000000001", endpoint=""):
    entry = parse(name, data, endpoint)
    assert isinstance(entry, Entry)
    return entry.address


def test_a_serverset_member():
    data = member(
        9000,
        "10.0.0.1",
        shard=3,
        metadata={"zone": "eu", "weight": "2.5"},
        additionalEndpoints={"http": {"host": "10.0.0.1", "port": 8080}},
    )
    address = address_of(data)
    assert (str(address), address.weight) == ("10.0.0.1:9000", 2.5)
    assert dict(address.metadata) == {"zone": "eu", "shard": "3"}
    assert str(address_of(data, endpoint="http")) == "10.0.0.1:8080"
    assert address_of(data, endpoint="admin") is None


@pytest.mark.parametrize("status", ["DEAD", "STARTING", "STOPPING", "STOPPED", "WARNING", "NEW", 7])
def test_only_those_alive_are_endpoints(status):
    assert address_of(member(9000, status=status)) is None


@pytest.mark.parametrize(
    ("name", "data", "address", "weight"),
    [
        ("one", b"h:80", "h:80", 1.0),
        ("one", b" h:80 \n", "h:80", 1.0),
        ("one", b"h:80 weight=3 zone=eu", "h:80", 3.0),
        ("h:80", b"", "h:80", 1.0),
        ("[::1]:80", b"", "[::1]:80", 1.0),
    ],
)
def test_plain_members(name, data, address, weight):
    read = address_of(data, name)
    assert (str(read), read.weight) == (address, weight)
    assert address_of(data, name, "http") is None


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("m", b"h", "host:port"),
        ("m", b"", "host:port"),
        ("m", b"h:80 x", "setting"),
        ("m", b"h:0", "no place to connect to"),
        ("m", b"h:80 weight=0", "above 0"),
        ("m", b"h:80 weight=nan", "above 0"),
        ("m", b"h:80 weight=x", "no number"),
        ("m", b"\xff:80", "UTF-8"),
        ("m", b"{", "not JSON"),
        ("m", b"{" * 50_000, "not JSON"),
        ("m", b'{"a":' * 10_000, "not JSON"),
        ("m", b"x" * (LARGEST + 1), "the limit is"),
        ("m", member(0), "no place to connect to"),
        ("m", member(70000), "no place to connect to"),
        ("m", member(80, "a b"), "no place to connect to"),
        ("m", member(80, "h" * 300), "no place to connect to"),
        ("m", member(True), "no endpoint"),
        ("m", b'{"serviceEndpoint":[]}', "no endpoint"),
        ("m", member(80, shard="x"), "whole number"),
        ("m", member(80, metadata=[1]), "must be objects"),
        ("vector_1", b"h:80", "JSON object"),
        ("vector_1", b"{}", "a list named vector"),
        ("vector_1", b'{"vector":[{}]}', "expected"),
        ("vector_1", b'{"vector":[{"select":"rack=1"}]}', "selects neither"),
        ("vector_1", b'{"vector":[{"select":"shard=1","weight":-2}]}', "nor -1"),
        ("vector_1", b'{"vector":[{"select":"shard=1","weight":NaN}]}', "nor -1"),
        ("vector_1", b'{"vector":[{"select":"shard=1","weight":1e999}]}', "nor -1"),
    ],
)
def test_nonsense_is_told(name, data, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse(name, data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
keys = ["serviceEndpoint", "additionalEndpoints", "status", "shard", "metadata", "vector", "host", "port", "x"]
objects = st.recursive(
    json_values,
    lambda inner: st.dictionaries(st.sampled_from(keys), inner, max_size=6) | st.lists(inner, max_size=3),
    max_leaves=20,
)


@given(
    st.sampled_from(["member_0000000001", "vector_1", "h:80"]),
    st.binary(max_size=60) | objects.map(lambda value: json.dumps(value).encode()),
    st.sampled_from(["", "http", "x"]),
)
@settings(max_examples=300)
def test_whatever_a_node_says_is_read_or_refused(name, data, endpoint):
    try:
        said = parse(name, data, endpoint)
    except ValueError:
        return
    assert isinstance(said, Entry | Vector)
    if isinstance(said, Entry) and said.address is not None:
        assert 0 < said.address.port < 65536
        assert 0 < said.address.weight < float("inf")


def known(**nodes):
    members = Members()
    members.listed(nodes, 1)
    for name in members.take():
        members.read(name, parse(name, nodes[name]))
    return members


def weights(members):
    return {str(address): address.weight for address in members.addresses().values()}


def test_vectors_multiply_and_exclude():
    members = known(
        member_1=member(1, shard=1, metadata={"weight": 4}),
        member_2=member(2, shard=2),
        member_3=member(3, shard=3),
        member_4=member(4, shard=4),
        vector_a=b'{"vector":[{"select":"shard=1","weight":0.5},{"select":"member=member_2","weight":3}]}',
        vector_b=b'{"vector":[{"select":"inet=127.0.0.1:1","weight":0.25,"priority":1},{"select":"shard=3","weight":-1}]}',
        vector_c=b'{"vector":[{"select":"shard=3","weight":-1},{"select":"shard=4","weight":0}]}',
    )
    # Two vectors that exclude shard 3 exclude it; Finagle would multiply them to 1.
    assert weights(members) == {"127.0.0.1:1": 0.5, "127.0.0.1:2": 3.0}
    members.read("vector_a", parse("vector_a", b'{"vector":[]}'))
    assert weights(members) == {"127.0.0.1:1": 1.0, "127.0.0.1:2": 1.0}


def test_of_two_at_one_address_the_newer_counts():
    members = known(member_1=member(1, metadata={"v": "old"}), member_2=member(1, metadata={"v": "new"}))
    (address,) = members.addresses().values()
    assert dict(address.metadata) == {"v": "new"}
    members.listed(["member_2"], 1)
    assert len(members.addresses()) == 1


def test_members_are_read_once_and_what_may_be_rewritten_again():
    members = known(member_0000000001=member(1), one=b"h:80", vector_0000000001=b'{"vector":[]}')
    assert not members.listed(["one", "member_0000000001", "vector_0000000001"], 1)
    assert members.take() == []
    members.doubt()
    assert members.take() == ["one", "vector_0000000001"]
    assert len(members.addresses()) == 2, "what they said stays until they are read again"


def test_members_of_a_path_that_was_made_again_are_others():
    members = known(member_0000000000=member(1))
    assert members.listed(["member_0000000000"], 2)
    assert members.take() == ["member_0000000000"]
    assert members.addresses() == {}


def test_a_change_that_is_heard_while_it_is_read_is_read_again():
    members = known(one=b"h:80")
    members.changed("one")
    assert members.take() == ["one"]
    members.changed("one")
    members.read("one", parse("one", b"h:81"))
    assert members.take() == ["one"]


def test_one_that_was_gone_when_it_was_read_is_another_when_it_is_listed_again():
    members = known(one=b"h:80")
    members.gone("one")
    assert members.listed(["one"], 1)
    assert members.take() == ["one"]


def test_why_there_is_none():
    assert known().why_none == "it has no members"
    assert "status STOPPING" in known(member_1=member(1, status="STOPPING")).why_none
    other = Members()
    other.listed(["m"], 1)
    data = member(1, additionalEndpoints={"http": {"host": "h", "port": 80}})
    other.read("m", parse("m", data, "admin"))
    assert other.why_none == ("none of its 1 members can be used: no endpoint 'admin'; there are endpoints named http")


# --- smoothing --------------------------------------------------------------------------------------------------------


def some(*ports):
    return {Address("h", port): Address("h", port) for port in ports}


def ports(smoothing):
    return sorted(address.port for address in smoothing.addresses)


def test_additions_are_immediate_and_a_removal_waits_a_moment():
    smoothing = Smoothing()
    smoothing.see(some(1, 2, 3), 0)
    smoothing.see(some(2, 3, 4), 5)
    assert ports(smoothing) == [1, 2, 3, 4]
    assert smoothing.deadline == 5 + BRIEF
    smoothing.settle(5 + BRIEF - 0.01)
    assert ports(smoothing) == [1, 2, 3, 4]
    smoothing.settle(5 + BRIEF)
    assert ports(smoothing) == [2, 3, 4]
    assert smoothing.deadline is None


def test_one_that_returns_has_never_left():
    smoothing = Smoothing()
    smoothing.see(some(1, 2), 0)
    smoothing.see(some(2), 1)
    smoothing.see(some(1, 2), 1.5)
    smoothing.see(some(2), 1.6)
    smoothing.settle(1 + BRIEF)
    assert ports(smoothing) == [1, 2]
    smoothing.settle(1.6 + BRIEF)
    assert ports(smoothing) == [2]


@pytest.mark.parametrize(("listed", "wait"), [((), HOLD), ((3,), HOLD), ((2, 3), BRIEF)])
def test_the_greater_part_is_held(listed, wait):
    smoothing = Smoothing()
    smoothing.see(some(1, 2, 3), 0)
    smoothing.see(some(*listed), 0)
    assert smoothing.deadline == wait
    smoothing.settle(wait - 0.01)
    assert ports(smoothing) == [1, 2, 3]
    smoothing.settle(wait)
    assert ports(smoothing) == list(listed)


def test_those_that_return_one_by_one_are_waited_for():
    smoothing = Smoothing()
    smoothing.see(some(1, 2, 3), 0)
    smoothing.see(some(), 0)
    smoothing.see(some(1), 3)
    smoothing.see(some(1, 2), 6)  # the third is the smaller part now, and has been away for longer than BRIEF
    assert ports(smoothing) == [1, 2, 3]
    assert smoothing.deadline == 6 + BRIEF
    smoothing.settle(6 + BRIEF)
    assert ports(smoothing) == [1, 2]


def test_those_that_return_forever_keep_no_other_for_longer_than_the_hold():
    smoothing = Smoothing()
    smoothing.see(some(1, 2, 3, 4), 0)
    for tenth in range(int(HOLD * 10)):
        smoothing.see(some(1, 2, 3) if tenth % 2 else some(1, 2), tenth / 10)
    assert ports(smoothing) == [1, 2, 3, 4]
    smoothing.settle(HOLD)
    assert ports(smoothing) == [1, 2, 3]


def test_the_time_begins_again_after_an_outage():
    smoothing = Smoothing()
    smoothing.see(some(1, 2, 3), 0)
    smoothing.see(some(2, 3), 1)
    smoothing.doubt()
    smoothing.see(some(2, 3), 100)
    assert ports(smoothing) == [1, 2, 3]
    smoothing.settle(100 + BRIEF)
    assert ports(smoothing) == [2, 3]


def test_new_weights_are_news_at_once():
    smoothing = Smoothing()
    smoothing.see(some(1), 0)
    heavy = Address("h", 1, weight=5.0)
    smoothing.see({heavy: heavy}, 1)
    assert smoothing.addresses[0].weight == 5.0


listings = st.lists(st.tuples(st.sets(st.integers(1, 6)), st.floats(0, 4), st.booleans()), min_size=1, max_size=12)


@given(listings)
def test_smoothing_never_hides_what_is_listed_and_ends_in_the_last_listing(steps):
    smoothing, now = Smoothing(), 0.0
    for listed, wait, doubt in steps:
        now += wait
        smoothing.settle(now)
        before = set(ports(smoothing))
        if doubt:
            smoothing.doubt()
        smoothing.see(some(*listed), now)
        assert listed <= set(ports(smoothing)) <= listed | before
        assert not doubt or set(ports(smoothing)) == listed | before
    while smoothing.deadline is not None:
        assert smoothing.deadline <= now + HOLD
        now = max(now, smoothing.deadline)
        smoothing.settle(now)
    assert set(ports(smoothing)) == steps[-1][0]


# --- any order of events ----------------------------------------------------------------------------------------------

PATH = "/s"


class Scripted:
    """A session with a ZooKeeper of its own in virtual time: slow, lossy, its watches late and in any order."""

    def __init__(self, rng):
        self.rng = rng
        self.state = Var(State.CONNECTED)
        self.problem = "down"
        self.path = None
        self.nodes = {}
        self.zxid = 0
        self.child_watch = False
        self.data_watches = set()
        self.followers = []
        self.events = []
        self.flaky = 0.0
        self.losses = 0

    # what Follower uses

    async def ready(self):
        await self.state.wait_for(lambda state: state.usable)

    def fired(self, event):
        for path, changed, child in self.followers:
            if event.path == path:
                changed()
            elif event.path.rpartition("/")[0] == path:
                child(event.path.rpartition("/")[2])

    @contextmanager
    def follow(self, path, changed, child):
        self.followers.append((path, changed, child))
        yield

    async def call(self, operation, path, watch=None, include_data=False):
        await self.lag()
        if operation == "exists":
            self.data_watches.add(path)
            result = self.path
        elif self.path is None:
            raise NoNodeError
        else:
            self.child_watch = True
            result = list(self.nodes), type("Stat", (), {"czxid": self.path})
        await self.lag()
        return result

    async def read(self, nodes, parse):
        outcomes = {}
        for path, watch in nodes:
            try:
                await self.lag(self.rng.choice([0.1, 1.0]))
            except ConnectionLoss as error:
                outcomes[path] = error
                break
            data = self.nodes.get(path.rpartition("/")[2]) if self.path is not None else None
            if watch is not None and data is not None:
                self.data_watches.add(path)
            outcomes[path] = None if data is None else parse(path, data)
        return outcomes

    async def lag(self, factor=1.0):
        await self.ready()
        losses = self.losses
        await anyio.sleep(self.rng.random() * 0.2 * factor)
        if self.rng.random() < self.flaky or losses != self.losses:
            raise ConnectionLoss

    # what happens

    def notify(self, kind, path):
        if kind == EventType.CHILD:
            if not self.child_watch:
                return
            self.child_watch = False
        elif path in self.data_watches:
            self.data_watches.discard(path)
        else:
            return
        event = WatchedEvent(kind, KeeperState.CONNECTED, path)
        if self.state.value.usable:
            self.events.insert(self.rng.randrange(len(self.events) + 1), event)

    def deliver(self):
        events, self.events = self.events, []
        for event in events:
            self.fired(event)

    def make(self):
        self.zxid += 1
        if self.path is None:
            self.path = self.zxid
            self.notify(EventType.CREATED, PATH)

    def put(self, name, port):
        self.make()
        new = name not in self.nodes
        if "_" in name:  # a sequential one is never rewritten, but another in a path that is made again
            port += self.path % 3
        self.nodes[name] = b"h:%d" % port
        if new:
            self.notify(EventType.CHILD, PATH)
        else:
            self.notify(EventType.CHANGED, f"{PATH}/{name}")

    def drop(self, name):
        if self.nodes.pop(name, None):
            self.notify(EventType.DELETED, f"{PATH}/{name}")
            self.notify(EventType.CHILD, PATH)

    def drop_all(self):
        for name in list(self.nodes):
            self.drop(name)
        if self.path is not None:
            self.path = None
            if self.child_watch or PATH in self.data_watches:
                self.child_watch = False
                self.data_watches.add(PATH)
                self.notify(EventType.DELETED, PATH)

    def lose(self):
        self.losses += 1
        self.state.set(State.SUSPENDED)
        self.child_watch = False
        self.data_watches.clear()
        self.events.clear()

    def back(self):
        if not self.state.value.usable:
            self.state.set(State.CONNECTED)

    def truth(self):
        return {int(data[2:]) for data in self.nodes.values()} if self.path is not None else None


def steps(rng):
    """Some forty of them. Rewriting, deleting and losing matter after something was read, so that it often sleeps."""
    for _ in range(rng.randrange(1, 40)):
        yield from rng.choices(
            [
                [("put", rng.choice("abc"), rng.randint(1, 5))],
                [("put", rng.choice(["m_0000000000", "m_0000000001"]), 6)],
                [("drop", rng.choice(["a", "b", "m_0000000000"]))],
                [("drop_all",)],
                [("drop_all",), ("make",)],
                [("drop_all",), ("deliver",), ("sleep", rng.random() / 2), ("put", "a", 1)],
                [("lose",)],
                [("back",)],
                [("deliver",)],
                [("flaky", rng.choice([0.0, 0.3]))],
            ],
            [6, 3, 2, 1, 1, 2, 2, 4, 4, 1],
        )[0]
        if rng.random() < 0.5:
            yield "sleep", rng.choice([0.05, 0.3, 2, 12])


@pytest.mark.parametrize("first", range(0, 400, 40))
def test_any_order_of_events_ends_in_what_a_last_listing_gives(first):
    for seed in range(first, first + 40):
        check_order(seed)


def check_order(seed):
    async def main():
        rng = random.Random(seed)
        zookeeper = Scripted(random.Random(seed))
        states = []

        async def follow():
            # No relisting: that would repair what is to be shown.
            follower = Follower(
                zookeeper, Place(Ensemble((("z", 1),)), PATH), Smoothing(), (1e9, 1e9), random.Random(seed)
            )
            with follower.following():
                while True:
                    states.append(await follower.next())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            for step, *args in steps(rng):
                if step == "sleep":
                    await anyio.sleep(args[0])
                elif step == "flaky":
                    zookeeper.flaky = args[0]
                else:
                    getattr(zookeeper, step)(*args)
            zookeeper.flaky = 0.0
            zookeeper.deliver()
            zookeeper.back()
            for _ in range(200):  # watches that are set now fire late as well
                await anyio.sleep(1)
                zookeeper.deliver()
            tasks.cancel_scope.cancel()
        truth = zookeeper.truth()
        if truth:
            assert isinstance(states[-1], Bound)
            assert {address.port for address in states[-1].addresses} == truth, seed
        else:
            assert isinstance(states[-1], Neg), seed

    run_virtual(main, seed=seed)


def test_after_an_outage_the_greater_part_is_held_anew():
    async def main():
        zookeeper = Scripted(random.Random(1))
        for name, port in (("a", 1), ("b", 2), ("c", 3)):
            zookeeper.put(name, port)
        states = []

        async def follow():
            follower = Follower(zookeeper, Place(Ensemble((("z", 1),)), PATH), Smoothing(), (30, 60), random.Random(1))
            with follower.following():
                while True:
                    state = await follower.next()
                    states.append((anyio.current_time(), state))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            await anyio.sleep(2)
            zookeeper.drop_all()
            zookeeper.deliver()
            await anyio.sleep(HOLD - 3)
            zookeeper.lose()
            await anyio.sleep(60)
            back = anyio.current_time()
            zookeeper.back()
            await anyio.sleep(HOLD * 2)
            tasks.cancel_scope.cancel()
        (_, first), (_, down), (again_at, again), (none_at, none) = states
        assert len(first.addresses) == len(again.addresses) == 3
        assert "no connection to zk://z:1: down" in str(down)
        assert back <= again_at < back + 1
        assert str(none) == "no such name: there is no /s"
        assert back + HOLD <= none_at < back + HOLD + 1

    run_virtual(main)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, "meshlib.names.zookeeper")
