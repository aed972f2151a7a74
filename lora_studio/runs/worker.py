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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_studio.errors import StudioError
from lora_studio.events import Ended, Event, Metric, Saved, Started, Warned, to_line
from lora_studio.fields import build
from lora_studio.runs.config import RunConfig
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
        self.base_loss: float | None = None
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
        from lora_studio.train import heldout_loss, measured_steps, train

        record = read_json(self.path / "run.json") or {}
        config = build(RunConfig, record["config"])
        base = record["facts"].get("repo") or config.model
        job, status, measured_at = self._job(config), "done", frozenset[int]()
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
            loss = heldout_loss(job)
            if loss is not None:
                self.append(Metric(step=self.step, values={"heldout_loss": loss}))
            self._keep_if_better(job, base, loss)
        if self.step:
            _check_update(job)
        return status

    def _job(self, config: RunConfig) -> Any:
        from lora_studio.core.lora import LoRA
        from lora_studio.data.batches import encode
        from lora_studio.data.library import DataLibrary, split
        from lora_studio.models import ModelLibrary, device, training_precision
        from lora_studio.train import Job

        root = self.path.parent.parent
        examples, warnings = DataLibrary(root).examples(
            config.dataset.id, config.dataset.format, config.dataset.columns or None
        )
        for warning in warnings:
            self.append(Warned(step=0, code="W_DATA", message=warning))
        train, heldout = split(examples, config.train.holdout, config.train.seed)
        models, on = ModelLibrary(root), device()
        precision = training_precision(on) if config.train.precision == "auto" else config.train.precision
        self.say(f"Loading {config.model}")
        model = models.load(config.model, precision=precision, on=on, say=self.say)
        tokenizer = models.tokenizer(config.model)
        lora = LoRA(model)
        lora.add("run", config.method, seed=config.train.seed)
        return Job(
            lora=lora,
            adapter="run",
            tokenizer=tokenizer,
            train=[encode(tokenizer, example, config.train.max_length) for example in train],
            heldout=[encode(tokenizer, example, config.train.max_length) for example in heldout],
            samples=[example for example in heldout if example.messages][: config.train.samples],
            config=config.train,
        )

    def _judge(self, job: Any, base: str, event: Metric, *, unmeasured: bool) -> None:
        """Take in a metric, and keep the adapter when this one says that it is the best yet."""
        self.latest.update(event.values)
        loss = event.values.get("heldout_loss")
        if event.step == 0:
            self.base_loss = loss
        elif loss is not None or unmeasured:
            self._keep_if_better(job, base, loss)

    def _keep_if_better(self, job: Any, base: str, loss: float | None) -> None:
        """Keep the adapter when its held-out loss is the lowest yet; without held-out rows the last one counts."""
        self.judged = self.step
        if loss is not None and not loss < self.best[0]:
            return
        from lora_studio.peft_format import save

        fresh, kept = self.path / "adapter.tmp", self.path / "adapter"
        save(job.lora, job.adapter, fresh, base)
        kept.mkdir(exist_ok=True)
        for file in fresh.iterdir():
            file.replace(kept / file.name)
        shutil.rmtree(fresh)
        self.best = (math.inf if loss is None else loss, self.step)
        self.append(Saved(step=self.step, heldout_loss=loss))

    def _summary(self) -> dict[str, float]:
        figures: dict[str, float | None] = {
            "seconds": time.monotonic() - self.started,
            "base_loss": self.base_loss,
            "best_loss": self.best[0],
            "best_step": self.best[1],
            "train_loss": self.latest.get("train_loss"),
            "tokens_per_s": self.latest.get("tokens_per_s"),
            "memory_bytes": self.latest.get("memory_bytes"),
        }
        return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _check_update(job: Any) -> None:
    """A run is done only when the adapter is finite and not zero."""
    parts = list(job.lora.delta(job.adapter).values())
    if not all(part.A.isfinite().all() and part.B.isfinite().all() for part in parts):
        raise StudioError("E_NOT_FINITE", "The adapter holds values that are not finite.", "Lower the learning rate.")
    if not any(part.B.any() for part in parts):
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
