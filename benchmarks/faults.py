"""What breaks, and what is left of the work: workers and the app are killed, checkpoints damaged, the disk is full.

    python -m benchmarks.faults            the counts of the full form; about an hour on two cores
    python -m benchmarks.faults --quick    a few of each, with the waiting times of a hang shortened; some minutes
    python -m benchmarks.faults --only kill_worker stop

Everything happens to a tiny model of random weights in folders of its own. One thread and float32, so that an adapter
can be compared bit for bit with that of a run that nothing broke off. A full disk needs a small tmpfs, which only root
may mount; where that is not so, it is said and left out. Ends with 1 when anything did not hold.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.paper import machine
from benchmarks.tiny import tiny
from benchmarks.verdict import markdown
from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError
from lora_studio.limits import LAPTOP, MIB
from lora_studio.runs import checkpoints, disk, supervisor
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.runs.store import claim, earlier_logs, read_json
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio

STEPS, SAVE_EVERY, EVALUATIONS = 60, 5, 4
LONG_STEPS = 10_000  # that nobody waits for
RESUMED_S, RIGHT_S, REFUSED_S, STOPPED_S = 15.0, 10.0, 2.0, 5.0  # asked
NEVER_S = 180.0  # what takes longer does not happen
ALONE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
LIMITS = replace(LAPTOP, reserve_bytes=0)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How often each fault is made."""

    workers: int
    apps: int
    damages: int
    disks: int
    stops: int  # of each kind
    quiet_s: float  # until a worker without a word is mentioned
    hung_s: float  # until it is ended


QUICK = Counts(workers=10, apps=5, damages=20, disks=5, stops=1, quiet_s=4.0, hung_s=10.0)
FULL = Counts(
    workers=200, apps=100, damages=120, disks=20, stops=10, quiet_s=supervisor.QUIET_S, hung_s=supervisor.HUNG_S
)


@dataclass(kw_only=True)
class Fault:
    """One kind of fault: how often it was made, what did not hold, and figures."""

    name: str
    rounds: int = 0
    broken: list[str] = field(default_factory=list)
    said: str = ""
    figures: dict[str, list[float]] = field(default_factory=dict)
    skipped: str = ""

    def must(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(f"round {self.rounds}: {what}")

    def took(self, name: str, seconds: float, most: float) -> None:
        self.figures.setdefault(name, []).append(seconds)
        self.must(seconds <= most, f"{name} took {seconds:.1f} s, at most {most:g} asked")


class Site:
    """A root of its own with rows, a model and what a run that nothing breaks off leaves."""

    def __init__(self, folder: Path, model: Path, rank: int = 4) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.studio, self.trainable = Studio(folder, LIMITS), 2_500 * rank
        rows = "".join(json.dumps({"prompt": f"say {n}", "completion": "ab" * (1 + n % 3)}) + "\n" for n in range(40))
        settings = {"steps": STEPS, "batch_size": 4, "evaluations": EVALUATIONS, "samples": 1, "learning_rate": 0.01}
        self.config = RunConfig(
            name="fault",
            model=str(model),
            dataset=DataChoice(id=self.studio.data.add_text(rows).id),
            method=LoraSpec(rank=rank, targets=("all-linear",), dropout=0.1),
            train=TrainConfig(**settings | {"precision": "float32", "save_every": SAVE_EVERY}),
        )

    def begin(self, **train: Any) -> Run:
        """A queued run."""
        config = replace(self.config, train=replace(self.config.train, **train))
        facts = {"estimate": {"trainable": self.trainable}}
        with self.studio.supervisor.hold():
            return self.studio.runs.create(config, facts)

    def view(self, run: Run) -> Run:
        return self.studio.runs.get(run.id)

    def until(self, run: Run, true: Callable[[Run], Any], most_s: float = NEVER_S) -> bool:
        """Wait until something holds for the run; False when it never does."""
        deadline = time.monotonic() + most_s
        while not true(self.view(run)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def spare(self) -> None:
        self.studio.supervisor.executors["local"].prepare()

    def left_by(self, run: Run) -> dict[str, Any]:
        """What must be the same however often a run was broken off."""
        metrics = [one for one in self.studio.runs.curve(run.id) if one["type"] == "Metric"]
        data = (run.path / "adapter" / "adapter_model.safetensors").read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")  # behind the header, whose metadata come in any order
        return {
            "losses": [(one["step"], one["values"]["train_loss"]) for one in metrics if "train_loss" in one["values"]],
            "heldout": [(m["step"], m["values"]["heldout_loss"]) for m in metrics if "heldout_loss" in m["values"]],
            "tensors": json.loads(data[8:start]).keys(),
            "adapter": data[start:],
        }

    def unbroken(self) -> tuple[dict[str, Any], float]:
        """What a run leaves that is let alone, and the seconds from its worker's start to its first step."""
        run = self.begin()
        self.until(run, lambda view: view.status == "running")
        start = time.monotonic()
        self.until(run, lambda view: view.step > 0 or not view.active)
        start_s = time.monotonic() - start
        if not self.until(run, lambda view: view.status == "done"):
            raise SystemExit(f"the run that nothing breaks off does not end: {self.view(run)}")
        return self.left_by(run), start_s

    def is_clean(self, run: Run) -> bool:
        """Whether no worker and nothing half written is left of a run that has ended."""
        with claim(run.path, patience_s=10) as lock:
            alone = lock is not None
        return alone and not [*run.path.rglob("*.tmp")]


@contextmanager
def _app(site: Site) -> Iterator[Site]:
    """The queue turns, as in the app, with this process for its owner."""
    site.studio.supervisor.start()
    try:
        yield site
    finally:
        site.studio.supervisor.close()
        for run in site.studio.runs.list():
            site.studio.supervisor.kill(run.path, "local")


# ---- killed ----------------------------------------------------------------------------------------------------------


def kill_worker(folder: Path, model: Path, counts: Counts) -> Fault:
    """kill -9 at any moment, mostly with a spare worker there as in the app: it goes on by itself and ends the same."""
    fault, draws = Fault(name="kill -9 of the worker"), random.Random(1)
    with _app(Site(folder, model)) as site:
        wanted, start_s = site.unbroken()
        while fault.rounds < counts.workers:
            run, saved = site.begin(), 0
            site.until(run, lambda view: view.status == "running")
            for time_killed in (1, 2):
                site.spare()  # for the worker that goes on
                if time_killed == 1 and draws.random() < 0.3:
                    time.sleep(draws.uniform(0, start_s))
                else:
                    step = draws.randint(saved + SAVE_EVERY + 1, STEPS // (3 - time_killed) - 2)
                    site.until(run, lambda view, step=step: view.step >= step or not view.active)
                    time.sleep(draws.uniform(0, 0.03))
                site.studio.supervisor.kill(run.path, "local")
                died = time.monotonic()
                site.until(run, lambda view: view.status != "running", 10)  # a process takes a moment to die
                lost = site.view(run)
                if lost.status not in ("lost", "queued"):
                    break  # it was quicker
                fault.rounds += 1
                saved = checkpoints.last_step(run.path)
                fault.must(lost.step - saved <= SAVE_EVERY, f"{lost.step - saved} steps were lost")
                goes_on = site.until(run, lambda view, before=time_killed: _begins(view) > before)
                fault.took("goes on", time.monotonic() - died, RESUMED_S)
                if not goes_on or fault.rounds == counts.workers:
                    break
            site.until(run, lambda view: not view.active and view.status != "lost")
            done = site.view(run)
            fault.must(done.status == "done", f"is {done.status}: {done.error}")
            if done.status == "done":
                left = site.left_by(run)
                for name, value in wanted.items():
                    fault.must(left[name] == value, f"{name} differ")
                fault.must(site.is_clean(run), "something is left behind")
            site.studio.runs.delete(run.id)
    return fault


def _begins(view: Run) -> int:
    """The attempt that has begun to train last, or to load."""
    begun = (view.path / "worker.json").exists() and (view.path / "worker.log").exists()
    return 1 + len(earlier_logs(view.path)) if begun else 0


def kill_app(folder: Path, model: Path, counts: Counts) -> Fault:
    """kill -9 of the process that owns the root, again and again: the next is right at once, and nothing is twice."""
    fault, draws = Fault(name="kill -9 of the app"), random.Random(2)
    site = Site(folder, model)
    acknowledged: list[str] = []
    with _keeper(site) as keeper:
        _ask(keeper, "state")  # it is there
        start = time.monotonic()
        second = subprocess.run(_command(site), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        fault.took("a second app is refused", time.monotonic() - start, REFUSED_S)
        fault.must(second.returncode == 1 and "E_ROOT_IN_USE" in second.stderr, f"the second said {second.stderr}")
        keeper.kill()
    while fault.rounds < counts.apps:
        fault.rounds += 1
        with _keeper(site) as keeper:
            acknowledged.append(_ask(keeper, "start"))
            time.sleep(draws.uniform(0, 5))
            keeper.kill()
        trains = [one for one in acknowledged if (site.studio.runs.folder / one / "worker.lock").exists()]
        pids = {one: (read_json(site.studio.runs.folder / one / "worker.json") or {}).get("pid") for one in trains}
        lives = {one for one, pid in pids.items() if pid and psutil.pid_exists(pid) and not _is_zombie(pid)}
        start = time.monotonic()
        with _keeper(site) as keeper:
            seen = json.loads(_ask(keeper, "state"))
            fault.took("the next one is right", time.monotonic() - start, RIGHT_S)
            fault.must(set(acknowledged) <= set(seen), "an acknowledged run is not listed")
            for one in lives:
                fault.must(seen.get(one) in ("running", "done"), f"a worker lives whose run is {seen.get(one)}")
            fault.must(list(seen.values()).count("running") <= 1, "two run at once")
            keeper.kill()
    with _keeper(site) as keeper:
        for one in acknowledged:
            run = site.studio.runs.get(one)
            done = site.until(run, lambda view: view.status in ("done", "failed"))
            fault.must(done and site.view(run).status == "done", f"{site.view(run).status}: {site.view(run).error}")
            begins = [one for one in site.studio.runs.events(run.id) if one["type"] == "Started"]
            fault.must(len(begins) == 1, f"{len(begins)} workers began one run")
        keeper.kill()
    return fault


def kill_both(folder: Path, model: Path, counts: Counts) -> Fault:
    """kill -9 of the app and of its worker at once: the next app lets the run go on, and it ends the same."""
    fault, draws = Fault(name="kill -9 of both"), random.Random(4)
    site = Site(folder, model)
    with _app(site):
        wanted, _ = site.unbroken()
    while fault.rounds < counts.apps:
        fault.rounds += 1
        run = site.begin()
        with _keeper(site) as keeper:
            step = draws.randint(1, STEPS - 10)
            site.until(run, lambda view, step=step: view.step >= step or not view.active)
            keeper.kill()
            site.studio.supervisor.kill(run.path, "local")
        broken_off = site.until(run, lambda view: view.status == "lost", 10)
        start = time.monotonic()
        with _keeper(site):
            if broken_off:  # else it was quicker
                site.until(run, lambda view: _begins(view) > 1)
                fault.took("goes on", time.monotonic() - start, RESUMED_S)
            site.until(run, lambda view: view.status in ("done", "failed"))
        done = site.view(run)
        fault.must(done.status == "done", f"is {done.status}: {done.error}")
        for name, value in (site.left_by(run) if done.status == "done" else {}).items():
            fault.must(value == wanted[name], f"{name} differ")
    return fault


def _is_zombie(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def _command(site: Site) -> list[str]:
    config = site.config
    return [sys.executable, "-m", "benchmarks.faults", "--keep", str(site.studio.root), config.model, config.dataset.id]


@contextmanager
def _keeper(site: Site) -> Iterator[subprocess.Popen]:
    """An app without its page: it owns the root, keeps the queue going and does what it is told."""
    with subprocess.Popen(_command(site), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as keeper:
        try:
            yield keeper
        finally:
            keeper.kill()


def _ask(keeper: subprocess.Popen, what: str) -> str:
    assert keeper.stdin and keeper.stdout
    print(what, file=keeper.stdin, flush=True)
    return keeper.stdout.readline().strip()


def keep(root: Path, model: str, dataset: str) -> None:
    """What `_keeper` runs: "start" queues a run and says its id, "state" says how all runs stand."""
    studio = Studio(root, LIMITS)
    studio.supervisor.start()
    train = TrainConfig(steps=STEPS, batch_size=4, evaluations=1, samples=0, precision="float32", save_every=SAVE_EVERY)
    config = RunConfig(name="kept", model=model, dataset=DataChoice(id=dataset), train=train)
    for line in sys.stdin:
        if line.strip() == "start":
            with studio.supervisor.hold():
                print(studio.runs.create(config, {}).id, flush=True)
        else:
            studio.supervisor.tick()
            print(json.dumps({run.id: run.status for run in studio.runs.list()}), flush=True)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def damage(folder: Path, model: Path, counts: Counts) -> Fault:
    """The newest checkpoint is cut short, changed by a bit or misses a file: it is told, and the one before is used."""
    fault, draws = Fault(name="newest checkpoint damaged"), random.Random(3)
    site = Site(folder, model)
    from lora_studio.runs.attempt import Attempt

    while fault.rounds < counts.damages:
        fault.rounds += 1
        run = site.begin()
        kept = run.path / "adapter"
        kept.mkdir()
        (kept / "adapter_model.safetensors").write_bytes(draws.randbytes(4096))
        for step in (5, 10):
            checkpoints.save(run.path, _state(step), NOTES, best=kept)
        newest = run.path / "checkpoints" / "step-00000010"
        file = draws.choice([path for path in newest.rglob("*") if path.is_file()])
        how = draws.choice(("cut short", "a bit flipped", "gone", "emptied", "a zero behind it"))
        _harm(file, how, draws)
        attempt = Attempt(run.path)
        try:
            attempt.recall()
        except StudioError as error:
            fault.must(False, f"{file.name} {how}: {error}")
        told = [one for one in site.studio.runs.events(run.id) if one.get("code") == "W_CHECKPOINT"]
        fault.must(attempt.step == 5, f"{file.name} {how}: goes on behind step {attempt.step}")
        fault.must(len(told) == 1 and "step-00000010" in told[0]["message"], f"{file.name} {how}: it is not told")
        site.studio.runs.delete(run.id)
    return fault


NOTES = {"best": [None, 0], "judged": 0, "accuracy": None, "seconds": 0.0, "latest": {}, "base": {}, "probed": {}}


def _state(step: int, size: int = 64) -> Any:
    import torch

    from lora_studio.train import State

    draws = torch.Generator().manual_seed(step)
    tensors = {str(number): torch.randn(size, size, generator=draws) for number in range(3)}
    progress = {"step": step, "measured": 0, "best": None, "stale": 0, "accumulate": 1, "recompute": False}
    return State(
        adapter=tensors, optimizer={f"{name}.exp_avg": one for name, one in tensors.items()}, progress=progress
    )


def _harm(file: Path, how: str, draws: random.Random) -> None:
    data = file.read_bytes()
    if how == "gone":
        return file.unlink()
    if how == "a bit flipped":
        place = draws.randrange(len(data))
        if file.name == checkpoints.MANIFEST:  # in a sum: elsewhere it may say the same, as a blank does
            place = data.index(b'"sha256": "') + 11
        data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    else:
        data = {"cut short": data[: draws.randrange(len(data))], "emptied": b"", "a zero behind it": data + b"\0"}[how]
    file.write_bytes(data)


def crash_in_save(folder: Path, model: Path, counts: Counts) -> Fault:
    """The process ends instead of the n-th call that changes the disk, for every n: the last or the new one stands."""
    fault = Fault(name="crash at every write of a checkpoint")
    import safetensors.torch  # noqa: F401  # before the forks

    site, seen = Site(folder, model), set()
    while True:
        fault.rounds += 1
        run = site.begin()
        for step in (5, 10):
            checkpoints.save(run.path, _state(step), NOTES)
        code = _forked(lambda path=run.path, at=fault.rounds: _save_and_crash(path, at))
        path, damaged = checkpoints.newest(run.path)
        found = checkpoints.load(path).step if path else 0
        seen.add(found)
        fault.must(found in (10, 15) and not damaged, f"step {found} is found, {len(damaged)} are damaged")
        checkpoints.save(run.path, _state(20), NOTES)
        path, _ = checkpoints.newest(run.path)
        fault.must(path is not None and path.name == "step-00000020", "the next save does not stand")
        fault.must(not [*run.path.rglob("*.tmp")], "the next save leaves what was half written")
        site.studio.runs.delete(run.id)
        if code == 0:
            break
    fault.must(seen == {10, 15} and fault.rounds > 15, f"{fault.rounds} rounds ended at {seen}")
    return fault


def _save_and_crash(path: Path, at: int) -> None:
    import io

    import safetensors.torch

    made = 0

    def crashing(real: Callable) -> Callable:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal made
            made += 1
            if made == at:
                os._exit(9)
            return real(*given, **named)

        return call

    for name in ("fsync", "open", "link", "mkdir", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, crashing(getattr(os, name)))
    io.open = crashing(io.open)
    safetensors.torch.save_file = crashing(safetensors.torch.save_file)
    checkpoints.save(path, _state(15), NOTES)


def _forked(act: Callable[[], Any]) -> int:
    """The exit code of a child that does this; one thread, so a fork is whole."""
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- the disk --------------------------------------------------------------------------------------------------------


def full_disk(folder: Path, model: Path, counts: Counts) -> Fault:
    """Disks on which a run fits more or less: it ends as done or with the named reason.

    Its last checkpoint loads, and with no byte left it can be deleted, brought back, and deleted for good.
    """
    fault = Fault(name="disk full")
    import torch

    import lora_studio.adapters
    import lora_studio.train  # noqa: F401
    from lora_studio.runs.attempt import Attempt
    from lora_studio.runs.worker import work

    torch.set_num_threads(1)
    whole = 0
    for number in range(counts.disks + 1):
        mount = folder / f"disk{number}"
        share = 1.0 if not number else 0.02 + 0.6 * (number - 1) / max(1, counts.disks - 1)
        size = (200 * MIB if not number else int(share * whole)) + 2 * MIB
        with _tmpfs(mount, size) as problem:
            if problem:
                fault.skipped = problem
                return fault
            site = Site(mount, model, rank=64)
            disk.keep_ballast(mount, MIB)
            run = site.begin(steps=12, save_every=2, evaluations=3)
            (run.path / "worker.log").touch()

            def train(path: Path = run.path) -> None:
                with claim(path) as lock:
                    work([Attempt(path, lock)])

            sizes = disk.size(mount)
            code = _forked(train)
            view = site.view(run)
            if not number:
                whole = int(1.15 * _peak(run, view)) + disk.size(mount) - sizes
                fault.must(view.status == "done", f"with room it is {view.status}: {view.error}")
                continue
            fault.rounds += 1
            fault.must(code == 0, f"the worker ended with {code}")
            told = (view.error or {}).get("code", "")
            warned = [one for one in site.studio.runs.events(run.id) if one.get("code") == "W_CHECKPOINT"]
            named = told == "E_DISK" and "needs" in (view.error or {}).get("message", "")
            fault.must(named or view.status == "done", f"{size / 1e6:.1f} MB: {view.status}, {view.error}")
            fault.figures.setdefault("failed", []).append(float(named))
            fault.figures.setdefault("went on without checkpoints", []).append(float(bool(warned) and not named))
            path, damaged = checkpoints.newest(run.path)
            fault.must(not damaged, f"{size / 1e6:.1f} MB: a checkpoint is not whole")
            if path:
                fault.must(checkpoints.load(path).step > 0, "the last checkpoint does not load")
            _fill(mount)
            site.studio.runs.delete(run.id)
            fault.must(not site.studio.runs.list(), "it could not be deleted without a byte left")
            site.studio.runs.restore(run.id)
            fault.must(len(site.studio.runs.list()) == 1, "it could not be brought back without a byte left")
            site.studio.runs.delete(run.id)
            site.studio.runs.sweep_deleted(at_once=True)
            fault.must(not [*run.path.parent.glob(f"{run.id}*")], "what was deleted is still there")
    failed, quiet = (int(sum(fault.figures.get(name, []))) for name in ("failed", "went on without checkpoints"))
    fault.said = f"{failed} ended as E_DISK, {quiet} went on without checkpoints and ended"
    return fault


def _peak(run: Run, view: Run) -> int:
    """About the most that a run held: two checkpoints, a third while it is written, the adapter twice."""
    adapter = disk.size(run.path / "adapter")
    return 3 * 4 * adapter + 2 * adapter


@contextmanager
def _tmpfs(folder: Path, size: int) -> Iterator[str]:
    """A small disk; what is said instead where none can be had."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    try:
        yield f"a tmpfs cannot be mounted here ({mounted.stderr.strip()})" if mounted.returncode else ""
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(folder: Path) -> None:
    with suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# ---- hung, and stopped -----------------------------------------------------------------------------------------------


def hang(folder: Path, model: Path, counts: Counts) -> Fault:
    """SIGSTOP: it is said, goes on by itself when it is let, and is ended and resumed when it is not."""
    fault = Fault(name="hang by SIGSTOP")
    usual = supervisor.QUIET_S, supervisor.HUNG_S
    supervisor.QUIET_S, supervisor.HUNG_S = counts.quiet_s, counts.hung_s
    if (counts.quiet_s, counts.hung_s) != usual:
        fault.said = f"it is said after {counts.quiet_s:g} s and ended after {counts.hung_s:g} s here"
    try:
        with _app(Site(folder, model)) as site:
            run = site.begin(steps=100_000, save_every=20)
            site.until(run, lambda view: view.step > 50)
            for let in (True, False):
                fault.rounds += 1
                pid = json.loads((run.path / "worker.json").read_text())["pid"]
                os.kill(pid, signal.SIGSTOP)
                start = time.monotonic()
                site.until(run, lambda view: view.note.startswith("No progress"), counts.quiet_s + 30)
                fault.took("it is said", time.monotonic() - start, counts.quiet_s + 5)
                if let:
                    step = site.view(run).step
                    os.kill(pid, signal.SIGCONT)
                    fault.must(site.until(run, lambda view, step=step: view.step > step + 5, 30), "it does not go on")
                    fault.must(site.until(run, lambda view: not view.note.startswith("No pro"), 10), "it is still said")
                    fault.must(_begins(site.view(run)) == 1, "it was ended although it went on")
                else:
                    gone = site.until(run, lambda view, pid=pid: not psutil.pid_exists(pid), counts.hung_s + 30)
                    fault.took("it is ended", time.monotonic() - start, counts.hung_s + 10)
                    resumed = gone and site.until(run, lambda view: _begins(view) == 2 and view.status == "running")
                    fault.must(resumed, "it is not resumed")
                    told = [one for one in site.studio.runs.events(run.id) if one.get("code") == supervisor.LOST]
                    fault.must(len(told) == 1 and "no progress" in told[0]["message"], f"said of it: {told}")
            site.studio.stop(run.id)
            fault.must(site.until(run, lambda view: view.status == "stopped", 60), "it does not stop")
    finally:
        supervisor.QUIET_S, supervisor.HUNG_S = usual
    return fault


def stop(folder: Path, model: Path, counts: Counts) -> Fault:
    """Stop while it starts, loads and tokenises, steps, evaluates and saves; twice, as a double click does."""
    fault = Fault(name="stop at any moment")
    measured = STEPS // EVALUATIONS
    moments: dict[str, Callable[[Site, Run], bool]] = {
        "start": lambda site, run: site.view(run).status == "running",
        "load": lambda site, run: bool(site.studio.runs.events(run.id)),
        "step": lambda site, run: site.view(run).step >= 7,
        "evaluation": lambda site, run: site.view(run).step >= measured,
        "save": lambda site, run: bool([*run.path.glob("checkpoints/*.tmp")]),
    }
    with _app(Site(folder, model)) as site:
        for name, moment in moments.items():
            for _ in range(counts.stops):
                fault.rounds += 1
                site.spare()
                run = site.begin(steps=LONG_STEPS, evaluations=LONG_STEPS // measured, samples=3)
                there = site.until(run, lambda view: moment(site, view) or not view.active)  # noqa: B023
                asked = time.monotonic()
                site.studio.stop(run.id)
                site.studio.stop(run.id)
                ended = there and site.until(run, lambda view: not view.active and view.status != "lost")
                step_s = _step_s(site, run)
                fault.took(f"at {name}", time.monotonic() - asked, STOPPED_S + step_s)
                view = site.view(run)
                fault.must(ended and view.status == "stopped", f"{name}: {view.status} {view.error}")
                fault.must(view.has_adapter or not view.step, f"{name}: what was learnt is gone")
                fault.must(site.is_clean(run), f"{name}: something is left behind")
                pid = (read_json(run.path / "worker.json") or {}).get("pid", 0)
                gone = site.until(run, lambda _: not pid or _is_zombie(pid), 20)  # noqa: B023
                fault.must(gone, f"{name}: its process lives on")
                site.studio.runs.delete(run.id)
    return fault


def _step_s(site: Site, run: Run) -> float:
    metrics = [one for one in site.studio.runs.events(run.id) if one["type"] == "Metric"]
    times = [one["time"] for one in metrics if "train_loss" in one["values"]]
    return statistics.median([b - a for a, b in pairwise(times)] or [0.0])


# ---- all of it -------------------------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[Path, Path, Counts], Fault]] = {
    "kill_worker": kill_worker,
    "kill_app": kill_app,
    "kill_both": kill_both,
    "damage": damage,
    "crash_in_save": crash_in_save,
    "full_disk": full_disk,
    "hang": hang,
    "stop": stop,
}


def made(counts: Counts, only: Sequence[str] = ()) -> list[Fault]:
    """Every fault, or those that are named, each in a folder of its own."""
    found = []
    with tempfile.TemporaryDirectory(prefix="lora-studio-bench-", ignore_cleanup_errors=True) as folder:
        model = tiny(Path(folder, "tiny"))
        for name in only or FAULTS:
            start = time.monotonic()
            found.append(FAULTS[name](Path(folder, name), model, counts))
            print(f"{found[-1].name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            shutil.rmtree(Path(folder, name), ignore_errors=True)
    return found


def table(faults: Sequence[Fault]) -> str:
    rows = []
    for one in faults:
        times = [f"{name}: {max(values):.1f} s at worst" for name, values in one.figures.items() if name not in COUNTED]
        rows.append([one.name, one.rounds, one.rounds - len({b.split(":")[0] for b in one.broken}), ", ".join(times)])
        rows[-1][-1] += ("; " if times and one.said else "") + (one.said or "")
        if one.skipped:
            rows[-1][-1] = f"left out: {one.skipped}"
    return markdown(["fault", "made", "held", "figures"], [[str(cell) for cell in row] for row in rows])


COUNTED = ("failed", "went on without checkpoints")


def main(given: Sequence[str] | None = None) -> int:
    """0 when everything held."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=[], help="these alone")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--keep", nargs=3, metavar=("ROOT", "MODEL", "DATASET"), help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.keep:
        root, model, dataset = options.keep
        try:
            keep(Path(root), model, dataset)
        except StudioError as error:
            print(f"{error.code}: {error}", file=sys.stderr)
            return 1
        return 0
    os.environ |= ALONE
    print(f"# Faults\n\n{time.strftime('%F')}, {machine()}.\n", flush=True)
    faults = made(QUICK if options.quick else FULL, options.only)
    print(table(faults) + "\n")
    for one in faults:
        for broken in one.broken:
            print(f"- NOT HELD: {one.name}, {broken}")
    if options.json:
        figures = {one.name: {"made": one.rounds, "broken": one.broken, **one.figures} for one in faults}
        ratios = {one.name: (one.rounds - len(one.broken)) / one.rounds for one in faults if one.rounds}
        print(json.dumps({"ratios": ratios, "figures": figures, "machine": machine(), "date": time.strftime("%F")}))
    return int(any(one.broken for one in faults))


if __name__ == "__main__":
    sys.exit(main())
