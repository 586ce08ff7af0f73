"""``k8s://namespace/configmap:key``: the text under a key of a ConfigMap, followed. What a base Dtab is kept in.

A ConfigMap or key that is not there yet is waited for, with a warning; one that is deleted leaves the last text in
force. Whoever wants an empty text writes one.

Permissions needed: ``list`` and ``watch`` on configmaps, which may be restricted to that name.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Final

import msgspec

from ...core.errors import ConfigurationError
from ..target import Target
from .config import Access, find
from .place import Place
from .watching import IDLE, Changed, Collection, Follower, Gone, Listed, Trouble

__all__ = ["ConfigMapTexts"]

logger = logging.getLogger("meshlib.names")

LARGEST: Final = 1024 * 1024
"""Characters of a text: Kubernetes' own limit for a whole ConfigMap."""


class _Meta(msgspec.Struct):
    name: str = ""


class ConfigMap(msgspec.Struct):
    """``ConfigMap`` of ``v1``."""

    metadata: _Meta
    data: dict[str, str] | None = None


class ConfigMapTexts:
    """Follows the text in a ConfigMap.

    Args:
        access: The API server; by default it is found anew for each watch.
        rng: Chance, for jitter.
        idle: Seconds of silence from the API server that are believed.
    """

    def __init__(self, access: Access | None = None, *, rng: random.Random | None = None, idle: float = IDLE) -> None:
        self._access = access
        self._rng = rng or random.Random()
        self._idle = idle

    def check(self, target: Target) -> None:
        """Is the target well formed?

        Raises:
            ConfigurationError: It is not; says what would be right.
        """
        Place.config_map(target)

    async def texts(self, target: Target) -> AsyncIterator[str]:
        """Yields the text, and each other one that it comes to be.

        Raises:
            ConfigurationError: The target is malformed, no API server is known, it does not let us, or the ConfigMap
                has several keys and none was named, or too long a text.
            ResolutionError: The API server does not answer as it should.
            httpx.TransportError: It cannot be reached.
        """
        place = Place.config_map(target)
        access = self._access or await find()
        namespace = place.namespace or access.namespace
        collection = Collection(
            path=f"/api/v1/namespaces/{namespace}/configmaps",
            resource="configmaps",
            namespace=namespace,
            selector=(("fieldSelector", f"metadata.name={place.name}"),),
            decode=lambda raw: msgspec.json.decode(raw, type=ConfigMap),
        )
        last: str | None = None
        missing = ""
        async with (
            await access.client() as client,
            aclosing(Follower(client, collection, self._rng, self._idle).events()) as events,
        ):
            async for event in events:
                if isinstance(event, Trouble):
                    logger.warning("%s: %s", place, event.cause)
                    continue
                found: ConfigMap | None = None
                if isinstance(event, Listed):
                    found = event.items[-1] if event.items else None
                elif isinstance(event, Changed):
                    change = event.changes[-1]
                    found = None if isinstance(change, Gone) else change
                else:
                    continue
                text = None if found is None else _text(found, place)
                if text is None:
                    what = f"no ConfigMap {place.name!r}" if found is None else f"no key {place.part!r} in it"
                    kept = "its last text stays in force" if last is not None else "it is waited for"
                    if missing != what:
                        logger.warning("%s: there is %s in namespace %r; %s", place, what, namespace, kept)
                    missing = what
                    continue
                missing = ""
                if text != last:
                    last = text
                    yield text


def _text(found: ConfigMap, place: Place) -> str | None:
    data = found.data or {}
    if not place.part and len(data) > 1:
        keys = ", ".join(sorted(data)[:20])
        raise ConfigurationError(
            f"{place}: the ConfigMap has several keys ({keys}): name one, as in {place}:{min(data)}"
        )
    text = data.get(place.part) if place.part else next(iter(data.values()), None)
    if text is not None and len(text) > LARGEST:
        raise ConfigurationError(f"{place}: the text has {len(text)} characters; the limit is {LARGEST}")
    return text
