"""A scenario in a TOML file. ``docs/simulator.md`` has the reference; the fields are those of ``scenario.py``.

What stands in ``[clients]``, ``[servers]`` or ``[servers.calls]`` and is no field of theirs is a layer, by the name of
the public function that makes it: ``retry.attempts = 3`` is ``meshlib.retry(attempts=3)``, ``balance = "round_robin"``
is ``meshlib.balance(meshlib.round_robin())``, and ``retry = false`` leaves the place empty.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Final, TypeVar

import meshlib

from ..client import PLACES as CLIENT_PLACES
from ..client import default_layers as client_layers
from ..core.errors import ConfigurationError
from ..core.stack import Layer, Layers, Stack
from ..server import PLACES as SERVER_PLACES
from ..server import default_layers as server_layers
from .faults import Fault, add, black_hole, crash, errors, hang, remove, restart, slow
from .latency import Latency, constant, exponential, lognormal, pareto, replayed, uniform
from .scenario import Calls, Clients, Load, Scenario, Servers
from .words import Words, call, check_keys, complain, invoke, read

__all__ = ["load_scenario", "scenario_of"]

T = TypeVar("T")

FAULTS: Final[Words] = {each.__name__: each for each in (add, black_hole, crash, errors, hang, remove, restart, slow)}
NO_WORDS: Final = ("client", "current", "filter", "remaining", "resolve", "rpc", "serve", "use")
"""Public functions that make no part of a stack."""
PYTHON_ONLY: Final = ("during", "handler", "stack", "layers", "calls")
"""Fields that only Python can fill, or that a table of their own does."""


def load_scenario(path: str | Path) -> Scenario:
    """The scenario in the TOML file at ``path``. Files that it names are looked for beside it.

    Raises:
        ConfigurationError: It cannot be read, or something in it makes no sense; says where, and what would be right.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise complain(str(path), str(error)) from error
    try:
        return scenario_of(data, path.parent)
    except ConfigurationError as error:
        raise complain(str(path), error.message) from error


def scenario_of(data: Mapping[str, Any], folder: Path = Path()) -> Scenario:
    """The scenario that ``data`` (a TOML file, read) says.

    Args:
        data: What the file says.
        folder: Where the files are that it names.

    Raises:
        ConfigurationError: Something in it makes no sense.
    """
    times = _latencies(folder)
    known = [*_fields(Scenario), "servers", "clients", "load", "faults"]
    check_keys("", data, known)
    given: dict[str, Any] = {key: data[key] for key in _fields(Scenario) if key in data}
    if "network" in given:
        given["network"] = read("network", given["network"], times)
    if "windows" in given:
        given["windows"] = read("windows", given["windows"], {})
    for part in ("servers", "load"):
        if part not in data:
            raise complain(part, f"a scenario needs a table [{part}]")
    given["servers"] = [_servers(where, table, times) for where, table in _tables("servers", data["servers"])]
    given["clients"] = [_clients(where, table) for where, table in _tables("clients", data.get("clients", {}))]
    given["load"] = [_plain(where, Load, table) for where, table in _tables("load", data["load"])]
    given["faults"] = [_fault(where, table) for where, table in _tables("faults", data.get("faults", []))]
    return _make("scenario", Scenario, given)


def _fields(kind: type[Any]) -> list[str]:
    parts = ("servers", "clients", "load", "faults") if kind is Scenario else ()
    return [field.name for field in fields(kind) if field.name not in (*PYTHON_ONLY, *parts)]


def _tables(where: str, value: Any) -> list[tuple[str, dict[str, Any]]]:
    """``[where]``, or each of ``[[where]]``, with what to call it in complaints."""
    several = [(f"{where}[{n}]", each) for n, each in enumerate(value)] if isinstance(value, list) else [(where, value)]
    for name, each in several:
        if not isinstance(each, dict):
            raise complain(name, f"{each!r} is no table; write [{where}], or [[{where}]] for several")
    return several


def _make(where: str, kind: type[T], given: Mapping[str, Any]) -> T:
    for field in fields(kind):  # type: ignore[arg-type]  # every kind is a dataclass
        if field.default is MISSING and field.default_factory is MISSING and field.name not in given:
            raise complain(where, f"{field.name} is missing")
    try:
        return kind(**given)
    except ConfigurationError as error:
        raise complain(where, error.message) from error
    except (TypeError, AttributeError) as error:
        raise complain(where, f"something is not of the kind that it should be: {error}") from error


def _plain(where: str, kind: type[T], table: Mapping[str, Any]) -> T:
    check_keys(where, table, _fields(kind))
    return _make(where, kind, table)


# --- stacks -----------------------------------------------------------------------------------------------------------


@functools.cache
def _words() -> Words:
    """The public functions of the library that make layers, or parts of them."""
    found = {name: getattr(meshlib, name) for name in meshlib.__all__ if name.islower() and name not in NO_WORDS}
    return {name: thing for name, thing in found.items() if callable(thing) and not isinstance(thing, type)}


def _client_stack() -> Stack:
    return Stack(CLIENT_PLACES, client_layers())


def _server_stack() -> Stack:
    return Stack(SERVER_PLACES, server_layers())


def _split(where: str, kind: type[Any], table: Mapping[str, Any], stack: Stack) -> dict[str, Any]:
    """The fields of ``kind`` in a table, and the layers that the rest of it stands for."""
    known = _fields(kind)
    words = _words()
    extra = ["calls"] if kind is Servers else []
    check_keys(where, table, [*known, *extra, *words, *stack.places], "setting or layer")
    layers: list[Any] = []
    empty: list[str] = []
    for key, value in table.items():
        if key in known or key in extra:
            continue
        path = f"{where}.{key}"
        if value is False:
            empty += [key] if key in stack.places else _places(path, words[key])
            continue
        if key not in words:
            raise complain(path, "this is a place in the stack; it can only be left empty, by false")
        layer = call(path, words[key], value, words)
        try:
            stack = stack.with_layers(layer)
        except ConfigurationError as error:
            raise complain(path, error.message) from error
        layers.append(layer)
    given = {key: table[key] for key in known if key in table}
    if layers:
        given["layers"] = tuple(layers)
    if empty:
        given["stack"] = functools.partial(_emptied, places=tuple(empty))
    return given


def _places(where: str, function: Callable[..., Any]) -> list[str]:
    """Where the layers that ``function`` makes stand."""
    try:
        layer = function()
    except (TypeError, ConfigurationError):
        raise complain(where, "it cannot be left out by this name; use that of its place in the stack") from None
    return [each.place for each in (layer if isinstance(layer, Layers) else (layer,)) if isinstance(each, Layer)]


def _emptied(stack: Stack, places: tuple[str, ...]) -> Stack:
    for place in places:
        stack = stack.remove(place)
    return stack


def _clients(where: str, table: Mapping[str, Any]) -> Clients:
    return _make(where, Clients, _split(where, Clients, table, _client_stack()))


def _servers(where: str, table: Mapping[str, Any], times: Words) -> Servers:
    given = _split(where, Servers, table, _server_stack())
    if "latency" in given:
        given["latency"] = read(f"{where}.latency", given["latency"], times)
    if "calls" in table:
        path = f"{where}.calls"
        [(_, calls)] = _tables(path, table["calls"])
        given["calls"] = _make(path, Calls, _split(path, Calls, calls, _client_stack()))
    return _make(where, Servers, given)


# --- times and faults -------------------------------------------------------------------------------------------------


def _latencies(folder: Path) -> Words:
    def replayed_here(source: str, unit: float = 1.0) -> Latency:
        return replayed(folder / source, unit)

    models = (constant, exponential, lognormal, pareto, uniform)
    return {**{model.__name__: model for model in models}, "replayed": replayed_here}


def _fault(where: str, table: Mapping[str, Any]) -> Fault:
    kind = table.get("fault")
    if not isinstance(kind, str) or kind not in FAULTS:
        raise complain(f"{where}.fault", f"{kind!r} is none; there are {', '.join(sorted(FAULTS))}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "fault"}
    made: Fault = invoke(where, FAULTS[kind], **given)
    return made
