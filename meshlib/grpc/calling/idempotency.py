"""Which methods may be called twice without harm: what their protobuf says, unless the user says otherwise.

``option idempotency_level = NO_SIDE_EFFECTS;`` or ``IDEMPOTENT`` in a ``.proto`` is found through the messages' own
descriptors, or protobuf's default pool. What nobody has said anything of is not idempotent.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterable
from typing import Any

from ...core.errors import ConfigurationError

__all__ = ["Idempotency", "declared"]


def declared(path: str, request_type: Any = None) -> bool:
    """Does the protobuf of ``/pkg.Service/Method`` declare it idempotent? ``False`` where nothing is known of it."""
    name = path.strip("/").replace("/", ".")
    for pool in _pools(request_type):
        try:
            options = pool.FindMethodByName(name).GetOptions()
        except (KeyError, AttributeError, TypeError, ValueError):
            continue
        return bool(getattr(options, "idempotency_level", 0))
    return False


def _pools(request_type: Any) -> Iterable[Any]:
    descriptor = getattr(request_type, "DESCRIPTOR", None)
    pool = getattr(getattr(descriptor, "file", None), "pool", None)
    if pool is not None:
        yield pool
    try:
        found: Any = importlib.import_module("google.protobuf.descriptor_pool")
    except ImportError:  # a codec of another kind needs none
        return
    yield found.Default()


class Idempotency:
    """Tells of each method.

    Args:
        word: What the user says: ``True`` or ``False`` for all methods; patterns of paths, such as
            ``"shop.Users/Get*"`` or ``"*/Get*"``, of those that are besides what protobuf declares; a function of the
            path (``"/shop.Users/Get"``), whose ``None`` leaves it to protobuf; ``None`` for protobuf alone.

    Raises:
        ConfigurationError: It is none of these.
    """

    def __init__(self, word: bool | str | Iterable[str] | Callable[[str], bool | None] | None = None) -> None:
        self._function: Callable[[str], bool | None] | None = None
        self._patterns: tuple[str, ...] = ()
        if word is None:
            return
        if isinstance(word, bool):
            self._function = lambda path: word
        elif callable(word):
            self._function = word
        else:
            patterns = (word,) if isinstance(word, str) else tuple(word) if isinstance(word, Iterable) else (word,)
            for pattern in patterns:
                if not isinstance(pattern, str) or "/" not in pattern.lstrip("/"):
                    raise ConfigurationError(
                        f"idempotent={word!r}: give True, False, patterns such as 'shop.Users/Get*', or a function"
                    )
            self._patterns = tuple(pattern.lstrip("/") for pattern in patterns)

    def __call__(self, path: str, request_type: Any = None) -> bool:
        """May a call of that path be made twice?"""
        if self._function is not None:
            said = self._function(path)
            if said is not None:
                return bool(said)
        name = path.lstrip("/")
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns):
            return True
        return declared(path, request_type)
