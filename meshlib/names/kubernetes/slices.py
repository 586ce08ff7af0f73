"""EndpointSlices, and the addresses that all slices of a Service make together. Pure.

A Service's endpoints are spread over slices of up to 100 (1,000 at most), which the controller fills up and splits as
it likes: an endpoint may move from one slice to another, and be in both or in neither for a moment. So each slice is
read by itself (`part`), once for each of its versions, and `Slices` is their union: ready if any slice says so. (When
it is in neither, the pause between two events is far below the 100 ms for which `Watch` collects changes.)

Which endpoints count is as in kube-proxy: those that are ready (``null`` means yes). A pod that terminates is not
ready, so a draining pod gets no new requests; but when there is no ready endpoint at all, those that terminate and
still serve are better than none. ``publishNotReadyAddresses`` makes every endpoint ready, and is obeyed, except for
terminating ones, which stay out while there are others.

Where a slice has zone hints, the hinted zone counts as the endpoint's ``zone``: kube-proxy would send that zone's
traffic there. The balancer weighs zones and never locks an endpoint out, so hints need not be on all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

from ..addr import Address, Bound

__all__ = ["Part", "Slice", "Slices", "part"]

_LONGEST: Final = 253
"""Characters of a node's, pod's or zone's name: longer ones are no names, and are left out."""


class Meta(msgspec.Struct, rename="camel"):
    """``ObjectMeta``: what is needed of it."""

    name: str = ""
    resource_version: str = ""


class Conditions(msgspec.Struct):
    """``null`` is "not known": ready and serving then mean yes, terminating no."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForZone(msgspec.Struct):
    """A zone that is to use the endpoint."""

    name: str = ""


class Hints(msgspec.Struct, rename="camel"):
    """Topology aware routing, and ``trafficDistribution``."""

    for_zones: list[ForZone] | None = None


class Reference(msgspec.Struct):
    """The object behind an endpoint."""

    kind: str = ""
    name: str = ""
    uid: str = ""


class Endpoint(msgspec.Struct, rename="camel"):
    """One endpoint. Of its addresses only the first is to be used, says the API."""

    addresses: list[str] = []
    conditions: Conditions | None = None
    node_name: str | None = None
    zone: str | None = None
    hints: Hints | None = None
    target_ref: Reference | None = None


class Port(msgspec.Struct):
    """A port of all endpoints of a slice. A ``null`` number is "every port"."""

    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class Slice(msgspec.Struct, rename="camel"):
    """``EndpointSlice`` of ``discovery.k8s.io/v1``."""

    metadata: Meta
    address_type: str = "IPv4"
    endpoints: list[Endpoint] | None = None
    ports: list[Port] | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What one slice contributes.

    Attributes:
        name: The slice's.
        ready: Endpoints that take requests.
        draining: Those that terminate but still serve.
        ports: Which ports it has, for messages.
        problem: Is there no such port, or more than one to choose from, for endpoints that it does have?
        v6: Are they IPv6 addresses?
    """

    name: str
    ready: tuple[Address, ...] = ()
    draining: tuple[Address, ...] = ()
    ports: tuple[str, ...] = ()
    problem: bool = False
    v6: bool = False


def part(of: Slice, name: str = "", number: int | None = None) -> Part:
    """Read a slice.

    Args:
        of: The slice.
        name: The port's name; empty if it is not known.
        number: The port's number in the pods, likewise. With neither, the slice's only port.
    """
    if of.address_type not in ("IPv4", "IPv6"):  # FQDN, which kube-proxy ignores, too
        return Part(of.metadata.name)
    port = _choose(of.ports or [], name, number)
    ready: list[Address] = []
    draining: list[Address] = []
    for endpoint in of.endpoints or []:
        if not endpoint.addresses or not endpoint.addresses[0]:
            continue
        conditions = endpoint.conditions or Conditions()
        if conditions.terminating:
            into = draining
            if conditions.serving is False or (conditions.serving is None and conditions.ready is False):
                continue
        elif conditions.ready is False:
            continue
        else:
            into = ready
        into.append(Address(endpoint.addresses[0], port or 0, metadata=_metadata(endpoint)))
    ports = tuple(f"{one.name or '(unnamed)'} ({one.port or 'any'})" for one in (of.ports or [])[:20] if _tcp(one))
    if port is None:
        return Part(of.metadata.name, ports=ports, problem=bool(ready or draining))
    return Part(of.metadata.name, tuple(ready), tuple(draining), ports, v6=of.address_type == "IPv6")


def _tcp(port: Port) -> bool:
    return port.protocol in (None, "", "TCP")


def _choose(ports: list[Port], name: str, number: int | None) -> int | None:
    """The number of the port that is meant, in this slice's pods."""
    ports = [port for port in ports if _tcp(port)]
    if name:
        ports = [port for port in ports if port.name == name]
    elif number is not None:
        ports = [port for port in ports if port.port in (number, None)] or ([Port()] if not ports else [])
    if len(ports) != 1:
        return number if number is not None and any(port.port == number for port in ports) else None
    found = ports[0].port if ports[0].port is not None else number
    return found if found is not None and 0 < found < 65536 else None


def _metadata(endpoint: Endpoint) -> tuple[tuple[str, str], ...]:
    zones = [one.name for one in (endpoint.hints.for_zones if endpoint.hints is not None else None) or []]
    own = endpoint.zone or ""
    zone = own if own in zones or not zones else zones[0]
    pod = endpoint.target_ref
    pairs = [
        ("node", endpoint.node_name or ""),
        ("pod", pod.name if pod is not None and pod.kind == "Pod" else ""),
        ("zone", zone),
    ]
    return tuple((key, text) for key, text in pairs if 0 < len(text) <= _LONGEST)


class Slices:
    """All slices of a Service, by name."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}

    def replace(self, parts: Iterable[Part]) -> None:
        """A list was complete: these are all there are."""
        self._parts = {one.name: one for one in parts}

    def put(self, one: Part) -> None:
        """A slice is new, or has changed."""
        self._parts[one.name] = one

    def drop(self, name: str) -> None:
        """A slice is gone. Dropping one that is not there is fine."""
        self._parts.pop(name, None)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def addresses(self) -> Bound:
        """What they make together."""
        parts = self._parts.values()
        ready = _union([one.ready for one in parts if not one.v6], [one.ready for one in parts if one.v6])
        if ready:
            return Bound(ready)
        return Bound(_union([one.draining for one in parts if not one.v6], [one.draining for one in parts if one.v6]))

    @property
    def problem(self) -> str:
        """Why there are endpoints but no addresses; empty when that is not so."""
        parts = self._parts.values()
        if not any(one.problem for one in parts) or any(one.ready or one.draining for one in parts):
            return ""
        ports = sorted({port for one in parts if one.problem for port in one.ports})
        return ", ".join(ports) or "none"


def _union(v4: list[tuple[Address, ...]], v6: list[tuple[Address, ...]]) -> tuple[Address, ...]:
    """Without repetitions. A pod with an address of each family counts once, by its IPv4 address."""
    found = dict.fromkeys(address for part in v4 for address in part)
    if found and v6:
        pods = {pod for address in found if (pod := _pod(address))}
        v6 = [tuple(address for address in part if _pod(address) not in pods) for part in v6]
    return tuple(dict.fromkeys([*found, *(address for part in v6 for address in part)]))


def _pod(address: Address) -> str:
    return next((text for key, text in address.metadata if key == "pod"), "")
