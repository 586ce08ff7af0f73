"""The closed loop: so many callers, each with one call on its way at any time, for so long.

Requests are counted for the rate while the time runs, but processor time and latencies take in every request that was
begun: the last one of each caller ends after the time is over and was paid for like the others.
"""

import resource
from dataclasses import dataclass
from time import perf_counter

import anyio

from benchmarks.subjects import Call


@dataclass(frozen=True, slots=True)
class Load:
    """What the client side saw of one timed period; times in seconds."""

    calls: int
    rate: float
    p50: float
    p99: float
    cpu: float


def cpu_time() -> float:
    """Processor time of this process so far, in all its threads, in user and system mode."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def percentile(ordered: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


async def run_load(call: Call, body: bytes, callers: int, seconds: float) -> Load:
    """Call with ``callers`` tasks for ``seconds`` and sum it up; a reply that is not the body ends it."""
    latencies: list[float] = []

    async def caller() -> None:
        began = perf_counter()
        while began < deadline:
            reply = await call(body)
            ended = perf_counter()
            latencies.append(ended - began)
            began = ended
            if reply != body:
                raise ValueError(f"the reply to {len(body)} bytes has {len(reply)} bytes or others than were sent")

    cpu = cpu_time()
    deadline = perf_counter() + seconds
    async with anyio.create_task_group() as tasks:
        for _ in range(callers):
            tasks.start_soon(caller)
    cpu = cpu_time() - cpu
    # Each caller stopped because its last call ended late, so there are as many late calls as callers.
    in_time = len(latencies) - callers
    latencies.sort()
    return Load(len(latencies), in_time / seconds, percentile(latencies, 0.5), percentile(latencies, 0.99), cpu)
