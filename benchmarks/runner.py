"""Starts a server and a client process for each subject and takes them through the matrix, slice by slice.

Within a cell the subjects take turns, several short slices each, rather than one long run after the other: whatever
else the machine does meanwhile then hits all of them alike, and the median of a subject's slices drops what hit one.
A slice during which others took much of the machine is taken again, a few times at most.
"""

import json
import statistics
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from benchmarks.machine import Others, cores
from benchmarks.model import Cell, Plan, Slice
from benchmarks.subjects import TITLES

_PATIENCE = 30.0  # beyond what a command should take, before its worker counts as hung
_LONGEST_LINE = 65536
_DISTURBED = 0.08  # the share of the machine that others may take in a slice before it is better taken again


class WorkerError(Exception):
    """A worker process failed, ended or kept silent."""


class Worker:
    """The runner's end of one worker process."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input = process.stdin
        self._output = BufferedByteReceiveStream(process.stdout)

    async def hear(self, patience: float = _PATIENCE) -> dict[str, Any]:
        """The worker's next answer."""
        try:
            with anyio.fail_after(patience):
                line = await self._output.receive_until(b"\n", _LONGEST_LINE)
        except TimeoutError:
            raise WorkerError("no answer") from None
        except (anyio.IncompleteRead, anyio.BrokenResourceError, anyio.EndOfStream):
            raise WorkerError("the process ended") from None
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    async def ask(self, patience: float = _PATIENCE, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        # What a worker said last tells more than that it is gone.
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await self._input.send(json.dumps(command).encode() + b"\n")
        return await self.hear(patience)


@asynccontextmanager
async def start(role: str, subject: str, loop: str, core: str) -> AsyncIterator[Worker]:
    """A worker process, ended on the way out by closing its standard input."""
    command = [sys.executable, "-m", "benchmarks.worker", role, subject, loop, core]
    async with await anyio.open_process(command, stderr=None) as process:
        try:
            yield Worker(process)
        finally:
            assert process.stdin is not None
            await process.stdin.aclose()
            with anyio.move_on_after(3, shield=True) as patience:
                await process.wait()
            if patience.cancelled_caught:
                process.kill()


class Pair:
    """The two processes of one subject on one loop."""

    def __init__(self, server: Worker, client: Worker, address: str) -> None:
        self._server, self._client, self._address = server, client, address

    async def measure(self, callers: int, body: int, seconds: float, warmup: float) -> Slice:
        """Warm up, then measure for ``seconds`` with the processor times of both sides."""
        patience = _PATIENCE + seconds + warmup
        await self._client.ask(
            patience, address=self._address, callers=callers, body=body, seconds=seconds, warmup=warmup
        )
        before = (await self._server.ask(cpu=True))["cpu"]
        others = Others()
        result = await self._client.ask(patience, go=True)
        server_cpu = (await self._server.ask(cpu=True))["cpu"] - before
        disturbance = others.share(result["cpu"] + server_cpu)
        await self._client.ask(close=True)
        calls = result["calls"]
        return Slice(
            calls=calls,
            rate=result["rate"],
            p50_ms=result["p50"] * 1e3,
            p99_ms=result["p99"] * 1e3,
            client_us=result["cpu"] / calls * 1e6,
            server_us=server_cpu / calls * 1e6,
            others=disturbance,
        )


@asynccontextmanager
async def open_pair(subject: str, loop: str) -> AsyncIterator[Pair]:
    """Start both halves of a subject."""
    server_core, client_core = cores()
    async with start("server", subject, loop, server_core) as server:
        address = (await server.hear())["address"]
        async with start("client", subject, loop, client_core) as client:
            await client.hear()
            yield Pair(server, client, address)


async def run(plan: Plan, note: Callable[[str], None]) -> list[Cell]:
    """Measure the whole plan; ``note`` is told what is going on, and which subjects cannot take part."""
    cells: list[Cell] = []
    for loop in plan.loops:
        async with AsyncExitStack() as stack:
            pairs: dict[str, Pair] = {}
            for subject in plan.subjects:
                try:
                    pairs[subject] = await stack.enter_async_context(open_pair(subject, loop))
                except WorkerError as error:
                    note(f"{TITLES[subject]} on {loop} left out: {error}")
            for callers, body in plan.cells():
                note(f"{loop}, {callers} callers, {body} bytes")
                cells.extend(await _run_cell(plan, pairs, loop, callers, body, note))
    return cells


async def _run_cell(
    plan: Plan, pairs: dict[str, Pair], loop: str, callers: int, body: int, note: Callable[[str], None]
) -> list[Cell]:
    slices: dict[str, list[Slice]] = {subject: [] for subject in pairs}
    for _ in range(plan.rounds):
        for subject in list(pairs):
            try:
                slices[subject].append(await _quietest(plan, pairs[subject], callers, body))
            except WorkerError as error:
                note(f"{TITLES[subject]} on {loop} stops here: {error}")
                del pairs[subject]
    return [Cell(loop, callers, body, subject, median(taken), taken) for subject, taken in slices.items() if taken]


async def _quietest(plan: Plan, pair: Pair, callers: int, body: int) -> Slice:
    taken: list[Slice] = []
    while len(taken) <= plan.retries and not (taken and taken[-1].others < _DISTURBED):
        taken.append(await pair.measure(callers, body, plan.seconds / plan.rounds, plan.warmup))
    return min(taken, key=lambda one: one.others)


def median(slices: list[Slice]) -> Slice:
    """The median of each number on its own."""
    numbers = zip(*(taken.numbers() for taken in slices), strict=True)
    return Slice(*map(statistics.median, numbers))
