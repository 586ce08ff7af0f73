"""How long things take: values that, given a generator, give one time after another.

A `Latency` says of what kind the times are and holds no state; `Latency.sampler` makes the endless source that one
server, or one link, draws from. All times are seconds.

* `constant`, `uniform` and `exponential`: the last is the service time of the M/M/c queue.
* `lognormal`: what most services look like: a bulk around the median, and a tail to the right.
* `pareto`: a heavy tail; with a shape below 2, so heavy that its variance is infinite ("The Tail at Scale", 2013).
* `replayed`: recorded times in the order in which they were recorded, so that slow spells stay together.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import ConfigurationError

__all__ = ["Latency", "as_latency", "constant", "exponential", "lognormal", "pareto", "replayed", "uniform"]


class Latency(ABC):
    """Of what kind the times are. Make one with the functions of this module."""

    @property
    @abstractmethod
    def mean(self) -> float:
        """The mean of all times, in seconds; infinite where there is none."""

    @abstractmethod
    def sampler(self, rng: random.Random) -> Callable[[], float]:
        """An endless source of times, in seconds, drawn from ``rng``."""


def _check(spelling: str, good: bool, right: str) -> None:
    if not good:
        raise ConfigurationError(f"{spelling}: {right}")


@dataclass(frozen=True, slots=True)
class _Constant(Latency):
    seconds: float

    def __post_init__(self) -> None:
        _check(repr(self), 0 <= self.seconds < 1e9, "give seconds, 0 or more")

    @property
    def mean(self) -> float:
        return self.seconds

    def sampler(self, rng: random.Random) -> Callable[[], float]:
        seconds = self.seconds
        return lambda: seconds

    def __repr__(self) -> str:
        return f"constant({self.seconds:g})"


@dataclass(frozen=True, slots=True)
class _Uniform(Latency):
    low: float
    high: float

    def __post_init__(self) -> None:
        _check(repr(self), 0 <= self.low <= self.high < 1e9, "give seconds, 0 <= low <= high")

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    def sampler(self, rng: random.Random) -> Callable[[], float]:
        draw, low, width = rng.random, self.low, self.high - self.low
        return lambda: low + width * draw()

    def __repr__(self) -> str:
        return f"uniform({self.low:g}, {self.high:g})"


@dataclass(frozen=True, slots=True)
class _Exponential(Latency):
    seconds: float

    def __post_init__(self) -> None:
        _check(repr(self), 0 < self.seconds < 1e9, "give the mean in seconds, above 0")

    @property
    def mean(self) -> float:
        return self.seconds

    def sampler(self, rng: random.Random) -> Callable[[], float]:
        draw, rate = rng.expovariate, 1 / self.seconds
        return lambda: draw(rate)

    def __repr__(self) -> str:
        return f"exponential({self.seconds:g})"


@dataclass(frozen=True, slots=True)
class _Lognormal(Latency):
    median: float
    sigma: float

    def __post_init__(self) -> None:
        good = 0 < self.median < 1e9 and 0 <= self.sigma < 10
        _check(repr(self), good, "give the median in seconds, above 0, and sigma, the deviation of its logarithm")

    @property
    def mean(self) -> float:
        return self.median * math.exp(self.sigma**2 / 2)

    def sampler(self, rng: random.Random) -> Callable[[], float]:
        draw, mu, sigma = rng.lognormvariate, math.log(self.median), self.sigma
        return lambda: draw(mu, sigma)

    def __repr__(self) -> str:
        return f"lognormal({self.median:g}, sigma={self.sigma:g})"


@dataclass(frozen=True, slots=True)
class _Pareto(Latency):
    least: float
    shape: float
    most: float | None

    def __post_init__(self) -> None:
        good = 0 < self.least < 1e9 and self.shape > 0 and (self.most is None or self.most > self.least)
        _check(repr(self), good, "give the least time in seconds and the shape, both above 0, and most above least")

    @property
    def mean(self) -> float:
        a, low = self.shape, self.least
        if self.most is None:
            return a * low / (a - 1) if a > 1 else float("inf")
        # What lies beyond `most` counts as `most`.
        ratio = low / self.most
        body = low * math.log(1 / ratio) if a == 1 else a * low / (a - 1) * (1 - math.pow(ratio, a - 1))
        return body + self.most * math.pow(ratio, a)

    def sampler(self, rng: random.Random) -> Callable[[], float]:
        draw, least, shape, most = rng.paretovariate, self.least, self.shape, self.most
        if most is None:
            return lambda: least * draw(shape)
        top = most
        return lambda: min(least * draw(shape), top)

    def __repr__(self) -> str:
        most = "" if self.most is None else f", most={self.most:g}"
        return f"pareto({self.least:g}, shape={self.shape:g}{most})"


@dataclass(frozen=True, slots=True)
class _Replayed(Latency):
    seconds: tuple[float, ...] = field(repr=False)
    source: str = "…"

    def __post_init__(self) -> None:
        good = bool(self.seconds) and all(0 <= each < 1e9 for each in self.seconds)
        _check(repr(self), good, "it needs at least one time, and each must be seconds, 0 or more")

    @property
    def mean(self) -> float:
        return sum(self.seconds) / len(self.seconds)

    def sampler(self, rng: random.Random) -> Callable[[], float]:
        seconds, n = self.seconds, len(self.seconds)
        at = rng.randrange(n)

        def sample() -> float:
            nonlocal at
            at = at + 1 if at + 1 < n else 0
            return seconds[at]

        return sample

    def __repr__(self) -> str:
        return f"replayed({self.source})"


def constant(seconds: float) -> Latency:
    """Always the same."""
    return _Constant(seconds)


def uniform(low: float, high: float) -> Latency:
    """Anything from ``low`` to ``high``, all equally likely."""
    return _Uniform(low, high)


def exponential(mean: float) -> Latency:
    """Exponentially distributed around ``mean``."""
    return _Exponential(mean)


def lognormal(median: float, sigma: float = 0.5) -> Latency:
    """Half of the times below ``median``; ``sigma`` is the standard deviation of their natural logarithm.

    With the default of 0.5 the 99th percentile is 3.2 times the median.
    """
    return _Lognormal(median, sigma)


def pareto(least: float, shape: float = 1.9, most: float | None = None) -> Latency:
    """A share of ``(least / t) ** shape`` takes longer than ``t``; nothing takes longer than ``most``."""
    return _Pareto(least, shape, most)


def replayed(source: str | Path | Iterable[float], unit: float = 1.0) -> Latency:
    """Recorded times, in order, from a random one on, and again from the first after the last.

    Args:
        source: The times, or the path of a text file with one on each line (``#`` begins a comment).
        unit: How many seconds 1 in the source is: 0.001 for milliseconds.

    Raises:
        ConfigurationError: The file cannot be read, or has a line that is no number.
    """
    if not isinstance(source, str | Path):
        return _Replayed(tuple(float(each) * unit for each in source), "given times")
    try:
        lines = Path(source).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"replayed({str(source)!r}): {error}") from error
    seconds = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        try:
            seconds += [float(text) * unit] if text else []
        except ValueError:
            raise ConfigurationError(f"{source}, line {number}: {text!r} is no number") from None
    return _Replayed(tuple(seconds), str(source))


def as_latency(value: Latency | float) -> Latency:
    """A number is a constant.

    Raises:
        ConfigurationError: It is neither a number nor a `Latency`.
    """
    if isinstance(value, Latency):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{value!r} is no latency: give seconds, or one of lognormal(…), pareto(…), …")
    return _Constant(float(value))
