"""Whether the system has ended a worker for its memory: a kill leaves no word, so the signs around it are read.

    the kernel's count of such kills has risen while the worker ran, or
    the worker was last seen to hold nearly all that there is

It knows no runs.
"""

from pathlib import Path

from lora_studio import ram

NEARLY = 0.85  # of the memory


def oom_kills() -> int:
    """How often the kernel has killed for memory so far, as far as it tells; 0 where it does not."""
    return sum(ram.counts(path).get("oom_kill", 0) for path in (ram.CGROUP / "memory.events", Path("/proc/vmstat")))


def is_to_blame(kills_before: int | None, peak_bytes: float) -> bool:
    """Whether memory is why a worker was killed that began at such a count and held so much at most."""
    rose = kills_before is not None and oom_kills() > kills_before
    return rose or peak_bytes > NEARLY * ram.total()
