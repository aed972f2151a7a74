"""The queue: one worker at a time, oldest run first. Whoever holds a Studio may turn the crank, one at a time.

Runs of one study that share a base model and rows are given to one worker, which trains them together.
"""

import fcntl
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from lora_studio.core.spec import LoraSpec
from lora_studio.runs.config import Run
from lora_studio.runs.executors import EXECUTORS, Executor
from lora_studio.runs.store import RunStore, read_json, write_json

log = logging.getLogger(__name__)
INTERVAL_S = 0.5
PATIENCE_S = 120  # how long a worker that was asked to stop may stay silent
SPARE_BYTES = 2 * 2**30  # that are free before a spare worker is kept


class Supervisor:
    """Starts what may start. State is only in the run folders, so any number of these may exist."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.executors: dict[str, Executor] = {name: kind() for name, kind in EXECUTORS.items()}
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def tick(self) -> bool:
        """Start the oldest queued run, with those that train along, when none is running.

        True when there is nothing that runs or waits.
        """
        self.store.folder.mkdir(parents=True, exist_ok=True)
        for executor in self.executors.values():
            executor.reap()
        with (self.store.folder / "queue.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False  # another process is looking at this moment
            runs = self.store.list()
            running = [run for run in runs if run.status == "running"]
            for run in running:
                self._end_if_deaf(run, running)
            waiting = [run for run in reversed(runs) if run.status == "queued"]
            if waiting and not running:
                group = together(waiting)
                started = self.executors[group[0].config.executor].start([run.path for run in group])
                names = ", ".join(run.id for run in group)
                log.info("%s %s", names, "started" if started else "is already taken")
            return not waiting and not running

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Start nothing meanwhile: runs that are created in here are seen together."""
        self.store.folder.mkdir(parents=True, exist_ok=True)
        with (self.store.folder / "queue.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def start(self) -> None:
        """Keep ticking in the background until `close`, with a spare worker while there is nothing to do."""
        self._thread = threading.Thread(target=self._loop, name="supervisor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop ticking; workers go on."""
        self._ending.set()
        if self._thread:
            self._thread.join()
        for executor in self.executors.values():
            executor.close()

    def _end_if_deaf(self, run: Run, running: Sequence[Run]) -> None:
        """Kill a worker that was asked to stop a run and has said nothing of any since; what it saved stays."""
        control = read_json(run.path / "control.json") or {}
        worker = _worker(run)
        heard = max(_heard(one) for one in running if one is run or (worker and _worker(one) == worker))
        if time.time() - max(control.get("time", math.inf), heard) > PATIENCE_S:
            log.warning("run %s did not stop when asked and is ended", run.id)
            self.kill(run.path, run.config.executor)
            status = "paused" if control.get("pause") else "stopped"
            write_json(run.path / "exit.json", {"status": status, "step": run.step, "values": {}, "time": time.time()})

    def kill(self, path: Path, executor: str) -> None:
        self.executors[executor].kill(path)

    def _loop(self) -> None:
        while not self._ending.wait(INTERVAL_S):
            try:
                if self.tick() and psutil.virtual_memory().available >= SPARE_BYTES:
                    self.executors["local"].prepare()
            except Exception:  # a full disk, a vanished folder, a damaged file: none of them may end the queue
                log.exception("the queue could not be read")


def together(waiting: Sequence[Run]) -> list[Run]:
    """The first of these runs and those of its study that one worker can train along: same base, same rows."""
    first = waiting[0]
    return [run for run in waiting if run is first or (first.config.study and _shares(run) == _shares(first))]


def _shares(run: Run) -> tuple:
    config, train = run.config, run.config.train
    kind = "lora" if isinstance(config.method, LoraSpec) else run.id  # copies of the base would fill the memory
    data = config.dataset.id, config.dataset.format, *sorted(config.dataset.columns.items())
    rows = data, config.task, train.max_length, train.holdout, train.seed
    return config.study, config.executor, config.model, kind, train.precision, rows


def _worker(run: Run) -> int | None:
    return (read_json(run.path / "worker.json") or {}).get("pid")


def _heard(run: Run) -> float:
    """When a run's worker last said something of it, in seconds since the epoch."""
    journal = run.path / "events.jsonl"
    return journal.stat().st_mtime if journal.exists() else 0.0
