"""One half of one subject in a process of its own: ``python -m benchmarks.worker server|client subject loop [core]``.

The runner talks to it in lines of JSON, commands on standard input and answers on standard output. A server first
tells its address and then, whenever asked, its processor time. A client is told what to run and stops between warm-up
and measurement, so that the runner can read the server's processor time at the very start and end.
"""

import gc
import json
import os
import sys
from typing import Any

import anyio
import anyio.to_thread

from benchmarks.load import cpu_time, run_load
from benchmarks.machine import pin
from benchmarks.subjects import Subject, load


def tell(**answer: Any) -> None:
    """Send one answer to the runner."""
    print(json.dumps(answer), flush=True)


async def listen() -> dict[str, Any] | None:
    """The runner's next command, or None when there will be no more."""
    line = await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
    command: dict[str, Any] | None = json.loads(line) if line else None
    return command


async def run_server(subject: Subject) -> None:
    """Serve until the runner closes its end."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(subject.serve, lambda address: tell(address=address))
        while await listen() is not None:
            tell(cpu=cpu_time())
        tasks.cancel_scope.cancel()


async def run_client(subject: Subject) -> None:
    """Run one measurement for each command, each with a client of its own."""
    tell(started=True)
    while (command := await listen()) is not None:
        body = os.urandom(command["body"])
        callers: int = command["callers"]
        async with subject.connect(command["address"]) as call:
            await run_load(call, body, callers, command["warmup"])
            gc.collect()
            tell(warm=True)
            await listen()
            result = await run_load(call, body, callers, command["seconds"])
            tell(calls=result.calls, rate=result.rate, p50=result.p50, p99=result.p99, cpu=result.cpu)
            await listen()
        tell(closed=True)


def main(role: str, name: str, loop: str, core: str = "") -> None:
    """Pin the process first, so that threads of the libraries inherit it, then run the half asked for."""
    pin(core)
    try:
        subject = load(name)
    except (ImportError, AttributeError) as error:
        # Nothing is wrong with the benchmark then: a library is missing, or is not the version expected.
        tell(error=str(error))
        sys.exit(1)
    half = run_server if role == "server" else run_client
    try:
        anyio.run(half, subject, backend_options={"use_uvloop": loop == "uvloop"})
    except BaseException as error:
        cause = error
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        tell(error=f"{type(cause).__name__}: {cause}")
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
