"""What @rpc accepts, and what it says when it does not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import meshlib
from meshlib import ConfigurationError, rpc
from meshlib.typed.codec import MethodCodec
from meshlib.typed.contract import contracts_of, methods_of

from .services import Both, Counter, Greeter, Shop


def test_a_contract_is_named_for_the_class_that_declares_it() -> None:
    assert [c.__name__ for c in contracts_of(Both)] == ["Greeter", "Counter"]
    assert {m.dest for m in methods_of(Greeter).values()} == {"/Greeter/hello"}
    assert methods_of(Shop)["total"].idempotent
    assert not methods_of(Shop)["find"].idempotent


def test_the_decorator_leaves_the_function_as_it_was() -> None:
    async def hello(self: Any, name: str) -> str:
        """Say hello."""
        return name

    assert rpc(hello) is hello
    assert rpc(idempotent=True)(hello) is hello
    assert list(inspect.signature(Shop.impatient).parameters) == ["self"]


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda: rpc(lambda self: None), "write it as `async def`"),
        (lambda: rpc(_generator), "streams are not supported"),
        (lambda: rpc(_no_self), "expected a method"),
        (lambda: rpc(_variadic), "parameter names must be one that can be given by name"),
        (lambda: rpc(_positional_only), "parameter name must be one that can be given by name"),
        (lambda: rpc(raises=[int])(_plain), "raises=<class 'int'> is no exception class"),
        (lambda: rpc(raises=[ValueError, type("ValueError", (Exception,), {})])(_plain), "cannot be told apart"),
        (lambda: meshlib.client(int, "127.0.0.1:1"), "int has no @rpc methods"),
        (lambda: meshlib.client(Shop(), "127.0.0.1:1"), "give the class with the @rpc methods first"),
        (lambda: meshlib.client(Shop, ""), "expected something like 'host:port'"),
        (lambda: meshlib.client(Shop, "127.0.0.1"), "expected host:port"),
        (lambda: meshlib.client(Shop, "consul://x"), "no resolver for consul://; there are dns, file, k8s"),
        (lambda: meshlib.client(Shop, "127.0.0.1:1", 3), "3 is not a layer"),
        (lambda: meshlib.client(Shop, "127.0.0.1:1", len), "becomes a layer with @meshlib.filter"),
        (lambda: meshlib.serve(Shop), r"serve an instance, not the class: Shop\(…\)"),
        (lambda: meshlib.serve(3), "int has no @rpc methods to serve"),
        (lambda: meshlib.serve([Shop(), Shop()]), "two services of the name Shop"),
        (lambda: meshlib.serve(Shop(), "ftp://127.0.0.1:80"), "expected mux://host:port"),
        (lambda: meshlib.serve(Shop(), "mux://127.0.0.1"), "expected host:port"),
        (lambda: MethodCodec(methods_of(_Unsendable)["method"]), "Unsendable.method"),
        (lambda: methods_of(_Unresolvable), "cannot resolve its annotations"),
    ],
)
def test_what_cannot_work_is_told_at_once(declare: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        declare()


async def _plain(self: Any) -> None: ...


async def _generator(self: Any) -> Any:
    yield 1


async def _no_self() -> None: ...


async def _variadic(self: Any, *names: str) -> None: ...


async def _positional_only(self: Any, name: str, /) -> None: ...


class _Unsendable:
    @rpc
    async def method(self, x: dict[tuple[int, ...], set[frozenset[int]]] | list[int] | tuple[int, int]) -> None: ...


class _Unresolvable:
    @rpc
    async def method(self, x: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


def test_mutable_defaults_are_not_shared_between_calls() -> None:
    class Lists:
        @rpc
        async def method(self, items: list[int] = [1]) -> None: ...  # noqa: B006

    codec = MethodCodec(methods_of(Lists)["method"])
    first = codec.decode_arguments(codec.encode_arguments((), {}))["items"]
    first.append(2)
    assert codec.decode_arguments(codec.encode_arguments((), {}))["items"] == [1]


def test_an_abstract_contract_can_be_called_but_not_served() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Counter()  # type: ignore[abstract]
    assert meshlib.client(Counter, "127.0.0.1:1").contract is Counter
