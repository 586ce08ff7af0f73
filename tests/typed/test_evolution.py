"""Either side may add an optional parameter, or a field with a default, first: old peers keep working."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import meshlib
from meshlib import rpc


@dataclasses.dataclass
class OldUser:
    name: str


@dataclasses.dataclass
class NewUser:
    name: str
    email: str = "unknown"


def contract(user: type, *, newer: bool) -> type:
    """Two versions of one service, under one name."""
    if newer:

        class Users:
            @rpc
            async def add(self, user, shout: bool = False):  # type: ignore[no-untyped-def]
                return dataclasses.replace(user, name=user.name.upper() if shout else user.name)

    else:

        class Users:  # type: ignore[no-redef]
            @rpc
            async def add(self, user):  # type: ignore[no-untyped-def]
                return user

    Users.add.__annotations__.update(user=user)
    Users.add.__annotations__["return"] = user
    return Users


OLD = contract(OldUser, newer=False)
NEW = contract(NewUser, newer=True)


@pytest.mark.parametrize(
    ("server", "client", "sent", "arrives"),
    [
        (OLD, NEW, NewUser("ann"), NewUser("ann")),
        (NEW, OLD, OldUser("ann"), OldUser("ann")),
        (NEW, NEW, NewUser("ann", "a@b"), NewUser("ann", "a@b")),
        (OLD, NEW, NewUser("ann", "a@b"), NewUser("ann")),
    ],
    ids=["new client, old server", "old client, new server", "both new", "what the old server cannot know is lost"],
)
async def test_an_optional_parameter_or_field_may_come_on_either_side_first(
    server: Any, client: Any, sent: Any, arrives: Any
) -> None:
    async with meshlib.serve(server()) as running, meshlib.client(client, running.address) as users:
        assert await users.add(sent) == arrives


async def test_defaults_are_the_servers_unless_the_caller_says_otherwise() -> None:
    async with meshlib.serve(NEW()) as running, meshlib.client(NEW, running.address) as users:
        assert (await users.add(NewUser("ann"))).name == "ann"
        assert (await users.add(NewUser("ann"), shout=True)).name == "ANN"


async def test_a_required_parameter_that_an_old_client_does_not_know_is_refused_by_name() -> None:
    class Users:
        @rpc
        async def add(self, user, realm):  # type: ignore[no-untyped-def]
            return user

    async with meshlib.serve(Users()) as running, meshlib.client(OLD, running.address) as users:
        with pytest.raises(meshlib.InvalidArgument, match="missing required field `realm`"):
            await users.add(OldUser("ann"))
