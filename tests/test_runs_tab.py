"""The Runs tab without a browser: rows, what is chosen, names and notes, undo, and the form filled from a run."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from gradio.blocks import Block

from lora_studio.core.spec import BASELINES, VARIANTS, BaselineSpec, LoraSpec, Method
from lora_studio.events import Metric, Started
from lora_studio.limits import LAPTOP
from lora_studio.runs.config import DataChoice, RunConfig, settings_in_words
from lora_studio.runs.store import write_end, write_json
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from lora_studio.ui import build, curves, form, live, runs_tab, train_tab
from tests.visits import FACTS, ReadyDesk

DATA = DataChoice(id="0" * 32, name="orders")


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Studio:
    studio = Studio(tmp_path, LAPTOP)
    monkeypatch.setattr(studio.supervisor, "tick", lambda: False)
    return studio


def put(studio: Studio, name: str = "n", **given: Any) -> str:
    config = RunConfig(name=name, dataset=DATA, **given)
    return studio.runs.create(config, {"estimate": {"trainable": 5}}).id


def end(studio: Studio, run: str, **values: float) -> None:
    path = studio.runs.get(run).path
    (path / "worker.log").touch()
    write_json(path / "exit.json", {"status": "done", "step": 3, "values": values})


def ask(studio: Studio, **more: Any) -> dict[str, Any]:
    return runs_tab.answer(studio, more)


# ---- the table ---------------------------------------------------------------------------------------------------


def test_rows_come_once_and_anew_when_one_of_them_is_another(studio: Studio) -> None:
    first, second = put(studio, "a"), put(studio, "b")
    end(studio, first, base_loss=2.0, best_loss=1.23456789, best_accuracy=0.5, seconds=9.0)
    said = ask(studio)
    row = said["rows"][1]
    assert [one["run"] for one in said["rows"]] == [second, first]
    assert (row["state"], row["loss"], row["base_loss"], row["accuracy"]) == ("done", 1.2346, 2.0, 0.5)
    assert (row["method"], row["parameters"], row["seconds"]) == ("rank 8 on q+v", 5, 9.0)
    again = ask(studio, known=said["token"])
    assert "rows" not in again and [one["run"] for one in again["moved"]] == [second]
    for change in (
        lambda: studio.describe(first, name="another"),
        lambda: studio.describe(first, remarks="tried"),
        lambda: end(studio, second),
        lambda: studio.delete(second),
        lambda: studio.restore(second),
    ):
        known = ask(studio)["token"]
        change()
        assert "rows" in ask(studio, known=known)
    assert (ask(studio)["rows"][1]["name"], ask(studio)["rows"][1]["remarks"]) == ("another", "tried")


def test_a_name_and_a_note_are_the_owners_and_stand_everywhere_but_for_others(studio: Studio) -> None:
    run = put(studio)
    end(studio, run)
    said = runs_tab.describe_run(studio, {"run": run, "name": "<b>mine</b>", "remarks": "r" * 5000})
    assert "at most 4,000" in said["problem"] and studio.runs.get(run).name == "n"
    said = runs_tab.describe_run(studio, {"run": run, "name": "<b>mine</b>", "remarks": "secret", "owner": "x"})
    assert said == {"problem": "", "run": "<b>mine</b>"}
    assert live.answer(studio, {"run": run, "list": True})["runs"][0]["name"] == "<b>mine</b>"
    assert live.run_label(studio.runs.get(run)).startswith("<b>mine</b>")
    (column,) = ask(studio, chosen=[run])["sheet"]["columns"]
    assert (column["name"], column["label"]) == ("<b>mine</b>", "&lt;b&gt;mine&lt;/b&gt;")
    studio.share(run)
    seen = live.answer(studio.of("b" * 32), {"run": run, "start": 0, "log": True})
    assert seen["state"] == "done" and "mine" not in json.dumps(seen) and "secret" not in json.dumps(seen)
    assert "There is no" in runs_tab.describe_run(studio.of("b" * 32), {"run": run, "name": "his"})["problem"]


def test_deleted_is_undone_by_its_owner_and_several_at_once(studio: Studio) -> None:
    runs = [put(studio, name) for name in "abc"]
    assert runs_tab.each({"runs": [*runs, "../x"]}, studio.delete)["problem"].startswith("There is no")
    said = ask(studio)
    assert said["rows"] == [] and {one["run"] for one in said["deleted"]} == {*runs}
    assert ask(studio.of("b" * 32))["deleted"] == []
    assert live.answer(studio, {"run": runs[0]})["state"] == "deleted"
    assert live.answer(studio.of("b" * 32), {"run": runs[0]})["state"] == "missing"
    assert runs_tab.each({"runs": runs}, studio.of("b" * 32).restore)["problem"]
    assert live.restore_run(studio, {"run": runs[0]})["problem"] == ""
    assert runs_tab.each({"runs": runs}, studio.restore) == {"problem": ""}
    assert {one["run"] for one in ask(studio)["rows"]} == {*runs} and ask(studio)["deleted"] == []
    assert live.answer(studio, {"run": runs[0]})["state"] == "queued"


def test_a_run_that_waited_comes_back_only_where_it_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = Studio(tmp_path, dataclasses.replace(LAPTOP, queued=1))
    monkeypatch.setattr(studio.supervisor, "tick", lambda: False)
    run = put(studio)
    studio.delete(run)
    other = put(studio)
    assert "already; the limit is 1" in runs_tab.each({"runs": [run]}, studio.restore)["problem"]
    studio.delete(other)
    assert runs_tab.each({"runs": [run]}, studio.restore)["problem"] == ""


@pytest.mark.parametrize(
    "wrong", [{}, {"runs": "x", "chosen": "x"}, {"runs": [{}], "chosen": [{}, 3, "../x"], "seen": 3}]
)
def test_a_question_that_makes_no_sense_gets_a_plain_answer(studio: Studio, wrong: dict) -> None:
    put(studio)
    assert ask(studio, **wrong)["runs"] == []
    assert runs_tab.each(wrong, studio.delete)["problem"] == "" or "runs" in wrong
    assert "There is no" in runs_tab.describe_run(studio, wrong)["problem"] and len(studio.runs.list()) == 1


def test_a_damaged_run_is_a_row_that_cannot_be_chosen(studio: Studio) -> None:
    run = put(studio)
    (studio.runs.folder / run / "run.json").write_text("{")
    said = ask(studio, chosen=[run])
    assert said["rows"][0]["state"] == "damaged" and said["runs"] == [] and "sheet" not in said


# ---- side by side --------------------------------------------------------------------------------------------------


def test_settings_stand_side_by_side_and_say_where_they_differ(studio: Studio) -> None:
    one = put(studio, "one", method=LoraSpec(rank=4, rank_pattern={"mlp.up": 2}), train=TrainConfig(learning_rate=1e-3))
    two = put(studio, "two", method=BaselineSpec(kind="prefix", width=16))
    rows = {row["label"]: row for row in ask(studio, chosen=[one, two])["sheet"]["rows"]}
    assert rows["Learning rate"] == {"label": "Learning rate", "values": ["0.001", "0.005"], "differs": True}
    assert rows["Method"]["values"] == ["LoRA", "Prefix: keys and values"]
    assert rows["Rank"]["values"] == ["4", ""] and rows["Width"]["values"] == ["", "16"]
    assert rows["Rank pattern"]["values"] == ["mlp.up=2", ""] and not rows["Seed"]["differs"]
    knobs = {setting.label for name, setting in form.SETTINGS.items()}
    assert knobs <= {*settings_in_words(studio.runs.get(one)), *settings_in_words(studio.runs.get(two))}
    same = ask(studio, chosen=[one, one])["sheet"]
    assert len(same["columns"]) == 1 and not any(row["differs"] for row in same["rows"])


def test_curves_come_by_step_and_tokens_and_each_point_once(studio: Studio) -> None:
    from lora_studio.events import to_line

    run, old = put(studio), put(studio)
    events = [Started(steps=4, **FACTS), Metric(step=0, values={"heldout_loss": 3.0})]
    events += [Metric(step=n, values={"train_loss": 1.0 / n, "tokens": 10 * n}) for n in (1, 2)]
    events += [Metric(step=2, values={"heldout_loss": 2.0})]
    lines = [to_line(event, time=0.0, attempt=1) + "\n" for event in events]
    journal = studio.runs.get(run).path / "events.jsonl"
    journal.write_text("".join(lines))
    (studio.runs.get(old).path / "events.jsonl").write_text(
        to_line(Metric(step=1, values={"train_loss": 1.0}), time=0.0, attempt=1) + "\n"
    )
    first, second = ask(studio, chosen=[run, old])["runs"]
    assert first["train"] == ([1, 2], [1.0, 0.5], [10, 20]) and [*map(list, first["heldout"])] == [[0, 2], [3.0, 2.0]]
    assert second["train"] == ([1], [1.0], [None])
    with journal.open("a") as file:
        file.write(to_line(Metric(step=3, values={"train_loss": 0.1, "tokens": 30}), time=0.0, attempt=1) + "\n")
    (more,) = curves.news(studio, [studio.runs.get(run)], {run: first["next"]})
    assert more["start"] == first["next"] and more["train"] == ([3], [0.1], [30])


# ---- the form ------------------------------------------------------------------------------------------------------

METHODS: list[Method] = [
    *(LoraSpec(variant=variant, rank=3, alpha=7.0) for variant in VARIANTS),
    LoraSpec(layers=(0, 2), rank_pattern={"mlp.up": 2, "a.b": 3}, alpha_pattern={"attn.q": 0.5}, dropout=0.25),
    *(BaselineSpec(kind=kind) for kind in BASELINES),
    *(BaselineSpec(kind=kind, width=5) for kind, (_, means, _) in BASELINES.items() if means),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_controls_of_a_method_give_the_method_again(method: Method) -> None:
    train = TrainConfig(steps=0, epochs=1.5, learning_rate=3e-4, schedule="cosine", precision="int8", seed=2**31 - 1)
    raw = {name: setting.default for name, setting in form.SETTINGS.items() if name != "targets"}
    raw |= form.values(method, train)
    kind = "lora" if isinstance(method, LoraSpec) else method.kind
    targets = method.targets if isinstance(method, LoraSpec) else ()
    assert form.method(raw, targets, kind) == method and form.training(raw) == train


CLONED = (
    LoraSpec(rank=3, alpha=5.0, targets=("attn.o", "mlp.up")),
    LoraSpec(targets=("all-linear",)),
    BaselineSpec(kind="top", width=1),
    BaselineSpec(kind="full"),
)


@pytest.mark.parametrize("method", CLONED, ids=str)
def test_a_run_that_is_cloned_fills_the_whole_form(studio: Studio, tiny: Path, method: Method) -> None:
    kept = studio.data.add_text(
        "\n".join(json.dumps({"question": f"q{n}", "answer": f"a{n}"}) for n in range(20)), "mine"
    )
    choice = DataChoice(id=kept.id, name="mine", columns={"prompt": "answer", "completion": "question"})
    train = TrainConfig(steps=3, batch_size=2, learning_rate=0.02, holdout=0.2)
    run = studio.start(RunConfig(name="n", model=str(tiny), dataset=choice, method=method, train=train))
    desk, names = ReadyDesk(studio), tuple(one for one in form.SETTINGS if one != "targets")

    class Event:
        def __init__(self, id: str) -> None:
            self.run = id

    said = build._to_form(desk, names, Event(run.id))  # type: ignore[arg-type]
    chosen, (model, task, forced, kind, _, _, preset, picked), values = (
        said[1],
        said[-8 - len(names) : -len(names)],
        said[-len(names) :],
    )
    assert (said[0].selected, chosen["id"], model, task, forced) == ("train", kept.id, str(tiny), "causal", False)
    filled = {name: shown for name, value in zip(names, values, strict=True) if (shown := plain(value)) is not None}
    raw = {name: form.SETTINGS[name].default for name in names} | filled
    started, problem = train_tab.start(desk, chosen, model, task, kind, preset, picked, "", **raw)
    assert problem == ""
    again = studio.runs.get(started).config
    wanted = run.config.method
    assert dataclasses.replace(again, name=run.config.name, method=wanted) == run.config
    if isinstance(wanted, BaselineSpec):
        assert isinstance(again.method, BaselineSpec) and again.method.size == wanted.size
    else:
        assert again.method == wanted


def plain(value: Any) -> Any:
    """The value that an update of a control sets; None where it is left alone."""
    if isinstance(value, Block):
        return value._constructor_args[0].get("value")
    return None if isinstance(value, dict) and value.get("__type__") == "update" else value


def test_a_thousand_runs_are_one_answer(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is cut here
    for number in range(1000):
        run = studio.runs.create(RunConfig(name=f"run {number}", dataset=DATA), {})
        write_end(run.path, "done", step=1, values={"best_loss": 1.0})
    said = ask(studio)
    assert len(said["rows"]) == 1000 and "rows" not in ask(studio, known=said["token"])
