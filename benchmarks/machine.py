"""What the machine does besides the benchmark, and which of its cores the two sides get."""

import os
from pathlib import Path
from time import perf_counter


def cores() -> tuple[str, str]:
    """The cores for servers and for clients, or none where processes cannot be pinned or have to share one."""
    if not hasattr(os, "sched_getaffinity"):
        return "", ""
    available = sorted(os.sched_getaffinity(0))
    return (str(available[0]), str(available[1])) if len(available) > 1 else ("", "")


def pin(core: str) -> None:
    """Keep this process, and the threads it will have, on that core; an empty name leaves it alone."""
    if core:
        os.sched_setaffinity(0, {int(core)})


def _busy() -> float | None:
    """Seconds that the processors have worked since the machine started, or were kept from it by a hypervisor."""
    try:
        user, nice, system, _idle, _iowait, _irq, _softirq, steal = map(
            int, Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[1:9]
        )
    except (OSError, ValueError):
        return None
    return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")


class Others:
    """Tells what share of the machine went to anything but the benchmark since this was made."""

    def __init__(self) -> None:
        self._busy, self._began = _busy(), perf_counter()

    def share(self, own: float) -> float:
        """The share taken by others, given the processor time that was the benchmark's; 0 where it is not known."""
        busy = _busy()
        if busy is None or self._busy is None:
            return 0.0
        capacity = (perf_counter() - self._began) * (os.cpu_count() or 1)
        return max(0.0, busy - self._busy - own) / capacity
