"""Where a worker runs: start(path), alive(path), kill(path). The run folder is the only data path."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from lora_studio.runs.store import claim, is_locked, read_json

# What a worker may know of the environment. Tokens and everything else stay outside.
ENVIRONMENT = ("PATH", "HOME", "LANG", "TMPDIR", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONPATH", "XDG_CACHE_HOME")
FAMILIES = ("LC_", "LORA_STUDIO_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "TORCH_", "PYTORCH_", "SPACE")
HUB = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN_PATH")  # never HF_TOKEN itself
NETWORK = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")  # in small letters too


class Executor(Protocol):
    """Starts and stops the worker of a run folder."""

    def start(self, path: Path) -> bool:
        """Start a worker; False when another process has this run already."""
        ...

    def alive(self, path: Path) -> bool: ...

    def kill(self, path: Path) -> None: ...

    def reap(self) -> None:
        """Let the system forget workers that have ended."""
        ...


class Local:
    """A fresh interpreter on this machine, in a session of its own, with nothing to read or drain."""

    def __init__(self) -> None:
        self._children: dict[Path, subprocess.Popen] = {}

    def start(self, path: Path) -> bool:
        """The lock is taken here and inherited, so that there is no moment in which the run looks unclaimed."""
        self.reap()
        with claim(path) as lock:
            if lock is None or (path / "worker.log").exists() or (path / "exit.json").exists():
                return False  # somebody else started it, stopped it or deletes it at this moment
            with (path / "worker.log").open("ab") as log:
                command = [sys.executable, "-m", "lora_studio.runs.worker", str(path)]
                self._children[path] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(lock.fileno(),),
                    env=environment(),
                )
        return True

    def alive(self, path: Path) -> bool:
        self.reap()
        return is_locked(path / "worker.lock")

    def kill(self, path: Path) -> None:
        """At once and without saving; the process group is the worker and whatever it started."""
        process = read_json(path / "worker.json")
        if process and self.alive(path):
            os.killpg(process["pid"], signal.SIGKILL)
        self.reap()

    def reap(self) -> None:
        self._children = {path: child for path, child in self._children.items() if child.poll() is None}


def environment() -> dict[str, str]:
    """The allow-listed part of our environment, and where this package is found."""
    names = {*ENVIRONMENT, *HUB, *NETWORK, *PROXIES, *map(str.lower, PROXIES)}
    kept = {name: value for name, value in os.environ.items() if name in names or name.startswith(FAMILIES)}
    here = str(Path(__file__).resolve().parents[2])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [here, kept.get("PYTHONPATH", "")]))
    kept |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    # Every step has a length of its own, and torch keeps a compiled matrix product for each: 15 MB more a step.
    kept |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
    return kept


EXECUTORS: dict[str, type] = {"local": Local}
