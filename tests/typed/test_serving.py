"""Servers of ``@rpc`` methods: the one stack, whatever protocol carries the calls."""

from __future__ import annotations

import logging
import math
from typing import Any

import anyio
import pytest

import meshlib
from meshlib import rpc

from ..conftest import BACKENDS

PROTOCOLS = {"mux": BACKENDS, "http": BACKENDS, "grpc": ("asyncio", "uvloop")}
over = ""
"""The protocol of this test."""


@pytest.fixture(
    scope="module",
    params=[(protocol, loop) for protocol, loops in PROTOCOLS.items() for loop in loops],
    ids="-".join,
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Every protocol, on every event loop that it runs on."""
    global over
    over, loop = request.param
    return BACKENDS[loop]


def serve(service: Any, *layers: Any, **options: Any) -> Any:
    return meshlib.serve(service, f"{over}://127.0.0.1:0", *layers, **options)


def client(contract: type, server: Any) -> Any:
    """One that tries once."""
    alone = lambda stack: stack.remove("requeue")  # noqa: E731
    return meshlib.client(contract, server.address, meshlib.retry(attempts=1), protocol=over, stack=alone)


class Flaky:
    def __init__(self) -> None:
        self.calls = 0

    @rpc(idempotent=True)
    async def get(self) -> int:
        return self._fail_once()

    @rpc
    async def put(self) -> int:
        return self._fail_once()

    def _fail_once(self) -> int:
        self.calls += 1
        if self.calls == 1:
            raise meshlib.ConnectionLost("the store is gone")
        return self.calls


async def test_a_server_may_call_idempotent_methods_again(caplog: Any) -> None:
    flaky = Flaky()
    async with serve(flaky, meshlib.retry(attempts=3, wait=0.0)) as server, client(Flaky, server) as stub:
        assert await stub.get() == 2
        assert server.metrics()["retries/retries"] == 1
        flaky.calls = 0
        with caplog.at_level(logging.CRITICAL, "meshlib.server"), pytest.raises(meshlib.RemoteError, match="internal"):
            await stub.put()
        assert flaky.calls == 1
        assert [line.split()[0] for line in repr(server).splitlines()[-2:]] == ["errors", "retry"]


async def test_a_server_may_hedge_idempotent_methods() -> None:
    class Slow:
        def __init__(self) -> None:
            self.slow = False

        @rpc(idempotent=True)
        async def get(self) -> None:
            if self.slow:
                self.slow = False
                await anyio.sleep(30)

    slow = Slow()
    layers = meshlib.hedge(extra_load=1.0), meshlib.retry_budget(1.0, min_per_second=1000)
    async with serve(slow, *layers) as server, client(Slow, server) as stub:
        with anyio.fail_after(20):
            while not server.metrics()["hedges/after_ms"]:
                await stub.get()
            slow.slow = True
            await stub.get()
        assert server.metrics()["hedges/sent"] >= 1


class Counting(meshlib.Filter[Any, Any, Any, Any]):
    """Shows what of its surroundings a layer is given."""

    place = "filters"

    def __init__(self, env: Any = None) -> None:
        self.env = env

    def build(self, env: Any, service: Any) -> Any:
        return type(self)(env).bind(service)

    async def apply(self, request: Any, service: Any) -> Any:
        self.env.metrics.counter("mine").value += 1
        self.env.events.note("mine", "seen", request.dest)
        self.env.metrics.gauge("chance", lambda: self.env.rng.random())
        return await service(request)

    def __repr__(self) -> str:
        return "counting()"


class Greeter:
    @rpc(idempotent=True)
    async def hello(self, name: str) -> str:
        return f"hello, {name}"


async def test_filters_live_in_the_server_s_own_surroundings() -> None:
    chances, heard = [], []
    for _ in range(2):
        async with serve(Greeter(), Counting(), seed=7) as server, client(Greeter, server) as stub:
            server.events.listen(heard.append)
            await stub.hello("you")
            numbers = server.metrics()
            assert numbers["mine"] == 1
            chances.append(numbers["chance"])
            assert ["filters", "counting()"] in [line.split() for line in repr(server).splitlines()]
    assert chances[0] == chances[1]
    assert [event.detail for event in heard] == ["/Greeter/hello"] * 2


async def test_the_whole_stack_can_be_changed() -> None:
    def change(stack: Any) -> Any:
        assert stack.find("errors") is not None
        return stack.remove("limit").remove("filters").replace("fault", meshlib.fault(error=meshlib.Rejected("no")))

    async with serve(Greeter(), Counting(), stack=change) as server, client(Greeter, server) as stub:
        with pytest.raises(meshlib.Rejected, match="no"):
            await stub.hello("you")
        assert "mine" not in server.metrics()
        assert [line.split()[0] for line in repr(server).splitlines()[-2:]] == ["errors", "fault"]


async def test_the_layers_around_the_methods_can_be_taken_away() -> None:
    bare = lambda stack: stack.remove("errors")  # noqa: E731
    async with serve(Greeter(), stack=bare) as server, client(Greeter, server) as stub:
        assert await stub.hello("you") == "hello, you"
        assert "errors" not in repr(server)


async def test_an_injected_fault_is_as_opaque_as_any_other(caplog: Any) -> None:
    async with serve(Greeter(), meshlib.fault(error=ValueError("secret"))) as server, client(Greeter, server) as stub:
        with (
            caplog.at_level(logging.ERROR),
            pytest.raises(meshlib.RemoteError, match=r"internal error \(trace \w+\)") as told,
        ):
            await stub.hello("you")
    assert "secret" not in str(told.value)
    assert [record.name for record in caplog.records] == ["meshlib.server"]


class Choosy:
    @rpc
    async def call(self, asked: str) -> None:
        error = meshlib.Rejected("leave me alone")
        error.retry_after = {"inf": math.inf, "nan": math.nan, "big": 1e30, "never": -5.0}[asked]
        raise error


@pytest.mark.parametrize("asked", ["inf", "nan", "big", "never"])
async def test_whatever_a_handler_asks_for_is_a_refusal(asked: str, caplog: Any) -> None:
    async with serve(Choosy()) as server, client(Choosy, server) as stub:
        with pytest.raises(meshlib.Rejected, match="leave me alone") as told:
            await stub.call(asked)
    error = told.value
    assert caplog.records == []
    if asked == "never":
        # HTTP has no word for it but the nack that is final.
        assert error.retry_after == -1 or (over == "http" and not error.retryable)
    else:
        assert error.retry_after in (None, 3600)


async def test_an_integer_that_cannot_be_sent_is_told_with_its_name() -> None:
    class Sum:
        @rpc
        async def add(self, a: int, b: int) -> int:
            return a + b

    async with serve(Sum()) as server, client(Sum, server) as stub:
        if over == "http":  # JSON has no largest integer
            assert await stub.add(1, 2**70) == 2**70 + 1
            return
        with pytest.raises(meshlib.InvalidArgument, match=r"Sum\.add\(\): b: ") as told:
            await stub.add(1, 2**70)
    assert told.value.path == "b"


async def test_it_shows_its_address_before_it_starts() -> None:
    assert repr(serve(Greeter())).startswith("server 'Greeter' on 127.0.0.1:0 (")


OPTIONS = [
    ({"nonsense": 1}, r"nonsense=…\): there is no such option; .*grace"),
    ({"title": "x"}, r"title=…\): that is for http://"),
    ({"compression": "gzip"}, r"compression=…\): that is for grpc://"),
    ({"http2": True}, r"http2=…\): that is for http://"),
]


@pytest.mark.parametrize(("options", "says"), OPTIONS)
async def test_options_that_are_none_are_told(options: dict[str, Any], says: str) -> None:
    if f"{over}://" in says:
        serve(Greeter(), **options)
        return
    with pytest.raises(meshlib.ConfigurationError, match=says):
        serve(Greeter(), **options)
