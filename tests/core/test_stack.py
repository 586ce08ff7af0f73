"""Stacks: layers at named places, in order, changed as values."""

from typing import Any

import pytest

import meshlib
from meshlib.balancing.balance import Balance
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError
from meshlib.core.service import Filter
from meshlib.core.stack import Layer, Layers, Stack

PLACES = ("top", "filters", "middle", "bottom")


class Step(Filter[Any, Any, Any, Any]):
    def __init__(self, place: str, name: str = "") -> None:
        self.place = place
        self.name = name or place

    async def apply(self, request, service):
        return await service([*request, self.name])

    def __repr__(self) -> str:
        return f"step({self.name})"


async def end(request):
    return request


async def path_of(stack: Stack) -> list[str]:
    return await stack.build(Env(), end)([])


def names(stack: Stack) -> list[str]:
    return [getattr(layer, "layer", layer).name for layer in stack]


@pytest.fixture
def stack() -> Stack:
    return Stack(PLACES, [Step("bottom"), Step("top"), Step("middle")])


async def test_layers_stand_in_the_order_of_their_places_whatever_the_order_in_which_they_came(stack):
    assert await path_of(stack) == ["top", "middle", "bottom"]
    assert len(stack) == 3


async def test_a_layer_replaces_the_one_at_its_place(stack):
    assert await path_of(stack.with_layers(Step("middle", "mine"))) == ["top", "mine", "bottom"]


async def test_a_layer_takes_an_empty_place(stack):
    assert await path_of(stack.remove("middle").with_layers(Step("middle", "mine"))) == ["top", "mine", "bottom"]


async def test_the_last_of_several_layers_for_one_place_has_it(stack):
    assert await path_of(stack.with_layers(Step("top", "x"), Step("top", "y"))) == ["y", "middle", "bottom"]


async def test_plain_filters_gather_in_the_order_in_which_they_were_given(stack):
    stack = stack.with_layers(Step("filters", "1"), Step("middle", "mine"), Step("filters", "2"))
    assert await path_of(stack.with_layers(Step("filters", "3"))) == ["top", "1", "2", "3", "mine", "bottom"]


async def test_a_value_of_several_layers_is_taken_apart(stack):
    both = Layers(Step("bottom", "b"), Layers(Step("top", "t"), Step("filters", "f")))
    assert await path_of(stack.with_layers(both)) == ["t", "f", "middle", "b"]
    assert repr(Layers(Step("top"), Step("bottom"))) == "step(top) + step(bottom)"


async def test_a_chain_of_filters_is_one_layer(stack):
    chain = Step("filters", "a") >> Step("filters", "b")
    assert await path_of(stack.with_layers(chain)) == ["top", "a", "b", "middle", "bottom"]


async def test_a_stack_is_never_changed_in_place(stack):
    stack.with_layers(Step("top", "other"), Step("filters"))
    stack.remove("middle")
    stack.insert_before("top", Step("filters"))
    assert await path_of(stack) == ["top", "middle", "bottom"]
    assert stack.places == PLACES


async def test_a_layer_can_be_inserted_above_a_place(stack):
    changed = stack.insert_before("middle", Step("top", "new"))
    assert await path_of(changed) == ["top", "new", "middle", "bottom"]
    assert await path_of(changed.insert_before("top", Step("bottom", "first"))) == [
        "first", "top", "new", "middle", "bottom",
    ]  # fmt: skip


def test_a_layer_at_another_place_keeps_what_it_says_of_deadlines(stack):
    heedful, heedless = meshlib.concurrency_limit(5), Step("top")
    for layer, keeps in ((heedful, True), (heedless, False)):
        (inserted,) = set(stack.insert_before("middle", layer)) - set(stack)
        assert getattr(inserted, "keeps_deadline", False) is keeps


async def test_a_layer_can_be_inserted_below_a_place(stack):
    changed = stack.insert_after("middle", Step("top", "new"))
    assert await path_of(changed) == ["top", "middle", "new", "bottom"]
    assert await path_of(changed.insert_after("bottom", Step("top", "last"))) == [
        "top", "middle", "new", "bottom", "last",
    ]  # fmt: skip


async def test_several_layers_inserted_at_one_place_keep_apart(stack):
    stack = stack.insert_before("middle", Step("top", "1")).insert_before("middle", Step("top", "2"))
    assert await path_of(stack) == ["top", "1", "2", "middle", "bottom"]
    assert len(set(stack.places)) == len(stack.places)


async def test_an_insertion_leaves_the_place_itself_to_be_replaced(stack):
    stack = stack.insert_before("middle", Step("middle", "guard")).with_layers(Step("middle", "mine"))
    assert await path_of(stack) == ["top", "guard", "mine", "bottom"]


async def test_a_place_can_be_given_several_layers_and_those_of_other_places(stack):
    assert await path_of(stack.replace("middle", Step("top", "x"), Step("middle", "y"))) == ["top", "x", "y", "bottom"]


async def test_a_place_can_be_left_empty(stack):
    assert await path_of(stack.remove("middle")) == ["top", "bottom"]
    assert await path_of(stack.remove("filters")) == ["top", "middle", "bottom"]


async def test_split_keeps_every_layer_once(stack):
    upper, lower = stack.with_layers(Step("filters", "f")).split("filters")
    assert (names(upper), names(lower)) == (["top", "f"], ["middle", "bottom"])
    assert upper.places + lower.places == PLACES


def test_a_layer_is_found_at_its_place(stack):
    assert stack.find("middle").name == "middle"
    assert stack.find("filters") is None
    guest = Step("top", "guest")
    assert stack.replace("middle", guest).find("middle") is guest


def test_each_layer_is_built_once_from_the_bottom_up():
    built = []

    class Noting:
        def __init__(self, place):
            self.place = place

        def build(self, env, below):
            built.append((self.place, env.label, below))
            return self.place

    assert Stack(("a", "b"), [Noting("a"), Noting("b")]).build(Env(label="x"), "wire") == "a"
    assert built == [("b", "x", "wire"), ("a", "x", "b")]


def test_anything_with_a_place_and_a_build_is_a_layer():
    assert isinstance(meshlib.timeout(1.0), Layer)
    assert isinstance(Balance(), Layer)
    assert not isinstance(end, Layer)


# --- what it says when something is wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["remove", "replace", "split", "find", "insert_before", "insert_after"])
def test_an_unknown_place_is_told_with_the_places_there_are(stack, change):
    more = [Step("top")] if change.startswith("insert") else []
    with pytest.raises(ConfigurationError, match=r"no place 'midle'.*top, filters, middle, bottom"):
        getattr(stack, change)("midle", *more)


def test_a_layer_whose_place_is_not_here_is_told(stack):
    with pytest.raises(ConfigurationError, match=r"no place 'pool' in this stack; its places are top, filters"):
        stack.with_layers(Step("pool"))
    with pytest.raises(ConfigurationError, match=r"step\(pool\) stands at 'pool'"):
        Stack(PLACES, [Step("pool")])


@pytest.mark.parametrize("wrong", [5, None, "timeout"])
def test_what_is_no_layer_is_told(stack, wrong):
    with pytest.raises(ConfigurationError, match=f"{wrong!r} is not a layer$"):
        stack.with_layers(wrong)


def test_a_function_is_told_how_it_becomes_a_layer(stack):
    with pytest.raises(ConfigurationError, match=r"becomes a layer with @meshlib\.filter"):
        stack.with_layers(end)


def test_a_class_in_place_of_a_value_is_told(stack):
    with pytest.raises(ConfigurationError, match=r"give a value, such as Balance\(…\)"):
        stack.with_layers(Balance)


# --- how it prints ----------------------------------------------------------------------------------------------------


def test_a_stack_prints_one_line_a_layer_with_its_place_and_parameters(stack):
    stack = stack.with_layers(Step("filters", "logged")).insert_after("middle", Step("top", "guest"))
    assert repr(stack).splitlines() == [
        "Stack:",
        "  top           step(top)",
        "  filters       step(logged)",
        "  middle        step(middle)",
        "  below middle  step(guest)",
        "  bottom        step(bottom)",
    ]


def test_headings_stand_above_their_place(stack):
    text = stack.describe(indent="", heading=lambda place: "-- wire --" if place == "bottom" else None)
    assert text.splitlines()[-2:] == ["-- wire --", "bottom  step(bottom)"]


def test_an_empty_stack_prints():
    assert repr(Stack(PLACES)) == "Stack:\n"


def lines_of(thing) -> list[list[str]]:
    return [line.split(maxsplit=1) for line in repr(thing).splitlines()[1:] if not line.strip().startswith("--")]


def test_a_client_prints_its_stack_one_line_a_layer():
    from meshlib.client import PLACES, default_layers

    client = meshlib.mux.client("host:1", meshlib.timeout(1.5), meshlib.retry(attempts=7), label="shop")
    lines = lines_of(client)
    assert repr(client).startswith("client 'shop' -> <host:1: not resolved yet> (mux)\n")
    assert [place for place, _ in lines] == [p for p in PLACES if p in {layer.place for layer in default_layers()}]
    shown = dict(lines)
    assert shown["timeout"] == "timeout(total=1.5 s)"
    assert shown["retry"].startswith("retry(attempts=7")
    assert shown["transport"] == "transport(connect_timeout=1 s)"
    assert "-- per endpoint --" in repr(client)


def test_a_server_prints_its_stack_one_line_a_layer():
    from meshlib.server import PLACES, default_layers

    server = meshlib.mux.serve(end, "127.0.0.1:0", meshlib.concurrency_limit(7), label="shop")
    lines = lines_of(server)
    assert repr(server).startswith("server 'shop' on 127.0.0.1:0 (mux, 0 connections)\n")
    assert [place for place, _ in lines] == [p for p in PLACES if p in {layer.place for layer in default_layers()}]
    assert dict(lines)["limit"] == "concurrency_limit(7)"
