"""Where a worker runs: start(paths), alive(path), kill(path). The run folders are the only data path.

One worker may train several runs. A spare one is a worker that has imported everything and waits to be told which.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from lora_studio.runs.store import claim, is_locked, read_json

# What a worker may know of the environment. Tokens and everything else stay outside.
ENVIRONMENT = ("PATH", "HOME", "LANG", "TMPDIR", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONPATH", "XDG_CACHE_HOME")
FAMILIES = ("LC_", "LORA_STUDIO_", "CUDA_", "OMP_", "MKL_", "TORCH_", "PYTORCH_", "SPACE")
DEVICES = ("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES")
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")  # how a name ends that no family lets through
HUB = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN_PATH")  # never HF_TOKEN itself
NETWORK = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")  # in small letters too
TOGETHER = 100  # runs in one worker; a message carries at most 253 descriptors


class Executor(Protocol):
    """Starts and stops the worker of run folders."""

    def start(self, paths: Sequence[Path]) -> bool:
        """Start one worker for these runs; False when other processes have all of them already."""
        ...

    def alive(self, path: Path) -> bool: ...

    def kill(self, path: Path) -> None:
        """At once and without saving; the other runs of its worker end with it."""
        ...

    def reap(self) -> None:
        """Let the system forget workers that have ended."""
        ...

    def exit_code(self, path: Path) -> int | None:
        """How the latest worker of a run ended, -9 for a kill; None when that is not known here."""
        ...

    def prepare(self) -> None:
        """Have a spare worker ready, where there can be one."""
        ...

    def close(self) -> None:
        """End the spare worker; those that train go on."""
        ...


class Local:
    """A fresh interpreter on this machine, in a session of its own, with nothing to read or drain."""

    def __init__(self) -> None:
        self._children: dict[Path, subprocess.Popen] = {}
        self._exit_codes: dict[Path, int] = {}
        self._spare: _Spare | None = None
        self._one_at_a_time = threading.Lock()  # around the children and the spare

    def start(self, paths: Sequence[Path]) -> bool:
        """The locks are taken here and inherited, so that there is no moment in which a run looks unclaimed."""
        self.reap()
        with ExitStack() as stack:
            locks: dict[Path, BinaryIO] = {}
            for path in paths[:TOGETHER]:
                lock = stack.enter_context(claim(path, patience_s=0.1))  # a page may look at its status
                if lock and not (path / "worker.log").exists() and not (path / "exit.json").exists():
                    locks[path] = lock  # otherwise somebody else started, stopped or deletes it at this moment
            if not locks:
                return False
            printed = stack.enter_context(_one_log(list(locks)))
            with self._one_at_a_time:
                spare, self._spare = self._spare, None
                child = spare.take(locks, printed) if spare else None
                child = child or _spawn(_arguments(locks), [lock.fileno() for lock in locks.values()], printed)
                self._children |= dict.fromkeys(locks, child)
                for path in locks:
                    self._exit_codes.pop(path, None)
        return True

    def alive(self, path: Path) -> bool:
        self.reap()
        return is_locked(path / "worker.lock")

    def kill(self, path: Path) -> None:
        """The process group is the worker and whatever it started."""
        with self._one_at_a_time:
            process, child = read_json(path / "worker.json"), self._children.get(path)
        leader = process["pid"] if process else child.pid if child else None
        if leader and self.alive(path):
            with suppress(ProcessLookupError):  # it ended in between
                os.killpg(leader, signal.SIGKILL)
        self.reap()

    def reap(self) -> None:
        with self._one_at_a_time:
            codes = {path: child.poll() for path, child in self._children.items()}
            self._exit_codes |= {path: code for path, code in codes.items() if code is not None}
            self._children = {path: child for path, child in self._children.items() if codes[path] is None}

    def exit_code(self, path: Path) -> int | None:
        return self._exit_codes.get(path)

    def prepare(self) -> None:
        with self._one_at_a_time:
            if self._spare is None:  # one that died stays until a run comes: the next would die of the same
                self._spare = _Spare()

    def close(self) -> None:
        with self._one_at_a_time:
            spare, self._spare = self._spare, None
        if spare:
            spare.end()


class _Spare:
    """A worker that waits at a socket; when this process ends, in whatever way, it reads the end of it and ends."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._child = _spawn(["--spare", str(theirs.fileno())], [theirs.fileno()], None)

    @property
    def lives(self) -> bool:
        return self._child.poll() is None

    def take(self, locks: dict[Path, BinaryIO], printed: BinaryIO) -> subprocess.Popen | None:
        """Hand it runs, their locks and where to print; None when it is no more."""
        message = json.dumps([str(path) for path in locks]).encode() + b"\n"
        with self._ours:
            try:
                socket.send_fds(self._ours, [message], [printed.fileno(), *(lock.fileno() for lock in locks.values())])
            except OSError:
                return None
        return self._child if self.lives else None

    def end(self) -> None:
        self._ours.close()
        self._child.terminate()  # it may be importing still, and would not read
        self._child.wait()


def _arguments(locks: dict[Path, BinaryIO]) -> list[str]:
    return ["--locks", ",".join(str(lock.fileno()) for lock in locks.values()), *map(str, locks)]


def _one_log(paths: Sequence[Path]) -> BinaryIO:
    """The open log of a worker: one file, which each run has under its own name."""
    first, *others = [path / "worker.log" for path in paths]
    printed = first.open("ab")
    for other in others:
        try:
            os.link(first, other)
        except OSError:  # a file system without links
            other.write_text(f"One worker trains this run and others; it prints to {first}.\n")
    return printed


def _spawn(arguments: Sequence[str], descriptors: Sequence[int], printed: BinaryIO | None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lora_studio.runs.worker", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=printed or subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=descriptors,
        env=environment(),
    )


def environment() -> dict[str, str]:
    """The allow-listed part of our environment, and where this package is found."""
    names = {*ENVIRONMENT, *HUB, *NETWORK, *DEVICES, *PROXIES, *map(str.lower, PROXIES)}
    families = {name for name in os.environ if name.startswith(FAMILIES) and not name.endswith(SECRET)}
    kept = {name: value for name, value in os.environ.items() if name in names | families}
    here = str(Path(__file__).resolve().parents[2])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [here, kept.get("PYTHONPATH", "")]))
    kept |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # Threads that wait for a moment before they sleep: a wake-up takes longer than a product of few rows.
    kept |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
    # Every step has a length of its own, and torch keeps a compiled matrix product for each: 15 MB more a step.
    kept |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
    # Memory of one step is there for the next: giving it back costs a page fault for every 4 kB.
    kept |= {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    kept |= {"MALLOC_ARENA_MAX": "1"}  # and what one thread has given back is there for the others
    return kept


EXECUTORS: dict[str, type] = {"local": Local}
