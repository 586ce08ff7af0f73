"""The layers of a service config: each stands where its kind stands, and looks at a call's method first."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar, Self

import anyio

from ...core.context import VAR
from ...core.deadlines import passed
from ...core.env import Env
from ...core.errors import ConnectError, NoEndpoints, ResolutionError
from ...core.service import Filter, Service
from ...core.stack import Layer, Layers
from ...filters.retry import Retry
from ...filters.timeout import DEFAULT_TOTAL, TotalTimeout
from ..inbound import PREFIX
from ..status import excess, status_of
from .channel import CallTimeout
from .copies import Copies
from .methodconfig import MethodConfig, Retries, ServiceConfig, Throttling

__all__ = ["ExponentialBackoff", "Tokens", "layers_of"]

FIRST_PAUSE, LAST_PAUSE = 0.1, 1.0
"""Seconds between looks for an endpoint, of a call that waits for one."""


class ExponentialBackoff:
    """gRFC A6: uniform between 0 and ``first``, times ``multiplier`` for each try, up to ``last``. Seconds."""

    def __init__(self, first: float, last: float, multiplier: float) -> None:
        self.first, self.last, self.multiplier = first, last, multiplier

    def delay(self, n: int, rng: random.Random, previous: float = 0.0) -> float:
        """Before try ``n + 1``."""
        most = self.first
        for _ in range(n - 1):  # not a power, which overflows where a product is infinite
            most *= self.multiplier
        return rng.uniform(0, min(most, self.last))

    def __repr__(self) -> str:
        return f"up to {self.first:g} s, times {self.multiplier:g}, at most {self.last:g} s"


class Tokens:
    """``retryThrottling``: a failure takes one token, a success gives some back; retries need more than half of them.

    Args:
        throttling: How many, and how many for a success.
    """

    __slots__ = ("_most", "_ratio", "left")

    def __init__(self, throttling: Throttling) -> None:
        self._most, self._ratio = throttling.tokens, throttling.ratio
        self.left = throttling.tokens

    def failed(self) -> bool:
        """A try failed. May there be another?"""
        self.left = max(0.0, self.left - 1)
        return self.allows

    def succeeded(self) -> None:
        """A try succeeded."""
        self.left = min(self._most, self.left + self._ratio)

    @property
    def allows(self) -> bool:
        """May there be another try?"""
        return self.left > self._most / 2


class _Shared:
    """The tokens of one client, which retries and copies share."""

    def __init__(self, config: ServiceConfig) -> None:
        self.tokens = None if config.throttling is None else Tokens(config.throttling)


def _tokens(env: Env, config: ServiceConfig) -> Tokens | None:
    return env.shared(_Shared, lambda: _Shared(config)).tokens


class _Partial(Filter[Any, Any, Any, Any]):
    """Speaks for the methods that a config names. The others have the layer that would stand here without it.

    Args:
        config: The config.
        env: The client's.
        usual: That other layer; ``None`` for the client's own default.
    """

    def __init__(self, config: ServiceConfig, env: Env | None = None, usual: Layer | None = None) -> None:
        self._config, self._given = config, usual
        self._else: Any = None

    def keep_usual(self, usual: Layer) -> Self:
        """The same, with ``usual`` for the methods of which nothing is said."""
        return type(self)(self._config, None, usual)

    def _default(self) -> Layer | None:
        """What stands at this place of a client that is told nothing."""
        return None

    def _usual(self) -> Layer | None:
        return self._default() if self._given is None else self._given

    def build(self, env: Env, service: Any) -> Any:
        """On the client's clock, and with its budget."""
        made, usual = type(self)(self._config, env, self._given), self._usual()
        made._else = service if usual is None else usual.build(env, service)
        return made.bind(service)

    @property
    def keeps_deadline(self) -> bool:
        """As the usual layer does; those of a client that is told nothing do."""
        return self._given is None or bool(getattr(self._given, "keeps_deadline", False))

    def _or_else(self, service: Any) -> Any:
        return service if self._else is None else self._else

    def _shown(self, what: str) -> str:
        return f"{self.place}(by method: {what}{'' if self._given is None else f'; else {self._given!r}'})"


class _Timeouts(_Partial):
    """A limit for each method that has one."""

    place: ClassVar[str] = "timeout"

    def __init__(self, config: ServiceConfig, env: Env | None = None, usual: Layer | None = None) -> None:
        super().__init__(config, env, usual)
        self._limits = {
            own.timeout: TotalTimeout(own.timeout, env) for own in config.methods.values() if own.timeout is not None
        }

    def _default(self) -> Layer:
        return CallTimeout(DEFAULT_TOTAL)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Run the call until its time is over."""
        own = self._config.of(request.dest)
        if own is not None and own.timeout is not None:
            return await self._limits[own.timeout].apply(request, service)
        return await self._or_else(service)(request)

    def __repr__(self) -> str:
        return self._shown(", ".join(f"{seconds:g} s" for seconds in self._limits))


class _Limits(Filter[Any, Any, Any, Any]):
    """Sizes of messages, and patience."""

    place: ClassVar[str] = "filters"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, config: ServiceConfig, env: Env | None = None) -> None:
        self._config = config
        self._env = env or Env()

    def build(self, env: Env, service: Any) -> Any:
        """On the client's clock."""
        return type(self)(self._config, env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Make the call if it may be made."""
        own = self._config.of(request.dest)
        if own is None:
            return await service(request)
        if own.max_reply is not None:
            request.max_reply = min(request.max_reply, own.max_reply)
        request.max_request = own.max_request
        # A client's stream that is opened again begins with several messages, each of which has passed.
        one = request.message is not None
        if one and own.max_request is not None and len(request.data) - PREFIX > own.max_request:
            raise too_large(len(request.data) - PREFIX, own.max_request)
        return await (self._patiently(request, service) if own.patient else service(request))

    async def _patiently(self, request: Any, service: Service[Any, Any]) -> Any:
        """Wait for an endpoint as long as there is time."""
        pause, clock, deadline = FIRST_PAUSE, self._env.clock, VAR.get().deadline
        while True:
            try:
                return await service(request)
            except (NoEndpoints, ResolutionError, ConnectError):
                left = LAST_PAUSE if deadline is None else deadline - clock.now()
                if left <= 0 or passed(deadline, clock):
                    raise
                await anyio.sleep(min(left, self._env.rng.uniform(pause / 2, pause)))
                pause = min(LAST_PAUSE, 2 * pause)

    def __repr__(self) -> str:
        return f"service_config({len(self._config.methods)} entries)"


def too_large(size: int, most: int) -> Exception:
    """The error of a message that may not be sent."""
    return excess(f"a message of {size} bytes is larger than the {most} that the service config allows", sent=False)


class _Retries(_Partial):
    """A policy for each method that has one, and the client's own retries for the others."""

    place: ClassVar[str] = "retry"

    def __init__(self, config: ServiceConfig, env: Env | None = None, usual: Layer | None = None) -> None:
        super().__init__(config, env, usual)
        self._tokens = None if env is None else _tokens(env, config)
        self._of: dict[Retries, Retry] = {}
        for own in config.methods.values():
            if own.retries is not None:
                wait = ExponentialBackoff(own.retries.first, own.retries.last, own.retries.multiplier)
                self._of[own.retries] = Retry(own.retries.attempts, self._wants(own.retries), wait, env=env)

    def _wants(self, policy: Retries) -> Callable[[Any], bool]:
        def wants(error: Any) -> bool:
            if status_of(error) not in policy.statuses:
                return False
            return self._tokens is None or self._tokens.failed()

        return wants

    def _default(self) -> Layer:
        return Retry()

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Make the call, again if its method's policy says so."""
        own = self._config.of(request.dest)
        if own is not None and own.hedging is not None:
            return await service(request)  # copies are its retries
        if own is None or own.retries is None:
            reply = await self._or_else(service)(request)
        else:
            request.idempotent = not request.method.cardinality.client_streaming
            reply = await self._of[own.retries].apply(request, service)
        if self._tokens is not None:
            self._tokens.succeeded()
        return reply

    def __repr__(self) -> str:
        policies = "; ".join(
            f"{sorted(s.name for s in policy.statuses)}, {policy.attempts} tries" for policy in self._of
        )
        return self._shown(policies)


class _Hedges(_Partial):
    """Copies for each method that has a policy for them."""

    place: ClassVar[str] = "hedge"

    def __init__(self, config: ServiceConfig, env: Env | None = None, usual: Layer | None = None) -> None:
        super().__init__(config, env, usual)
        tokens = None if env is None else _tokens(env, config)
        self._of = {
            own.hedging: Copies(own.hedging, tokens, env or Env())
            for own in config.methods.values()
            if own.hedging is not None
        }

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Make the call, and copies if its method's policy says so."""
        own = self._config.of(request.dest)
        if own is None or own.hedging is None:
            return await self._or_else(service)(request)
        if request.method.cardinality.client_streaming:
            return await service(request)
        return await self._of[own.hedging].apply(request, service)

    def __repr__(self) -> str:
        shown = "; ".join(f"{policy.attempts} copies, {policy.delay:g} s apart" for policy in self._of)
        return self._shown(shown)


def layers_of(config: ServiceConfig) -> Layers:
    """The layers that a config asks for."""
    said: tuple[MethodConfig, ...] = tuple(config.methods.values())
    layers: list[Layer] = []
    if any(own.timeout is not None for own in said):
        layers.append(_Timeouts(config))
    if any(own.patient or own.max_request is not None or own.max_reply is not None for own in said):
        layers.append(_Limits(config))
    if config.throttling is not None or any(own.retries or own.hedging for own in said):
        layers.append(_Retries(config))
    if any(own.hedging for own in said):
        layers.append(_Hedges(config))
    return Layers(*layers)
