# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""Filters and services, as type checkers see them. Read by mypy and pyright, never run."""

from typing import Any, assert_type

import meshlib
from meshlib import Filter, Service, concurrency_limit, mux, retry, timeout


@meshlib.filter
async def parsed(request: str, service: Service[int, float]) -> bytes:
    return str(await service(int(request))).encode()


class Rounded(Filter[int, float, int, int]):
    async def apply(self, request: int, service: Service[int, int]) -> float:
        return await service(request) / 2


async def handler(request: int) -> int:
    return request


async def halves(request: int) -> float:
    return request / 2


async def of_text(request: str) -> str:
    return request


class Handler:
    async def __call__(self, request: int) -> int:
        return request


async def a_filter_has_four_types() -> None:
    assert_type(parsed, Filter[str, bytes, int, float])
    assert_type(parsed >> halves, Service[str, bytes])
    assert_type(await (parsed >> halves)("5"), bytes)
    assert_type(parsed >> Rounded(), Filter[str, bytes, int, int])
    assert_type(parsed >> Rounded() >> handler, Service[str, bytes])
    assert_type(parsed >> (Rounded() >> handler), Service[str, bytes])
    assert_type(parsed.and_then(Rounded()).and_then(Handler()), Service[str, bytes])
    assert_type(parsed >> Rounded() >> Handler(), Service[str, bytes])
    assert_type(parsed >> handler, Service[str, bytes])  # an int will do where a float is wanted


def what_does_not_fit_is_rejected() -> None:
    parsed >> of_text  # type: ignore[operator]
    Rounded() >> parsed  # type: ignore[operator]
    Rounded() >> halves  # type: ignore[operator]
    parsed >> 5  # type: ignore[operator]
    handler >> parsed  # type: ignore[operator]


def a_filter_of_the_house_takes_any_service() -> None:
    assert_type(timeout(1.0), Filter[Any, Any, Any, Any])
    assert_type(timeout(1.0) >> handler, Service[Any, Any])
    assert_type(retry() >> handler, Service[Any, Any])
    assert_type(concurrency_limit(5) >> handler, Service[Any, Any])
    assert_type(parsed >> timeout(1.0), Filter[str, bytes, Any, Any])
    assert_type(parsed >> timeout(1.0) >> halves, Service[str, bytes])


async def decorated_functions_keep_their_signatures() -> None:
    @timeout(0.5)
    @retry(on=OSError)
    async def fetch(path: str, *, fresh: bool = False) -> bytes:
        return path.encode() if fresh else b""

    assert_type(await fetch("/x", fresh=True), bytes)
    await fetch(5)  # type: ignore[arg-type]
    await fetch("/x", stale=True)  # type: ignore[call-arg]


async def raw_clients_and_servers_speak_requests_and_responses() -> None:
    async def echo(request: mux.Request) -> mux.Response:
        return mux.Response(request.body)

    async with mux.serve(echo) as server, mux.client(server.address, timeout(1.0)) as client:
        assert_type(await client(mux.Request(b"x")), mux.Response)
        await client(b"x")  # type: ignore[arg-type]
    mux.serve(handler)  # type: ignore[arg-type]
