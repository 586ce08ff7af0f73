"""gRPC's service configs: what is read, what is refused and where, and what the layers do with real calls."""

import json
import math

import anyio
import pytest
from grpclib.client import StreamUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError

import meshlib
import meshlib.grpc
from meshlib.core.service import Filter
from meshlib.grpc.calling.configured import ExponentialBackoff, Tokens
from meshlib.grpc.calling.methodconfig import (
    Hedging,
    MethodConfig,
    Retries,
    ServiceConfig,
    Throttling,
    parse,
    service_config,
)

from .scripted import answering, channel, scripted, unary
from .test_channel import failing_at_first, status

RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.001s",
    "maxBackoff": "0.01s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "aborted", 8],
}
ALL = [{}]


def entry(name=ALL, **fields):
    return {"methodConfig": [{"name": name, **fields}]}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_whole_config():
    config = parse(
        {
            "loadBalancingConfig": [{"round_robin": {}}],
            "healthCheckConfig": {"serviceName": ""},
            "somethingNew": 1,
            "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1239},
            "methodConfig": [
                {
                    "name": [{"service": "a.B", "method": "C"}, {"service": "d.E", "method": "F"}],
                    "timeout": "1.5s",
                    "waitForReady": True,
                    "maxRequestMessageBytes": "100",
                    "maxResponseMessageBytes": 200,
                    "retryPolicy": RETRY,
                },
                {
                    "name": [{"service": "a.B"}],
                    "hedgingPolicy": {"maxAttempts": 9, "hedgingDelay": "0s", "nonFatalStatusCodes": ["UNAVAILABLE"]},
                },
                {"name": [{}], "timeout": "10s"},
            ],
        }
    )
    statuses = frozenset((Status.UNAVAILABLE, Status.ABORTED, Status.RESOURCE_EXHAUSTED))
    first = MethodConfig(1.5, True, 100, 200, Retries(4, 0.001, 0.01, 2.0, statuses))
    assert config.of("/a.B/C") == config.of("/d.E/F") == first
    assert config.of("/a.B/Other") == MethodConfig(hedging=Hedging(5, 0.0, frozenset((Status.UNAVAILABLE,))))
    assert config.of("/d.E/Other") == config.of("/x.Y/Z") == MethodConfig(10.0)
    assert config.throttling == Throttling(10, 0.123)
    assert ServiceConfig({}).of("/a.B/C") is None


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"methodConfig": {}}, "top.methodConfig: {}, expected a list"),
        ({"methodConfig": [5]}, "top.methodConfig[0]: 5, expected an object"),
        ({"methodConfig": [{}]}, "top.methodConfig[0]: name is missing"),
        (entry([]), "top.methodConfig[0].name: [], expected a list that is not empty"),
        (entry([{"method": "M"}]), 'top.methodConfig[0].name[0]: {"method": "M"}, expected a service'),
        (entry([{"service": 5}]), "top.methodConfig[0].name[0].service: 5, expected a text"),
        (entry([{}, {}]), "top.methodConfig[0].name[1]: {}, expected a name that no other entry has"),
        (entry(timeout="5"), "timeout"),
        (entry(timeout="-1s"), 'top.methodConfig[0].timeout: "-1s", expected a duration'),
        (entry(timeout="0s"), "timeout"),
        (entry(timeout=5), "timeout"),
        (entry(waitForReady="yes"), "waitForReady"),
        (entry(maxRequestMessageBytes=-1), "maxRequestMessageBytes"),
        (entry(maxResponseMessageBytes=1.5), "maxResponseMessageBytes"),
        (entry(retryPolicy={**RETRY, "maxAttempts": 1}), "maxAttempts: 1, expected a whole number above 1"),
        (entry(retryPolicy={**RETRY, "maxAttempts": True}), "maxAttempts"),
        (entry(retryPolicy={**RETRY, "initialBackoff": "0s"}), "initialBackoff"),
        (entry(retryPolicy={**RETRY, "maxBackoff": None}), "retryPolicy: maxBackoff is missing"),
        (entry(retryPolicy={**RETRY, "backoffMultiplier": 0}), "backoffMultiplier"),
        (entry(retryPolicy={**RETRY, "retryableStatusCodes": []}), "retryableStatusCodes"),
        (entry(retryPolicy={**RETRY, "retryableStatusCodes": ["OK"]}), "retryableStatusCodes"),
        (entry(retryPolicy={**RETRY, "retryableStatusCodes": ["NOPE"]}), 'retryableStatusCodes[0]: "NOPE"'),
        (entry(retryPolicy={**RETRY, "retryableStatusCodes": [17]}), "retryableStatusCodes[0]"),
        (entry(retryPolicy=RETRY, hedgingPolicy={"maxAttempts": 2}), "one of the two"),
        (entry(hedgingPolicy={}), "hedgingPolicy: maxAttempts is missing"),
        (entry(hedgingPolicy={"maxAttempts": 2, "hedgingDelay": "soon"}), "hedgingDelay"),
        ({"retryThrottling": {"maxTokens": 0, "tokenRatio": 1}}, "top.retryThrottling.maxTokens: 0"),
        ({"retryThrottling": {"maxTokens": 1001, "tokenRatio": 1}}, "maxTokens"),
        ({"retryThrottling": {"maxTokens": 10, "tokenRatio": 0.0001}}, "tokenRatio"),
        ({"retryThrottling": {"maxTokens": 10}}, "tokenRatio is missing"),
        ({"retryThrottling": {"maxTokens": 10, "tokenRatio": math.inf}}, "tokenRatio: Infinity"),
        ({"retryThrottling": {"maxTokens": 10, "tokenRatio": 10**400}}, "tokenRatio"),
        (entry(retryPolicy={**RETRY, "backoffMultiplier": math.nan}), "backoffMultiplier"),
        (entry([{"service": "/a.B/"}]), "expected names without slashes"),
        (entry([{"service": "a.B", "method": "/M"}]), "expected names without slashes"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(config, where):
    with pytest.raises(meshlib.ConfigurationError) as caught:
        service_config(config)
    assert where in str(caught.value)


def test_a_config_is_a_text_a_file_or_what_it_was_read_into(tmp_path):
    config = entry(timeout="3s")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    for given in (config, json.dumps(config), path, str(path)):
        assert repr(service_config(given)) == "timeout(by method: 3 s)"
    path.write_text(json.dumps(config), "utf-8-sig")  # as some editors do
    for given in (path, "\ufeff" + json.dumps(config)):
        assert repr(service_config(given)) == "timeout(by method: 3 s)"
    with pytest.raises(meshlib.ConfigurationError, match="'timeout' is said twice"):
        service_config(json.dumps(config).replace('"timeout": "3s"', '"timeout": "3s", "timeout": "4s"'))
    path.write_text("{")
    for wrong in ("{", str(path), path, str(tmp_path), "/nowhere", '{"a": 1', "[1]"):
        with pytest.raises(meshlib.ConfigurationError, match="service config"):
            service_config(wrong)
    path.write_text("[1]")
    with pytest.raises(meshlib.ConfigurationError, match="expected an object"):
        service_config(path)


def test_layers_are_there_for_what_is_said_alone():
    assert list(service_config({})) == []
    assert [layer.place for layer in service_config(entry(waitForReady=True))] == ["filters"]
    assert [layer.place for layer in service_config(entry(retryPolicy=RETRY))] == ["retry"]
    assert [layer.place for layer in service_config(entry(hedgingPolicy={"maxAttempts": 2}))] == ["retry", "hedge"]


def test_tokens_run_out_and_come_back():
    tokens = Tokens(Throttling(4, 0.5))
    assert [tokens.failed() for _ in range(6)] == [True, False, False, False, False, False]
    assert tokens.left == 0
    for _ in range(4):
        tokens.succeeded()
    assert not tokens.allows
    tokens.succeeded()
    assert tokens.allows
    for _ in range(99):
        tokens.succeeded()
    assert tokens.left == 4


def test_backoffs():
    class Most:
        def uniform(self, low, high):
            assert low == 0
            return high

    backoff = ExponentialBackoff(0.1, 0.5, 2)
    assert [backoff.delay(n, Most()) for n in range(1, 6)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    backoff = ExponentialBackoff(0.1, 0.5, 1e308)
    assert [backoff.delay(n, Most()) for n in range(1, 6)] == [0.1, 0.5, 0.5, 0.5, 0.5]


# --- doing ------------------------------------------------------------------------------------------------------------


async def test_the_methods_policy_decides_and_makes_it_idempotent():
    config = service_config(entry([{"service": "x.Y", "method": "Z"}], retryPolicy=RETRY))
    async with (
        scripted(failing_at_first(status(14), status(10), status(8))) as (address, peers),
        channel(address, *config) as each,
    ):
        assert await unary(each)(b"x") == b"well"
        assert "retry(by method" in repr(each)
    assert [head.get("grpc-previous-rpc-attempts") for head in peers[0].heads.values()] == [None, "1", "2", "3"]
    async with (
        scripted(failing_at_first(status(13))) as (address, peers),
        channel(address, *config, idempotent=True) as each,
    ):
        with pytest.raises(GRPCError):
            await unary(each)(b"x")  # INTERNAL is not among them
        assert len(peers[0].requests) == 1
    async with (
        scripted(failing_at_first(status(13))) as (address, peers),
        channel(address, *config, idempotent=True) as each,
    ):
        assert await unary(each, "/x.Y/Other")(b"x") == b"well"  # and of this one nothing is said


async def test_throttled_retries_stop():
    config = service_config({**entry(retryPolicy=RETRY), "retryThrottling": {"maxTokens": 4, "tokenRatio": 0.1}})
    async with scripted(answering(status(14))) as (address, peers), channel(address, *config) as each:
        for _ in range(3):
            with pytest.raises(GRPCError):
                await unary(each)(b"x")
    assert [head.get("grpc-previous-rpc-attempts") for head in peers[0].heads.values()] == [None, "1", None, None]


async def test_timeouts_by_method_hold_for_streams_too():
    config = service_config(entry([{"service": "x.Y", "method": "Z"}], timeout="0.05s"))
    async with scripted(answering(lambda p, s: None)) as (address, peers), channel(address, *config) as each:
        with pytest.raises(meshlib.DeadlineExceeded):
            await unary(each)(b"x")
        with pytest.raises(meshlib.DeadlineExceeded):
            await StreamUnaryMethod(each, "/x.Y/Z", bytes, bytes)([b"x"])
        with pytest.raises(meshlib.DeadlineExceeded):
            await unary(each)(b"x", timeout=0.01)
        with anyio.move_on_after(0.1) as scope:
            await StreamUnaryMethod(each, "/x.Y/Other", bytes, bytes)([b"x"])
        assert scope.cancelled_caught
    timeouts = [(head[":path"], head.get("grpc-timeout")) for head in peers[0].heads.values()]
    assert timeouts[-1] == ("/x.Y/Other", None)
    assert len(timeouts) >= 3  # one of 10 ms may be over before it is sent
    for path, text in timeouts[:-1]:
        assert path == "/x.Y/Z"
        assert int(text[:-1]) <= 50_000


@pytest.mark.parametrize("first", [True, False])
async def test_methods_of_which_nothing_is_said_keep_the_layers_that_were_given_with_the_config(first):
    said = entry([{"service": "x.Y", "method": "Z"}], timeout="9s", retryPolicy=RETRY)
    own = (meshlib.retry(attempts=1), meshlib.timeout(1.5, attempt=1))
    layers = (service_config(said), *own) if first else (*own, service_config(said))
    async with (
        scripted(failing_at_first(status(14), status(14), status(14))) as (address, peers),
        channel(address, *layers, idempotent=True) as each,
    ):
        assert "else timeout(total=1.5 s)" in repr(each)
        assert "else retry(attempts=1" in repr(each)
        with pytest.raises(GRPCError):
            await unary(each, "/x.Y/Other")(b"x")
        assert len(peers[0].requests) == 1
        assert await unary(each)(b"x") == b"well"
        assert len(peers[0].requests) == 4
    left = [int(head["grpc-timeout"][:-1]) / 1e6 for head in peers[0].heads.values()]
    assert 1 < left[0] <= 1.5
    assert all(8 < seconds <= 9 for seconds in left[1:])


class Noting(Filter):
    place = "hedge"

    def __init__(self, seen):
        self.seen = seen

    async def apply(self, request, service):
        self.seen.append(request.dest)
        return await service(request)


async def test_methods_of_which_nothing_is_said_are_hedged_as_told_and_may_take_as_long_as_they_say():
    said = entry(
        [{"service": "x.Y", "method": "Z"}], timeout="1s", hedgingPolicy={"maxAttempts": 2, "hedgingDelay": "30s"}
    )
    seen = []
    async with (
        scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, peers),
        channel(address, service_config(said), Noting(seen)) as each,
    ):
        assert await unary(each, "/x.Y/Other")(b"x", timeout=60) == b"well"
        assert await unary(each)(b"x", timeout=60) == b"well"
    assert seen == ["/x.Y/Other"]
    assert 59_000 < int(peers[0].heads[1]["grpc-timeout"][:-1]) <= 60_000
    assert peers[0].heads[3]["grpc-timeout"].endswith("u")


def test_a_layer_that_is_none_is_refused_beside_a_config_as_well():
    for wrong in (meshlib.grpc.Channel, print, 5):
        with pytest.raises(meshlib.ConfigurationError, match=r"layer|value"):
            meshlib.grpc.Channel("127.0.0.1:1", service_config(entry(retryPolicy=RETRY)), wrong)


async def test_sizes_by_method():
    config = service_config(entry(maxRequestMessageBytes=3, maxResponseMessageBytes="5"))
    async with (
        scripted(answering(lambda p, s: p.answer(s, b"x" * 6))) as (address, peers),
        channel(address, *config) as each,
    ):
        with pytest.raises(GRPCError, match="4 bytes is larger than the 3") as caught:
            await unary(each)(b"four")
        assert caught.value.status is Status.RESOURCE_EXHAUSTED
        with pytest.raises(GRPCError, match="4 bytes is larger than the 3"):
            await StreamUnaryMethod(each, "/x.Y/Z", bytes, bytes)([b"one", b"four"])
        assert all(head[":path"] for head in peers[0].heads.values()) if peers else True
        with pytest.raises(GRPCError, match="6 bytes, more than the 5"):
            await unary(each)(b"two")


async def test_a_call_that_waits_for_ready_waits_until_its_deadline():
    config = service_config(entry([{"service": "x.Y", "method": "Z"}], waitForReady=True))
    from meshlib.core.var import Var
    from meshlib.names.addr import Address, Bound

    word = Var(Bound(()))

    class Told:
        async def watch(self, target):
            seen = -1
            while True:
                seen = await word.changed(seen)
                yield word.value

    from meshlib.balancing import balancer
    from meshlib.names import resolver

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolver, "_of_others", lambda target: Told())
        patch.setattr(balancer, "PATIENCE", 0.02)
        async with (
            scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, _),
            channel("told://x", *config) as each,
        ):
            with pytest.raises(meshlib.NoEndpoints):
                await unary(each, "/x.Y/Hurried")(b"x")
            with pytest.raises(GRPCError):
                await unary(each)(b"x", timeout=0.2)
            async with anyio.create_task_group() as group:
                group.start_soon(unary(each), b"x")
                await anyio.sleep(0.1)
                word.set(Bound.of([Address.parse(address)]))


async def test_copies_go_out_until_one_succeeds():
    config = service_config(entry(hedgingPolicy={"maxAttempts": 3, "hedgingDelay": "0.03s"}))

    async def script(peer):
        peer.answer(await peer.request(3), b"third")
        await peer.until(lambda: len(peer.resets) == 2)

    async with scripted(script) as (address, peers), channel(address, *config) as each:
        before = anyio.current_time()
        assert await unary(each)(b"x") == b"third"
        assert anyio.current_time() - before >= 0.06
        assert (each.metrics()["hedges/sent"], each.metrics()["hedges/won"]) == (2, 1)
        with anyio.fail_after(5):
            while len(peers[0].resets) < 2:  # noqa: ASYNC110 - the other side tells nobody
                await anyio.sleep(0.002)
        assert each.endpoints[0].load == 0
    assert [head.get("grpc-previous-rpc-attempts") for head in peers[0].heads.values()] == [None, "1", "2"]


async def test_a_failure_that_is_not_fatal_sends_the_next_copy_at_once_and_a_fatal_one_ends_it():
    policy = {"maxAttempts": 3, "hedgingDelay": "30s", "nonFatalStatusCodes": ["UNAVAILABLE"]}
    config = service_config(entry(hedgingPolicy=policy))
    async with (
        scripted(failing_at_first(status(14), status(14))) as (address, peers),
        channel(address, *config) as each,
    ):
        with anyio.fail_after(5):
            assert await unary(each)(b"x") == b"well"
    async with (
        scripted(failing_at_first(status(14), status(5))) as (address, peers),
        channel(address, *config) as each,
    ):
        with anyio.fail_after(5), pytest.raises(GRPCError) as caught:
            await unary(each)(b"x")
        assert caught.value.status is Status.NOT_FOUND
        assert len(peers[0].requests) == 2
    async with scripted(answering(status(14))) as (address, peers), channel(address, *config) as each:
        with anyio.fail_after(5), pytest.raises(GRPCError) as caught:
            await unary(each)(b"x")
        assert caught.value.status is Status.UNAVAILABLE
        assert len(peers[0].requests) == 3
        assert len(caught.value.attempts) == 3


async def test_pushback_holds_copies_back():
    policy = {"maxAttempts": 3, "hedgingDelay": "30s", "nonFatalStatusCodes": ["UNAVAILABLE"]}
    config = service_config(entry(hedgingPolicy=policy))
    later = status(14, ("grpc-retry-pushback-ms", "40"))
    never = status(14, ("grpc-retry-pushback-ms", "-1"))
    async with scripted(failing_at_first(later, never)) as (address, peers), channel(address, *config) as each:
        before = anyio.current_time()
        with anyio.fail_after(5), pytest.raises(GRPCError):
            await unary(each)(b"x")
        assert anyio.current_time() - before >= 0.04
        assert len(peers[0].requests) == 2


async def test_a_call_that_is_cancelled_takes_its_copies_with_it():
    config = service_config(entry(hedgingPolicy={"maxAttempts": 3, "hedgingDelay": "0.005s"}))
    async with scripted(answering(lambda p, s: None)) as (address, peers), channel(address, *config) as each:
        with anyio.move_on_after(0.1) as scope:
            await unary(each)(b"x")
        assert scope.cancelled_caught
        assert each.endpoints[0].load == 0
        with anyio.fail_after(5):
            while len(peers[0].resets) < 3:  # noqa: ASYNC110 - the other side tells nobody
                await anyio.sleep(0.002)
