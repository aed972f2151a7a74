"""python -m lora_studio.runs.worker RUN_DIR [RUN_DIR ...]: runs from run.json to exit.json, in a process of its own.

It reads its folders and writes its folders; nothing that happens to a page or to the app reaches it. Several runs
share one base model and train together. This is the one place with a broad except, because whatever goes wrong must
end as a reason in plain words. With --spare it imports everything first and waits to be told its runs.
"""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lora_studio.events import Warned
from lora_studio.limits import limits_here
from lora_studio.owners import home
from lora_studio.runs import disk
from lora_studio.runs.attempt import Attempt, in_plain_words
from lora_studio.runs.config import base_precision
from lora_studio.runs.memory import oom_kills
from lora_studio.runs.store import claim, write_end, write_json

log = logging.getLogger(__name__)
NICENESS = 10  # the page stays responsive while all cores train
AT_ONCE = 500  # rows that are tokenised in one go
SAY_S = 2.0  # between two words about how far they are; each is a place to stop


class _Asked(Exception):
    """All runs are to end before the first step."""


def work(attempts: Sequence[Attempt]) -> None:
    """Train the runs of these attempts, and leave exit.json in each, whatever happens."""
    jobs: dict[Attempt, Any] = {}
    for attempt in attempts:
        attempt.companions = attempts
    try:
        jobs = _jobs(attempts) if attempts else {}
        if jobs:
            _train(jobs)
    except _Asked:
        pass
    except Exception as error:  # it was nobody's own: all that still train end with it
        for attempt in _live(attempts):
            if attempt not in jobs or not jobs[attempt].over:
                attempt.fail(error)
    for attempt in _live(attempts):
        with _own_failure(attempt):
            attempt.finish(jobs[attempt], "done")


def _train(jobs: dict[Attempt, Any]) -> None:
    from lora_studio.train import train_together

    pairs = list(jobs.items())
    for number, event in train_together([job for _, job in pairs]):
        for attempt, job in pairs:
            if job.over and not attempt.ended and not job.error:  # its steps are done, those of others are not
                with _own_failure(attempt):
                    attempt.finish(job, "done")
        attempt, job = pairs[number]
        if attempt.ended:
            continue
        with _own_failure(attempt, job):
            attempt.take(job, event)
            if job.error:
                raise job.error
        if not _live(jobs):
            return


@contextmanager
def _own_failure(attempt: Attempt, job: Any = None) -> Iterator[None]:
    """An error in here is this attempt's alone."""
    try:
        yield
    except Exception as error:
        attempt.fail(error)
        if job:
            job.leave()


def _live(attempts: Sequence[Attempt] | dict[Attempt, Any]) -> list[Attempt]:
    return [attempt for attempt in attempts if not attempt.ended]


def _jobs(attempts: Sequence[Attempt]) -> dict[Attempt, Any]:
    """Everything loaded, the base once for all; a run that cannot be begun has failed and is not among them."""
    from lora_studio.core.lora import LoRA
    from lora_studio.data.library import DataLibrary, split
    from lora_studio.general import passages
    from lora_studio.models import ModelLibrary, device, parameter_count

    first = attempts[0]
    config, labels = first.config, first.labels
    root = first.path.parent.parent
    for attempt in attempts:
        with _own_failure(attempt):
            attempt.recall()
    data = DataLibrary(home(root, first.owner), limits_here())
    examples, warnings = data.examples(config.dataset.id, config.dataset.format, config.dataset.columns or None)
    for attempt in _live(attempts):
        for warning in warnings if attempt.number == 1 else ():
            attempt.append(Warned(step=0, code="W_DATA", message=warning))
    train, heldout = split(examples, config.train.holdout, config.train.seed)
    models, on = ModelLibrary(root, limits_here()).at(config.model, first.revision), device()

    def say(message: str) -> None:
        """What is going on before the first step, for the page and the log; a place to stop."""
        log.info("%s", message)
        for attempt in _live(attempts):
            if asked := attempt.asked():
                attempt.end(asked)
            elif attempt.terminated:
                attempt.let_go()
            else:
                attempt.append(Warned(step=attempt.step, code="I_PREPARE", message=message))
        if not _live(attempts):
            raise _Asked

    say(f"Loading {config.model}")
    parameters = parameter_count(models.skeleton(config.model, labels=len(labels)))
    precision = base_precision(config.method, config.train.precision, on, parameters)
    lora = LoRA(models.load(config.model, precision=precision, on=on, labels=len(labels), say=say))
    tokenizer = models.tokenizer(config.model)
    rows = [_encoded(tokenizer, part, labels, config.train.max_length, say) for part in (train, heldout)]
    rows.append([] if labels else passages(tokenizer, config.train.max_length))
    jobs = {}
    for attempt in _live(attempts):
        with _own_failure(attempt):
            attempt.examples = train, heldout
            jobs[attempt] = _job(attempt, lora, tokenizer, rows)
    return jobs


def _job(attempt: Attempt, lora: Any, tokenizer: Any, rows: Sequence[list[Any]]) -> Any:
    """A fresh adapter attached for this run, where its checkpoint left it. rows: train, held-out and general ones."""
    from lora_studio.core.baselines import add
    from lora_studio.train import Job

    config, name = attempt.config.train, attempt.path.name
    add(lora, name, attempt.config.method, seed=config.seed)
    job = Job(
        lora=lora,
        adapter=name,
        tokenizer=tokenizer,
        train=rows[0],
        heldout=rows[1],
        general=rows[2],
        samples=[example for example in attempt.examples[1] if example.messages][: config.samples],
        classes=attempt.labels,
        config=config,
    )
    attempt.restore(job)
    return job


def _encoded(
    tokenizer: Any, examples: Sequence[Any], labels: Sequence[str], most: int, say: Callable[[str], None]
) -> list[Any]:
    """The rows as token ids; where that takes long, it says how far it is."""
    from lora_studio.data.batches import encode_all, encode_labels

    encoded, said = [], time.monotonic()
    for some in (examples[start : start + AT_ONCE] for start in range(0, len(examples), AT_ONCE)):
        encoded += encode_labels(tokenizer, some, labels, most) if labels else encode_all(tokenizer, some, most)
        if time.monotonic() - said > SAY_S:
            said = time.monotonic()
            say(f"Tokenised {len(encoded):,} of {len(examples):,} rows")
    return encoded


# ---- the process -----------------------------------------------------------------------------------------------------


def begin(paths: Sequence[Path], locks: Sequence[BinaryIO]) -> None:
    """Work on run folders whose locks are held here."""
    if not paths:
        return
    begun = [_attempt(path, lock) for path, lock in zip(paths, locks, strict=True)]
    attempts = [attempt for attempt in begun if attempt]

    def terminate(*_: object) -> None:
        for attempt in attempts:
            attempt.terminated = True

    signal.signal(signal.SIGTERM, terminate)
    about = {"pid": os.getpid(), "started": time.time(), "oom_kills": oom_kills()}
    for attempt in attempts:
        with _own_failure(attempt):
            disk.at_any_rate(attempt.path.parent.parent, write_json, attempt.path / "worker.json", about)
    work(_live(attempts))


def _attempt(path: Path, lock: BinaryIO) -> Attempt | None:
    """An attempt at this run; None where not even that can be begun, and the run has failed."""
    try:
        return Attempt(path, lock)
    except Exception as error:
        log.exception("%s cannot be begun", path.name)
        with lock, suppress(OSError):
            write_end(path, "failed", step=0, error=in_plain_words(error, path, 0))
        return None


def main() -> None:
    arguments = argparse.ArgumentParser(prog="worker", description="Train runs out of their folders.")
    arguments.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR")
    arguments.add_argument("--locks", default="", help="descriptors of their open locks, inherited, with commas")
    arguments.add_argument("--spare", type=int, metavar="SOCKET", help="wait at this socket to be told the runs")
    given = arguments.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.nice(NICENESS)
    if given.spare is not None:
        from lora_studio.runs.spare import wait, warm_up

        warm_up()
        begin(*wait(given.spare))
    elif given.locks:
        begin(given.runs, [os.fdopen(int(one), "wb") for one in given.locks.split(",")])
    else:  # by hand
        with ExitStack() as stack:
            locks = [stack.enter_context(claim(path)) for path in given.runs]
            if None in locks:
                sys.exit("another worker has one of these runs")
            begin(given.runs, [lock for lock in locks if lock])


if __name__ == "__main__":
    main()
