"""The queue: one run at a time, oldest first. Whoever holds a Studio may turn the crank; a lock lets one at a time."""

import fcntl
import logging
import threading
from pathlib import Path

from lora_studio.runs.executors import EXECUTORS, Executor
from lora_studio.runs.store import RunStore

log = logging.getLogger(__name__)
INTERVAL_S = 0.5


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

    def kill(self, path: Path, executor: str) -> None:
        self.executors[executor].kill(path)

    def _loop(self) -> None:
        while not self._ending.wait(INTERVAL_S):
            try:
                self.tick()
            except OSError:  # a full disk or a vanished folder must not end the queue
                log.exception("the queue could not be read")
