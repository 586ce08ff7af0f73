"""Saying how much a request matters, in a block, as a filter, and to servers further down."""

import anyio
import pytest

import meshlib
from meshlib import priority
from meshlib.core.context import Context, current, use
from meshlib.core.errors import ConfigurationError
from meshlib.core.priority import Priority


async def told(request):
    return current().priority


def test_a_block_has_a_priority_and_what_is_around_it_keeps_its_own():
    with priority("critical"):
        assert current().priority is Priority.CRITICAL
        with priority("sheddable") as inner:
            assert current() is inner
            assert inner.priority is Priority.SHEDDABLE
        assert current().priority is Priority.CRITICAL
    assert current().priority is Priority.DEFAULT


def test_a_block_that_fails_leaves_nothing_behind():
    with pytest.raises(ValueError, match="x"), priority("critical"):
        raise ValueError("x")
    assert current().priority is Priority.DEFAULT


async def test_one_value_may_be_entered_by_many_tasks_and_again_inside_itself():
    important = priority("critical")
    seen = []

    async def work(n):
        with important:
            await anyio.sleep(0.001 * (3 - n))
            with important:
                await anyio.sleep(0.001 * n)
                seen.append(current().priority)
            seen.append(current().priority)
        seen.append(current().priority)

    async with anyio.create_task_group() as group:
        for n in range(3):
            group.start_soon(work, n)
    assert seen.count(Priority.CRITICAL) == 6
    assert seen.count(Priority.DEFAULT) == 3


async def test_the_same_value_is_a_filter_and_a_decorator():
    assert await (priority("sheddable") >> told)("x") is Priority.SHEDDABLE
    assert await priority("critical")(told)("x") is Priority.CRITICAL
    assert await priority(Priority.CRITICAL)(told)("x") is Priority.CRITICAL
    with use(Context(priority=Priority.SHEDDABLE)):
        assert await (priority("default") >> told)("x") is Priority.DEFAULT
        assert current().priority is Priority.SHEDDABLE


async def test_a_priority_travels_and_a_handlers_own_calls_inherit_it():
    async def last(request):
        return meshlib.mux.Response(current().priority.name.encode())

    async with meshlib.mux.serve(last) as end, meshlib.mux.client(end.address) as onward:

        async def middle(request):
            return await onward(request)

        async with meshlib.mux.serve(middle) as server, meshlib.mux.client(server.address) as client:
            request = meshlib.mux.Request()
            assert (await client(request)).body == b"DEFAULT"
            with priority("critical"):
                assert (await client(request)).body == b"CRITICAL"
        async with (
            meshlib.mux.serve(middle) as server,
            meshlib.mux.client(server.address, priority("sheddable")) as client,
        ):
            assert (await client(request)).body == b"SHEDDABLE"
        async with (
            meshlib.mux.serve(middle, trust_context=False) as server,
            meshlib.mux.client(server.address, priority("critical")) as client,
        ):
            assert (await client(request)).body == b"DEFAULT"


@pytest.mark.parametrize("wrong", ["high", "CRITICAL", "Critical", "", 1, None, b"critical"])
def test_what_is_no_priority_is_told_at_construction(wrong):
    with pytest.raises(ConfigurationError, match="give 'critical', 'default' or 'sheddable'"):
        priority(wrong)


def test_it_prints_as_it_is_typed():
    assert repr(priority("critical")) == "priority('critical')"
