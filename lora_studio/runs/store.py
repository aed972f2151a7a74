"""RunStore(root): runs as folders that one worker writes and anyone reads.

    run.json       config, dataset, model revision; written last, by rename: a folder without it is no run
    events.jsonl   appended by the worker, one write per line
    control.json   what the user asked of the worker: stop
    worker.lock    held by the kernel for as long as the worker lives
    worker.log     what the worker printed; its existence says that a worker was started
    adapter/       the best adapter so far, PEFT layout
    exit.json      how the run ended

Status is derived from these files on every look and never stored.
"""

import fcntl
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from lora_studio.errors import StudioError, quote
from lora_studio.events import from_line
from lora_studio.fields import build
from lora_studio.runs.config import Run, RunConfig, Status

ID = re.compile(r"[0-9a-f]{32}")


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
def claim(path: Path) -> Iterator[BinaryIO | None]:
    """The open lock of a run, held inside, or None when a worker or another claimer has it."""
    try:
        lock = (path / "worker.lock").open("wb")
    except FileNotFoundError:  # the run was deleted
        yield None
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock


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
        self.step = max(self.step, record.get("step", 0))
        self.steps = record.get("steps", self.steps)
        if record["type"] == "Metric":
            self.latest.update({name: value for name, value in record["values"].items() if value is not None})
        self.note = (
            record["message"] if record["type"] == "Warned" else "" if record["type"] == "Started" else self.note
        )


class RunStore:
    """All runs under root/runs. Ids are random and are looked up, never joined to a path unchecked."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "runs"
        self._journals: dict[str, Journal] = {}
        self._ended: dict[str, Run] = {}  # what has ended does not change any more

    def create(self, config: RunConfig, facts: Mapping[str, Any]) -> Run:
        """A new queued run. `facts` are what was known before launch: model revision, data fingerprint, estimate."""
        run = uuid.uuid4().hex
        path = self.folder / run
        path.mkdir(parents=True)
        write_json(path / "run.json", {"created": time.time(), "config": asdict(config), "facts": dict(facts)})
        return self.get(run)

    def get(self, run: str) -> Run:
        """The run with this id, or with a unique beginning of it. Raises E_RUN_NOT_FOUND, E_RUN_DAMAGED."""
        full = run if ID.fullmatch(run) else self._complete(run)
        path = self.folder / full
        if not path.is_dir():
            raise StudioError("E_RUN_NOT_FOUND", f"There is no run {quote(run)}.", "The run list shows the ids.")
        return self._view(full, path)

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

    def request_stop(self, run: str) -> None:
        """Ask the worker to end after its current step and keep what it has; a queued run ends at once."""
        view = self.get(run)
        with claim(view.path) as lock:
            if lock and not (view.path / "worker.log").exists() and not (view.path / "exit.json").exists():
                write_json(view.path / "exit.json", {"status": "stopped", "step": 0, "values": {}, "time": time.time()})
                return
        if not (view.path / "exit.json").exists():
            write_json(view.path / "control.json", {"stop": True, "time": time.time()})

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
        if len(beginning) < 4 or len(found) != 1:
            raise StudioError("E_RUN_NOT_FOUND", f"There is no run {quote(beginning)}.", "The run list shows the ids.")
        return found[0]

    def _journal(self, run: str, path: Path) -> Journal:
        return self._journals.setdefault(run, Journal(path / "events.jsonl"))

    def _view(self, run: str, path: Path) -> Run:
        if run not in self._ended:
            view = self._look(run, path)
            if view.active or view.status == "lost":
                return view
            self._ended[run] = view
        return self._ended[run]

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
        """Every readable run, newest first."""
        runs = []
        for path in self.folder.glob("*"):
            if ID.fullmatch(path.name):
                try:
                    runs.append(self._view(path.name, path))
                except StudioError:
                    continue
        return sorted(runs, key=lambda run: (run.created, run.id), reverse=True)


def _end(path: Path) -> dict[str, Any] | None:
    """exit.json, when it says how the run ended."""
    end = read_json(path / "exit.json")
    return end if end and end.get("status") in ("done", "stopped", "failed") else None


_LOST = {
    "code": "E_LOST",
    "message": "The worker ended without saying why: it was killed, ran out of memory, or the machine went down.",
    "hint": "Start the run again; with less memory free, choose a smaller batch. The log shows its last words.",
}
