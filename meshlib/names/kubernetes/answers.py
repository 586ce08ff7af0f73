"""What the API server answers when it does not give what was asked, and how much of an answer is read.

A refusal is a ``Status`` object with a code, a reason and a sentence. What only the user can change (no permission,
no credentials, a request that makes no sense) becomes a `ConfigurationError` that says what to do; for a missing
permission it shows the rule to add. Everything else is a `Refused`, which passes by itself or means "list again".
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import anyio
import httpx
import msgspec

from ...core.errors import ConfigurationError, ResolutionError, shown

__all__ = ["LARGEST_PAGE", "Refused", "Status", "pieces_of", "refusal", "whole"]

LARGEST_PAGE: Final = 128 * 1024 * 1024
"""Bytes of one answer. 10,000 endpoints are about 5 MiB; the API server may ignore the page size it is asked for."""
_LARGEST_STATUS: Final = 64 * 1024
_LONGEST_REST: Final = 60.0
"""Seconds to wait at most, whatever ``Retry-After`` says."""


class _Cause(msgspec.Struct):
    reason: str = ""


class _Details(msgspec.Struct):
    causes: list[_Cause] | None = None


class Status(msgspec.Struct):
    """``Status`` of ``meta/v1``: why not."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: _Details | None = None


class Refused(ResolutionError):
    """The API server did not do it.

    Attributes:
        code: HTTP's status.
        rest: Seconds for which it asked to be left alone; 0 when it did not.
    """

    def __init__(self, message: str, code: int, rest: float = 0.0, *, too_new: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.rest = rest
        self._too_new = too_new

    @property
    def stale(self) -> bool:
        """Is the given resourceVersion none that it can serve: forgotten by now, or (after a restore) unheard of?"""
        return self.code == 410 or self._too_new


async def whole(response: httpx.Response, limit: int = LARGEST_PAGE) -> bytes:
    """The body.

    Raises:
        Refused: It has more than ``limit`` bytes.
        httpx.TransportError: The connection broke.
    """
    parts, size = [], 0
    async with pieces_of(response) as pieces:
        async for part in pieces:
            size += len(part)
            if size > limit:
                raise Refused(f"the answer to {response.request.url} has more than {limit} bytes", response.status_code)
            parts.append(part)
    return b"".join(parts)


@asynccontextmanager
async def pieces_of(response: httpx.Response) -> AsyncGenerator[AsyncIterator[bytes], None]:
    """The body, piece by piece, closed in order however it is left.

    It comes out of half a dozen generators within each other. Who stops half way leaves them to the garbage collector,
    which trio complains of; reading on once it is closed ends them one by one.
    """
    pieces = response.aiter_bytes()
    try:
        yield pieces
    finally:
        with anyio.move_on_after(1.0, shield=True):
            await response.aclose()
            with suppress(Exception):
                async for _ in pieces:
                    pass


async def refusal(response: httpx.Response, verb: str, resource: str, namespace: str) -> Exception:
    """What to raise for an answer that is no 200.

    Args:
        response: The answer; its body is read here.
        verb: What was asked for: ``list``, ``watch``, ``get``.
        resource: Of what, with its group: ``endpointslices.discovery.k8s.io``.
        namespace: Where.
    """
    try:
        body = await whole(response, _LARGEST_STATUS)
        status = msgspec.json.decode(body, type=Status)
    except (msgspec.DecodeError, Refused):
        status = Status()
    rest = response.headers.get("Retry-After", "")
    return of_status(
        status,
        verb,
        resource,
        namespace,
        code=response.status_code,
        rest=min(float(rest), _LONGEST_REST) if rest.isascii() and rest.isdigit() else 0.0,
    )


def of_status(
    status: Status, verb: str, resource: str, namespace: str, *, code: int = 0, rest: float = 0.0
) -> Exception:
    """As `refusal`, for a ``Status`` that came in a watch."""
    code = code or status.code
    said = f": {shown(status.message, 500)}" if status.message else ""
    what = f"the API server answered {code} to {verb} {resource} in namespace {namespace!r}{said}"
    if code == 403:
        return ConfigurationError(f"{what}\n{role(resource, namespace)}")
    if code == 401:
        return ConfigurationError(
            f"{what}\nIt does not accept this process's credentials: are they expired, or for another cluster?"
        )
    if code in (400, 404, 405, 422):
        return ConfigurationError(what)
    causes = (status.details.causes if status.details is not None else None) or []
    too_new = any(cause.reason == "ResourceVersionTooLarge" for cause in causes)
    too_new = too_new or (code == 504 and "Too large resource version" in status.message)
    return Refused(what, code, rest, too_new=too_new)


def role(resource: str, namespace: str) -> str:
    """The Role that would allow it, to bind to the service account that the message names."""
    kind, _, group = resource.partition(".")
    rules = {
        "endpointslices": "get, list, watch",
        "configmaps": "get, list, watch",
        "services": "get",
    }
    return (
        f"Bind a Role with this rule to that user in namespace {namespace!r}:\n"
        f'  - {{apiGroups: ["{group}"], resources: ["{kind}"], verbs: [{rules.get(kind, "get")}]}}'
    )
