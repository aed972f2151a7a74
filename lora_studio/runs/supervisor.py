"""The queue: one worker at a time, owners in turn, oldest run first. Whoever holds a Studio may turn the crank.

Runs of one study that share a base model and rows are given to one worker, which trains them together.

The one app of a root does more: what lost its worker goes back into the queue, after a while that grows, until it was
lost MOST_LOST times with nothing gained in between; a worker that does nothing is ended; what is too old is deleted.
What a person discarded is deleted once it has ended, because the app alone can bring it back; what was stopped or
paused, and what failed with a reason, stays as it is. All waiting goes by a clock that no change of the date moves.
"""

import fcntl
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise, takewhile
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

import psutil

from lora_studio import ram
from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError
from lora_studio.events import Warned
from lora_studio.runs import checkpoints, disk, memory
from lora_studio.runs.config import OUT_OF_MEMORY, Run
from lora_studio.runs.executors import EXECUTORS, Executor
from lora_studio.runs.store import RunStore, asked_of, earlier_logs, in_turn, is_locked, read_json

log = logging.getLogger(__name__)
INTERVAL_S = 0.5
SWEEP_S = 60  # between two looks at what is too old
SPARE_BYTES = 2 * 2**30  # that are free before a spare worker is kept
WAITS_S = (2, 30, 120)  # before a lost run goes on: for the first time, the second, the third
LOST = "W_LOST"

# How long a worker may go without a word; where steps take long, so many of them.
QUIET_S, QUIET_STEPS = 60, 10  # then it is said
HUNG_S, HUNG_STEPS = 300, 50  # then it is ended, if it does not use the processor either
BUSY_S = 3600  # and if it does
RECENT = 60  # records that tell how long a step takes
IDLE = 0.02  # of a processor, and less, is not using it
PATIENCE_S = 120  # after it was asked to end
BEFORE_S = 4  # and before it trains, when nothing can be lost


class Supervisor:
    """Starts what may start. State is only in the run folders, so any number of these may exist; one owns the root."""

    def __init__(self, store: RunStore) -> None:
        self.store, self.root = store, store.folder.parent
        self.executors: dict[str, Executor] = {name: kind() for name, kind in EXECUTORS.items()}
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._owned: BinaryIO | None = None
        self._workers: dict[Any, _Watch] = {}
        self._not_before: dict[str, float] = {}  # run: when it goes on
        self._ended_for: dict[str, str] = {}  # run: why its worker was ended here
        self._turns = 0
        self._swept = -math.inf

    def own(self) -> None:
        """Be the one app of this root until `close`. Raises E_ROOT_IN_USE, and E_ROOT where it cannot be worked in."""
        if self._owned:
            return
        self.store.folder.mkdir(parents=True, exist_ok=True)
        self._owned = disk.own(self.root)
        try:
            disk.try_out(self.root)
        except StudioError:
            self._disown()
            raise
        left, reserve = disk.free(self.root), self.store.limits.reserve_bytes
        if left < reserve:
            words = disk.megabytes(left), disk.megabytes(reserve)
            log.warning("only %s of the disk are free; no run begins below %s", *words)

    def tick(self) -> bool:
        """Start the run that is next, with those that train along, when none is running.

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
            lost = [run for run in runs if run.status == "lost"]
            self._look_after(running)
            self.store.sweep_deleted()
            now = time.monotonic()  # one for all: the runs of a study go on together
            for run in lost:
                self._recover(run, now)
            if self._owned:
                for run in runs:
                    if run.discarded:
                        self._discard(run)
                self._keep_house()
            runs = self.store.list() if lost else runs
            waiting = in_turn((run for run in runs if run.status == "queued"), self.store.served)
            known = {run.id for run in (*lost, *waiting)}
            self._not_before = {run: at for run, at in self._not_before.items() if run in known}
            ready = [run for run in waiting if self._not_before.get(run.id, 0) <= time.monotonic()]
            if ready and not running and self._has_room(ready[0]):
                self._start(ready)
            return not waiting and not running

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Start nothing meanwhile: runs that are created in here are seen together."""
        self.store.folder.mkdir(parents=True, exist_ok=True)
        with (self.store.folder / "queue.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def resumes(self, run: Run) -> bool:
        """Whether an app will see to a run that lost its worker, so that whoever follows it should wait."""
        return run.status == "lost" and is_locked(self.root / disk.LOCK)

    def start(self) -> None:
        """Own the root and keep ticking in the background until `close`, with a spare worker while nothing is to do."""
        self.own()
        self._thread = threading.Thread(target=self._loop, name="supervisor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop ticking and let go of the root; workers go on."""
        self._ending.set()
        if self._thread:
            self._thread.join()
        for executor in self.executors.values():
            executor.close()
        self._disown()

    def kill(self, path: Path, executor: str) -> None:
        self.executors[executor].kill(path)

    def _has_room(self, run: Run) -> bool:
        """Whether the disk can take a run that waits; if not it is said, and it waits on while there is an app."""
        try:
            self.store.of(run.owner).check_room(run.facts)
        except StudioError as error:
            self.store.said[run.id] = f"It waits. {error}"
            return not self._owned
        return True

    def _start(self, ready: Sequence[Run]) -> None:
        most = int(min(len(ready), self.store.limits.running))
        group = together(ready)[:most]
        started = self.executors[group[0].config.executor].start([run.path for run in group])
        log.info("%s %s", ", ".join(run.id for run in group), "started" if started else "is already taken")
        self._turns += 1
        self.store.served[group[0].owner] = self._turns
        for run in group:
            self._not_before.pop(run.id, None)
            self._ended_for.pop(run.id, None)

    # ---- workers that live ---------------------------------------------------------------------------------------

    def _look_after(self, running: Iterable[Run]) -> None:
        """Say of which worker nothing is heard, and end one that is deaf or hangs; its runs are lost then, or ended."""
        workers: dict[Any, list[Run]] = {}
        for run in running:
            workers.setdefault(_worker(run), []).append(run)
        self._workers = {key: self._workers.get(key) or _Watch() for key in workers}
        said: dict[str, str] = {}
        for key, runs in workers.items():
            watch = self._workers[key]
            watch.look(runs, self.store)
            disk.shorten(runs[0].path / "worker.log", self.store.limits.log_bytes)
            asked = watch.deaf_to(runs)
            if asked:
                log.warning("%s did not end when asked and is ended", ", ".join(run.id for run in asked))
                self._end(runs, "Its worker did not answer and was ended.")
                for run in asked:
                    self.store.settle(run, asked_of(run.path) or "stopped")
            elif watch.silent_s > max(QUIET_S, QUIET_STEPS * watch.step_s):
                words = f"No progress for {watch.silent_s:.0f} s; the last word was: {runs[0].note or 'none'}"
                said |= {run.id: words for run in runs}
                if self._owned and watch.hangs:
                    log.warning("%s made no progress and is ended", ", ".join(run.id for run in runs))
                    self._end(runs, f"The worker made no progress for {watch.silent_s:.0f} s and was ended.")
        self.store.said.clear()
        self.store.said.update(said)

    def _end(self, runs: Sequence[Run], reason: str) -> None:
        """Kill the worker of these runs."""
        self._ended_for |= {run.id: reason for run in runs}
        self.kill(runs[0].path, runs[0].config.executor)

    # ---- workers that are no more --------------------------------------------------------------------------------

    def _recover(self, run: Run, now: float) -> None:
        """End a run that has lost its worker as was asked; else the app puts it back into the queue, or gives it up."""
        try:
            if asked := asked_of(run.path):
                self.store.settle(run, asked)
            if asked or not self._owned or self._not_before.get(run.id, 0) > time.monotonic():
                return
            times = lost_in_a_row(self.store.events(run.id), checkpoints.last_step(run.path)) + 1
            finding = self._finding(run, times)
            if times > len(WAITS_S):
                self.store.settle(run, "failed", _crashed(run, times, finding, _held_bytes(run, self.store)))
                return
            self.store.requeue(run.id, said=finding)
            self._not_before[run.id] = now + WAITS_S[times - 1]
            log.info("%s was lost and goes on: %s", run.id, finding.message)
        except StudioError as error:
            if error.code == "E_CHECKPOINT":  # there is nothing to go on from
                reason = {"code": error.code, "message": error.message, "hint": error.hint}
                self.store.settle(run, "failed", reason)
        except OSError:  # a full disk, mostly; the others' turn comes all the same
            log.exception("%s could not be put back into the queue", run.id)
            self._not_before[run.id] = time.monotonic() + SWEEP_S

    def _finding(self, run: Run, times: int) -> Warned:
        """What is to be said of it, and known at the next attempt."""
        begun = read_json(run.path / "worker.json") or {}
        code, behind = self.executors[run.config.executor].exit_code(run.path), checkpoints.last_step(run.path)
        goes_on = f"goes on behind step {behind}" if behind else "begins from the start"
        attempt = f"Attempt {2 + len(earlier_logs(run.path))} {goes_on}"
        if reason := self._ended_for.pop(run.id, ""):
            return Warned(step=behind, code=LOST, message=f"{reason} {attempt}.")
        peak = _held_bytes(run, self.store)
        if code in (None, -9) and memory.is_to_blame(begun.get("oom_kills"), peak):
            held = f" at {disk.megabytes(peak)}" if peak else ""
            message = f"The system ended the worker for its memory{held}. {attempt}, with half as many examples a pass."
            return Warned(step=behind, code=OUT_OF_MEMORY, message=f"{message} The batch stays what it is.")
        how = f"with signal {-code}" if code and code < 0 else f"with code {code}" if code else "without saying why"
        return Warned(step=behind, code=LOST, message=f"The worker ended {how}, at step {run.step}. {attempt}.")

    def _discard(self, run: Run) -> None:
        """Delete a run that has ended, as was asked while it trained; where that cannot be done yet, the next time."""
        try:
            self.store.delete(run.id)
        except (StudioError, OSError) as error:
            log.info("%s cannot be deleted yet: %s", run.id, error)

    # ---- the root ------------------------------------------------------------------------------------------------

    def _keep_house(self) -> None:
        """Now and then: the reserve is there, and what is too old or too much is not."""
        if time.monotonic() - self._swept < SWEEP_S:
            return
        self._swept = time.monotonic()
        self.store.sweep_leftovers()
        disk.keep_ballast(self.root)
        gone = self.store.sweep_old()
        if gone:
            log.info("deleted as too old or too much: %s", ", ".join(gone))

    def _disown(self) -> None:
        if self._owned:
            self._owned.close()
            self._owned = None

    def _loop(self) -> None:
        while not self._ending.wait(INTERVAL_S):
            try:
                if self.tick() and ram.available() >= SPARE_BYTES:
                    self.executors["local"].prepare()
            except Exception:  # a full disk, a vanished folder, a damaged file: none of them may end the queue
                log.exception("the queue could not be read")


class _Watch:
    """What is heard of one worker: its journals grow, or they do not."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._heard = time.monotonic()
        self._asked: dict[str, float] = {}  # run: when it was first seen to be asked to end
        self._trains = False  # whether all of its runs have begun
        self._process: psutil.Process | None = None
        self._used_s = 0.0  # of processor time, when last heard
        self.step_s = 0.0  # that a step usually takes

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._heard

    @property
    def hangs(self) -> bool:
        silent = self.silent_s
        if silent <= max(HUNG_S, HUNG_STEPS * self.step_s):
            return False
        if not self._trains:  # a download waits for others, and takes as long as it takes
            return silent > BUSY_S
        return silent > BUSY_S or self._used() - self._used_s <= IDLE * silent

    def look(self, runs: Sequence[Run], store: RunStore) -> None:
        """Take in what is new of the runs of this worker."""
        sizes = {run.id: _size(run.path / "events.jsonl") for run in runs}
        if sizes != self._sizes:
            self._sizes, self._heard, self._used_s = sizes, time.monotonic(), self._used(_pid(runs[0]))
            latest = [
                _of_this_attempt(run, store.events(run.id), most=None if not self._trains else RECENT) for run in runs
            ]
            self._trains = self._trains or all(any(one["type"] == "Started" for one in some) for some in latest)
            self.step_s = max(map(_step_s, latest))
        for run in runs:
            if asked_of(run.path):
                self._asked.setdefault(run.id, time.monotonic())

    def deaf_to(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that were asked to end too long ago; nothing has been heard since of any run of the worker."""
        now = time.monotonic()
        waited = {run.id: now - max(self._asked.get(run.id, math.inf), self._heard) for run in runs}
        if not self._trains and all(now - self._asked.get(run.id, math.inf) > BEFORE_S for run in runs):
            return [*runs]  # it is loading, and that is all that is lost
        return [run for run in runs if waited[run.id] > max(PATIENCE_S, QUIET_STEPS * self.step_s)]

    def _used(self, pid: int | None = None) -> float:
        """Processor time so far, in seconds; 0 where it cannot be told."""
        try:
            if pid and (self._process is None or self._process.pid != pid):
                self._process = psutil.Process(pid)
            return sum(self._process.cpu_times()[:2]) if self._process else 0.0
        except psutil.Error:
            return 0.0


def together(waiting: Sequence[Run]) -> list[Run]:
    """The first of these runs and those of its study that one worker can train along: same base, same rows."""
    first = waiting[0]
    return [run for run in waiting if run is first or (first.config.study and _shares(run) == _shares(first))]


def lost_in_a_row(records: Iterable[Mapping[str, Any]], behind: int) -> int:
    """How often a run was lost before this time, without a checkpoint gained in between.

    behind: the step of its newest one. What a person resumes begins to count anew.
    """
    times, last = 0, -1
    for record in records:
        if record["type"] == "Ended":
            times, last = 0, -1
        elif record.get("code") in (LOST, OUT_OF_MEMORY):
            times = 1 if record["step"] > last else times + 1
            last = record["step"]
    return times if behind <= last else 0


def _held_bytes(run: Run, store: RunStore) -> float:
    """The most memory that the worker of a run was seen to hold; 0 where the figure is of a GPU, or there is none."""
    begun = next((one for one in reversed(store.events(run.id)) if one["type"] == "Started"), None)
    return run.latest.get("memory_bytes", 0.0) if begun and begun["device"] == "cpu" else 0.0


def _crashed(run: Run, times: int, finding: Warned, held_bytes: float) -> dict[str, str]:
    """Why a run is given up."""
    what = "was ended for its memory" if finding.code == OUT_OF_MEMORY else "crashed"
    words = disk.megabytes(held_bytes), disk.megabytes(ram.total())
    held = f"; it held {words[0]} of {words[1]}" if held_bytes else ""
    return {
        "code": "E_CRASHED",
        "message": f"The worker {what} {times} times in a row, the last time at step {run.step}{held}.",
        "hint": "The log has its last words. Resume it once the cause is gone, or start it with a smaller batch.",
    }


def _of_this_attempt(
    run: Run, records: Sequence[Mapping[str, Any]], most: int | None = None
) -> list[Mapping[str, Any]]:
    """What the latest attempt has said, newest first; at most so many of its records."""
    number = 1 + len(earlier_logs(run.path))
    return [*takewhile(lambda one: one["attempt"] == number, islice(reversed(records), most))]


def _step_s(latest: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that a step usually takes, by the last ones; a jump of the clock is one of many."""
    times = [one["time"] for one in latest if one["type"] == "Metric" and "train_loss" in one["values"]][:21]
    return median([max(0.0, newer - older) for newer, older in pairwise(times)] or [0.0])


def _shares(run: Run) -> tuple:
    config, train = run.config, run.config.train
    kind = "lora" if isinstance(config.method, LoraSpec) else run.id  # copies of the base would fill the memory
    data = config.dataset.id, config.dataset.format, *sorted(config.dataset.columns.items())
    rows = data, config.task, train.max_length, train.holdout, train.seed
    return run.owner, config.study, config.executor, config.model, kind, train.precision, rows


def _worker(run: Run) -> Any:
    """What runs of one worker have in common from its start: the file that it prints to."""
    try:
        return (run.path / "worker.log").stat().st_ino
    except OSError:
        return run.id


def _pid(run: Run) -> int | None:
    return (read_json(run.path / "worker.json") or {}).get("pid")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
