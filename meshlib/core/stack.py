"""A client or a server is a stack of layers, each at a named place.

A *layer* is a value that knows its place: ``timeout(1.0)`` says "timeout", and given to a client it replaces the layer
that stands there. The order of the places is the order of the stack, top (the caller) to bottom (the wire); it is
written once, in ``client.py`` and ``server.py``. Building folds from the bottom up: each layer wraps what is below it.

Layers given without a place of their own (plain filters) gather at ``filters``, in the order in which they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from .env import Env
from .errors import ConfigurationError

__all__ = ["Layer", "Layers", "Stack"]

SHARED = "filters"
"""The one place that holds more than one layer."""


@runtime_checkable
class Layer(Protocol):
    """A value with a place in a stack. Every filter is one."""

    place: ClassVar[str]
    """The name of the place where it stands."""

    def build(self, env: Env, below: Any, /) -> Any:
        """Wrap ``below``. Called once for each client or server, or for each endpoint, never per request."""
        ...


class Layers:
    """Several layers in one value, for a setting that concerns several places: ``timeout(total=1, attempt=0.3)``."""

    def __init__(self, *layers: Layer) -> None:
        self.layers = layers

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __repr__(self) -> str:
        return " + ".join(repr(layer) for layer in self.layers)


class Stack:
    """Layers in order. Immutable: each change gives a new stack.

    Args:
        places: Every place there is, top to bottom, whether or not a layer stands there.
        layers: The layers; they are put in the order of their places.
    """

    __slots__ = ("layers", "places")

    def __init__(self, places: tuple[str, ...], layers: Iterable[Layer] = ()) -> None:
        self.places = places
        order = {place: i for i, place in enumerate(places)}
        given = tuple(layers)
        for layer in given:
            if layer.place not in order:
                raise ConfigurationError(f"{layer!r} stands at {layer.place!r}, and here is no such place: {places}")
        self.layers: tuple[Layer, ...] = tuple(sorted(given, key=lambda layer: order[layer.place]))

    def with_layers(self, *layers: Any) -> Stack:
        """Each layer replaces the one at its place; plain filters are added below those already there.

        Raises:
            ConfigurationError: Something given is not a layer, or has no place in this stack.
        """
        stack = self
        for layer in layers:
            if isinstance(layer, Layers):
                stack = stack.with_layers(*layer)
            elif isinstance(layer, type):
                raise ConfigurationError(f"{layer!r} is a class; give a value, such as {layer.__name__}(…)")
            elif not isinstance(layer, Layer):
                hint = "; a function becomes a layer with @meshlib.filter" if callable(layer) else ""
                raise ConfigurationError(f"{layer!r} is not a layer{hint}")
            elif layer.place == SHARED:
                stack = Stack(stack.places, (*stack.layers, layer))
            else:
                stack = stack.replace(layer.place, layer)
        return stack

    def replace(self, place: str, *layers: Layer) -> Stack:
        """Put ``layers`` at ``place`` instead of what stands there."""
        self._check(place)
        return Stack(self.places, (*(x for x in self.layers if x.place != place), *(_at(place, x) for x in layers)))

    def remove(self, place: str) -> Stack:
        """Leave ``place`` empty."""
        return self.replace(place)

    def insert_before(self, place: str, layer: Layer) -> Stack:
        """Put ``layer`` directly above ``place``, nearer to the caller, whatever place it names itself."""
        return self._insert(place, layer, 0)

    def insert_after(self, place: str, layer: Layer) -> Stack:
        """Put ``layer`` directly below ``place``, nearer to the wire, whatever place it names itself."""
        return self._insert(place, layer, 1)

    def _insert(self, place: str, layer: Layer, offset: int) -> Stack:
        self._check(place)
        at = self.places.index(place) + offset
        side = "below" if offset else "above"
        own, n = f"{side} {place}", 1
        while own in self.places:
            n += 1
            own = f"{side} {place} ({n})"
        return Stack((*self.places[:at], own, *self.places[at:]), (*self.layers, _at(own, layer)))

    def split(self, place: str) -> tuple[Stack, Stack]:
        """The stack down to and including ``place``, and the stack below it."""
        self._check(place)
        at = self.places.index(place) + 1
        upper, lower = self.places[:at], self.places[at:]
        return (
            Stack(upper, (x for x in self.layers if x.place in upper)),
            Stack(lower, (x for x in self.layers if x.place in lower)),
        )

    def build(self, env: Env, below: Any) -> Any:
        """Fold the layers around ``below``, from the bottom up."""
        for layer in reversed(self.layers):
            below = layer.build(env, below)
        return below

    def find(self, place: str) -> Layer | None:
        """The first layer at ``place``, if there is one."""
        self._check(place)
        found = next((x for x in self.layers if x.place == place), None)
        return found.layer if isinstance(found, _At) else found

    def _check(self, place: str) -> None:
        if place not in self.places:
            raise ConfigurationError(
                f"there is no place {place!r} in this stack; its places are {', '.join(self.places)}"
            )

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def describe(self, indent: str = "  ", heading: Callable[[str], str | None] = lambda place: None) -> str:
        """One line a layer: its place and its parameters. ``heading`` may give a line to print above a place."""
        lines = []
        width = max((len(x.place) for x in self.layers), default=0)
        by_place: dict[str, list[Layer]] = {}
        for layer in self.layers:
            by_place.setdefault(layer.place, []).append(layer)
        for place in self.places:
            title = heading(place)
            if title is not None:
                lines.append(f"{indent}{title}")
            lines += [f"{indent}{place:{width}}  {layer!r}" for layer in by_place.get(place, ())]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return "Stack:\n" + self.describe()


class _At:
    """A layer at a place that is not the one it names itself."""

    __slots__ = ("layer", "place")

    def __init__(self, place: str, layer: Layer) -> None:
        self.place = place
        self.layer = layer

    @property
    def keeps_deadline(self) -> bool:
        return bool(getattr(self.layer, "keeps_deadline", False))

    def build(self, env: Env, below: Any) -> Any:
        return self.layer.build(env, below)

    def __repr__(self) -> str:
        return repr(self.layer)


def _at(place: str, layer: Layer) -> Layer:
    if isinstance(layer, _At):
        layer = layer.layer
    return layer if layer.place == place else cast(Layer, _At(place, layer))
