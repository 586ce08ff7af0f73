"""Packages whose parts are loaded when they are first touched, since each needs others that not everybody has."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .errors import ConfigurationError

__all__ = ["part_of"]


def part_of(
    package: str, where: Mapping[str, tuple[str, str]], name: str, needs: Callable[[str], tuple[str, str]]
) -> Any:
    """What the module-level ``__getattr__`` of ``package`` gives; the next time it is found at once.

    Args:
        package: Its name.
        where: The module, relative to it, and the name there, for each attribute.
        name: Which attribute.
        needs: For a package that is missing: what needs it, and the extra that has it.

    Raises:
        AttributeError: There is no such attribute.
        ConfigurationError: Its module needs a package that is not installed.
    """
    if name not in where:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module, attribute = where[name]
    try:
        value = getattr(importlib.import_module(module, package), attribute)
    except ModuleNotFoundError as error:
        guest = (error.name or "").partition(".")[0]
        if guest == "meshlib":
            raise
        who, extra = needs(guest)
        raise ConfigurationError(
            f"{who} needs {guest}, which is not installed: pip install 'meshlib-rpc[{extra}]'"
        ) from error
    setattr(sys.modules[package], name, value)
    return value
