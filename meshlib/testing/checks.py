"""Checks of what users give: each says what was given, and what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.errors import ConfigurationError

__all__ = ["number", "one_of", "whole"]


def number(what: str, value: Any, above: float | None = None) -> None:
    """A number of 0 or more, or above another.

    Raises:
        ConfigurationError: It is not.
    """
    good = not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < 1e9
    if not good or (above is not None and not value > above):
        limit = f"above {above:g}" if above is not None else "0 or more"
        raise ConfigurationError(f"{what}={value!r}: give a number, {limit}")


def whole(what: str, value: Any, least: int) -> None:
    """A whole number, so large at least.

    Raises:
        ConfigurationError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{what}={value!r}: give a whole number, {least} or more")


def one_of(what: str, value: Any, choices: Sequence[str]) -> None:
    """One of these words.

    Raises:
        ConfigurationError: It is not.
    """
    if value not in choices:
        raise ConfigurationError(f"{what}={value!r}: there are {', '.join(map(repr, choices))}")
