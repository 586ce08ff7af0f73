"""What a caller may learn of a handler's failure, and what only the server's log may."""

import logging

import pytest

import meshlib
from meshlib.core.clock import Clock
from meshlib.core.context import Context, TraceId, use
from meshlib.core.env import Env
from meshlib.core.service import Filter
from meshlib.filters.mapping import ErrorMapping
from meshlib.mux import Request, Response

DECLARED = [
    meshlib.Rejected("not now"),
    meshlib.InvalidArgument("negative", path="count"),
    meshlib.UnknownMethod("no such method"),
    meshlib.UnknownService("no such service"),
    meshlib.DeadlineExceeded("took too long"),
    meshlib.RemoteError("sold out"),
]
OTHERS = [
    ValueError("secret"),
    KeyError("secret"),
    TimeoutError("secret"),
    ConnectionError("secret"),
    meshlib.ConnectError("secret"),
    meshlib.ConnectionLost("secret"),
    meshlib.NoEndpoints("secret"),
    meshlib.ServiceClosed("secret"),
    meshlib.ConfigurationError("secret"),
    meshlib.InvalidReply("secret"),
    meshlib.ProtocolError("secret"),
]


BUY = Request(dest="/shop/buy")


async def outcome_of(error, request=BUY, now=0.0):
    async def handler(request):
        raise error

    env = Env(kind="server", label="shop", clock=Clock(now=lambda: now))
    with pytest.raises(meshlib.MeshError) as caught:
        await ErrorMapping().build(env, handler)(request)
    return caught.value


async def test_a_reply_passes():
    async def handler(request):
        return "fine"

    assert await (ErrorMapping() >> handler)("x") == "fine"


@pytest.mark.parametrize("error", DECLARED, ids=lambda error: type(error).__name__)
async def test_what_a_handler_meant_to_say_passes_as_it_is(error, caplog):
    assert await outcome_of(error) is error
    assert not caplog.records


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
async def test_everything_else_is_opaque_and_the_log_has_the_story(error, caplog):
    opaque = await outcome_of(error)
    assert type(opaque) is meshlib.RemoteError
    assert str(opaque) == "internal error"
    assert opaque.__cause__ is error
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("meshlib.server", logging.ERROR)
    assert record.getMessage() == "shop: the handler of /shop/buy failed"
    assert record.exc_info[1] is error
    assert "in handler" in caplog.text
    assert "secret" in caplog.text


async def test_caller_and_log_share_the_trace_id(caplog):
    with use(Context(trace=TraceId(0xABC, 1))):
        opaque = await outcome_of(ValueError("secret"), "x")
    assert str(opaque) == f"internal error (trace {0xABC:032x})"
    assert caplog.records[0].getMessage() == f"shop: the handler of a request failed (trace {0xABC:032x})"


@pytest.mark.parametrize("signed", [{"label": "back"}, {"endpoint": "h:1"}], ids=str)
@pytest.mark.parametrize("error", DECLARED, ids=lambda error: type(error).__name__)
async def test_what_a_client_that_the_handler_called_has_raised_is_no_word_of_the_handlers(error, signed):
    theirs = type(error)("of another call")
    vars(theirs).update(signed)
    opaque = await outcome_of(theirs)
    assert type(opaque) is meshlib.RemoteError
    assert not opaque.requeueable
    assert "another call" not in str(opaque)


async def test_a_path_that_is_meant_to_forge_a_log_line_does_not(caplog):
    await outcome_of(ValueError("x"), Request(dest="/a\nERROR all is lost" + "x" * 1000))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "\n" not in message
    assert len(message) < 300


async def test_a_nested_deadline_is_told_as_one_when_it_is_the_requests_own():
    theirs = meshlib.DeadlineExceeded("no reply from the back")
    theirs.label = "back"
    with use(Context(deadline=5.0)):
        assert type(await outcome_of(theirs, now=4.0)) is meshlib.RemoteError
        late = await outcome_of(theirs, now=5.0)
    assert type(late) is meshlib.DeadlineExceeded
    assert late.processed is True
    assert late.label == ""


async def test_a_budget_that_ran_dry_below_is_final_for_those_above():
    theirs = meshlib.Rejected("full")
    theirs.label = "back"
    theirs.finalize("the retry budget is spent")
    opaque = await outcome_of(theirs)
    assert (opaque.retryable, opaque.verdict) == (False, "the retry budget is spent")
    assert "retryable" in vars(opaque)
    assert "retryable" not in vars(await outcome_of(ValueError("x")))


async def test_a_cancellation_passes():
    class Cancelled(BaseException):
        pass

    async def handler(request):
        raise Cancelled

    with pytest.raises(Cancelled):
        await (ErrorMapping() >> handler)("x")


@pytest.mark.parametrize("raised", [meshlib.Rejected("full"), meshlib.InvalidArgument("bad"), ValueError("secret")])
async def test_across_two_servers_the_first_never_speaks_with_the_voice_of_the_second(raised):
    calls = []

    async def back(request):
        raise raised

    async def front(request):
        calls.append(request)
        return await onward(Request())

    async with (
        meshlib.mux.serve(back) as end,
        meshlib.mux.serve(front) as begin,
        meshlib.mux.client(end.address, stack=lambda stack: stack.remove("requeue")) as onward,
        meshlib.mux.client(begin.address) as caller,
    ):
        with pytest.raises(meshlib.RemoteError, match="internal error") as caught:
            await caller(Request())
    assert len(calls) == 1
    assert not caught.value.requeueable
    assert "secret" not in str(caught.value)


async def test_the_failure_of_a_users_filter_above_the_handler_is_mapped_too():
    class Broken(Filter):
        async def apply(self, request, service):
            raise KeyError("secret")

    async def handler(request):
        return Response()

    async with (
        meshlib.mux.serve(handler, "127.0.0.1:0", Broken()) as server,
        meshlib.mux.client(server.address) as client,
    ):
        with pytest.raises(meshlib.RemoteError, match="internal error") as caught:
            await client(Request())
    assert "secret" not in str(caught.value)


def test_it_prints():
    assert repr(ErrorMapping()) == "errors(opaque)"
