"""python -m lora_studio.runs.worker RUN_DIR: one run from run.json to exit.json, in a process of its own.

It reads its folder and writes its folder; nothing that happens to a page or to the app reaches it. This is
the one place with a broad except, because whatever goes wrong must end as a reason in plain words.
"""

import logging
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_studio.errors import StudioError
from lora_studio.events import Ended, Event, Metric, Saved, Started, Warned, to_line
from lora_studio.fields import build
from lora_studio.runs.config import RunConfig, base_precision
from lora_studio.runs.store import read_json, write_json

log = logging.getLogger(__name__)
ATTEMPT = 1
NICENESS = 10  # the page stays responsive while all cores train


class _StopAsked(Exception):
    """Stop was asked before the first step."""


class Worker:
    """One attempt at one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.terminated = False
        self.best: tuple[float, int] = (math.inf, 0)  # held-out loss, step
        self.judged = 0  # the last step whose adapter was kept or found worse
        self.latest: dict[str, float] = {}
        self.base: dict[str, float] = {}  # what was measured before the first step
        self.accuracy: float | None = None  # of the adapter that is kept, where labels are chosen
        self.step = 0
        self.started = time.monotonic()
        self._journal = os.open(path / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, event: Event) -> None:
        """One write per line: a reader never sees half of one, and a kill loses none."""
        line = to_line(event, time=time.time(), attempt=ATTEMPT)
        os.write(self._journal, line.encode() + b"\n")

    def say(self, message: str) -> None:
        """What is going on before the first step, for the page and the log; a place to stop."""
        if self.stop_asked():
            raise _StopAsked
        log.info("%s", message)
        self.append(Warned(step=self.step, code="I_PREPARE", message=message))

    def stop_asked(self) -> bool:
        return self.terminated or bool((read_json(self.path / "control.json") or {}).get("stop"))

    def run(self) -> None:
        """Train, and leave exit.json whatever happens."""
        error: Mapping[str, str] | None = None
        try:
            status = self._train()
        except _StopAsked:
            status = "stopped"
        except StudioError as caught:
            status, error = "failed", {"code": caught.code, "message": caught.message, "hint": caught.hint}
        except Exception as caught:
            log.error("%s", traceback.format_exc())
            status, error = "failed", _in_plain_words(caught)
        values = self._summary()
        self.append(Ended(step=self.step, run=self.path.name, status=status, error=error, values=values))
        write_json(
            self.path / "exit.json",
            {"status": status, "step": self.step, "error": error, "values": values, "time": time.time()},
        )

    def _train(self) -> str:
        from lora_studio.train import heldout_figures, measured_steps, train

        record = read_json(self.path / "run.json") or {}
        config = build(RunConfig, record["config"])
        base = record["facts"].get("repo") or config.model
        job, status, measured_at = self._job(config, record["facts"].get("labels", ())), "done", frozenset[int]()
        for event in train(job):
            self.append(event)
            self.step = max(self.step, event.step)
            if isinstance(event, Started):
                measured_at = measured_steps(config.train, event.steps)
            if isinstance(event, Metric):
                self._judge(job, base, event, unmeasured=not job.heldout and event.step in measured_at)
            if self.stop_asked():
                status = "stopped"
                break
        if self.judged != self.step:  # stopped between two evaluations
            found = heldout_figures(job)
            if found:
                self.append(Metric(step=self.step, values=found))
            self._keep_if_better(job, base, found)
        if self.step:
            _check_update(job)
        return status

    def _job(self, config: RunConfig, labels: Sequence[str]) -> Any:
        """Everything loaded and a fresh adapter attached; with `labels`, for choosing one of them."""
        from lora_studio.core.baselines import add
        from lora_studio.core.lora import LoRA
        from lora_studio.data.batches import encode, encode_label
        from lora_studio.data.library import DataLibrary, split
        from lora_studio.models import ModelLibrary, device
        from lora_studio.train import Job

        root, most = self.path.parent.parent, config.train.max_length
        examples, warnings = DataLibrary(root).examples(
            config.dataset.id, config.dataset.format, config.dataset.columns or None
        )
        for warning in warnings:
            self.append(Warned(step=0, code="W_DATA", message=warning))
        train, heldout = split(examples, config.train.holdout, config.train.seed)
        models, on = ModelLibrary(root), device()
        precision = base_precision(config.method, config.train.precision, on)
        self.say(f"Loading {config.model}")
        model = models.load(config.model, precision=precision, on=on, labels=len(labels), say=self.say)
        tokenizer = models.tokenizer(config.model)
        lora = LoRA(model)
        add(lora, "run", config.method, seed=config.train.seed)

        def encoded(rows: Sequence[Any]) -> list[Any]:
            if labels:
                return [encode_label(tokenizer, example, labels, most) for example in rows]
            return [encode(tokenizer, example, most) for example in rows]

        return Job(
            lora=lora,
            adapter="run",
            tokenizer=tokenizer,
            train=encoded(train),
            heldout=encoded(heldout),
            samples=[example for example in heldout if example.messages][: config.train.samples],
            classes=labels,
            config=config.train,
        )

    def _judge(self, job: Any, base: str, event: Metric, *, unmeasured: bool) -> None:
        """Take in a metric, and keep the adapter when this one says that it is the best yet."""
        self.latest.update(event.values)
        if event.step == 0:
            self.base = {name: event.values[name] for name in ("heldout_loss", "accuracy") if name in event.values}
        elif "heldout_loss" in event.values or unmeasured:
            self._keep_if_better(job, base, event.values)

    def _keep_if_better(self, job: Any, base: str, found: Mapping[str, float]) -> None:
        """Keep the adapter when its held-out loss is the lowest yet; without held-out rows the last one counts."""
        self.judged, loss = self.step, found.get("heldout_loss")
        if loss is not None and not loss < self.best[0]:
            return
        from lora_studio.adapters import save

        fresh, kept = self.path / "adapter.tmp", self.path / "adapter"
        save(job.lora, job.adapter, fresh, base)
        kept.mkdir(exist_ok=True)
        for file in fresh.iterdir():
            file.replace(kept / file.name)
        shutil.rmtree(fresh)
        self.best = (math.inf if loss is None else loss, self.step)
        self.accuracy = found.get("accuracy")
        self.append(Saved(step=self.step, heldout_loss=loss))

    def _summary(self) -> dict[str, float]:
        figures: dict[str, float | None] = {
            "seconds": time.monotonic() - self.started,
            "base_loss": self.base.get("heldout_loss"),
            "best_loss": self.best[0],
            "best_step": self.best[1],
            "base_accuracy": self.base.get("accuracy"),
            "best_accuracy": self.accuracy,
            "train_loss": self.latest.get("train_loss"),
            "tokens_per_s": self.latest.get("tokens_per_s"),
            "memory_bytes": self.latest.get("memory_bytes"),
        }
        return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _check_update(job: Any) -> None:
    """A run is done only when the adapter is finite and not zero."""
    if not job.lora.finite(job.adapter):
        raise StudioError("E_NOT_FINITE", "The adapter holds values that are not finite.", "Lower the learning rate.")
    if not job.lora.changed(job.adapter):
        raise StudioError("E_NO_UPDATE", "Training changed nothing.", "Raise the learning rate or the steps.")


def _in_plain_words(error: Exception) -> dict[str, str]:
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return {
            "code": "E_MEMORY",
            "message": "The machine ran out of memory.",
            "hint": "Halve the batch, shorten the length limit, or choose a smaller model.",
        }
    return {
        "code": "E_CRASH",
        "message": f"Training broke off: {type(error).__name__}: {text[:200]}",
        "hint": "The log has the details; please report it.",
    }


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    path = Path(sys.argv[1])
    worker = Worker(path)

    def terminate(*_: object) -> None:
        worker.terminated = True

    signal.signal(signal.SIGTERM, terminate)
    write_json(path / "worker.json", {"pid": os.getpid(), "started": time.time()})
    os.nice(NICENESS)
    worker.run()


if __name__ == "__main__":
    main()
