"""How values become bytes: MessagePack between meshlib's own peers, JSON where a browser or another language may call.

msgspec has both, with the same checks against the same types. What JSON has no form for travels as text there: bytes in
base64, dates and UUIDs in their usual spellings; NaN and infinities have none at all, and become ``null``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

__all__ = ["JSON", "MSGPACK", "Format"]


@dataclass(frozen=True, slots=True)
class Format:
    """One of them.

    Attributes:
        name: What it is called in errors.
        encode: From a value to bytes.
        decoder: What decodes bytes as a type, made once for each type.
    """

    name: str
    encode: Callable[[Any], bytes]
    decoder: Callable[[Any], Any]


MSGPACK: Final = Format("MessagePack", msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder)
JSON: Final = Format("JSON", msgspec.json.Encoder().encode, msgspec.json.Decoder)
