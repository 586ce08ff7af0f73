"""The golden metrics: what counts as a request, a success, a failure, and what counts as nothing."""

import anyio
import pytest

import meshlib
from meshlib.core.classify import ResponseClass, classify
from meshlib.core.clock import Clock
from meshlib.core.context import Context, use
from meshlib.core.env import Env
from meshlib.core.service import Lasting
from meshlib.telemetry.metrics import Registry
from meshlib.telemetry.stats import EndpointStats, Stats


class Bench:
    """A service under stats, with a clock that goes on by 5 ms a call."""

    def __init__(self, classifier=classify):
        self.time = 0.0
        self.registry = Registry()
        self.env = Env(metrics=self.registry, clock=Clock(now=lambda: self.time), classifier=classifier)
        self.service = Stats().build(self.env, self.serve)

    async def serve(self, request):
        self.time += 0.005
        if isinstance(request, BaseException):
            raise request
        if callable(request):
            return await request()
        return request

    def numbers(self, *names):
        numbers = self.registry.snapshot()
        return tuple(numbers[name] for name in names)


GOLDEN = ("requests", "success", "failures", "cancelled", "pending")


async def test_a_reply_is_a_request_and_a_success_with_its_latency():
    bench = Bench()
    assert await bench.service("x") == "x"
    assert bench.numbers(*GOLDEN) == (1, 1, 0, 0, 0)
    assert bench.numbers("request_latency_ms.max") == (pytest.approx(5),)


async def test_a_failure_counts_by_its_kind_and_has_a_latency_too():
    bench = Bench()
    for error in (ValueError("a"), ValueError("b"), meshlib.Rejected("full")):
        with pytest.raises(type(error)):
            await bench.service(error)
    assert bench.numbers(*GOLDEN) == (3, 0, 3, 0, 0)
    assert bench.numbers("failures/ValueError", "failures/Rejected", "request_latency_ms.count") == (2, 1, 3)


async def test_a_cancellation_is_no_failure_of_the_service():
    bench = Bench()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await bench.service(anyio.sleep_forever)
    assert bench.numbers(*GOLDEN) == (0, 0, 0, 1, 0)
    assert bench.numbers("request_latency_ms.count") == (0,)


async def test_a_cancellation_because_time_ran_out_is_a_failure():
    bench = Bench()
    with anyio.CancelScope() as scope, use(Context(deadline=0.004)):
        scope.cancel()
        await bench.service(anyio.sleep_forever)
    assert bench.numbers(*GOLDEN) == (1, 0, 1, 0, 0)
    assert bench.numbers("failures/DeadlineExceeded") == (1,)


async def test_what_is_under_way_is_pending():
    bench, gate = Bench(), anyio.Event()
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(bench.service, gate.wait)
        await anyio.wait_all_tasks_blocked()
        assert bench.numbers("pending", "requests") == (3, 0)
        gate.set()
    assert bench.numbers("pending", "requests") == (0, 3)


@pytest.mark.parametrize(
    ("verdict", "golden"),
    [
        (ResponseClass.SUCCESS, (1, 1, 0, 0, 0)),
        (ResponseClass.FAILURE, (1, 0, 1, 0, 0)),
        (ResponseClass.RETRYABLE, (1, 0, 1, 0, 0)),
        (ResponseClass.IGNORABLE, (0, 0, 0, 0, 0)),
    ],
)
@pytest.mark.parametrize("request_", ["a reply", ValueError("an error")], ids=["reply", "error"])
async def test_a_classifier_decides_what_replies_and_errors_count_as(verdict, golden, request_):
    asked = []

    def classifier(request, reply, error):
        asked.append((request, reply, error))
        return verdict

    bench = Bench(classifier)
    if isinstance(request_, Exception):
        with pytest.raises(ValueError, match="an error"):
            await bench.service(request_)
        assert asked == [(request_, None, request_)]
    else:
        await bench.service(request_)
        assert asked == [("a reply", "a reply", None)]
    assert bench.numbers(*GOLDEN) == golden
    if golden[2]:
        kind = "ValueError" if isinstance(request_, Exception) else "reply"
        assert bench.numbers(f"failures/{kind}") == (1,)


async def test_an_endpoints_numbers_stand_below_its_address_and_leave_with_it():
    bench = Bench()
    env = bench.env.evolve(address="h:1", closers=[])
    service = EndpointStats().build(env, bench.serve)
    await service("x")
    assert bench.numbers("endpoints/h:1/requests", "endpoints/h:1/success", "requests") == (1, 1, 0)
    for close in env.closers:
        close()
    assert not [name for name in bench.registry.snapshot() if name.startswith("endpoints/")]


def test_they_print_as_their_places():
    assert (repr(Stats()), repr(EndpointStats())) == ("stats()", "endpoint_stats()")


class Stream:
    """A reply whose end is told."""

    def __init__(self):
        self.watchers = []

    def on_end(self, callback):
        self.watchers.append(callback)


def lasting_bench(**options):
    bench = Bench(**options)
    bench.env.params[Lasting] = lambda reply: reply if isinstance(reply, Stream) else None
    bench.service = Stats().build(bench.env, bench.serve)
    return bench


async def test_a_reply_that_lasts_is_a_success_or_a_failure_at_its_end():
    bench = lasting_bench()
    streams = [Stream(), Stream()]
    for stream in streams:
        await bench.service(stream)
    assert bench.numbers(*GOLDEN) == (2, 0, 0, 0, 0)
    assert bench.numbers("request_latency_ms.count", "request_latency_ms.max") == (2, pytest.approx(5))
    for stream, error in zip(streams, (None, meshlib.ConnectionLost("cut")), strict=True):
        for callback in stream.watchers:
            callback(error)
    assert bench.numbers(*GOLDEN) == (2, 1, 1, 0, 0)
    assert bench.numbers("failures/ConnectionLost", "request_latency_ms.count") == (1, 2)
    await bench.service("x")
    assert bench.numbers(*GOLDEN) == (3, 2, 1, 0, 0)


async def test_a_reply_that_lasts_and_has_begun_badly_is_a_failure_at_once_and_once():
    def bad_replies(request, reply, error):
        return ResponseClass.FAILURE if isinstance(reply, Stream) else classify(request, reply, error)

    bench = lasting_bench(classifier=bad_replies)
    stream = Stream()
    await bench.service(stream)
    assert bench.numbers(*GOLDEN, "failures/reply") == (1, 0, 1, 0, 0, 1)
    assert not stream.watchers


async def test_an_end_that_says_nothing_of_the_service_counts_for_nothing():
    def ignored(request, reply, error):
        return ResponseClass.IGNORABLE if isinstance(error, ValueError) else classify(request, reply, error)

    bench = lasting_bench(classifier=ignored)
    stream = Stream()
    await bench.service(stream)
    stream.watchers[0](ValueError("whatever"))
    assert bench.numbers(*GOLDEN) == (1, 0, 0, 0, 0)
