"""Scripted services: requests come in order, wait to be allowed, and none is forgotten."""

import anyio
import pytest

from meshlib import mux, timeout
from meshlib.core.context import current, deadline
from meshlib.core.errors import ConfigurationError, ServiceClosed
from meshlib.testing import run_virtual, scripted


class Callers:
    """Calls in the background, and how each ended."""

    def __init__(self, service, group):
        self.service, self.group = service, group
        self.ends = {}

    def call(self, *requests):
        for request in requests:
            self.group.start_soon(self._call, request)

    async def _call(self, request):
        try:
            self.ends[request] = await self.service(request)
        except Exception as error:
            self.ends[request] = error


async def test_requests_are_taken_in_order_and_answered_in_any():
    service, script = scripted()
    async with script, anyio.create_task_group() as group:
        callers = Callers(service, group)
        for name in "abc":
            callers.call(name)
            await anyio.wait_all_tasks_blocked()
        taken = [await script.next_request() for _ in "abc"]
        assert [item.request for item in taken] == ["a", "b", "c"]
        taken[2].respond("C")
        taken[0].fail(ValueError("no a"))
        await anyio.wait_all_tasks_blocked()
        assert callers.ends["c"] == "C"
        assert str(callers.ends["a"]) == "no a"
        assert script.unanswered == (taken[1],)
        taken[1].respond("B")
    assert callers.ends["b"] == "B"


async def test_the_next_request_is_waited_for():
    service, script = scripted()
    async with script, anyio.create_task_group() as group:
        answers = []

        async def play():
            item = await script.next_request()
            item.respond(item.request + 1)

        group.start_soon(play)
        await anyio.wait_all_tasks_blocked()
        answers.append(await service(1))
    assert answers == [2]


async def test_requests_wait_at_the_door_until_they_are_allowed():
    service, script = scripted()
    script.allow(0)
    async with script, anyio.create_task_group() as group:
        callers = Callers(service, group)
        for name in "abcd":
            callers.call(name)
            await anyio.wait_all_tasks_blocked()
        await script.expect_none()
        assert script.waiting == 4
        script.allow(2)
        for name in "ab":
            item = await script.next_request()
            assert item.request == name
            item.respond(None)
        await script.expect_none()
        script.allow(1)
        (await script.next_request()).respond(None)
        await anyio.wait_all_tasks_blocked()
        assert sorted(callers.ends) == ["a", "b", "c"]
        group.cancel_scope.cancel()


async def test_who_gives_up_at_the_door_takes_no_place():
    service, script = scripted()
    script.allow(0)
    async with script, anyio.create_task_group() as group:
        async with anyio.create_task_group() as impatient:
            Callers(service, impatient).call("a")
            await anyio.wait_all_tasks_blocked()
            impatient.cancel_scope.cancel()
        assert script.waiting == 0
        Callers(service, group).call("b")
        script.allow(1)
        item = await script.next_request()
        assert item.request == "b"
        item.respond(None)


async def test_a_caller_that_gives_up_is_seen_and_needs_no_answer():
    service, script = scripted()
    async with script:
        async with anyio.create_task_group() as group:
            Callers(service, group).call("a")
            item = await script.next_request()
            assert not item.cancelled
            group.cancel_scope.cancel()
        await item.wait_cancelled()
        assert item.cancelled
        assert item.ended
        item.respond("too late")
        assert repr(item) == "<request 'a': cancelled>"


def test_waiting_for_a_cancellation_that_does_not_come_fails():
    async def main():
        service, script = scripted()
        async with script, anyio.create_task_group() as group:
            Callers(service, group).call("a")
            item = await script.next_request()
            with pytest.raises(AssertionError, match="was not cancelled within 3 s"):
                await item.wait_cancelled(3)
            item.respond(None)
            with pytest.raises(AssertionError, match="'a': answered> was not cancelled"):
                await item.wait_cancelled()
        return anyio.current_time()

    run_virtual(main)


def test_a_request_that_never_comes_fails_the_test_at_once_in_virtual_time():
    async def main():
        service, script = scripted()
        with pytest.raises(AssertionError, match=r"no request came within 3600 s$"):
            await script.next_request(3600)
        script.allow(0)
        async with anyio.create_task_group() as group:
            Callers(service, group).call("a")
            with pytest.raises(AssertionError, match="no request came within 5 s; 1 wait to be allowed"):
                await script.next_request()
            group.cancel_scope.cancel()

    run_virtual(main)


def test_that_none_comes_can_be_watched_for_a_while():
    async def main():
        service, script = scripted()

        async def later():
            await anyio.sleep(10)
            await service("late")

        async with script, anyio.create_task_group() as group:
            group.start_soon(later)
            await script.expect_none(9)
            with pytest.raises(AssertionError, match="here is <request 'late': waiting>"):
                await script.expect_none(2)
            with pytest.raises(AssertionError, match="no request was expected"):
                await script.expect_none()
            (await script.next_request()).respond(None)

    run_virtual(main)


async def test_what_nobody_answered_fails_the_test_and_frees_its_caller():
    service, script = scripted()
    async with anyio.create_task_group() as group:
        callers = Callers(service, group)
        left = r"7 requests were never answered: 0, 1, 2, 3, 4, …"
        with pytest.raises(AssertionError, match=left):  # noqa: PT012 - the end of the block raises it
            async with script:
                for i in range(7):
                    callers.call(i)
                    await anyio.wait_all_tasks_blocked()
                for _ in range(3):
                    await script.next_request()
    assert [type(end) for end in callers.ends.values()] == [ServiceClosed] * 7
    with pytest.raises(ServiceClosed):
        await service("x")


async def test_a_failure_inside_is_not_hidden_by_what_was_left_unanswered():
    service, script = scripted()
    async with anyio.create_task_group() as group:
        callers = Callers(service, group)
        with pytest.raises(KeyError, match="the real one"):  # noqa: PT012 - the end of the block raises it
            async with script:
                callers.call("a")
                await script.next_request()
                raise KeyError("the real one")
    assert isinstance(callers.ends["a"], ServiceClosed)


async def test_a_request_shows_what_travelled_with_it():
    service, script = scripted()
    async with script, anyio.create_task_group() as group:
        with deadline(30):
            at = current().deadline
            group.start_soon(service, "a")
        item = await script.next_request()
        assert item.context.deadline == at
        item.respond(None)


async def test_an_answer_is_given_once():
    service, script = scripted()
    async with script, anyio.create_task_group() as group:
        group.start_soon(service, "a")
        item = await script.next_request()
        with pytest.raises(TypeError, match="give an exception"):
            item.fail("no")
        item.respond(None)
        for again in (lambda: item.respond(None), lambda: item.fail(ValueError())):
            with pytest.raises(RuntimeError, match="cannot be answered twice"):
                again()


async def test_it_plays_the_handler_of_a_real_server_and_sees_a_discard_on_the_wire():
    service, script = scripted()
    async with script, mux.serve(service) as server, mux.client(server.address, timeout(30)) as client:
        async with anyio.create_task_group() as group:
            group.start_soon(client, mux.Request(b"a"))
            first = await script.next_request()
            assert first.request.body == b"a"
            first.respond(mux.Response(b"A"))
        async with anyio.create_task_group() as group:
            group.start_soon(client, mux.Request(b"b"))
            second = await script.next_request()
            group.cancel_scope.cancel()
        await second.wait_cancelled()


@pytest.mark.parametrize("wrong", [-1, 1.5, True, None])
def test_what_cannot_be_allowed_is_told(wrong):
    with pytest.raises(ConfigurationError, match="give a whole number of requests, 0 or more"):
        scripted()[1].allow(wrong)


def test_it_prints_its_state():
    _, script = scripted()
    assert repr(script) == "<Script: any number allowed, 0 held, 0 to take>"
    script.allow(2)
    assert repr(script) == "<Script: 2 allowed, 0 held, 0 to take>"
