"""``k8s://namespace/service:port``: the Service's EndpointSlices, followed.

Three parts: `watching` follows the collection, `slices` makes addresses of it, `services` asks for the Service itself
where that is needed. While the API server is away the last addresses stay in use, and how that looks is up to
`meshlib.names.watch`.

Permissions needed: ``list`` and ``watch`` on endpointslices, ``get`` on services.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec

from ...core.errors import ConfigurationError
from ..addr import Addr, Failed
from ..target import Target
from .config import Access, find
from .place import Place
from .services import Services
from .slices import Part, Slice, Slices, part
from .watching import IDLE, Changed, Collection, Follower, Gone, Listed, Trouble

__all__ = ["KubernetesResolver"]


class KubernetesResolver:
    """Follows the endpoints of a Service.

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
        Place.service(target)

    async def watch(self, target: Target) -> AsyncIterator[Addr]:
        """Yields the Service's addresses whenever they change.

        Raises:
            ConfigurationError: The target is malformed, no API server is known, or it does not let us.
            ResolutionError: It does not answer as it should.
            httpx.TransportError: It cannot be reached.
        """
        place = Place.service(target)
        access = self._access or await find()
        namespace = place.namespace or access.namespace
        async with await access.client() as client:
            services = Services(client, namespace, place)
            name: str | None = place.part
            if place.number is not None:
                name = await services.port_name()
            collection = _slices_of(place, namespace, name)
            slices = Slices()
            async with aclosing(Follower(client, collection, self._rng, self._idle).events()) as events:
                async for event in events:
                    if isinstance(event, Trouble):
                        yield Failed(event.cause)
                        continue
                    if isinstance(event, Listed):
                        slices.replace(event.items)
                    elif isinstance(event, Changed):
                        for change in event.changes:
                            if isinstance(change, Gone):
                                slices.drop(change.name)
                            else:
                                slices.put(change)
                    if not slices:
                        yield await services.without_slices()
                    elif slices.problem:
                        problem = _no_port(place, namespace, slices.problem)
                        if place.number is not None:
                            raise ConfigurationError(problem)  # the next watch asks again which port has that number
                        yield Failed(problem)
                    else:
                        yield slices.addresses


def _slices_of(place: Place, namespace: str, port: str | None) -> Collection[Part]:
    number = place.number

    def decode(raw: msgspec.Raw) -> Part:
        of = msgspec.json.decode(raw, type=Slice)
        if number is None:
            return part(of, name=port or "")
        if port:
            return part(of, name=port)
        # A Service's port without a name is its only one, so the slices' only one is meant.
        return part(of) if port == "" else part(of, number=number)

    return Collection(
        path=f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices",
        resource="endpointslices.discovery.k8s.io",
        namespace=namespace,
        selector=(("labelSelector", f"kubernetes.io/service-name={place.name}"),),
        decode=decode,
    )


def _no_port(place: Place, namespace: str, ports: str) -> str:
    where = f"Service {place.name!r} in namespace {namespace!r}"
    if place.part:
        return f"{where} has no TCP port {place.part}; its pods have: {ports}"
    form = f"k8s://{namespace}/{place.name}:http"
    return f"{where} has not exactly one TCP port; name one, as in {form}; its pods have: {ports}"
