"""Discovery: servers that come and go, a client that follows them, and traffic moved from one version to the next.

    python -m examples.discovery [--files]              the whole story; with ZooKeeper where it is found, else files
    python -m examples.discovery --serve VERSION --at TARGET    one server by hand, announced there
    python -m examples.discovery --watch TARGET         print a name's endpoints as they change

The story has two parts, and callers call all the while. First three servers of version 1 announce themselves. One is
killed, one is added, one is stopped gracefully, and the client follows. Then two servers of version 2 appear, and a
table of names (a Dtab, in a file) sends them 0, 10, 50 and 100 % of the calls, one after the other. The summary at the
end counts what the callers saw: no call has failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections import Counter

import anyio

import meshlib
from meshlib import rpc
from meshlib.names.addr import Bound

from .registry import Registry

CALLERS = 8
PAUSE = 0.002
"""Seconds between two calls of a caller: this is about who answers, not how many answers there are."""
SHARES = (0, 10, 50, 100)


class Greeter:
    """The service: its own contract, and its implementation."""

    def __init__(self, version: str) -> None:
        self.version = version

    @rpc(idempotent=True)
    async def hello(self, name: str) -> str:
        """Greet, and say which version did."""
        return f"hello, {name}, says {self.version}"


# --- the halves, by hand ----------------------------------------------------------------------------------------------


async def serve(version: str, target: str) -> None:
    """Serve, and be found at ``target``, until SIGTERM or Ctrl-C; then withdraw, and finish what was begun."""
    async with meshlib.serve(Greeter(version), "mux://127.0.0.1:0", announce=target) as server:
        print(server.address, flush=True)
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                break


class View:
    """What a client sees of a name, printed as it changes.

    Args:
        target: The name.
        words: What to print before it.

    Attributes:
        there: The addresses that it has now.
    """

    def __init__(self, target: str, words: str = "") -> None:
        self.target, self.words = target, words
        self.there: set[str] = set()
        self._news = anyio.Event()

    async def follow(self) -> None:
        """Follow it until cancelled."""
        printed = ""
        async with meshlib.resolve(self.target) as states:
            async for state in states:
                self.there = set(map(str, state.addresses)) if isinstance(state, Bound) else set()
                # Sorted, so that one can see what is new; what a server says of itself beside its address is not shown.
                text = ", ".join(sorted(self.there)) or str(state)
                if text != printed:
                    printed = text
                    print(f"{self.words}{text}", flush=True)
                self._news.set()
                self._news = anyio.Event()

    async def sees(self, addresses: set[str]) -> None:
        """Wait until it has these addresses, and no others."""
        with anyio.fail_after(15):
            while self.there != addresses:
                await self._news.wait()


# --- the story --------------------------------------------------------------------------------------------------------


class Servers:
    """Server processes."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.running: dict[str, subprocess.Popen[str]] = {}

    def start(self, version: str) -> str:
        """Start one; give its address."""
        target = self.registry.target(f"greeter-{version}")
        command = [sys.executable, "-m", "examples.discovery", "--serve", version, "--at", target]
        # A session of its own: Ctrl-C in the terminal is ours to handle, and must not hit the servers directly.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit("a server did not start; its error is above")
        self.running[address] = process
        return address

    def end(self, address: str, how: signal.Signals) -> None:
        """Signal one, and wait until it is gone."""
        process = self.running.pop(address)
        process.send_signal(how)
        process.wait(15)

    def close(self) -> None:
        """End whatever runs."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()


class Callers:
    """Those who call all the while, and what they saw."""

    def __init__(self, greeter: Greeter) -> None:
        self.greeter = greeter
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []

    async def run(self) -> None:
        """Call until cancelled."""
        async with anyio.create_task_group() as group:
            for _ in range(CALLERS):
                group.start_soon(self._call)

    async def _call(self) -> None:
        while True:
            try:
                answer = await self.greeter.hello("world")
                self.answers[answer.rpartition(" ")[2]] += 1
            except meshlib.MeshError as error:
                self.failures.append(str(error))
                print(f"  failed: {error}")
            await anyio.sleep(PAUSE)

    async def shares(self, seconds: float) -> dict[str, float]:
        """Who answered how much of the calls of the next seconds."""
        before = self.answers.copy()
        await anyio.sleep(seconds)
        now = self.answers - before
        return {version: count / now.total() for version, count in sorted(now.items())}


class Table:
    """The Dtab: what names mean. It stands in a file, and clients follow it as it is rewritten."""

    def __init__(self, registry: Registry) -> None:
        self.file = registry.folder / "dtab"
        self._leaves = "".join(f"/{v} => {registry.target(f'greeter-{v}')} ;\n" for v in ("v1", "v2"))

    def write(self, share: int) -> str:
        """Send this share, in per cent, to version 2; give the line that says so."""
        rule = {0: "/v1", 100: "/v2"}.get(share, f"{100 - share} * /v1 & {share} * /v2")
        new = self.file.with_suffix(".new")
        new.write_text(f"{self._leaves}/s/greeter => {rule} ;\n")
        new.replace(self.file)  # as a whole, so that nobody reads half of it
        return f"/s/greeter => {rule}"


async def come_and_go(servers: Servers, view: View) -> None:
    """Part one: one dies, one is added, one is stopped."""
    killed, stopped, _ = servers.running
    print(f"killing {killed} with SIGKILL")
    await anyio.to_thread.run_sync(servers.end, killed, signal.SIGKILL)
    await view.sees(set(servers.running))
    print(f"adding {await anyio.to_thread.run_sync(servers.start, 'v1')}")
    await view.sees(set(servers.running))
    print(f"stopping {stopped} gracefully")
    await anyio.to_thread.run_sync(servers.end, stopped, signal.SIGTERM)
    await view.sees(set(servers.running))


async def shift(client: meshlib.TypedClient[Greeter], callers: Callers, table: Table) -> None:
    """Part two: traffic moves from version 1 to version 2."""
    for share in SHARES:
        print(f"{share} % to version 2:  {table.write(share)}")
        await anyio.sleep(0.8)  # the client looks at the file every half second
        seen = await callers.shares(1.2)
        print("  answered by " + ", ".join(f"{version}: {part:.1%}" for version, part in seen.items()))
        if share == 10:
            print("  what a call would do now:")
            print("\n".join(f"    {line}" for line in str(await client.delegate()).splitlines()))


async def story(registry: Registry) -> int:
    """Tell it; give the number of calls that failed."""
    servers, table = Servers(registry), Table(registry)
    print(f"servers announce themselves in {registry.kind}, at {registry.target('greeter-v1')}")
    try:
        first = [await anyio.to_thread.run_sync(servers.start, "v1") for _ in range(3)]
        print(f"three servers of version 1: {', '.join(first)}")
        table.write(0)
        client = meshlib.client(Greeter, "/s/greeter", meshlib.base_dtab(f"file://{table.file}"))
        callers = Callers(client.stub)
        async with client, anyio.create_task_group() as group:
            view = View(registry.target("greeter-v1"), "  version 1 is now at ")
            group.start_soon(view.follow)
            await view.sees(set(first))
            group.start_soon(callers.run)
            await anyio.sleep(1.0)
            await come_and_go(servers, view)
            second = [await anyio.to_thread.run_sync(servers.start, "v2") for _ in range(2)]
            print(f"two servers of version 2: {', '.join(second)}")
            await shift(client, callers, table)
            group.cancel_scope.cancel()
        print_summary(callers)
        return len(callers.failures)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(servers.close)


def print_summary(callers: Callers) -> None:
    """What the callers saw."""
    total = callers.answers.total() + len(callers.failures)
    print(f"\n{'calls':>8} {'failures':>9} {'version 1':>10} {'version 2':>10}")
    parts = (callers.answers[version] / max(1, callers.answers.total()) for version in ("v1", "v2"))
    print(f"{total:>8} {len(callers.failures):>9} " + " ".join(f"{part:>10.1%}" for part in parts))


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.discovery", description=__doc__.split("\n")[0])
    parser.add_argument("--files", action="store_true", help="announce in files, even where ZooKeeper is found")
    parser.add_argument("--serve", metavar="VERSION", help="run one server that says it is this version")
    parser.add_argument("--at", metavar="TARGET", help="where it announces itself, such as file:///tmp/greeter/")
    parser.add_argument("--watch", metavar="TARGET", help="print the endpoints of a name as they change")
    options = parser.parse_args()
    if (options.serve is None) != (options.at is None):
        parser.error("--serve and --at go together")
    try:
        if options.serve is not None:
            anyio.run(serve, options.serve, options.at)
            return 0
        if options.watch is not None:
            anyio.run(View(options.watch).follow)
            return 0
        with Registry(zookeeper=not options.files) as registry:
            return min(1, anyio.run(story, registry))
    except KeyboardInterrupt:
        print()
        return 130
    except meshlib.MeshError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
