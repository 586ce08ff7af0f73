"""FastAPI: a shop asks a users service through httpx, as it always has, and with one line more in each.

    python -m examples.fastapi_app                      the whole story
    python -m examples.fastapi_app --users              one replica of users by hand; Ctrl-C or SIGTERM drains it
    python -m examples.fastapi_app --shop HOST:PORT,…   a shop by hand, which asks those replicas
    python -m examples.fastapi_app --before HOST:PORT,… the shop as it was

The story: three replicas of users and two shops start as processes of their own, each under uvicorn. One shop is as it
was: it draws a replica for each request, as DNS would for it. The other has meshlib's transport below the same httpx.
Both are asked for orders, at the same time and at the same rate, while one replica is killed and another turns slow.
The table at the end counts what came back.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import anyio
import httpx
import uvicorn
from fastapi import FastAPI, HTTPException

import meshlib

RATE, SECONDS = 50, 5.0
"""Orders a second asked of each shop, and for how long."""
SLOW = 0.7
"""Seconds that the slow replica takes for an answer."""


# --- the services -----------------------------------------------------------------------------------------------------


def users() -> FastAPI:
    """Knows who users are. ``POST /delay/{seconds}`` makes it slow, for the story."""
    app = FastAPI(title="users")
    app.add_middleware(meshlib.http.Middleware)  # the one line here
    delay = 0.0

    @app.get("/users/{number}")
    async def user(number: int) -> dict[str, str]:
        await anyio.sleep(delay)
        return {"name": f"user {number}"}

    @app.post("/delay/{seconds}")
    async def be_slow(seconds: float) -> None:
        nonlocal delay
        delay = seconds

    return app


def shop(client: httpx.AsyncClient, users: Callable[[], str]) -> FastAPI:
    """Knows who ordered what, and asks ``users()`` for the name.

    Args:
        client: Whatever transport it has.
        users: The base URL for the next request.
    """
    app = FastAPI(title="shop")
    app.add_middleware(meshlib.http.Middleware)  # the one line here

    @app.get("/orders/{number}")
    async def order(number: int) -> dict[str, str]:
        try:
            reply = await client.get(f"{users()}/users/{number}")
            reply.raise_for_status()
        except httpx.HTTPError as error:  # as ever: what the transport raises is httpx's own
            raise HTTPException(502, str(error)) from error
        return {"order": str(number), "for": reply.json()["name"]}

    return app


def shop_before(replicas: Sequence[str]) -> FastAPI:
    """Stock httpx."""
    return shop(httpx.AsyncClient(), lambda: f"http://{random.choice(replicas)}")


def shop_after(replicas: Sequence[str]) -> FastAPI:
    """The one line here: the transport."""
    client = httpx.AsyncClient(transport=meshlib.http.Transport(",".join(replicas)))
    return shop(client, lambda: "http://users")


def serve(app: FastAPI) -> None:
    """Serve on a free port, which is printed, until SIGTERM or Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


# --- the story --------------------------------------------------------------------------------------------------------


class Processes:
    """The services, as processes."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[str]] = {}

    def start(self, *options: str) -> str:
        """Start one, and give its address."""
        command = [sys.executable, "-m", "examples.fastapi_app", *options]
        # A session of its own: Ctrl-C in the terminal is ours to handle, and must not hit the servers directly.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit("a service did not start; its error is above")
        self._running[address] = process
        return address

    def end(self, address: str, how: signal.Signals) -> None:
        """Signal one, and wait until it is gone."""
        self._running[address].send_signal(how)
        self._running.pop(address).wait(15)

    def close(self) -> None:
        """End whatever runs."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
        self._running.clear()


class Customers:
    """Ask one shop for orders at a steady rate, whether or not it keeps up."""

    def __init__(self, client: httpx.AsyncClient, shop: str) -> None:
        self.outcomes = Counter[int]()
        self.times: list[float] = []
        self._client, self._url = client, f"http://{shop}/orders"

    async def ask(self, number: int) -> None:
        """One order."""
        began = anyio.current_time()
        reply = await self._client.get(f"{self._url}/{number}", timeout=30)
        self.outcomes[reply.status_code] += 1
        self.times.append((anyio.current_time() - began) * 1e3)

    async def run(self) -> None:
        """All of them."""
        began = anyio.current_time()
        async with anyio.create_task_group() as group:
            for number in range(int(RATE * SECONDS)):
                await anyio.sleep(max(0.0, began + number / RATE - anyio.current_time()))
                group.start_soon(self.ask, number)

    def row(self, name: str) -> str:
        """Of the table."""
        times, answered = sorted(self.times), self.outcomes[200]
        p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
        share = answered / len(times)
        return f"{name:>24} {len(times):>7} {share:>9.1%} {len(times) - answered:>7} {p50:>7.0f} ms {p99:>7.0f} ms"


async def story() -> int:
    """Tell it; give the number of orders that failed with the transport in place."""
    processes = Processes()

    async def start(*options: str) -> str:
        return await anyio.to_thread.run_sync(lambda: processes.start(*options))

    try:
        replicas = [""] * 3

        async def replica(place: int) -> None:
            replicas[place] = await start("--users")

        async with anyio.create_task_group() as group:
            for place in range(3):
                group.start_soon(replica, place)
        print(f"users: {', '.join(replicas)}")
        before, after = await start("--before", ",".join(replicas)), await start("--shop", ",".join(replicas))
        print(f"a shop with stock httpx: {before}; the same with meshlib's transport: {after}")
        async with httpx.AsyncClient() as client:
            sides = Customers(client, before), Customers(client, after)
            print(f"{RATE} orders a second of each, for {SECONDS:g} s")
            async with anyio.create_task_group() as group:
                for side in sides:
                    group.start_soon(side.run)
                await anyio.sleep(SECONDS * 0.25)
                print(f"  killing {replicas[0]}")
                await anyio.to_thread.run_sync(processes.end, replicas[0], signal.SIGKILL)
                await anyio.sleep(SECONDS * 0.25)
                print(f"  {replicas[1]} now takes {SLOW:g} s for an answer")
                await client.post(f"http://{replicas[1]}/delay/{SLOW:g}")
        print(f"\n{'shop':>24} {'orders':>7} {'answered':>9} {'failed':>7} {'p50':>10} {'p99':>10}")
        print(sides[0].row("before: stock httpx"))
        print(sides[1].row("after: + Transport"))
        return sides[1].outcomes.total() - sides[1].outcomes[200]
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(processes.close)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.fastapi_app", description=__doc__.split("\n")[0])
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--users", action="store_true", help="run one replica of users on a free port of 127.0.0.1")
    half.add_argument("--shop", metavar="HOST:PORT,…", help="run a shop that asks those replicas")
    half.add_argument("--before", metavar="HOST:PORT,…", help="run the shop as it was")
    options = parser.parse_args()
    try:
        if options.users:
            serve(users())
        elif options.shop:
            serve(shop_after(options.shop.split(",")))
        elif options.before:
            serve(shop_before(options.before.split(",")))
        else:
            return min(1, anyio.run(story))
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
