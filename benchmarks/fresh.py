"""One measurement in a process of its own: a function of this folder, called by name with JSON, answering with JSON.

    measure("benchmarks.contenders:trained", {...})

The child starts with the asked number of threads, which sleep when they wait unless they are to be awake, so that its
processor time is its own work and not its waiting. Processor seconds are user and system time of all its threads,
start-up included; the peak is the most memory that it ever held. Times of single steps are the function's own affair.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_studio.runs.executors import environment as worker

THREADS = 2
ALLOCATOR = {name: value for name, value in worker().items() if name.startswith(("MALLOC_", "ONEDNN_", "LRU_"))}


class Failed(RuntimeError):
    """The child did not answer; the message ends with what it said last."""


def measure(
    function: str, spec: Mapping[str, Any], *, threads: int = THREADS, as_worker: bool = False, awake: bool = False
) -> dict[str, Any]:
    """The function's answer, and with it "process_cpu_s", "process_wall_s" and "peak_bytes" of its process.

    as_worker: with the app's own settings of the allocator, as a run has them. awake: its threads do not sleep when
    they wait, which is quicker by the clock and spends processor time.
    """
    with tempfile.TemporaryDirectory(prefix="lora-studio-bench-") as temporary:
        asked, said = Path(temporary, "asked.json"), Path(temporary, "said.json")
        asked.write_text(json.dumps(spec))
        start = time.monotonic()
        with Path(temporary, "log").open("w+b") as log:
            command = [sys.executable, "-m", "benchmarks.fresh", function, str(asked), str(said)]
            variables = environment(threads, awake=awake) | (ALLOCATOR if as_worker else {})
            child = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            last = log.read().decode(errors="replace").strip()[-2000:]
        if child.returncode or not said.exists():
            raise Failed(f"{function} ended with {child.returncode}: {last}")
        found = json.loads(said.read_text())
        return found | {
            "process_cpu_s": usage.ru_utime + usage.ru_stime,
            "process_wall_s": time.monotonic() - start,
        }


def environment(threads: int, *, awake: bool = False) -> dict[str, str]:
    """The child's: ours, with so many threads that sleep when they wait, or do not, and no look at the Hub."""
    quiet = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    asleep = {} if awake else {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    return {**os.environ, **quiet, **asleep}


def peak_bytes() -> int:
    """Most memory that this process has held; getrusage would count what its parent held when it started."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main() -> None:
    function, asked, said = sys.argv[1:]
    module, name = function.split(":")
    found = getattr(importlib.import_module(module), name)(json.loads(Path(asked).read_text()))
    Path(said).write_text(json.dumps({"peak_bytes": peak_bytes(), **found}))


if __name__ == "__main__":
    main()
