"""Composition: what `>>` makes of filters, services and functions, and when it says that something is wrong."""

import functools
import inspect
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib.core.env import Env
from meshlib.core.service import Call, Filter, Service, ServiceFactory, Status


class Tag(Filter[Any, Any, Any, Any]):
    """Leaves its letter on the way in and on the way out, and counts how often it was bound."""

    def __init__(self, letter: str) -> None:
        self.letter = letter
        self.binds = 0

    def bind(self, service):
        self.binds += 1
        return super().bind(service)

    async def apply(self, request, service):
        return await service(request + self.letter) + self.letter.upper()

    def __repr__(self) -> str:
        return self.letter


async def echo(request: str) -> str:
    return request + "|"


@meshlib.filter
async def logged(request, service):
    return f"logged({await service(request)})"


async def test_the_leftmost_filter_is_the_outermost():
    assert await (Tag("a") >> Tag("b") >> echo)("") == "ab|BA"


async def test_grouping_makes_no_difference():
    a, b, c = Tag("a"), Tag("b"), Tag("c")
    groupings = [(a >> b >> c) >> echo, (a >> (b >> c)) >> echo, a >> (b >> (c >> echo)), (a >> b) >> (c >> echo)]
    assert [await service("") for service in groupings] == ["abc|CBA"] * 4


@given(st.recursive(st.sampled_from("abcdef").map(Tag), lambda inner: st.builds(lambda x, y: x >> y, inner, inner)))
def test_a_chain_is_flat_however_it_was_grouped(chain):
    letters = repr(chain).replace(" >> ", "")
    assert repr((chain >> Tag("z")).bind(echo)).startswith(" >> ".join(letters + "z") + " >> ")


async def test_composition_is_folded_once_and_not_at_each_call():
    a, b = Tag("a"), Tag("b")
    service = a >> b >> echo
    for _ in range(5):
        await service("")
    assert (a.binds, b.binds) == (1, 1)


async def test_and_then_is_the_same_as_the_operator():
    assert await Tag("a").and_then(Tag("b")).and_then(echo)("") == "ab|BA"


async def test_a_chain_can_be_applied_like_any_filter():
    assert await (Tag("a") >> Tag("b")).apply("", echo) == "ab|BA"


async def test_a_chain_is_built_as_one_layer():
    class Knows(Tag):
        def build(self, env, service):
            return Tag(env.label).bind(service)

    assert await (Knows("x") >> Tag("b")).build(Env(label="e"), echo)("") == "eb|BE"


async def test_any_async_callable_of_one_argument_is_a_service():
    class Handler:
        async def __call__(self, request):
            return f"handled {request}"

        async def method(self, request):
            return f"method {request}"

    assert isinstance(echo, Service)
    assert isinstance(Handler(), Service)
    assert await (logged >> Handler())("x") == "logged(handled x)"
    assert await (logged >> Handler().method)("x") == "logged(method x)"
    assert await (logged >> functools.partial(echo))("x") == "logged(x|)"


async def test_a_function_filter_may_name_its_parameters_as_it_likes():
    @meshlib.filter
    async def positional(req, nxt):
        return await nxt(req) + "!"

    @meshlib.filter
    async def positional_only(request, service, /):
        return await service(request) + "?"

    assert await (positional >> positional_only >> echo)("x") == "x|?!"


async def test_a_bound_method_and_a_partial_make_filters():
    class Logger:
        def __init__(self):
            self.seen = []

        async def log(self, request, service):
            self.seen.append(request)
            return await service(request)

    async def marked(mark, request, service):
        return await service(request) + mark

    logger = Logger()
    service = meshlib.filter(logger.log) >> meshlib.filter(functools.partial(marked, "#")) >> echo
    assert await service("x") == "x|#"
    assert logger.seen == ["x"]


async def test_a_filter_that_was_decorated_by_another_still_works():
    @meshlib.filter
    @meshlib.timeout(5.0)
    async def slow_filter(request, service):
        return await service(request) + "!"

    assert await (slow_filter >> echo)("x") == "x|!"


@pytest.mark.parametrize("wrong", [None, 5, "echo"])
def test_what_is_no_service_is_told_at_composition(wrong):
    with pytest.raises(TypeError, match="is not a service: a service is an async callable of one argument"):
        logged >> wrong


def test_a_factory_is_told_at_composition_and_its_service_is_not():
    factory = Lender()
    with pytest.raises(TypeError, match="is not a service"):
        logged >> factory
    assert callable(logged >> factory.to_service())


def test_the_wrong_way_around_is_told_at_composition():
    with pytest.raises(TypeError, match=">>"):
        echo >> logged


@pytest.mark.parametrize("wrong", [None, 5, "logged"])
def test_what_is_no_function_is_told_when_it_is_made_a_filter(wrong):
    with pytest.raises(TypeError, match="async function"):
        meshlib.filter(wrong)


def test_what_is_no_function_is_told_when_it_is_decorated():
    with pytest.raises(TypeError, match="decorates async functions"):
        logged(5)


async def test_a_filter_without_apply_says_what_is_missing():
    class Forgetful(Filter[Any, Any, Any, Any]):
        pass

    with pytest.raises(NotImplementedError, match="Forgetful must define `async def apply"):
        await (Forgetful() >> echo)("x")


def test_compositions_print_as_they_were_written():
    a, b = Tag("a"), Tag("b")
    assert repr(a >> b) == "a >> b"
    assert repr(a >> logged) == "a >> logged"
    assert repr(a >> b >> echo) == f"a >> b >> {echo!r}"
    assert repr(logged >> echo) == f"logged >> {echo!r}"


# --- decorating functions ---------------------------------------------------------------------------------------------


class Seen(Filter[Any, Any, Any, Any]):
    def __init__(self):
        self.calls = []

    async def apply(self, request, service):
        self.calls.append(request)
        return await service(request)


async def test_a_filter_decorates_a_function_and_keeps_its_signature():
    seen = Seen()

    async def original(name: str, *, times: int = 1) -> str:
        """Say it."""
        return name * times

    decorated = seen(original)
    assert await decorated("ab", times=2) == "abab"
    assert inspect.signature(decorated) == inspect.signature(original)
    assert decorated.__wrapped__ is original
    assert (decorated.__name__, decorated.__doc__, decorated.__module__) == ("original", "Say it.", __name__)
    assert inspect.iscoroutinefunction(decorated)
    (call,) = seen.calls
    assert isinstance(call, Call)
    assert (call.args, call.kwargs) == (("ab",), {"times": 2})
    assert repr(call).endswith("original('ab', times=2)")
    assert call.idempotent


async def test_a_filter_decorates_a_method():
    seen = Seen()

    class Greeter:
        def __init__(self, greeting):
            self.greeting = greeting

        @seen
        async def hello(self, name: str) -> str:
            return f"{self.greeting}, {name}"

        @classmethod
        @seen
        async def made(cls, name: str) -> str:
            return f"{cls.__name__} {name}"

    assert await Greeter("hi").hello("you") == "hi, you"
    assert await Greeter.made("x") == "Greeter x"
    assert list(inspect.signature(Greeter("hi").hello).parameters) == ["name"]


async def test_several_decorators_nest_in_the_order_in_which_they_are_written():
    order = []

    def noting(name):
        @meshlib.filter
        async def note(request, service):
            order.append(name)
            return await service(request)

        return note

    @noting("outer")
    @noting("inner")
    async def function():
        order.append("function")

    await function()
    assert order == ["outer", "inner", "function"]


async def test_a_decorating_filter_is_bound_once():
    tag = Tag("a")
    calls = 0

    @meshlib.filter
    async def count(request, service):
        nonlocal calls
        calls += 1
        return await service(request)

    bound = count.bind
    binds = []
    count.bind = lambda service: binds.append(service) or bound(service)

    @count
    async def function():
        return tag.letter

    assert [await function() for _ in range(3)] == ["a"] * 3
    assert (calls, len(binds)) == (3, 1)


# --- factories --------------------------------------------------------------------------------------------------------


class Lent:
    def __init__(self, handler):
        self.handler = handler
        self.releases = 0

    async def __call__(self, request):
        return await self.handler(request)

    def release(self):
        self.releases += 1


class Lender(ServiceFactory[Any, Any]):
    def __init__(self, handler=echo, error=None):
        self.handler, self.error = handler, error
        self.lent = []

    async def acquire(self):
        if self.error is not None:
            raise self.error
        session = Lent(self.handler)
        self.lent.append(session)
        return session


async def test_a_session_is_given_back_once_after_each_reply():
    factory = Lender()
    service = factory.to_service()
    assert [await service(r) for r in "ab"] == ["a|", "b|"]
    assert [session.releases for session in factory.lent] == [1, 1]


async def test_a_session_is_given_back_once_after_an_error():
    async def fail(request):
        raise ValueError(request)

    factory = Lender(fail)
    with pytest.raises(ValueError, match="x"):
        await factory.to_service()("x")
    assert [session.releases for session in factory.lent] == [1]


async def test_a_session_is_given_back_once_after_a_cancellation():
    entered = anyio.Event()

    async def hang(request):
        entered.set()
        await anyio.sleep_forever()

    factory = Lender(hang)
    async with anyio.create_task_group() as group:
        group.start_soon(factory.to_service(), "x")
        await entered.wait()
        assert [session.releases for session in factory.lent] == [0]
        group.cancel_scope.cancel()
    assert [session.releases for session in factory.lent] == [1]


async def test_a_session_that_was_never_lent_is_not_given_back():
    factory = Lender(error=meshlib.ConnectError("refused"))
    with pytest.raises(meshlib.ConnectError):
        await factory.to_service()("x")
    assert factory.lent == []


async def test_a_factory_is_open_and_closes_as_often_as_one_likes():
    factory = Lender()
    assert factory.status is Status.OPEN
    await factory.aclose()
    await factory.aclose()


def test_statuses_are_ordered_from_worst_to_best():
    assert Status.CLOSED < Status.BUSY < Status.OPEN
