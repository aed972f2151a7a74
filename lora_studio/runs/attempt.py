"""One attempt at one run: what is written to its folder while it trains, and how it ends.

It takes the events of its training one by one. Whenever all has been said of a step it may save a checkpoint, and
it looks whether a pause or a stop was asked for; so a checkpoint and the journal always agree, and an attempt that
goes on from one says neither a step twice nor leaves one out. It does not know the other runs of its worker.
"""

import logging
import math
import os
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lora_studio.doctor import Doctor, remedy
from lora_studio.errors import StudioError, redacted
from lora_studio.events import Ended, Event, Metric, Probed, Sample, Saved, Started, Warned
from lora_studio.fields import build
from lora_studio.limits import Limits, limits_here
from lora_studio.owners import NOBODY
from lora_studio.runs import checkpoints, disk
from lora_studio.runs.config import OUT_OF_MEMORY, RunConfig, Status, check_limit
from lora_studio.runs.store import (
    OVER,
    Journal,
    asked_of,
    checkpoint_bytes,
    earlier_logs,
    is_unwanted,
    open_journal,
    read_json,
    standing,
    sweep,
    tell,
    write_end,
)

log = logging.getLogger(__name__)
SAVE_S, SAVE_SHARE = 30.0, 20.0  # between checkpoints: at least this long, and this many times what one takes
MEASURED = ("heldout_loss", "accuracy", "general_loss")  # of the base, before the first step
LOOK_SHARE, LOOK_S, LOOK_MOST_S = 0.2, 3.0, 60.0  # of the time that training took, to see what it taught; bounds
PROBE = {"probe_seconds": "seconds", "probe_memory_bytes": "memory_bytes"}  # the summary's name: the event's


class Attempt:
    """Begun with the lock of the run held, which is let go at the end."""

    def __init__(self, path: Path, lock: BinaryIO | None = None, limits: Limits | None = None) -> None:
        sweep(path)
        record = read_json(path / "run.json") or {}
        self.path, self._lock = path, lock
        self._limits = limits or limits_here()
        self.config: RunConfig = build(RunConfig, record["config"])
        self.owner: str = record.get("owner", NOBODY)
        self.labels: Sequence[str] = record["facts"].get("labels", ())
        self.base_name = record["facts"].get("repo") or self.config.model  # which a loader of the adapter looks for
        self.revision: str = record["facts"].get("revision", "")  # of the base; empty where it was not looked up
        self._checkpoint_bytes = checkpoint_bytes(record["facts"])
        self.number = 1 + len(earlier_logs(path))
        self.ended = False
        self.terminated = False  # by the system, as when it shuts down: nobody asked for an end of this run
        self.companions: Sequence[Attempt] = [self]  # all of its worker
        self.examples: tuple[Sequence[Any], Sequence[Any]] = (), ()  # rows to train on, rows held out
        self.step = self.steps = 0
        self.best: tuple[float, int] = (math.inf, 0)  # held-out loss, step
        self.judged = 0  # the last step whose adapter was kept or found worse
        self.latest: dict[str, float] = {}
        self.base: dict[str, float] = {}  # what was measured before the first step
        self.accuracy: float | None = None  # of the adapter that is kept, where labels are chosen
        self.general: float | None = None  # its loss on general text, where it writes
        self.probed: dict[str, float] = {}
        self._measured_at: frozenset[int] = frozenset()
        self._measures = False  # whether there are held-out rows
        self._doctor: Doctor | None = None
        self._seconds = 0.0  # of earlier attempts
        self._begun = self._saved = time.monotonic()
        self._trained: float | None = None  # seconds, once it does not train any more
        self._save_takes = 0.0
        self._warned_of_disk = self._late = False
        self._found: checkpoints.Checkpoint | None = None
        self._said = Journal(path / "events.jsonl").refresh().records  # by earlier attempts
        self._journal = open_journal(path)
        self._silent = False  # about samples, whose texts would make the journal too long

    def append(self, event: Event) -> None:
        """Write an event down; of a journal that has become too long the samples are left out. Raises OSError."""
        if isinstance(event, Sample) and os.fstat(self._journal).st_size > self._limits.journal_bytes:
            if not self._silent:
                self._silent = True
                message = "The answers to samples take too much room and are left out from here on."
                tell(self._journal, Warned(step=event.step, code="I_SAMPLES", message=message), self.number)
            return
        tell(self._journal, event, self.number)

    def asked(self) -> Status | None:
        """What the run is to become: "stopped", "paused", or None while it may go on."""
        return "stopped" if self._is_late() else asked_of(self.path)

    def _is_late(self) -> bool:
        """Whether it has trained as long as it may, by the clock that no change of the date moves; says so once."""
        minutes = self._spent() / 60
        if minutes > self._limits.minutes and not self._late:
            self._late = True
            message = (
                f"Training took the {self._limits.minutes:g} minutes that it may take here and ends with what it has."
            )
            self.append(Warned(step=self.step, code="W_MINUTES", message=message, hint="Give it fewer steps."))
        return self._late

    def _spent(self) -> float:
        """Seconds of training, those of earlier attempts among them."""
        return self._seconds + time.monotonic() - self._begun if self._trained is None else self._trained

    # ---- going on from a checkpoint ----------------------------------------------------------------------------------

    def recall(self) -> None:
        """Put the run's folder where its newest whole checkpoint was, or to its beginning when there are none.

        Raises E_CHECKPOINT when there are some and none is whole.
        """
        path, damaged = checkpoints.newest(self.path)
        if damaged:
            instead = f"going on from {path.name}" if path else "none is left"
            message = f"The checkpoint {damaged[0].name} is damaged; {instead}."
            self.append(Warned(step=0, code="W_CHECKPOINT", message=message))
        if path is None:
            if damaged:
                raise StudioError("E_CHECKPOINT", "All checkpoints are damaged.", "Start the run again.")
            shutil.rmtree(self.path / "adapter", ignore_errors=True)  # of an attempt that was lost without one
            return
        self._found = found = checkpoints.load(path)
        notes, self.step = found.notes, found.step
        self.best = (math.inf if notes["best"][0] is None else notes["best"][0], notes["best"][1])
        self.judged, self.accuracy, self._seconds = notes["judged"], notes["accuracy"], notes["seconds"]
        self.general = notes.get("general")
        self.latest, self.base, self.probed = dict(notes["latest"]), dict(notes["base"]), dict(notes["probed"])
        if found.best:
            self._place(found.best)
        else:
            shutil.rmtree(self.path / "adapter", ignore_errors=True)
        for one in damaged:
            shutil.rmtree(one)

    def restore(self, job: Any) -> None:
        """Let a fresh job go on from what `recall` found, if anything. Raises E_CHECKPOINT when it is of another.

        After the system has ended an earlier attempt for its memory, a pass has half as many examples as in that; where
        it has one already, activations are computed twice instead of being kept.
        """
        if self._found:
            job.restore(self._found.state)
            self._found = None
        passes = _passes(self._said)
        job.share.accumulate = max(job.share.accumulate, passes)
        if passes > job.config.batch_size and job.share.checkpointing == "auto":
            job.share.recompute = True

    def _save(self, job: Any) -> bool:
        """Save a checkpoint; False, and a warning once, when the disk does not take it."""
        start = time.monotonic()
        notes = {
            "best": [self.best[0] if math.isfinite(self.best[0]) else None, self.best[1]],
            "judged": self.judged,
            "accuracy": self.accuracy,
            "general": self.general,
            "seconds": self._spent(),
            "latest": {name: value for name, value in self.latest.items() if math.isfinite(value)},
            "base": self.base,
            "probed": self.probed,
        }
        kept = self.path / "adapter"
        try:
            os.fsync(self._journal)  # first: what the checkpoint goes on from has been told
            checkpoints.save(self.path, job.state(), notes, best=kept if kept.is_dir() else None)
        except OSError as error:
            needs = self._checkpoint_bytes
            full = disk.full(self.path, needs).message if disk.is_full(error, self.path, needs) else ""
            checkpoints.sweep(self.path)  # what was written of it takes the room of the next
            if not self._warned_of_disk:
                self._warned_of_disk = True
                message, hint = (
                    f"No checkpoint could be saved. {full or error.strerror or error}",
                    "Make room on the disk.",
                )
                self.append(Warned(step=self.step, code="W_CHECKPOINT", message=message, hint=hint))
            return False
        finally:
            self._saved = time.monotonic()
            self._save_takes = self._saved - start
        return True

    # ---- events ------------------------------------------------------------------------------------------------------

    def take(self, job: Any, event: Event) -> None:
        """Write down an event of the run's training and do what it calls for; the job leaves when it is to end."""
        if job.error:
            return  # the event says so, and so does the run's end
        self.append(event)
        self.step = max(self.step, event.step)
        if isinstance(event, Started):
            self._begin(event)
        if isinstance(event, Probed):
            self.probed = {name: getattr(event, field) for name, field in PROBE.items()}
        if self._doctor:
            for finding in self._doctor.see(event):
                self.append(finding)
        if isinstance(event, Metric):
            if not all(map(math.isfinite, event.values.values())):
                return  # what the job raises next
            self._judge(job, event)
        if event.step == 0 or self._is_told(job, event):
            self._look_up(job)

    def _begin(self, event: Started) -> None:
        from lora_studio.train import measured_steps

        config = self.config.train
        check_limit("number of steps", event.steps, self._limits.steps)
        self.steps, self._measures = event.steps, event.heldout_rows > 0
        self._measured_at = measured_steps(config, event.steps)
        self._doctor = Doctor(config, config.usual_rate(event.total, getattr(self.config.method, "kind", "lora")))
        told = (one for one in standing(self._said) if one["step"] <= event.step or one["type"] == "Warned")
        self._doctor.recall(told)  # each finding once in a run

    def _is_told(self, job: Any, event: Event) -> bool:
        """Whether this is the last event of its step: the training metric, then the held-out loss, then the samples."""
        measured = event.step in self._measured_at
        if isinstance(event, Warned):
            return event.code == "W_SAMPLES"  # there are none
        if isinstance(event, Sample):
            return event.index == len(job.samples) - 1
        if not isinstance(event, Metric):
            return False
        if "train_loss" in event.values:
            return not measured or not (self._measures or job.general or job.samples)
        return not job.samples

    def _look_up(self, job: Any) -> None:
        """Between two steps: end when asked to, else save when it is time."""
        if job.step >= self.steps or 0 < self.config.train.patience <= job.stale:
            return  # as good as done
        asked = self.asked()
        if asked and job.step == 0:
            job.leave()
            self.end(asked)
        elif asked:
            saved = self._save(job)
            if is_unwanted(self.path):  # nobody waits for its figures; brought back, it can go on
                job.leave()
                self.end(asked)
            elif saved or asked == "stopped":  # a pause that could not be saved would be a loss
                self.finish(job, asked)
        elif self.terminated:
            if job.step:
                self._save(job)
            job.leave()
            self.let_go()
        elif job.step and (job.step in self._measured_at or self._is_time(job.step)):
            self._save(job)

    def _is_time(self, step: int) -> bool:
        every = self.config.train.save_every
        if every:
            return step % every == 0
        return time.monotonic() - self._saved > max(SAVE_S, SAVE_SHARE * self._save_takes)

    def _judge(self, job: Any, event: Metric) -> None:
        """Take in a metric, and keep the adapter when this one says that it is the best yet."""
        self.latest.update(event.values)
        last = "general_loss" if job.general else "train_loss"  # of a step without held-out rows
        unmeasured = not self._measures and event.step in self._measured_at and last in event.values
        if event.step == 0:
            self.base = {name: event.values[name] for name in MEASURED if name in event.values}
        elif "heldout_loss" in event.values or unmeasured:
            self._keep_if_better(job, event.values)

    def _keep_if_better(self, job: Any, found: Mapping[str, float]) -> None:
        """Keep the adapter when its held-out loss is the lowest yet; without held-out rows the last one counts."""
        self.judged, loss = self.step, found.get("heldout_loss")
        if loss is not None and not loss < self.best[0]:
            return
        from lora_studio.adapters import save

        fresh = self.path / "adapter.tmp"
        save(job.lora, job.adapter, fresh, self.base_name)
        self._place(fresh)
        shutil.rmtree(fresh)
        self.best = (math.inf if loss is None else loss, self.step)
        self.accuracy, self.general = found.get("accuracy"), found.get("general_loss")
        self.append(Saved(step=self.step, heldout_loss=loss))

    def _place(self, folder: Path) -> None:
        """Make the files in `folder` the run's adapter, each in one step; a power cut leaves them whole."""
        kept = self.path / "adapter"
        kept.mkdir(exist_ok=True)
        for file in folder.iterdir():
            copy = kept.with_name(f"{file.name}.tmp")
            shutil.copyfile(file, copy)
            disk.sync(copy)
            copy.replace(kept / file.name)
        for directory in (kept, self.path):
            disk.sync(directory)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def finish(self, job: Any, status: Status) -> None:
        """End a run that has trained: done or stopped with what it learnt, which must be sound; or paused."""
        job.leave()
        until = time.monotonic() + LOOK_S  # whoever asked for a stop waits
        if status == "paused":
            return self.end(status)
        if self.step and self.judged != self.step:  # between two evaluations
            from lora_studio.train import evaluation

            found = evaluation(job)
            if found:
                self.append(Metric(step=self.step, values=found))
            self._keep_if_better(job, found)
        if self.step or status == "done":
            check_update(job)
        self._trained = self._spent()
        if (self.path / "adapter").is_dir() and not self.terminated:
            try:
                if status == "done":
                    until = time.monotonic() + max(LOOK_S, min(LOOK_MOST_S, LOOK_SHARE * self._spent()))
                self._look(job, status, until)
            except Exception:  # what was learnt is kept, whatever breaks while it is looked at
                log.exception("what %s has learnt could not be looked at", self.path.name)
        self.end(status)

    def _look(self, job: Any, status: Status, until: float) -> None:
        """Say what the kept adapter has learnt, until about this time; a kill meanwhile leaves a run that has ended.

        It ends with what it has when a run of this worker is asked to end.
        """
        from lora_studio.adapters import load
        from lora_studio.learned import ANSWERED, SHOWN, fitting, look, told
        from lora_studio.train import seen_first

        write_end(self.path, status, step=self.step, values=self._summary(), name=OVER)
        if status == "done":
            checkpoints.forget(self.path)
        if self.best[1] != self.step:  # the adapter in memory is a later one
            job.lora.remove(job.adapter)
            load(job.lora, self.path / "adapter", job.adapter)
        examples, heldout = self.examples
        train = [(examples[place], job.train[place].tokens) for place in seen_first(job, SHOWN)]
        kept = [(one, row.tokens) for one, row in zip(heldout, job.heldout, strict=True) if row.tokens.count]
        rows = []
        with closing(look(job.lora, job.adapter, job.tokenizer, train, kept[:ANSWERED], job.classes)) as moments:
            for rows in moments:  # noqa: B007
                asked = self.terminated or any(one.asked() for one in self.companions if not one.ended)
                if (asked and status == "done") or time.monotonic() > until:
                    break
        known = (*examples[:1000], *heldout)
        asked_for = [one.prompt[-1].content if one.prompt else "" for one in known]
        event = told(
            rows,
            step=self.best[1],
            figure=fitting([one.target for one in known], asked_for, labels=bool(job.classes)),
            heldout=(self.base.get("heldout_loss"), self.best[0]),
            general=(self.base.get("general_loss"), self.general),
        )
        if event:
            self.append(event)

    def fail(self, error: Exception) -> None:
        """End with a reason in plain words, and with settings that would cure it where there are some. Never raises."""
        if not isinstance(error, StudioError):
            log.error("%s", redacted("".join(traceback.format_exception(error))))
        reason: dict[str, Any] = in_plain_words(error, self.path, self._checkpoint_bytes)
        change = remedy(reason["code"], self.config.train)
        self.end("failed", reason | ({"change": change} if change else {}))

    def end(self, status: Status, error: Mapping[str, Any] | None = None) -> None:
        """Leave exit.json; the run is free then. Once is enough.

        A disk that does not take it leaves a lost run with its checkpoints, and the other runs of the worker alone.
        """
        if self.ended:
            return
        values = self._summary()
        root = self.path.parent.parent
        event = Ended(step=self.step, run=self.path.name, status=status, error=error, values=values)
        try:
            disk.at_any_rate(root, self.append, event)
        except OSError:
            log.exception("The end of %s is missing in its journal", self.path.name)
        with suppress(OSError):  # the curve is to be there wherever the end is
            os.fsync(self._journal)
        try:
            write_end(self.path, status, step=self.step, error=error, values=values)
        except OSError:
            log.exception("%s has ended as %s, but exit.json could not be written", self.path.name, status)
        else:
            (self.path / OVER).unlink(missing_ok=True)
            if status == "done":
                checkpoints.forget(self.path)  # the end stands before what it makes needless goes
        self.let_go()

    def let_go(self) -> None:
        """Take no further part; without exit.json the run is lost, and whoever keeps the queue lets it go on."""
        sweep(self.path)
        self.ended = True
        os.close(self._journal)
        if self._lock:
            self._lock.close()

    def _summary(self) -> dict[str, float]:
        figures: dict[str, float | None] = {
            "seconds": self._spent(),
            "base_loss": self.base.get("heldout_loss"),
            "best_loss": self.best[0],
            "best_step": self.best[1],
            "base_accuracy": self.base.get("accuracy"),
            "best_accuracy": self.accuracy,
            "train_loss": self.latest.get("train_loss"),
            "tokens_per_s": self.latest.get("tokens_per_s"),
            "memory_bytes": self.latest.get("memory_bytes"),
            **self.probed,
        }
        return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def check_update(job: Any) -> None:
    """A run is done only when it took a step and the adapter is finite and not zero."""
    if not job.step:
        raise StudioError("E_NO_UPDATE", "No step was trained.", "Give at least one step.")
    if not job.lora.finite(job.adapter):
        raise StudioError("E_NOT_FINITE", "The adapter holds values that are not finite.", "Lower the learning rate.")
    if not job.lora.changed(job.adapter):
        raise StudioError("E_NO_UPDATE", "Training changed nothing.", "Raise the learning rate or the steps.")


def _passes(said: Sequence[Mapping[str, Any]]) -> int:
    """Into how many passes a step is to be cut at least: twice as many as in an attempt that took too much memory."""
    passes, least = 1, 1
    for record in said:
        if record["type"] == "Probed":
            passes = record["accumulate"]
        elif record.get("code") == OUT_OF_MEMORY:
            passes = least = 2 * passes
    return least


def in_plain_words(error: Exception, folder: Path, needs: int) -> dict[str, str]:
    """code, message and hint of whatever broke a run off that writes to `folder`, `needs` bytes for a checkpoint."""
    from lora_studio.measure import is_shortage

    if disk.is_full(error, folder, needs):
        error = disk.full(folder, needs)
    if isinstance(error, StudioError):
        return {"code": error.code, "message": error.message, "hint": error.hint}
    if is_shortage(error):
        return {
            "code": "E_MEMORY",
            "message": "The machine ran out of memory.",
            "hint": "Halve the batch, shorten the length limit, or choose a smaller model.",
        }
    return {
        "code": "E_CRASH",
        "message": f"Training broke off: {type(error).__name__}: {redacted(str(error))[:200]}",
        "hint": "The log has the details; please report it.",
    }
