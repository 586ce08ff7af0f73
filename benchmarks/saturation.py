"""``python -m benchmarks.saturation``: a server whose one core is saturated, with the adaptive limit and without one.

A server in a process of its own answers Mux requests that each take 2 ms of its processor, computed in its event loop:
what a Python handler does that parses, renders or encrypts. Eight callers that wait for their answers find out its
capacity; then, for some seconds, twice as much is asked, in an open loop and with a deadline of 0.5 s, as by clients
that do not wait for each other. A fifth of the requests is critical. No request is repeated.

What counts is goodput, answers in time as a share of the capacity, and how long an answer took. Without a limit the
requests queue in sockets and in the event loop until nobody waits for them. Both ways take turns in several rounds.
"""

import argparse
import json
import subprocess
import sys
from contextlib import suppress
from statistics import median, quantiles
from time import perf_counter, process_time

import anyio

import meshlib
from benchmarks.report import as_columns
from meshlib import mux
from meshlib.core.priority import Priority

WORK = 0.002
DEADLINE = 0.5
CALLERS, CALM = 8, 2.0
"""Who finds the capacity, and for how many seconds."""
CRITICAL = 5
"""Every so many requests one is critical."""
WAYS = {
    "no limit, deadlines ignored": (),
    "default": (),
    "concurrency_limit(adaptive())": (meshlib.concurrency_limit(meshlib.adaptive()),),
}


def steps() -> int:
    """How many steps of a loop take `WORK` seconds of this processor."""
    tried = 200_000
    best = min(_timed(tried) for _ in range(10))
    return round(tried * WORK / best)


def _timed(count: int) -> float:
    started = process_time()
    _work(count)
    return process_time() - started


def _work(count: int) -> int:
    found = 0
    for i in range(count):
        found ^= i
    return found


async def serve(way: str) -> None:
    """Tell the address, and serve until standard input ends."""

    def stack(full: meshlib.core.stack.Stack) -> meshlib.core.stack.Stack:
        return full.remove("deadline").remove("limit") if way.startswith("no limit") else full

    count = steps()

    async def compute(request: mux.Request) -> mux.Response:
        _work(count)
        return mux.Response(b"done")

    async with mux.serve(compute, "127.0.0.1:0", *WAYS[way], stack=stack) as server:
        print(json.dumps(server.address), flush=True)
        await anyio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


def bare(stack: meshlib.core.stack.Stack) -> meshlib.core.stack.Stack:
    """A client that sends everything once, so that only the server is measured."""
    return stack.remove("admission").remove("requeue").remove("retry").remove("accrual")


async def ask(address: str, seconds: float) -> dict[str, float]:
    """Capacity first, then twice as much for so many seconds."""
    asked, answered, lost_critical, all_critical = 0, list[float](), 0, 0
    async with mux.client(address, meshlib.timeout(DEADLINE), stack=bare) as client:
        request = mux.Request(b"", dest="/compute")

        async def keep_asking() -> None:
            nonlocal asked
            while perf_counter() - started < CALM:
                await client(request)
                asked += 1

        started = perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(CALLERS):
                group.start_soon(keep_asking)
        capacity = asked / (perf_counter() - started)

        async def one(critical: bool) -> None:
            nonlocal lost_critical
            began = perf_counter()
            with suppress(meshlib.MeshError):
                with meshlib.priority(Priority.CRITICAL if critical else Priority.DEFAULT):
                    await client(request)
                answered.append(perf_counter() - began)
                return
            lost_critical += critical

        sent = 0
        async with anyio.create_task_group() as group:
            started = perf_counter()
            while (now := perf_counter() - started) < seconds:
                while sent < 2 * capacity * now:
                    sent += 1
                    all_critical += sent % CRITICAL == 0
                    group.start_soon(one, sent % CRITICAL == 0)
                await anyio.sleep(0.001)
    cuts = quantiles(answered, n=100) if len(answered) > 1 else [float("nan")] * 99
    return {
        "capacity/s": capacity,
        "goodput, % of it": 100 * len(answered) / seconds / capacity,
        "p50 ms": 1e3 * cuts[49],
        "p99 ms": 1e3 * cuts[98],
        "critical lost, %": 100 * lost_critical / max(1, all_critical),
    }


def measure(way: str, seconds: float) -> dict[str, float]:
    """One round with a server of its own."""
    command = [sys.executable, "-m", "benchmarks.saturation", "--serve", way]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())
        try:
            return anyio.run(ask, address, seconds)
        finally:
            process.kill()


def main() -> None:
    """Measure, and print the median of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of overload in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        anyio.run(serve, args.serve)
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            found[way].append(measure(way, args.seconds))
    columns = list(found["default"][0])
    rows = [["server", *columns]]
    for way, rounds in found.items():
        rows.append([way, *(f"{median(each[column] for each in rounds):.1f}" for column in columns)])
    print(as_columns(rows))


if __name__ == "__main__":
    main()
