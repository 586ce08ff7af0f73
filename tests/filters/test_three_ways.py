"""Every public filter is a layer of a client and of a server, composes with ``>>``, and decorates any async function.

The tables below hold an example of each. A public name that is in none of them fails the first test, so that no filter
is forgotten here; what cannot do all of it is named, with the reason.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

import meshlib
from meshlib import (
    ConfigurationError,
    adaptive,
    aperture,
    balance,
    base_dtab,
    circuit_breaker,
    concurrency_limit,
    deadline,
    failfast,
    failure_accrual,
    fault,
    heap,
    hedge,
    least_loaded,
    mux,
    outlier_detection,
    p2c,
    peak_ewma,
    priority,
    rate_limit,
    retry,
    retry_budget,
    round_robin,
    shadow,
    throttle,
    timeout,
)
from meshlib.client import PLACES as CLIENT_PLACES
from meshlib.core.service import Filter
from meshlib.core.stack import Layer, Layers
from meshlib.server import PLACES as SERVER_PLACES
from meshlib.testing import run_virtual


async def other(*args: Any, **kwargs: Any) -> Any:
    """The second service that shadows need."""
    return None


@dataclass(frozen=True)
class Example:
    """A public factory: values it makes with how they print, and calls of it that are wrong with what would be right.

    Values are made when a test needs them: some belong to an event loop, and none is to know of another test.
    """

    made: dict[str, Callable[[], Any]]
    wrong: list[tuple[Callable[[], Any], str]] = field(default_factory=list)


FILTERS: dict[str, Example] = {
    "circuit_breaker": Example(
        {
            "circuit_breaker(failures=5, success_rate=0.8, window=30, min_requests=5, open_for=(5, 300))": (
                lambda: circuit_breaker()
            ),
            "circuit_breaker('shop', failures=50, success_rate=0.1, window=9, min_requests=50, open_for=(1, 10))": (
                lambda: circuit_breaker(
                    "shop", failures=50, success_rate=0.1, window=9, min_requests=50, open_for=(1, 10)
                )
            ),
        },
        [
            (lambda: circuit_breaker(""), "give a name, or none"),
            (lambda: circuit_breaker(failures=0), "give how many in a row, 1 or more, or None"),
            (lambda: circuit_breaker(failures=None, success_rate=None), "give one of them"),
            (lambda: circuit_breaker(open_for=(2, 1)), "give .*seconds"),
            (lambda: circuit_breaker(on="ValueError"), "give exception types, or a function of the exception"),
        ],
    ),
    "concurrency_limit": Example(
        {
            "concurrency_limit(7)": lambda: concurrency_limit(7),
            "concurrency_limit(9, queue=3)": lambda: concurrency_limit(9, queue=3),
            "concurrency_limit(adaptive(initial=20, min_limit=1, max_limit=1000))": (
                lambda: concurrency_limit(adaptive())
            ),
        },
        [
            (lambda: concurrency_limit(0), "give a whole number of requests, 1 or more, or adaptive()"),
            (lambda: concurrency_limit(1.5), "give a whole number"),
            (lambda: concurrency_limit(1, queue=-1), "give a whole number of requests that may wait"),
        ],
    ),
    "deadline": Example(
        {"deadline(30 s)": lambda: deadline(30)},
        [
            (lambda: deadline(0), "give the seconds that are left, a number above 0"),
            (lambda: deadline("1"), "give the seconds that are left"),
        ],
    ),
    "failure_accrual": Example(
        {
            "failure_accrual(failures=5, success_rate=0.8, window=30, min_requests=5, out_for=(5, 300))": (
                lambda: failure_accrual()
            ),
        },
        [
            (lambda: failure_accrual(failures=0), "give how many in a row, 1 or more, or None"),
            (lambda: failure_accrual(success_rate=2), "give a share, such as 0.8 for 80 %, or None"),
            (lambda: failure_accrual(out_for=(2, 1)), "give .*seconds"),
        ],
    ),
    "fault": Example(
        {
            "fault(error=LookupError, probability=0)": lambda: fault(error=LookupError, probability=0),
            "fault(delay=0.001, abort=True, probability={'delay': 1, 'abort': 0}, max_concurrent=3)": (
                lambda: fault(delay=0.001, abort=True, probability={"delay": 1, "abort": 0}, max_concurrent=3)
            ),
            "fault(abort=True, enabled=False)": lambda: fault(abort=True, enabled=False),
        },
        [
            (lambda: fault(), "give what to inject"),
            (lambda: fault(delay=-1), "give seconds, 0 or more"),
            (lambda: fault(abort=True, probability=2), "give numbers from 0 to 1"),
        ],
    ),
    "hedge": Example(
        {
            "hedge(extra_load=0.01)": lambda: hedge(),
            "hedge(extra_load=0.05, beyond=3)": lambda: hedge(0.05, beyond=3),
        },
        [
            (lambda: hedge(extra_load=0), "give a share above 0"),
            (lambda: hedge(extra_load=2), "give the share of calls that may be sent twice"),
        ],
    ),
    "outlier_detection": Example(
        {
            "outlier_detection(interval=10, out_for=(30, 300), max_ejected=0.1, deviation=1.9, failure_rate=0.85)": (
                lambda: outlier_detection()
            ),
        },
        [
            (lambda: outlier_detection(interval=0), "give seconds, above 0"),
            (lambda: outlier_detection(max_ejected=2), "give a share, such as 0.1 for 10 %"),
            (lambda: outlier_detection(deviation=None, failure_rate=None), "give this or deviation="),
        ],
    ),
    "priority": Example(
        {"priority('sheddable')": lambda: priority("sheddable")},
        [(lambda: priority("high"), "give 'critical', 'default' or 'sheddable'")],
    ),
    "rate_limit": Example(
        {
            "rate_limit(10000, burst=500)": lambda: rate_limit(10_000, 500),
            "rate_limit(5000, burst=5000, wait=0.5)": lambda: rate_limit(5000, wait=0.5),
        },
        [
            (lambda: rate_limit(0), "give requests a second, a number above 0"),
            (lambda: rate_limit(1, 0), "give "),
            (lambda: rate_limit(1, wait=-1), "give "),
        ],
    ),
    "retry": Example(
        {
            "retry(attempts=3, wait=5…200 ms)": lambda: retry(),
            "retry(attempts=1, wait=5…200 ms)": lambda: retry(attempts=1),
        },
        [
            (lambda: retry(attempts=0), "give the number of tries in all, 1 or more"),
            (lambda: retry(on="ConnectionLost"), "give "),
        ],
    ),
    "shadow": Example(
        {
            "shadow(other, share=0.1, limit=100, timeout=10)": lambda: shadow(other),
            "shadow(other, share=1, limit=3, timeout=2)": lambda: shadow(other, 1, limit=3, timeout=2),
        },
        [
            (lambda: shadow("host:80"), "give a service"),
            (lambda: shadow(other, 0), "give a share of the requests, above 0, up to 1"),
        ],
    ),
    "throttle": Example(
        {"throttle(k=2, window=30, cap=0.75)": lambda: throttle()},
        [(lambda: throttle(k=1), "k is above 1"), (lambda: throttle(cap=1), "at most 0.95")],
    ),
    "timeout": Example(
        {
            "timeout(total=30 s)": lambda: timeout(30),
            "timeout(total=none)": lambda: timeout(None),
            "timeout(attempt=10 s)": lambda: timeout(attempt=10),
            "timeout(total=30 s) + timeout(attempt=10 s)": lambda: timeout(30, attempt=10),
        },
        [
            (lambda: timeout(), "give total=, attempt=, or both, in seconds"),
            (lambda: timeout(0), "give seconds, a number above 0, or None for no limit"),
            (lambda: timeout(attempt=True), "give seconds"),
        ],
    ),
}

CLIENTS_ONLY = {
    "failure_accrual": "it takes endpoints out, and a server has none",
    "throttle": "it spares servers that refuse",
    "outlier_detection": "it compares endpoints, and a server has none",
    "balance": "a server has no endpoints",
    "failfast": "a server connects to nobody",
    "base_dtab": "a server calls nobody by name",
}

LAYERS: dict[str, Example] = {
    "balance": Example(
        {
            "balance(p2c(peak_ewma(decay=10, penalty=5)), panic=0.5, slow_start=10)": lambda: balance(),
            "balance(round_robin(), panic=0, slow_start=0, zone='a')": (
                lambda: balance(round_robin(), panic=0, slow_start=0, zone="a")
            ),
        },
        [
            (lambda: balance(panic=2), "give a share of the endpoints, from 0 (never) to 1"),
            (lambda: balance(slow_start=-1), "give seconds, or 0 for no slow start"),
            (lambda: balance("p2c"), "give "),
        ],
    ),
    "base_dtab": Example(
        {"base_dtab('/s => /a ; /s/b => h:1')": lambda: base_dtab("/s => /a ; /s/b => h:1")},
        [(lambda: base_dtab(3), "give one, or its text, or where to follow it")],
    ),
    "failfast": Example(
        {"failfast((1, 32), alone=(0.1, 1))": lambda: failfast()},
        [(lambda: failfast((2, 1)), "give (first, last) in seconds")],
    ),
    "retry_budget": Example(
        {"retry_budget(0.2, min_per_second=10, ttl=10, min_concurrency=10)": lambda: retry_budget()},
        [(lambda: retry_budget(-1), "share is a number from 0")],
    ),
}
"""Settings of a client. No request passes through them, so there is nothing to compose or to decorate."""

BALANCERS: dict[str, Example] = {
    "aperture": Example(
        {
            "aperture(peak_ewma(decay=10, penalty=5), coordinate=(1, 3), minimum=5)": (
                lambda: aperture(coordinate=(1, 3), minimum=5)
            )
        },
        [
            (lambda: aperture(minimum=0), "give a number of servers, 1 or more"),
            (lambda: aperture(low=2), "give loads with 0 < low < 1 < high"),
            (lambda: aperture(coordinate=(3, 3)), "give which client this is, from 0, and of how many"),
        ],
    ),
    "heap": Example({"heap()": lambda: heap()}),
    "least_loaded": Example({"least_loaded()": lambda: least_loaded()}),
    "p2c": Example(
        {"p2c(least_loaded())": lambda: p2c(least_loaded())},
        [(lambda: p2c(3), "give a load metric, such as peak_ewma() or least_loaded()")],
    ),
    "peak_ewma": Example(
        {"peak_ewma(decay=5, penalty=1)": lambda: peak_ewma(5, 1)},
        [(lambda: peak_ewma(decay=0), "give seconds, a number above 0")],
    ),
    "round_robin": Example({"round_robin()": lambda: round_robin()}),
}
"""What `balance` is given."""

PARTS: dict[str, Example] = {
    "adaptive": Example(
        {"adaptive(initial=5, min_limit=2, max_limit=50)": lambda: adaptive(5, min_limit=2, max_limit=50)},
        [(lambda: adaptive(0), "give whole numbers of requests, min_limit at least 1")],
    ),
}
"""What other filters are given."""

OTHERS = {
    "classifier", "classify", "retry_connection_losses", "retry_server_errors", "retry_timeouts",  # of outcomes
    "asgi", "client", "serve", "rpc", "filter",  # what layers are given to, or made with
    "current", "remaining", "use",  # the context
    "announce", "delegate", "dtab", "resolve",  # names
}  # fmt: skip

WITH_UNITS = {"deadline", "retry", "timeout"}
"""They print seconds with their unit, since a stack is read more often than typed."""

TABLES: dict[str, dict[str, Example]] = {
    "filters": FILTERS, "layers": LAYERS, "balancers": BALANCERS, "parts": PARTS
}  # fmt: skip


def public_functions() -> set[str]:
    return {
        name
        for name in meshlib.__all__
        if name[0].islower() and not isinstance(getattr(meshlib, name), types.ModuleType)
    }


def test_every_public_function_is_in_one_of_the_tables():
    tabled = [name for table in TABLES.values() for name in table]
    assert sorted([*tabled, *OTHERS]) == sorted(public_functions())


def each(*tables: dict[str, Example], but: set[str] | None = None) -> Any:
    """Parametrise over the values of some tables."""
    values = [
        pytest.param(shown, make, id=shown)
        for table in tables
        for name, example in table.items()
        for shown, make in example.made.items()
        if name not in (but or ())
    ]
    return pytest.mark.parametrize(("shown", "make"), values)


each_filter = each(FILTERS)


# --- what they are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILTERS)
def test_what_is_called_a_filter_makes_filters_that_know_their_place(name):
    for make in FILTERS[name].made.values():
        made = make()
        assert isinstance(made, Filter)
        layers = list(made) if isinstance(made, Layers) else [made]
        for layer in layers:
            assert isinstance(layer, Layer)
            assert layer.place in CLIENT_PLACES
            assert (layer.place in SERVER_PLACES) is (name not in CLIENTS_ONLY)


@pytest.mark.parametrize("name", [*LAYERS, *BALANCERS, *PARTS])
def test_what_is_called_no_filter_is_none(name):
    """Else it belongs in the table of filters, where it has to stand more tests."""
    for table in (LAYERS, BALANCERS, PARTS):
        for make in table[name].made.values() if name in table else ():
            assert not isinstance(make(), Filter)
            assert isinstance(make(), Layer) is (table is LAYERS)


@each(*TABLES.values())
def test_it_prints_its_parameters_under_the_name_that_made_it(shown, make):
    assert repr(make()) == shown
    assert hasattr(meshlib, shown.partition("(")[0])


@each(*TABLES.values(), but=set(WITH_UNITS))
def test_what_it_prints_can_be_typed(shown, make):
    assert repr(eval(shown, vars(meshlib) | {"other": other})) == shown


@pytest.mark.parametrize(
    ("make", "right"),
    [
        pytest.param(make, right, id=f"{name}-{i}")
        for table in TABLES.values()
        for name, example in table.items()
        for i, (make, right) in enumerate(example.wrong)
    ],
)
def test_wrong_parameters_are_told_at_construction_with_what_would_be_right(make, right):
    with pytest.raises(ConfigurationError) as caught:
        make()
    message = caught.value.message
    assert right in message or re.search(right, message), message
    assert len(message.split()) > 4  # a sentence


@pytest.mark.parametrize("name", [name for table in TABLES.values() for name in table])
def test_whatever_takes_parameters_has_wrong_ones_in_the_tables(name):
    wrong = next(table[name].wrong for table in TABLES.values() if name in table)
    assert bool(wrong) is bool(inspect.signature(getattr(meshlib, name)).parameters)


# --- as a layer -----------------------------------------------------------------------------------------------------


async def echo(request: mux.Request) -> mux.Response:
    await anyio.lowlevel.checkpoint()
    if request.body == b"fail":
        raise meshlib.RemoteError("said so")
    return mux.Response(request.body)


async def exercise(client: Any) -> None:
    """Calls in turn and at once, a failure, a caller that gives up, and calls again."""

    async def call(i: int) -> None:
        body = str(i).encode()
        assert (await client(mux.Request(body, idempotent=True))).body == body

    for i in range(3):
        await call(i)
    async with anyio.create_task_group() as group:
        for i in range(5):
            group.start_soon(call, i)
    with pytest.raises(meshlib.RemoteError, match="said so"):
        await client(mux.Request(b"fail"))
    with anyio.CancelScope() as scope:
        scope.cancel()
        await call(0)
    assert scope.cancelled_caught
    for i in range(3):
        await call(i)


@each(FILTERS, LAYERS)
async def test_it_is_a_layer_of_a_client(shown, make):
    async with mux.serve(echo) as server, mux.client(server.address, make()) as client:
        for part in shown.split(" + "):
            assert part in repr(client)
        await exercise(client)


@each(BALANCERS)
async def test_it_balances_for_a_client(shown, make):
    async with (
        mux.serve(echo) as one,
        mux.serve(echo) as two,
        mux.client(f"{one.address},{two.address}", balance(make())) as client,
    ):
        assert shown in repr(client)
        await exercise(client)


@each(FILTERS, LAYERS, but=set(CLIENTS_ONLY))
async def test_it_is_a_layer_of_a_server(shown, make):
    async with mux.serve(echo, "127.0.0.1:0", make()) as server, mux.client(server.address) as client:
        for part in shown.split(" + "):
            assert part in repr(server)
        await exercise(client)


@pytest.mark.parametrize("name", CLIENTS_ONLY)
def test_a_server_says_that_it_has_no_place_for_a_clients_layer(name):
    for make in (FILTERS | LAYERS)[name].made.values():
        with pytest.raises(ConfigurationError, match="no place '"):
            mux.serve(echo, "127.0.0.1:0", make())


@each_filter
async def test_one_value_serves_a_client_a_server_and_a_function_at_once(shown, make):
    layer = make()
    on_server = () if shown.partition("(")[0] in CLIENTS_ONLY else (layer,)
    function = layer(echo)
    async with (
        mux.serve(echo, "127.0.0.1:0", *on_server) as server,
        mux.client(server.address, layer) as one,
        mux.client(server.address, layer) as two,
        anyio.create_task_group() as group,
    ):
        for service in (one, two, function):
            group.start_soon(exercise, service)


@each(FILTERS, LAYERS)
async def test_it_costs_a_client_no_cancel_scope(shown, make):
    """What stands below the timeout bounds its own waits by the deadline; else each call pays for a scope."""
    async with mux.client("127.0.0.1:1", make()) as client:
        below = client.stack.split("timeout")[1]
        assert [layer for layer in below if not getattr(layer, "keeps_deadline", False)] == []


# --- composed -------------------------------------------------------------------------------------------------------


@each_filter
async def test_it_composes_with_filters_and_services(shown, make):
    trail = []

    def step(name):
        @meshlib.filter
        async def passing(request, service):
            trail.append(name)
            return await service(request)

        return passing

    async def handler(request):
        trail.append(request)
        return request

    layer = make()
    for service in (
        step("above") >> layer >> step("below") >> handler,
        step("above") >> (layer >> (step("below") >> handler)),
        (step("above") >> layer) >> step("below") >> handler,
    ):
        trail.clear()
        assert await service("x") == "x"
        assert trail == ["above", "below", "x"]
    assert shown.split(" + ")[0] in repr(step("above") >> layer >> handler)


@each_filter
async def test_composed_it_hands_on_what_the_service_raises(shown, make):
    error = ValueError("the service's own")

    async def handler(request):
        raise error

    with pytest.raises(ValueError, match="the service's own") as caught:
        await (make() >> handler)("x")
    assert caught.value is error


@each_filter
async def test_composed_it_lets_a_cancellation_through_to_the_service_and_forgets_it(shown, make):
    started, ended = [], []

    async def handler(request):
        started.append(request)
        try:
            if request == "wait":
                await anyio.sleep_forever()
        finally:
            ended.append(request)
        return request

    service = make() >> handler
    for _ in range(12):  # more than any limit in the table has places
        async with anyio.create_task_group() as group:
            group.start_soon(service, "wait")
            with anyio.fail_after(5):
                while len(started) == len(ended):
                    await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    assert started == ended == ["wait"] * 12
    assert await service("x") == "x"


@each_filter
def test_composed_it_runs_in_virtual_time(shown, make):
    async def main():
        async def handler(request):
            await anyio.sleep(5)
            return request

        started = anyio.current_time()
        assert await (make() >> handler)("x") == "x"
        return anyio.current_time() - started

    assert run_virtual(main) == pytest.approx(5, abs=0.01)


# --- decorating -----------------------------------------------------------------------------------------------------


@each_filter
async def test_it_decorates_a_function_and_a_method(shown, make):
    @make()
    async def price(article: str, *, amount: int = 1) -> tuple[str, int]:
        """What it costs."""
        await anyio.lowlevel.checkpoint()
        return article, amount

    class Shop:
        name = "shop"

        @make()
        async def price(self, article: str) -> str:
            return f"{self.name} {article}"

    assert await price("tea") == ("tea", 1)
    assert await price("tea", amount=2) == ("tea", 2)
    assert await Shop().price("tea") == "shop tea"
    assert (price.__name__, price.__doc__) == ("price", "What it costs.")
    assert list(inspect.signature(price).parameters) == ["article", "amount"]
    assert inspect.iscoroutinefunction(price)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        await price("tea", colour="green")


@each_filter
def test_what_it_decorates_may_be_called_on_one_event_loop_after_another(shown, make):
    @make()
    async def double(n: int) -> int:
        await anyio.lowlevel.checkpoint()
        return 2 * n

    async def main():
        for n in range(3):
            assert await double(n) == 2 * n

    for backend, options in (("asyncio", {}), ("trio", {}), ("asyncio", {"use_uvloop": True}), ("asyncio", {})):
        anyio.run(main, backend=backend, backend_options=options)
