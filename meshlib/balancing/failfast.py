"""Failfast: an endpoint that cannot be connected to is out at once, and is connected to again in the background.

A connect that fails says more than a request that fails: nothing at all is there. So one is enough. The endpoint is
busy until it is back, requests go elsewhere without having to find out, and those that were waiting for the connect are
failed as never sent, so that they go elsewhere as well. The same holds when a connection that was there ends.

This is the policy: how long to wait before the next connect. `meshlib.balancing.pool` does the connecting, and without
this layer it connects on demand alone.

How long depends on whether there is anywhere else to go:

* While another endpoint can serve, waits are uniform between 0 and 1 s, 2 s … 32 s, doubling with each failure. They
  are fully jittered, the first one too and also after a connection that merely ended, since the clients of a server
  that restarts lose their connections in the same moment and must not return in the same moment.
* While none can, nobody is helped by patience: waits are uniform between 0 and 0.1 s … 1 s. This is always so for a
  client of one endpoint. Those that were waiting longer when the last endpoint went are woken. What fails in this time
  does not lengthen the waits of the time after it, when some are back and should not have to carry the others' load.

Waits are short again after a connection has lasted `STEADY` seconds, not as soon as there is one: a server that accepts
and hangs up is no better than one that refuses. Finagle: service/FailFastFactory.scala (1 s to 32 s, switched off when
there is one endpoint, its first reconnect without jitter).
"""

from __future__ import annotations

import random
from typing import Any, ClassVar, Final

from ..core.backoff import Backoff, FullJitter
from ..core.env import Env
from ..core.errors import ConfigurationError
from ..core.health import Peers

__all__ = ["STEADY", "Failfast", "Waits", "failfast"]

FIRST_WAIT, LAST_WAIT = 1.0, 32.0
"""Seconds, while another endpoint can serve (Finagle's FailFastFactory)."""
FIRST_ALONE, LAST_ALONE = 0.1, 1.0
"""Seconds, while none can: ours. A client that has nothing else is back within a second of its server."""
STEADY: Final = 10.0
"""Seconds. A connection that lasted so long was a good one."""


class Failfast:
    """The layer. See `failfast`."""

    place: ClassVar[str] = "failfast"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, backoff: Backoff, alone: Backoff) -> None:
        self.backoff = backoff
        self.alone = alone

    def build(self, env: Env, below: Any) -> Any:
        """Nothing on the way of a request: the pool looks here for what to do when a connect fails."""
        env.params[Failfast] = self
        peers = env.shared(Peers, Peers)
        env.metrics.gauge("failfast/is_marked_dead", lambda: peers.downs)
        peers.join(env.health)
        env.closers.append(lambda: peers.leave(env.health))
        return below

    def __repr__(self) -> str:
        return f"failfast({_shown(self.backoff)}, alone={_shown(self.alone)})"


class Waits:
    """The waits of one endpoint, one after the other. Pure.

    Args:
        policy: How long they are.
        rng: Where jitter comes from.
    """

    __slots__ = ("_alone", "_failures", "_policy", "_previous", "_rng")

    def __init__(self, policy: Failfast, rng: random.Random) -> None:
        self._policy = policy
        self._rng = rng
        self._failures = self._alone = 0
        self._previous = 0.0

    def after_failure(self, alone: bool) -> float:
        """Seconds to wait after a connect that failed; ``alone`` if no endpoint can serve."""
        if alone:
            self._alone += 1
        else:
            self._failures += 1
        return self._draw(alone)

    def after_loss(self, lasted: float, alone: bool) -> float:
        """Seconds to wait after a connection that ended when it had lasted so long."""
        if lasted >= STEADY:
            self._failures = self._alone = 0
            self._previous = 0.0
            return self._draw(alone)
        return self.after_failure(alone)

    def hurried(self) -> float:
        """Seconds to wait when the last endpoint has gone that could serve."""
        return self._draw(True)

    def _draw(self, alone: bool) -> float:
        backoff, n = (self._policy.alone, self._alone) if alone else (self._policy.backoff, self._failures)
        self._previous = backoff.delay(max(1, n), self._rng, self._previous)
        return self._previous


def failfast(
    backoff: tuple[float, float] | Backoff = (FIRST_WAIT, LAST_WAIT),
    *,
    alone: tuple[float, float] | Backoff = (FIRST_ALONE, LAST_ALONE),
) -> Failfast:
    """Take an endpoint out as soon as a connect to it fails, and connect to it again in the background. On by default.

    Args:
        backoff: Seconds up to which the first wait between connects may last, and any; fully jittered, doubled each
            time. Or any `Backoff`.
        alone: The same while no endpoint of the client can serve, as when it has but one.

    Raises:
        ConfigurationError: One makes no sense.
    """
    return Failfast(_backoff("backoff", backoff), _backoff("alone", alone))


def _backoff(what: str, given: tuple[float, float] | Backoff) -> Backoff:
    if isinstance(given, tuple):
        if len(given) == 2 and all(isinstance(x, int | float) for x in given) and 0 < given[0] <= given[1] < 1e9:
            return FullJitter(*given)
    elif callable(getattr(given, "delay", None)):
        return given
    raise ConfigurationError(
        f"failfast({what}={given!r}): give (first, last) in seconds, above 0, the longer one last, or a Backoff"
    )


def _shown(backoff: Backoff) -> str:
    return f"({backoff.first:g}, {backoff.last:g})" if isinstance(backoff, FullJitter) else repr(backoff)
