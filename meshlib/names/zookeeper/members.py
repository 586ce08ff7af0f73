"""The members of a service, as its nodes say: serversets, plain addresses, and both in one path.

A *serverset* member is JSON, as Finagle and Aurora write it (finagle-serversets, Entry.scala): a main endpoint,
additional endpoints by name, a status, a shard and metadata. A *vector* node (``vector_…``) gives weights to members by
address, member or shard; a member's weight is the product of all that fit it (EndpointVector.scala). A *plain* member
is ``host:port`` with optional settings (``weight=2 zone=eu``) as its data, or as its name when it has no data.

Only members that are ALIVE and have the endpoint that is asked for are endpoints. What makes no sense is remembered
and left out, and spoils nothing else. A member's node is written once, so each is read once; the nodes whose names
are no sequence numbers, and vectors, may be rewritten, and are read again when they are.

Pure: it is told what there is, and says what is still to be read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ...core.errors import shown
from ..addr import Address, parse_hostport

__all__ = ["Entry", "Members", "Vector", "parse"]

LARGEST: Final = 65_536
"""Bytes of a member's data; a serverset member has some hundreds."""
METADATA: Final = 10
"""Entries of metadata that are kept, as Finagle keeps them."""
WORD: Final = 256
"""Characters of a host, and of a key or value of metadata."""
VECTOR: Final = "vector_"
EXCLUDED: Final = -1.0
"""The weight by which a vector takes a member out (Finagle). We take any factor for it; Finagle multiplies first."""

_SEQUENTIAL = re.compile(r".*\d{10}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Entry:
    """A member.

    Attributes:
        address: The endpoint that was asked for; ``None`` when it has none, or is not alive.
        shard: Its shard, if it has one.
        endpoints: The names of its additional endpoints.
        why: Why it has no address.
    """

    address: Address | None
    shard: int | None = None
    endpoints: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class Vector:
    """Weights, each with what it applies to: ``inet=host:port``, ``member=name`` or ``shard=3``."""

    weights: tuple[tuple[str, float], ...]


@dataclass
class Members:
    """The members of one path, as far as they are known.

    Attributes:
        entries: Those that make sense, by name.
        malformed: Those that do not, by name, with the reason.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    vectors: dict[str, Vector] = field(default_factory=dict)
    malformed: dict[str, str] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)
    _unread: set[str] = field(default_factory=set)
    _incarnation: object = None

    def listed(self, names: Iterable[str], incarnation: object) -> bool:
        """These are all there are; ``True`` when that is news. See `unread` for what to read then.

        ``incarnation`` is the transaction that made the path. In a path that was deleted and made again, a member with
        a known name is another one: numbers start from 0 again.
        """
        now = set(names)
        if incarnation != self._incarnation:
            self._incarnation = incarnation
            for known in (self._names, self._unread, self.entries, self.vectors, self.malformed):
                known.clear()
        elif now == self._names:
            return False
        for name in self._names - now:
            self.gone(name)
        self._unread |= now - self._names
        self._names = now
        return True

    @property
    def unread(self) -> int:
        """How many have to be read."""
        return len(self._unread)

    def take(self) -> list[str]:
        """What has to be read now, in order. Each then belongs to the reader: it is read, gone, or changed again."""
        taken = sorted(self._unread)
        self._unread.clear()
        return taken

    def changed(self, name: str) -> None:
        """The node is to be read again. What it said stays until it has been."""
        if name in self._names:
            self._unread.add(name)

    def doubt(self) -> None:
        """Nobody can have heard what was rewritten; read all of it again that may have been."""
        self._unread |= {name for name in self._names if self.rewritable(name)}

    def read(self, name: str, said: Entry | Vector | str) -> None:
        """What the node says; text is why it makes no sense."""
        if name in self._names:
            # A change that is heard while the node is read is younger than what was read: it stays to be read.
            for known in (self.entries, self.vectors, self.malformed):
                known.pop(name, None)
            if isinstance(said, Entry):
                self.entries[name] = said
            elif isinstance(said, Vector):
                self.vectors[name] = said
            else:
                self.malformed[name] = said

    def gone(self, name: str) -> None:
        """The node is no more. Should a listing have it again, it is another."""
        self._names.discard(name)
        self._unread.discard(name)
        for known in (self.entries, self.vectors, self.malformed):
            known.pop(name, None)

    @staticmethod
    def rewritable(name: str) -> bool:
        """May this node be rewritten? Sequential members are not."""
        return name.startswith(VECTOR) or _SEQUENTIAL.fullmatch(name) is None

    def addresses(self) -> dict[Address, Address]:
        """All endpoints with their weights, each once. Of two members at one address the newer counts."""
        factors: dict[str, list[float]] = {}
        for vector in self.vectors.values():
            for select, weight in vector.weights:
                factors.setdefault(select, []).append(weight)
        found: dict[Address, Address] = {}
        for name, entry in self.entries.items():
            address = entry.address
            if address is not None and factors:
                address = _weighed(name, entry, address, factors)
            if address is not None:
                found[address] = address
        return found

    @property
    def why_none(self) -> str:
        """Why there is no endpoint, although the path is there."""
        if not self.entries:
            return f"none of its {len(self.malformed)} nodes is a member" if self.malformed else "it has no members"
        reasons = {entry.why for entry in self.entries.values() if entry.why} or {"its vectors exclude it"}
        others = sorted({name for entry in self.entries.values() for name in entry.endpoints})
        known = f"; there are endpoints named {', '.join(map(shown, others[:10]))}" if others else ""
        return f"none of its {len(self.entries)} members can be used: {', '.join(sorted(reasons))}{known}"


def _weighed(name: str, entry: Entry, address: Address, factors: dict[str, list[float]]) -> Address | None:
    mine = [*factors.get(f"inet={address}", ()), *factors.get(f"member={name}", ())]
    if entry.shard is not None:
        mine += factors.get(f"shard={entry.shard}", ())
    weight = math.prod(mine, start=address.weight)
    if EXCLUDED in mine or not 0 < weight < math.inf:
        return None
    return address if weight == address.weight else replace(address, weight=weight)


# --- reading nodes ----------------------------------------------------------------------------------------------------


def parse(name: str, data: bytes, endpoint: str = "") -> Entry | Vector:
    """What a node says.

    Raises:
        ValueError: It makes no sense; says why.
    """
    if len(data) > LARGEST:
        raise ValueError(f"{len(data)} bytes; the limit is {LARGEST}")
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("its data is not UTF-8") from None
    if not text.startswith("{"):
        if name.startswith(VECTOR):
            raise ValueError("a vector is a JSON object")
        return _plain(text or name, endpoint)
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    return _vector(said) if name.startswith(VECTOR) else _serverset(said, endpoint)


def _plain(text: str, endpoint: str) -> Entry:
    place, *settings = text.split()
    metadata = dict(_setting(word) for word in settings[:METADATA])
    return _entry(_address(*parse_hostport(place), metadata), endpoint, {}, None)


def _setting(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not (key and equals):
        raise ValueError(f"{shown(word)!r} is neither host:port nor a setting such as weight=2")
    return key, value


def _serverset(said: dict[str, Any], endpoint: str) -> Entry:
    shard = said.get("shard")
    if shard is not None and type(shard) is not int:
        raise ValueError(f"shard is {shown(repr(shard))}, not a whole number")
    metadata = said.get("metadata") or {}
    others = said.get("additionalEndpoints") or {}
    if not isinstance(metadata, dict) or not isinstance(others, dict):
        raise ValueError("metadata and additionalEndpoints must be objects")
    facts = {k: v for k, v in list(metadata.items())[:METADATA] if isinstance(v, str | int | float)}
    if shard is not None:
        facts["shard"] = shard
    where = others.get(endpoint) if endpoint else said.get("serviceEndpoint")
    address = None if where is None else _endpoint(where, facts)
    entry = _entry(address, "", others, shard)
    status = said.get("status", "ALIVE")
    if status != "ALIVE":
        return replace(entry, address=None, why=f"status {shown(str(status), 20)}")
    return entry if address else replace(entry, why=f"no endpoint {endpoint!r}" if endpoint else "no serviceEndpoint")


def _entry(address: Address | None, endpoint: str, others: dict[str, Any], shard: int | None) -> Entry:
    names = tuple(str(name)[:WORD] for name in list(others)[:METADATA])
    if endpoint:
        return Entry(None, shard, names, f"no endpoint {endpoint!r}")
    return Entry(address, shard, names)


def _endpoint(said: Any, metadata: dict[str, Any]) -> Address:
    if not (isinstance(said, dict) and isinstance(said.get("host"), str) and type(said.get("port")) is int):
        raise ValueError(f'{shown(repr(said))} is no endpoint; expected {{"host": "…", "port": 9000}}')
    return _address(said["host"], said["port"], metadata)


def _address(host: str, port: int, metadata: dict[str, Any]) -> Address:
    if not 0 < len(host) <= WORD or not host.isprintable() or " " in host or not 0 < port < 65536:
        raise ValueError(f"{shown(host)!r} port {port} is no place to connect to")
    weight = _number(metadata.pop("weight", 1.0))
    if not 0 < weight < math.inf:
        raise ValueError(f"its weight is {shown(str(weight))}, and must be a number above 0")
    kept = sorted((str(key)[:WORD], str(value)[:WORD]) for key, value in metadata.items())
    return Address(host, port, weight=weight, metadata=tuple(kept))


def _vector(said: dict[str, Any]) -> Vector:
    descriptors = said.get("vector")
    if not isinstance(descriptors, list):
        raise ValueError("a vector is an object with a list named vector")
    weights = []
    for each in descriptors:
        if not (isinstance(each, dict) and isinstance(each.get("select"), str)):
            raise ValueError(f'{shown(repr(each))}: expected {{"select": "shard=3", "weight": 0.5}}')
        kind, equals, value = each["select"].partition("=")
        if kind not in ("inet", "member", "shard") or not equals:
            raise ValueError(f"{shown(each['select'])!r} selects neither by inet= nor by member= nor by shard=")
        if kind == "inet":
            value = str(Address(*parse_hostport(value)))
        weight = _number(each.get("weight", 1.0))
        if not math.isfinite(weight) or (weight < 0 and weight != EXCLUDED):
            raise ValueError(f"the weight {shown(str(weight))} is neither a number from 0 nor -1")
        weights.append((f"{kind}={value}", weight))
    return Vector(tuple(weights))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{shown(repr(value))} is no number") from None
