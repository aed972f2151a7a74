"""Whether the system has ended a worker for its memory: a kill leaves no word, so the signs around it are read.

    the kernel's count of such kills has risen while the worker ran, or
    the worker was last seen to hold nearly all that there is

It knows no runs.
"""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
NEARLY = 0.85  # of the memory


def oom_kills() -> int:
    """How often the kernel has killed for memory so far, as far as it tells; 0 where it does not."""
    return sum(_counts(path).get("oom_kill", 0) for path in (CGROUP / "memory.events", Path("/proc/vmstat")))


def limit_bytes() -> int:
    """The memory that a process here may take, by the machine and by its control group."""
    try:
        own = int((CGROUP / "memory.max").read_text())
    except (OSError, ValueError):  # no group, or "max"
        return psutil.virtual_memory().total
    return min(own, psutil.virtual_memory().total)


def is_to_blame(kills_before: int | None, peak_bytes: float) -> bool:
    """Whether memory is why a worker was killed that began at such a count and held so much at most."""
    rose = kills_before is not None and oom_kills() > kills_before
    return rose or peak_bytes > NEARLY * limit_bytes()


def _counts(path: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return {name: int(count) for name, count in pairs}
    except (OSError, ValueError):
        return {}
