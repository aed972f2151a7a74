"""The page's handlers as plain functions: estimate line, errors in words, escaping, polling, form and knobs."""

import copy
import html
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import gradio as gr
import pytest

from lora_studio.core.baselines import plan
from lora_studio.core.spec import BASELINES, BaselineSpec, LoraSpec
from lora_studio.data.batches import Piece
from lora_studio.errors import StudioError
from lora_studio.events import Event, Metric, Probed, Sample, Saved, Started, Warned, to_line
from lora_studio.generate import Answer
from lora_studio.models import STARTER
from lora_studio.results import Comparison, Wanted
from lora_studio.runs.config import DataChoice, Run, RunConfig, change_in_words
from lora_studio.runs.store import write_json
from lora_studio.settings import RATES, TrainConfig
from lora_studio.studio import Studio
from lora_studio.ui import boundary, build, compare_tab, data_tab, export_tab, form, live, panes, picker, train_tab
from lora_studio.ui.desk import Desk
from tests.tiny import tiny_encoder

EVIL = "<img src=x onerror=alert(1)>"
DEFAULTS = {name: setting.default for name, setting in form.SETTINGS.items() if name != "targets"}
PAPER = train_tab.FIRST_PRESET


class ReadyDesk(Desk):
    """A desk whose libraries are loaded; the starter model is not looked for."""

    def ready(self, model: str = "") -> Studio:
        assert model != STARTER
        return self.studio


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return ReadyDesk(Studio(tmp_path))


@pytest.fixture
def choice(desk: Desk) -> dict:
    return data_tab.open_sample(desk, "tickets")[0]


def cost(
    desk: Desk,
    choice: dict | None,
    model: object,
    preset: str = PAPER,
    *,
    task: str = "causal",
    method: str = "lora",
    **settings: object,
) -> str:
    return train_tab.cost(desk, choice, str(model), task, method, preset, None, **{**DEFAULTS, **settings})


def trainable(line: str) -> int:
    found = re.search(r"<b>([\d,]+)</b> <span[^>]*>trainable</span> of", line)
    assert found, line
    return int(found[1].replace(",", ""))


def test_estimate_line_follows_rank_and_targets(desk: Desk, tiny: Path, choice: dict) -> None:
    def count(rank: int, preset: str) -> int:
        return trainable(cost(desk, choice, tiny, preset, rank=rank))

    # two layers, hidden 32, q 32 -> 32 and v 32 -> 16: rank * (64 + 48) each
    assert count(4, PAPER) == 2 * 4 * (64 + 48)
    assert count(8, PAPER) == 2 * count(4, PAPER)
    assert count(4, "All linear") > count(4, "All attention") > count(4, PAPER)


def test_estimate_line_follows_the_method_and_the_task(desk: Desk, tiny: Path, choice: dict) -> None:
    for kind in BASELINES:
        width = {"top": 1}.get(kind, BASELINES[kind][2])
        line = cost(desk, choice, tiny, method=kind, width=width, rank=None)  # LoRA's settings are not looked at
        wanted = plan(desk.studio.models.skeleton(str(tiny)), BaselineSpec(kind=kind, width=width))
        assert trainable(line) == sum(piece.parameters for piece in wanted)
    labels = len(desk.studio.labels(DataChoice(**choice)))
    head = 32 * labels  # of a hidden size of 32, without a bias
    assert trainable(cost(desk, choice, tiny, task="classify")) == trainable(cost(desk, choice, tiny)) + head


@pytest.mark.parametrize(
    ("settings", "model", "said"),
    [
        ({"rank": 0}, None, "Rank is 0."),
        ({"learning_rate": None}, None, "Learning rate is None."),
        ({"layers": "first"}, None, "Layers is"),
        ({"rank_pattern": "attn.q"}, None, "Rank pattern is"),
        ({"rank_pattern": "attn.q=0"}, None, "Rank pattern is 0."),
        ({"rank_pattern": "attn.v=17"}, None, "E_RANK"),
        ({"rank": 17}, None, "E_RANK"),
        ({"alpha": 0}, None, "Alpha is 0."),
        ({"method": "magic"}, None, "E_METHOD"),
        ({"method": "top", "width": 3}, None, "E_METHOD"),
        ({"method": "prefix", "width": 2048}, None, "E_METHOD"),
        ({"method": "prefix", "width": None}, None, "Width is None."),
        ({}, f"{EVIL}/no", "is no catalogue name"),
    ],
)
def test_estimate_line_gives_way_to_the_problem(
    desk: Desk, tiny: Path, settings: dict, model: str | None, said: str
) -> None:
    line = cost(desk, None, model or tiny, **settings)
    assert said in line and "class='problem'" in line and EVIL not in line


def test_the_memory_is_told_by_part_and_the_parts_follow_the_controls(desk: Desk, tiny: Path, choice: dict) -> None:
    def parts(**settings: object) -> dict[str, int]:
        line = cost(desk, choice, tiny, **settings)
        assert "<details class='parts'>" in line
        return {name: int(size) for name, size in re.findall(r"<i data-part='(\w+)' style='flex-grow:(\d+)'>", line)}

    usual = parts()
    assert usual.keys() == train_tab.PARTS.keys()
    assert parts(rank=16)["adapter"] == 2 * usual["adapter"] and parts(rank=16)["weights"] == usual["weights"]
    assert parts(accumulate=8)["activations"] < usual["activations"]


def test_boundary_escapes_and_names_the_code() -> None:
    shown = boundary.as_html(StudioError("E_X", f"{EVIL} is wrong.", f"Not {EVIL}."))
    assert EVIL not in shown and shown.count("&lt;img") == 2 and "<code>E_X</code>" in shown


def test_what_would_cure_a_problem_is_one_button_and_changes_what_it_says() -> None:
    shown = boundary.as_html(StudioError("E_X", "Too long.", "Shorter.", {"max_length": 64, "learning_rate": 1e-3}))
    (change,) = re.findall(r"data-change='([^']*)'>Use length limit 64, learning rate 0.001<", shown)
    assert json.loads(html.unescape(change)) == {"max_length": 64, "learning_rate": 1e-3}
    assert "<button" not in boundary.as_html(StudioError("E_X", "Too long.", "", {"of no form": 1}))
    for code in ("E_NO_DATA", "E_NO_RUN", "E_NO_ANSWER", "E_NO_ANSWERS", "E_NO_TEXT"):
        assert boundary.as_html(StudioError(code, "m")).count("<button") == 1


def test_an_error_with_its_change_is_the_same_on_another_side() -> None:
    again = copy.copy(StudioError("E_X", "m", "h", {"steps": 3}))
    assert (again.code, str(again), again.change) == ("E_X", "m h", {"steps": 3})


def test_boundary_hides_what_was_not_written_for_a_person(caplog: pytest.LogCaptureFixture) -> None:
    @boundary.problem_last(1)
    def broken() -> str:
        raise KeyError("secret")

    value, problem = broken()
    assert value == gr.skip() and "E_UNEXPECTED" in problem and "secret" not in problem
    assert "secret" in caplog.text  # but it is in the log


def test_boundary_of_a_stream_keeps_what_was_shown() -> None:
    @boundary.problem_last(1)
    def answers():
        yield "half"
        raise StudioError("E_X", "Stopped.")

    (shown, _), (_, problem) = answers()
    assert shown == "half" and "E_X" in problem


def test_preview_escapes_every_piece() -> None:
    shown = data_tab.preview([Piece(EVIL, "context"), Piece(EVIL, "trained"), Piece(EVIL, "cut")], row=0)
    assert EVIL not in shown and shown.count("&lt;img") == 3
    assert "1 of 3 tokens are learnt" in shown


def test_panes_are_plain_values_and_what_is_html_is_escaped() -> None:
    answers = [Answer("a b", 2, True), Answer(f"a {EVIL}", 3, True)]
    moment = Comparison(("base", "run"), answers, 0.0, 1.0)
    base, adapted = compare_tab.picture(moment, [("Base", ""), (EVIL, "strength 1")], [0.5, 1.0])
    assert adapted["title"] == EVIL and adapted["badge"] is None and base["badge"][0] == "good"  # set as text
    assert base["parts"] == [["a b", False]] and adapted["parts"] == [["a ", False], [EVIL, True]]
    assert (base["pace"], adapted["pace"]) == ("2 tokens · 4 tokens/s", "3 tokens · 3 tokens/s")
    growing = replace(moment, answers=[answers[0], replace(answers[1], done=False)])
    assert compare_tab.picture(growing, [("", "")] * 2, [1, 1])[1]["parts"] == [[f"a {EVIL}", False]]
    chosen = compare_tab.picture(replace(moment, chances=[{"a": 0.5}, {"a": 1.0}]), [("", "")] * 2, [1, 1])
    assert not any(pane["pace"] for pane in chosen) and "has learnt nothing" in chosen[0]["about"]
    assert "max difference 0)" in panes.badge(0.0)[1] and panes.badge(1e-6)[0] == "bad"
    assert panes.badge(float("nan"))[0] == "bad" and panes.badge(1e-6, exact=False)[0] == "plain"
    found = Wanted(("base", "run"), ("a", "b"), [[0.25, 0.75], [1.0, 0.0]], 3)
    shown = compare_tab.expectation(EVIL) + compare_tab.tokens_line(found, ["Base", EVIL])
    assert EVIL not in shown and "Base 50 %" in shown and "The first 2 tokens; 3 more" in shown


def test_data_tab_opens_inspects_and_corrects(desk: Desk, tiny: Path, choice: dict) -> None:
    assert choice["name"] == "tickets" and choice["format"] == "" and choice["columns"] == {}  # as guessed
    told, *_ = data_tab.inspect(desk, choice, str(tiny), 512, 0.1, 0)
    assert "Support tickets" in told and "Text and label" in told and "data-grade='fit'" in told
    shown = data_tab.show_row(desk, choice, 1, str(tiny), 512)
    assert "class='trained'" in shown

    changed = data_tab.change_format(desk, choice, "prompt_completion")[0]
    assert changed["format"] == "prompt_completion"
    swapped, problem = data_tab.change_columns(desk, changed, "label", "text", "", None)
    assert problem == "" and swapped["columns"] == {"prompt": "label", "completion": "text"}
    assert "prompt from “label”" in data_tab.inspect(desk, swapped, str(tiny), 512, 0.1, 0)[0]


def test_a_bad_file_is_a_problem_in_place(desk: Desk, tmp_path: Path) -> None:
    picture = tmp_path / "picture.csv"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    *untouched, problem = data_tab.open_file(desk, str(picture))
    assert untouched == [gr.skip()] * data_tab.OPENED and "E_TYPE_MISMATCH" in problem


def test_form_to_run_config_and_back(desk: Desk, tiny: Path, choice: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.studio.supervisor, "tick", lambda: None)  # queued is enough
    raw = {**DEFAULTS, "rank": 3, "alpha": 6, "layers": "0", "steps": 7, "seed": 5, "schedule": "cosine"}
    raw |= {"rank_pattern": " attn.q = 2, mlp.up=4", "alpha_pattern": "mlp.up=0.5", "width": 9}
    run, problem = train_tab.start(desk, choice, str(tiny), "causal", "lora", "All linear", None, "", **raw)
    assert problem == ""
    config = desk.studio.runs.get(run).config
    assert config == RunConfig(
        name="tickets r3 all",
        model=str(tiny),
        dataset=DataChoice(id=choice["id"], name="tickets"),
        method=LoraSpec(
            rank=3,
            alpha=6.0,
            layers=(0,),
            targets=("all-linear",),
            rank_pattern={"attn.q": 2, "mlp.up": 4},
            alpha_pattern={"mlp.up": 0.5},
        ),
        train=TrainConfig(steps=7, seed=5, schedule="cosine"),
    )
    assert isinstance(config.method, LoraSpec)
    assert form.method(vars(config.method), config.method.targets) == config.method
    assert form.training(vars(config.train)) == config.train


def test_form_to_another_method_and_labels(
    desk: Desk, tiny: Path, choice: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk.studio.supervisor, "tick", lambda: None)
    raw = {**DEFAULTS, "rank": None, "width": 5}
    run, problem = train_tab.start(desk, choice, str(tiny), "classify", "adapter_p", PAPER, None, "", **raw)
    assert problem == ""
    started = desk.studio.runs.get(run)
    assert started.config.method == BaselineSpec(kind="adapter_p", width=5, modules_to_save=("score",))
    assert (started.name, started.config.task) == ("tickets adapter_p 5", "classify") and len(started.labels) > 1
    line = live.answer(desk.studio, {"run": run, "start": 0})["about"]["line"]
    assert line == f"tiny · tickets · Adapter P (Pfeiffer), bottleneck width 5 · {len(started.labels)} labels"
    run, problem = train_tab.start(desk, choice, str(tiny), "causal", "full", PAPER, None, "", **raw)
    assert problem == "" and desk.studio.runs.get(run).config.method == BaselineSpec(kind="full")


def test_a_method_shows_what_belongs_to_it() -> None:
    lora, more, width = train_tab.show_method("prefix")
    assert lora.visible is more.visible is False
    assert (width.visible, width.label, width.value) == (True, "Virtual tokens", 16)
    lora, _, width = train_tab.show_method("full")
    assert lora.visible is width.visible is False
    assert train_tab.show_method("lora")[0].visible is True


def test_the_learning_rate_is_usual_for_model_and_method_until_the_person_has_one(
    desk: Desk, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = TrainConfig.learning_rate
    assert train_tab.settle_rate(desk, str(tiny), "prefix", ours, ours) == (ours * RATES["prefix"],) * 2
    monkeypatch.setattr(train_tab, "parameter_count", lambda skeleton: 600_000_000)
    shown, known = train_tab.settle_rate(desk, str(tiny), "lora", ours, ours)
    assert shown == known == 0.0024 and TrainConfig().usual_rate(600_000_000) == pytest.approx(shown, rel=0.05)
    assert train_tab.settle_rate(desk, str(tiny), "lora", 0.123, known) == (gr.skip(), known)
    assert train_tab.settle_rate(desk, "no such model", "lora", known, known) == (gr.skip(), known)


def test_the_task_is_open_where_rows_have_labels_and_the_model_writes(
    desk: Desk, tiny: Path, choice: dict, tmp_path: Path
) -> None:
    encoder = str(tiny_encoder(tmp_path / "bert"))
    orders = data_tab.open_sample(desk, "orders")[0]

    def settled(choice: dict | None, model: object, current: str, forced: bool = False) -> tuple:
        shown, forced = train_tab.settle_task(desk, choice, str(model), current, forced)
        return shown.value, shown.visible, forced

    assert settled(choice, tiny, "causal") == ("causal", True, False)
    assert settled(choice, tiny, "classify") == ("classify", True, False)  # the person's choice
    assert settled(choice, encoder, "causal") == settled(None, encoder, "causal") == ("classify", True, True)
    assert settled(choice, tiny, "classify", forced=True) == ("causal", True, False)  # the encoder's
    assert settled(orders, tiny, "classify") == settled(None, tiny, "causal") == ("causal", False, False)
    assert settled(choice, "no/model", "classify") == ("causal", False, False)


def test_labels_in_the_data_tab_and_mistakes_with_them(desk: Desk, tiny: Path, choice: dict, tmp_path: Path) -> None:
    shown = data_tab.show_row(desk, choice, 1, str(tiny), 512, "classify")
    label = desk.studio._examples(DataChoice(**choice))[0][0].target
    assert f" → </span><span class='trained'>{label}</span>" in shown and "1 of " in shown
    encoder = str(tiny_encoder(tmp_path / "bert"))
    one = desk.studio.data.add_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}')
    told = data_tab.inspect(desk, {"id": one.id, "name": "one"}, encoder, 512, 0.1, 0, "classify")[0]
    assert "E_LABELS" in told
    line = cost(desk, {"id": one.id, "name": "one"}, encoder, task="classify")
    assert "E_LABELS" in line and "E_ARCH" in cost(desk, choice, encoder)


def test_start_names_what_is_wrong_at_its_control(choice: dict) -> None:
    raw = {**DEFAULTS, "rank": 0, "batch_size": None, "width": -1, "alpha_pattern": "x"}
    names = ["choice", "model", "task", "method", "preset", "picker", "name", *DEFAULTS]

    def wrong(method: str) -> set[str]:
        verdicts = train_tab.check_start(choice, "m", "causal", method, PAPER, None, "", **raw)
        return {name for name, verdict in zip(names, verdicts, strict=True) if not verdict["is_valid"]}

    assert wrong("lora") == {"rank", "batch_size", "alpha_pattern"}
    assert wrong("prefix") == {"width", "batch_size"} and wrong("full") == {"batch_size"}  # the rest is hidden


def test_start_without_data_says_so(desk: Desk, tiny: Path) -> None:
    assert "E_NO_DATA" in train_tab.start(desk, None, str(tiny), "causal", "lora", PAPER, None, "", **DEFAULTS)[1]


def test_run_names_stay_unique() -> None:
    assert train_tab.unique("a", set()) == "a"
    assert train_tab.unique("a", {"a", "a (2)"}) == "a (3)"


def test_every_knob_has_a_control_that_starts_at_its_default() -> None:
    for name, setting in form.SETTINGS.items():
        if name == "targets":
            continue  # the picker's
        made = form.control(setting)
        assert made.label == setting.label and form.problem(setting, made.value) == "", name


def test_picker_presses_presets_and_names_them(desk: Desk, tiny: Path) -> None:
    matrices = train_tab.show_matrices(desk, str(tiny), PAPER, None)
    assert matrices["chosen"] == ["attn.q", "attn.v"]
    assert [entry["group"] for entry in matrices["matrices"]] == ["Tokens", *["Attention"] * 4, *["MLP"] * 3]
    everything = train_tab.press_preset(matrices, "All linear")
    assert picker.targets(everything, PAPER) == ("all-linear",) and picker.preset(everything) == "All linear"
    own = {**matrices, "chosen": ["mlp.up"]}
    assert picker.targets(own, PAPER) == ("mlp.up",) and picker.preset(own) == picker.OWN
    tokens_too = {**everything, "chosen": ["embed", *everything["chosen"]]}
    assert "embed" not in everything["chosen"] and picker.preset(tokens_too) == picker.OWN
    assert picker.targets(tokens_too, PAPER) == ("embed", "all-linear")
    assert picker.choose(matrices["matrices"], picker.targets(tokens_too, PAPER)) == tokens_too


@pytest.mark.parametrize("run", ["0" * 32, "../../etc", "", 7, None, {"a": 1}])
def test_poll_of_a_run_that_is_not_there(desk: Desk, run: object) -> None:
    told = live.answer(desk.studio, {"run": run, "start": -3, "list": True})
    assert told["state"] == ("none" if not run else "missing") and told["runs"] == [] and told["start"] == 0
    assert live.stop_run(desk.studio, {"run": run})["problem"]


def test_poll_gives_only_what_is_new_and_little_of_it(desk: Desk, tiny: Path, choice: dict) -> None:
    config = RunConfig(name="n", model=str(tiny), dataset=DataChoice(**choice), train=TrainConfig(steps=9))
    run = desk.studio.runs.create(config, {})
    facts = {"trainable": 1, "total": 2, "device": "cpu", "precision": "float32", "train_rows": 3, "heldout_rows": 1}
    events = [Started(steps=9, **facts), Metric(step=0, values={"heldout_loss": 5.0})]
    events += [Metric(step=step, values={"train_loss": 4.0 / step, "learning_rate": 1e-3}) for step in range(1, 10)]
    events += [Metric(step=9, values={"heldout_loss": float("nan")}), Saved(step=9, heldout_loss=0.5)]
    lines = [to_line(event, time=0.0, attempt=1) for event in events]
    (run.path / "events.jsonl").write_text("\n".join(lines[:6]) + "\n")
    first = live.answer(desk.studio, {"run": run.id, "start": 0})
    assert first["train"][0] == [1, 2, 3, 4] and first["heldout"] == ([0], [5.0]) and first["about"]["name"] == "n"
    (run.path / "events.jsonl").write_text("\n".join(lines) + "\n")
    news = live.answer(desk.studio, {"run": run.id, "start": first["next"]})
    assert news["train"][0] == [5, 6, 7, 8, 9] and news["heldout"] == ([9], [None]) and news["saved"] == [9]
    assert "about" not in news and len(json.dumps(news)) < 1000


FACTS = {"trainable": 1, "total": 2, "device": "cpu", "precision": "float32", "train_rows": 3, "heldout_rows": 1}


def write_journal(run: Run, *attempts: list[Event]) -> None:
    """What workers would have written in these attempts."""
    lines = [to_line(event, time=0.0, attempt=number) for number, told in enumerate(attempts, 1) for event in told]
    (run.path / "events.jsonl").write_text("\n".join(lines) + "\n")


def end(run: Run, status: str, **more: object) -> None:
    """As a worker ends a run."""
    (run.path / "worker.log").touch()
    write_json(run.path / "exit.json", {"status": status, "step": 4, "values": {}, "time": 0.0, **more})


def steps_of(first: int, last: int, loss: float) -> list[Event]:
    told: list[Event] = []
    for step in range(first, last + 1):
        told.append(Metric(step=step, values={"train_loss": loss}))
        if step % 4 == 0:
            told.append(Metric(step=step, values={"heldout_loss": loss}))
            told += [
                Saved(step=step, heldout_loss=loss),
                Sample(step=step, index=0, prompt="p", text=f"{loss}", target="t"),
            ]
    return told


@pytest.mark.parametrize("after", [0, 4, 6])  # from the start, behind an evaluation, between two
def test_a_resumed_run_is_drawn_once_however_one_looks(desk: Desk, tiny: Path, choice: dict, after: int) -> None:
    config = RunConfig(name="n", model=str(tiny), dataset=DataChoice(**choice), train=TrainConfig(steps=12))
    run = desk.studio.runs.create(config, {})
    base: list[Event] = [Metric(step=0, values={"heldout_loss": 9.0})]
    begun: list[Event] = [Started(steps=12, **FACTS), *base, *steps_of(1, 9, 2.0)]
    write_journal(run, begun)
    early = live.answer(desk.studio, {"run": run.id, "start": 0})
    assert early["train"][0] == list(range(1, 10)) and early["saved"] == [8] and not early["whole"]
    again: list[Event] = [Started(steps=12, step=after, **FACTS), *([] if after else base)]
    write_journal(run, begun, [*again, *steps_of(after + 1, 11, 1.0)])
    news = live.answer(desk.studio, {"run": run.id, "start": early["next"]})
    anew = live.answer(desk.studio, {"run": run.id, "start": 0})
    assert news["whole"] and not anew["whole"]
    for told in (news, anew):
        assert told["train"] == (list(range(1, 12)), [2.0] * after + [1.0] * (11 - after))
        assert told["heldout"] == ([0, 4, 8], [9.0, 2.0 if after >= 4 else 1.0, 1.0]) and told["saved"] == [8]
        assert [sample["text"] for sample in told["samples"]] == ["2.0" if after >= 4 else "1.0", "1.0"]
    write_journal(run, begun, [*again, *steps_of(after + 1, 12, 1.0)])
    rest = live.answer(desk.studio, {"run": run.id, "start": news["next"]})
    assert not rest["whole"] and rest["train"] == ([12], [1.0])


def test_findings_become_cards_and_one_click_starts_again(
    desk: Desk, tiny: Path, choice: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk.studio.supervisor, "tick", lambda: None)
    config = RunConfig(name="n", model=str(tiny), dataset=DataChoice(**choice), train=TrainConfig(learning_rate=0.5))
    run = desk.studio.runs.create(config, {})
    flat = Warned(step=9, code="W_FLAT", message=EVIL, hint="h", change={"learning_rate": 0.005})
    said: list[Event] = [Started(steps=25, **FACTS), Warned(step=0, code="W_DATA", message="two rows are odd"), flat]
    write_journal(run, [Warned(step=0, code="I_PREPARE", message="loading"), *said])
    first = live.answer(desk.studio, {"run": run.id, "start": 0})
    assert [one["code"] for one in first["findings"]] == ["W_DATA", "W_FLAT"]
    assert [one["again"] for one in first["findings"]] == ["", "learning rate 0.005"]
    assert "findings" not in live.answer(desk.studio, {"run": run.id, "start": first["next"]})

    for wrong in ({"code": "W_DATA"}, {"code": "W_NONE", "change": {"steps": 1}}, {"code": ["W_FLAT"]}, {}):
        assert live.restart_run(desk.studio, {"run": run.id, **wrong})["problem"]  # only what the run itself says
    assert live.restart_run(desk.studio, {"run": "../../etc", "code": "W_FLAT"})["problem"]
    answered = live.restart_run(desk.studio, {"run": run.id, "code": "W_FLAT"})
    assert answered["problem"] == ""
    fresh = desk.studio.runs.get(answered["run"])
    assert fresh.config.train == TrainConfig(learning_rate=0.005) and fresh.status == "queued" and fresh.name != "n"
    assert desk.studio.runs.get(run.id).status == "stopped"  # it was still waiting


def test_a_run_that_patience_ended_says_so(desk: Desk, tiny: Path, choice: dict) -> None:
    run = desk.studio.runs.create(RunConfig(name="n", model=str(tiny), dataset=DataChoice(**choice)), {})
    why = Warned(step=4, code="I_PATIENCE", message="training ends at step 4")
    write_journal(run, [Started(steps=25, **FACTS), *steps_of(1, 4, 1.0), why])
    end(run, "done")
    (told,) = live.answer(desk.studio, {"run": run.id, "start": 0})["findings"]
    assert (told["message"], told["again"]) == ("training ends at step 4", "")


def test_a_failed_run_offers_its_cure_and_resuming_only_where_that_helps(desk: Desk, tiny: Path, choice: dict) -> None:
    config = RunConfig(name="n", model=str(tiny), dataset=DataChoice(**choice))

    def ended(status: str, error: dict | None = None, *, checkpoint: bool = True) -> dict:
        run = desk.studio.runs.create(
            config, {"estimate": {"seconds": 9.0, "memory_bytes": {"peak": 1000, "weights": 9}}}
        )
        write_journal(run, [Started(steps=25, **FACTS), *steps_of(1, 4, 1.0)])
        if checkpoint:
            (run.path / "checkpoints" / "step-00000004").mkdir(parents=True)
        end(run, status, error=error)
        return live.answer(desk.studio, {"run": run.id, "start": 0, "list": True})

    broken = {"code": "E_NOT_FINITE", "message": "m", "hint": "h", "change": {"learning_rate": 5e-4}}
    told = ended("failed", broken)
    assert [one["again"] for one in told["findings"]] == ["learning rate 0.0005"] and not told["resumable"]
    assert told["about"]["estimate"] == {"seconds": 9.0, "memory_bytes": 1000}
    assert ended("failed", {**broken, "code": "E_MEMORY"})["resumable"]
    assert ended("failed", {"code": "E_CRASH", "message": "m", "hint": "h"})["resumable"]
    assert ended("paused")["resumable"] and ended("paused")["runs"][0]["state"] == "paused"
    assert ended("stopped")["resumable"] and not ended("stopped", checkpoint=False)["resumable"]
    assert not ended("done")["resumable"]


def test_pause_and_resume_say_what_is_wrong(
    desk: Desk, tiny: Path, choice: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk.studio.supervisor, "tick", lambda: None)
    run = desk.studio.runs.create(RunConfig(name="n", model=str(tiny), dataset=DataChoice(**choice)), {})
    ask = {"run": run.id}
    assert "queued" in live.resume_run(desk.studio, ask)["problem"]
    assert live.pause_run(desk.studio, ask)["problem"] == ""
    assert live.answer(desk.studio, {"run": run.id})["state"] == "paused"
    assert live.resume_run(desk.studio, ask)["problem"] == ""
    assert live.answer(desk.studio, {"run": run.id})["state"] == "queued"
    for act in (live.pause_run, live.resume_run, live.stop_run):
        assert act(desk.studio, {"run": "0" * 32})["problem"] and act(desk.studio, {})["problem"]


def test_the_probe_replaces_the_estimate(desk: Desk, tiny: Path, choice: dict) -> None:
    run = desk.studio.runs.create(RunConfig(name="n", model=str(tiny), dataset=DataChoice(**choice)), {})
    probed = Probed(tokens=9, seconds_step=1.0, seconds=80.0, memory_bytes=10**9, accumulate=2, batch_fits=4)
    write_journal(run, [Started(steps=25, **FACTS), probed])
    told = live.answer(desk.studio, {"run": run.id, "start": 0})
    assert told["probe"] == [{"seconds": 80.0, "memory_bytes": 10**9, "accumulate": 2, "batch_fits": 4}]
    assert told["about"]["estimate"] == {}  # runs of earlier days have none
    assert live.answer(desk.studio, {"run": run.id, "start": told["next"]})["probe"] == []


def test_every_change_of_a_setting_has_words() -> None:
    assert change_in_words({"learning_rate": 5e-4}) == "learning rate 0.0005"
    assert change_in_words({"steps": 40, "checkpointing": "auto"}) == "steps 40, activation checkpointing auto"
    assert change_in_words({}) == change_in_words({"unknown": EVIL}) == ""


def test_run_list_is_sent_only_when_it_changed(desk: Desk, tiny: Path, choice: dict) -> None:
    config = RunConfig(name=EVIL, model=str(tiny), dataset=DataChoice(**choice))
    run = desk.studio.runs.create(config, {})
    told = live.answer(desk.studio, {"run": "", "start": 0, "list": True})
    assert [entry["id"] for entry in told["runs"]] == [run.id]
    again = live.answer(desk.studio, {"run": "", "start": 0, "list": True, "known": told["token"]})
    assert "runs" not in again and again["active"] == [{"id": run.id, "step": 0, "steps": config.train.steps}]
    desk.studio.stop(run.id)
    assert "runs" in live.answer(desk.studio, {"run": "", "start": 0, "list": True, "known": told["token"]})


def test_of_many_runs_the_newest_and_the_active_ones_are_sent(desk: Desk, tiny: Path, choice: dict) -> None:
    config = RunConfig(model=str(tiny), dataset=DataChoice(**choice))
    runs = [desk.studio.runs.create(config, {}).id for _ in range(live.LISTED + 5)]
    for run in runs[1:]:
        desk.studio.stop(run)
    told = live.answer(desk.studio, {"run": "", "start": 0, "list": True})
    assert [one["id"] for one in told["runs"]] == [*runs[:4:-1], runs[0]] and told["more"] == 4


def test_first_view_prefers_the_address_then_the_active_run(desk: Desk, tiny: Path, choice: dict) -> None:
    assert build.first_view(desk, "")[0] == ""
    config = RunConfig(name="n", model=str(tiny), dataset=DataChoice(**choice))
    old = desk.studio.runs.create(config, {})
    new = desk.studio.runs.create(replace(config, name="m"), {})
    desk.studio.stop(new.id)
    assert build.first_view(desk, "")[0] == old.id
    shown, _, _, restored, *_ = build.first_view(desk, new.id)
    assert shown == new.id and restored == choice
    names = tuple(form.SETTINGS)
    assert build._form_of(desk, names, new.id)[0] == str(tiny)
    assert build._form_of(desk, names, "") == (gr.skip(),) * (train_tab.ABOUT + len(names))
    assert len(build._form_of(desk, names, new.id)) == train_tab.ABOUT + len(names)


def test_first_view_shows_the_run_that_broke_off_last(desk: Desk, tiny: Path, choice: dict) -> None:
    config = RunConfig(name="n", model=str(tiny), dataset=DataChoice(**choice))
    run, older = (replace(desk.studio.runs.create(config, {}), status=status) for status in ("lost", "queued"))
    assert live.shown_at_first(desk.studio, [run], "") == run.id
    assert live.shown_at_first(desk.studio, [run, older], "") == older.id
    assert live.shown_at_first(desk.studio, [replace(run, status="done"), run], "") == ""  # it was long ago


def test_a_choice_follows_what_was_trained_since_and_then_is_the_persons_again(
    desk: Desk, tiny: Path, choice: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(name="n", model=str(tiny), dataset=DataChoice(**choice))
    old, new = (desk.studio.runs.create(config, {}).id for _ in range(2))
    monkeypatch.setattr(Run, "has_adapter", True)

    def chosen(chosen: str | None, live: str, followed: str) -> tuple:
        shown, followed = compare_tab.list_runs(desk, chosen, live, followed)
        return shown.value, followed

    assert chosen(None, "", "") == (new, "")
    assert chosen(old, new, old) == (new, new)  # trained since
    assert chosen(old, new, new) == (old, new)  # chosen by hand
    assert chosen(old, "f" * 32, new) == (old, new)  # one that has no adapter
    _, shown, followed = build._to_compare(desk, old, new)
    assert (shown.value, followed) == (old, new)  # asked for, whatever the Train tab shows
    monkeypatch.setattr(Run, "has_adapter", False)
    nothing, _ = compare_tab.list_runs(desk, old, new, "")
    assert nothing.value is None and nothing.elem_classes == [boundary.NONE]


def test_a_file_is_proven_anew_for_each_run() -> None:
    assert export_tab.forget() == (export_tab.WAITING, "") and export_tab.forget_all()[2:] == ("", "")


def test_compare_and_export_ask_for_a_run(desk: Desk) -> None:
    raw = {"max_new_tokens": 4, "temperature": 0.8, "top_p": 1.0, "seed": 0}
    (shown,) = compare_tab.compare(desk, None, [], "hello", None, compare_tab.GREEDY, 1.0, **raw)
    assert "E_NO_RUN" in shown[-1]
    assert "E_NO_RUN" in export_tab.pack(desk, False, None)[-1]


def test_long_curves_are_thinned_but_keep_their_peaks() -> None:
    values: list[float | None] = [1.0] * 100_000
    values[777] = 9.0
    steps, kept = live.thin(range(100_000), values, 1000)
    assert len(steps) <= 1002 and (777, 9.0) in zip(steps, kept, strict=True)


def test_the_whole_page_builds(desk: Desk) -> None:
    page = build.build(desk)
    public = {fn.api_name for fn in page.fns.values() if fn.api_visibility == "public"}
    data = {"add_dataset", "fetch_dataset", "list_datasets", "describe_dataset"}
    runs = {"plan", "start_run", "list_runs", "run_status", "run_events", "stop_run"}
    assert public == data | runs | {"compare", "compare_runs", "evaluate", "export"}


def test_programs_may_ask_for_every_method_and_task(
    desk: Desk, tiny: Path, choice: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk.studio.supervisor, "tick", lambda: None)
    public = [fn for fn in build.build(desk).fns.values() if fn.api_visibility == "public"]
    ask = {fn.api_name: partial(fn.fn, None) for fn in public}  # on a laptop nobody looks at the request
    lora = ask["plan"](model=str(tiny), rank=4)  # as before there were methods
    assert lora["trainable"] == 2 * 4 * (64 + 48)
    bias = ask["plan"](model=str(tiny), dataset=choice["id"], method="prefix", width=3)
    assert bias["trainable"] == 2 * 2 * 3 * 16  # blocks, keys and values, virtual tokens, width of the key heads
    run = ask["start_run"](dataset=choice["id"], model=str(tiny), method="bitfit", task="classify")
    config = desk.studio.runs.get(run).config
    assert config.method == BaselineSpec(kind="bitfit", modules_to_save=("score",)) and config.task == "classify"
    for wrong in ({"method": "magic"}, {"task": "dream"}, {"method": "full", "width": 2}):
        with pytest.raises(gr.Error):
            ask["start_run"](dataset=choice["id"], model=str(tiny), **wrong)
