"""The queue: one run at a time, oldest first. Whoever holds a Studio may turn the crank; a lock lets one at a time."""

import fcntl
import logging
import math
import threading
import time
from pathlib import Path

from lora_studio.runs.config import Run
from lora_studio.runs.executors import EXECUTORS, Executor
from lora_studio.runs.store import RunStore, read_json, write_json

log = logging.getLogger(__name__)
INTERVAL_S = 0.5
PATIENCE_S = 120  # how long a worker that was asked to stop may stay silent


class Supervisor:
    """Starts what may start. State is only in the run folders, so any number of these may exist."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.executors: dict[str, Executor] = {name: kind() for name, kind in EXECUTORS.items()}
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def tick(self) -> None:
        """Start the oldest queued run when none is running."""
        self.store.folder.mkdir(parents=True, exist_ok=True)
        for executor in self.executors.values():
            executor.reap()
        with (self.store.folder / "queue.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another process is looking at this moment
            runs = self.store.list()
            for run in runs:
                if run.status == "running":
                    self._end_if_deaf(run)
            waiting = [run for run in runs if run.status == "queued"]
            if waiting and not any(run.status == "running" for run in runs):
                run = waiting[-1]
                started = self.executors[run.config.executor].start(run.path)
                log.info("run %s %s", run.id, "started" if started else "is already taken")

    def start(self) -> None:
        """Keep ticking in the background until `close`."""
        self._thread = threading.Thread(target=self._loop, name="supervisor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop ticking; workers go on."""
        self._ending.set()
        if self._thread:
            self._thread.join()

    def _end_if_deaf(self, run: Run) -> None:
        """Kill a worker that was asked to stop and has said nothing since; what it saved stays."""
        asked = (read_json(run.path / "control.json") or {}).get("time", math.inf)
        journal = run.path / "events.jsonl"
        heard = journal.stat().st_mtime if journal.exists() else 0.0
        if time.time() - max(asked, heard) > PATIENCE_S:
            log.warning("run %s did not stop when asked and is ended", run.id)
            self.kill(run.path, run.config.executor)
            write_json(
                run.path / "exit.json", {"status": "stopped", "step": run.step, "values": {}, "time": time.time()}
            )

    def kill(self, path: Path, executor: str) -> None:
        self.executors[executor].kill(path)

    def _loop(self) -> None:
        while not self._ending.wait(INTERVAL_S):
            try:
                self.tick()
            except Exception:  # a full disk, a vanished folder, a damaged file: none of them may end the queue
                log.exception("the queue could not be read")
