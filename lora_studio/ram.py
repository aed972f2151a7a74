"""The memory of this machine, or what a control group (a container's) allows of it."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
# Where a group of either version says its limit, what it uses, and how much of that is file cache it would give back.
_VERSIONS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def total() -> int:
    """Bytes that all processes here may take together."""
    own, _ = _group()
    return min(own, psutil.virtual_memory().total)


def available() -> int:
    """Bytes that are free now, or held by caches that would give way."""
    own, used = _group()
    machine = psutil.virtual_memory()
    return machine.available if own >= machine.total else min(machine.available, max(0, own - used))


def _group() -> tuple[int, int]:
    """Limit and use of the control group; a machine without one has any limit."""
    for limit, current, stat, cache in _VERSIONS:
        try:
            most = int((CGROUP / limit).read_text())
            used = int((CGROUP / current).read_text())
        except (OSError, ValueError):  # not of this version, or "max"
            continue
        return most, used - counts(CGROUP / stat).get(cache, 0)
    return 2**63, 0


def counts(path: Path) -> dict[str, int]:
    """Lines "name number" of one of the kernel's files; empty where there is none."""
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return {name: int(count) for name, count in pairs}
    except (OSError, ValueError):
        return {}
