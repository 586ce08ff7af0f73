"""Servers that come and go as real processes, while a client calls at a steady rate."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import anyio
import pytest

import meshlib

from .work import Work

RATE = 200
"""Calls per second, sent whether or not earlier ones were answered."""


class Fleet:
    """Three server processes on ports that stay theirs."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[str]] = {}
        for _ in range(3):
            process = self._spawn("0")
            self.processes[self._address(process)] = process

    def _spawn(self, port: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.scenarios.work", port]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _address(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the server did not start"
        return address

    def restart(self, address: str, how: signal.Signals) -> None:
        """End one, wait until it has ended, start it again on its port."""
        process = self.processes[address]
        process.send_signal(how)
        assert process.wait(20) == (0 if how is signal.SIGTERM else -how)
        assert process.stdout is not None
        process.stdout.close()
        self.processes[address] = self._spawn(address.rpartition(":")[2])
        assert self._address(self.processes[address]) == address

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(20)
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


async def call_at_rate(client: meshlib.TypedClient[Work], method: str, done: anyio.Event) -> tuple[int, list[str]]:
    """Open-loop calls until ``done``; how many there were, and what failed."""
    calls = 0
    failures: list[str] = []
    call = getattr(client, method)

    async def one(n: int) -> None:
        try:
            if await call(n) != n:
                failures.append(f"call {n} had another's answer")
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")

    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        while not done.is_set():
            group.start_soon(one, calls)
            calls += 1
            await anyio.sleep_until(start + calls / RATE)
    return calls, failures


@pytest.mark.parametrize(
    ("method", "how"),
    [("once", signal.SIGTERM), ("repeatable", signal.SIGTERM), ("repeatable", signal.SIGKILL)],
    ids=["drains, not idempotent", "drains, idempotent", "kills, idempotent"],
)
async def test_no_call_fails_while_three_servers_are_restarted_one_by_one(
    fleet: Fleet, method: str, how: signal.Signals
) -> None:
    client = meshlib.client(Work, ",".join(fleet.processes))
    done = anyio.Event()

    async def restarts() -> None:
        for address in tuple(fleet.processes):
            await anyio.sleep(0.3)
            await anyio.to_thread.run_sync(fleet.restart, address, how)
        with anyio.fail_after(20):  # a reconnect may have to wait out its backoff
            while any(node.status is not meshlib.Status.OPEN for node in client.endpoints):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        done.set()

    async with client, anyio.create_task_group() as group:
        group.start_soon(restarts)
        calls, failures = await call_at_rate(client, method, done)
        # Read while the client runs: every endpoint has come back and is used.
        assert [node.status for node in client.endpoints] == [meshlib.Status.OPEN] * 3
    assert failures == []
    numbers = client.metrics()
    assert numbers["requests"] == numbers["success"] == calls > RATE
    assert 5 <= numbers["pool/connects"] <= 6  # one that was replaced before its first call is connected to but once
    if how is signal.SIGKILL:
        assert numbers["retries/retries"] > 0, "nothing was under way when the servers died: the test shows nothing"
