"""Echo: a typed service on three servers, and a client that never notices what happens to them.

    python -m examples.echo [LINE …]           the whole story; lines come from the arguments or standard input
    python -m examples.echo --serve PORT       one server by hand; Ctrl-C or SIGTERM drains it
    python -m examples.echo --connect TARGET   a client by hand; TARGET is host:port,… or file:///path

The story: three servers start as processes of their own, and a file lists them. A client follows the file. Lines are
echoed, then a stream of calls runs while one server is stopped gracefully and another is killed with SIGKILL;
replacements start and are added to the file. The table at the end counts what the client saw.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import anyio

import meshlib
from meshlib import rpc

TEXT = (
    "Call me, and I answer.",
    "Stop one of us: the others go on.",
    "Kill one of us: what it had not answered is asked again elsewhere.",
)
CALLERS = 32
SECONDS = 6.0


class Echo:
    """The service: its own contract, and its implementation."""

    @rpc(idempotent=True)
    async def echo(self, text: str) -> str:
        """Answer with what was asked."""
        return text


# --- the two halves, by hand ------------------------------------------------------------------------------------------


async def serve(port: int) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain."""
    async with meshlib.serve(Echo(), f"mux://127.0.0.1:{port}") as server:
        print(server.address, flush=True)
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                break


async def connect(target: str, lines: Sequence[str]) -> None:
    """Echo lines."""
    async with meshlib.client(Echo, target) as echo:
        for line in lines:
            print(await echo.echo(line))


# --- the story --------------------------------------------------------------------------------------------------------


class Servers:
    """Server processes, and the file that lists them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.running: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> str:
        """Start a server on a free port and list it."""
        command = [sys.executable, "-m", "examples.echo", "--serve", "0"]
        # A session of its own: Ctrl-C in the terminal is ours to handle, and must not hit the servers directly.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit("a server did not start; its error is above")
        self.running[address] = process
        self.write()
        return address

    def end(self, address: str, how: signal.Signals) -> None:
        """Signal a server and wait until it is gone. It stays listed, as in a registry that is slow to notice."""
        self.running[address].send_signal(how)
        self.running[address].wait(15)

    def unlist(self, address: str) -> None:
        """Take it from the list."""
        del self.running[address]
        self.write()

    def write(self) -> None:
        """Replace the file as a whole, so that nobody reads half of it."""
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(list(self.running)))
        new.replace(self.file)

    def close(self) -> None:
        """End whatever runs."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
        self.running.clear()


async def stream(echo: Echo, until: float) -> int:
    """Call as fast as the answers come; give the number of calls that failed."""
    failed = 0
    n = 0
    while anyio.current_time() < until:
        text = f"call {n}"
        n += 1
        try:
            if await echo.echo(text) != text:
                failed += 1
        except meshlib.MeshError as error:
            failed += 1
            print(f"  failed: {error}")
    return failed


async def story(lines: Sequence[str]) -> int:
    """Tell it; give the number of calls that failed."""
    with tempfile.TemporaryDirectory(prefix="meshlib-echo-") as folder:
        servers = Servers(Path(folder) / "endpoints.json")
        try:
            first, second, third = [await anyio.to_thread.run_sync(servers.start) for _ in range(3)]
            print(f"three servers: {first}, {second}, {third}")
            client = meshlib.client(Echo, f"file://{servers.file}")
            async with client as echo:
                for line in lines:
                    print(f"  {await echo.echo(line)}")
                print(f"now {CALLERS} callers at once for {SECONDS:g} s")
                failures: list[int] = []
                counts: dict[str, dict[str, float]] = {}
                until = anyio.current_time() + SECONDS

                async def caller() -> None:
                    failures.append(await stream(echo, until))

                async with anyio.create_task_group() as group:
                    for _ in range(CALLERS):
                        group.start_soon(caller)
                    await anyio.sleep(SECONDS * 0.2)
                    for address, how, words in (
                        (first, signal.SIGTERM, "stopping {} gracefully"),
                        (second, signal.SIGKILL, "killing {} with SIGKILL"),
                    ):
                        print("  " + words.format(address))
                        await anyio.to_thread.run_sync(servers.end, address, how)
                        await anyio.sleep(0.05)  # the client hears of it a moment later
                        counts[address] = count(client, address)  # its numbers leave the client with the endpoint
                        servers.unlist(address)
                        await anyio.sleep(SECONDS * 0.15)
                    print(f"  two replacements: {await anyio.to_thread.run_sync(servers.start)}", end=", ")
                    print(await anyio.to_thread.run_sync(servers.start))
                counts |= {address: count(client, address) for address in servers.running}
                print_table(client.metrics(), counts, sum(failures))
                return sum(failures)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(servers.close)


def count(client: meshlib.TypedClient[Echo], address: str) -> dict[str, float]:
    """What the client has counted for one endpoint."""
    scope = f"endpoints/{address}/"
    return {name.removeprefix(scope): n for name, n in client.metrics().items() if name.startswith(scope)}


def print_table(total: dict[str, float], endpoints: dict[str, dict[str, float]], failed: int) -> None:
    """What the client saw as a whole, and what it sent to each endpoint."""
    p50, p99 = "request_latency_ms.p50", "request_latency_ms.p99"
    retried = int(total["retries/requeues"] + total["retries/retries"])
    print(f"\n{'requests':>21} {'success':>9} {'failed':>7} {'retried':>8} {'p50':>9} {'p99':>9}")
    print(
        f"{int(total['requests']):>21} {total['success'] / total['requests']:>9.3%} {failed:>7} {retried:>8} "
        f"{total[p50]:>6.2f} ms {total[p99]:>6.2f} ms"
    )
    attempts = sum(numbers["requests"] for numbers in endpoints.values())
    print(f"\n{'endpoint':>21} {'share':>9} {'failed':>7} {'attempts':>8} {'p50':>9} {'p99':>9}")
    for address, n in endpoints.items():
        print(
            f"{address:>21} {n['requests'] / attempts:>9.1%} {int(n['failures']):>7} {int(n['requests']):>8} "
            f"{n.get(p50, 0):>6.2f} ms {n.get(p99, 0):>6.2f} ms"
        )


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.echo", description=__doc__.split("\n")[0])
    parser.add_argument("lines", nargs="*", metavar="LINE", help="what to echo (default: standard input, or a text)")
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--serve", type=int, metavar="PORT", help="run one server on this port of 127.0.0.1")
    half.add_argument("--connect", metavar="TARGET", help="echo the lines by the servers at TARGET")
    options = parser.parse_args()
    lines = options.lines
    if not lines and options.serve is None and not sys.stdin.isatty():
        lines = sys.stdin.read().splitlines()
    lines = lines or TEXT
    try:
        if options.serve is not None:
            anyio.run(serve, options.serve)
            return 0
        if options.connect is not None:
            anyio.run(connect, options.connect, lines)
            return 0
        return min(1, anyio.run(story, lines))
    except KeyboardInterrupt:
        print()
        return 130
    except meshlib.MeshError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cannot listen on port {options.serve}: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
