"""The fault proxy, between real sockets: bytes arrive whole and in order, or are wronged exactly as it was told."""

import contextlib
import math
import random
import socket
import struct

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib import mux
from meshlib.client import Liveness
from meshlib.core.errors import ConfigurationError, ServiceClosed
from meshlib.testing import Direction, FaultProxy
from tests.conftest import missing

PATIENCE = 5


@contextlib.asynccontextmanager
async def proxied(handle, **options):
    """A proxy in front of a server that runs ``handle`` for each connection."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)

    async def serve(stream):
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            await handle(stream)

    async with anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        async with FaultProxy(f"127.0.0.1:{port}", **options) as proxy:
            with anyio.fail_after(PATIENCE):
                yield proxy
        group.cancel_scope.cancel()
    await listener.aclose()


async def echo(stream):
    async with stream:
        while True:
            await stream.send(await stream.receive())


async def connect(proxy):
    host, _, port = proxy.address.rpartition(":")
    return await anyio.connect_tcp(host, int(port))


async def until(condition):
    while not condition():  # noqa: ASYNC110 - it happens in tasks that tell nobody
        await anyio.sleep(0.001)


async def read(stream, size):
    data = b""
    while len(data) < size:
        data += await stream.receive(size - len(data))
    return data


async def read_all(stream):
    data = b""
    with contextlib.suppress(anyio.EndOfStream):
        while True:
            data += await stream.receive()
    return data


class Watch:
    def __init__(self):
        self.started = anyio.current_time()

    @property
    def elapsed(self):
        return anyio.current_time() - self.started


async def quickest(function, wanted):
    """Seconds of the quickest of up to ten runs, and no more of them than it takes: machines pause when they like."""
    took = math.inf
    for _ in range(10):
        watch = Watch()
        await function()
        took = min(took, watch.elapsed)
        if took < wanted:
            break
    return took


# --- nothing wrong --------------------------------------------------------------------------------------------------


async def test_a_megabyte_arrives_whole_both_ways_through_small_buffers_and_slices():
    payload = random.Random(1).randbytes(1_000_000)
    async with proxied(echo, seed=1, buffer=10_000) as proxy:
        proxy.upstream.slice_size = 5_000
        async with await connect(proxy) as stream, anyio.create_task_group() as group:
            group.start_soon(stream.send, payload)
            assert await read(stream, len(payload)) == payload
        assert proxy.accepted == 1


async def test_the_end_of_one_direction_leaves_the_other_open():
    async def after_the_end(stream):
        async with stream:
            await stream.send(b"heard %d" % len(await read_all(stream)))

    async with proxied(after_the_end) as proxy, await connect(proxy) as stream:
        await stream.send(b"x" * 1000)
        await stream.send_eof()
        assert await read_all(stream) == b"heard 1000"


async def test_connections_are_counted_and_forgotten():
    async with proxied(echo) as proxy:
        for _ in range(3):
            async with await connect(proxy) as stream:
                await stream.send(b"x")
                await stream.receive()
                assert proxy.connections == 1
            await until(lambda: not proxy.connections)
        assert proxy.accepted == 3


# --- time -----------------------------------------------------------------------------------------------------------


async def test_latencies_of_both_directions_add_up_and_change_while_it_runs():
    async with proxied(echo) as proxy, await connect(proxy) as stream:
        for up, down in ((0.08, 0.0), (0.04, 0.05), (0.0, 0.0)):
            proxy.upstream.latency, proxy.downstream.latency = up, down

            async def exchange():
                await stream.send(b"x")
                await stream.receive()

            assert up + down - 0.002 <= await quickest(exchange, up + down + 0.07) < up + down + 0.07


async def test_latency_costs_no_bandwidth():
    """A hundred messages, one each millisecond, all arrive a latency after they were sent, not a hundred latencies."""
    async with proxied(echo) as proxy, await connect(proxy) as stream, anyio.create_task_group() as group:
        proxy.downstream.latency = 0.1

        async def send():
            for _ in range(100):
                await stream.send(b"x" * 10)
                await anyio.sleep(0.001)

        watch = Watch()
        group.start_soon(send)
        assert len(await read(stream, 1000)) == 1000
        assert 0.19 < watch.elapsed < 3  # and not 10 s


async def test_jitter_keeps_the_order():
    payload = bytes(range(256))
    async with proxied(echo, seed=3) as proxy, await connect(proxy) as stream, anyio.create_task_group() as group:
        proxy.upstream.latency, proxy.upstream.jitter = 0.01, 0.01

        async def send():
            for byte in payload:
                await stream.send(bytes([byte]))
                await anyio.lowlevel.checkpoint()

        group.start_soon(send)
        assert await read(stream, 256) == payload


async def test_bandwidth_is_kept_and_lifted_while_bytes_wait():
    async with proxied(echo) as proxy, await connect(proxy) as stream:
        proxy.upstream.bandwidth = 100_000
        watch = Watch()
        await stream.send(b"x" * 20_000)
        await read(stream, 20_000)
        assert 0.15 < watch.elapsed < 3
        proxy.upstream.bandwidth = 1_000  # 20 s for the next
        await stream.send(b"x" * 20_000)
        await read(stream, 20)
        proxy.upstream.bandwidth = None
        await read(stream, 19_980)
        assert watch.elapsed < 8


async def test_slices_are_pieces_with_a_pause_between_them():
    async with proxied(echo, seed=1) as proxy, await connect(proxy) as stream:
        proxy.downstream.slice_size, proxy.downstream.slice_delay = 10, 0.005
        watch, pieces = Watch(), []
        await stream.send(b"x" * 100)
        while sum(pieces) < 100:
            pieces.append(len(await stream.receive()))
        assert len(pieces) > 5
        assert watch.elapsed > 0.03


async def test_the_end_may_come_late():
    async with proxied(echo) as proxy, await connect(proxy) as stream:
        proxy.downstream.slow_close = 0.6
        watch = Watch()
        await stream.send(b"x")
        await stream.send_eof()
        assert await stream.receive() == b"x"
        assert watch.elapsed < 0.55
        assert await read_all(stream) == b""
        assert watch.elapsed > 0.595


# --- what does not arrive -------------------------------------------------------------------------------------------


async def test_a_black_hole_swallows_one_direction_and_gives_it_back():
    heard = []

    async def note(stream):
        async with stream:
            while True:
                heard.append(await stream.receive())
                await stream.send(b"ok")

    async with proxied(note) as proxy, await connect(proxy) as stream:
        proxy.downstream.stalled = True
        await stream.send(b"x")
        with anyio.move_on_after(0.05) as scope:
            await stream.receive()
        assert scope.cancelled_caught
        assert heard == [b"x"]
        proxy.upstream.stalled = True
        await stream.send(b"y")
        await anyio.sleep(0.02)
        assert heard == [b"x"]
        proxy.heal()
        assert await read(stream, 4) == b"okok"
        assert heard == [b"x", b"y"]


async def test_a_black_hole_pushes_back_on_the_sender():
    """What is held is bounded: the sender's own send blocks, once the proxy's buffer and the kernel's are full."""
    async with proxied(echo, buffer=10_000) as proxy:
        proxy.upstream.stalled = True
        async with await connect(proxy) as stream:
            sent = 0
            with anyio.move_on_after(0.3) as scope:
                while sent < 64_000_000:
                    await stream.send(b"x" * 100_000)
                    sent += 100_000
            assert scope.cancelled_caught
            assert sent < 32_000_000


async def test_a_half_open_connection_is_accepted_and_never_answered():
    async with proxied(echo) as proxy:
        proxy.upstream.stalled = proxy.downstream.stalled = True
        async with await connect(proxy) as stream:
            await stream.send(b"x")
            with anyio.move_on_after(0.05) as scope:
                await stream.receive()
            assert scope.cancelled_caught


@pytest.mark.parametrize("toxic", ["close_after", "reset_after"])
async def test_a_connection_ends_after_so_many_bytes(toxic):
    async with proxied(echo) as proxy:
        setattr(proxy.downstream, toxic, 7)
        async with await connect(proxy) as stream:
            await stream.send(b"0123456789")
            assert await read(stream, 7) == b"0123456"
            end = anyio.EndOfStream if toxic == "close_after" else anyio.BrokenResourceError
            with pytest.raises(end):
                await stream.receive()


async def test_a_reset_is_a_reset_on_both_sides():
    got, ends = [], []

    async def note(stream):
        async with stream:
            try:
                while True:
                    got.append(await stream.receive())
            except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
                ends.append(type(error))

    async with proxied(note) as proxy, await connect(proxy) as stream:
        await stream.send(b"x")
        await until(lambda: got)
        proxy.reset()
        with pytest.raises(anyio.BrokenResourceError):
            await stream.receive()
        await until(lambda: ends)
    assert ends == [anyio.BrokenResourceError]


async def test_a_reset_by_the_server_is_handed_on():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        async with FaultProxy(target) as proxy, await connect(proxy) as stream:
            with anyio.fail_after(PATIENCE):
                await anyio.wait_readable(listener)
                server, _ = listener.accept()
                server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                server.close()
                with pytest.raises(anyio.BrokenResourceError):
                    await stream.receive()


async def test_a_server_that_is_not_there_is_a_reset():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with FaultProxy(f"127.0.0.1:{port}") as proxy, await connect(proxy) as stream:
        with pytest.raises(anyio.BrokenResourceError), anyio.fail_after(PATIENCE):
            await stream.receive()


async def test_disabled_it_refuses_and_enabled_it_is_where_it_was():
    async with proxied(echo) as proxy:
        address = proxy.address
        async with await connect(proxy) as stream:
            await stream.send(b"x")
            await stream.receive()
            proxy.disable()
            assert "disabled" in repr(proxy)
            with pytest.raises(anyio.BrokenResourceError):
                await stream.receive()
        with pytest.raises(OSError, match=r"."):
            await connect(proxy)
        proxy.enable()
        proxy.enable()
        assert proxy.address == address
        async with await connect(proxy) as stream:
            await stream.send(b"x")
            assert await stream.receive() == b"x"


async def test_a_target_is_tried_at_each_of_its_addresses():
    """Most machines know ``localhost`` by two, and the server listens on one."""

    async def handler(request):
        return mux.Response(request.body)

    async with mux.serve(handler, "127.0.0.1:0") as server:
        target = server.address.replace("127.0.0.1", "localhost")
        async with FaultProxy(target) as proxy, mux.client(proxy.address) as client:
            assert (await client(mux.Request(b"x"))).body == b"x"


async def test_addresses_may_be_of_the_sixth_version():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        missing(f"no IPv6 here: {error}")

    async def handler(request):
        return mux.Response(request.body)

    async with (
        mux.serve(handler, "[::1]:0") as server,
        FaultProxy(server.address, "[::1]:0") as proxy,
        mux.client(proxy.address) as client,
    ):
        assert proxy.address.startswith("[::1]:")
        assert (await client(mux.Request(b"x"))).body == b"x"


# --- closing --------------------------------------------------------------------------------------------------------


async def test_closing_ends_everything_however_it_is_stuck():
    async with proxied(echo) as proxy:
        proxy.upstream.stalled = True
        proxy.downstream.latency = 60
        async with await connect(proxy) as stream:
            await stream.send(b"x")
            await until(lambda: proxy.connections)
            await proxy.aclose()
            await proxy.aclose()
            assert proxy.connections == 0
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stream.receive()
        with pytest.raises(ServiceClosed):
            proxy.start()


# --- under a real client --------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def mux_through_proxy(*layers, **options):
    async def handler(request):
        return mux.Response(request.body)

    async with (
        mux.serve(handler) as server,
        FaultProxy(server.address, seed=1) as proxy,
        mux.client(proxy.address, *layers, seed=1, **options) as client,
    ):
        with anyio.fail_after(PATIENCE):
            yield client, proxy


async def test_a_mux_call_pays_both_latencies():
    async with mux_through_proxy() as (client, proxy):
        await client(mux.Request(b"x"))
        proxy.upstream.latency = proxy.downstream.latency = 0.03
        assert 0.058 <= await quickest(lambda: client(mux.Request(b"x")), 0.3) < 0.3


async def test_a_mux_call_under_way_ends_with_the_connection_that_is_reset():
    async with mux_through_proxy() as (client, proxy):
        await client(mux.Request(b"x"))
        proxy.downstream.stalled = True
        async with anyio.create_task_group() as group:

            async def call():
                with pytest.raises(meshlib.ConnectionLost):
                    await client(mux.Request(b"x"))

            group.start_soon(call)
            await anyio.sleep(0.03)
            proxy.reset()
        proxy.heal()
        assert (await client(mux.Request(b"y"))).body == b"y"
        assert proxy.accepted == 2


async def test_a_mux_call_into_a_black_hole_ends_by_its_deadline():
    async with mux_through_proxy(meshlib.timeout(0.1)) as (client, proxy):
        await client(mux.Request(b"x"))
        proxy.downstream.stalled = True
        watch = Watch()
        with pytest.raises(meshlib.DeadlineExceeded):
            await client(mux.Request(b"x"))
        assert 0.095 < watch.elapsed < 2


async def test_pings_find_out_that_a_connection_is_a_black_hole():
    async with mux_through_proxy(Liveness(interval=0.05, timeout=0.05)) as (client, proxy):
        await client(mux.Request(b"x"))
        proxy.upstream.stalled = proxy.downstream.stalled = True
        watch = Watch()
        with pytest.raises(meshlib.ConnectionLost):
            await client(mux.Request(b"x"))
        assert watch.elapsed < 3
        proxy.heal()
        assert (await client(mux.Request(b"y"))).body == b"y"


async def test_a_mux_message_arrives_in_single_bytes():
    async with mux_through_proxy() as (client, proxy):
        proxy.upstream.slice_size = proxy.downstream.slice_size = 1
        assert (await client(mux.Request(b"hello" * 20))).body == b"hello" * 20


# --- the values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toxic", "value", "right"),
    [
        ("latency", -1, "seconds, 0 or more"),
        ("latency", float("inf"), "seconds, 0 or more"),
        ("jitter", True, "seconds, 0 or more"),
        ("bandwidth", 0, "bytes a second, above 0, or None"),
        ("slice_size", 0, "bytes, 1 or more, or None"),
        ("slice_size", 1.5, "bytes, 1 or more, or None"),
        ("slice_delay", None, "seconds, 0 or more"),
        ("stalled", 1, "True or False"),
        ("close_after", -1, "a number of bytes, 0 or more, or None"),
        ("reset_after", 1.0, "a number of bytes, 0 or more, or None"),
        ("slow_close", "1", "seconds, 0 or more"),
    ],
)
async def test_a_wrong_value_is_told_where_it_is_assigned(toxic, value, right):
    direction = Direction("upstream")
    with pytest.raises(ConfigurationError, match=rf"upstream\.{toxic} = .*: give {right}"):
        setattr(direction, toxic, value)
    assert repr(direction) == "<upstream: nothing wrong>"


async def test_a_misspelt_toxic_is_told():
    with pytest.raises(AttributeError, match="upstream has no 'latancy'; it has latency, jitter"):
        Direction("upstream").latancy = 1


async def test_a_direction_prints_what_is_wrong_and_heals():
    direction = Direction("downstream")
    direction.latency, direction.stalled = 0.2, True
    assert repr(direction) == "<downstream: latency=0.2, stalled=True>"
    direction.heal()
    assert repr(direction) == "<downstream: nothing wrong>"


@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({"target": "nowhere"}, "expected host:port"),
        ({"target": "unix:///x"}, "it speaks TCP alone"),
        ({"target": "a:1", "buffer": 0}, "a number of bytes, 1 or more"),
    ],
)
async def test_a_proxy_that_cannot_be_is_told(options, right):
    with pytest.raises(ConfigurationError, match=right):
        FaultProxy(**options)


async def test_it_has_no_address_before_it_is_started():
    proxy = FaultProxy("127.0.0.1:1")
    assert "not started" in repr(proxy)
    with pytest.raises(ServiceClosed, match="has not been started"):
        _ = proxy.address


@given(
    size=st.integers(1, 100_000),
    slice_size=st.none() | st.integers(1, 5000),
    bandwidth=st.none() | st.floats(1, 1e9),
    seed=st.integers(0, 1000),
)
def test_a_piece_is_some_of_the_bytes_and_bandwidth_is_what_the_pauses_make_it(size, slice_size, bandwidth, seed):
    rng = random.Random(seed)
    direction = Direction("upstream")
    direction.slice_size, direction.bandwidth = slice_size, bandwidth
    piece = direction.piece(size, rng)
    assert 1 <= piece <= size
    if slice_size is not None:
        assert piece <= max(1, round(slice_size * 1.5))
    assert direction.pause(piece) == pytest.approx(piece / bandwidth if bandwidth else 0)


@given(st.none() | st.integers(0, 50), st.none() | st.integers(0, 50), st.integers(0, 100))
def test_the_nearer_end_decides_and_a_reset_wins_a_tie(close, reset, passed):
    direction = Direction("upstream")
    direction.close_after, direction.reset_after = close, reset
    left, by_reset = direction.cut(passed)
    ends = [end for end in (close, reset) if end is not None]
    assert left == (max(0, min(ends) - passed) if ends else None)
    assert by_reset == (reset is not None and (close is None or reset <= close))


@given(st.floats(0, 10), st.floats(0, 10), st.integers(0, 1000))
def test_a_latency_stays_within_its_jitter_and_is_never_negative(latency, jitter, seed):
    direction = Direction("upstream")
    direction.latency, direction.jitter = latency, jitter
    rng = random.Random(seed)
    for _ in range(5):
        assert max(0, latency - jitter) - 1e-9 <= direction.under_way(rng) <= latency + jitter + 1e-9
