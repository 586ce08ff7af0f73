"""What the stack adds below an httpx client: names, retries, breakers, load, a pool that nothing leaks from."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections import Counter
from typing import Any

import anyio
import httpx
import httpx2
import pytest

import meshlib
from meshlib import http, retry, timeout
from meshlib.core.errors import ConfigurationError
from meshlib.http.status import judged, retry_after

from .servers import application, read_body, serving


class Scripted:
    """Answers with what it is told, in turn, and the last one for ever."""

    def __init__(self, *answers: tuple[int, dict[str, str]]) -> None:
        self.answers = list(answers) or [(200, {})]
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = await read_body(receive)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append((scope["method"], scope["path"], headers, body))
        status, more = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        given = [(name.encode(), value.encode()) for name, value in more.items()]
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2"), *given]})
        await send({"type": "http.response.body", "body": b"ok"})


def client_of(*args: Any, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=http.Transport(*args, **options), base_url="http://users")


def only(client: httpx.AsyncClient) -> Any:
    [one] = client._transport.clients  # type: ignore[attr-defined]
    return one


# --- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_what_may_pass_is_tried_again_if_that_is_safe(status):
    for method, headers, tries in (
        ("GET", {}, 2),
        ("PUT", {}, 2),
        ("POST", {}, 1),
        ("POST", {"Idempotency-Key": "1"}, 2),
        ("PATCH", {}, 1),
    ):
        app = Scripted((status, {}), (200, {}))
        with serving(app) as url:
            async with client_of(url[7:]) as client:
                reply = await client.request(method, "/", headers=headers, content=b"body")
        assert len(app.requests) == tries, method
        assert reply.status_code == (200 if tries == 2 else status)
        assert {body for *_, body in app.requests} == {b"body"}


@pytest.mark.parametrize("status", [400, 404, 429, 501])
async def test_what_would_not_help_is_not_tried_again(status):
    app = Scripted((status, {}), (200, {}))
    with serving(app) as url:
        async with client_of(url[7:]) as client:
            assert (await client.get("/")).status_code == status
            assert only(client).metrics()["failures"] == (status >= 429)
    assert len(app.requests) == 1


@pytest.mark.parametrize(
    ("status", "headers"),
    [(503, {"finagle-http-nack": "true"}), (503, {"retry-after": "0"})],
)
async def test_what_was_never_processed_goes_out_again_whatever_it_is(status, headers):
    app = Scripted((status, headers), (200, {}))
    with serving(app) as url:
        async with client_of(url[7:]) as client:
            assert (await client.post("/", content=b"x")).status_code == 200
            assert only(client).metrics()["retries/requeues"] == 1


async def test_a_refusal_that_is_final_is_obeyed():
    app = Scripted((503, {"finagle-http-nonretryable-nack": "true"}), (200, {}))
    with serving(app) as url:
        async with client_of(url[7:]) as client:
            assert (await client.get("/")).status_code == 503
    assert len(app.requests) == 1


async def test_a_429_that_says_when_is_tried_again_then():
    app = Scripted((429, {"retry-after": "1"}), (200, {}))
    with serving(app) as url:
        async with client_of(url[7:]) as client:
            before = anyio.current_time()
            assert (await client.get("/")).status_code == 200
            assert anyio.current_time() - before > 0.95
            with meshlib.deadline(0.5):
                app.answers = [(429, {"retry-after": "1"})]
                assert (await client.get("/")).status_code == 429


async def test_the_last_answer_is_given_when_tries_run_out():
    app = Scripted((503, {"x-answer": "last"}))
    with serving(app) as url:
        async with client_of(url[7:], retry(attempts=2)) as client:
            reply = await client.get("/")
    assert (reply.status_code, reply.headers["x-answer"], reply.text) == (503, "last", "ok")
    assert len(app.requests) == 2
    assert "2 attempts" in reply.extensions["meshlib"]["verdict"]


async def test_a_body_that_can_be_read_once_is_sent_once():
    async def parts():
        yield b"once"

    app = Scripted((503, {"finagle-http-nack": "true"}), (200, {}))
    with serving(app) as url:
        async with client_of(url[7:]) as client:
            assert (await client.put("/", content=parts())).status_code == 503
    assert [body for *_, body in app.requests] == [b"once"]


async def test_a_connection_that_the_server_closed_meanwhile_is_not_used():
    with serving(application, timeout_keep_alive=0.05) as url:
        async with client_of(url[7:]) as client:
            for _ in range(3):
                assert (await client.post("/status/200")).status_code == 200
                await anyio.sleep(0.2)
            assert only(client).metrics()["pool/connects"] == 3


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"3", 3.0), (b" 7 ", 7.0), (b"99999999", 3600.0), (b"Thu, 01 Jan 1970 00:01:00 GMT", 50.0),
        (b"Wed, 31 Dec 1969 00:00:00 GMT", 0.0), (b"-1", None), (b"soon", None), (b"1e9", None), (b"", None),
        ("٣".encode(), None), (b"9" * 65, None), (None, None), (b"Thu, 99 Jan 1970 00:01:00 GMT", None),
    ],
)  # fmt: skip
def test_retry_after(value, seconds):
    assert retry_after(value, 10.0) == seconds


def test_what_statuses_mean():
    assert judged(200, [], 0) is judged(499, [], 0) is None
    for status, retryable, processed in ((500, True, True), (502, True, None), (503, True, None), (599, False, True)):
        error = judged(status, [], 0)
        assert error is not None
        assert (error.retryable, error.processed, error.requeueable) == (retryable, processed, False)
    nack = judged(503, [(b"Finagle-HTTP-Nack", b"true")], 0)
    assert nack is not None
    assert nack.requeueable


# --- endpoints --------------------------------------------------------------------------------------------------------


async def test_one_bad_endpoint_of_three_is_not_noticed():
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(serving(app)) for app in (application, application, Scripted((500, {})))]
        target = ",".join(url[7:] for url in urls)
        failing = Counter[int]()
        async with client_of(target, seed=1) as client:
            for _ in range(100):
                failing[(await client.get("/status/200")).status_code] += 1
            assert failing[500] <= 6


async def test_endpoints_that_refuse_hang_or_hang_up_are_left_alone():
    refusing = socket.socket()
    refusing.bind(("127.0.0.1", 0))
    hanging = socket.create_server(("127.0.0.1", 0))
    with serving(application) as url, refusing, hanging:
        hosts = [url[7:], *(f"127.0.0.1:{each.getsockname()[1]}" for each in (refusing, hanging))]
        async with client_of(",".join(hosts), timeout(attempt=0.2), seed=1) as client:
            for _ in range(60):
                assert (await client.get("/status/200")).status_code == 200


async def test_a_body_counts_as_load_until_it_is_closed_and_its_failure_is_seen():
    with serving(application) as url:
        async with client_of(url[7:], meshlib.failure_accrual(failures=2)) as client:
            async with client.stream("GET", "/stream?n=2&s=0.05") as reply:
                [node] = only(client).endpoints
                assert node.load == 1
                await reply.aread()
            assert node.load == 0
            for _ in range(2):
                with pytest.raises(httpx.RemoteProtocolError) as caught:
                    await client.get("/break")
                assert isinstance(caught.value, meshlib.ConnectionLost)
                assert node.load == 0
            assert "accrual" in node.health.reason
            assert only(client).metrics()["pool/body_failures"] == 2


async def test_a_small_body_that_breaks_off_is_asked_for_again():
    class Breaking(Scripted):
        async def __call__(self, scope, receive, send):
            if not self.requests:
                self.requests.append(("GET", "/", {}, b""))
                length = [(b"content-length", b"10")]
                await send({"type": "http.response.start", "status": 200, "headers": length})
                await send({"type": "http.response.body", "body": b"half", "more_body": True})
                raise RuntimeError("in the middle of it")
            await super().__call__(scope, receive, send)

    app = Breaking()
    with serving(app) as url:
        async with client_of(url[7:]) as client:
            assert (await client.get("/")).text == "ok"
    assert len(app.requests) == 2


# --- errors, and the deadline -----------------------------------------------------------------------------------------


async def test_errors_are_theirs_and_ours_at_once():
    async with client_of("127.0.0.1:1", timeout(total=0.5)) as client:
        with pytest.raises(httpx.TransportError) as caught:
            await client.get("/x")
    assert isinstance(caught.value, meshlib.MeshError)
    assert "127.0.0.1:1" in str(caught.value)
    assert str(caught.value.request.url) == "http://users/x"


@pytest.mark.parametrize(("module", "backend"), [(httpx, "asyncio"), (httpx2, "trio")])
def test_a_refused_connect_is_a_connect_error(module, backend):
    kind = http.Transport if module is httpx else http.Httpx2Transport

    async def main():
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            async with module.AsyncClient(transport=kind()) as client:
                with pytest.raises(module.ConnectError) as caught:
                    await client.get(
                        f"http://127.0.0.1:{nobody.getsockname()[1]}/", timeout=module.Timeout(5, connect=0.5)
                    )
        return caught

    caught = anyio.run(main, backend=backend)
    assert isinstance(caught.value, meshlib.NoEndpoints | meshlib.ConnectError)
    assert "refused" in str(caught.value)


async def test_a_deadline_ends_the_call_and_the_reading_of_its_body():
    with serving(application) as url:
        async with client_of(url[7:]) as client:
            with meshlib.deadline(0.2), pytest.raises(httpx.TimeoutException) as caught:
                await client.get("/slow?s=9")
            assert isinstance(caught.value, meshlib.DeadlineExceeded)
            with meshlib.deadline(0.3):
                async with client.stream("GET", "/stream?n=99&s=0.05") as reply:
                    with pytest.raises(httpx.TimeoutException):
                        await reply.aread()
            [node] = only(client).endpoints
            assert node.load == 0


async def test_the_context_travels():
    app = Scripted()
    with serving(app) as url:
        async with client_of(url[7:]) as client:
            with meshlib.deadline(20), meshlib.dtab("/s/x => /s/y"):
                await client.get("/", headers={"baggage": "mine=1"})
        async with client_of(url[7:], propagate=False) as client, contextlib.AsyncExitStack():
            await client.get("/")
    headers = app.requests[0][2]
    assert len(headers["traceparent"]) == 55
    assert headers["dtab-local"] == "/s/x=>/s/y" or "/s/x" in headers["dtab-local"]
    sent, due = map(int, headers["finagle-ctx-com.twitter.finagle.deadline"].split())
    assert 15e9 < due - sent <= 20e9
    assert headers["baggage"] == "mine=1"
    assert "traceparent" not in app.requests[1][2]


# --- names ------------------------------------------------------------------------------------------------------------


async def test_hosts_are_names_and_dtabs_say_what_they_mean():
    with serving(Scripted((200, {"x-who": "dns"}))) as one, serving(Scripted((200, {"x-who": "dtab"}))) as two:
        port = one.rpartition(":")[2]
        base = meshlib.base_dtab(f"/s/users => {two[7:]}")
        async with httpx.AsyncClient(transport=http.Transport(base)) as client:
            assert (await client.get(f"http://localhost:{port}/")).headers["x-who"] == "dns"
            assert (await client.get(f"{one}/")).headers["x-who"] == "dns"
            assert (await client.get("http://users/")).headers["x-who"] == "dtab"
            with meshlib.dtab(f"/s/localhost => {two[7:]}"):
                assert (await client.get(f"http://localhost:{port}/")).headers["x-who"] == "dtab"
            assert (await client.get(f"http://localhost:{port}/")).headers["x-who"] == "dns"
            names = {each.env.name for each in client._transport.clients}  # type: ignore[attr-defined]
            assert names == {f"dns://localhost:{port}", one[7:], "/s/users", "/s/localhost"}


def test_what_makes_no_sense_is_told_at_once():
    for make, words in (
        (lambda: http.Transport("nonsense://"), "nonsense"),
        (lambda: http.Transport("a:1", 7), "is not a layer"),
        (lambda: http.Transport(proxy="http://p:1"), "mounts"),
        (lambda: http.Transport(retries=3), "no such option"),
        (lambda: http.Transport(7), "give a target"),
        (lambda: http.connections(most=0), "1 or more"),
        (lambda: http.connections(idle=-1), "seconds"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            make()


async def test_requests_of_the_other_httpx_are_refused():
    async with http.client("127.0.0.1:1") as client:
        with pytest.raises(ConfigurationError, match="Httpx2Transport"):
            await client(httpx2.Request("GET", "http://users/"))


# --- the service form, and filters ------------------------------------------------------------------------------------


async def test_as_a_service_with_filters():
    @meshlib.filter
    async def signed(request, service):
        request.headers["x-signed"] = "yes"
        reply = await service(request)
        reply.headers["x-seen"] = str(reply.status_code)
        return reply

    app = Scripted((503, {}), (200, {}))
    with serving(app) as url:
        async with http.client(url[7:], signed) as client:
            reply = await client(httpx.Request("GET", "http://users/x"))
            assert (reply.text, reply.headers["x-seen"]) == ("ok", "200")
            assert client.metrics()["requests"] == 1
    assert [headers["x-signed"] for _, _, headers, _ in app.requests] == ["yes", "yes"]


# --- the pool ---------------------------------------------------------------------------------------------------------


async def test_a_full_pool_lets_requests_wait_in_line():
    with serving(application) as url:
        async with client_of(url[7:], http.connections(most=2)) as client:
            async with anyio.create_task_group() as group:
                for _ in range(10):
                    group.start_soon(client.get, "/slow?s=0.01")
            assert only(client).metrics()["pool/connects"] == 2
            async with client.stream("GET", "/stream?n=9&s=1"), client.stream("GET", "/stream?n=9&s=1"):
                with pytest.raises(httpx.PoolTimeout, match="at most 2 connections") as caught:
                    await client.post("/echo", timeout=httpx.Timeout(5, pool=0.1))
                assert len(caught.value.attempts) == 1
            assert (await client.get("/status/200")).status_code == 200


async def test_connections_that_are_not_needed_are_closed():
    with serving(application) as url:
        async with client_of(url[7:], http.connections(idle=0.1)) as client:
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(client.get, "/slow?s=0.05")
            pool = pool_of(client)
            with anyio.fail_after(5):
                while pool._all or pool._doomed:  # noqa: ASYNC110 - it tells nobody
                    await anyio.sleep(0.02)
            assert (await client.get("/status/200")).status_code == 200


def pool_of(client: Any) -> Any:
    [node] = only(client).endpoints
    return next(closer.__self__ for closer in node._env.closers if "WatermarkPool" in repr(type(closer.__self__)))


# --- TLS --------------------------------------------------------------------------------------------------------------


async def test_certificates_are_checked_against_the_name_that_was_asked_for(certificate):
    context = ssl.create_default_context(cafile=certificate[0])
    with serving(application, ssl_certfile=certificate[0], ssl_keyfile=certificate[1]) as url:
        port = url.rpartition(":")[2]
        async with httpx.AsyncClient(transport=http.Transport(f"127.0.0.1:{port}", verify=context)) as client:
            assert (await client.get("https://users.test/status/200")).status_code == 200
            with meshlib.deadline(0.5), pytest.raises(httpx.TransportError, match="certificate is not valid"):
                await client.get("https://elsewhere.test/status/200")
            reply = await client.get("https://elsewhere.test/status/200", extensions={"sni_hostname": "users.test"})
            assert reply.status_code == 200


# httpcore and httpx leave the generators between theirs unclosed, of which trio warns; they await nothing at their end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_body_that_is_read_in_part_leaves_no_generator_for_the_garbage_collector():
    """One that trio ends in whatever task is current can leave a shielded scope open there."""
    with serving(application) as url:
        async with client_of(url[7:]) as client:
            async with client.stream("GET", "/large?n=1000000") as reply:
                body = reply.stream
                while hasattr(body, "_stream"):  # httpx's own wrapper, which counts the time
                    body = body._stream
                async with contextlib.aclosing(reply.aiter_raw()) as parts:
                    await anext(parts)
                chunks = body._chunks
            assert chunks.ag_frame is None
            assert (await client.get("/status/200")).status_code == 200
