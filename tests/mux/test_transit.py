"""What requests have waited before they are read: exact where we had caught up, else by the sender's clock."""

import socket
import threading
import time
from types import SimpleNamespace

import anyio
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib import mux
from meshlib.core.clock import Clock
from meshlib.core.context import Context
from meshlib.mux.codec import encode_tdispatch
from meshlib.mux.contexts import DEADLINE, ContextReader, encode_context
from meshlib.mux.transit import SAMPLES, Transit

S = 1_000_000_000


def test_what_comes_straight_through_has_waited_since_it_was_read():
    transit = Transit()
    transit.caught_up(0.0)
    transit.read(5.0)
    assert transit.waited(sent=100 * S, arrived=900 * S, now=5.25) == 0.25


def test_what_was_read_together_waits_for_its_turn():
    transit = Transit()
    transit.caught_up(0.0)
    transit.read(5.0)
    assert transit.waited(100 * S, 900 * S, 5.0) == 0.0
    assert transit.waited(100 * S, 901 * S, 6.0) == 1.0


def test_behind_it_is_what_is_later_than_the_base():
    transit = Transit()
    transit.caught_up(0.0)
    transit.read(5.0)
    transit.waited(100 * S, 900 * S, 5.0)  # the sender's clock is 800 s behind, and the way takes no time
    transit.read(9.0)
    assert transit.waited(101 * S, 904 * S, 9.0) == 3.0
    assert transit.waited(104 * S, 904 * S, 9.0) == 0.0
    assert transit.waited(105 * S, 904 * S, 9.0) == 0.0  # a clock that was set, or a way that became shorter


def test_it_is_never_more_than_we_have_been_behind():
    transit = Transit()
    transit.caught_up(0.0)
    transit.read(1.0)
    transit.waited(100 * S, 100 * S, 1.0)
    transit.caught_up(7.0)
    transit.read(8.0)
    transit.waited(108 * S, 108 * S, 8.0)
    transit.read(8.5)
    assert transit.waited(50 * S, 108 * S, 8.5) == 1.5  # the sender's clock was set back by nearly a minute


def test_without_a_request_that_came_straight_through_only_what_is_known_counts():
    transit = Transit()
    transit.read(1.0)
    assert transit.waited(1 * S, 50 * S, 1.5) == 0.5
    assert Transit().waited(1 * S, 50 * S, 1.5) == 0.0


def test_the_base_follows_a_clock_that_was_set():
    transit = Transit()
    for n in range(2 * SAMPLES):
        transit.caught_up(float(n))
        transit.read(float(n))
        behind = 0 if n < SAMPLES else 5  # the sender's clock is set back by 5 s
        transit.waited((n - behind) * S, n * S, float(n))
    transit.caught_up(100.0)
    transit.read(100.0)
    transit.waited(95 * S, 100 * S, 100.0)
    transit.read(101.0)
    assert transit.waited(96 * S, 101 * S, 101.0) == 0.0


@given(
    st.integers(-(10**6), 10**6),
    st.lists(st.tuples(st.floats(0, 0.1), st.floats(0, 0.2), st.integers(1, 5)), min_size=1, max_size=40),
)
def test_it_is_what_a_request_has_really_waited(skew, reads):
    """A reader that is now and then busy, and a sender whose clock is off: the way takes no time."""
    transit, now, queue = Transit(), 1.0, []
    transit.caught_up(now)
    transit.read(now)
    transit.waited(round((now + skew) * S), round(now * S), now)
    for pause, busy, sends in reads:
        if not queue:
            transit.caught_up(now)
            now += pause
            queue = [now] * sends
        transit.read(now)
        taken, queue = queue, []
        for sent in taken:
            found = transit.waited(round((sent + skew) * S), round(now * S), now)
            assert found == pytest.approx(now - sent, abs=1e-6)
        for n in range(sends):
            queue.append(now + busy * n / sends)
        now += busy


def test_a_deadline_is_nearer_by_what_its_request_has_waited():
    now = 10.0
    reader = ContextReader(Clock(lambda: now, lambda: round(now * S)))
    reader.transit.caught_up(now)
    reader.transit.read(now)
    pair = (DEADLINE, (10 * S).to_bytes(8, "big") + (12 * S).to_bytes(8, "big"))
    first = reader.read((pair,))
    assert (first.deadline, first.waited) == (12.0, 0.0)
    now = 11.5
    second = reader.read((pair,))
    assert (second.deadline, second.waited) == (12.0, 1.5)


@pytest.mark.parametrize("sent", [0, (1 << 63) - 1, -(1 << 63)])
def test_no_time_that_a_client_may_claim_is_too_much(sent):
    undecodable = SimpleNamespace(value=0)
    reader = ContextReader(Clock(), undecodable=undecodable)
    reader.transit.caught_up(time.monotonic())
    reader.transit.read(time.monotonic())
    for due in (0, (1 << 63) - 1, -(1 << 63)):
        value = sent.to_bytes(8, "big", signed=True) + due.to_bytes(8, "big", signed=True)
        context = reader.read(((DEADLINE, value),))
        assert context.deadline is not None
        assert 0 <= context.waited < 60
    assert undecodable.value == 0


async def test_a_saturated_server_does_no_work_that_nobody_waits_for():
    """One connection, a hundred requests of 10 ms, each with a deadline of 200 ms: a fifth of them can be answered."""
    handled = 0

    async def handler(request):
        nonlocal handled
        handled += 1
        time.sleep(0.01)  # noqa: ASYNC251 - the point: nothing else gets the core meanwhile
        return mux.Response(b"done")

    def flood(host, port):
        clock = Clock()
        with socket.create_connection((host, port)) as stream:
            for n in range(100):
                contexts = encode_context(Context(deadline=clock.now() + 0.2), clock)
                stream.sendall(encode_tdispatch(n + 1, contexts, "/work", (), b""))
                time.sleep(0.002)
            stream.settimeout(10)
            found, answers = b"", 0
            while answers < 100:
                while len(found) >= 4 and len(found) >= (size := 4 + int.from_bytes(found[:4], "big")):
                    found, answers = found[size:], answers + 1
                if answers < 100:
                    found += stream.recv(65536)

    async with mux.serve(handler, "127.0.0.1:0") as server:
        host, port = server.address.rsplit(":", 1)
        client = threading.Thread(target=flood, args=(host, int(port)), daemon=True)
        client.start()
        with anyio.fail_after(30):
            await anyio.to_thread.run_sync(client.join)
    assert 5 <= handled <= 60  # all hundred, if each deadline began when its request was read
