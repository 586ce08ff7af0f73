"""gRPC's service config: the JSON that teams have, read into layers (gRFC A6, grpc/doc/service_config.md). Pure.

=============================  ======================================================================================
``timeout``                    the limit of the method's calls, streams included; the caller's own may be nearer
``waitForReady``               wait for an endpoint as long as there is time, not the usual three seconds
``maxRequestMessageBytes``     larger messages are not sent: RESOURCE_EXHAUSTED
``maxResponseMessageBytes``    larger ones are not read: the same; the channel's own limit holds as well
``retryPolicy``                which statuses are tried again, how often and when; it is also the word that they may be
``hedgingPolicy``              copies, sent ``hedgingDelay`` apart, until one succeeds or fails for good
``retryThrottling``            no retries and no copies while more than half of the tokens are gone
=============================  ======================================================================================

The most specific name counts: a method, then its service, then ``{}``. Methods of which no entry says anything keep the
client's own timeout, retries and hedging: those that were given with the config, in either order, else the defaults.
The client's retry budget holds in every case. ``loadBalancingConfig`` and ``healthCheckConfig``
are passed over: a balancer is given as a layer. What cannot be read is refused, with where it stands.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from grpclib.const import Status

from ...core.errors import ConfigurationError, shown
from ...core.stack import Layers

__all__ = [
    "Hedging", "MethodConfig", "Retries", "ServiceConfig", "Throttling", "beside", "parse", "service_config",
]  # fmt: skip

MOST_ATTEMPTS: Final = 5
"""gRFC A6: a larger ``maxAttempts`` means this."""
MOST_TOKENS: Final = 1000
_DURATION: Final = re.compile(r"(-?[0-9]{1,12})(\.[0-9]{1,9})?s")


@dataclass(frozen=True, slots=True)
class Retries:
    """A ``retryPolicy``; times in seconds."""

    attempts: int
    first: float
    last: float
    multiplier: float
    statuses: frozenset[Status]


@dataclass(frozen=True, slots=True)
class Hedging:
    """A ``hedgingPolicy``; times in seconds."""

    attempts: int
    delay: float
    passing: frozenset[Status]


@dataclass(frozen=True, slots=True)
class Throttling:
    """``retryThrottling``."""

    tokens: float
    ratio: float


@dataclass(frozen=True, slots=True)
class MethodConfig:
    """What is said of some methods; ``None`` where nothing is."""

    timeout: float | None = None
    patient: bool = False
    max_request: int | None = None
    max_reply: int | None = None
    retries: Retries | None = None
    hedging: Hedging | None = None


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """A whole config. Keys are ``/pkg.Service/Method``, ``/pkg.Service/``, and the empty text for all."""

    methods: Mapping[str, MethodConfig]
    throttling: Throttling | None = None

    def of(self, path: str) -> MethodConfig | None:
        """What is said of the method at that path."""
        found = self.methods.get(path)
        if found is None:
            found = self.methods.get(path[: path.rfind("/") + 1])
        return self.methods.get("") if found is None else found


class _Place:
    """A value, and where it stands, for messages."""

    def __init__(self, value: Any, where: str) -> None:
        self.value, self.where = value, where

    def wrong(self, wanted: str) -> ConfigurationError:
        return ConfigurationError(f"service config, {self.where}: {json.dumps(self.value)[:100]}, expected {wanted}")

    def fields(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return self.value

    def get(self, name: str) -> _Place | None:
        value = self.fields().get(name)
        return None if value is None else _Place(value, f"{self.where}.{name}")

    def must(self, name: str) -> _Place:
        found = self.get(name)
        if found is None:
            raise ConfigurationError(f"service config, {self.where}: {name} is missing")
        return found

    def items(self, *, least: int = 0) -> list[_Place]:
        if not isinstance(self.value, list) or len(self.value) < least:
            raise self.wrong("a list" if not least else "a list that is not empty")
        return [_Place(value, f"{self.where}[{i}]") for i, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.wrong("a text")
        return self.value

    def number(self, wanted: str, least: float, most: float = math.inf) -> float:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float) or not least < value <= most:
            raise self.wrong(wanted)
        try:
            value = float(value)
        except OverflowError:
            raise self.wrong(wanted) from None
        if math.isinf(value):
            raise self.wrong(wanted)
        return value

    def whole(self, wanted: str, least: int) -> int:
        # Numbers of 64 bits are texts in protobuf's JSON.
        value = (
            int(self.value) if isinstance(self.value, str) and re.fullmatch("[0-9]{1,18}", self.value) else self.value
        )
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(wanted)
        return value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def seconds(self, *, zero: bool = False) -> float:
        match = _DURATION.fullmatch(self.value) if isinstance(self.value, str) else None
        seconds = -1.0 if match is None else float(self.value[:-1])
        if not (seconds > 0 or (zero and seconds == 0)):
            raise self.wrong('a duration such as "0.1s"')
        return seconds

    def statuses(self) -> frozenset[Status]:
        return frozenset(item.status() for item in self.items())

    def status(self) -> Status:
        if isinstance(self.value, int) and not isinstance(self.value, bool) and 0 <= self.value <= 16:
            return Status(self.value)
        if isinstance(self.value, str) and self.value.upper() in Status.__members__:
            return Status[self.value.upper()]
        raise self.wrong("the name of a status, such as UNAVAILABLE")


def parse(config: Mapping[str, Any]) -> ServiceConfig:
    """Read a config that has been JSON.

    Raises:
        ConfigurationError: It cannot be read; says where and why.
    """
    top = _Place(dict(config), "top")
    methods: dict[str, MethodConfig] = {}
    entries = top.get("methodConfig")
    for entry in [] if entries is None else entries.items():
        own = _method_config(entry)
        for name in entry.must("name").items(least=1):
            key = _key(name)
            if key in methods:
                raise name.wrong("a name that no other entry has")
            methods[key] = own
    throttling = top.get("retryThrottling")
    return ServiceConfig(methods, None if throttling is None else _throttling(throttling))


def _key(name: _Place) -> str:
    service, method = name.get("service"), name.get("method")
    service_name = "" if service is None else service.text()
    method_name = "" if method is None else method.text()
    if method_name and not service_name:
        raise name.wrong("a service beside the method")
    if "/" in service_name or "/" in method_name:
        raise name.wrong('names without slashes, such as "shop.Users"')
    return f"/{service_name}/{method_name}" if service_name else ""


def _method_config(entry: _Place) -> MethodConfig:
    timeout, patient = entry.get("timeout"), entry.get("waitForReady")
    request, reply = entry.get("maxRequestMessageBytes"), entry.get("maxResponseMessageBytes")
    retries, hedging = entry.get("retryPolicy"), entry.get("hedgingPolicy")
    if retries is not None and hedging is not None:
        raise hedging.wrong("no hedgingPolicy beside a retryPolicy (gRFC A6: one of the two)")
    return MethodConfig(
        None if timeout is None else timeout.seconds(),
        patient is not None and patient.flag(),
        None if request is None else request.whole("a number of bytes", 0),
        None if reply is None else reply.whole("a number of bytes", 0),
        None if retries is None else _retries(retries),
        None if hedging is None else _hedging(hedging),
    )


def _attempts(policy: _Place) -> int:
    return min(policy.must("maxAttempts").whole("a whole number above 1", 2), MOST_ATTEMPTS)


def _retries(policy: _Place) -> Retries:
    codes = policy.must("retryableStatusCodes")
    statuses = codes.statuses()
    if not statuses or Status.OK in statuses:
        raise codes.wrong("a list of statuses that are failures, and not empty")
    return Retries(
        _attempts(policy),
        policy.must("initialBackoff").seconds(),
        policy.must("maxBackoff").seconds(),
        policy.must("backoffMultiplier").number("a number above 0", 0),
        statuses,
    )


def _hedging(policy: _Place) -> Hedging:
    delay, codes = policy.get("hedgingDelay"), policy.get("nonFatalStatusCodes")
    return Hedging(
        _attempts(policy),
        0.0 if delay is None else delay.seconds(zero=True),
        frozenset() if codes is None else codes.statuses(),
    )


def _throttling(place: _Place) -> Throttling:
    tokens = place.must("maxTokens").number(f"a number above 0, at most {MOST_TOKENS}", 0, MOST_TOKENS)
    ratio = place.must("tokenRatio").number("a number above 0", 0)
    # gRFC A6: decimal places beyond three are ignored.
    thousandths = int(ratio * 1000)
    if not thousandths:
        raise place.must("tokenRatio").wrong("a number of 0.001 or more")
    return Throttling(tokens, thousandths / 1000)


def service_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> Layers:
    """Layers that do what a gRPC service config says: ``Channel(target, *service_config("config.json"))``.

    Args:
        config: JSON as a text, the path of a file with it, or what it has been read into.

    Raises:
        ConfigurationError: It cannot be read; says where and why.
    """
    from .configured import layers_of

    if isinstance(config, Mapping):
        return layers_of(parse(config))
    text = config.lstrip("\ufeff \t\r\n") if isinstance(config, str) else ""
    if not text.startswith("{"):
        try:
            text = Path(config).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"service config {os.fspath(config)!r}: {error}") from error
    try:
        read = json.loads(text, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigurationError(f"service config: no JSON: {error}") from error
    if not isinstance(read, dict):
        raise ConfigurationError(f"service config: {json.dumps(read)[:100]}, expected an object")
    return layers_of(parse(read))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1)
        raise ConfigurationError(f"service config: {shown(twice)!r} is said twice in one object")
    return fields


def beside(layers: Iterable[Any]) -> list[Any]:
    """The layers of a client, where one that speaks for some methods alone has what else was given for the rest."""
    flat = list(_flat(layers))
    partial = {layer.place for layer in flat if hasattr(layer, "keep_usual")}
    usual = {layer.place: layer for layer in flat if getattr(layer, "place", None) in partial and _is_usual(layer)}
    return [
        layer.keep_usual(usual[layer.place]) if hasattr(layer, "keep_usual") and layer.place in usual else layer
        for layer in flat
        if not (_is_usual(layer) and getattr(layer, "place", None) in usual)
    ]


def _flat(layers: Iterable[Any]) -> Iterator[Any]:
    for layer in layers:
        if isinstance(layer, Layers):
            yield from _flat(layer)
        else:
            yield layer


def _is_usual(layer: Any) -> bool:
    return not hasattr(layer, "keep_usual") and not isinstance(layer, type)
