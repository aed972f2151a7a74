"""The queue: turns, limits, what happens to runs whose worker is gone, and one app per root. No training here."""

import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora_studio import ram
from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError
from lora_studio.events import Ended, Metric, Started, Warned, to_line
from lora_studio.limits import LAPTOP, MIB, SPACE, Limits
from lora_studio.runs import checkpoints, disk, memory, supervisor
from lora_studio.runs.attempt import _passes
from lora_studio.runs.config import OUT_OF_MEMORY, DataChoice, Run, RunConfig, check_limits
from lora_studio.runs.store import (
    UNDO_S,
    Journal,
    RunStore,
    asked_of,
    claim,
    earlier_logs,
    in_turn,
    read_json,
    sweep,
    write_end,
    write_json,
)
from lora_studio.runs.supervisor import LOST, WAITS_S, Supervisor, lost_in_a_row
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from tests.crash import Crash, break_off

CONFIG = RunConfig(name="n", dataset=DataChoice(id="0" * 32))
A, B, C = ("a" * 32, "b" * 32, "c" * 32)


class Workers:
    """An executor whose workers are open locks: what a worker would do, the test does."""

    def __init__(self) -> None:
        self.held: dict[Path, BinaryIO] = {}
        self.codes: dict[Path, int] = {}

    def start(self, paths: Sequence[Path]) -> bool:
        for path in paths:
            with claim(path) as free:
                assert free, "a run that a worker has is started"
            assert not (path / "worker.log").exists() and not (path / "exit.json").exists()
            lock = (path / "worker.lock").open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (path / "worker.log").touch()
            self.held[path] = lock
            shutil.rmtree(path / "adapter.tmp", ignore_errors=True)
        return True

    def end(self, path: Path) -> None:
        self.held.pop(path).close()

    def alive(self, path: Path) -> bool:
        return path in self.held

    def kill(self, path: Path) -> None:
        for one in [*self.held]:  # one worker has them all
            self.codes[one] = -9
            self.end(one)

    def exit_code(self, path: Path) -> int | None:
        return self.codes.get(path)

    def reap(self) -> None: ...
    def prepare(self) -> None: ...
    def close(self) -> None: ...


class Clock(SimpleNamespace):
    """In place of the module `time`: sleeping takes none, and the date may jump."""

    def __init__(self) -> None:
        super().__init__(now=1000.0, date=1e9)

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        self.date += 1e-3
        return self.date

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def _a_small_ballast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "BALLAST_BYTES", MIB)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    for module in ("store", "supervisor"):
        monkeypatch.setattr(f"lora_studio.runs.{module}.time", one)
    return one


class Queue:
    """A store, the supervisor that owns its root, and workers."""

    def __init__(self, root: Path, limits: Limits = LAPTOP) -> None:
        self.store = RunStore(root, limits)
        self.workers = Workers()
        self.begin()

    def begin(self) -> None:
        """An app, the first or the next."""
        self.supervisor = Supervisor(self.store)
        self.supervisor.executors["local"] = self.workers
        self.supervisor.own()

    def put(self, owner: str = "", study: str = "") -> Run:
        return self.store.of(owner).create(dataclasses.replace(CONFIG, study=study), {})

    def status(self, run: Run) -> str:
        return self.store.get(run.id).status

    def tell(self, run: Run, *events: Any) -> None:
        with (run.path / "events.jsonl").open("a") as file:
            number = 1 + len(earlier_logs(run.path))
            file.writelines(to_line(event, time=0, attempt=number) + "\n" for event in events)

    def crash(self, run: Run, code: int | None = -9) -> None:
        if code is not None:
            self.workers.codes[run.path] = code
        self.workers.end(run.path)

    def lose(self, run: Run, clock: Clock, step: int = 0) -> None:
        """Start it, let it say a step, and let its worker die; then the supervisor has looked."""
        clock.now += max(WAITS_S)
        self.supervisor.tick()
        assert self.status(run) == "running"
        if step:
            self.tell(run, Metric(step=step, values={"train_loss": 1.0}))
        self.crash(run)
        self.supervisor.tick()


def begun(step: int = 0) -> Started:
    sizes = {"steps": 99, "trainable": 1, "total": 2, "train_rows": 1, "heldout_rows": 1}
    return Started(step=step, device="cpu", precision="float32", **sizes)


def saved(run: Run, step: int) -> None:
    """A checkpoint that is whole and holds nothing."""
    folder = run.path / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / checkpoints.MANIFEST).write_text(json.dumps({"step": step, "files": {}}))


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path)


# ---- turns -----------------------------------------------------------------------------------------------------------


def waiting(owner: str, created: float) -> Run:
    return Run(id=f"{owner}{created}", path=Path(), config=CONFIG, status="queued", created=created, owner=owner)


@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 99)), unique=True, max_size=12),
    st.dictionaries(st.sampled_from("xyz"), st.integers(1, 9)),
)
def test_owners_take_turns_and_within_one_the_oldest_is_first(
    asked: list[tuple[str, int]], served: dict[str, int]
) -> None:
    order = in_turn((waiting(owner, created) for owner, created in asked), served)
    assert sorted((run.owner, run.created) for run in order) == sorted(asked)
    for place, run in enumerate(order):
        before = order[:place]
        own = [one for one in before if one.owner == run.owner]
        assert all(one.created < run.created for one in own)
        for other in {one.owner for one in order} - {run.owner}:
            theirs = sum(one.owner == other for one in before)
            assert theirs <= len(own) + 1, "somebody has two turns before another's next"
    if order:
        first = order[0].owner
        assert served.get(first, 0) == min(served.get(run.owner, 0) for run in order)


def test_who_came_later_is_next_when_the_other_has_had_a_turn(queue: Queue) -> None:
    one, two, three = (queue.put(A) for _ in range(3))
    queue.supervisor.tick()
    other = queue.put(B)
    mine, theirs = queue.store.of(A), queue.store.of(B)
    assert [mine.position(run.id) for run in (one, two, three)] == [0, 2, 3] and theirs.position(other.id) == 1
    began = []
    while queue.workers.held:
        (path,) = queue.workers.held
        began.append(path.name)
        write_end(path, "done", step=1)
        queue.workers.end(path)
        queue.supervisor.tick()
    assert began == [one.id, other.id, two.id, three.id]


def test_runs_of_two_owners_never_share_a_worker_and_of_one_so_many_as_may_train_at_once(tmp_path: Path) -> None:
    queue = Queue(tmp_path, dataclasses.replace(LAPTOP, running=2))
    runs = [queue.put(owner, study="s") for owner in (A, B, A, A)]
    queue.supervisor.tick()
    assert [queue.status(run) for run in runs] == ["running", "queued", "running", "queued"]


def test_the_queue_is_full_by_owner_and_by_all_and_says_which(tmp_path: Path) -> None:
    store = RunStore(tmp_path, dataclasses.replace(SPACE, queued=2, queued_by_all=3))
    for owner in (A, A, B):
        store.of(owner).admit()
        store.of(owner).create(CONFIG, {})
    for owner, limit in ((A, "limit is 2 queued"), (C, "limit is 3 queued by all")):
        with pytest.raises(StudioError) as caught:
            store.of(owner).admit()
        assert caught.value.code == "E_QUEUE_FULL" and limit in caught.value.message and caught.value.hint
    with pytest.raises(StudioError):
        RunStore(tmp_path, SPACE).of(C).admit(3)  # a study is taken whole or not at all


def test_starts_at_the_same_moment_do_not_pass_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = Studio(tmp_path, dataclasses.replace(SPACE, queued=2))
    monkeypatch.setattr(Studio, "_checked", lambda self, config: (config, {}))
    monkeypatch.setattr(studio.supervisor, "tick", lambda: None)
    refused = []

    def start() -> None:
        try:
            studio.of(A).start(CONFIG)
        except StudioError as error:
            refused.append(error.code)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == ["E_QUEUE_FULL"] * 6 and len(studio.runs.list()) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": TrainConfig(steps=2001)}, "number of steps"),
        ({"train": TrainConfig(max_length=1025)}, "length limit"),
        ({"method": LoraSpec(rank=65)}, "rank"),
        ({"method": LoraSpec(rank=8, rank_pattern={"mlp.down": 65})}, "rank"),
    ],
)
def test_what_a_visitor_may_not_ask_for_is_named_and_a_laptop_allows_it(changes: dict, named: str) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    check_limits(config, LAPTOP)
    with pytest.raises(StudioError) as caught:
        check_limits(config, SPACE)
    assert caught.value.code == "E_LIMIT" and named in caught.value.message
    cures = {"length limit": {"max_length": SPACE.tokens}, "number of steps": {"steps": SPACE.steps}}
    assert caught.value.change == cures.get(named, {})  # a study takes its ranks from elsewhere


# ---- lost ------------------------------------------------------------------------------------------------------------


def test_a_lost_run_waits_longer_each_time_and_is_given_up_after_the_third(queue: Queue, clock: Clock) -> None:
    run = queue.put()
    saved(run, 5)
    for wait_s in WAITS_S:
        queue.lose(run, clock, step=7)
        assert queue.status(run) == "queued"
        clock.now += wait_s - 0.1
        queue.supervisor.tick()
        assert queue.status(run) == "queued", "it goes on too early"
        clock.now += 0.2
        queue.supervisor.tick()
        assert queue.status(run) == "running"
        queue.supervisor.tick()
    queue.crash(run)
    queue.supervisor.tick()
    failed = queue.store.get(run.id)
    assert failed.status == "failed" and failed.error and failed.error["code"] == "E_CRASHED"
    assert "4 times" in failed.error["message"] and "step 7" in failed.error["message"] and failed.error["hint"]
    told = [one for one in queue.store.events(run.id) if one.get("code") == LOST]
    assert [f"Attempt {2 + n} goes on behind step 5" in one["message"] for n, one in enumerate(told)] == [True] * 3
    clock.now += 1e6
    queue.supervisor.tick()
    assert queue.status(run) == "failed", "what failed with a reason was resumed"
    queue.store.requeue(run.id)  # a person may, and then counting begins anew
    queue.lose(run, clock)
    assert queue.status(run) == "queued"


def test_who_gets_further_each_time_is_never_given_up(queue: Queue, clock: Clock) -> None:
    run = queue.put()
    for number in range(1, 8):
        saved(run, 10 * number)
        queue.lose(run, clock, step=10 * number + 3)
        assert queue.status(run) == "queued"
    queue.lose(run, clock)
    queue.lose(run, clock)
    assert queue.status(run) == "queued"
    queue.lose(run, clock)
    assert queue.status(run) == "failed"


@pytest.mark.parametrize(("asked", "becomes"), [("stop", "stopped"), ("pause", "paused")])
def test_what_a_person_ended_is_not_resumed(queue: Queue, clock: Clock, asked: str, becomes: str) -> None:
    run = queue.put()
    queue.supervisor.tick()
    getattr(queue.store, f"request_{asked}")(run.id)
    queue.crash(run)
    for _ in range(3):
        clock.now += 1000
        queue.supervisor.tick()
    assert queue.status(run) == becomes and not queue.store.get(run.id).error
    last = queue.store.events(run.id)[-1]
    assert (last["type"], last["status"]) == ("Ended", becomes)


def test_only_the_one_that_owns_the_root_resumes(queue: Queue, clock: Clock) -> None:
    run = queue.put()
    queue.supervisor.tick()
    queue.crash(run)
    other = Supervisor(queue.store)
    other.executors["local"] = queue.workers
    other.tick()
    assert queue.status(run) == "lost" and other.resumes(queue.store.get(run.id))
    queue.supervisor.close()
    assert not other.resumes(queue.store.get(run.id))


def test_a_run_that_was_lost_long_ago_and_a_study_as_a_whole_go_on_with_the_next_app(
    tmp_path: Path, clock: Clock
) -> None:
    queue = Queue(tmp_path)
    runs = [queue.put(study="s") for _ in range(3)]
    queue.supervisor.tick()
    assert len(queue.workers.held) == 3
    queue.supervisor.close()
    for run in runs:
        queue.crash(run, code=None)
        (run.path / "worker.json").unlink(missing_ok=True)
    clock.date += 1e7
    queue.begin()
    queue.supervisor.tick()
    clock.now += WAITS_S[0] + 1
    queue.supervisor.tick()
    assert [queue.status(run) for run in runs] == ["running"] * 3


def test_a_worker_that_lives_is_taken_over_and_not_doubled(queue: Queue) -> None:
    run, other = queue.put(), queue.put()
    queue.supervisor.tick()
    queue.supervisor.close()
    queue.begin()
    queue.supervisor.tick()
    assert (queue.status(run), queue.status(other)) == ("running", "queued") and len(queue.workers.held) == 1


def test_a_stop_that_comes_while_a_lost_run_is_put_back_still_holds(
    queue: Queue, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = queue.put()
    queue.supervisor.tick()
    real = checkpoints.any_saved

    def slow(path: Path) -> bool:
        queue.store.request_stop(run.id)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "any_saved", slow)
        queue.crash(run)
        queue.supervisor.tick()
    assert read_json(run.path / "control.json")


def test_who_stops_a_run_that_waits_to_go_on_and_resumes_it_does_not_wait_nor_count_what_was(
    queue: Queue, clock: Clock
) -> None:
    run = queue.put()
    for _ in WAITS_S:
        queue.lose(run, clock)
    assert queue.status(run) == "queued"
    queue.store.request_stop(run.id)
    queue.supervisor.tick()
    queue.store.requeue(run.id)
    queue.supervisor.tick()
    assert queue.status(run) == "running", "it waits although a person asked for it"
    queue.crash(run)
    queue.supervisor.tick()
    assert queue.status(run) == "queued", "it is given up at the first crash"


def test_why_a_worker_was_ended_is_said_of_that_worker_alone(queue: Queue, clock: Clock) -> None:
    run = queue.put()
    queue.supervisor.tick()
    queue.tell(run, begun(), Metric(step=1, values={"train_loss": 1.0}))
    saved(run, 1)
    queue.store.request_stop(run.id)
    queue.supervisor.tick()
    clock.now += supervisor.PATIENCE_S + 1
    queue.supervisor.tick()
    assert queue.status(run) == "stopped"
    queue.store.requeue(run.id)
    queue.supervisor.tick()
    queue.crash(run, -11)
    queue.supervisor.tick()
    assert "with signal 11" in queue.store.get(run.id).note


def test_one_that_is_stopped_before_its_worker_has_said_who_it_is_does_not_end_the_others(
    queue: Queue, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [queue.put(study="s") for _ in range(3)]
    real = queue.workers.start

    def start(paths: Sequence[Path]) -> bool:
        done = real(paths)
        for other in paths[1:]:  # one worker prints to one file
            (other / "worker.log").unlink()
            os.link(paths[0] / "worker.log", other / "worker.log")
        return done

    monkeypatch.setattr(queue.workers, "start", start)
    queue.supervisor.tick()
    queue.store.request_stop(runs[0].id)
    queue.supervisor.tick()
    clock.now += supervisor.BEFORE_S + 1
    queue.supervisor.tick()
    assert [queue.status(run) for run in runs] == ["running"] * 3


def test_with_no_checkpoint_left_whole_it_fails_with_that(queue: Queue, clock: Clock) -> None:
    run = queue.put()
    saved(run, 5)
    (run.path / "checkpoints/step-00000005/MANIFEST.json").write_text("{")
    queue.lose(run, clock)
    failed = queue.store.get(run.id)
    assert failed.status == "failed" and failed.error and failed.error["code"] == "E_CHECKPOINT"


@pytest.mark.parametrize(
    ("code", "kills", "peak", "blamed"),
    [
        (-9, 1, 0, True),
        (-9, 0, 0.9, True),
        (None, 1, 0, True),
        (-9, 0, 0.1, False),
        (-11, 1, 0.9, False),
        (1, 1, 0.9, False),
    ],
)
def test_a_kill_for_memory_is_told_by_its_signs_and_halves_the_passes(
    queue: Queue, clock: Clock, monkeypatch: pytest.MonkeyPatch, code: int | None, kills: int, peak: float, blamed: bool
) -> None:
    monkeypatch.setattr(memory, "oom_kills", lambda: 7 + kills)
    monkeypatch.setattr(ram, "total", lambda: 1000)
    run = queue.put()
    queue.supervisor.tick()
    write_json(run.path / "worker.json", {"pid": 0, "oom_kills": 7})
    queue.tell(run, begun(), Metric(step=1, values={"train_loss": 1.0, "memory_bytes": 1000 * peak}))
    queue.crash(run, code)
    queue.supervisor.tick()
    (told,) = [one for one in queue.store.events(run.id) if one["type"] == "Warned"]
    assert told["code"] == (OUT_OF_MEMORY if blamed else LOST)
    assert ("half as many" in told["message"]) == blamed and queue.store.get(run.id).note == told["message"]


def test_what_a_gpu_holds_is_not_held_against_the_machine(
    queue: Queue, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "oom_kills", lambda: 0)
    run = queue.put()
    queue.supervisor.tick()
    on_cuda = dataclasses.replace(begun(), device="cuda:0")
    queue.tell(run, on_cuda, Metric(step=1, values={"train_loss": 1.0, "memory_bytes": 1e15}))
    queue.crash(run)
    queue.supervisor.tick()
    assert [one["code"] for one in queue.store.events(run.id) if one["type"] == "Warned"] == [LOST]


def test_each_kill_for_memory_doubles_the_passes_that_there_were() -> None:
    out, probed = {"type": "Warned", "code": OUT_OF_MEMORY}, {"type": "Probed", "accumulate": 4}
    assert _passes([probed]) == 1
    assert _passes([out]) == 2
    assert _passes([probed, out]) == 8
    assert _passes([probed, out, {"type": "Probed", "accumulate": 8}, out]) == 16
    assert _passes([probed, out, out]) == 16
    assert _passes([probed, out, {"type": "Probed", "accumulate": 8}]) == 8


@given(st.lists(st.sampled_from([1, 2, 3, "end"]), max_size=12), st.integers(0, 4))
def test_counting_begins_anew_with_each_checkpoint_and_each_end(said: list, behind: int) -> None:
    records = [
        {"type": "Ended", "step": 0} if one == "end" else {"type": "Warned", "code": LOST, "step": one} for one in said
    ]
    tail = said[len(said) - said[::-1].index("end") :] if "end" in said else said
    expected = min(1, len(tail))
    while expected and expected < len(tail) and tail[-expected] <= tail[-expected - 1]:  # nothing was gained
        expected += 1
    assert lost_in_a_row(records, behind) == (expected if tail and behind <= tail[-1] else 0)


# ---- deaf, and hung --------------------------------------------------------------------------------------------------


def test_what_says_nothing_is_mentioned_then_ended_and_goes_on(queue: Queue, clock: Clock) -> None:
    run = queue.put()
    queue.supervisor.tick()
    queue.tell(run, begun(), Metric(step=1, values={"train_loss": 1.0}))
    queue.supervisor.tick()
    clock.now += supervisor.QUIET_S - 1
    queue.supervisor.tick()
    assert queue.store.get(run.id).note == ""
    clock.now += 2
    queue.supervisor.tick()
    assert "No progress for 61 s" in queue.store.get(run.id).note
    queue.tell(run, Metric(step=2, values={"train_loss": 1.0}))
    queue.supervisor.tick()
    assert queue.store.get(run.id).note == "" and queue.status(run) == "running", "it went on by itself"
    clock.now += supervisor.HUNG_S + 1
    queue.supervisor.tick()
    queue.supervisor.tick()
    assert queue.status(run) == "queued"
    (told,) = [one for one in queue.store.events(run.id) if one["type"] == "Warned"]
    assert told["code"] == LOST and "no progress for 301 s" in told["message"]


def test_slow_steps_are_no_hang_and_neither_is_a_processor_at_work(
    queue: Queue, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = queue.put()
    queue.supervisor.tick()
    with (run.path / "events.jsonl").open("a") as file:  # a step in 30 s
        events = [begun(), *(Metric(step=n, values={"train_loss": 1.0}) for n in range(1, 9))]
        file.writelines(to_line(event, time=30.0 * n, attempt=1) + "\n" for n, event in enumerate(events))
    queue.supervisor.tick()
    clock.now += 10 * 30 - 1
    queue.supervisor.tick()
    assert queue.store.get(run.id).note == ""
    clock.now += 2
    queue.supervisor.tick()
    assert "No progress" in queue.store.get(run.id).note
    clock.now += 50 * 30
    used = iter(range(500, 10_000, 500))
    monkeypatch.setattr(supervisor._Watch, "_used", lambda self, pid=None: next(used))
    queue.supervisor.tick()
    assert queue.status(run) == "running", "it computes"
    clock.now += supervisor.BUSY_S
    queue.supervisor.tick()
    assert queue.status(run) == "lost"


def test_what_loads_may_take_its_time(queue: Queue, clock: Clock) -> None:
    run = queue.put()
    queue.supervisor.tick()
    queue.tell(run, Warned(step=0, code="I_PREPARE", message="Fetching the model"))
    queue.supervisor.tick()
    clock.now += supervisor.BUSY_S - 1
    queue.supervisor.tick()
    assert queue.status(run) == "running" and "No progress" in queue.store.get(run.id).note
    clock.now += 2
    queue.supervisor.tick()
    assert queue.status(run) == "lost"


def test_no_jump_of_the_date_ends_a_run(queue: Queue, clock: Clock) -> None:
    run = queue.put()
    queue.supervisor.tick()
    queue.tell(run, begun(), Metric(step=1, values={"train_loss": 1.0}))
    queue.store.request_stop(run.id)
    for jump in (86_400.0, -2 * 86_400.0, 3600.0):
        clock.date += jump
        os.utime(run.path / "events.jsonl", (clock.date, clock.date))
        queue.supervisor.tick()
        clock.now += 1
        assert queue.status(run) == "running"


def test_who_does_not_answer_is_ended_at_once_only_while_nothing_can_be_lost(queue: Queue, clock: Clock) -> None:
    loading = queue.put()
    queue.supervisor.tick()
    queue.tell(loading, Warned(step=0, code="I_PREPARE", message="Loading"))
    queue.store.request_stop(loading.id)
    queue.supervisor.tick()
    clock.now += supervisor.BEFORE_S + 0.1
    queue.supervisor.tick()
    assert queue.status(loading) == "stopped"

    training = queue.put()
    queue.supervisor.tick()
    queue.tell(training, begun(), Metric(step=1, values={"train_loss": 1.0}))
    queue.store.request_pause(training.id)
    queue.supervisor.tick()
    clock.now += supervisor.PATIENCE_S - 1
    queue.supervisor.tick()
    assert queue.status(training) == "running"
    clock.now += 2
    queue.supervisor.tick()
    assert queue.status(training) == "paused"


@pytest.mark.parametrize("dies", [False, True])
def test_what_is_discarded_is_deleted_once_it_has_ended_and_what_is_brought_back_stays(
    queue: Queue, dies: bool
) -> None:
    training, waiting = queue.put(), queue.put()
    queue.supervisor.tick()
    for run in (training, waiting):
        queue.store.request_discard(run.id)
    assert [run.id for run, _ in queue.store.deleted()] == [waiting.id]
    queue.supervisor.tick()
    assert queue.status(training) == "running" and asked_of(training.path) == "stopped"
    if not dies:
        write_end(training.path, "stopped", step=1)
    queue.workers.end(training.path)
    for _ in range(2):
        queue.supervisor.tick()
    assert [run.id for run, _ in queue.store.deleted()] == [waiting.id, training.id] and queue.store.list() == []
    for run in (training, waiting):
        queue.store.restore(run.id)
        queue.supervisor.tick()
        assert queue.status(run) == "stopped"


# ---- the root --------------------------------------------------------------------------------------------------------


def test_a_second_app_is_refused_with_the_first_ones_process_and_the_root_is_free_once_that_is_gone(
    tmp_path: Path,
) -> None:
    code = (
        "import sys; from lora_studio.studio import Studio; studio = Studio(sys.argv[1]); studio.supervisor.own();"
        " print('mine', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout and first.stdout.readline() == "mine\n"
        before = sorted(path.name for path in tmp_path.rglob("*"))
        second = Supervisor(RunStore(tmp_path))
        with pytest.raises(StudioError) as caught:
            second.own()
        assert caught.value.code == "E_ROOT_IN_USE" and str(first.pid) in caught.value.message and caught.value.hint
        assert sorted(path.name for path in tmp_path.rglob("*")) == before, "it changed something"
        assert Supervisor(RunStore(tmp_path)).tick(), "a command line may still use the queue"
        first.kill()
    second.own()
    second.own()  # twice is once
    second.close()


def test_a_root_whose_locks_do_not_lock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Supervisor(RunStore(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *_: None)
        with pytest.raises(StudioError) as caught:
            one.own()
    assert caught.value.code == "E_ROOT" and "lock" in caught.value.message
    one.own()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".app.lock", "runs"]
    one.close()


def test_what_a_crash_left_on_its_way_in_or_out_is_removed(queue: Queue, clock: Clock) -> None:
    for name in (f"{'0' * 32}.new", f"{'1' * 32}.deleted"):
        (queue.store.folder / name).mkdir(parents=True)
    queue.supervisor.tick()
    assert [path.name for path in queue.store.folder.iterdir()] == ["queue.lock"]


def test_a_run_is_seen_once_it_is_whole(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for at in range(1, 20):
        with pytest.MonkeyPatch.context() as patch:
            break_off(patch, [(Path, "mkdir"), (Path, "rename"), (Path, "replace"), (os, "fsync")], at)
            try:
                store.create(CONFIG, {})
            except Crash:
                assert all(run.status == "queued" for run in store.list()), "half a run is listed"
            else:
                break
    assert at > 3


# ---- the disk --------------------------------------------------------------------------------------------------------


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    disk.append(descriptor, b"one\n")
    real, calls = os.write, [3, 2, None]

    def write(to: int, data: Any) -> int:
        size = calls.pop(0)
        if size is None:
            full()
        return real(to, bytes(data)[:size])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space"):
            disk.append(descriptor, b"a longer line\n")
    assert path.read_bytes() == b"one\n"
    calls[:] = [3, 2, 99]
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        disk.append(descriptor, b"a longer line\n")
    assert path.read_bytes() == b"one\na longer line\n"
    os.close(descriptor)


def test_the_ballast_goes_for_the_last_words_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk.keep_ballast(tmp_path, MIB) and (tmp_path / disk.BALLAST).stat().st_size == MIB
    said: list[bool] = []

    def act() -> str:
        said.append((tmp_path / disk.BALLAST).exists())
        return full() or "" if said[-1] else "written"

    assert disk.at_any_rate(tmp_path, act) == "written" and said == [True, False]
    with pytest.raises(OSError, match="No space"):
        disk.at_any_rate(tmp_path, full)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free", lambda _: 2 * MIB - 1)
        assert not disk.keep_ballast(tmp_path, MIB)
    assert disk.keep_ballast(tmp_path, MIB)
    assert sorted(path.name for path in tmp_path.iterdir()) == [disk.BALLAST]


def test_a_json_file_is_synced_with_its_folder_and_a_failed_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        write_json(tmp_path / "x.json", {"a": 1})
    assert synced == [(tmp_path / "x.json").stat().st_ino, tmp_path.stat().st_ino]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_json(tmp_path / "x.json", {"a": 2})
    assert read_json(tmp_path / "x.json") == {"a": 1} and len([*tmp_path.iterdir()]) == 1


def test_two_who_write_one_file_at_once_do_not_meet_in_its_temporary_name(tmp_path: Path) -> None:
    path, errors = tmp_path / "control.json", []

    def write() -> None:
        for _ in range(50):
            try:
                write_json(path, {"stop": True})
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and read_json(path) == {"stop": True} and len([*tmp_path.iterdir()]) == 1


def test_without_room_nothing_new_begins_and_the_figures_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path, dataclasses.replace(LAPTOP, reserve_bytes=500_000_000))
    facts = {"estimate": {"trainable": 1_000_000}}
    monkeypatch.setattr(disk, "free", lambda _: 548_000_000)
    store.check_room(facts)
    monkeypatch.setattr(disk, "free", lambda _: 547_000_000)
    with pytest.raises(StudioError) as caught:
        store.check_room(facts)
    assert caught.value.code == "E_DISK" and "48 MB" in caught.value.message and "547 MB" in caught.value.message


def test_a_run_that_waits_begins_when_there_is_room_again(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.store.limits = dataclasses.replace(LAPTOP, reserve_bytes=500)
    run = queue.put()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free", lambda _: 499)
        queue.supervisor.tick()
        assert queue.status(run) == "queued" and "are free" in queue.store.get(run.id).note
    queue.supervisor.tick()
    assert queue.status(run) == "running"


def test_a_worker_that_begins_leaves_alone_what_the_app_writes_at_that_moment(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = queue.put(), os.fsync
    (run.path / "worker.log").touch()

    def fsync(descriptor: int) -> None:
        real(descriptor)
        sweep(run.path)

    monkeypatch.setattr(os, "fsync", fsync)
    queue.store.request_stop(run.id)
    assert asked_of(run.path) == "stopped"


def test_a_pause_does_not_take_a_stop_back(queue: Queue) -> None:
    run = queue.put()
    queue.supervisor.tick()
    for ask in (queue.store.request_stop, queue.store.request_pause):
        ask(run.id)
        assert asked_of(run.path) == "stopped"


@pytest.mark.parametrize(
    ("error", "left", "is_full"),
    [
        (OSError(errno.ENOSPC, "x"), 1e12, True),
        (OSError(errno.EIO, "x"), 10, True),
        (OSError(errno.EIO, "x"), 1e12, False),
        (FileNotFoundError(errno.ENOENT, "x"), 10, False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1e12, True),
        (RuntimeError("unexpected"), 10, False),
    ],
)
def test_an_error_of_writing_is_named_after_a_look_at_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, left: float, is_full: bool
) -> None:
    monkeypatch.setattr(disk, "free", lambda _: left)
    assert disk.is_full(error, tmp_path, needs=100) == is_full


def test_a_log_keeps_its_newest_half_and_whoever_prints_goes_on_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    with path.open("ab", buffering=0) as printed:
        for number in range(100):
            printed.write(b"%06d\n" % number)
            disk.shorten(path, 350)
        printed.write(b"last\n")
    kept = path.read_text()
    assert len(kept) <= 400 and kept.endswith("000099\nlast\n") and "left out" in kept
    disk.shorten(tmp_path / "none", 1)


def test_stop_and_pause_work_without_a_byte_left(queue: Queue, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write fails until the ballast is gone."""
    root = queue.store.folder.parent
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if (root / disk.BALLAST).exists():
            full()
        real(descriptor)

    stopped, running = queue.put(), queue.put(study="s")
    monkeypatch.setattr(os, "fsync", fsync)
    for act in (
        lambda: queue.store.request_stop(stopped.id),
        lambda: (queue.supervisor.tick(), queue.store.request_pause(running.id)),
        lambda: (queue.crash(running), queue.supervisor.tick()),
    ):
        (root / disk.BALLAST).touch()
        act()
    assert (queue.status(stopped), queue.status(running)) == ("stopped", "paused")


# ---- what is kept ----------------------------------------------------------------------------------------------------


def kept(tmp_path: Path, **limits: float) -> tuple[RunStore, list[Run]]:
    """Six runs that have ended, three of each of two owners in turn, a megabyte each, the oldest first; one waits."""
    store = RunStore(tmp_path, dataclasses.replace(LAPTOP, **limits))
    runs = []
    for number in range(6):
        run = store.of((A, B)[number % 2]).create(CONFIG, {})
        (run.path / "worker.log").write_bytes(bytes(MIB))
        write_end(run.path, "done", step=1)
        age = os.stat(run.path).st_mtime - 3600 * (100 - 10 * number)
        for path in (run.path / "exit.json", run.path / "worker.log", run.path):
            os.utime(path, (age, age))
        runs.append(run)
    old = store.of(A).create(CONFIG, {})
    os.utime(old.path, (0, 0))
    return store, runs


@pytest.mark.parametrize(
    ("limits", "gone"),
    [
        ({}, []),
        ({"kept_runs": 2}, [0, 1, 2]),  # the run that waits counts and stays
        ({"kept_bytes": 2.5 * MIB}, [0, 1]),
        ({"kept_bytes": 0}, [0, 1, 2, 3, 4]),  # the newest of each stays, and of A that is the one that waits
        ({"kept_bytes_by_all": 4.5 * MIB}, [0, 1]),
        ({"idle_hours": 75}, [0, 1, 2]),
        ({"kept_runs": 0}, [0, 1, 2, 3, 4]),
    ],
)
def test_what_is_too_much_or_too_old_goes_the_oldest_first(tmp_path: Path, limits: dict, gone: list[int]) -> None:
    store, runs = kept(tmp_path, **limits)
    assert store.sweep_old() == [runs[number].id for number in gone]
    left = {run.id for run in store.list()}
    assert len(left) == 7 - len(gone) and left.isdisjoint(runs[number].id for number in gone)
    assert store.sweep_old() == []


def test_the_usage_of_an_owner_is_runs_and_datasets(tmp_path: Path) -> None:
    store, _ = kept(tmp_path, idle_hours=1e9)
    home = tmp_path / "owners" / B
    home.mkdir(parents=True)
    (home / "rows").write_bytes(bytes(MIB))
    runs, held = store.usage(B)
    assert runs == 3 and 4 * MIB <= held < 4.1 * MIB and store.usage(C) == (0, 0)


def test_no_jump_of_the_date_makes_a_run_old(tmp_path: Path, clock: Clock) -> None:
    store = RunStore(tmp_path, dataclasses.replace(LAPTOP, idle_hours=24))
    run = store.of(A).create(CONFIG, {})
    write_end(run.path, "done", step=1)
    for path in (run.path, run.path / "exit.json"):
        os.utime(path, (clock.date, clock.date))
    clock.date += 1e6
    assert store.sweep_old() == []
    clock.now += 24 * 3600 + 60
    assert store.sweep_old() == [run.id]


def test_who_keeps_too_much_may_not_begin_more_and_no_dataset_costs_a_run(tmp_path: Path) -> None:
    store, _ = kept(tmp_path, kept_bytes=5 * MIB)
    home = tmp_path / "owners" / B
    home.mkdir(parents=True)
    (home / "rows").write_bytes(bytes(4 * MIB))
    store.of(A).admit()
    with pytest.raises(StudioError) as caught:
        store.of(B).admit()
    assert caught.value.code == "E_LIMIT" and "5.24 MB" in caught.value.message
    assert store.sweep_old() == []


def test_datasets_of_who_has_no_run_and_does_not_come_go_too(tmp_path: Path) -> None:
    store, _ = kept(tmp_path, idle_hours=1000)
    for owner, age in ((A, 0.0), (C, 0.0), ("d" * 32, os.stat(tmp_path).st_mtime)):
        rows = tmp_path / "owners" / owner / "rows"
        rows.parent.mkdir(parents=True)
        rows.touch()
        for path in (rows, rows.parent):
            os.utime(path, (age, age))
    store.sweep_old()
    assert sorted(path.name for path in (tmp_path / "owners").iterdir()) == [A, "d" * 32]


# ---- listed, deleted -------------------------------------------------------------------------------------------------


def test_an_end_holds_what_its_journal_says(queue: Queue) -> None:
    run = queue.put()
    queue.tell(run, begun(), *(Metric(step=n, values={"train_loss": 1 / n}) for n in (1, 2)))
    queue.tell(run, Warned(step=2, code="W_X", message="look"), Metric(step=3, values={"grad_norm": math.nan}))
    write_end(run.path, "stopped", step=3)
    by_end = RunStore(queue.store.folder.parent).get(run.id)
    (run.path / "exit.json").write_text(json.dumps({"status": "stopped", "step": 3, "values": {}}))
    by_journal = RunStore(queue.store.folder.parent).get(run.id)
    assert by_end == by_journal and by_end.latest == {"train_loss": 0.5} and (by_end.step, by_end.steps) == (3, 99)
    for nonsense in ({}, [], {"step": 1}, "x"):
        (run.path / "exit.json").write_text(json.dumps({"status": "stopped", "values": {}, "seen": nonsense}))
        assert RunStore(queue.store.folder.parent).get(run.id) == by_journal


@pytest.mark.parametrize("text", ["", '{"status": "do', '{"status": "else"}', "[]"])
@pytest.mark.parametrize("begun", [True, False])
def test_a_run_whose_end_is_torn_is_damaged_and_stands_in_nobodys_way(queue: Queue, text: str, begun: bool) -> None:
    run, other = queue.put(), queue.put()
    if begun:
        (run.path / "worker.log").touch()
    (run.path / "adapter").mkdir()
    write_end(run.path, "done", step=9)
    (run.path / "exit.json").write_text(text)
    queue.supervisor.tick()
    view = queue.store.get(run.id)
    assert view.status == "damaged" and "exit.json is torn" in str(view.error) and (run.path / "adapter").is_dir()
    assert queue.status(other) == "running"
    queue.store.delete(run.id)
    assert [one.id for one in queue.store.list()] == [other.id]


def test_a_damaged_run_stays_its_owners_and_only_that_one_may_delete_it(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = store.of(A).create(CONFIG, {})
    record = json.loads((run.path / "run.json").read_text())
    record["config"]["from_another_version"] = 1
    (run.path / "run.json").write_text(json.dumps(record))
    (listed,) = store.of(A).list()
    assert listed.status == "damaged" and listed.error and "from_another_version" in listed.error["message"]
    assert store.of(B).list() == []
    for asked in (store.of(B).delete, store.of(B).get):
        with pytest.raises(StudioError) as caught:
            asked(run.id)
        assert caught.value.code == "E_RUN_NOT_FOUND"
    store.of(A).delete(run.id)
    assert store.list() == []


def test_deleted_by_several_at_once_it_is_deleted_once(tmp_path: Path) -> None:
    store, errors = RunStore(tmp_path), []
    for _ in range(20):
        run = store.create(CONFIG, {})

        def delete(run: Run = run) -> None:
            try:
                store.delete(run.id)
            except StudioError as error:
                errors.append(error.code)

        threads = [threading.Thread(target=delete) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(errors) <= {"E_RUN_NOT_FOUND"} and store.list() == []
    assert len(store.deleted()) == 20 == len([*store.folder.iterdir()])


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.name != "worker.lock"}


def test_what_is_deleted_is_back_as_it_was_until_its_time_is_over(tmp_path: Path, clock: Clock) -> None:
    queue = Queue(tmp_path)
    store, run = queue.store.of(A), queue.put(A)
    queue.tell(run, begun(), Metric(step=1, values={"train_loss": 1.0}))
    write_end(run.path, "stopped", step=1)
    store.describe(run.id, name="mine", remarks="good")
    seen, before = store.get(run.id), contents(run.path)
    for _ in range(2):
        store.delete(run.id)
        assert store.list() == [] == queue.store.of(B).deleted()
        assert [view for view, _ in store.deleted()] == [seen]
        clock.now += UNDO_S - 1
        queue.supervisor.tick()
        with pytest.raises(StudioError):
            queue.store.of(B).restore(run.id)
        for _ in range(2):
            store.restore(run.id)
        assert store.get(run.id) == seen and contents(run.path) == before and store.deleted() == []
    store.delete(run.id)
    clock.now += UNDO_S
    queue.supervisor.tick()
    for asked in (store.restore, store.delete, store.get):
        with pytest.raises(StudioError) as caught:
            asked(run.id)
        assert caught.value.code == "E_RUN_NOT_FOUND"
    assert [path.name for path in store.folder.iterdir()] == ["queue.lock"]


def test_the_next_app_knows_nothing_of_what_was_deleted(queue: Queue) -> None:
    run = queue.put()
    queue.store.delete(run.id)
    queue.supervisor.tick()
    assert (queue.store.folder / f"{run.id}.deleted").is_dir()
    queue.supervisor.close()
    with pytest.raises(StudioError):
        Queue(queue.store.folder.parent).store.restore(run.id)
    other = Queue(queue.store.folder.parent)
    other.begin()
    other.supervisor.tick()
    assert [path.name for path in queue.store.folder.iterdir()] == ["queue.lock"]
    other.supervisor.close()


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("act", ["delete", "restore", "sweep_deleted"])
def test_a_crash_at_any_call_of_deleting_leaves_a_whole_run_or_none(tmp_path: Path, act: str, at: int) -> None:
    store = RunStore(tmp_path)
    run = store.create(CONFIG, {})
    store.describe(run.id, remarks="all of it")
    before = contents(run.path)
    if act != "delete":
        store.delete(run.id)
    with pytest.MonkeyPatch.context() as patch, suppress(Crash):
        break_off(patch, [(Path, "rename"), (os, "unlink"), (os, "rmdir")], at)
        store.sweep_deleted(at_once=True) if act == "sweep_deleted" else getattr(store, act)(run.id)
    after = RunStore(tmp_path)
    listed = [one.id for one in after.list()]
    assert listed in ([], [run.id]) and (not listed or contents(run.path) == before)
    after.sweep_leftovers()
    assert [path.name for path in after.folder.iterdir()] == listed


@pytest.mark.parametrize(("kept_bytes", "left"), [(math.inf, True), (3 * MIB, False), (2.5 * MIB, False)])
def test_what_is_deleted_counts_until_it_is_gone_and_goes_first(tmp_path: Path, kept_bytes: float, left: bool) -> None:
    store, runs = kept(tmp_path, kept_bytes=kept_bytes, idle_hours=1e6)
    mine = store.of(A)
    count, held = store.usage(A)
    mine.delete(runs[4].id)  # the newest of three
    assert store.usage(A) == (count - 1, held)
    assert not {*store.sweep_old()} & {run.id for run in runs if run.owner == A}
    assert bool(mine.deleted()) == left and (store.usage(A)[1] == held) == left


def test_room_that_is_needed_is_taken_from_what_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path, dataclasses.replace(LAPTOP, reserve_bytes=MIB))
    mine, theirs = store.of(A).create(CONFIG, {}), store.of(B).create(CONFIG, {})
    for run in (mine, theirs):
        store.delete(run.id)
    monkeypatch.setattr(disk, "free", lambda _: MIB - 1 if store.of(A).deleted() else MIB)
    store.of(A).check_room({})
    assert [run.id for run, _ in store.deleted()] == [theirs.id] and not [*store.folder.glob(f"{mine.id}*")]


def test_a_new_name_and_a_note_are_bounded_encodable_and_survive_nonsense(tmp_path: Path) -> None:
    store = RunStore(tmp_path, SPACE).of(A)
    run = store.create(CONFIG, {})
    named = store.describe(run.id, name="  a\nb  \ud800", remarks=" one\n two ")
    assert (named.name, named.remarks, named.config) == ("a b ?", "one\n two", CONFIG)
    assert store.describe(run.id, remarks="").name == "a b ?" and store.describe(run.id, name=" ").name == "n"
    for code, about in {"E_CONFIG": {"name": "x" * 201}, "E_LIMIT": {"remarks": "x" * 4001}}.items():
        with pytest.raises(StudioError) as caught:
            store.describe(run.id, **about)
        assert caught.value.code == code
    for torn in ("", "[]", "{", '{"name": null, "remarks": 3}'):
        (run.path / "about.json").write_text(torn)
        assert store.get(run.id).status == "queued"


@pytest.mark.parametrize("act", ["request_stop", "request_pause", "request_discard", "requeue", "delete"])
def test_what_is_deleted_at_that_very_moment_is_not_found(
    tmp_path: Path, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = RunStore(tmp_path), RunStore(tmp_path)
    run = store.create(CONFIG, {})
    write_end(run.path, "paused", step=0)
    real = claim

    def late(path: Path, patience_s: float = 0.0) -> Any:
        monkeypatch.setattr("lora_studio.runs.store.claim", real)
        other.delete(run.id)
        return real(path, patience_s)

    monkeypatch.setattr("lora_studio.runs.store.claim", late)
    if act.startswith("request"):
        (run.path / "exit.json").unlink()
    try:
        getattr(store, act)(run.id)
    except StudioError as error:
        assert error.code == "E_RUN_NOT_FOUND"
    else:
        assert act == "delete"
    assert not run.path.exists() and store.list() == []


def test_a_lock_of_a_run_that_was_deleted_meanwhile_is_no_claim(tmp_path: Path) -> None:
    run = RunStore(tmp_path).create(CONFIG, {})
    with claim(run.path) as held:
        assert held
        (run.path / "worker.lock").unlink()
        (run.path / "worker.lock").touch()
        with claim(run.path) as second:
            assert second
    (run.path / "worker.lock").unlink()
    moved = run.path.with_name("elsewhere")
    with claim(run.path) as held:
        run.path.rename(moved)
    with claim(run.path) as none:
        assert none is None


CLAIMER = """
import socket, sys
from pathlib import Path
from lora_studio.runs import executors, store

class Child:
    def poll(self): return None

executors._spawn = lambda *_: Child()
store.time.sleep = lambda _: None
other = socket.socket(fileno=int(sys.argv[1]))
local, won = executors.Local(), 0
for path in sorted(Path(sys.argv[2]).iterdir()):
    other.send(b"1")
    other.recv(1)  # both are here
    won += local.start([path])
    local._children.clear()
print(won)
"""


def test_of_two_claimers_one_wins_each_of_a_thousand_rounds(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number:032x}").mkdir()
    ends = socket.socketpair()
    claimers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, str(end.fileno()), str(tmp_path)],
            pass_fds=[end.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        for end in ends
    ]
    for end in ends:
        end.close()
    won = [int(claimer.communicate(timeout=120)[0]) for claimer in claimers]
    assert sum(won) == 1000 and all(claimer.returncode == 0 for claimer in claimers)
    print(f"{won[0]} and {won[1]} of 1,000 rounds")


# ---- everything in any order -----------------------------------------------------------------------------------------

LEGAL = {
    "queued": {"running", "stopped", "paused"},
    "running": {"done", "failed", "stopped", "paused", "lost"},
    "lost": {"queued", "failed", "stopped", "paused"},
    "paused": set(),
    "stopped": set(),
    "failed": set(),
    "done": set(),
}
GIVEN_UP = ("paused", "stopped", "failed")  # what only a person resumes


class Machine(RuleBasedStateMachine):
    """Runs, an app that may die at any call that changes the disk, workers that may die, and a person who clicks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.clock = Clock()
        for module in ("store", "supervisor"):
            self.patch.setattr(f"lora_studio.runs.{module}.time", self.clock)
        self.patch.setattr(os, "fsync", lambda _: None)  # no power is cut here
        self.root = Path(tempfile.mkdtemp())
        self.queue = Queue(self.root, dataclasses.replace(LAPTOP, queued=4, reserve_bytes=0))
        self.queue.supervisor._swept = math.inf  # the ballast takes time
        self.runs: dict[str, str] = {}  # every run that was acknowledged and not deleted: its status
        self.allowed: set[str] = set()  # runs that a person has just resumed
        self.aside: dict[str, tuple[str, float]] = {}  # runs that were deleted: their status, and when

    def teardown(self) -> None:
        try:
            self.settle_down()
        finally:
            for path in [*self.queue.workers.held]:
                self.queue.workers.end(path)
            self.queue.supervisor.close()
            self.patch.undo()
            shutil.rmtree(self.root, ignore_errors=True)

    def settle_down(self) -> None:
        """Left alone, with workers that do their work, everything comes to its end."""
        for _ in range(4 * len(self.runs) + 4):
            self.clock.now += max(WAITS_S)
            self.queue.supervisor.tick()
            for path in [*self.queue.workers.held]:
                write_end(path, "done", step=1)
                self.queue.workers.end(path)
        ends = {run.id: run.status for run in self.queue.store.list()}
        assert ends.keys() == self.runs.keys() and set(ends.values()) <= {"done", *GIVEN_UP}, ends

    def app_dies(self, at: int, act: Any) -> None:
        """Do something; the app dies instead of the at-th call that changes the disk, and the next one begins."""
        with pytest.MonkeyPatch.context() as patch:
            break_off(patch, [(Path, "unlink"), (Path, "rename"), (Path, "replace"), (os, "write")], at)
            with suppress(Crash):
                act()
        self.queue.supervisor._disown()
        self.queue.store, self.aside = RunStore(self.root, self.queue.store.limits), {}
        self.queue.begin()
        self.queue.supervisor._swept = math.inf

    def chosen(self, number: int) -> Run:
        runs = self.queue.store.list()
        return runs[number % len(runs)]

    @rule(owner=st.sampled_from([A, B]), study=st.sampled_from(["", "s"]))
    def start(self, owner: str, study: str) -> None:
        try:
            self.queue.store.of(owner).admit()
        except StudioError as error:
            assert error.code == "E_QUEUE_FULL"
            return
        run = self.queue.put(owner, study)
        self.runs[run.id] = "queued"

    @rule(seconds=st.sampled_from([0.5, 3.0, 31.0, 121.0, 400.0, 4000.0]), jump=st.sampled_from([0.0, -1e5, 1e5]))
    def time_passes(self, seconds: float, jump: float) -> None:
        self.clock.now += seconds
        self.clock.date += jump
        self.queue.supervisor.tick()

    @rule()
    def the_queue_turns(self) -> None:
        self.queue.supervisor.tick()

    @precondition(lambda self: self.queue.workers.held)
    @rule(number=st.integers(0, 9), saves=st.booleans())
    def a_worker_steps(self, number: int, saves: bool) -> None:
        path = [*self.queue.workers.held][number % len(self.queue.workers.held)]
        run = self.queue.store.get(path.name)
        events = [] if any(one["type"] == "Started" for one in self.queue.store.events(run.id)[-3:]) else [begun()]
        self.queue.tell(run, *events, Metric(step=run.step + 1, values={"train_loss": 1.0}))
        if saves and checkpoints.last_step(path) <= run.step:
            saved(run, run.step + 1)

    @precondition(lambda self: self.queue.workers.held)
    @rule(number=st.integers(0, 9), how=st.sampled_from(["done", "failed", "asked", "dies", "torn"]))
    def a_worker_ends(self, number: int, how: str) -> None:
        path = [*self.queue.workers.held][number % len(self.queue.workers.held)]
        control = read_json(path / "control.json") or {}
        if how == "torn":
            with (path / "events.jsonl").open("a") as file:
                file.write('{"type": "Metr')
        elif how == "asked" and control:
            write_end(path, "stopped" if control.get("stop") else "paused", step=1)
        elif how in ("done", "failed"):
            self.queue.tell(self.queue.store.get(path.name), Ended(step=1, run=path.name, status=how))
            write_end(path, how, step=1)
        self.queue.workers.end(path)

    @precondition(lambda self: self.runs)
    @rule(number=st.integers(0, 99), what=st.sampled_from(["request_stop", "request_pause", "requeue", "delete"]))
    def a_person_clicks(self, number: int, what: str) -> None:
        run = self.chosen(number)
        if what == "requeue":
            self.allowed.add(run.id)
        try:
            getattr(self.queue.store, what)(run.id)
        except StudioError as error:
            assert error.code in ("E_RUN_ACTIVE", "E_RUN_DONE", "E_NO_CHECKPOINT"), error
            return
        if what == "delete":
            assert run.path not in self.queue.workers.held, "a run was deleted under its worker"
            self.aside[run.id] = self.runs.pop(run.id), self.clock.now

    @precondition(lambda self: self.aside)
    @rule(number=st.integers(0, 99))
    def a_person_undoes(self, number: int) -> None:
        run = [*self.aside][number % len(self.aside)]
        status, then = self.aside[run]
        try:
            self.queue.store.restore(run)
        except StudioError as error:
            assert error.code == "E_RUN_NOT_FOUND" and self.clock.now - then >= UNDO_S, "gone too early"
        else:
            self.runs[run] = status
        del self.aside[run]

    @precondition(lambda self: self.runs)
    @rule(at=st.integers(1, 3), number=st.integers(0, 99))
    def the_app_dies_while_a_person_deletes(self, at: int, number: int) -> None:
        run = self.chosen(number)

        def act() -> None:
            with suppress(StudioError):
                self.queue.store.delete(run.id)

        self.app_dies(at, act)
        if run.path.exists():
            return
        assert run.path not in self.queue.workers.held, "a run was deleted under its worker"
        del self.runs[run.id]

    @rule(at=st.integers(1, 12))
    def the_app_dies_while_the_queue_turns(self, at: int) -> None:
        self.app_dies(at, lambda: self.queue.supervisor.tick())

    @precondition(lambda self: self.runs)
    @rule(at=st.integers(1, 6), number=st.integers(0, 99), what=st.sampled_from(["requeue", "request_stop"]))
    def the_app_dies_while_a_person_clicks(self, at: int, number: int, what: str) -> None:
        run = self.chosen(number)
        if what == "requeue":
            self.allowed.add(run.id)

        def act() -> None:
            with suppress(StudioError):
                getattr(self.queue.store, what)(run.id)

        self.app_dies(at, act)

    @invariant()
    def every_run_is_there_once_and_went_where_it_may(self) -> None:
        listed = [(run.id, run.status) for run in self.queue.store.list()]
        assert sorted(run for run, _ in listed) == sorted(self.runs), "lost, doubled or still there"
        for run, status in listed:
            was = self.runs[run]
            may = LEGAL[was] | ({"queued"} if run in self.allowed and was != "done" else set())
            assert status == was or status in may, f"{was} became {status}"
            assert (status == "running") == (self.queue.store.folder / run in self.queue.workers.held)
        self.runs, self.allowed = dict(listed), set()
        held = [self.queue.store.get(path.name) for path in self.queue.workers.held]
        assert len({(run.owner, run.config.study or run.id) for run in held}) <= 1, "two workers at once"


EXAMPLES, LONG = (1000, 50) if os.environ.get("LORA_STUDIO_LONG_TESTS") else (60, 30)
Machine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=LONG,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestMachine = Machine.TestCase


def test_a_journal_of_a_hundred_thousand_steps_is_read_once_and_whole(tmp_path: Path) -> None:
    line = to_line(Metric(step=1, values={"train_loss": 1.0, "grad_norm": 0.5}), time=1.0, attempt=1).replace
    text = "".join(line('"step": 1', f'"step": {step}') + "\n" for step in range(1, 100_001))
    (tmp_path / "events.jsonl").write_text(text)
    journal = Journal(tmp_path / "events.jsonl").refresh()
    assert len(journal.records) == 100_000 and journal.step == 100_000
