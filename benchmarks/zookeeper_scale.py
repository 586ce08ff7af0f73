"""``python -m benchmarks.zookeeper_scale``: 10,000 members in a real ZooKeeper.

How long it takes until a client knows them all, until it knows of one that joined, and of one that left (which waits
for the second by which removals are smoothed); and for how long the event loop stood still meanwhile: the longest time
by which a task that sleeps for a millisecond woke too late. The members are read by a `Watch`, as a client has it, in a
process that does nothing else; ZooKeeper and who changes it are others. The first row is the same process with nothing
to do, which is what the machine does by itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import perf_counter

import anyio
import anyio.to_thread
from kazoo.client import KazooClient

from benchmarks.report import as_columns
from meshlib.core.clock import Clock
from meshlib.core.env import Env
from meshlib.core.supervisor import Supervisor
from meshlib.names.addr import Bound
from meshlib.names.resolver import Watch, resolver_for
from meshlib.names.target import Target
from tests.zookeeper import standalone

PATH = "/services/many"
SAMPLE = 0.001
WINDOW = 200


class Stalls:
    """The longest time by which a sleeping task woke too late, of each phase."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def run(self) -> None:
        while True:
            started = perf_counter()
            await anyio.sleep(SAMPLE)
            self.longest = max(self.longest, perf_counter() - started - SAMPLE)

    def take(self) -> float:
        longest, self.longest = self.longest, 0.0
        return longest


def data(number: int) -> bytes:
    where = {"host": f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", "port": 9000}
    said = {"serviceEndpoint": where, "additionalEndpoints": {"http": {**where, "port": 8080}}, "status": "ALIVE"}
    return json.dumps({**said, "shard": number, "metadata": {"zone": f"z{number % 3}"}}).encode()


def others(hosts: str) -> None:
    """Another process: fills the path, then does what it is told by lines, and answers each."""
    client = KazooClient(hosts)
    client.start()
    for line in sys.stdin:
        word, number = line.split()
        if word == "fill":
            client.ensure_path(PATH)
            for first in range(0, int(number), WINDOW):
                numbers = range(first, min(first + WINDOW, int(number)))
                made = [client.create_async(f"{PATH}/member_{n:010d}", data(n)) for n in numbers]
                for each in made:
                    each.get()
        elif word == "join":
            client.create(f"{PATH}/member_{int(number):010d}", data(int(number)))
        else:
            client.delete(f"{PATH}/member_{int(number):010d}")
        print("done", flush=True)
    client.stop()


async def measure(hosts: str, members: int, rounds: int, tell: "subprocess.Popen[str]") -> list[list[str]]:
    async def told(word: str, number: int) -> None:
        def ask() -> None:
            assert tell.stdin is not None
            assert tell.stdout is not None
            tell.stdin.write(f"{word} {number}\n")
            tell.stdin.flush()
            tell.stdout.readline()

        await anyio.to_thread.run_sync(ask)

    def row(what: str, seconds: list[float], stalls: list[float]) -> list[str]:
        times = f"{median(seconds):.3f}" if seconds else "—"
        return [what, times, f"{1000 * median(stalls):.0f}", f"{1000 * max(stalls):.0f}"]

    target = Target.parse(f"zk://{hosts}{PATH}")
    rows: list[list[str]] = []
    await told("fill", members)
    async with anyio.create_task_group() as tasks:
        stalls = Stalls()
        tasks.start_soon(stalls.run)
        await anyio.sleep(2)
        rows.append(row("nothing", [], [stalls.take()]))
        times, longest = [], []
        for _ in range(rounds):
            supervisor = Supervisor("benchmark")
            watch = Watch(target, resolver_for(target), Env(clock=Clock(), supervisor=supervisor))
            stalls.take()
            started = perf_counter()
            watch.start()
            await watch.addr.wait_for(lambda addr: isinstance(addr, Bound) and len(addr.addresses) == members)
            times.append(perf_counter() - started)
            await anyio.sleep(0.2)
            longest.append(stalls.take())
            if _ < rounds - 1:
                await supervisor.aclose()
        rows.append(row(f"first resolution of {members}", times, longest))
        for word, wanted in (("join", members + 1), ("leave", members)):
            times, longest = [], []
            for _ in range(rounds):
                number = members
                if (word == "leave" and _) or (word == "join" and _):
                    opposite = "leave" if word == "join" else "join"
                    await told(opposite, number)
                    count = members if word == "join" else members + 1
                    await watch.addr.wait_for(lambda addr, n=count: len(addr.addresses) == n)  # type: ignore[misc]
                    await anyio.sleep(0.2)
                stalls.take()
                started = perf_counter()
                await told(word, number)
                await watch.addr.wait_for(lambda addr, n=wanted: len(addr.addresses) == n)  # type: ignore[misc]
                times.append(perf_counter() - started)
                await anyio.sleep(0.2)
                longest.append(stalls.take())
            rows.append(row(f"one {'joins' if word == 'join' else 'leaves'}", times, longest))
        await supervisor.aclose()
        tasks.cancel_scope.cancel()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), default="asyncio")
    parser.add_argument("--others", metavar="HOSTS", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.others:
        with suppress(KeyboardInterrupt):
            others(asked.others)
        return
    backend = "trio" if asked.loop == "trio" else "asyncio"
    options = {} if backend == "trio" else {"use_uvloop": asked.loop == "uvloop"}
    with tempfile.TemporaryDirectory() as folder, standalone(Path(folder) / "zookeeper") as server:
        command = [sys.executable, "-m", "benchmarks.zookeeper_scale", "--others", server.hosts]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tell:
            rows = anyio.run(
                measure, server.hosts, asked.members, asked.rounds, tell, backend=backend, backend_options=options
            )
            assert tell.stdin is not None
            tell.stdin.close()
    print(as_columns([["", "s", "stall ms", "longest ms"], *rows]))


if __name__ == "__main__":
    main()
