"""The Study tab: which rank and which matrices, for the user's own rows; the race of its runs and the table.

What is trained apart from those two comes from the Data and Train tabs. A study is nothing but runs with one
config.study, so the view (study.js) polls them like any run: a reload, a second browser and a restart see the same.
"""

import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from lora_studio import charts
from lora_studio.core.spec import LoraSpec
from lora_studio.runs.config import DataChoice, RunConfig
from lora_studio.studio import Studio
from lora_studio.study import MATRICES, MOST, Table, grid, parse_ranks, parse_rates, studies, table
from lora_studio.ui import curves, figure, form, live, picker, script, train_tab
from lora_studio.ui.boundary import problem_in_answer, problem_instead, problem_last
from lora_studio.ui.desk import Desk, data_choice

OWN = "As chosen in tab 2"
FIRST = [name for name in MATRICES if MATRICES[name] in (("attn.q",), ("attn.q", "attn.v"))]
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class StudyTab:
    """The components that events join."""

    ranks: gr.Textbox
    matrices: gr.CheckboxGroup
    rates: gr.Textbox
    line: gr.HTML
    problem: gr.HTML
    start: gr.Button
    view: gr.HTML

    @property
    def asked(self) -> list[Any]:
        """What a study varies."""
        return [self.ranks, self.matrices, self.rates]


def build(desk: Desk) -> StudyTab:
    """Left: what varies. Right: the race and the table."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=280, elem_classes="card"):
            gr.HTML(
                "<h3>Which rank, which matrices?</h3><p class='soft'>Everything else is taken from tabs 1 and 2: the"
                " rows, the base model, steps, batch, seed and the ratio of alpha to rank.</p>",
                apply_default_css=False,
            )
            ranks = gr.Textbox("1, 2, 4, 8", label="Ranks", info="Columns of the table", elem_id="study-ranks")
            matrices = gr.CheckboxGroup(
                [*MATRICES, OWN], value=FIRST, label="Matrices", info="Rows of the table", elem_id="study-matrices"
            )
            rates = gr.Textbox(
                "",
                label="Learning rates",
                info="Tried in each cell, the best one counts; empty takes the rate of tab 2",
                placeholder="1e-3, 5e-3",
                elem_id="study-rates",
            )
            line = gr.HTML("<div class='cost soft'></div>", apply_default_css=False, elem_id="study-cost")
            problem = gr.HTML("", apply_default_css=False, elem_id="study-problem")
            start = gr.Button("Start study", variant="primary", elem_id="start-study")
        with gr.Column(scale=8, min_width=300, elem_classes="card"):
            view = _view(desk)
    return StudyTab(ranks, matrices, rates, line, problem, start, view)


def _view(desk: Desk) -> gr.HTML:
    """The race and the table; raises `watch`, `compare` and `export` with the run that the person chose."""

    def poll(desk: Desk, ask: dict) -> dict:
        return answer(desk.studio, ask)

    def drop(desk: Desk, ask: dict) -> dict:
        return live.stop_run(desk.studio, ask)

    def resume(desk: Desk, ask: dict) -> dict:
        desk.may_start()
        return resume_all(desk.studio, ask)

    return gr.HTML(
        "",
        html_template=script.template("study"),
        js_on_load=script.of("study"),
        head=live.DRAWING,
        server_functions=[desk.mine(problem_in_answer(one)) for one in (poll, drop, resume)],
        apply_default_css=False,
        elem_id="study",
    )


# ---- handlers ----------------------------------------------------------------------------------------------------


@problem_instead
def cost(
    desk: Desk,
    choice: Mapping[str, Any] | None,
    model: str,
    task: str,
    method: str,
    preset: str,
    picked: Mapping[str, Any] | None,
    ranks: str,
    matrices: Sequence[str],
    rates: str,
    **raw: Any,
) -> str:
    """How many runs that makes, from which size to which, and for how long."""
    rows = DataChoice(**choice) if choice else DataChoice(id="")
    config = _config(rows, model, task, method, preset, picked, raw)
    cells = grid(config, *_asked(ranks, matrices, rates, preset, picked))
    studio = desk.ready(model)
    plans = [studio.plan(model, cell.method, cell.train, rows if choice else None, task) for cell in cells]
    sizes, seconds = [plan.estimate.trainable for plan in plans], sum(plan.estimate.seconds for plan in plans)
    runs = "1 run" if len(cells) == 1 else f"{len(cells)} runs"
    parts = (
        f"<b>{runs}</b> of at most {MOST}",
        f"<b>{min(sizes):,}</b> to <b>{max(sizes):,}</b> trainable parameters",
        f"about <b>{train_tab._duration(seconds)}</b> in all",
        f"{html.escape(rows.name or 'no dataset yet')}, {html.escape(model)}",
    )
    return "<div class='cost'>" + "".join(f"<span>{part}</span>" for part in parts) + "</div>"


@problem_last(1)
def start(
    desk: Desk,
    choice: Mapping[str, Any] | None,
    model: str,
    task: str,
    method: str,
    preset: str,
    picked: Mapping[str, Any] | None,
    ranks: str,
    matrices: Sequence[str],
    rates: str,
    **raw: Any,
) -> str:
    """Queue a study and give its id to the view."""
    rows, model = data_choice(choice), model.strip()
    config = _config(rows, model, task, method, preset, picked, raw)
    asked = _asked(ranks, matrices, rates, preset, picked)
    studio = desk.ready(model)
    desk.may_start()
    return studio.sweep(config, *asked)[0].config.study


def _config(
    rows: DataChoice,
    model: str,
    task: str,
    method: str,
    preset: str,
    picked: Mapping[str, Any] | None,
    raw: Mapping[str, Any],
) -> RunConfig:
    """What tabs 1 and 2 describe; its rank and matrices are the ones that vary."""
    chosen = form.method(raw, picker.targets(picked, preset), method)
    if isinstance(chosen, LoraSpec):
        chosen = replace(chosen, targets=chosen.targets or LoraSpec().targets)  # tab 2 may have none pressed
    return RunConfig(model=model, task=task, dataset=rows, method=chosen, train=form.training(raw))


def _asked(
    ranks: str, matrices: Sequence[str], rates: str, preset: str, picked: Mapping[str, Any] | None
) -> tuple[list[int], list[tuple[str, ...]], list[float]]:
    rows = [picker.targets(picked, preset) if name == OWN else MATRICES[name] for name in matrices]
    return parse_ranks(ranks or ""), rows, parse_rates(rates or "")


# ---- the view's questions ------------------------------------------------------------------------------------------


def answer(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """What is new in a study since the caller's last look.

    ask: study (an id, or "" for the newest), seen (records read, by run), known (the last token). The table, its
    chart and the list of studies come along when the token is another; an unknown study has state "missing".
    """
    asked = ask.get("study") if isinstance(ask.get("study"), str) else ""
    found = studies(studio.runs.list())
    study = asked or next(iter(found), "")
    said: dict[str, Any] = {"asked": asked, "study": study, "state": "none", "runs": []}
    if study not in found:
        return said | ({"state": "missing"} if asked else {})
    told = table(found[study])
    said["state"] = "active" if told.active else "over"
    said["runs"] = curves.news(studio, found[study][::-1], ask.get("seen"))
    shown = told.as_json()
    for row in shown["rows"]:
        for cell in row["cells"]:
            for one in [cell, *cell["others"]] if cell else []:
                one.pop("step")  # moves with every answer
    shown["listed"] = [{"study": one, "label": _label(table(runs))} for one, runs in found.items()]
    shown["colours"] = {cell.run: _colour(told, cell) for cell in told.every}
    token = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]
    if token != ask.get("known"):
        said |= {"token": token, "table": shown, "figure": figure.value(charts.study(shown))}
    return said


def resume_all(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Put the paused and lost runs of a study back into the queue."""
    study = ask.get("study")
    return live.said_of(lambda: [run.id for run in studio.resume_study(study if isinstance(study, str) else "")])


def _label(told: Table) -> str:
    """A study in the list: its rows, its model, how many runs, how it stands."""
    model = told.model.rstrip("/").rsplit("/", 1)[-1]
    count = len(told.every)
    state = "running" if told.active else "unfinished" if told.unfinished else "over"
    if told.recommended:
        state = told.recommended.place
    return f"{told.name} · {model} · {count} {'run' if count == 1 else 'runs'} · {state}"


def _colour(told: Table, cell: Any) -> dict[str, Any]:
    """How a run is drawn: hue for the matrices, lightness and symbol for the rank, dashes for the rate."""
    row, column = told.rows.index(cell.targets), told.ranks.index(cell.rank)
    symbol = charts.SYMBOLS[column % len(charts.SYMBOLS)]
    dash = DASHES[told.rates.index(cell.rate) % len(DASHES)]
    return {"colour": charts.shade(row, column, len(told.ranks)), "symbol": symbol, "dash": dash}


def shown_at_first(studio: Studio, asked: str) -> str:
    """The study in the address when it is here, else none: the view then takes the newest."""
    return asked if asked and asked in studio.studies() else ""
