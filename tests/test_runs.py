"""Runs as folders: one real worker process, and every state derived from files alone."""

import dataclasses
import fcntl
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lora_studio.core.spec import BASELINES, BaselineSpec, LoraSpec, Method
from lora_studio.errors import StudioError
from lora_studio.events import Event, Metric, Started, Warned, to_line
from lora_studio.limits import LAPTOP
from lora_studio.runs import checkpoints
from lora_studio.runs.attempt import Attempt
from lora_studio.runs.config import OUT_OF_MEMORY, DataChoice, Run, RunConfig, Status, base_precision, method_of, short
from lora_studio.runs.executors import Local, environment
from lora_studio.runs.store import Journal, RunStore, claim, earlier_logs, standing, write_json
from lora_studio.runs.supervisor import together
from lora_studio.runs.worker import work
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from lora_studio.train import Job, State
from tests.crash import Crash, break_off
from tests.test_checkpoints import synced
from tests.tiny import tiny_encoder, tiny_model


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    one = Studio(tmp_path)
    yield one
    for run in one.runs.list():
        one.supervisor.kill(run.path, "local")


def config(studio: Studio, tiny: Path, **train: object) -> RunConfig:
    rows = "\n".join(json.dumps({"prompt": f"say {n}", "completion": "ab" * (1 + n % 3)}) for n in range(20))
    dataset = studio.data.add_text(rows)
    settings = {"steps": 4, "batch_size": 4, "evaluations": 2, "samples": 1, "learning_rate": 0.05} | train
    return RunConfig(
        name="tiny",
        model=str(tiny),
        dataset=DataChoice(id=dataset.id, name=dataset.name),
        method=LoraSpec(rank=4, targets=("all-linear",)),
        train=TrainConfig(**settings),
    )


def until(studio: Studio, run: str, kind: str, step: int = 0) -> Run:
    """Follow a run until an event of this kind and step."""
    for record in studio.follow(run, interval_s=0.02):
        if record["type"] == kind and record["step"] >= step:
            break
    return studio.runs.get(run)


def test_a_run_goes_from_queued_to_done_in_a_process_of_its_own(studio: Studio, tiny: Path) -> None:
    run = studio.start(config(studio, tiny))
    second = studio.start(config(studio, tiny, seed=1))
    assert run.status == "running" and second.status == "queued" and run.id != second.id
    records = list(studio.follow(run.id, interval_s=0.02))
    assert records[-1]["type"] == "Ended" and records[-1]["status"] == "done" and records[-1]["run"] == run.id
    assert json.loads((run.path / "worker.json").read_text())["pid"] != os.getpid()
    done = RunStore(studio.root).get(run.id)  # another process would see the same
    assert done.status == "done" and done.step == done.steps == 4 and done.has_adapter and not done.error
    assert done.summary["best_loss"] == min(
        r["values"]["heldout_loss"] for r in records if "heldout_loss" in r.get("values", {})
    )
    assert done.facts["estimate"]["trainable"] == next(r for r in records if r["type"] == "Started")["trainable"]
    studio.stop(second.id)
    list(studio.follow(second.id, interval_s=0.02))
    assert studio.runs.get(second.id).status == "stopped"


@pytest.mark.nightly
def test_the_same_config_gives_the_same_losses_in_another_process(studio: Studio, tiny: Path) -> None:
    losses = []
    for _ in range(2):
        run = studio.start(config(studio, tiny, precision="float32"))
        records = studio.follow(run.id, interval_s=0.02)
        losses.append(
            [r["values"]["train_loss"] for r in records if r["type"] == "Metric" and "train_loss" in r["values"]]
        )
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_stop_keeps_an_adapter_and_a_second_studio_may_ask_for_it(studio: Studio, tiny: Path) -> None:
    run = studio.start(config(studio, tiny, steps=100_000, evaluations=1))
    assert until(studio, run.id, "Metric", step=2).status == "running"
    other = Studio(studio.root)
    other.stop(run.id)
    other.stop(run.id)  # twice is once
    last = list(other.follow(run.id, interval_s=0.02))[-1]
    stopped = other.runs.get(run.id)
    assert last["type"] == "Ended" and stopped.status == "stopped" and 2 <= stopped.step < 100_000
    assert stopped.has_adapter and stopped.summary["best_step"] == stopped.step


@pytest.mark.nightly
def test_a_killed_worker_is_lost_with_a_reason_and_the_next_run_starts(studio: Studio, tiny: Path) -> None:
    run = studio.start(config(studio, tiny, steps=100_000))
    waiting = studio.start(config(studio, tiny, seed=1))
    until(studio, run.id, "Metric", step=1)
    os.killpg(json.loads((run.path / "worker.json").read_text())["pid"], signal.SIGKILL)
    list(studio.follow(waiting.id, interval_s=0.02))
    lost = RunStore(studio.root).get(run.id)
    assert lost.status == "lost" and lost.error and lost.error["code"] == "E_LOST" and lost.error["hint"]
    assert studio.runs.get(waiting.id).status == "done"
    assert all(record["type"] for record in RunStore(studio.root).events(run.id))


@pytest.mark.nightly
def test_a_worker_that_the_system_ends_saves_and_leaves_a_run_that_goes_on(studio: Studio, tiny: Path) -> None:
    run = studio.start(config(studio, tiny, steps=100_000, evaluations=1))
    until(studio, run.id, "Metric", step=3)
    os.kill(json.loads((run.path / "worker.json").read_text())["pid"], signal.SIGTERM)
    list(studio.follow(run.id, interval_s=0.02))
    left = studio.runs.get(run.id)
    assert left.status == "lost" and checkpoints.last_step(run.path) == left.step >= 3
    studio.supervisor.own()
    until(studio, run.id, "Metric", step=left.step + 1)
    studio.stop(run.id)
    list(studio.follow(run.id, interval_s=0.02))
    ended = studio.runs.get(run.id)
    assert ended.status == "stopped" and ended.has_adapter
    metrics = [one for one in studio.runs.events(run.id) if one["type"] == "Metric"]
    steps = [one["step"] for one in metrics if "train_loss" in one["values"]]
    assert steps == [*range(1, ended.step + 1)], "a step is missing or was taken twice"


def test_a_run_that_breaks_ends_with_a_code_and_plain_words(studio: Studio, tiny: Path) -> None:
    good = config(studio, tiny)
    run = studio.runs.create(dataclasses.replace(good, model=str(tiny / "gone")), {})
    list(studio.follow(run.id, interval_s=0.02))
    failed = studio.runs.get(run.id)
    assert failed.status == "failed" and failed.error and failed.error["code"] == "E_MODEL_ID" and failed.error["hint"]


def test_a_wrong_config_is_refused_before_anything_is_written(studio: Studio, tiny: Path) -> None:
    for wrong in ({"batch_size": 0}, {"learning_rate": -1.0}, {"steps": 0}):
        with pytest.raises(StudioError):
            studio.start(config(studio, tiny, **wrong))
    assert studio.runs.list() == []


def test_a_relative_model_folder_is_the_same_one_in_the_worker(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    run = studio.start(dataclasses.replace(config(studio, tiny), model=tiny.name))
    list(studio.follow(run.id, interval_s=0.02))
    assert studio.runs.get(run.id).status == "done" and run.config.model == str(tiny)


def test_a_stop_before_the_first_step_ends_the_run_as_stopped(studio: Studio, tiny: Path) -> None:
    run = studio.start(config(studio, tiny, steps=100_000))
    studio.stop(run.id)
    list(studio.follow(run.id, interval_s=0.02))
    assert studio.runs.get(run.id).status == "stopped" and not studio.runs.get(run.id).error


@pytest.mark.nightly
def test_without_held_out_rows_each_planned_evaluation_keeps_the_adapter(studio: Studio, tiny: Path) -> None:
    run = studio.start(config(studio, tiny, holdout=0.0, samples=0))
    records = list(studio.follow(run.id, interval_s=0.02))
    assert [r["step"] for r in records if r["type"] == "Saved"] == [2, 4]


@pytest.mark.nightly
def test_each_evaluation_is_made_once_also_when_the_last_is_not_the_best(studio: Studio, tiny: Path) -> None:
    run = studio.start(config(studio, tiny, learning_rate=1.0, steps=6, evaluations=3, schedule="constant"))
    records = list(studio.follow(run.id, interval_s=0.02))
    measured = [r["step"] for r in records if r["type"] == "Metric" and "heldout_loss" in r["values"]]
    assert measured == [0, 2, 4, 6]


def test_a_long_held_out_prompt_ends_no_run(studio: Studio, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "gpt2", "gpt2", n_positions=64)
    rows = [json.dumps({"prompt": f"{n} " + "long " * 60, "completion": "ab"}) for n in range(4)]
    rows += [json.dumps({"prompt": f"say {n}", "completion": "ab"}) for n in range(16)]
    dataset = studio.data.add_text("\n".join(rows))
    settings = TrainConfig(steps=2, evaluations=1, samples=5, max_length=60, holdout=0.4)
    run = studio.start(RunConfig(name="long", model=str(model), dataset=DataChoice(id=dataset.id), train=settings))
    list(studio.follow(run.id, interval_s=0.02))
    assert studio.runs.get(run.id).status == "done", studio.runs.get(run.id).error
    with pytest.raises(StudioError) as caught:
        studio.start(dataclasses.replace(run.config, train=dataclasses.replace(settings, max_length=65)))
    assert caught.value.code == "E_CONTEXT" and caught.value.change == {"max_length": 64}
    with pytest.raises(StudioError) as caught:
        next(studio.compare([run.id], "word " * 30))
    assert caught.value.code == "E_CONTEXT"


# ---- every method and both tasks, by the worker's own code in this process ------------------------------------------


def worked(studio: Studio, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run from the queue to its end."""
    monkeypatch.setattr(studio.supervisor, "tick", lambda: None)
    run = studio.start(config)
    work([Attempt(run.path)])
    return studio.runs.get(run.id)


def labelled(studio: Studio, model: Path, **changes: object) -> RunConfig:
    """Rows whose label is the letter that they are made of."""
    rows = "\n".join(json.dumps({"text": letter * (2 + n), "label": letter}) for n in range(12) for letter in "abc")
    dataset = studio.data.add_text(rows)
    settings = TrainConfig(steps=30, batch_size=8, evaluations=2, samples=1, learning_rate=0.02, holdout=0.2)
    choice = DataChoice(id=dataset.id, name=dataset.name)
    return RunConfig(**({"name": "l", "model": str(model), "dataset": choice, "train": settings} | changes))


@pytest.mark.parametrize("kind", BASELINES)
def test_another_method_trains_saves_and_answers_unlike_its_base(
    studio: Studio, tiny: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = BaselineSpec(kind=kind, width={"top": 1, "prefix": 4, "prompt": 4}.get(kind, 0))
    run = worked(studio, dataclasses.replace(config(studio, tiny, steps=12), method=method), monkeypatch)
    assert run.status == "done" and run.has_adapter, run.error
    assert run.summary["best_loss"] < run.summary["base_loss"]
    (started,) = [record for record in studio.runs.events(run.id) if record["type"] == "Started"]
    assert started["trainable"] == run.facts["estimate"]["trainable"] and started["precision"]
    figures = studio.evaluate(run.id)  # the adapter as it was saved, in a base that was loaded anew
    assert figures["adapted"]["loss"] == pytest.approx(run.summary["best_loss"], rel=2e-2)
    (*_, last) = studio.compare([run.id], "say 3")
    assert last.base_difference == 0.0 if last.exact else last.base_difference < 1e-6
    assert last.exact == (kind not in ("prefix", "prompt"))


def test_a_base_that_trains_itself_is_held_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_studio.models.training_precision", lambda *_: "bfloat16")

    def held(method: Method, asked: str = "auto") -> str:
        return base_precision(method, asked, "cpu", 0)

    assert held(LoraSpec()) == held(BaselineSpec(kind="bitfit")) == "bfloat16"
    assert held(BaselineSpec(kind="full")) == held(BaselineSpec(kind="top")) == "float32"
    assert held(BaselineSpec(kind="full"), "bfloat16") == "bfloat16" and held(LoraSpec(), "nf4") == "nf4"
    with pytest.raises(StudioError) as caught:
        held(BaselineSpec(kind="top"), "nf4")
    assert caught.value.code == "E_METHOD"


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", [LoraSpec(rank=4, targets=("attn.q", "mlp.up")), BaselineSpec(kind="bitfit")])
def test_labels_are_learnt_saved_with_their_names_and_chosen(
    studio: Studio, tmp_path: Path, tiny: Path, family: str, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny if family == "llama" else tiny_encoder(tmp_path / "bert")
    run = worked(studio, labelled(studio, model, task="classify", method=method), monkeypatch)
    assert run.status == "done" and run.labels == ("a", "b", "c"), run.error
    assert run.config.method.modules_to_save == (("score",) if family == "llama" else ("classifier",))
    assert run.summary["best_accuracy"] > run.summary["base_accuracy"] and run.summary["best_accuracy"] > 0.6
    figures = studio.evaluate(run.id)
    assert figures["rows"] == 7 and set(figures["adapted"]) == {"loss", "accuracy"}
    assert figures["adapted"]["accuracy"] == pytest.approx(run.summary["best_accuracy"])
    (moment,) = studio.compare([run.id], "bbbbb")
    assert moment.base_difference == 0.0 and [*moment.chances[1]] == ["a", "b", "c"]
    assert all(sum(chances.values()) == pytest.approx(1) for chances in moment.chances)
    best = max(moment.chances[1], key=moment.chances[1].__getitem__)
    assert moment.answers[1].text.startswith(f"{best} {100 * moment.chances[1][best]:.0f} %")
    (sample,) = [record for record in studio.runs.events(run.id) if record["type"] == "Sample" and record["step"] == 30]
    assert sample["text"][0] in "abc"


def test_runs_of_two_tasks_or_other_labels_do_not_share_a_comparison(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = worked(studio, config(studio, tiny, steps=1), monkeypatch)
    choosing = worked(studio, labelled(studio, tiny, task="classify", train=TrainConfig(steps=1)), monkeypatch)
    with pytest.raises(StudioError) as caught:
        next(studio.compare([writing.id, choosing.id], "a"))
    assert caught.value.code == "E_MIXED_BASES"


@pytest.mark.parametrize(
    ("name", "width", "code"),
    [("dora", 0, "E_METHOD"), ("lora", 4, "E_METHOD"), ("full", 4, "E_METHOD"), ("prefix", 5000, "E_CONFIG")],
)
def test_a_method_that_is_none_and_a_width_that_it_has_not_are_named(name: str, width: int, code: str) -> None:
    with pytest.raises(StudioError) as caught:
        method_of(name, width)
    assert caught.value.code == code and caught.value.hint


def test_methods_in_a_runs_name() -> None:
    methods = [method_of(name) for name in ("lora", "full", "prefix", "top")]
    assert [short(method) for method in methods] == ["r8", "full", "prefix 16", "top 2"]


# ---- going on: whatever broke a run off, its end is the end of one that nothing broke off ----------------------------


STEPS = {"steps": 6, "batch_size": 4, "evaluations": 2, "samples": 1, "precision": "float32", "save_every": 2}


def adapter(run: Run) -> tuple[dict, bytes]:
    """Names and bytes of the tensors; the library writes the metadata before them in any order."""
    data = (run.path / "adapter/adapter_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def ends(studio: Studio, run: Run) -> tuple[Any, list[tuple[int, float]], list[tuple[int, float]], list, dict]:
    """All that a run leaves, without its times: adapter, curves, samples, figures."""
    view = RunStore(studio.root).get(run.id)
    assert view.status == "done" and view.step == view.steps, view.error
    with claim(run.path, patience_s=60) as lock:  # the worker's last act is to let go of it
        assert lock
    metrics = [record for record in studio.runs.curve(run.id) if record["type"] == "Metric"]
    curves = [
        [(record["step"], record["values"][name]) for record in metrics if name in record["values"]]
        for name in ("train_loss", "heldout_loss")
    ]
    samples = [
        (record["step"], record["index"], record["text"])
        for record in studio.runs.curve(run.id)
        if record["type"] == "Sample"
    ]
    figures = {name: view.summary[name] for name in ("base_loss", "best_loss", "best_step", "train_loss")}
    assert not (view.path / "checkpoints").exists() and view.latest["train_loss"] == curves[0][-1][1]
    return adapter(run), *curves, samples, figures


def begun(studio: Studio, tiny: Path, **train: object) -> Run:
    """A run that waits for the worker's code in this process."""
    made = config(studio, tiny, **(STEPS | train))
    return studio.runs.create(dataclasses.replace(made, method=LoraSpec(rank=4, targets=("attn.q",), dropout=0.2)), {})


def attempt(run: Run) -> None:
    """What a worker does, in this process; the log tells that there was one."""
    (run.path / "worker.log").touch()
    with claim(run.path) as lock:
        assert lock
        work([Attempt(run.path)])


def breaking(monkeypatch: pytest.MonkeyPatch, at: int, *, written: bool) -> None:
    """Let the worker be killed around the at-th event that it writes."""
    real, count = Attempt.append, itertools.count(1)

    def append(self: Attempt, event: Event) -> None:
        here = next(count) == at
        if written or not here:
            real(self, event)
        if here:
            raise Crash

    monkeypatch.setattr(Attempt, "append", append)


@pytest.fixture
def unbroken(studio: Studio, tiny: Path) -> tuple:
    run = begun(studio, tiny)
    attempt(run)
    found = ends(studio, run)
    assert [step for step, _ in found[1]] == [1, 2, 3, 4, 5, 6] and [step for step, _ in found[2]] == [0, 3, 6]
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("written", [True, False], ids=["behind", "before"])
def test_killed_at_any_event_and_resumed_ends_bit_for_bit_as_if_it_had_not_been(
    studio: Studio, tiny: Path, unbroken: tuple, written: bool
) -> None:
    for at in itertools.count(1, 1 if written else 4):
        run = begun(studio, tiny)
        with pytest.MonkeyPatch.context() as patch:
            breaking(patch, at, written=written)
            try:
                attempt(run)
            except Crash:
                pass
            else:
                break
        if studio.runs.get(run.id).status != "done":  # else it was looking at what it had learnt
            assert studio.runs.get(run.id).status == "lost"
            assert studio.runs.requeue(run.id).status == "queued"
            attempt(run)
        assert ends(studio, run) == unbroken, f"broken off at event {at}"
    assert at > 18  # events of the whole run


def test_killed_again_and_again_it_still_ends_so(studio: Studio, tiny: Path, unbroken: tuple) -> None:
    run, attempts = begun(studio, tiny), 0
    while True:
        attempts += 1
        with pytest.MonkeyPatch.context() as patch:
            breaking(patch, 10, written=True)
            try:
                attempt(run)
            except Crash:
                if studio.runs.get(run.id).status == "done":
                    break
                studio.runs.requeue(run.id)
            else:
                break
        assert attempts < 20
    assert ends(studio, run) == unbroken and attempts > 2
    started = [record for record in studio.runs.events(run.id) if record["type"] == "Started"]
    assert [record["attempt"] for record in started] == [*range(1, attempts + 1)]
    assert started[-1]["step"] > 0 and len(earlier_logs(run.path)) == attempts - 1


@pytest.mark.parametrize("what", ["pause", "stop", "discard", "terminate"])
@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_paused_or_stopped_at_any_step_and_resumed_ends_so_too(
    studio: Studio, tiny: Path, unbroken: tuple, what: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = begun(studio, tiny), Attempt.append

    def append(self: Attempt, event: Event) -> None:
        real(self, event)
        if isinstance(event, Metric) and event.step == step:
            self.terminated = what == "terminate"
            if not self.terminated:
                write_json(run.path / "control.json", {what: True, "time": 0.0})

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "append", append)
        attempt(run)
    view = studio.runs.get(run.id)
    becomes = {"pause": "paused", "stop": "stopped", "discard": "stopped", "terminate": "lost"}
    assert view.discarded == (what == "discard")
    assert view.status == becomes[what] and view.step == step and view.resumable
    if what == "stop" and step:
        assert view.has_adapter
    assert studio.runs.requeue(run.id).status == "queued"
    attempt(run)
    assert ends(studio, run) == unbroken or (what == "stop" and step in (2, 5))
    if what == "stop" and step in (2, 5):  # a stop measures once more, where it stops
        tensors, losses, heldout, samples, figures = ends(studio, run)
        assert (tensors, losses, samples, figures) == (unbroken[0], unbroken[1], unbroken[3], unbroken[4])
        assert [one for one in heldout if one[0] != step] == unbroken[2]


def test_a_run_whose_samples_found_no_memory_is_saved_and_can_be_stopped_all_the_same(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> list[str]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("lora_studio.train.sampled", no_room)
    run = begun(studio, tiny, samples=2, evaluations=STEPS["steps"])  # every step is measured
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "asked", lambda self: "paused" if self.step == 3 else None)
        attempt(run)
    view = studio.runs.get(run.id)
    assert (view.status, view.step) == ("paused", 3) and view.resumable
    assert sum(one.get("code") == "W_SAMPLES" for one in studio.runs.events(run.id)) == 4


@pytest.mark.parametrize("what", ["paused", "stopped"])
def test_the_best_adapter_of_before_comes_back_although_a_stop_kept_another(
    studio: Studio, tiny: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {0: 9.0, 2: 5.0, 3: 4.0, 4: 6.0, 6: 7.0}  # of held-out rows; only a stop measures at step 3

    def measured(job: Job, *, base: bool = False) -> dict[str, float]:
        return {"heldout_loss": losses[job.step]}

    monkeypatch.setattr("lora_studio.train.heldout_figures", measured)
    straight, broken = (begun(studio, tiny, evaluations=3) for _ in range(2))
    attempt(straight)
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "asked", lambda self: what if self.step == 3 else None)
        attempt(broken)
    kept = studio.runs.get(broken.id).summary["best_step"]
    assert kept == (3 if what == "stopped" else 2)
    studio.runs.requeue(broken.id)
    attempt(broken)
    (ours, *_, figures), (theirs, *_, wanted) = (ends(studio, run) for run in (broken, straight))
    assert ours == theirs and figures == wanted and figures["best_step"] == 2


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it_and_says_so(
    studio: Studio, tiny: Path, unbroken: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(studio, tiny)
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "finish", lambda *_: (_ for _ in ()).throw(Crash))
        write_json(run.path / "control.json", {"pause": True})
        patch.setattr(Attempt, "asked", lambda self: "paused" if self.step == 5 else None)
        with pytest.raises(Crash):
            attempt(run)
    older, newer = sorted((run.path / "checkpoints").iterdir())
    assert (older.name, newer.name) == ("step-00000004", "step-00000005")
    (newer / "optimizer.safetensors").write_bytes((newer / "optimizer.safetensors").read_bytes()[:-1])
    studio.runs.requeue(run.id)
    attempt(run)
    assert ends(studio, run) == unbroken
    (warned,) = [record for record in studio.runs.events(run.id) if record.get("code") == "W_CHECKPOINT"]
    assert "step-00000005" in warned["message"] and "step-00000004" in warned["message"]


def test_with_all_checkpoints_damaged_nothing_is_thrown_away_in_silence(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(studio, tiny)
    breaking(monkeypatch, 12, written=True)
    with pytest.raises(Crash):
        attempt(run)
    for manifest in run.path.glob("checkpoints/*/MANIFEST.json"):
        manifest.unlink()
    with pytest.raises(StudioError) as caught:
        studio.runs.requeue(run.id)
    assert caught.value.code == "E_CHECKPOINT" and studio.runs.get(run.id).status == "lost"


def test_a_full_disk_ends_no_run_and_is_said_once(studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_studio.runs.checkpoints.save", full)
    run = begun(studio, tiny)
    attempt(run)
    warned = [record for record in studio.runs.events(run.id) if record.get("code") == "W_CHECKPOINT"]
    assert studio.runs.get(run.id).status == "done" and len(warned) == 1 and "disk is full" in warned[0]["message"]


def test_an_adapter_is_on_the_disk_before_it_counts(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run, fresh = put(store), store.folder / "fresh"
    fresh.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (fresh / name).write_text(name)
    found, real = synced(monkeypatch), Path.replace

    def replace(self: Path, target: Path) -> Path:
        assert self.stat().st_ino in found, "renamed before it was synced"
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    Attempt(run.path)._place(fresh)
    assert len(list((run.path / "adapter").iterdir())) == 2
    assert {(run.path / "adapter").stat().st_ino, run.path.stat().st_ino} <= found


@pytest.mark.parametrize("status", ["failed", "lost"])
def test_a_run_whose_end_cannot_be_written_takes_no_other_of_its_worker_with_it(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch, status: Status
) -> None:
    """From a step on, the disk takes nothing into the journal of one run, nor, when it is lost, its exit.json."""
    full, other = study(studio, tiny, [2, 4])
    append = Attempt.append

    def appended(self: Attempt, event: Event) -> None:
        if self.path == full.path and self.step >= 3:
            raise OSError(28, "No space left on device")
        append(self, event)

    def written(path: Path, value: Any) -> None:
        if path.parent == full.path and status == "lost":
            raise OSError(28, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr(Attempt, "append", appended)
    monkeypatch.setattr("lora_studio.runs.store.write_json", written)
    for run in (full, other):
        (run.path / "worker.log").touch()
    with claim(full.path) as lock:
        work([Attempt(full.path, lock), Attempt(other.path)])
    assert studio.runs.get(full.id).status == status and studio.runs.get(full.id).resumable
    assert studio.runs.get(other.id).status == "done" and studio.runs.get(other.id).step == 6


def test_a_done_run_whose_exit_cannot_be_written_keeps_its_checkpoints(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = begun(studio, tiny)
    with monkeypatch.context() as patch:
        patch.setattr("lora_studio.runs.store.write_json", full)
        attempt(run)
    assert studio.runs.get(run.id).status == "lost" and checkpoints.any_saved(run.path)
    studio.runs.requeue(run.id)
    attempt(run)
    assert studio.runs.get(run.id).status == "done"


def test_time_decides_about_checkpoints_where_no_number_of_steps_does(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    real = checkpoints.save

    def save(run: Path, state: State, *rest: object, **more: object) -> Path:
        saved.append(state.progress["step"])
        return real(run, state, *rest, **more)

    monkeypatch.setattr("lora_studio.runs.checkpoints.save", save)
    attempt(begun(studio, tiny, save_every=0))
    assert saved == [3]  # the evaluation; the last step's would be removed at once
    monkeypatch.setattr("lora_studio.runs.attempt.SAVE_S", -1.0)
    monkeypatch.setattr("lora_studio.runs.attempt.SAVE_SHARE", 0.0)
    attempt(begun(studio, tiny, save_every=0))
    assert saved == [3, 1, 2, 3, 4, 5]


# ---- real processes --------------------------------------------------------------------------------------------------


def test_a_worker_killed_with_9_is_resumed_exactly_and_so_is_one_that_was_paused(
    studio: Studio, tiny: Path, unbroken: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    method = LoraSpec(rank=4, targets=("attn.q",), dropout=0.2)
    run = studio.start(dataclasses.replace(config(studio, tiny, **STEPS), method=method))
    until(studio, run.id, "Metric", step=4)
    os.killpg(json.loads((run.path / "worker.json").read_text())["pid"], signal.SIGKILL)
    list(studio.follow(run.id, interval_s=0.02))
    lost = studio.runs.get(run.id)
    if lost.status != "done":  # it was quicker
        assert lost.status == "lost" and studio.resume(run.id).status == "running"
        list(studio.follow(run.id, interval_s=0.02))
        assert earlier_logs(run.path) == [run.path / "worker.1.log"]
    assert ends(studio, run) == unbroken

    long = studio.start(dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, steps=100_000)))
    until(studio, long.id, "Metric", step=2)
    studio.pause(long.id)
    records = list(studio.follow(long.id, interval_s=0.02))
    paused = RunStore(studio.root).get(long.id)
    assert paused.status == records[-1]["status"] == "paused" and not paused.error and paused.step >= 2
    studio.resume(long.id)
    until(studio, long.id, "Metric", step=paused.step + 2)
    studio.stop(long.id)
    list(studio.follow(long.id, interval_s=0.02))
    metrics = [one for one in studio.runs.curve(long.id) if one["type"] == "Metric"]
    steps = [one["step"] for one in metrics if "train_loss" in one["values"]]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) >= paused.step + 2
    assert studio.runs.get(long.id).status == "stopped"


def test_a_spare_worker_trains_what_a_cold_one_trains_and_ends_with_whoever_keeps_it(
    studio: Studio, tiny: Path, unbroken: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    local = Local()
    local.prepare()
    spare = local._spare
    assert spare and spare.lives
    local.prepare()
    assert local._spare is spare  # one is enough
    run = begun(studio, tiny)
    assert local.start([run.path]) and local._spare is None
    list(studio.follow(run.id, interval_s=0.02))
    assert json.loads((run.path / "worker.json").read_text())["pid"] == spare._child.pid
    assert ends(studio, run) == unbroken and "Loading" in studio.runs.log(run.id)

    keep = "from lora_studio.runs.executors import Local; one = Local(); one.prepare()"
    code = f"import signal; {keep}; print(one._spare._child.pid, flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment()) as keeper:
        try:
            assert keeper.stdout
            pid = int(keeper.stdout.readline())
            while not (said := Path(f"/proc/{pid}/cmdline").read_bytes()):  # it is becoming a Python at this moment
                assert keeper.poll() is None
            assert b"--spare" in said
        finally:
            keeper.kill()
    assert psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=60)[1] == []


def test_a_spare_that_died_is_replaced_by_a_cold_worker(studio: Studio, tiny: Path) -> None:
    local = Local()
    local.prepare()
    assert local._spare
    local._spare._child.kill()
    local._spare._child.wait()
    run = begun(studio, tiny, steps=2)
    assert local.start([run.path])
    list(studio.follow(run.id, interval_s=0.02))
    assert studio.runs.get(run.id).status == "done"
    local.prepare()
    spare = local._spare
    assert spare
    local.close()
    assert not spare.lives and local._spare is None


# ---- bounds, and what a kill leaves behind ---------------------------------------------------------------------------


def test_a_run_that_took_its_minutes_ends_as_stopped_with_its_adapter_and_says_why(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(studio, tiny)
    (run.path / "worker.log").touch()
    limits = dataclasses.replace(LAPTOP, minutes=30)
    one = Attempt(run.path, limits=limits)
    real, step = Attempt.append, 3

    def append(self: Attempt, event: Event) -> None:
        real(self, event)
        if isinstance(event, Metric) and event.step == step:
            self._begun -= 31 * 60

    monkeypatch.setattr(Attempt, "append", append)
    work([one])
    view = studio.runs.get(run.id)
    assert (view.status, view.step) == ("stopped", step) and view.has_adapter and not view.error
    (warned,) = [record for record in studio.runs.events(run.id) if record.get("code") == "W_MINUTES"]
    assert "30 minutes" in warned["message"] and warned["step"] == step


def test_epochs_that_come_to_too_many_steps_are_refused_by_the_worker(studio: Studio, tiny: Path) -> None:
    run = begun(studio, tiny, steps=0, epochs=10.0)
    (run.path / "worker.log").touch()
    work([Attempt(run.path, limits=dataclasses.replace(LAPTOP, steps=20))])
    view = studio.runs.get(run.id)
    assert (
        view.status == "failed" and view.error and view.error["code"] == "E_LIMIT" and "steps" in view.error["message"]
    )


def test_samples_that_make_a_journal_too_long_are_left_out_and_the_curve_is_not(studio: Studio, tiny: Path) -> None:
    run = begun(studio, tiny)
    (run.path / "worker.log").touch()
    work([Attempt(run.path, limits=dataclasses.replace(LAPTOP, journal_bytes=1500))])
    records = studio.runs.events(run.id)
    assert studio.runs.get(run.id).status == "done"
    metrics = [one for one in records if one["type"] == "Metric"]
    assert [one["step"] for one in metrics if "train_loss" in one["values"]] == [1, 2, 3, 4, 5, 6]
    assert [one["code"] for one in records if one.get("code") == "I_SAMPLES"] == ["I_SAMPLES"]
    assert len([one for one in records if one["type"] == "Sample"]) < 3


def test_after_a_kill_for_memory_a_step_has_more_passes_and_the_same_result(
    studio: Studio, tiny: Path, unbroken: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(studio, tiny)
    with monkeypatch.context() as patch:
        breaking(patch, 10, written=True)
        with pytest.raises(Crash):
            attempt(run)
    studio.runs.requeue(run.id, said=Warned(step=2, code=OUT_OF_MEMORY, message="m"))
    attempt(run)
    first, second = [one["accumulate"] for one in studio.runs.events(run.id) if one["type"] == "Probed"]
    assert second == 2 * first and studio.runs.get(run.id).status == "done"
    metrics = [one["values"] for one in studio.runs.curve(run.id) if one["type"] == "Metric"]
    losses = [values["train_loss"] for values in metrics if "train_loss" in values]
    assert losses == pytest.approx([loss for _, loss in unbroken[1]], rel=1e-3)  # of other passes, so sums round


def test_nothing_half_written_is_left_by_the_next_attempt(studio: Studio, tiny: Path, unbroken: tuple) -> None:
    run = begun(studio, tiny)
    (run.path / "adapter.tmp").mkdir()
    (run.path / "checkpoints/step-00000002.tmp/best").mkdir(parents=True)
    for name in ("adapter.tmp/adapter_model.safetensors", "adapter_model.safetensors.tmp", "exit.json.7-8.tmp"):
        (run.path / name).write_text("half")
    attempt(run)
    assert ends(studio, run) == unbroken and not [*run.path.rglob("*.tmp")]


def test_a_disk_that_is_full_where_the_adapter_goes_is_named_with_figures(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = begun(studio, tiny)
    monkeypatch.setattr("lora_studio.adapters.save", full)
    attempt(run)
    view = studio.runs.get(run.id)
    assert (
        view.status == "failed" and view.error and view.error["code"] == "E_DISK" and "needs" in view.error["message"]
    )


def test_a_stop_while_rows_are_tokenised_is_heard(studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(studio, tiny)
    monkeypatch.setattr("lora_studio.runs.worker.SAY_S", -1.0)
    monkeypatch.setattr("lora_studio.runs.worker.AT_ONCE", 5)
    asked = iter([None, None, None, "stopped"])
    monkeypatch.setattr(Attempt, "asked", lambda self: next(asked))
    attempt(run)
    view = studio.runs.get(run.id)
    assert view.status == "stopped" and view.step == 0 and "Tokenised" in view.note


# ---- several runs in one worker --------------------------------------------------------------------------------------


def study(studio: Studio, tiny: Path, ranks: Sequence[int], **train: object) -> list[Run]:
    """Queued runs of one study."""
    made = dataclasses.replace(config(studio, tiny, **(STEPS | train)), study="s")
    methods = [LoraSpec(rank=rank, targets=("attn.q", "mlp.up")) for rank in ranks]
    return [studio.runs.create(dataclasses.replace(made, method=method), {}) for method in methods]


def test_runs_of_a_study_train_in_one_worker_as_each_would_alone_and_one_may_be_dropped(
    studio: Studio, tiny: Path
) -> None:
    one, two, four = study(studio, tiny, [1, 2, 4], steps=100)
    studio.supervisor.tick()
    assert [studio.runs.get(run.id).status for run in (one, two, four)] == ["running"] * 3
    assert len({(run.path / "worker.log").stat().st_ino for run in (one, two, four)}) == 1
    until(studio, two.id, "Metric", step=2)
    assert len({json.loads((run.path / "worker.json").read_text())["pid"] for run in (one, two, four)}) == 1
    studio.stop(two.id)
    list(studio.follow(two.id, interval_s=0.02))
    stopped = studio.runs.get(two.id)
    assert stopped.status == "stopped" and 2 <= stopped.step < 100 and stopped.has_adapter
    assert studio.runs.get(four.id).status == "running"
    studio.runs.delete(two.id)  # its lock is free although its worker goes on
    for run in (one, four):
        list(studio.follow(run.id, interval_s=0.02))
        assert studio.runs.get(run.id).status == "done" and studio.runs.get(run.id).step == 100


def test_each_of_several_ends_as_it_does_alone_also_when_others_fail_or_go_on_from_a_checkpoint(
    studio: Studio, tiny: Path
) -> None:
    alone = study(studio, tiny, [2, 4])
    for run in alone:
        attempt(run)
    two, four, wrong = study(studio, tiny, [2, 4, 64])  # the last rank is too high, which add() says
    with pytest.MonkeyPatch.context() as patch:
        breaking(patch, 30, written=True)
        with pytest.raises(Crash):
            work([Attempt(run.path) for run in (two, four, wrong)])
    failed = studio.runs.get(wrong.id)
    assert failed.status == "failed" and failed.error and failed.error["code"] == "E_RANK"
    for run in (two, four):
        (run.path / "worker.log").touch()
        studio.runs.requeue(run.id)
    work([Attempt(run.path) for run in (two, four)])
    for run, lone in zip((two, four), alone, strict=True):
        ours, theirs = (load_file(one.path / "adapter/adapter_model.safetensors") for one in (run, lone))
        assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in theirs)
        curves = [[x["step"] for x in studio.runs.curve(a.id) if x["type"] == "Metric"] for a in (run, lone)]
        assert curves[0] == curves[1]


def test_only_runs_that_share_base_and_rows_train_together(studio: Studio, tiny: Path) -> None:
    first, other, study_of_two = study(studio, tiny, [1, 2, 4])
    changed = {
        "study": "t",
        "model": "elsewhere",
        "task": "classify",
        "method": BaselineSpec(kind="full"),
        "dataset": DataChoice(id="0" * 32),
        **{
            f"train {name}": dataclasses.replace(first.config.train, **{name: value})
            for name, value in {"max_length": 9, "holdout": 0.0, "seed": 1, "precision": "bfloat16"}.items()
        },
    }
    own = [
        studio.runs.create(dataclasses.replace(first.config, **{name.split()[0]: value}), {})
        for name, value in changed.items()
    ]
    assert together([first, *own, other, study_of_two]) == [first, other, study_of_two]
    without = [studio.runs.create(dataclasses.replace(first.config, study=""), {}) for _ in range(2)]
    assert together(without) == without[:1]
    assert together([own[3], first]) == own[3:4]


def test_runs_made_while_the_queue_is_held_are_seen_together(studio: Studio, tiny: Path) -> None:
    with studio.supervisor.hold():
        runs = study(studio, tiny, [1, 2], steps=1)
        assert not studio.supervisor.tick() and studio.runs.get(runs[0].id).status == "queued"
    studio.supervisor.tick()
    assert [studio.runs.get(run.id).status for run in runs] == ["running"] * 2
    for run in runs:
        list(studio.follow(run.id, interval_s=0.02))


# ---- what a run needs to be done -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "code", "cured"),
    [
        ({"learning_rate": 1e-7, "schedule": "constant", "steps": 1, "warmup": 0.0}, None, None),
        ({"max_length": 8}, "E_NO_TARGET", "max_length"),
    ],
)
def test_a_run_that_fails_says_what_would_cure_it(
    studio: Studio, tiny: Path, train: dict, code: str | None, cured: str | None
) -> None:
    run = begun(studio, tiny, **train)
    attempt(run)
    view = studio.runs.get(run.id)
    (*_, last) = studio.runs.events(run.id)
    assert (view.error or {}).get("code") == code and last["type"] == "Ended" and last["error"] == view.error
    if cured and view.error:
        again = studio.restart(run.id, view.error["change"])
        assert getattr(again.config.train, cured) > getattr(run.config.train, cured)
        assert again.name == "tiny (2)" and studio.restart(again.id, {"steps": 1}).name == "tiny (3)"
        for wrong in ({"nothing": 1}, {"steps": -1}):
            with pytest.raises(StudioError):
                studio.restart(run.id, wrong)


@pytest.mark.parametrize(("harm", "code"), [("nan", "E_NOT_FINITE"), ("zero", "E_NO_UPDATE")])
def test_done_means_finite_and_changed(
    studio: Studio, tiny: Path, harm: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(self: Attempt, job: Job, status: Status) -> None:
        with torch.no_grad():
            for tensor in job.parameters:
                tensor.fill_(math.nan) if harm == "nan" else tensor.zero_()
        real(self, job, status)

    real = Attempt.finish
    monkeypatch.setattr(Attempt, "finish", finish)
    run = begun(studio, tiny)
    attempt(run)
    view = studio.runs.get(run.id)
    assert view.status == "failed" and view.error and view.error["code"] == code and view.error["change"]


def test_a_loss_that_is_no_number_fails_the_run_and_the_last_good_checkpoint_stays(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.nn.utils.clip_grad_norm_
    norms = itertools.count(1)

    def norm(*given: Any, **named: Any) -> torch.Tensor:
        return real(*given, **named) * (math.nan if next(norms) == 5 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    run = begun(studio, tiny)
    attempt(run)
    view = studio.runs.get(run.id)
    assert view.status == "failed" and view.error and view.error["code"] == "E_NOT_FINITE" and view.resumable
    assert view.error["change"]["learning_rate"] < run.config.train.learning_rate
    assert [path.name for path in sorted((run.path / "checkpoints").iterdir())] == ["step-00000003", "step-00000004"]
    assert len([one for one in studio.runs.events(run.id) if one.get("code") == "E_NOT_FINITE"]) == 0  # Ended says so


def test_the_probe_is_kept_beside_the_estimate(studio: Studio, tiny: Path) -> None:
    run = begun(studio, tiny)
    attempt(run)
    (probed,) = [record for record in studio.runs.events(run.id) if record["type"] == "Probed"]
    summary = studio.runs.get(run.id).summary
    assert (summary["probe_seconds"], summary["probe_memory_bytes"]) == (probed["seconds"], probed["memory_bytes"])


# ---- files alone -----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def put(store: RunStore) -> Run:
    return store.create(RunConfig(name="n", dataset=DataChoice(id="0" * 32)), {})


def test_status_follows_from_the_files(store: RunStore) -> None:
    run = put(store)
    assert store.get(run.id).status == "queued"
    with (run.path / "worker.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (run.path / "worker.log").touch()
        assert store.get(run.id).status == "running"
    assert store.get(run.id).status == "lost"
    write_json(run.path / "exit.json", {"status": "done", "values": {}})
    assert store.get(run.id).status == "done"


def test_a_torn_line_waits_garbage_is_skipped_and_nothing_is_read_twice(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    assert journal.refresh().records == []
    lines = [
        to_line(
            Started(steps=9, trainable=1, total=2, device="cpu", precision="float32", train_rows=1, heldout_rows=1),
            time=0,
            attempt=1,
        )
    ]
    lines += [to_line(Metric(step=step, values={"train_loss": float(step)}), time=0, attempt=1) for step in (1, 2, 3)]
    data = ("\n".join([lines[0], "garbage", "\x00\x00", *lines[1:]]) + "\n").encode()
    for end in range(0, len(data) + 1, 7):
        path.write_bytes(data[:end])
        journal.refresh()
    path.write_bytes(data)
    assert [record["step"] for record in journal.refresh().records] == [0, 1, 2, 3]
    assert journal.latest == {"train_loss": 3.0} and (journal.step, journal.steps) == (3, 9)


@pytest.mark.parametrize(
    "text", ["", '{"created": 1, "con', "[]", "{}", '{"created": 1, "config": {}}', '{"created": "x"}']
)
def test_a_damaged_run_is_named_and_the_others_are_listed(store: RunStore, text: str) -> None:
    broken, whole = put(store), put(store)
    (broken.path / "run.json").write_text(text)
    listed = {run.id: run for run in store.list()}
    assert listed[whole.id].status == "queued" and listed[broken.id].status == "damaged"
    assert listed[broken.id].error and listed[broken.id].error["code"] == "E_RUN_DAMAGED"
    assert not (listed[broken.id].has_adapter or listed[broken.id].resumable or listed[broken.id].active)
    assert [run.id for run in store.of("").list()] == [whole.id]  # whose the other is, cannot be told
    with pytest.raises(StudioError) as caught:
        store.get(broken.id)
    assert caught.value.code == "E_RUN_DAMAGED"
    store.delete(broken.id)
    assert [run.id for run in store.list()] == [whole.id]


def test_a_stopped_or_claimed_run_is_not_started_and_a_claimed_one_not_stopped_behind_its_worker(
    store: RunStore,
) -> None:
    stopped, claimed = put(store), put(store)
    store.request_stop(stopped.id)
    with claim(claimed.path) as lock, claim(claimed.path) as second:
        assert lock and second is None
        store.request_stop(claimed.id)
        assert not Local().start([claimed.path])
    assert not Local().start([stopped.path]) and store.get(stopped.id).status == "stopped"
    assert not (claimed.path / "exit.json").exists() and (claimed.path / "control.json").exists()
    assert not list(store.folder.glob("*/worker.log"))


class Child:
    """A worker that never ends; `during` happens once, while somebody asks whether it has."""

    def __init__(self, during: threading.Thread | None = None) -> None:
        self.during = during

    def poll(self) -> None:
        during, self.during = self.during, None
        if during:
            during.start()
            during.join(0.2)  # it may have to wait for whoever asks


def test_a_run_that_a_page_looks_at_is_started_all_the_same(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run = put(store)
    (run.path / "worker.lock").touch()
    look = (run.path / "worker.lock").open("rb")
    fcntl.flock(look, fcntl.LOCK_SH)
    monkeypatch.setattr("lora_studio.runs.executors._spawn", lambda *_: Child())
    monkeypatch.setattr("lora_studio.runs.store.time.sleep", lambda _: look.close())  # the look ends meanwhile
    assert Local().start([run.path])


def test_a_worker_started_while_another_thread_reaps_is_not_forgotten(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, one, two = Local(), put(store), put(store)
    start = threading.Thread(target=lambda: local.start([two.path]))
    children = iter([Child(during=start), Child()])
    monkeypatch.setattr("lora_studio.runs.executors._spawn", lambda *_: next(children))
    assert local.start([one.path])
    local.reap()
    start.join()
    assert local._children.keys() == {one.path, two.path}


def test_a_worker_that_does_not_stop_when_asked_is_ended(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = studio.start(config(studio, tiny, steps=100_000))
    until(studio, run.id, "Metric", step=1)
    os.kill(json.loads((run.path / "worker.json").read_text())["pid"], signal.SIGSTOP)
    studio.stop(run.id)
    studio.supervisor.tick()
    assert studio.runs.get(run.id).status == "running"  # it has time
    monkeypatch.setattr("lora_studio.runs.supervisor.PATIENCE_S", -1)
    studio.supervisor.tick()
    assert studio.runs.get(run.id).status == "stopped"


@pytest.mark.parametrize("id", ["", "..", "../../etc", "zz", "0" * 32, "a" * 64, "\x00", "*"])
def test_an_id_that_is_no_run_is_not_found_and_never_a_path(store: RunStore, id: str) -> None:
    put(store)
    with pytest.raises(StudioError) as caught:
        store.get(id)
    assert caught.value.code == "E_RUN_NOT_FOUND"
    with pytest.raises(StudioError):
        store.events(id)


def test_runs_are_listed_newest_first_found_by_a_beginning_and_deleted(store: RunStore) -> None:
    first, second = put(store), put(store)
    assert [run.id for run in store.list()] == [second.id, first.id]
    assert store.get(first.id[:8]).id == first.id
    store.delete(first.id)
    assert [run.id for run in store.list()] == [second.id]
    store.sweep_deleted(at_once=True)
    assert [path.name for path in store.folder.iterdir()] == [second.id]


def test_a_running_run_cannot_be_deleted(store: RunStore) -> None:
    run = put(store)
    with (run.path / "worker.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StudioError) as caught:
            store.delete(run.id)
    assert caught.value.code == "E_RUN_ACTIVE"


def test_the_workers_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "NVIDIA_API_KEY", "LORA_STUDIO_TOKEN"):
        monkeypatch.setenv(name, "canary")
    assert "canary" not in "".join(environment().values()) and "PATH" in environment()


# ---- back into the queue ---------------------------------------------------------------------------------------------


def ended(store: RunStore, status: str) -> Run:
    """A run whose files say that a worker ended so, at step 0."""
    run = put(store)
    for name in ("worker.log", "worker.json"):
        (run.path / name).write_text("{}")
    write_json(run.path / "control.json", {"stop": True})
    if status != "lost":
        write_json(run.path / "exit.json", {"status": status, "values": {}})
    assert store.get(run.id).status == status
    return run


@pytest.mark.parametrize("status", ["paused", "stopped", "failed", "lost"])
def test_going_back_into_the_queue_broken_off_anywhere_leaves_the_old_state_or_the_new_one(
    store: RunStore, status: str
) -> None:
    for at in itertools.count(1):
        run = ended(store, status)
        with pytest.MonkeyPatch.context() as patch:
            break_off(patch, [(Path, "unlink"), (Path, "rename")], at)
            try:
                store.requeue(run.id)
            except Crash:
                assert RunStore(store.folder.parent).get(run.id).status in (status, "queued")
            else:
                break
        if store.get(run.id).status == status:
            store.requeue(run.id)
        assert store.get(run.id).status == "queued"
    assert at == 6 and not (run.path / "control.json").exists() and len(earlier_logs(run.path)) == 1
    assert Attempt(run.path).number == 2


def test_what_cannot_go_on_says_why(store: RunStore) -> None:
    done, queued, running, old = ended(store, "done"), put(store), ended(store, "lost"), ended(store, "stopped")
    started = Started(steps=9, trainable=1, total=2, device="cpu", precision="float32", train_rows=1, heldout_rows=1)
    lines = [to_line(event, time=0, attempt=1) for event in (started, Metric(step=3, values={"train_loss": 1.0}))]
    (old.path / "events.jsonl").write_text("\n".join(lines) + "\n")
    (old.path / "checkpoints/step-00000003.tmp").mkdir(parents=True)  # the only save was broken off
    store = RunStore(store.folder.parent)  # what has ended is not read twice
    with claim(running.path) as lock:
        assert lock
        for run, code in ((done, "DONE"), (queued, "ACTIVE"), (running, "ACTIVE"), (old, "NO_CHECKPOINT")):
            with pytest.raises(StudioError) as caught:
                store.requeue(run.id)
            assert code in caught.value.code and caught.value.hint, run.status
    assert not store.get(old.id).resumable and store.get(running.id).resumable
    assert store.requeue(running.id).status == "queued"


def test_another_process_sees_a_resumed_run_and_its_next_end(store: RunStore) -> None:
    run, other = ended(store, "paused"), RunStore(store.folder.parent)
    assert other.get(run.id).status == "paused" and other.list()[0].status == "paused"
    store.requeue(run.id)
    assert other.get(run.id).status == other.list()[0].status == "queued"
    other.request_pause(run.id)
    assert store.get(run.id).status == "paused" and not (run.path / "control.json").exists()
    store.requeue(run.id)
    write_json(run.path / "exit.json", {"status": "done", "values": {"best_loss": 1.0}})
    assert other.get(run.id).status == "done" and other.get(run.id).summary == {"best_loss": 1.0}


def test_a_journal_forgets_what_a_later_attempt_says_anew(tmp_path: Path) -> None:
    def begin(step: int) -> Started:
        sizes = {"steps": 9, "trainable": 1, "total": 2, "train_rows": 1, "heldout_rows": 1}
        return Started(step=step, device="cpu", precision="float32", **sizes)

    def loss(step: int, name: str = "train_loss") -> Metric:
        return Metric(step=step, values={name: float(step)})

    first = [begin(0), loss(0, "heldout_loss"), *map(loss, (1, 2, 3, 4)), loss(4, "heldout_loss")]
    journal = Journal(tmp_path / "events.jsonl")

    def tell(events: Sequence[Event], attempt: int) -> Journal:
        with journal.path.open("a") as file:
            file.writelines(to_line(event, time=0, attempt=attempt) + "\n" for event in events)
        return journal.refresh()

    assert tell(first, 1).step == 4
    tell([begin(2)], 2)
    assert journal.step == 2 and journal.latest == {"heldout_loss": 0.0, "train_loss": 2.0}
    tell([loss(3)], 2)
    steps = [(one["step"], *one["values"]) for one in standing(journal.records) if one["type"] == "Metric"]
    assert steps == [(0, "heldout_loss"), (1, "train_loss"), (2, "train_loss"), (3, "train_loss")]
    tell([begin(0), loss(0, "heldout_loss")], 3)  # from the start: the base model is measured again
    steps = [one["step"] for one in standing(journal.records) if one["type"] == "Metric"]
    assert steps == [0] and journal.latest == {"heldout_loss": 0.0}
    assert len(journal.records) == len(first) + 4  # what was said is never taken back


def test_a_line_torn_by_a_power_cut_takes_no_other_with_it(store: RunStore) -> None:
    run = put(store)
    (run.path / "events.jsonl").write_text('{"type": "Met')
    attempt = Attempt(run.path)
    attempt.append(Metric(step=1, values={"train_loss": 1.0}))
    assert [record["step"] for record in store.events(run.id)] == [1]
