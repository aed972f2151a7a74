"""RunStore(root): runs as folders that one worker writes and anyone reads.

    run.json       config, dataset, model revision; written last, by rename: a folder without it is no run
    events.jsonl   appended by the worker, one write per line
    control.json   what the user asked of the worker: stop or pause
    worker.lock    held by the kernel for as long as the worker lives
    worker.log     what the worker printed; its existence says that a worker was started
    worker.1.log   what it printed at an earlier attempt
    checkpoints/   what an attempt goes on from
    adapter/       the best adapter so far, PEFT layout
    exit.json      how the run ended, or that it is paused
    shared         there when its owner lets others see its figures

Status is derived from these files on every look and never stored.
"""

import copy
import fcntl
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from lora_studio.errors import StudioError, quote
from lora_studio.events import from_line
from lora_studio.fields import build
from lora_studio.owners import NOBODY
from lora_studio.runs.checkpoints import any_saved, newest
from lora_studio.runs.config import Run, RunConfig, Status

ID = re.compile(r"[0-9a-f]{32}")
REPEATED = ("Metric", "Sample", "Saved")  # what a resumed attempt says anew


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step: a reader sees the old text or the new, and so does the next start after a crash."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
        lock = (path / "worker.lock").open("wb")
    except FileNotFoundError:  # the run was deleted
        yield None
        return
    with lock:
        yield lock if _held(lock, time.monotonic() + patience_s) else None


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
        kept.append(record)
    return kept


class Journal:
    """The events of one run, each byte read once; a torn last line waits until it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.latest: dict[str, float] = {}
        self.step, self.steps, self.note = 0, 0, ""
        self._offset = 0
        self._lock = threading.Lock()

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
            for line in whole.splitlines():
                record = from_line(line)
                if record:
                    self._take(record)
        return self

    def _take(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if record["type"] == "Started":
            self.steps, self.note = record["steps"], ""
            if record.get("attempt", 1) > 1:  # it may begin before where the one before it had come to
                self.step, self.latest = record["step"], {}
                for one in standing(self.records):
                    self._note_figures(one)
        self.step = max(self.step, record["step"])
        self._note_figures(record)
        if record["type"] == "Warned":
            self.note = record["message"]

    def _note_figures(self, record: Mapping[str, Any]) -> None:
        if record["type"] == "Metric":
            self.latest.update({name: value for name, value in record["values"].items() if value is not None})


class RunStore:
    """All runs under root/runs. Ids are random and are looked up, never joined to a path unchecked.

    One that is `of` an owner knows no others: to it, a run of somebody else is one that does not exist.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "runs"
        self.owner: str | None = None  # None: everybody's
        self._journals: dict[str, Journal] = {}
        self._ended: dict[str, tuple[Any, Run]] = {}  # with the stamp of its exit.json; none changes without it

    def of(self, owner: str) -> "RunStore":
        """The runs of one owner alone; whoever is handed this cannot reach another's."""
        scoped = copy.copy(self)  # with the same journals and caches
        scoped.owner = owner
        return scoped

    def create(self, config: RunConfig, facts: Mapping[str, Any]) -> Run:
        """A new queued run. `facts` are what was known before launch: model revision, data fingerprint, estimate."""
        run = uuid.uuid4().hex
        path = self.folder / run
        path.mkdir(parents=True)
        record = {"created": time.time(), "owner": self.owner or NOBODY, "config": asdict(config), "facts": dict(facts)}
        write_json(path / "run.json", record)
        return self.get(run)

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
            raise (error if self.owner is None else _not_found(run)) from None
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

    def _owns(self, run: Run) -> bool:
        return self.owner is None or run.owner == self.owner

    def events(self, run: str, start: int = 0) -> list[dict[str, Any]]:
        """The run's events from number `start` on, oldest first."""
        view = self.get(run)
        return self._journal(view.id, view.path).refresh().records[start:]

    def log(self, run: str, limit: int = 4000) -> str:
        """The end of what the worker printed, at most `limit` characters."""
        try:
            return (self.get(run).path / "worker.log").read_text(encoding="utf-8", errors="replace")[-limit:]
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

    def _request(self, run: str, what: str, status: Status) -> None:
        view = self.get(run)
        with claim(view.path) as lock:
            if lock and not (view.path / "worker.log").exists() and not (view.path / "exit.json").exists():
                end = {"status": status, "step": view.step, "values": {}, "time": time.time()}
                write_json(view.path / "exit.json", end)
                return
        if not (view.path / "exit.json").exists():
            write_json(view.path / "control.json", {what: True, "time": time.time()})

    def requeue(self, run: str) -> Run:
        """Put a run that was paused, stopped, lost or failed back into the queue, to go on from its checkpoint.

        One that was lost before its first checkpoint, or ended before its first step, begins from the start.
        Raises E_RUN_DONE, E_RUN_ACTIVE, E_CHECKPOINT when all checkpoints are damaged, E_NO_CHECKPOINT.
        """
        path = self.get(run).path
        seen = _stamp(path / "exit.json"), _stamp(path / "worker.log")
        view = self.get(run)
        if view.status == "done":
            hint = "Start it again, with more steps if it should learn more."
            raise StudioError("E_RUN_DONE", f"{quote(view.name)} is done; nothing is left to train.", hint)
        with claim(path, patience_s=0.5) as lock:
            changed = seen != (_stamp(path / "exit.json"), _stamp(path / "worker.log"))
            if lock is None or view.active or changed:
                raise StudioError("E_RUN_ACTIVE", f"{quote(view.name)} is {view.status}.", "Pause or stop it first.")
            if any_saved(path) and newest(path)[0] is None:
                message = f"All checkpoints of {quote(view.name)} are damaged."
                raise StudioError("E_CHECKPOINT", message, "Start the run again.")
            if not view.resumable:
                message = f"{quote(view.name)} has no checkpoint to go on from."
                raise StudioError("E_NO_CHECKPOINT", message, "Start the run again.")
            self._clear(path)
        return self.get(run)

    def _clear(self, path: Path) -> None:
        """Make a run that has ended a queued one; whatever is left of it after a crash says how it had ended.

        So what tells of the end goes last: exit.json, or the log of a worker that left none.
        """
        for name in ("control.json", "worker.json"):
            (path / name).unlink(missing_ok=True)
        log = path / "worker.log"
        if log.exists():
            log.rename(path / f"worker.{len(earlier_logs(path)) + 1}.log")
        (path / "exit.json").unlink(missing_ok=True)

    def delete(self, run: str) -> None:
        """Forget a run and all its files. Raises E_RUN_ACTIVE while a worker has it."""
        view = self.get(run)
        with claim(view.path) as lock:
            if lock is None:
                raise StudioError("E_RUN_ACTIVE", f"{quote(view.name)} is still running.", "Stop it first.")
            gone = view.path.with_name(f"{view.id}.deleted")
            view.path.rename(gone)  # no longer a run, even if removing its files is interrupted
        shutil.rmtree(gone)
        self._journals.pop(view.id, None)
        self._ended.pop(view.id, None)

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
        return self._journals.setdefault(run, Journal(path / "events.jsonl"))

    def _view(self, run: str, path: Path) -> Run:
        view, shared = self._view_of_its_end(run, path), (path / "shared").exists()
        return view if view.shared == shared else replace(view, shared=shared)

    def _view_of_its_end(self, run: str, path: Path) -> Run:
        stamp = _stamp(path / "exit.json")  # before the look, so that a newer end is never taken for this one
        kept = self._ended.get(run)
        if stamp and kept and kept[0] == stamp:
            return kept[1]
        self._ended.pop(run, None)
        view = self._look(run, path)
        if stamp and not view.active and view.status != "lost":
            self._ended[run] = stamp, view
        return view

    def _look(self, run: str, path: Path) -> Run:
        record = read_json(path / "run.json") or {}
        try:
            config, created = build(RunConfig, record["config"]), float(record["created"])
        except (StudioError, KeyError, TypeError, ValueError) as error:
            message = f"The run {run} has no readable run.json."
            raise StudioError("E_RUN_DAMAGED", message, "Its folder may be deleted.") from error
        status, end = self._status(path)
        journal = self._journal(run, path).refresh()
        return Run(
            id=run,
            path=path,
            config=config,
            status=status,
            created=created,
            step=journal.step,
            steps=journal.steps or config.train.steps,
            latest=dict(journal.latest),
            summary=end.get("values", {}),
            note=journal.note,
            error=end.get("error"),
            facts=record.get("facts", {}),
            owner=str(record.get("owner", NOBODY)),
        )

    def _status(self, path: Path) -> tuple[Status, Mapping[str, Any]]:
        """The status, and what the run left at its end."""
        end = _end(path)
        if end is None and is_locked(path / "worker.lock"):
            return "running", {}
        if end is None and not (path / "worker.log").exists():
            return "queued", {}
        end = end or _end(path) or {"status": "lost", "error": _LOST}  # it may have ended between the looks
        return end["status"], end

    def list(self) -> list[Run]:  # the last method: behind it, `list` is no longer the built-in one
        """Every readable run of the owner, newest first."""
        runs = []
        for path in self.folder.glob("*"):
            if ID.fullmatch(path.name):
                try:
                    view = self._view(path.name, path)
                except StudioError:
                    continue
                if self._owns(view):
                    runs.append(view)
        return sorted(runs, key=lambda run: (run.created, run.id), reverse=True)


def _not_found(run: str) -> StudioError:
    return StudioError("E_RUN_NOT_FOUND", f"There is no run {quote(run)}.", "The run list shows the ids.")


def _end(path: Path) -> dict[str, Any] | None:
    """exit.json, when it says how the run ended."""
    end = read_json(path / "exit.json")
    return end if end and end.get("status") in ("done", "stopped", "paused", "failed") else None


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What differs between one file of this name and the next; None when there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


_LOST = {
    "code": "E_LOST",
    "message": "The worker ended without saying why: it was killed, ran out of memory, or the machine went down.",
    "hint": "Resume it, or start it again with a smaller batch. The log shows its last words.",
}
