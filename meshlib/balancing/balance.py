"""``balance(...)``: the layer that spreads a client's calls over the endpoints of its name."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Final

from ..core.env import Env
from ..core.errors import ConfigurationError
from ..core.stack import Layer
from .balancer import Balancer, MakeNode
from .choose import P2C, Chooser, SimpleChooser
from .load import LoadMetric

__all__ = ["Balance", "balance"]

PANIC: Final = 0.5
"""Envoy's healthy_panic_threshold, and Finagle's default panic mode (fifty percent unhealthy)."""
SLOW_START: Final = 10.0
"""Seconds: time to fill caches and pools, and shorter than a rolling restart takes for the next server."""
ZONE: Final = "MESHLIB_ZONE"


class Balance:
    """The layer: a balancer over whatever the name stands for.

    Args:
        how: A load metric, compared by the power of two choices, or another way to choose among the ready nodes.
        panic: See `balance`.
        slow_start: See `balance`.
        zone: See `balance`.
    """

    place: ClassVar[str] = "balance"
    keeps_deadline: ClassVar[bool] = True

    def __init__(
        self,
        how: LoadMetric | Chooser | SimpleChooser | None = None,
        panic: float = PANIC,
        slow_start: float = SLOW_START,
        zone: str | None = None,
    ) -> None:
        if isinstance(how, type) or (how is not None and not any(hasattr(how, m) for m in ("meter", "picker", "pick"))):
            raise ConfigurationError(
                f"balance({how!r}): give a load metric, such as peak_ewma(), or a chooser, such as round_robin()"
            )
        if isinstance(panic, bool) or not isinstance(panic, int | float) or not 0 <= panic <= 1:
            raise ConfigurationError(f"balance(panic={panic!r}): give a share of the endpoints, from 0 (never) to 1")
        if isinstance(slow_start, bool) or not isinstance(slow_start, int | float) or not 0 <= slow_start < 1e6:
            raise ConfigurationError(f"balance(slow_start={slow_start!r}): give seconds, or 0 for no slow start")
        if zone is not None and not isinstance(zone, str):
            raise ConfigurationError(f"balance(zone={zone!r}): give the name of the zone this process runs in")
        metric: Any = how
        self.chooser: Any = P2C(metric) if how is None or hasattr(how, "meter") else how
        self.panic, self.slow_start, self.zone = float(panic), float(slow_start), zone

    def build(self, env: Env, below: MakeNode) -> Any:
        """A balancer for the watch that was left by the layer above."""
        zone = os.environ.get(ZONE, "") if self.zone is None else self.zone
        return env.shared(Balancer, lambda: Balancer(env, below, self.chooser, self.panic, self.slow_start, zone))

    def __repr__(self) -> str:
        zone = "" if self.zone is None else f", zone={self.zone!r}"
        return f"balance({self.chooser!r}, panic={self.panic:g}, slow_start={self.slow_start:g}{zone})"


def balance(
    how: LoadMetric | Chooser | SimpleChooser | None = None,
    *,
    panic: float = PANIC,
    slow_start: float = SLOW_START,
    zone: str | None = None,
) -> Layer:
    """How a client spreads its calls over endpoints. One value may be given to several clients; they share nothing.

    Args:
        how: `peak_ewma()` (the default) or `least_loaded()`, which the power of two choices compares; or a chooser:
            `p2c()`, `round_robin()`, `heap()`, `aperture()`, or an object with ``pick(nodes, rng)``.
        panic: When less than this share of the endpoints is open, all that can serve are used; 0 for never.
        slow_start: Seconds over which the traffic of a new or revived endpoint rises from 10 % to its full share, while
            there are others; 0 for none.
        zone: The zone this process runs in, to prefer endpoints whose metadata name the same; empty for no preference.
            If it is not given, the environment variable ``MESHLIB_ZONE`` says.

    Raises:
        ConfigurationError: A parameter makes no sense.
    """
    return Balance(how, panic, slow_start, zone)
