"""What is to be measured and what came out."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import product


@dataclass(frozen=True, slots=True)
class Plan:
    """The matrix and how long to stay in each of its cells."""

    subjects: tuple[str, ...]
    loops: tuple[str, ...]
    callers: tuple[int, ...]
    bodies: tuple[int, ...]
    seconds: float
    warmup: float
    rounds: int
    retries: int

    def cells(self) -> Iterator[tuple[int, int]]:
        """Every combination of callers and body size."""
        return ((callers, body) for body, callers in product(self.bodies, self.callers))


@dataclass(frozen=True, slots=True)
class Slice:
    """One timed period: calls per second, latencies in ms, processor time per call of either side in µs.

    ``others`` is the share of the machine that anything but the two sides took meanwhile.
    """

    calls: float
    rate: float
    p50_ms: float
    p99_ms: float
    client_us: float
    server_us: float
    others: float

    def numbers(self) -> tuple[float, ...]:
        """The fields in order."""
        return astuple(self)


@dataclass(frozen=True, slots=True)
class Cell:
    """One subject at one place of the matrix: the median of its slices and the slices themselves."""

    loop: str
    callers: int
    body: int
    subject: str
    median: Slice
    slices: list[Slice]

    @property
    def spread(self) -> float:
        """How far apart the best and the worst slice's rates are, as a share of the best: the noise."""
        rates = [taken.rate for taken in self.slices]
        return (max(rates) - min(rates)) / max(rates) if any(rates) else 0.0


@dataclass(frozen=True, slots=True)
class Results:
    """All cells of a run with lookups by place."""

    environment: dict[str, str]
    plan: Plan
    cells: list[Cell]

    def places(self) -> list[tuple[str, int, int]]:
        """The (loop, body, callers) measured, in the order of the run."""
        return list(dict.fromkeys((cell.loop, cell.body, cell.callers) for cell in self.cells))

    def subjects(self) -> list[str]:
        """The subjects that have a cell at all, in the order of the plan."""
        measured = {cell.subject for cell in self.cells}
        return [subject for subject in self.plan.subjects if subject in measured]

    def at(self, loop: str, body: int, callers: int) -> dict[str, Cell]:
        """The subjects measured at one place."""
        wanted = (loop, body, callers)
        return {cell.subject: cell for cell in self.cells if (cell.loop, cell.body, cell.callers) == wanted}

    def ratio(self, cell: Cell, reference: str) -> float | None:
        """The cell's rate over that of the reference at the same place, or None if that was not measured."""
        other = self.at(cell.loop, cell.body, cell.callers).get(reference)
        return cell.median.rate / other.median.rate if other is not None and other.median.rate else None
