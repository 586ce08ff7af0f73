"""``python -m benchmarks.kubernetes_scale``: 10,000 endpoints of a Service, in slices of 100.

How long it takes until a client knows them all, and until it knows that one pod came and one went (a tenth of a second
of which is the time for which changes are collected); and for how long the event loop stood still meanwhile: the
longest time by which a task that sleeps for a millisecond woke too late. The API server is the double of the tests, in
a process of its own, over HTTP. The first row is the same process with nothing to do, which is what the machine does by
itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import anyio
import anyio.to_thread

from benchmarks.report import as_columns
from benchmarks.zookeeper_scale import Stalls
from meshlib.core.clock import Clock
from meshlib.core.env import Env
from meshlib.core.supervisor import Supervisor
from meshlib.names.addr import Bound
from meshlib.names.kubernetes import KubernetesResolver
from meshlib.names.kubernetes.config import find
from meshlib.names.target import Target
from meshlib.names.watch import Watch
from tests.kubernetes import ApiServer, endpoint

SLICE = 100


def pods(first: int, count: int) -> list[dict[str, object]]:
    return [
        endpoint(
            f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}",
            zone=f"z{n % 3}",
            nodeName=f"node-{n % 500}",
            targetRef={"kind": "Pod", "name": f"users-{n}", "namespace": "shop"},
        )
        for n in range(first, first + count)
    ]


def others(folder: str) -> None:
    """Another process: the API server. Does what it is told by lines, and answers each."""
    with ApiServer() as api:
        print(json.dumps(api.environ(Path(folder))), flush=True)
        for line in sys.stdin:
            first, count = map(int, line.split())
            api.put_slice("shop", "users", f"users-{first // SLICE:04}", pods(first, count), {"http": 8080})
            print("done", flush=True)


async def measure(tell: "subprocess.Popen[str]", endpoints: int, rounds: int) -> list[list[str]]:
    assert tell.stdin is not None
    assert tell.stdout is not None
    stdin, stdout = tell.stdin, tell.stdout

    async def told(first: int, count: int) -> None:
        def ask() -> None:
            stdin.write(f"{first} {count}\n")
            stdin.flush()
            stdout.readline()

        await anyio.to_thread.run_sync(ask)

    access = await find(json.loads(stdout.readline()))
    rows: list[list[str]] = []

    def row(what: str, seconds: list[float], longest: list[float]) -> None:
        times = f"{median(seconds):.3f}" if seconds else "—"
        rows.append([what, times, f"{1000 * median(longest):.0f}", f"{1000 * max(longest):.0f}"])

    for first in range(0, endpoints, SLICE):
        await told(first, SLICE)
    async with anyio.create_task_group() as tasks:
        stalls = Stalls()
        tasks.start_soon(stalls.run)
        await anyio.sleep(2)
        row("nothing", [], [stalls.take()])
        times, longest = [], []
        for n in range(rounds):
            supervisor = Supervisor("benchmark")
            env = Env(clock=Clock(), supervisor=supervisor)
            watch = Watch(Target.parse("k8s://shop/users:http"), KubernetesResolver(access), env)
            stalls.take()
            started = perf_counter()
            watch.start()
            await watch.addr.wait_for(lambda addr: isinstance(addr, Bound) and len(addr.addresses) == endpoints)
            times.append(perf_counter() - started)
            await anyio.sleep(0.5)
            longest.append(stalls.take())
            if n < rounds - 1:
                await supervisor.aclose()
        row(f"first resolution of {endpoints}", times, longest)
        for what, count in (("one leaves", SLICE - 1), ("one joins", SLICE)):
            times, longest = [], []
            for n in range(rounds):
                await told(n * SLICE, SLICE if what == "one leaves" else SLICE - 1)
                await anyio.sleep(1)
                stalls.take()
                wanted = len(watch.endpoints) + (1 if what == "one joins" else -1)
                started = perf_counter()
                await told(n * SLICE, count)
                await watch.addr.wait_for(lambda addr: isinstance(addr, Bound) and len(addr.addresses) == wanted)  # noqa: B023
                times.append(perf_counter() - started)
                await anyio.sleep(0.3)
                longest.append(stalls.take())
            row(what, times, longest)
        tasks.cancel_scope.cancel()
    await supervisor.aclose()
    return rows


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoints", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        others(args.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.kubernetes_scale", "--serve", folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                rows = anyio.run(measure, process, args.endpoints, args.rounds)
            finally:
                process.kill()
    print(as_columns([["", "seconds", "stall, ms", "longest"], *rows]))


if __name__ == "__main__":
    main()
