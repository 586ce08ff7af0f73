"""An httpx client with the whole stack below it, beside stock httpx, httpx2 and aiohttp: ``python -m benchmarks.http``.

One uvicorn in a process of its own answers 100 bytes to each, on one core, while the clients have another where there
are two. They take turns, several times over. What counts is the median of each, and its ratio to stock httpx and to the
stock client of the same module: the median of the ratios of the rounds, since what else the machine does in a round
hits all of them. The tables are printed, and written to ``benchmarks/results/http.md``.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import httpx
import httpx2
import uvicorn

import meshlib
from benchmarks import machine
from benchmarks.report import as_columns, environment

BODY = b"x" * 100
Get = Callable[[], Awaitable[Any]]


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answer."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
    await send({"type": "http.response.body", "body": BODY})


def serve() -> None:
    """Serve until killed."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(application, log_level="critical", lifespan="off", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


def through(module: Any, transport: Any, url: str) -> Callable[[], AbstractAsyncContextManager[Get]]:
    """A client of httpx or httpx2."""

    @asynccontextmanager
    async def client() -> Any:
        async with module.AsyncClient(transport=transport() if transport else None) as each:
            yield lambda: each.get(url)

    return client


def through_aiohttp(url: str) -> Callable[[], AbstractAsyncContextManager[Get]]:
    """A client of aiohttp."""

    @asynccontextmanager
    async def client() -> Any:
        async with aiohttp.ClientSession() as session:

            async def get() -> bytes:
                async with session.get(url) as reply:
                    return await reply.read()

            yield get

    return client


async def rate(make: Callable[[], AbstractAsyncContextManager[Get]], callers: int, seconds: float) -> float:
    """Requests a second."""
    done = 0
    async with make() as get:
        await get()
        began = time.perf_counter()
        until = began + seconds

        async def caller() -> None:
            nonlocal done
            while time.perf_counter() < until:
                await get()
                done += 1

        async with anyio.create_task_group() as group:
            for _ in range(callers):
                group.start_soon(caller)
        return done / (time.perf_counter() - began)


Rates = dict[str, list[float]]


async def compare(url: str, seconds: float, rounds: int) -> dict[int, Rates]:
    """Requests a second of each client in each round, by the number of callers."""
    clients = {
        "httpx": through(httpx, None, url),
        "httpx + Transport": through(httpx, meshlib.http.Transport, url),
        "httpx2": through(httpx2, None, url),
        "httpx2 + Httpx2Transport": through(httpx2, meshlib.http.Httpx2Transport, url),
        "aiohttp": through_aiohttp(url),
    }
    found: dict[int, Rates] = {}
    for callers in (1, 64):
        rates = found[callers] = {name: [] for name in clients}
        for _ in range(rounds):
            for name, make in clients.items():
                rates[name].append(await rate(make, callers, seconds))
    return found


def ratio(rates: Rates, name: str, reference: str) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(ours / theirs for ours, theirs in zip(rates[name], rates[reference], strict=True))


def table(rates: Rates) -> list[list[str]]:
    """With a heading."""
    rows = [["client", "requests/s", "lowest", "highest", "vs httpx", "vs its own stock"]]
    for name, each in rates.items():
        own = f"{ratio(rates, name, name.partition(' ')[0]):.2f}" if "+" in name else "-"
        numbers = (f"{number:,.0f}" for number in (statistics.median(each), min(each), max(each)))
        rows.append([name, *numbers, f"{ratio(rates, name, 'httpx'):.2f}", own])
    return rows


def as_markdown(found: dict[int, Rates], seconds: float, rounds: int) -> str:
    """The results as a page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("httpx", "httpx2", "aiohttp", "uvicorn"))
    about = environment()
    where = ", ".join(f"{name} {about[name]}" for name in ("python", "system", "processor", "cores"))
    how = (
        "GET of 100 bytes from one uvicorn in a process of its own, on asyncio, server and clients each on a core of "
        f"their own where there are two. Medians of {rounds} rounds of {seconds:g} s, the clients taking turns; the "
        "ratios are medians of the rounds' ratios. `Transport` has the whole default stack below it."
    )
    parts = ["# Below httpx", how, f"{where}; {versions}"]
    for callers, rates in found.items():
        rows = table(rates)
        rule = [":--", *["--:"] * (len(rows[0]) - 1)]
        lines = ("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])
        parts += [f"## {callers} caller{'s' * (callers > 1)}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="directory of the results")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        machine.pin(machine.cores()[0])
        serve()
        return
    machine.pin(machine.cores()[1])
    command = [sys.executable, "-m", "benchmarks.http", "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = f"http://127.0.0.1:{int(server.stdout.readline())}/"
            found = anyio.run(compare, url, options.seconds, options.rounds)
        finally:
            server.kill()
    for callers, rates in found.items():
        print(f"\n{callers} caller{'s' * (callers > 1)}\n" + as_columns(table(rates)))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "http.md"
    path.write_text(as_markdown(found, options.seconds, options.rounds), encoding="utf-8")
    print(f"\nwritten: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
