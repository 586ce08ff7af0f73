"""Announcing in ZooKeeper: an ephemeral sequential ``member_`` node, in the form that Finagle and Aurora have.

The node belongs to a session. When the session ends, the node does, and a new one is made in the next session; so it is
when somebody deletes it. Two things could make one server two members. A connection that is lost while the node is
being made does not tell whether it was: so before a node is made, those that are there are read, and one of this
session with this address is ours. And the node of a session that ended without us knowing lives on until ZooKeeper
finds out: whoever holds the port now is this server, so a node with its address that belongs to another session is
deleted.

With a user and password in the target, only that user may change the node, and everybody may read it. Source:
finagle-serversets, ServerSetImpl and Group, which leave the nodes of their own past to expire.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, Final

import anyio
from kazoo.exceptions import (
    ConnectionClosedError,
    ConnectionLoss,
    NodeExistsError,
    NoNodeError,
    OperationTimeoutError,
    SessionExpiredError,
)
from kazoo.security import CREATOR_ALL_ACL, READ_ACL_UNSAFE

from ..addr import Address
from ..target import Target
from .members import Entry, parse
from .place import Place
from .session import Session, State, shared

__all__ = ["ZooKeeperAnnouncer", "member_data"]

PREFIX: Final = "member_"
AGAIN: Final = 0.1
"""Seconds after an interrupted operation; whether it was done is found out once there is a connection again."""
GOODBYE: Final = 1.5
"""Seconds to delete the node; else it ends with the session."""
_INTERRUPTED = (ConnectionLoss, ConnectionClosedError, SessionExpiredError, OperationTimeoutError)


class ZooKeeperAnnouncer:
    """Announces below a path."""

    def check(self, target: Target) -> None:
        """Raises `ConfigurationError` for a malformed target."""
        Place.parse(target)

    async def announce(self, target: Target, address: Address) -> AsyncGenerator[None, None]:
        """Keep a member node."""
        place = Place.parse(target)
        data = member_data(address, place.endpoint)
        with shared(place.ensemble) as session:
            node = ""
            try:
                while True:
                    await session.ready(writing=True)
                    try:
                        node = await _join(session, place, address, data)
                        yield
                        await _until_lost(session, node)
                        node = ""
                    except _INTERRUPTED:
                        await anyio.sleep(AGAIN)
            finally:
                if node and session.state.value.usable:
                    with anyio.move_on_after(GOODBYE, shield=True):
                        await _delete(session, node)


def member_data(address: Address, endpoint: str = "") -> bytes:
    """What a member's node says: JSON as Finagle's. The weight is metadata, which Finagle keeps and does not use."""
    where = {"host": address.host, "port": address.port}
    said: dict[str, Any] = {
        "serviceEndpoint": where,
        "additionalEndpoints": {endpoint: where} if endpoint else {},
        "status": "ALIVE",
    }
    metadata = dict(address.metadata)
    shard = metadata.pop("shard", "")
    if shard.isdigit():
        said["shard"] = int(shard)
    if address.weight != 1:
        metadata["weight"] = f"{address.weight:g}"
    if metadata:
        said["metadata"] = metadata
    return json.dumps(said).encode()


async def _join(session: Session, place: Place, address: Address, data: bytes) -> str:
    """The node of this session with this address, made if need be; others with this address are deleted."""
    path = place.path
    try:
        names = await session.call("get_children", path)
    except NoNodeError:
        await _make(session, path)
        names = []
    mine = ""
    nodes = [(f"{path}/{name}", None) for name in names if name.startswith(PREFIX)]
    for node, said in (await session.read(nodes, _address_of)).items() if nodes else ():
        if said != address:
            continue
        stat = await session.call("exists", node)
        if stat is not None and stat.ephemeralOwner == session.id and not mine:
            mine = node
        elif stat is not None and stat.ephemeralOwner:
            await _delete(session, node)
    if mine:
        return mine
    acl = [*CREATOR_ALL_ACL, *READ_ACL_UNSAFE] if place.ensemble.secret else None
    made: str = await session.call("create", f"{path}/{PREFIX}", data, acl=acl, ephemeral=True, sequence=True)
    return made


async def _make(session: Session, path: str) -> None:
    """Make the path, with those above it, for good."""
    parts = path.split("/")[1:]
    for n in range(len(parts)):
        try:
            await session.call("create", "/" + "/".join(parts[: n + 1]), b"")
        except NodeExistsError:
            continue


def _address_of(path: str, data: bytes) -> Address | None:
    try:
        said = parse(path.rpartition("/")[2], data)
    except ValueError:
        return None
    return said.address if isinstance(said, Entry) else None


async def _until_lost(session: Session, node: str) -> None:
    """Return when the node is no more, or not of this session."""
    while True:
        heard = anyio.Event()
        with session.follow(node, heard.set):
            unwatch = session.state.watch(partial(_tell_of_loss, heard))
            try:
                await session.ready(writing=True)
                stat = await session.call("exists", node, watch=session.fired)
                if stat is None or stat.ephemeralOwner != session.id:
                    return
                await heard.wait()
            except _INTERRUPTED:
                await anyio.sleep(AGAIN)
            finally:
                unwatch()


def _tell_of_loss(heard: anyio.Event, state: State) -> None:
    if not state.usable:
        heard.set()


async def _delete(session: Session, node: str) -> None:
    try:
        await session.call("delete", node)
    except (NoNodeError, *_INTERRUPTED):
        return
