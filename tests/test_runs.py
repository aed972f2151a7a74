"""Runs as folders: one real worker process, and every state derived from files alone."""

import dataclasses
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_studio.core.spec import BASELINES, BaselineSpec, LoraSpec, Method
from lora_studio.errors import StudioError
from lora_studio.events import Metric, Started, to_line
from lora_studio.runs.config import DataChoice, Run, RunConfig, base_precision, method_of, short
from lora_studio.runs.executors import Local, environment
from lora_studio.runs.store import Journal, RunStore, claim, write_json
from lora_studio.runs.worker import Worker
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
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


def test_a_terminated_worker_saves_and_says_stopped(studio: Studio, tiny: Path) -> None:
    run = studio.start(config(studio, tiny, steps=100_000, evaluations=1))
    until(studio, run.id, "Metric", step=1)
    os.kill(json.loads((run.path / "worker.json").read_text())["pid"], signal.SIGTERM)
    list(studio.follow(run.id, interval_s=0.02))
    assert studio.runs.get(run.id).status == "stopped" and studio.runs.get(run.id).has_adapter


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


def test_without_held_out_rows_each_planned_evaluation_keeps_the_adapter(studio: Studio, tiny: Path) -> None:
    run = studio.start(config(studio, tiny, holdout=0.0, samples=0))
    records = list(studio.follow(run.id, interval_s=0.02))
    assert [r["step"] for r in records if r["type"] == "Saved"] == [2, 4]


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
    assert caught.value.code == "E_CONTEXT"
    with pytest.raises(StudioError) as caught:
        next(studio.compare([run.id], "word " * 30))
    assert caught.value.code == "E_CONTEXT"


# ---- every method and both tasks, by the worker's own code in this process ------------------------------------------


def worked(studio: Studio, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run from the queue to its end."""
    monkeypatch.setattr(studio.supervisor, "tick", lambda: None)
    run = studio.start(config)
    Worker(run.path).run()
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
    monkeypatch.setattr("lora_studio.models.training_precision", lambda _: "bfloat16")

    def held(method: Method, asked: str = "auto") -> str:
        return base_precision(method, asked, "cpu")

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
    assert [run.id for run in store.list()] == [whole.id]
    with pytest.raises(StudioError) as caught:
        store.get(broken.id)
    assert caught.value.code == "E_RUN_DAMAGED"


@pytest.mark.parametrize("end", ["{}", "[]", "{", '{"status": "else"}'])
def test_an_end_that_says_nothing_is_no_end(store: RunStore, end: str) -> None:
    run = put(store)
    (run.path / "worker.log").touch()
    (run.path / "exit.json").write_text(end)
    assert store.get(run.id).status == "lost" and len(store.list()) == 1


def test_a_stopped_or_claimed_run_is_not_started_and_a_claimed_one_not_stopped_behind_its_worker(
    store: RunStore,
) -> None:
    stopped, claimed = put(store), put(store)
    store.request_stop(stopped.id)
    with claim(claimed.path) as lock, claim(claimed.path) as second:
        assert lock and second is None
        store.request_stop(claimed.id)
        assert not Local().start(claimed.path)
    assert not Local().start(stopped.path) and store.get(stopped.id).status == "stopped"
    assert not (claimed.path / "exit.json").exists() and (claimed.path / "control.json").exists()
    assert not list(store.folder.glob("*/worker.log"))


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
    assert [run.id for run in store.list()] == [second.id] and not list(store.folder.glob("*.deleted"))


def test_a_running_run_cannot_be_deleted(store: RunStore) -> None:
    run = put(store)
    with (run.path / "worker.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StudioError) as caught:
            store.delete(run.id)
    assert caught.value.code == "E_RUN_ACTIVE"


def test_the_workers_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN"):
        monkeypatch.setenv(name, "canary")
    assert "canary" not in "".join(environment().values()) and "PATH" in environment()
