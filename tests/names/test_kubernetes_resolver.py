"""``k8s://``: the endpoints of a Service, followed through all that an API server does: the double, over HTTP."""

import random

import anyio
import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

import meshlib
from meshlib.core.clock import Clock
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError
from meshlib.core.supervisor import Supervisor
from meshlib.names.addr import Bound, Failed, Neg
from meshlib.names.kubernetes import ConfigMapTexts, KubernetesResolver
from meshlib.names.kubernetes.config import find
from meshlib.names.kubernetes.place import Place
from meshlib.names.kubernetes.slices import Slice, Slices, part
from meshlib.names.target import Target
from meshlib.names.watch import Watch

from ..kubernetes import ApiServer, endpoint

TARGET = "k8s://shop/users:http"


class Followed:
    """A watch of a target, and what it has said."""

    def __init__(self, api, folder, target, **options):
        self.api, self.folder, self.target, self.options = api, folder, target, options

    async def __aenter__(self):
        access = await find(self.api.environ(self.folder))
        self.env = Env(clock=Clock(), rng=random.Random(1), supervisor=Supervisor("test"))
        resolver = KubernetesResolver(access, rng=random.Random(1), **self.options)
        self.watch = Watch(Target.parse(self.target), resolver, self.env)
        self.states = []
        self.watch.addr.watch(self.states.append)
        self.watch.start()
        return self

    async def __aexit__(self, *exc):
        with anyio.CancelScope(shield=True):
            await self.env.supervisor.aclose()

    @property
    def now(self):
        value = self.watch.addr.value
        return sorted(map(str, value.addresses)) if isinstance(value, Bound) else value

    async def comes_to(self, *addresses, seconds=15.0):
        with anyio.move_on_after(seconds):
            while self.now != sorted(addresses):  # noqa: ASYNC110 - a model of what users see
                await anyio.sleep(0.01)
        assert self.now == sorted(addresses), self.watch

    async def says(self, kind, text, seconds=15.0):
        with anyio.move_on_after(seconds):
            while not isinstance(self.now, kind):  # noqa: ASYNC110 - likewise
                await anyio.sleep(0.01)
        assert isinstance(self.now, kind), self.watch
        assert text in str(self.now)

    def never_empty(self):
        known = [state for state in self.states if isinstance(state, Bound)]
        return bool(known) and all(state.addresses for state in known)


@pytest.fixture
def follow(api_server: ApiServer, tmp_path):
    return lambda target=TARGET, **options: Followed(api_server, tmp_path, target, **options)


# --- following --------------------------------------------------------------------------------------------------------


async def test_slices_make_one_set_that_follows_them(api_server, follow):
    api_server.put_slice("shop", "users", "users-a", ["10.0.0.1", "10.0.0.2"], {"http": 8080, "admin": 9})
    api_server.put_slice("shop", "users", "users-b", ["10.0.0.2", "10.0.0.3"], {"http": 8080})
    api_server.put_slice("shop", "orders", "orders-a", ["10.0.9.9"], {"http": 8080})
    async with follow() as followed:
        await followed.comes_to("10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080")
        api_server.put_slice("shop", "users", "users-c", ["10.0.0.4"], {"http": 8080})
        await followed.comes_to("10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080", "10.0.0.4:8080")
        api_server.delete_slice("shop", "users-a")
        await followed.comes_to("10.0.0.2:8080", "10.0.0.3:8080", "10.0.0.4:8080")
        for name in ("users-b", "users-c"):
            api_server.put_slice("shop", "users", name, [], {"http": 8080})
        await followed.comes_to()


async def test_an_endpoint_that_moves_between_slices_never_leaves(api_server, follow):
    api_server.put_slice("shop", "users", "users-a", ["10.0.0.1", "10.0.0.2"], {"http": 80})
    async with follow() as followed:
        await followed.comes_to("10.0.0.1:80", "10.0.0.2:80")
        for n in range(6):
            here, there = ("users-a", "users-b") if n % 2 == 0 else ("users-b", "users-a")
            api_server.put_slice("shop", "users", here, ["10.0.0.1"], {"http": 80})
            api_server.put_slice("shop", "users", there, ["10.0.0.2"], {"http": 80})
        await anyio.sleep(0.5)
        assert followed.now == ["10.0.0.1:80", "10.0.0.2:80"]
        assert {len(state.addresses) for state in followed.states if isinstance(state, Bound)} == {2}


async def test_a_draining_pod_gets_no_new_requests(api_server, follow):
    leaving = endpoint("10.0.0.2", ready=False, serving=True, terminating=True)
    api_server.put_slice("shop", "users", "users-a", ["10.0.0.1", leaving], {"http": 80})
    async with follow() as followed:
        await followed.comes_to("10.0.0.1:80")
        api_server.put_slice("shop", "users", "users-a", [endpoint("10.0.0.1", ready=False), leaving], {"http": 80})
        await followed.comes_to("10.0.0.2:80")  # none is ready, and this one still serves


async def test_ports_by_name_by_number_and_the_only_one(api_server, follow):
    api_server.put_service("shop", "users", {"http": 80, "admin": 9000})
    api_server.put_slice("shop", "users", "users-a", ["10.0.0.1"], {"http": 8080, "admin": 9090})
    for target, port in ((TARGET, 8080), ("k8s://shop/users:admin", 9090), ("k8s://shop/users:80", 8080)):
        async with follow(target) as followed:
            await followed.comes_to(f"10.0.0.1:{port}")
    async with follow("k8s://shop/users") as followed:
        await followed.says(Failed, "has not exactly one TCP port; name one, as in k8s://shop/users:http")
    async with follow("k8s://shop/users:grpc") as followed:
        await followed.says(Failed, "has no TCP port grpc; its pods have: admin (9090), http (8080)")
    api_server.put_slice("shop", "users", "users-a", ["10.0.0.1"], {"http": 8080})
    async with follow("k8s://shop/users") as followed:
        await followed.comes_to("10.0.0.1:8080")


async def test_no_service_is_no_name_and_a_service_without_pods_is_empty(api_server, follow):
    async with follow() as followed:
        await followed.says(Neg, "there is no Service 'users' in namespace 'shop'")
    api_server.put_service("shop", "users")
    async with follow() as followed:
        await followed.comes_to()
        api_server.put_slice("shop", "users", "users-a", ["10.0.0.1"], {"http": 80})
        await followed.comes_to("10.0.0.1:80")


async def test_zones_nodes_and_pods_are_told(api_server, follow):
    pod = {"kind": "Pod", "name": "users-0", "namespace": "shop"}
    one = endpoint("10.0.0.1", zone="eu-1", nodeName="n1", targetRef=pod)
    api_server.put_slice("shop", "users", "users-a", [one], {"http": 80})
    async with follow() as followed:
        await followed.comes_to("10.0.0.1:80")
        (address,) = followed.watch.endpoints
        assert dict(address.metadata) == {"zone": "eu-1", "node": "n1", "pod": "users-0"}


# --- troubles ---------------------------------------------------------------------------------------------------------


async def test_an_api_server_that_restarts_empties_nothing(api_server, follow):
    api_server.put_slice("shop", "users", "users-a", ["10.0.0.1"], {"http": 80})
    async with follow() as followed:
        await followed.comes_to("10.0.0.1:80")
        for forget in (False, True):
            api_server.restart(forget)
            api_server.put_slice("shop", "users", "users-a", ["10.0.0.1", f"10.0.1.{forget + 0}"], {"http": 80})
            await followed.comes_to("10.0.0.1:80", f"10.0.1.{forget + 0}:80")
        assert followed.never_empty()
        assert followed.watch.problem == ""


@pytest.mark.parametrize("trouble", ["drop", "reset", "410 at once", "410 as an event", "503", "stalls"])
async def test_troubles_of_a_watch_lose_nothing(api_server, follow, trouble):
    api_server.put_slice("shop", "users", "users-a", ["10.0.0.1"], {"http": 80})
    async with follow(idle=0.5) as followed:
        await followed.comes_to("10.0.0.1:80")
        with anyio.fail_after(10):
            while not api_server.watches:  # noqa: ASYNC110 - in another thread
                await anyio.sleep(0.01)
        if trouble == "drop":
            api_server.drop("cut")
        elif trouble == "reset":
            api_server.drop("reset")
        elif trouble == "410 at once":
            api_server.advance(10)
            api_server.compact()
            api_server.drop()
        elif trouble == "410 as an event":
            api_server.expire_watches()
        elif trouble == "503":
            api_server.fail(3, 503)
            api_server.drop()
        else:
            api_server.stall()
        api_server.put_slice("shop", "users", "users-b", ["10.0.0.2"], {"http": 80})
        await followed.comes_to("10.0.0.1:80", "10.0.0.2:80")
        assert followed.never_empty()


async def test_what_is_not_allowed_is_told_with_the_rule_that_would(api_server, follow):
    api_server.forbid("list", "endpointslices")
    async with follow() as followed:
        await followed.says(Failed, 'apiGroups: ["discovery.k8s.io"], resources: ["endpointslices"]')
        assert "to list endpointslices.discovery.k8s.io in namespace 'shop'" in str(followed.now)


async def test_nobody_there_is_told(api_server, follow):
    api_server.stop()
    async with follow() as followed:
        await followed.says(Failed, "ConnectError")
    api_server.start()


async def test_a_client_calls_pods_and_an_api_server_that_is_away_fails_no_call(api_server, tmp_path, monkeypatch):
    async def serve(request):
        return meshlib.mux.Response(b"done")

    for key, value in api_server.environ(tmp_path).items():
        monkeypatch.setenv(key, value)
    async with meshlib.mux.serve(serve, "127.0.0.1:0") as one:
        port = int(one.address.rpartition(":")[2])
        api_server.put_slice("shop", "users", "users-a", ["127.0.0.1"], {"http": port})
        async with meshlib.mux.client(TARGET) as client:
            assert (await client(meshlib.mux.Request(b""))).body == b"done"
            api_server.stop()
            for _ in range(50):
                await client(meshlib.mux.Request(b""))
                await anyio.sleep(0.01)
            api_server.start()


# --- texts ------------------------------------------------------------------------------------------------------------


async def test_the_text_of_a_config_map_is_followed(api_server, tmp_path, caplog):
    access = await find(api_server.environ(tmp_path))
    texts = ConfigMapTexts(access).texts(Target.parse("k8s://shop/routes:dtab"))
    api_server.put_configmap("shop", "routes", {"dtab": "/s => /a", "other": "x"})
    with anyio.fail_after(20):
        assert await anext(texts) == "/s => /a"
        api_server.put_configmap("shop", "routes", {"dtab": "/s => /b", "other": "y"})
        assert await anext(texts) == "/s => /b"
        api_server.delete_configmap("shop", "routes")
        api_server.put_configmap("shop", "routes", {"dtab": "/s => /c"})
        assert await anext(texts) == "/s => /c"
    await texts.aclose()
    api_server.put_configmap("shop", "routes", {"a": "", "b": ""})
    with pytest.raises(ConfigurationError, match="has several keys"):
        await anext(ConfigMapTexts(access).texts(Target.parse("k8s://shop/routes")))


async def test_a_base_dtab_in_a_config_map_moves_traffic(api_server, tmp_path, monkeypatch):
    for key, value in api_server.environ(tmp_path).items():
        monkeypatch.setenv(key, value)

    def saying(word):
        async def serve(request):
            return meshlib.mux.Response(word)

        return serve

    async with (
        meshlib.mux.serve(saying(b"1"), "127.0.0.1:0") as one,
        meshlib.mux.serve(saying(b"2"), "127.0.0.1:0") as two,
    ):
        api_server.put_configmap("shop", "routes", {"dtab": f"/s/users => {one.address}"})
        base = meshlib.base_dtab("k8s://shop/routes:dtab")
        async with meshlib.mux.client("/s/users", base) as client:
            assert (await client(meshlib.mux.Request(b""))).body == b"1"
            api_server.put_configmap("shop", "routes", {"dtab": f"/s/users => {two.address}"})
            with anyio.fail_after(15):
                while (await client(meshlib.mux.Request(b""))).body != b"2":  # noqa: ASYNC110 - likewise
                    await anyio.sleep(0.02)


# --- pure -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["k8s://shop", "k8s://shop/", "k8s://shop/users:", "k8s://Shop/users:http", "k8s://shop/users:http/x",
     "k8s://shop/users:0", "k8s://shop/users:99999", "k8s://shop/us ers:http", "k8s://shop/..:http"],
)  # fmt: skip
def test_targets_that_make_no_sense_are_told_when_the_client_is_made(text):
    with pytest.raises(ConfigurationError, match="target"):
        meshlib.mux.client(text)


@given(st.text(max_size=30))
def test_whatever_a_target_says_is_read_or_refused(text):
    for read in (Place.service, Place.config_map):
        try:
            place = read(Target("k8s", text, f"k8s://{text}"))
        except ConfigurationError:
            continue
        assert "/" not in place.name + place.part


ENDPOINTS = st.lists(
    st.builds(
        lambda n, ready, terminating, serving: endpoint(
            f"10.0.0.{n}", ready=ready, terminating=terminating, serving=serving
        ),
        st.integers(1, 6),
        st.sampled_from([True, False, None]),
        st.booleans(),
        st.sampled_from([True, False, None]),
    ),
    max_size=4,
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abc"), ENDPOINTS),
        st.tuples(st.just("drop"), st.sampled_from("abc"), st.none()),
        st.tuples(st.just("list"), st.none(), st.none()),
    ),
    max_size=20,
)


def read(name, endpoints):
    ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
    raw = {"metadata": {"name": name}, "addressType": "IPv4", "endpoints": endpoints, "ports": ports}
    return part(msgspec.convert(raw, Slice), name="http")


@given(EVENTS)
def test_any_order_of_events_ends_in_what_a_final_list_gives(events):
    slices, truth = Slices(), {}
    for what, name, endpoints in events:
        if what == "put":
            truth[name] = endpoints
            slices.put(read(name, endpoints))
        elif what == "drop":
            truth.pop(name, None)
            slices.drop(name)
        else:
            slices.replace([read(name, found) for name, found in truth.items()])
    listed = Slices()
    listed.replace([read(name, found) for name, found in truth.items()])
    assert set(slices.addresses.addresses) == set(listed.addresses.addresses)
    every = [e for found in truth.values() for e in found]
    ready = {
        e["addresses"][0] for e in every if not e["conditions"]["terminating"] and e["conditions"]["ready"] is not False
    }
    if ready:
        assert {address.host for address in slices.addresses.addresses} == ready
