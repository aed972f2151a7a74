"""RunStore(root): runs as folders that one worker writes and anyone reads.

    run.json       config, dataset, model revision; written last, by rename: a folder without it is no run
    events.jsonl   appended by the worker, one write per line
    control.json   what the user asked of the worker: stop, pause, or stop to be deleted
    worker.lock    held by the kernel for as long as the worker lives
    worker.log     what the worker printed; its existence says that a worker was started
    worker.1.log   what it printed at an earlier attempt
    checkpoints/   what an attempt goes on from
    adapter/       the best adapter so far, PEFT layout
    exit.json      how the run ended, or that it is paused; and what its journal says in short
    over.json      the same, while a worker still looks at what was learnt; if it is killed there, this is the end
    shared         there when its owner lets others see its figures
    about.json     what its owner calls it since, and has noted about it

A run that is deleted is renamed to ID.deleted, and can be brought back for UNDO_S; then to ID.gone, and removed.
Neither is a run any more: what a crash leaves of them goes when the next app begins.

Status is derived from these files on every look and never stored.
"""

import copy
import fcntl
import functools
import itertools
import json
import math
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from lora_studio.errors import StudioError, quote
from lora_studio.events import Ended, Event, from_lines, to_line
from lora_studio.fields import build, check
from lora_studio.limits import Limits, limits_here
from lora_studio.owners import NOBODY, home
from lora_studio.runs import checkpoints, disk
from lora_studio.runs.config import DataChoice, Run, RunConfig, Status, check_limit

ID = re.compile(r"[0-9a-f]{32}")
REPEATED = ("Metric", "Sample", "Saved")  # what a resumed attempt says anew
OVER = "over.json"
UNKNOWN = "?"  # the owner of a run that does not say so any more; no visitor's name is that
OF_THE_APP = ("control.json", "about.json")  # written while a worker has the run
SEEN = {"step", "steps", "latest", "note", "verdict"}  # of a journal, by those who list runs
JOURNALS = 64  # read ones that are kept
DYING_S = 5.0  # that a process that was killed may take to let go of its run
EARLIER_LOG_BYTES = 256 * 1024  # that are kept of what each earlier attempt printed
UNDO_S = 30  # for which what is deleted can be brought back
CHECKPOINT_BYTES = 16  # per trained number: itself and its best, in fp32, and two moments


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step: a reader sees the old text or the new, and so does the next start after a crash."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    disk.sync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None when it is missing or not a whole JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_locked(path: Path) -> bool:
    """Whether a living process holds `path`; the kernel frees it at any death."""
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def claim(path: Path, patience_s: float = 0.0) -> Iterator[BinaryIO | None]:
    """The open lock of a run, held inside, or None when a worker or another claimer has it.

    patience_s: how long to wait for it; whoever asks for a status holds it for an instant.
    """
    try:
        lock = disk.at_any_rate(path.parent.parent, _to_lock, path / "worker.lock")
    except FileNotFoundError:  # the run was deleted
        yield None
        return
    with lock:
        held = _held(lock, time.monotonic() + patience_s)
        yield lock if held and _is_still(path / "worker.lock", lock) else None


def _to_lock(path: Path) -> BinaryIO:
    return path.open("wb")


def _held(lock: BinaryIO, until: float) -> bool:
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)
        else:
            return True


def open_journal(path: Path) -> int:
    """The descriptor of a run's journal, to append to; a line that was torn by a power cut is ended."""
    journal = os.open(path / "events.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    size = os.fstat(journal).st_size
    if size and os.pread(journal, 1, size - 1) != b"\n":
        disk.append(journal, b"\n")
    return journal


def tell(journal: int, event: Event, attempt: int) -> None:
    """Append an event: a reader never sees half of one, and a kill loses none."""
    disk.append(journal, to_line(event, time=time.time(), attempt=attempt).encode() + b"\n")


def write_end(
    path: Path, status: Status, *, step: int, error: Any = None, values: Any = None, name: str = "exit.json"
) -> None:
    """Leave exit.json, with what a list of runs shows of the journal, so that nobody has to read that again."""
    seen = Journal(path / "events.jsonl").refresh().seen
    end = {"status": status, "step": step, "error": error, "values": values or {}, "seen": seen, "time": time.time()}
    disk.at_any_rate(path.parent.parent, write_json, path / name, end)


def sweep(path: Path) -> None:
    """Remove what a worker that was killed has left half written; only while the run's lock is held."""
    checkpoints.sweep(path)
    shutil.rmtree(path / "adapter.tmp", ignore_errors=True)
    for left in path.glob("*.tmp"):
        if not left.name.startswith(OF_THE_APP):
            left.unlink(missing_ok=True)


def asked_of(path: Path) -> Status | None:
    """What a person asked of a run: to stop, or to pause."""
    control = read_json(path / "control.json") or {}
    return "stopped" if control.get("stop") or control.get("discard") else "paused" if control.get("pause") else None


def is_unwanted(path: Path) -> bool:
    """Whether a person asked to stop a run and to keep nothing of it."""
    return bool((read_json(path / "control.json") or {}).get("discard"))


def in_turn(waiting: Iterable[Run], served: Mapping[str, int]) -> list[Run]:
    """Queued runs in the order in which they start: owners take turns, and within one the oldest is first.

    served: the number of each owner's last turn; whoever has waited longest since is first.
    """
    queues: dict[str, list[Run]] = {}
    for run in sorted(waiting, key=lambda one: (one.created, one.id)):
        queues.setdefault(run.owner, []).append(run)
    owners = sorted(queues, key=lambda owner: (served.get(owner, 0), queues[owner][0].created))
    rounds = itertools.zip_longest(*(queues[owner] for owner in owners))
    return [run for one in rounds for run in one if run]


def earlier_logs(path: Path) -> list[Path]:
    """What workers of earlier attempts printed; there are as many as attempts before this one."""
    return [log for log in path.glob("worker.*.log") if log.suffixes[0][1:].isdecimal()]


def standing(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records that hold: an attempt that went on behind a step says anew what was said of later ones.

    One that began from the start says step 0 anew, too.
    """
    kept: list[Mapping[str, Any]] = []
    for record in records:
        if record["type"] == "Started" and record.get("attempt", 1) > 1:
            after = record["step"] or -1
            kept = [one for one in kept if one["type"] not in REPEATED or one["step"] <= after]
            kept = [one for one in kept if one["type"] != "Learned"]  # of an adapter that may not be the best any more
        kept.append(record)
    return kept


class Journal:
    """The events of one run, each byte read once; a torn last line waits until it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.latest: dict[str, float] = {}
        self.step, self.steps, self.note, self.verdict = 0, 0, "", ""
        self._offset = 0
        self._lock = threading.Lock()

    @property
    def seen(self) -> dict[str, Any]:
        """What a list of runs shows of it."""
        return {name: getattr(self, name) for name in SEEN}

    def refresh(self) -> "Journal":
        """Read what was appended since the last look."""
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    file.seek(self._offset)
                    chunk = file.read()
            except FileNotFoundError:
                return self
            whole = chunk[: chunk.rfind(b"\n") + 1]
            self._offset += len(whole)
            for record in from_lines(whole):
                self._take(record)
        return self

    def _take(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        kind, step = record["type"], record["step"]
        if kind == "Started":
            self.steps, self.note, self.verdict = record["steps"], "", ""
            if record.get("attempt", 1) > 1:  # it may begin before where the one before it had come to
                self.step, self.latest = step, {}
                for one in standing(self.records):
                    self._note_figures(one)
        if step > self.step:
            self.step = step
        if kind == "Metric":
            self._note_figures(record)
        elif kind == "Warned":
            self.note = record["message"]
        elif kind == "Learned":
            self.verdict = str(record["verdict"])

    def _note_figures(self, record: Mapping[str, Any]) -> None:
        if record["type"] == "Metric":
            values = record["values"]
            if "nan" in record:
                values = {name: value for name, value in values.items() if value is not None}
            self.latest.update(values)


class RunStore:
    """All runs under root/runs. Ids are random and are looked up, never joined to a path unchecked.

    One that is `of` an owner knows no others: to it, a run of somebody else is one that does not exist.
    """

    def __init__(self, root: Path, limits: Limits | None = None) -> None:
        self.folder = root / "runs"
        self.limits = limits or limits_here()
        self.owner: str | None = None  # None: everybody's
        self.served: dict[str, int] = {}  # the number of each owner's last turn in the queue
        self.said: dict[str, str] = {}  # by run, what is to be read of it now instead of its newest message
        self._journals: dict[str, Journal] = {}
        self._shelf = threading.Lock()
        self._ended: dict[str, tuple[Any, Run]] = {}  # with the stamps of what it does not change without
        self._deleted: dict[str, tuple[float, Run]] = {}  # what can be brought back, and until when
        self._epoch = time.time() - time.monotonic()

    def of(self, owner: str) -> "RunStore":
        """The runs of one owner alone; whoever is handed this cannot reach another's."""
        scoped = copy.copy(self)  # with the same journals and caches
        scoped.owner = owner
        return scoped

    def create(self, config: RunConfig, facts: Mapping[str, Any], adapter: Path | None = None) -> Run:
        """A new queued run. `facts` are what was known before launch: model revision, data fingerprint, estimate.

        adapter: a folder under the root with one that was made elsewhere; it is moved, and the run is done.
        It is made aside and renamed, so that it is whole once it is seen. Raises E_DISK.
        """
        run = uuid.uuid4().hex
        fresh = self.folder / f"{run}.new"
        record = {"created": time.time(), "owner": self.owner or NOBODY, "config": asdict(config), "facts": dict(facts)}
        try:
            fresh.mkdir(parents=True)
            if adapter:
                for file in (adapter, *adapter.iterdir()):
                    disk.sync(file)
                adapter.rename(fresh / "adapter")
                write_end(fresh, "done", step=0)
            write_json(fresh / "run.json", record)
            fresh.rename(self.folder / run)
            disk.sync(self.folder)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if not disk.is_full(error, self.folder.parent):
                raise
            raise disk.full(self.folder.parent, 4096) from error
        return self.get(run)

    def admit(self, runs: int = 1) -> None:
        """Raise E_QUEUE_FULL when so many more may not wait; to be asked, and acted upon, while the queue is held.

        Raises E_LIMIT when the owner's runs and datasets take more of the disk than they may.
        """
        room = self.limits.kept_bytes
        if room < math.inf and (kept := self.usage(self.owner or NOBODY)[1]) > room:
            message = f"Your runs and datasets take {disk.megabytes(kept)}; here it is at most {disk.megabytes(room)}."
            raise StudioError("E_LIMIT", message, "Delete some of them.")
        owners = [run.owner for run in self._everybodys().list() if run.status == "queued"]
        mine, most, by_all = owners.count(self.owner or NOBODY), self.limits.queued, self.limits.queued_by_all
        if mine + runs > most:
            message = f"{mine} of your runs are waiting already; the limit is {most:,.0f} queued."
            raise StudioError("E_QUEUE_FULL", message, "Wait until one has begun, or stop one.")
        if len(owners) + runs > by_all:
            message = f"{len(owners)} runs are waiting already; the limit is {by_all:,.0f} queued by all."
            raise StudioError("E_QUEUE_FULL", message, "Try again when some have ended.")

    def check_room(self, facts: Mapping[str, Any]) -> None:
        """Raise E_DISK when a run's checkpoints would not fit beside what is to stay free."""
        self.check_free("Checkpoints of this run need", 3 * checkpoint_bytes(facts))

    def check_free(self, what_needs: str, needs: int) -> None:
        """Raise E_DISK when so many bytes would not fit beside what is to stay free."""
        left, reserve = self._free(needs), self.limits.reserve_bytes
        if left < needs + reserve:
            message = (
                f"{what_needs} {disk.megabytes(needs)} and {disk.megabytes(reserve)} are to stay free, "
                f"but only {disk.megabytes(left)} of the disk are free."
            )
            raise StudioError("E_DISK", message, "Make room, for instance by deleting runs.")

    def _free(self, needs: int = 0) -> int:
        """Bytes that are free; where they do not do, what the owner has deleted cannot be brought back any longer."""
        if disk.free(self.folder.parent) < needs + self.limits.reserve_bytes:
            self.sweep_deleted(at_once=True)
        return disk.free(self.folder.parent)

    def position(self, run: str) -> int:
        """A run's place among all that wait, 1 for the next one; 0 when it does not wait."""
        view = self.get(run)
        waiting = [one for one in self._everybodys().list() if one.status == "queued"]
        return next((place for place, one in enumerate(in_turn(waiting, self.served), 1) if one.id == view.id), 0)

    def usage(self, owner: str) -> tuple[int, int]:
        """How many runs an owner has, and the bytes of these, of the owner's datasets and of what is not quite gone."""
        own = [run for run in self._everybodys().list() if run.owner == owner]
        aside = [self._aside(run.id) for run, _ in self._everybodys().deleted() if run.owner == owner]
        kept = sum(map(disk.size, [*(run.path for run in own), *aside]))
        return len(own), kept + self._home_bytes(owner)

    def sweep_old(self) -> list[str]:
        """Delete what the limits do not let anybody keep: runs that have ended, oldest first. Their ids.

        An owner's newest run stays until it is too old, however large it is. So do the datasets of a visitor, who
        then has no run and has not come for as long.
        """
        limits, gone, now = self.limits, [], self._now()
        idle_s = 3600 * limits.idle_hours
        if math.isinf(min(limits.kept_runs, limits.kept_bytes, limits.kept_bytes_by_all, idle_s)):
            return gone
        every, aside = sorted(self._everybodys().list(), key=_touched), self._everybodys().deleted()
        sizes = {run.id: disk.size(run.path) for run in every}
        count: dict[str, int] = {}
        held = {run.owner: 0 for run in (*every, *(one for one, _ in aside))}
        for run, _ in aside:
            sizes[run.id] = disk.size(self._aside(run.id))
            held[run.owner] += sizes[run.id]
        for run in every:
            count[run.owner] = count.get(run.owner, 0) + 1
            held[run.owner] += sizes[run.id]
        for run, _ in aside:  # what is deleted goes before what is kept
            if held[run.owner] > limits.kept_bytes or sum(held.values()) > limits.kept_bytes_by_all:
                self._purge(run.id)
                held[run.owner] -= sizes[run.id]
        for run in every:
            old = now - _touched(run) > idle_s
            much = count[run.owner] > limits.kept_runs or held[run.owner] > limits.kept_bytes
            much = (much or sum(held.values()) > limits.kept_bytes_by_all) and count[run.owner] > 1
            if run.active or not (old or much):
                continue
            with suppress(StudioError):  # a worker has it after all
                self._everybodys().delete(run.id)
                self._purge(run.id)
                gone.append(run.id)
                count[run.owner] -= 1
                held[run.owner] -= sizes[run.id]
        for folder in (self.folder.parent / "owners").glob("*"):
            newest = max(map(_touched_at, (folder, *folder.rglob("*"))))
            if not count.get(folder.name) and now - newest > idle_s:
                shutil.rmtree(folder, ignore_errors=True)
        return gone

    def sweep_leftovers(self) -> None:
        """Remove folders that a crash left on their way in or out; only by the one app, holding the queue."""
        for left in self.folder.glob("*.deleted"):
            if left.stem not in self._deleted:
                self._purge(left.stem)
        for left in (*self.folder.glob("*.gone"), *self.folder.glob("*.new")):
            shutil.rmtree(left, ignore_errors=True)

    def _now(self) -> float:
        """Seconds since the epoch by the date as it was at first: one that jumps makes nothing old."""
        return self._epoch + time.monotonic()

    def _home_bytes(self, owner: str) -> int:
        return disk.size(home(self.folder.parent, owner)) if ID.fullmatch(owner) else 0

    def _everybodys(self) -> "RunStore":
        every = copy.copy(self)
        every.owner = None
        return every

    def get(self, run: str) -> Run:
        """The run with this id, or with a unique beginning of it. Raises E_RUN_NOT_FOUND, E_RUN_DAMAGED.

        Another owner's is not found, whether it exists or not.
        """
        view = self.look(run)
        if not self._owns(view):
            raise _not_found(run)
        return view

    def look(self, run: str) -> Run:
        """As `get`, but another's run is there, too, if it is shared; its figures and config alone are to be shown."""
        full = run if ID.fullmatch(run) else self._complete(run)
        path = self.folder / full
        if not path.is_dir():
            raise _not_found(run)
        try:
            view = self._view(full, path)
        except StudioError as error:
            raise (error if self.owner is None and path.is_dir() else _not_found(run)) from None
        if not self._owns(view) and not view.shared:
            raise _not_found(run)
        return view

    def share(self, run: str, on: bool = True) -> None:
        """Let others see a run's figures and config, or no longer."""
        marker = self.get(run).path / "shared"
        if on:
            marker.touch()
        else:
            marker.unlink(missing_ok=True)

    def describe(self, run: str, *, name: str | None = None, remarks: str | None = None) -> Run:
        """Call a run otherwise, or note something about it; what is not given stays, and no name is the first one.

        Raises E_CONFIG for a name, E_LIMIT for remarks that are too long.
        """
        view = self.get(run)
        renamed = view.renamed if name is None else _encodable(" ".join(name.split()))
        noted = view.remarks if remarks is None else _encodable(remarks.strip())
        check(replace(view.config, name=renamed))
        check_limit("number of characters in a note", len(noted), self.limits.note_characters)
        about = {"name": "" if renamed == view.config.name else renamed, "remarks": noted}
        try:
            disk.at_any_rate(self.folder.parent, write_json, view.path / "about.json", about)
        except FileNotFoundError:  # deleted meanwhile
            raise _not_found(run) from None
        return self.get(view.id)

    def _owns(self, run: Run) -> bool:
        return self.owner is None or run.owner == self.owner

    def events(self, run: str, start: int = 0) -> list[dict[str, Any]]:
        """The run's events from number `start` on, oldest first."""
        view = self.get(run)
        return self._journal(view.id, view.path).refresh().records[start:]

    def log(self, run: str, limit: int = 4000) -> str:
        """The end of what the worker printed, at most `limit` characters."""
        try:
            with (self.get(run).path / "worker.log").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4 * limit))
                return file.read().decode("utf-8", errors="replace")[-limit:]
        except FileNotFoundError:
            return ""

    def curve(self, run: str) -> list[Mapping[str, Any]]:
        """The run's events without those that a later attempt said anew: each step once."""
        return standing(self.events(run))

    def request_stop(self, run: str) -> None:
        """Ask the worker to end after its current step and keep what it has; a queued run ends at once."""
        self._request(run, "stop", "stopped")

    def request_pause(self, run: str) -> None:
        """Ask the worker to end after its current step, to be resumed later; a queued run is paused at once."""
        self._request(run, "pause", "paused")

    def request_discard(self, run: str) -> None:
        """Ask the worker to end after its current step, to be deleted then; a queued run is deleted at once."""
        self._request(run, "discard", "stopped")
        if self.get(run).status not in ("running", "lost"):
            self.delete(run)

    def _request(self, run: str, what: str, status: Status) -> None:
        view = self.get(run)
        path = view.path
        try:
            if not (path / "worker.log").exists():
                with claim(path, patience_s=0.5) as lock:
                    if lock and not (path / "worker.log").exists() and not (path / "exit.json").exists():
                        self._end_without_worker(view, status)
                        return
            if not (path / "exit.json").exists():
                asked = {**(read_json(path / "control.json") or {}), what: True, "time": time.time()}
                disk.at_any_rate(self.folder.parent, write_json, path / "control.json", asked)
        except FileNotFoundError:  # deleted meanwhile
            raise _not_found(run) from None

    def settle(self, run: Run, status: Status, error: Mapping[str, Any] | None = None) -> None:
        """Write down how a run ended whose worker is no more and left no end; its adapter and checkpoints stay."""
        with claim(run.path, patience_s=DYING_S) as lock:
            if lock is None or _end(run.path) or _end(run.path, OVER):
                return
            sweep(run.path)
            self._end_without_worker(run, status, error)

    def _end_without_worker(self, run: Run, status: Status, error: Mapping[str, Any] | None = None) -> None:
        """Leave what a worker leaves at the end; call it with the lock held."""
        with suppress(OSError):  # exit.json is what counts
            event = Ended(step=run.step, run=run.id, status=status, error=error)
            disk.at_any_rate(self.folder.parent, _tell_once, run.path, event)
        write_end(run.path, status, step=run.step, error=error)

    def requeue(self, run: str, said: Event | None = None) -> Run:
        """Put a run that was paused, stopped, lost or failed back into the queue, to go on from its checkpoint.

        One that was lost before its first checkpoint, or ended before its first step, begins from the start.
        said: what its journal is to say of it, where nobody asked for this: then what a person asks of the run
        meanwhile still holds. Raises E_RUN_DONE, E_RUN_ACTIVE, E_CHECKPOINT when all checkpoints are damaged,
        E_NO_CHECKPOINT, E_RUN_NOT_FOUND when it is deleted meanwhile.
        """
        path = self.get(run).path
        self._free()
        seen = _stamp(path / "exit.json"), _stamp(path / "worker.log")
        view = self.get(run)
        if view.status == "done":
            hint = "Start it again, with more steps if it should learn more."
            raise StudioError("E_RUN_DONE", f"{quote(view.name)} is done; nothing is left to train.", hint)
        with claim(path, patience_s=0.5) as lock:
            changed = seen != (_stamp(path / "exit.json"), _stamp(path / "worker.log"))
            if lock is None and not path.is_dir():
                raise _not_found(run)
            if lock is None or view.active or changed:
                raise StudioError("E_RUN_ACTIVE", f"{quote(view.name)} is {view.status}.", "Pause or stop it first.")
            if checkpoints.any_saved(path) and checkpoints.newest(path)[0] is None:
                message = f"All checkpoints of {quote(view.name)} are damaged."
                raise StudioError("E_CHECKPOINT", message, "Start the run again.")
            if not view.resumable:
                message = f"{quote(view.name)} has no checkpoint to go on from."
                raise StudioError("E_NO_CHECKPOINT", message, "Start the run again.")
            if said:
                disk.at_any_rate(self.folder.parent, _tell_once, path, said)
            else:
                (path / "control.json").unlink(missing_ok=True)
            self._clear(path)
        return self.get(run)

    def _clear(self, path: Path) -> None:
        """Make a run that has ended a queued one; whatever is left of it after a crash says how it had ended.

        So what tells of the end goes last: exit.json, or the log of a worker that left none.
        """
        for name in ("worker.json", OVER):
            (path / name).unlink(missing_ok=True)
        log = path / "worker.log"
        if log.exists():
            disk.shorten(log, EARLIER_LOG_BYTES)
            log.rename(path / f"worker.{len(earlier_logs(path)) + 1}.log")
        (path / "exit.json").unlink(missing_ok=True)

    def delete(self, run: str) -> None:
        """Put a run aside, a damaged one too: `restore` has it for UNDO_S, then it is gone for good. Twice is once.

        It takes no byte of the disk. Raises E_RUN_ACTIVE while a worker has it.
        """
        try:
            view = self.get(run)
        except StudioError as error:
            view = next((one for one in self.list() if one.id == run), None)
            if view is None:
                raise error
        with claim(view.path, patience_s=0.5) as lock:
            if lock is None:
                if not view.path.is_dir():
                    return  # somebody else was quicker
                raise StudioError("E_RUN_ACTIVE", f"{quote(view.name)} is still running.", "Stop it first.")
            self._deleted[view.id] = time.monotonic() + UNDO_S, view  # before it looks like what a crash has left
            (view.path / "control.json").unlink(missing_ok=True)  # else what is brought back may be deleted once more
            try:
                disk.at_any_rate(self.folder.parent, view.path.rename, self._aside(view.id))
            except OSError:
                self._deleted.pop(view.id, None)
                raise
        for known in (self._journals, self._ended, self.said):
            known.pop(view.id, None)

    def deleted(self) -> list[tuple[Run, float]]:
        """What `restore` can bring back, as it was, and for how many seconds more; what was deleted last is last."""
        now = time.monotonic()
        return [(run, max(0.0, until - now)) for until, run in [*self._deleted.values()] if self._owns(run)]

    def restore(self, run: str) -> None:
        """Bring back a run that was deleted a moment ago, as it was; twice is once. Raises E_RUN_NOT_FOUND."""
        if any(view.id == run for view, _ in self.deleted()):
            try:
                disk.at_any_rate(self.folder.parent, self._aside(run).rename, self.folder / run)
            except FileNotFoundError:
                pass  # somebody else was quicker, to bring it back or to remove it
            else:
                self._deleted.pop(run, None)
                return
        self.get(run)

    def sweep_deleted(self, *, at_once: bool = False) -> None:
        """Remove for good what cannot be brought back any longer; at_once: all that the owner has deleted."""
        kept = {run.id for run, left_s in self._everybodys().deleted() if left_s}
        mine = {run.id for run, _ in self.deleted()} if at_once else set()
        for run in [one for one in [*self._deleted] if one in mine or one not in kept]:
            self._purge(run)

    def _aside(self, run: str) -> Path:
        return self.folder / f"{run}.deleted"

    def _purge(self, run: str) -> None:
        """Remove what is aside; by then it has another name, so that nothing half removed is brought back."""
        gone = self.folder / f"{run}.gone"
        with suppress(OSError):  # what is left of it goes another time
            self._aside(run).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        self._deleted.pop(run, None)

    def _complete(self, beginning: str) -> str:
        found = [
            path.name for path in self.folder.glob("*") if ID.fullmatch(path.name) and path.name.startswith(beginning)
        ]
        if self.owner is not None:
            found = [run.id for run in self.list() if run.id.startswith(beginning)]
        if len(beginning) < 4 or len(found) != 1:
            raise _not_found(beginning)
        return found[0]

    def _journal(self, run: str, path: Path) -> Journal:
        """The run's journal as far as it was read; the ones that were asked for last are kept."""
        with self._shelf:
            journal = self._journals.pop(run, None) or Journal(path / "events.jsonl")
            self._journals[run] = journal
            for old in itertools.islice([*self._journals], max(0, len(self._journals) - JOURNALS)):
                del self._journals[old]
        return journal

    def _view(self, run: str, path: Path) -> Run:
        view, shared, said = self._view_of_its_end(run, path), (path / "shared").exists(), self.said.get(run)
        if view.shared == shared and not said:
            return view
        return replace(view, shared=shared, note=said or view.note)

    def _view_of_its_end(self, run: str, path: Path) -> Run:
        # before the look, so that a newer end is never taken for this one
        stamps = tuple(_stamp(path / name) for name in ("exit.json", "about.json", "control.json"))
        kept = self._ended.get(run)
        if stamps[0] and kept and kept[0] == stamps:
            return kept[1]
        self._ended.pop(run, None)
        view = self._look(run, path)
        if stamps[0] and not view.active and view.status != "lost":
            self._ended[run] = stamps, view
        return view

    def _look(self, run: str, path: Path) -> Run:
        try:
            record, config, created = _written(path / "run.json", _stamp(path / "run.json"))
        except (StudioError, KeyError, TypeError, ValueError) as error:
            why = error.message if isinstance(error, StudioError) else "It is missing or torn."
            message = f"The run {run} has no readable run.json. {why}"
            raise StudioError("E_RUN_DAMAGED", message, "Its folder may be deleted.") from error
        status, end = self._status(path)
        seen = end.get("seen")
        if not isinstance(seen, dict) or not seen.keys() >= SEEN:
            seen = self._seen(run, path)
        about = read_json(path / "about.json") or {}
        return Run(
            id=run,
            path=path,
            config=config,
            status=status,
            created=created,
            step=seen["step"],
            steps=seen["steps"] or config.train.steps,
            latest=dict(seen["latest"]),
            summary=end.get("values", {}),
            note=seen["note"],
            verdict=seen["verdict"],
            error=end.get("error"),
            facts=record.get("facts", {}),
            owner=str(record.get("owner", NOBODY)),
            renamed=str(about.get("name", "")),
            remarks=str(about.get("remarks", "")),
            discarded=status not in ("queued", "running", "lost") and is_unwanted(path),
        )

    def _seen(self, run: str, path: Path) -> dict[str, Any]:
        begun = (path / "events.jsonl").exists()  # else there is nothing to keep
        return (self._journal(run, path) if begun else Journal(path / "events.jsonl")).refresh().seen

    def _damaged(self, path: Path, error: StudioError) -> Run:
        """What is left to say of a run whose run.json cannot be read; its owner, if that can."""
        owner = (read_json(path / "run.json") or {}).get("owner", UNKNOWN)
        return Run(
            id=path.name,
            path=path,
            config=RunConfig(model="", dataset=DataChoice(id="")),
            status="damaged",
            created=_touched_at(path),
            error={"code": error.code, "message": error.message, "hint": error.hint},
            owner=owner if isinstance(owner, str) else UNKNOWN,
        )

    def _status(self, path: Path) -> tuple[Status, Mapping[str, Any]]:
        """The status, and what the run left at its end."""
        end = _end(path)
        if end is None and is_locked(path / "worker.lock"):
            return "running", {}
        if end is None and not (path / "exit.json").exists() and not (path / "worker.log").exists():
            return "queued", {}
        end = end or _end(path) or _end(path, OVER)  # it may have ended between the looks
        if end is None:
            end = {"status": "damaged", "error": _TORN} if (path / "exit.json").exists() else _LOST
        return end["status"], end

    def list(self) -> list[Run]:  # the last method: behind it, `list` is no longer the built-in one
        """Every run of the owner, newest first; one whose run.json cannot be read is "damaged" and says why."""
        runs = []
        for path in self.folder.glob("*"):
            if ID.fullmatch(path.name):
                try:
                    view = self._view(path.name, path)
                except StudioError as error:
                    if not path.is_dir():
                        continue  # deleted meanwhile
                    view = self._damaged(path, error)
                if self._owns(view):
                    runs.append(view)
        return sorted(runs, key=lambda run: (run.created, run.id), reverse=True)


def checkpoint_bytes(facts: Mapping[str, Any]) -> int:
    """About what one checkpoint of a run takes, by the estimate among its facts."""
    return CHECKPOINT_BYTES * int((facts.get("estimate") or {}).get("trainable", 0))


def _encodable(text: str) -> str:
    """The text without half characters (lone surrogates), which no file can hold."""
    return text.encode(errors="replace").decode()


def _tell_once(path: Path, event: Event) -> None:
    """Append an event to the journal of a run that no worker has; call it with the lock held."""
    journal = open_journal(path)
    try:
        tell(journal, event, 1 + len(earlier_logs(path)))
        os.fsync(journal)
    finally:
        os.close(journal)


def _touched(run: Run) -> float:
    """When something last happened to a run, in seconds since the epoch."""
    return max(_touched_at(run.path), *(_touched_at(run.path / name) for name in ("exit.json", "worker.log")))


def _touched_at(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _not_found(run: str) -> StudioError:
    return StudioError("E_RUN_NOT_FOUND", f"There is no run {quote(run)}.", "The run list shows the ids.")


def _end(path: Path, name: str = "exit.json") -> dict[str, Any] | None:
    """exit.json, when it says how the run ended; OVER says so of a run that no worker has."""
    end = read_json(path / name)
    return end if end and end.get("status") in ("done", "stopped", "paused", "failed") else None


@functools.lru_cache(maxsize=64)  # a run that is watched is asked for again and again; an ended one is kept as a whole
def _written(path: Path, stamp: tuple[int, ...] | None) -> tuple[Mapping[str, Any], RunConfig, float]:
    """What a run.json says, which is written once. Raises StudioError, KeyError, TypeError or ValueError."""
    record = read_json(path) or {}
    return record, build(RunConfig, record["config"]), float(record["created"])


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What differs between one file of this name and the next; None when there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _is_still(path: Path, file: BinaryIO) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


_LOST = {
    "status": "lost",
    "error": {
        "code": "E_LOST",
        "message": "The worker ended without saying why: it was killed, ran out of memory, or the machine went down.",
        "hint": "Resume it, or start it again with a smaller batch. The log shows its last words.",
    },
}
_TORN = {
    "code": "E_RUN_DAMAGED",
    "message": "How this run ended cannot be read: its exit.json is torn.",
    "hint": "What it kept is in its folder; the run may be deleted.",
}
