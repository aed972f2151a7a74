"""A study: the grid that is asked for, the table that reads it, its page and its command line."""

import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gradio as gr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_studio import charts, cli
from lora_studio.core.spec import BaselineSpec, LoraSpec
from lora_studio.errors import StudioError
from lora_studio.events import Metric, Started, to_line
from lora_studio.runs.config import DataChoice, Run, RunConfig, Status
from lora_studio.runs.supervisor import Supervisor, together
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from lora_studio.study import KEPT, MOST, SAME, Table, grid, in_words, parse_ranks, parse_rates, parse_targets, table
from lora_studio.ui import curves, data_tab, form, study_tab
from lora_studio.ui.desk import Desk

Q, QV, ALL = ("attn.q",), ("attn.q", "attn.v"), ("all-linear",)
EVIL = "<img src=x onerror=alert(1)>"
DEFAULTS = {name: setting.default for name, setting in form.SETTINGS.items() if name != "targets"}


def config(**own: Any) -> RunConfig:
    return RunConfig(**{"dataset": DataChoice(id="d" * 32, name="rows"), **own})


def ended(
    targets: tuple[str, ...],
    rank: int,
    parameters: int,
    loss: float | None,
    *,
    base: float | None = 2.0,
    rate: float = 5e-3,
    status: Status = "done",
    name: str = "n",
) -> Run:
    """A run of one study, as if it had been trained."""
    own = config(name=name, study="s" * 32, method=LoraSpec(rank=rank, targets=targets))
    summary = {key: value for key, value in (("best_loss", loss), ("base_loss", base)) if value is not None}
    return Run(
        id=f"{abs(hash((targets, rank, rate))):032x}"[-32:],
        path=Path("nowhere"),
        config=replace(own, train=TrainConfig(learning_rate=rate)),
        status=status,
        created=100.0 * len(targets[0]) * len(targets) + rank,
        step=3,
        steps=25,
        summary=summary if status in ("done", "stopped") else {},
        latest={"heldout_loss": loss} if loss is not None else {},
        facts={"estimate": {"trainable": parameters}},
    )


PAPER = [  # as on a model with square matrices of width 10 and one block
    *(ended(Q, rank, 20 * rank, loss) for rank, loss in ((1, 1.9), (2, 1.6), (4, 1.2), (8, 0.9))),
    *(ended(QV, rank, 40 * rank, loss) for rank, loss in ((1, 1.0), (2, 0.505), (4, 0.5), (8, 0.51))),
]


# ---- the grid ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 64), min_size=1, max_size=4),
    rows=st.lists(st.sampled_from([Q, QV, ALL]), min_size=1, max_size=3),
    rates=st.lists(st.sampled_from([1e-3, 5e-3]), max_size=2),
    alpha=st.floats(0.5, 64),
)
def test_a_grid_is_every_combination_once_and_differs_in_nothing_else(
    ranks: list[int], rows: list[tuple[str, ...]], rates: list[float], alpha: float
) -> None:
    asked = config(method=LoraSpec(rank=8, alpha=alpha, dropout=0.1), train=TrainConfig(seed=3))
    cells = grid(asked, ranks, rows, rates)
    made = [(cell.method.targets, cell.method.rank, cell.train.learning_rate) for cell in cells]
    wanted = {(row, rank, rate) for row in rows for rank in ranks for rate in rates or [5e-3]}
    assert len(made) == len(set(made)) and set(made) == wanted
    assert (
        len({cell.study for cell in cells}) == 1 and cells[0].study and len({cell.name for cell in cells}) == len(made)
    )
    for cell in cells:
        assert isinstance(cell.method, LoraSpec)
        assert cell.method.alpha / cell.method.rank == pytest.approx(alpha / 8)
        same = replace(cell.method, rank=8, alpha=alpha, targets=LoraSpec().targets)
        plain = replace(cell, name="", study="", method=same, train=replace(cell.train, learning_rate=5e-3))
        assert plain == asked
    assert grid(asked, ranks, rows)[0].study != cells[0].study


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: grid(config(), [], [Q]), "No ranks"),
        (lambda: grid(config(), [0], [Q]), "The rank 0 is no whole number"),
        (lambda: grid(config(), [True], [Q]), "The rank True"),
        (lambda: grid(config(), [2.0], [Q]), "The rank 2.0"),  # type: ignore[list-item]
        (lambda: grid(config(), [1], []), "No matrices"),
        (lambda: grid(config(), [1], [()]), "No matrices"),
        (lambda: grid(config(), range(1, MOST + 2), [Q]), f"{MOST + 1} runs. A study has at most {MOST}."),
        (lambda: grid(config(method=BaselineSpec(kind="full")), [1], [Q]), "the method is full"),
        (lambda: grid(config(method=LoraSpec(rank_pattern={"attn.q": 2})), [1], [Q]), "patterns"),
        (lambda: grid(config(train=TrainConfig(holdout=0.0)), [1], [Q]), "no rows are held out"),
        (lambda: parse_ranks("1, 2.5"), "The rank '2.5' is not a whole number"),
        (lambda: parse_ranks("4-8"), "'4-8'"),
        (lambda: parse_ranks("-1"), "'-1'"),
        (lambda: parse_rates("1e-3, fast"), "not all numbers"),
    ],
)
def test_what_no_grid_can_be_made_of_is_said(ask: Callable[[], object], said: str) -> None:
    with pytest.raises(StudioError) as caught:
        ask()
    assert caught.value.code == "E_STUDY" and said in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("rate", [0.0, float("nan"), float("inf"), 7.0])
def test_a_rate_out_of_bounds_is_the_knobs_error(rate: float) -> None:
    with pytest.raises(StudioError) as caught:
        grid(config(), [1], [Q], [rate])
    assert caught.value.code == "E_CONFIG" and "Learning rate" in caught.value.message


def test_lists_are_read_as_people_write_them() -> None:
    assert parse_ranks("1,2, 4  8") == [1, 2, 4, 8] and parse_ranks(" ") == []
    assert parse_rates("1e-3, .005") == [1e-3, 5e-3] and parse_rates("") == []
    assert parse_targets("attn.q; attn.q,attn.v ;all-linear;") == [Q, QV, ALL] and parse_targets("") == []


# ---- the table -----------------------------------------------------------------------------------------------------


def test_the_smallest_cell_that_keeps_99_percent_is_recommended() -> None:
    told = table(PAPER)
    assert (told.rows, told.ranks, told.base_loss) == ((Q, QV), (1, 2, 4, 8), 2.0)
    best, chosen = told.best, told.recommended
    assert best and (best.targets, best.rank) == (QV, 4)
    assert chosen and (chosen.targets, chosen.rank) == (QV, 2)
    assert "Recommended: q + v at rank 2. Held-out loss 2.000 to 0.505 with 80 parameters" in told.verdict
    assert "99.6 %" in told.verdict and "q + v at rank 4 (0.500, 160 parameters)" in told.verdict


@pytest.mark.parametrize(("loss", "rank"), [(1.009, 1), (1.011, 2)])  # 99.1 % and 98.9 % of a fall from 2 to 1
def test_99_percent_is_of_the_fall(loss: float, rank: int) -> None:
    chosen = table([ended(Q, 1, 20, loss), ended(Q, 2, 40, 1.0)]).recommended
    assert chosen and chosen.rank == rank


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.floats(0.01, 4.0), min_size=4, max_size=4),
    sizes=st.lists(st.integers(1, 10_000), min_size=4, max_size=4),
)
def test_laws_of_the_recommended_cell(losses: list[float], sizes: list[int]) -> None:
    places = [(Q, 1), (Q, 2), (QV, 1), (QV, 2)]
    told = table([ended(*place, size, loss) for place, size, loss in zip(places, sizes, losses, strict=True)])
    best, chosen = min(losses), told.recommended
    if best >= 2.0:
        assert chosen is None and told.verdict.startswith("No cell has a lower held-out loss")
        return
    assert chosen and chosen.loss is not None
    keeping = [
        size for size, loss in zip(sizes, losses, strict=True) if 2.0 - loss >= KEPT * (2.0 - best) or loss == best
    ]
    assert chosen.parameters == min(keeping)
    assert chosen.loss == best or 2.0 - chosen.loss >= (KEPT - 1e-9) * (2.0 - best)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 200), min_size=9, max_size=9))
def test_a_budget_holds_different_matrices_of_about_one_size_and_no_cell_twice(sizes: list[int]) -> None:
    places = [(row, rank) for row in (Q, QV, ALL) for rank in (1, 2, 4)]
    told = table([ended(*place, size, 1.0) for place, size in zip(places, sizes, strict=True)])
    taken = [cell.run for budget in told.budgets for cell in budget.cells]
    assert len(taken) == len(set(taken))
    for budget in told.budgets:
        found = [cell.parameters for cell in budget.cells]
        assert len({cell.targets for cell in budget.cells}) == len(budget.cells) > 1
        assert max(found) <= SAME * min(found)


def test_equal_budgets_of_the_paper_are_marked_with_the_lowest_of_each() -> None:
    budgets = table(PAPER).budgets  # q at rank 2r beside q and v at rank r
    assert [{(cell.targets, cell.rank) for cell in budget.cells} for budget in budgets] == [
        {(Q, 2), (QV, 1)},
        {(Q, 4), (QV, 2)},
        {(Q, 8), (QV, 4)},
    ]
    assert [budget.letter for budget in budgets] == ["A", "B", "C"]
    assert all(budget.best and budget.best.targets == QV for budget in budgets)
    assert budgets[0].sentence == "A, 40 parameters: q + v at rank 1 (1.000), q at rank 2 (1.600)"


def test_a_cell_with_several_rates_shows_its_best_and_keeps_the_others() -> None:
    runs = [ended(Q, 1, 20, loss, rate=rate) for rate, loss in ((1e-3, 1.5), (5e-3, 1.1), (1e-2, None))]
    told = table(runs)
    (cell,) = told.as_json()["rows"][0]["cells"]
    assert (cell["rate"], cell["loss"]) == (5e-3, 1.1)
    assert [other["rate"] for other in cell["others"]] == [1e-3, 1e-2] and told.as_json()["rates"] == [1e-3, 5e-3, 1e-2]


def test_only_what_has_ended_well_counts() -> None:
    running = ended(QV, 1, 10, 0.1, status="running")
    failed = ended(QV, 2, 15, 0.1, status="failed")
    told = table([*PAPER[:4], running, failed])
    assert told.active and told.front and told.front.targets == Q
    assert (
        told.verdict
        == "1 of 6 runs has not finished. In front: q at rank 8. Held-out loss 2.000 to 0.900 with 160 parameters."
    )
    shown = {cell.rank: cell for cell in told.every if cell.targets == QV}
    assert shown[1].loss is shown[2].loss is None
    assert table([replace(PAPER[0], status="queued", summary={}, latest={})]).verdict == ""
    nothing = table([ended(Q, 1, 20, None, base=None, status="failed")])
    assert nothing.recommended is None and "nothing to compare" in nothing.verdict


@pytest.mark.parametrize("status", ["queued", "running", "paused", "lost"])
def test_nothing_is_recommended_before_every_run_has_ended_for_good(status: Status) -> None:
    told = table([*PAPER[:4], ended(QV, 1, 10, 0.1, status=status), ended(QV, 2, 15, None, status="failed")])
    assert told.active == (status in ("queued", "running"))
    assert told.recommended is None and "Recommended" not in told.verdict and "1 of 6 runs" in told.verdict
    shown = told.as_json()
    assert shown["recommended"] is None and shown["front"] == PAPER[3].id and shown["unfinished"] == 1
    alone = table([ended(Q, 1, 20, None, status=status)])
    assert alone.verdict == ("" if alone.active else "1 of 1 runs has not finished.")
    pair = table([ended(Q, 2, 40, 1.0), ended(QV, 1, 40, None, status=status), ended(ALL, 1, 40, 2.0)])
    assert pair.budgets[0].best is None


def test_the_table_is_plain_json_and_text() -> None:
    told = table(PAPER)
    shown = json.loads(json.dumps(told.as_json()))
    assert {"study", "ranks", "rows", "budgets", "best", "recommended", "verdict", "base_loss"} <= shown.keys()
    assert [len(row["cells"]) for row in shown["rows"]] == [4, 4]
    assert {"run", "loss", "parameters", "status", "rank", "rate", "accuracy"} <= shown["rows"][0]["cells"][0].keys()
    lines = in_words(told).splitlines()
    assert lines[0].split() == ["held-out", "loss", *(word for rank in (1, 2, 4, 8) for word in ("rank", str(rank)))]
    assert lines[2].split() == ["q", "+", "v", "1.000", "A", "0.505*B", "0.500", "C", "0.510"]
    gap = table(PAPER[:5]).as_json()["rows"][1]["cells"]
    assert gap[0] and gap[1:] == [None, None, None]


def test_the_chart_has_a_line_per_row_and_a_ring() -> None:
    told = table([replace(run, config=replace(run.config, method=_named(run))) for run in PAPER]).as_json()
    figure = charts.study(told)
    q, qv, ring = figure.data
    assert list(q.x) == [20, 40, 80, 160] and list(qv.y) == [1.0, 0.505, 0.5, 0.51]
    assert (list(ring.x), list(ring.y)) == ([80], [0.505])
    drawn = figure.to_json()
    assert "<img" not in drawn and "\\u003cimg" not in drawn and "bdata" not in drawn
    layout = json.loads(drawn)["layout"]
    assert layout["paper_bgcolor"] == "rgba(0, 0, 0, 0)" and layout["xaxis"]["title"]["text"]
    shades = {charts.shade(row, column, 8) for row in range(3) for column in range(8)}
    assert len(shades) == 24


def _named(run: Run) -> LoraSpec:
    assert isinstance(run.config.method, LoraSpec)
    return replace(run.config.method, targets=tuple(f"{EVIL}.{role}" for role in run.config.method.targets))


# ---- on disk -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> str:
    return "\n".join(json.dumps({"question": f"say {n}", "answer": "ab" * (1 + n % 3)}) for n in range(20))


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


@pytest.mark.parametrize(
    ("ranks", "targets", "own", "code"),
    [
        ([1, 2], [Q, ("attn.z",)], {}, "E_TARGETS"),
        ([1, 33], [QV], {}, "E_RANK"),
        ([], [QV], {}, "E_STUDY"),
        ([1], [QV], {"model": "nothing"}, "E_MODEL_ID"),
    ],
)
def test_a_study_with_one_wrong_cell_writes_nothing(
    studio: Studio, rows: str, tiny: Path, ranks: list[int], targets: Sequence, own: dict, code: str
) -> None:
    choice = DataChoice(id=studio.data.add_text(rows).id, name="rows")
    with pytest.raises(StudioError) as caught:
        studio.sweep(RunConfig(**({"model": str(tiny), "dataset": choice} | own)), ranks, targets)
    assert caught.value.code == code and studio.runs.list() == []


def test_a_study_is_its_runs(studio: Studio, rows: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio.supervisor, "tick", lambda: None)
    choice = DataChoice(id=studio.data.add_text(rows).id, name="rows")
    asked = RunConfig(model=str(tiny), dataset=choice)
    runs = studio.sweep(asked, [1, 2], [Q, QV])
    assert [run.status for run in runs] == ["queued"] * 4 and len({run.config.study for run in runs}) == 1
    told = studio.study(runs[0].config.study[:8])
    assert [cell.run for cell in told.every] == [run.id for run in runs]
    # two layers, hidden 32: q 32 -> 32 and v 32 -> 16
    assert [cell.parameters for cell in told.every] == [2 * 64, 4 * 64, 2 * 112, 4 * 112]
    again = Studio(studio.root)
    studio.runs.request_stop(runs[0].id)
    assert again.study(told.study).every[0].status == "stopped" and list(again.studies()) == [told.study]
    with pytest.raises(StudioError) as caught:
        studio.study("nowhere")
    assert caught.value.code == "E_STUDY_NOT_FOUND"


def test_all_that_can_go_on_is_resumed_in_one_look_at_the_queue(
    studio: Studio, rows: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio.supervisor, "tick", lambda: None)
    choice = DataChoice(id=studio.data.add_text(rows).id, name="rows")
    runs = studio.sweep(RunConfig(model=str(tiny), dataset=choice), [1, 2], [Q, QV])
    for run in runs[:2]:
        studio.pause(run.id)
    (runs[2].path / "worker.log").touch()  # and no worker holds it
    studio.stop(runs[3].id)
    study = runs[0].config.study

    def standing() -> list[str]:
        return [cell.status for cell in studio.study(study).every]

    assert standing() == ["paused", "paused", "lost", "stopped"]
    assert [cell.resumable for cell in studio.study(study).every] == [True, True, True, False]
    looks = []
    requeue = studio.runs.requeue

    def watched(run: str) -> Run:
        looks.append(Supervisor(studio.runs).tick())  # another one cannot start a part of them meanwhile
        return requeue(run)

    monkeypatch.setattr(studio.runs, "requeue", watched)
    assert study_tab.resume_all(studio, {"study": study}) == {"problem": "", "run": [run.id for run in runs[:3]]}
    assert standing() == ["queued", "queued", "queued", "stopped"] and looks == [False] * 3
    assert [run.id for run in together(studio.runs.list()[::-1][:3])] == [run.id for run in runs[:3]]
    assert studio.resume_study(study) == []
    for wrong in ({}, {"study": 7}, {"study": "f" * 32}):
        assert "There is no study" in study_tab.resume_all(studio, wrong)["problem"]


def test_a_run_that_cannot_go_on_keeps_no_other_back(
    studio: Studio, rows: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio.supervisor, "tick", lambda: None)
    choice = DataChoice(id=studio.data.add_text(rows).id, name="rows")
    runs = studio.sweep(RunConfig(model=str(tiny), dataset=choice), [1, 2], [Q])
    for run in runs:
        studio.pause(run.id)
    (runs[0].path / "checkpoints" / "step-00000004").mkdir(parents=True)  # without its files
    with pytest.raises(StudioError) as caught:
        studio.resume_study(runs[0].config.study)
    assert caught.value.code == "E_CHECKPOINT"
    assert [studio.runs.get(run.id).status for run in runs] == ["paused", "queued"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny: Path, rows: str) -> tuple[Path, list[dict]]:
    """A real study of two ranks and two rates from the command line: its root and the lines that it printed."""
    root = tmp_path_factory.mktemp("swept")
    (root / "rows.jsonl").write_text(rows)
    words = ["sweep", "--ranks", "1,4", "--rates", "0.01,0.1", "--targets-grid", "all-linear", "--model", str(tiny)]
    words += ["--data", str(root / "rows.jsonl"), "--steps", "12", "--batch-size", "4", "--samples", "0", "--json"]
    code, out, err = command(*words, "--root", str(root))
    assert code == 0, err
    return root, [json.loads(line) for line in out.splitlines()]


def command(*words: str) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["lora_studio", *words]), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("typer ends with SystemExit")


def test_the_command_prints_the_events_of_every_run_and_then_the_table(swept: tuple[Path, list[dict]]) -> None:
    *events, last = swept[1]
    assert last["type"] == "Study" and len(last["rows"]) == 1 and last["ranks"] == [1, 4]
    runs = {event["run"] for event in events}
    assert len(runs) == 4 and [event["status"] for event in events if event["type"] == "Ended"] == ["done"] * 4
    for run in runs:
        own = [event for event in events if event["run"] == run and event["type"] == "Metric"]
        steps = [event["step"] for event in own if "train_loss" in event["values"]]
        assert steps == list(range(1, 13))
    cells = last["rows"][0]["cells"]
    assert all(cell["status"] == "done" and len(cell["others"]) == 1 for cell in cells)
    assert all(cell["loss"] <= cell["others"][0]["loss"] < last["base_loss"] for cell in cells)
    assert last["recommended"] in runs and not last["active"]


def test_the_page_gets_only_what_is_new_and_the_table_only_when_it_changed(swept: tuple[Path, list[dict]]) -> None:
    studio = Studio(swept[0])
    first = study_tab.answer(studio, {"study": "", "seen": {}, "known": ""})
    assert first["state"] == "over" and first["study"] == swept[1][-1]["study"]  # the newest, as none was named
    assert all(run["train"][0] == list(range(1, 13)) and run["heldout"][0][0] == 0 for run in first["runs"])
    assert set(first["table"]["colours"]) == {run["run"] for run in first["runs"]} and first["figure"]["data"]
    seen = {run["run"]: run["next"] for run in first["runs"]}
    again = study_tab.answer(studio, {"study": first["study"], "seen": seen, "known": first["token"]})
    assert "table" not in again and all(run["train"] == ([], [], []) for run in again["runs"])
    assert len(json.dumps(again)) < 1500


def test_a_view_asks_anything_and_gets_an_answer(swept: tuple[Path, list[dict]], tmp_path: Path) -> None:
    for ask in ({"study": "f" * 32}, {"study": "../.."}):
        assert study_tab.answer(Studio(swept[0]), ask)["state"] == "missing"
    for ask in ({}, {"study": 7, "seen": [1], "known": {}}):
        assert study_tab.answer(Studio(tmp_path), ask)["state"] == "none"
        assert study_tab.answer(Studio(swept[0]), {**ask, "seen": {"x": -1}})["state"] == "over"


def test_a_resumed_run_forgets_the_steps_behind_its_checkpoint() -> None:
    facts = {"trainable": 1, "total": 2, "device": "cpu", "precision": "float32", "train_rows": 3, "heldout_rows": 1}
    before = [Started(steps=9, **facts), *(Metric(step=step, values={"train_loss": 1.0}) for step in range(1, 6))]
    after = [Started(steps=9, step=3, **facts), *(Metric(step=step, values={"train_loss": 2.0}) for step in (4,))]
    lines = [to_line(event, time=0.0, attempt=1 + (event in after)) for event in (*before, *after)]
    records = [json.loads(line) for line in lines]
    assert curves.curve(records, "train_loss") == ([1, 2, 3, 4], [1.0, 1.0, 1.0, 2.0])


# ---- the page ------------------------------------------------------------------------------------------------------


class ReadyDesk(Desk):
    """A desk whose libraries are loaded."""

    def ready(self, model: str = "") -> Studio:
        return self.studio


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = ReadyDesk(Studio(tmp_path))
    monkeypatch.setattr(desk.studio.supervisor, "tick", lambda: None)  # queued is enough
    return desk


def ask(
    desk: Desk,
    tiny: Path,
    handler: Callable,
    ranks: str = "1, 2",
    matrices: Sequence[str] = study_tab.FIRST,
    rates: str = "",
    **own: Any,
) -> Any:
    choice = data_tab.open_sample(desk, "tickets")[0]
    picked = {"matrices": [{"role": "attn.q"}, {"role": "mlp.up"}], "chosen": ["mlp.up"]}
    raw = {**DEFAULTS, **own}
    method = raw.pop("method", "lora")
    return handler(desk, choice, str(tiny), "causal", method, "My own", picked, ranks, matrices, rates, **raw)


def test_the_form_says_what_a_study_costs_and_starts_it(desk: Desk, tiny: Path) -> None:
    line = ask(desk, tiny, study_tab.cost)
    assert "<b>4 runs</b>" in line and "<b>128</b> to <b>448</b> trainable" in line and "tickets" in line
    study, problem = ask(desk, tiny, study_tab.start, matrices=["Attention q", study_tab.OWN], rates="1e-3,1e-2")
    assert problem == ""
    told = desk.studio.study(study)
    assert told.rows == (Q, ("mlp.up",)) and told.rates == (1e-3, 1e-2) and len(told.every) == 8
    names = [cell.name for cell in told.every]
    assert len(set(names)) == 8 and names[0] == "tickets r1 q at 0.001"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"ranks": ""}, "No ranks"),
        ({"ranks": EVIL}, "is not a whole number"),
        ({"matrices": []}, "No matrices"),
        ({"rates": "x"}, "not all numbers"),
        ({"ranks": " ".join(map(str, range(1, 20)))}, "at most 24"),
        ({"method": "full"}, "the method is full"),
        ({"ranks": "17"}, "E_RANK"),
        ({"batch_size": 0}, "Batch is 0."),
    ],
)
def test_the_form_says_what_is_wrong_in_place(desk: Desk, tiny: Path, own: dict, said: str) -> None:
    line = ask(desk, tiny, study_tab.cost, **own)
    value, problem = ask(desk, tiny, study_tab.start, **own)
    assert said in str(line) and said in problem and value == gr.skip() and EVIL not in f"{line}{problem}"
    assert desk.studio.runs.list() == []


def test_a_study_in_the_address_is_shown_when_it_is_here(swept: tuple[Path, list[dict]]) -> None:
    studio, study = Studio(swept[0]), swept[1][-1]["study"]
    assert study_tab.shown_at_first(studio, study) == study
    assert study_tab.shown_at_first(studio, "f" * 32) == study_tab.shown_at_first(studio, "") == ""


def test_a_label_of_a_study_says_how_it_stands() -> None:
    told: Table = table(PAPER)
    assert study_tab._label(told) == "rows · starter · 8 runs · q + v at rank 2"
    paused = table([*PAPER[:7], replace(PAPER[7], status="paused", summary={})])
    assert study_tab._label(paused) == "rows · starter · 8 runs · unfinished"
