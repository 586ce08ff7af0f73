"""``python -m benchmarks.layers``: what each layer of the default stacks adds to one call, in µs of processor time.

The stacks are the real ones with every default, but nothing is below or behind them: the client's sessions answer at
once from memory, and so does the server's handler. What cannot be left out (the name, the balancer, the pool of a
client) is the structure, measured as one. From there the layers are added one by one, from the wire to the caller. The
last column leaves out one layer at a time of the full stack, which tells the same unless layers get in each other's
way.

All variants take turns in many short rounds, and each counts with its fastest: the rest is what the machine added.
"""

import argparse
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any, ClassVar

import anyio

from benchmarks import machine
from benchmarks.report import as_columns
from meshlib.client import Client
from meshlib.client import default_layers as client_layers
from meshlib.core.clock import Clock
from meshlib.core.context import SCOPE, VAR, Context, TraceId, use
from meshlib.core.deadlines import Wheel
from meshlib.core.env import Env
from meshlib.core.service import Filter
from meshlib.core.stack import Layer, Stack
from meshlib.mux import Request, Response
from meshlib.server import PLACES as SERVER_PLACES
from meshlib.server import default_layers as server_layers
from meshlib.telemetry.metrics import Registry

Service = Callable[[Request], Awaitable[Any]]

# Idempotent, or the retry layer would have nothing to prepare for.
_REQUEST = Request(b"body", dest="/echo", idempotent=True)
_REPLY = Response(b"body")

# What a call from another meshlib process brings along: without a deadline the server would have nothing to enforce.
_HOUR = 3600.0
_TRACE = TraceId(1 << 100, 1 << 50)


class _Session:
    """Answers at once, and keeps the call's deadline as a Mux session does, which is part of what a deadline costs."""

    def __init__(self) -> None:
        self._deadlines = Wheel(Clock(), lambda key: None)

    async def __call__(self, request: Request, /) -> Response:
        deadline = VAR.get().deadline
        if deadline is None:
            return _REPLY
        tick = self._deadlines.add(deadline, self)
        self._deadlines.discard(tick, self)
        return _REPLY

    def release(self) -> None:
        pass

    def retire(self) -> None:
        pass


class _Memory:
    """Connects to nowhere."""

    protocol: ClassVar[str] = "memory"
    keeps_deadline: ClassVar[bool] = True

    async def connect(self, *_: object) -> _Session:
        return _Session()


async def _client(stack: AsyncExitStack, without: list[str]) -> Service:
    """A started client without the layers at those places."""
    made = Client[Request, Any]("127.0.0.1:1", _Memory(), stack=lambda whole: leave_out(whole, without))
    return (await stack.enter_async_context(made)).__call__


async def _server(_stack: AsyncExitStack, without: list[str]) -> Service:
    """A handler in a server's stack without the layers at those places."""
    layers = leave_out(Stack(SERVER_PLACES, server_layers()), without)
    service: Service = layers.build(Env(kind="server", metrics=Registry()), _answer)
    return service


async def _answer(request: Request) -> Response:
    return _REPLY


def leave_out(stack: Stack, places: list[str]) -> Stack:
    """The stack without its layers at those places."""
    for place in places:
        stack = stack.remove(place)
    return stack


async def time_calls(service: Service, calls: int) -> float:
    """Seconds for one call."""
    began = perf_counter()
    for _ in range(calls):
        await service(_REQUEST)
    return (perf_counter() - began) / calls


async def fastest(services: dict[str, Service], calls: int, rounds: int) -> dict[str, float]:
    """The fastest round of each service, in µs per call."""
    best = dict.fromkeys(services, float("inf"))
    for _ in range(rounds):
        for name, service in services.items():
            best[name] = min(best[name], await time_calls(service, calls) * 1e6)
    return best


async def measure(
    layers: tuple[Layer, ...],
    make: Callable[[AsyncExitStack, list[str]], Awaitable[Service]],
    leaf: Service,
    calls: int,
    rounds: int,
) -> list[list[str]]:
    """The table of one stack."""
    filters = [layer for layer in reversed(layers) if isinstance(layer, Filter)]
    places = [layer.place for layer in filters]
    structure = [layer.place for layer in layers if not isinstance(layer, Filter)]
    async with AsyncExitStack() as stack:
        services: dict[str, Service] = {"leaf": leaf}
        for count in range(len(places) + 1):
            services[f"up to {count}"] = await make(stack, places[count:])
        for place in places:
            services[f"without {place}"] = await make(stack, [place])
        await fastest(services, calls, 1)  # connects, and lets the interpreter specialise what it runs
        best = await fastest(services, calls, rounds)
    rows = [["layer", "adds µs", "so far µs", "leaving it out saves µs"]]
    rows.append(["(leaf alone)", f"{best['leaf']:.2f}", f"{best['leaf']:.2f}", ""])
    so_far = best["leaf"]
    full = best[f"up to {len(places)}"]
    named = ["structure: " + ", ".join(structure) if structure else "nothing but the leaf", *map(repr, filters)]
    for count, name in enumerate(named):
        here = best[f"up to {count}"]
        saved = f"{full - best[f'without {places[count - 1]}']:.2f}" if count else ""
        rows.append([name, f"{here - so_far:.2f}", f"{here:.2f}", saved])
        so_far = here
    return rows


async def run(calls: int, rounds: int) -> None:
    """Measure and print both stacks."""
    rows = await measure(client_layers(), _client, _Session().__call__, calls, rounds)
    print("client, from the wire to the caller\n" + as_columns(rows))
    with anyio.CancelScope() as scope, use(Context(deadline=Env().clock.now() + _HOUR, trace=_TRACE)):
        SCOPE.set(scope)  # every request on a server has one, which the deadline layer sets
        rows = await measure(server_layers(), _server, _answer, calls, rounds)
    print("\nserver, from the handler to the wire\n" + as_columns(rows))


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers")
    parser.add_argument("--calls", type=int, default=2000, help="calls in a round (default 2000)")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of each variant (default 40)")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    options = parser.parse_args()
    machine.pin(machine.cores()[1])
    anyio.run(run, options.calls, options.rounds, backend_options={"use_uvloop": options.loop == "uvloop"})


if __name__ == "__main__":
    main()
