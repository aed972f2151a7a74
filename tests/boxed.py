"""What the tests of the sandbox run in it; it imports nothing large, as a reader does."""

import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_studio.data.readers import normalise
from lora_studio.errors import StudioError

KEPT: list[bytearray] = []


def give(*values: object) -> object:
    return list(values)


def refuse() -> None:
    raise StudioError("E_X", "It is wrong.", "Mend it.")


def fail() -> None:
    raise KeyError("what")


def panic() -> None:
    raise BaseException("as a library in Rust does")


def forever() -> None:
    while True:
        pass


def asleep() -> None:
    time.sleep(600)


def fill(size: int) -> int:
    return len(bytearray(size))


def keep(size: int) -> None:
    KEPT.append(bytearray(size))


def write(path: str, size: int) -> int:
    return Path(path).write_bytes(b"x" * size)


def leave(code: int) -> None:
    os._exit(code)


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def talk(size: int) -> str:
    return "x" * size


def child_and_grandchild() -> None:
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)


def surroundings() -> dict[str, object]:
    limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in ("CORE", "NOFILE", "FSIZE")}
    status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
    return {
        "environment": dict(os.environ),
        "folder": os.listdir("."),
        "where": os.getcwd(),
        "input": sys.stdin.read(),
        "limits": limits,
        "privileges": [line.split()[1] for line in status.splitlines() if line.startswith("NoNewPrivs")],
        "modules": sorted(sys.modules),
        "session": os.getsid(0) == os.getpid(),
        "arguments": sys.argv,
    }


def peak_of_reading(*arguments: Any) -> int:
    """Most bytes that this process ever had in memory, once it has read a file or given up."""
    with suppress(StudioError, MemoryError):
        normalise(*arguments)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
