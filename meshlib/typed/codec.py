"""Arguments, results and declared exceptions as bytes, in a `Format`, checked against their declared types.

Arguments travel as a map by name, and only those that the caller gave: a server that knows more parameters fills in
its defaults, one that knows fewer passes over what it does not know. That is what lets either side add an optional
parameter first.

A declared exception travels as the fields of its dataclass, or as its ``args`` and attributes.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from typing import Any, Final, get_type_hints

import msgspec

from ..core.errors import ConfigurationError, InvalidArgument, InvalidReply
from .contract import Method
from .formats import MSGPACK, Format

__all__ = ["ExceptionCodec", "MethodCodec"]

_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_UNFIT: Final = (msgspec.MsgspecError, ValueError, RecursionError)
"""What bytes that do not fit raise: msgspec's own errors, those of the types it fills, and too deep a nesting."""
UNPROCESSABLE: Final = 422
"""What a declared exception is over HTTP if it does not say: an answer, no failure of the server (RFC 9110 15.5.21)."""
_IMMUTABLE: Final = (type(None), bool, int, float, str, bytes)


def _located(error: Exception) -> tuple[str, str]:
    """What msgspec says, and where: ``Expected `int`, got `str```, ``items[0].age``."""
    match = _AT.match(str(error))
    what, path = (match["what"], match["path"] or "") if match else (str(error), "")
    path = path.removeprefix("$").removeprefix(".")
    if what[1:2].islower():  # not of "JSON is malformed"
        what = what[:1].lower() + what[1:]
    return what, "" if path.startswith("key") else path


class MethodCodec:
    """Between one method's calls and bytes.

    Args:
        method: The method.
        form: The bytes.

    Attributes:
        arguments: Its parameters as a type of msgspec's, a field each.

    Raises:
        ConfigurationError: A type in its signature is none that the format can carry.
    """

    __slots__ = ("_arguments", "_encode", "_names", "_required", "_result", "arguments", "exceptions", "method")

    def __init__(self, method: Method, form: Format = MSGPACK) -> None:
        self.method = method
        self._encode = form.encode
        fields: list[Any] = []
        for p in method.signature.parameters.values():
            kind = method.hints.get(p.name, Any)
            fields.append((p.name, kind) if p.default is p.empty else (p.name, kind, _default(p.default)))
        try:
            self.arguments = msgspec.defstruct(f"{method.service}_{method.name}", fields, kw_only=True)
            self._arguments = form.decoder(self.arguments)
            self._result = form.decoder(method.hints.get("return", Any))
        except TypeError as error:
            raise ConfigurationError(f"{method}: {error}") from error
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self._names = [p.name for p in method.signature.parameters.values() if p.kind is positional]
        self._required = frozenset(p.name for p in method.signature.parameters.values() if p.default is p.empty)
        self.exceptions = {kind.__name__: ExceptionCodec(kind, form) for kind in method.raises}

    def encode_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """What the caller wrote between the parentheses.

        Raises:
            TypeError: Too many, too few, or unknown arguments, as for a call in the process.
            InvalidArgument: One does not fit its declared type.
        """
        given = dict(zip(self._names, args, strict=False))
        if kwargs:
            given.update(kwargs)
        if len(args) + len(kwargs) != len(given) or not self._required <= given.keys():
            self._misfit(args, kwargs)
        try:
            body = self._encode(given)
            self._arguments.decode(body)
        except (TypeError, OverflowError, *_UNFIT) as error:
            what, path = _located(error)
            raise self._invalid(what, path or self._culprit(given)) from error
        if kwargs and not kwargs.keys() <= self.method.signature.parameters.keys():
            self._misfit(args, kwargs)
        return body

    def _culprit(self, given: dict[str, Any]) -> str:
        """The argument that cannot be sent at all; what cannot be received is located already."""
        for name, value in given.items():
            try:
                self._encode(value)
            except (TypeError, OverflowError, *_UNFIT):
                return name
        return ""

    def _misfit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self.method.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.method}(): {error}") from None

    def _invalid(self, what: str, path: str) -> InvalidArgument:
        return InvalidArgument(f"{self.method}(): {path + ': ' if path else ''}{what}", path=path)

    def decode_arguments(self, body: bytes) -> dict[str, Any]:
        """The arguments, by name, with this side's defaults for those that were not given.

        Raises:
            InvalidArgument: They do not fit; ``path`` says where.
        """
        try:
            return msgspec.structs.asdict(self._arguments.decode(body))
        except _UNFIT as error:
            what, path = _located(error)
            raise self._invalid(what, path) from error

    def encode_texts(self, texts: dict[str, str]) -> bytes:
        """The arguments, given as texts: those of a query string. What is not given is left to the handler's defaults.

        Raises:
            InvalidArgument: They do not fit; ``path`` says where.
        """
        try:
            converted = msgspec.convert(texts, self.arguments, strict=False)
            known = self.method.signature.parameters
            return self._encode({name: getattr(converted, name) for name in texts if name in known})
        except (TypeError, *_UNFIT) as error:
            what, path = _located(error)
            raise self._invalid(what, path) from error

    def encode_result(self, result: Any) -> bytes:
        """The handler's result.

        Raises:
            TypeError: It is of a type that the format cannot carry.
        """
        return self._encode(result)

    def decode_result(self, body: bytes) -> Any:
        """The result.

        Raises:
            InvalidReply: It is not what the contract declares.
        """
        try:
            return self._result.decode(body)
        except _UNFIT as error:
            what, path = _located(error)
            raise InvalidReply(f"{self.method}() answered with {path or 'a value'}: {what}", path=path) from error

    def exception_codec(self, error: Exception) -> ExceptionCodec | None:
        """How to send ``error``, if the method declares it or an ancestor of it."""
        for kind in type(error).__mro__:
            codec = self.exceptions.get(kind.__name__)
            if codec is not None and codec.kind is kind:
                return codec
        return None


def _default(value: Any) -> Any:
    if type(value) in _IMMUTABLE:
        return value
    # What one call may change must not be another's; anything else is passed as it is: its identity may count.
    changeable = isinstance(value, list | dict | set | bytearray | msgspec.Struct) or dataclasses.is_dataclass(value)
    return msgspec.field(default_factory=(lambda: copy.deepcopy(value)) if changeable else (lambda: value))


def _status(exception: Any, otherwise: int) -> int:
    status = getattr(exception, "status", None)
    plain = isinstance(status, int) and not isinstance(status, bool) and 400 <= status <= 599
    return int(status) if plain else otherwise  # type: ignore[arg-type]  # it is an int if plain


class ExceptionCodec:
    """Between instances of one exception class and bytes.

    Args:
        kind: The class. Its attribute ``status``, if it is an HTTP status of 400 to 599, is its status over HTTP; an
            instance may have another.
        form: The bytes.

    Attributes:
        kind: As given.
        fields: A dataclass's fields as a type of msgspec's; ``None`` for other classes.
        status: The class's status over HTTP.
    """

    __slots__ = ("_decoder", "_encode", "_hints", "_plain", "fields", "kind", "status")

    def __init__(self, kind: type[Exception], form: Format = MSGPACK) -> None:
        self.kind = kind
        self._encode = form.encode
        self._plain = form.decoder(tuple[list[Any], dict[str, Any]])
        try:
            self._hints = get_type_hints(kind)
        except Exception as error:
            raise ConfigurationError(f"exception {kind.__name__}: cannot resolve its annotations: {error}") from error
        self._decoder: Any = None
        self.fields: type[msgspec.Struct] | None = None
        self.status = _status(kind, UNPROCESSABLE)
        if dataclasses.is_dataclass(kind):
            fields = [(f.name, self._hints.get(f.name, Any)) for f in dataclasses.fields(kind) if f.init]
            self.fields = msgspec.defstruct(kind.__name__, fields, kw_only=True)
            self._decoder = form.decoder(self.fields)

    def status_of(self, error: Exception) -> int:
        """Its status over HTTP: its own, if it has one, or that of its class."""
        return _status(error, self.status)

    def encode(self, error: Exception) -> bytes:
        """Its fields.

        Raises:
            TypeError: One of them is of a type that the format cannot carry.
        """
        if self._decoder is not None:
            return self._encode({name: getattr(error, name) for name in self._decoder.type.__struct_fields__})
        fields = {k: v for k, v in vars(error).items() if not k.startswith("__")}
        return self._encode((error.args, fields))

    def decode(self, body: bytes) -> Exception:
        """The exception, as it was raised.

        Raises:
            InvalidReply: The bytes are no such exception.
        """
        try:
            if self._decoder is not None:
                return self.kind(**msgspec.structs.asdict(self._decoder.decode(body)))
            args, fields = self._plain.decode(body)
            error = self.kind.__new__(self.kind, *args)
            error.args = tuple(args)
            for name, value in fields.items():
                setattr(error, name, msgspec.convert(value, self._hints.get(name, Any)))
            return error
        except (TypeError, AttributeError, *_UNFIT) as error:
            raise InvalidReply(
                f"the server raised {self.kind.__name__}, in a form that does not fit it: {error}"
            ) from error
