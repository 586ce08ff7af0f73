"""From what stands in a TOML file to calls of Python functions: ``{ lognormal = 0.1, sigma = 0.5 }`` is
``lognormal(0.1, sigma=0.5)``.

=======================================  =======================================
in the file                              the call
=======================================  =======================================
``"peak_ewma"``                          ``peak_ewma()``
``{ pareto = 0.01 }``                    ``pareto(0.01)``
``{ pareto = 0.01, shape = 2 }``         ``pareto(0.01, shape=2)``
``{ aperture = { coordinate = [3, 9] }`` ``aperture(coordinate=(3, 9))``
=======================================  =======================================

Anything else stands for itself; a list becomes a tuple. Every complaint names the key that it is about.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..core.errors import ConfigurationError

__all__ = ["Words", "call", "check_keys", "complain", "invoke", "parameters_of", "read"]

Words = Mapping[str, Callable[..., Any]]
"""The functions that a file may name."""


def complain(where: str, what: str) -> ConfigurationError:
    """An error about the key ``where``."""
    return ConfigurationError(f"{where}: {what}")


def check_keys(where: str, given: Iterable[str], known: Iterable[str], what: str = "setting") -> None:
    """Each key must be known.

    Raises:
        ConfigurationError: One is not; says which, which it might be meant to be, and which there are.
    """
    there = list(known)
    for key in given:
        if key not in there:
            near = difflib.get_close_matches(key, there, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            path = f"{where}.{key}" if where else key
            raise complain(path, f"there is no such {what}; {hint}there are {', '.join(sorted(there))}")


def parameters_of(function: Callable[..., Any]) -> list[str]:
    """The names of the parameters that a file may give to ``function``."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, each in inspect.signature(function).parameters.items() if each.kind in kinds]


def invoke(where: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function``; whatever it complains about is said of ``where``.

    Raises:
        ConfigurationError: It did not like what it was given.
    """
    name = getattr(function, "__name__", repr(function))
    known = parameters_of(function)
    check_keys(where, kwargs, known, f"parameter of {name}()")
    given = {*known[: len(args)], *kwargs}
    for needed, each in inspect.signature(function).parameters.items():
        if each.default is inspect.Parameter.empty and needed in known and needed not in given:
            raise complain(where, f"{needed} is missing; {name}() cannot do without it")
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise complain(where, str(getattr(error, "message", error))) from error


def read(where: str, value: Any, words: Words) -> Any:
    """What a value of the file stands for; see above."""
    if isinstance(value, str) and value in words:
        return invoke(where, words[value])
    if isinstance(value, list):
        return tuple(read(where, each, words) for each in value)
    if isinstance(value, dict):
        name = next((key for key in value if key in words), None)
        if name is not None:
            rest = {key: read(f"{where}.{key}", each, words) for key, each in value.items() if key != name}
            return call(f"{where}.{name}", words[name], value[name], words, rest)
        return {key: read(f"{where}.{key}", each, words) for key, each in value.items()}
    return value


def call(
    where: str, function: Callable[..., Any], value: Any, words: Words, more: Mapping[str, Any] | None = None
) -> Any:
    """``function`` called with what ``value`` says: a table of its parameters, ``true`` for none, or its first."""
    more = more or {}
    if value is True:
        return invoke(where, function, **more)
    if isinstance(value, dict) and not any(key in words and key not in parameters_of(function) for key in value):
        given = {key: read(f"{where}.{key}", each, words) for key, each in value.items()}
        return invoke(where, function, **given, **more)
    return invoke(where, function, read(where, value, words), **more)
