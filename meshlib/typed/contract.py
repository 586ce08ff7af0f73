"""``@rpc`` and the contract that it makes of a class.

The contract and its implementation may be one class, or the contract may be a plain class with ``...`` bodies, an ABC
or a Protocol that both sides share and the server's class inherits from. A service goes by the name of the class that
declares its methods, so a server offers an implementation under the names of all its contracts.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints, overload

from ..core.errors import ConfigurationError

__all__ = ["Method", "contracts_of", "methods_of", "rpc"]

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

MARK = "__meshlib_rpc__"


@dataclass(frozen=True, slots=True)
class _Mark:
    idempotent: bool
    raises: tuple[type[Exception], ...]


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a contract.

    Attributes:
        service: The contract's name.
        name: The method's.
        function: The function that was declared.
        signature: Its parameters, without ``self``.
        hints: The types of its parameters, and of its result under ``return``; `Any` where none is given.
        idempotent: May a call be processed twice without harm?
        raises: The exceptions that travel as themselves.
    """

    service: str
    name: str
    function: Callable[..., Any]
    signature: inspect.Signature
    hints: dict[str, Any]
    idempotent: bool
    raises: tuple[type[Exception], ...]

    @property
    def dest(self) -> str:
        """Its path on the wire."""
        return f"/{self.service}/{self.name}"

    def __str__(self) -> str:
        return f"{self.service}.{self.name}"


@overload
def rpc(function: F, /) -> F: ...
@overload
def rpc(
    *, idempotent: bool = False, raises: tuple[type[Exception], ...] | list[type[Exception]] = ()
) -> Callable[[F], F]: ...
def rpc(function: Any = None, /, *, idempotent: bool = False, raises: Any = ()) -> Any:
    """Let an async method be called from elsewhere.

    Args:
        function: The method, when the decorator is used bare.
        idempotent: May a call be processed twice without harm? Then clients retry it when it fails half-way.
        raises: Exceptions that the method declares: they arrive as themselves, with their fields. All others arrive
            as `RemoteError`, which tells nothing of the server's inside.

    Raises:
        ConfigurationError: The method cannot be called from elsewhere; says why.
    """
    declared = tuple(raises) if isinstance(raises, list | tuple) else (raises,)

    def mark(function: Any) -> Any:
        where = getattr(function, "__qualname__", repr(function))
        if not inspect.iscoroutinefunction(function):
            raise ConfigurationError(f"@rpc {where}: write it as `async def`; streams are not supported")
        for kind in declared:
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise ConfigurationError(f"@rpc {where}: raises={kind!r} is no exception class")
        names = [kind.__name__ for kind in declared]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"@rpc {where}: two exceptions of one name cannot be told apart: {names}")
        parameters = list(inspect.signature(function).parameters.values())
        if not parameters:
            raise ConfigurationError(f"@rpc {where}: expected a method, whose first parameter is self")
        for p in parameters[1:]:
            if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                raise ConfigurationError(f"@rpc {where}: parameter {p.name} must be one that can be given by name")
        setattr(function, MARK, _Mark(idempotent, declared))
        return function

    return mark if function is None else mark(function)


def contracts_of(kind: type) -> list[type]:
    """The classes in ``kind``'s ancestry that declare ``@rpc`` methods themselves, nearest first."""
    return [c for c in kind.__mro__ if any(hasattr(member, MARK) for member in vars(c).values())]


def methods_of(contract: type) -> dict[str, Method]:
    """The methods of a contract, its ancestors' included, by name.

    Raises:
        ConfigurationError: It has none, or an annotation cannot be understood.
    """
    methods: dict[str, Method] = {}
    declaring = contracts_of(contract)
    for name in dir(contract):
        # The nearest declaration counts. An override without a decorator keeps the declared contract.
        declared = next((vars(c)[name] for c in contract.__mro__ if hasattr(vars(c).get(name), MARK)), None)
        if declared is None:
            continue
        mark: _Mark = getattr(declared, MARK)
        function = inspect.unwrap(declared)
        try:
            hints = get_type_hints(function, include_extras=True)
        except Exception as error:
            raise ConfigurationError(
                f"{contract.__name__}.{name}: cannot resolve its annotations ({error}); types used by @rpc methods "
                "must be importable from the module that declares them"
            ) from error
        signature = inspect.signature(function)
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        service = contract if contract in declaring else next(c for c in declaring if hasattr(vars(c).get(name), MARK))
        methods[name] = Method(service.__name__, name, function, signature, hints, mark.idempotent, mark.raises)
    if not methods:
        raise ConfigurationError(f"{contract.__name__} has no @rpc methods")
    return methods
