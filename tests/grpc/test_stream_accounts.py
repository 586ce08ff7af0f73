"""What is made of a stream's end: by the golden metrics, by the breaker, and by the span of the call."""

import asyncio

import anyio
import pytest
from grpclib.client import StreamUnaryMethod, UnaryStreamMethod
from grpclib.exceptions import GRPCError

from meshlib.telemetry import tracing

from .scripted import HEAD, OK, answering, channel, message, scripted


def begin(peer, stream):
    """The first message of an answer."""
    peer.headers(stream, HEAD)
    peer.h2.send_data(stream, message(b"one"))
    peer.flush()


def fails(status, said="broken"):
    """All of an answer that begins well, at once."""
    return lambda peer, stream: peer.answer(stream, b"one", [("grpc-status", status), ("grpc-message", said)])


def down(each):
    return UnaryStreamMethod(each, "/x.Y/S", bytes, bytes)


def numbers(each, *names):
    found = each.metrics()
    (address,) = [str(node.address) for node in each.endpoints]
    return [(found[name], found[f"endpoints/{address}/{name}"]) for name in names]


COUNTED = ("requests", "success", "failures")


async def test_a_stream_that_fails_at_once_after_its_beginning_is_a_failure():
    async with scripted(answering(fails("14"))) as (address, _), channel(address) as each:
        for _ in range(5):
            with pytest.raises(GRPCError):
                await down(each)(b"q")
        assert numbers(each, *COUNTED, "failures/RemoteError") == [(5, 5), (0, 0), (5, 5), (5, 5)]
        assert each.metrics()["failure_accrual/removals"] == 1


async def test_a_stream_is_a_success_or_a_failure_when_it_ends():
    async with scripted(answering(begin)) as (address, peers), channel(address) as each:
        for n in range(6):
            async with down(each).open() as stream:
                await stream.send_message(b"q", end=True)
                assert await stream.recv_message() == b"one"
                assert numbers(each, *COUNTED) == [(n + 1, n + 1), (min(n, 1), min(n, 1)), (max(0, n - 1),) * 2]
                assert each.metrics()["request_latency_ms.count"] == n + 1
                ends = OK if n == 0 else [("grpc-status", "14")]
                peers[0].headers(2 * n + 1, ends, end=True)
                with anyio.fail_after(10):
                    if n == 0:
                        assert await stream.recv_message() is None
                        continue
                    with pytest.raises(GRPCError):
                        await stream.recv_trailing_metadata()
                await stream.cancel()
        assert numbers(each, *COUNTED) == [(6, 6), (1, 1), (5, 5)]
        assert each.metrics()["failure_accrual/removals"] == 1


async def test_what_a_caller_wants_no_more_or_an_application_answers_is_no_failure():
    async with scripted(answering(fails("5"))) as (address, _), channel(address) as each:
        with pytest.raises(GRPCError):
            await down(each)(b"q")
        assert numbers(each, *COUNTED) == [(1, 1), (1, 1), (0, 0)]
    async with scripted(answering(begin)) as (address, _), channel(address) as each:
        with anyio.move_on_after(0.4):
            await down(each)(b"q")
        assert numbers(each, *COUNTED) == [(1, 1), (1, 1), (0, 0)]


async def test_a_lost_connection_is_one_failure_in_the_run_however_many_streams_were_on_it():
    async def script(peer):
        for n in range(1, 5):
            begin(peer, await peer.request(n))
        await peer.until(lambda: gone)
        peer.writer.transport.abort()

    gone: list[int] = []
    async with scripted(script) as (address, _), channel(address) as each:

        async def one():
            async with StreamUnaryMethod(each, "/x.Y/S", bytes, bytes).open() as stream:
                await stream.send_message(b"q")
                await stream.recv_message()
                begun.append(1)
                if len(begun) == 4:
                    gone.append(1)
                    await stream.send_message(b"r")
                with pytest.raises(GRPCError):
                    await stream.recv_message()
                await stream.cancel()

        begun: list[int] = []
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(one)
        assert numbers(each, *COUNTED, "failures/ConnectionLost") == [(4, 4), (0, 0), (4, 4), (4, 4)]
        assert each.metrics()["failure_accrual/removals"] == 0


# --- spans ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spans(monkeypatch):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_get_provider", lambda: provider)
    return exporter.get_finished_spans


def facts(span):
    return (
        span.status.status_code.name,
        span.attributes["rpc.status_code"],
        span.attributes.get("error.type"),
    )


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("0", ("UNSET", "OK", None)),
        ("5", ("ERROR", "NOT_FOUND", "RemoteError")),
        ("14", ("ERROR", "UNAVAILABLE", "RemoteError")),
        ("8", ("ERROR", "RESOURCE_EXHAUSTED", "Exhausted")),
        ("4", ("ERROR", "DEADLINE_EXCEEDED", "DeadlineExceeded")),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_the_span_of_a_stream_has_the_status_that_it_ended_with(spans, status, told, at_once):
    step = fails(status) if at_once else begin
    async with scripted(answering(step)) as (address, peers), channel(address) as each, down(each).open() as stream:
        await stream.send_message(b"q", end=True)
        assert await stream.recv_message() == b"one"
        if not at_once:
            assert not spans()
            peers[0].headers(1, [("grpc-status", status), ("grpc-message", "broken")], end=True)
        with anyio.fail_after(10):
            if status == "0":
                assert await stream.recv_message() is None
            else:
                with pytest.raises(GRPCError):
                    await stream.recv_trailing_metadata()
                await stream.cancel()
    (span,) = spans()
    assert facts(span) == told
    assert ("broken" in (span.status.description or "")) == (status != "0")


async def test_the_span_of_a_stream_that_was_given_up_or_ran_out_of_time_says_so(spans):
    async with scripted(answering(begin)) as (address, _), channel(address) as each:
        with anyio.move_on_after(0.4):
            await down(each)(b"q")
        with pytest.raises(GRPCError):
            await down(each)(b"q", timeout=0.4)
    cancelled, late = spans()
    assert facts(cancelled) == ("ERROR", "CANCELLED", "RemoteError")
    assert facts(late) == ("ERROR", "DEADLINE_EXCEEDED", "DeadlineExceeded")


async def test_the_span_of_a_stream_whose_connection_broke_has_a_status(spans):
    async def script(peer):
        begin(peer, await peer.request())
        await asyncio.sleep(0.02)
        peer.writer.transport.abort()

    async with scripted(script) as (address, _), channel(address) as each:
        with pytest.raises(GRPCError):
            await down(each)(b"q", timeout=5)
    (span,) = spans()
    assert facts(span) == ("ERROR", "UNAVAILABLE", "ConnectionLost")
