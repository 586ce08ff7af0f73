"""What the layers below must know of a request, as attributes of it: may it be sent again, and how patient is it?

They are noted above the filters and once more below them, as a filter may change the request, or pass on another. What
a filter has said itself of ``idempotent`` stays.
"""

from __future__ import annotations

from typing import Any, Final

from .core import Core

__all__ = ["IDEMPOTENT", "note"]

IDEMPOTENT: Final = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"))
"""RFC 9110 9.2.2."""
_OURS: Final = "meshlib_idempotent"


def note(request: Any, core: Core) -> None:
    """Note them."""
    noted = vars(request)
    replayable, concurrent = _replays(request.stream, core)
    noted["replayable"], noted["concurrent"] = replayable, concurrent
    if noted.get("idempotent") is noted.get(_OURS):  # else somebody knows better
        idempotent = replayable and (request.method in IDEMPOTENT or "idempotency-key" in request.headers)
        noted["idempotent"] = noted[_OURS] = idempotent
    noted["dest"] = request.method
    noted["patience"] = request.extensions.get("timeout", {}).get("connect")


def _replays(stream: Any, core: Core) -> tuple[bool, bool]:
    """Can a body be sent again, and can it be sent twice at once? Two that read one file would each get a part."""
    if isinstance(stream, core.httpx.ByteStream):
        return True, True
    fields = getattr(stream, "fields", None)  # of a multipart form
    if fields is None:
        return False, False
    files = [file for field in fields if not isinstance(file := getattr(field, "file", b""), str | bytes)]
    return all(map(_seekable, files)), not files


def _seekable(file: Any) -> bool:
    try:
        return bool(file.seekable())
    except (AttributeError, ValueError):
        return False
