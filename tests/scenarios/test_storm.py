"""Ten thousand calls, each cancelled at a random moment of its life."""

from __future__ import annotations

import os
import random

import anyio

from meshlib import mux
from meshlib.mux.client_session import ClientSession
from meshlib.mux.server_session import ServerSession

CALLS = 10_000
AT_ONCE = 400


async def test_a_storm_of_cancelled_calls_leaves_nothing_behind() -> None:
    rng = random.Random(1)
    handled = {"begun": 0, "ended": 0}

    async def work(request: mux.Request) -> mux.Response:
        handled["begun"] += 1
        try:
            await anyio.sleep(float(request.body))
            return mux.Response(request.body)
        finally:
            handled["ended"] += 1

    sockets = _sockets()
    async with mux.serve(work, "127.0.0.1:0") as server:
        client = mux.client(server.address, seed=1)
        outcomes = {"answered": 0, "cancelled": 0}

        async def call(lives: float, takes: float) -> None:
            with anyio.move_on_after(lives):
                await client(mux.Request(b"%.4f" % takes))
                outcomes["answered"] += 1
                return
            outcomes["cancelled"] += 1

        # The first calls are cancelled while their connection is still being made.
        for _ in range(CALLS // AT_ONCE):
            async with anyio.create_task_group() as group:
                for _ in range(AT_ONCE):
                    lives = rng.choice((0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.1)))
                    if rng.random() < 0.05:  # some are answered however slow the machine is
                        lives = 30.0
                    group.start_soon(call, lives, rng.uniform(0, 0.02))
        assert sum(outcomes.values()) == CALLS
        assert min(outcomes.values()) > CALLS // 100, outcomes

        assert (await client(mux.Request(b"0"))).body == b"0"
        [session] = server.connections
        assert isinstance(session, ServerSession)
        with anyio.fail_after(5):
            while handled["begun"] != handled["ended"] or server.env.supervisor.jobs > 1:  # noqa: ASYNC110
                await anyio.sleep(0.001)
        assert session.in_flight == 0
        assert session.connection.queued == 0
        [theirs] = _sessions(client)
        assert theirs.pending == 0
        assert theirs._tags.in_use == 0
        assert len(theirs._deadlines) == 0
        assert theirs.connection.queued == 0
        assert [node.load for node in client.endpoints] == [0]
        numbers = client.metrics() | {f"server {k}": v for k, v in server.metrics().items()}
        assert numbers["pending"] == numbers["server pending"] == numbers["server limit/concurrency"] == 0
        assert numbers["pool/connects"] == 1, "one connection served them all"
        assert not numbers.get("mux/unexpected_replies")
        # Exactly one outcome a call.
        assert numbers["success"] + numbers["failures"] + numbers["cancelled"] == CALLS + 1
        await client.aclose()
        assert client.env.supervisor.jobs == 0
    assert server.env.supervisor.jobs == 0
    assert _sockets() <= sockets


def _sessions(client: mux.client) -> list[ClientSession]:  # type: ignore[valid-type]
    import gc

    return [o for o in gc.get_objects() if isinstance(o, ClientSession) and o.status.name != "CLOSED"]


def _sockets() -> int:
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):  # noqa: PTH112
        return 0
    return sum(1 for fd in os.listdir(folder) if _is_socket(f"{folder}/{fd}"))  # noqa: PTH208


def _is_socket(path: str) -> bool:
    try:
        return os.readlink(path).startswith("socket:")  # noqa: PTH115
    except OSError:
        return False
