"""httpx or httpx2, as one value: everything here is written once, over the module that the caller's client is of.

The two have the same classes, and none in common: httpx2's `AsyncClient` takes only httpx2's streams, and its callers
catch only httpx2's exceptions. `Core` holds one of them with the httpcore below it, and the classes that have to be
derived from its own: the body of a response, and errors that are both theirs and ours.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, Final

from ..core.errors import (
    ConfigurationError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidArgument,
    MeshError,
    NoEndpoints,
    ProtocolError,
    ResolutionError,
    ServiceClosed,
)

__all__ = ["Core", "core_of"]

_NAMES: Final[tuple[tuple[type[MeshError], str], ...]] = (
    (DeadlineExceeded, "ReadTimeout"),
    (ConnectionLost, "ReadError"),
    (InvalidArgument, "LocalProtocolError"),
    (ProtocolError, "RemoteProtocolError"),
    (NoEndpoints, "ConnectError"),
    (ResolutionError, "ConnectError"),
    (ServiceClosed, "ConnectError"),
    (MeshError, "ConnectError"),
)
"""What callers of httpx expect where httpcore has not already said it: the first that fits."""


class Core:
    """One of httpx and httpx2.

    Args:
        name: Which.

    Attributes:
        httpx: The module.
        httpcore: The one that it is built upon.

    Raises:
        ConfigurationError: It is not installed.
    """

    def __init__(self, name: str) -> None:
        try:
            self.httpx: Any = importlib.import_module(name)
            self.httpcore: Any = importlib.import_module(name.replace("httpx", "httpcore"))
        except ImportError as error:
            extra = "http" if name == "httpx" else name
            raise ConfigurationError(f"{name} is not installed: pip install 'meshlib-rpc[{extra}]'") from error
        self.name = name
        self._kinds: dict[tuple[type, type], type] = {}

    def is_request(self, request: Any) -> bool:
        """Is it one of this module's?"""
        return isinstance(request, self.httpx.Request)

    def error(self, error: MeshError, request: Any) -> Exception:
        """An exception that is both ``error`` and what httpx's own transport would have raised."""
        both = self.made(self._theirs(error), type(error), error.args)
        vars(both).update(vars(error))
        both.request = request
        both.__cause__ = error.__cause__
        return both  # type: ignore[no-any-return]

    def made(self, theirs: type, ours: type, args: tuple[Any, ...]) -> Any:
        """An exception that is of both types. Copied or pickled, it is made again by this."""
        kind = self._kinds.get((ours, theirs))
        if kind is None:

            def reduce(error: Any) -> Any:
                return _made, (self.name, theirs, ours, error.args), vars(error)

            kind = type(theirs.__name__, (theirs, ours), {"__module__": "meshlib.http", "__reduce__": reduce})
            self._kinds[ours, theirs] = kind
        both: Any = kind.__new__(kind, *args)
        both.args = args
        return both

    def _theirs(self, error: MeshError) -> type:
        cause: BaseException | None = error
        for _ in range(6):
            if type(cause).__name__ == "PoolFull":
                return self.httpx.PoolTimeout  # type: ignore[no-any-return]
            for kind in type(cause).__mro__:
                if kind.__module__.startswith(self.httpcore.__name__) and hasattr(self.httpx, kind.__name__):
                    found: type = getattr(self.httpx, kind.__name__)
                    return found
            if cause is not None:
                # That nobody is left is what the errors before it have led to; they have the better name.
                cause = cause.__cause__ or (cause.__context__ if isinstance(cause, NoEndpoints) else None)
        if isinstance(error, NoEndpoints | ResolutionError) and error.impatient:
            return self.httpx.ConnectTimeout  # type: ignore[no-any-return]
        name = next(name for kind, name in _NAMES if isinstance(error, kind))
        if name == "ReadTimeout" and error.attempts and all(map(_is_connect, error.attempts)):
            name = "ConnectTimeout"  # in all that time there was no connection
        return getattr(self.httpx, name)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"<Core of {self.name} {self.httpx.__version__}>"


def _is_connect(attempt: Any) -> bool:
    return str(attempt.outcome).startswith("ConnectError")


def _made(name: str, theirs: type, ours: type, args: tuple[Any, ...]) -> Any:
    return core_of(name).made(theirs, ours, args)


@functools.lru_cache(maxsize=2)
def _core(name: str) -> Core:
    return Core(name)


def core_of(module: ModuleType | str) -> Core:
    """The core of ``httpx`` or ``httpx2``, given as the module or its name.

    Raises:
        ConfigurationError: It is neither, or not installed.
    """
    name = module if isinstance(module, str) else module.__name__
    if name not in ("httpx", "httpx2"):
        raise ConfigurationError(f"{name!r}: expected httpx or httpx2")
    return _core(name)
