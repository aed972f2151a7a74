"""The Runs tab: every run of the visitor in one table, a study as one row; and what is chosen, side by side.

The page sorts, searches and pages by itself (runs.js); it asks `poll` for the rows when one of them is another, and
for the curves and settings of what is chosen.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from lora_studio import charts
from lora_studio.errors import StudioError
from lora_studio.fields import knobs
from lora_studio.limits import Limits
from lora_studio.runs.config import ACTIVE, Run, RunConfig, settings_in_words
from lora_studio.studio import Studio
from lora_studio.study import MOST
from lora_studio.ui import curves, live, script
from lora_studio.ui.boundary import problem_in_answer
from lora_studio.ui.desk import Desk

DASHES = ("solid", "dash", "dot", "dashdot")
AT_ONCE = 200  # runs that one request deletes or brings back
GLIMPSE = 120  # characters of a note in the table


def build(desk: Desk) -> gr.HTML:
    """The component; it raises `watch`, `compare`, `inside`, `export`, `clone` with a run, and `study` with a study."""

    def poll(desk: Desk, ask: dict) -> dict:
        return answer(desk.studio, ask)

    def table(desk: Desk, ask: dict) -> dict:
        return desk.studio.study(live.id_of(ask.get("study"))).as_json()

    def describe(desk: Desk, ask: dict) -> dict:
        return describe_run(desk.studio, ask)

    def delete(desk: Desk, ask: dict) -> dict:
        return each(ask, desk.studio.delete)

    def restore(desk: Desk, ask: dict) -> dict:
        return each(ask, desk.studio.restore)

    return gr.HTML(
        "",
        html_template=_template(desk.limits),
        js_on_load=script.of("runs"),
        head=live.DRAWING,
        server_functions=[desk.mine(problem_in_answer(one)) for one in (poll, table, describe, delete, restore)],
        apply_default_css=False,
        elem_id="runs",
    )


def _template(limits: Limits) -> str:
    bounds = {"NAME_MOST": knobs(RunConfig)["name"].max, "NOTE_MOST": limits.note_characters, "CHOSEN_MOST": MOST}
    template = script.template("runs")
    for name, most in bounds.items():
        template = template.replace(name, f"{most:.0f}")
    return template


# ---- the view's questions ------------------------------------------------------------------------------------------


def answer(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """The table and what is chosen of it, as far as the caller does not know it.

    ask: known (the last token of the table), chosen (run ids, at most study.MOST), seen (records read, by run), sheet
    (the last token of the settings). deleted: what can still be brought back.
    """
    runs = studio.runs.list()
    said: dict[str, Any] = {
        "deleted": [{"run": run.id, "name": run.name or run.id[:8], "left_s": left} for run, left in _gone(studio)]
    }
    token = _token(f"{run.id}{run.status}{run.name}\n{run.remarks}" for run in runs)
    if token == ask.get("known"):
        said["moved"] = [_moving(run) for run in runs if run.active]
    else:
        said |= {"token": token, "rows": [entry(run) for run in runs]}
    wanted = ask.get("chosen")
    wanted = [one for one in wanted if isinstance(one, str)] if isinstance(wanted, list) else []
    known = {run.id: run for run in runs if run.status != "damaged"}
    chosen = [known[one] for one in dict.fromkeys(wanted) if one in known][:MOST]
    said["runs"] = curves.news(studio, chosen, ask.get("seen"))
    token = _token(f"{run.id}{run.name}\n{run.remarks}" for run in chosen)
    if chosen and token != ask.get("sheet"):
        said["sheet"] = {"token": token, **sheet(chosen)}
    return said


def sheet(runs: Sequence[Run]) -> dict[str, Any]:
    """Names, notes and settings of some runs: a column a run, and a row a setting, which differs or does not."""
    settings = [settings_in_words(run) for run in runs]
    labels = dict.fromkeys(label for one in settings for label in one)
    rows = [(label, [one.get(label, "") for one in settings]) for label in labels]
    columns = [
        {
            "run": run.id,
            "name": run.name or run.id[:8],
            "called": run.name,
            "remarks": run.remarks,
            "label": charts.text(run.name or run.id[:8], 28),
            "colour": charts.SERIES[place % len(charts.SERIES)],
            "dash": DASHES[place // len(charts.SERIES)],
        }
        for place, run in enumerate(runs)
    ]
    told = [{"label": label, "values": values, "differs": len({*values}) > 1} for label, values in rows if any(values)]
    return {"columns": columns, "rows": told}


def entry(run: Run) -> dict[str, Any]:
    """One run in the table."""
    config, summary, known = run.config, run.summary, run.facts.get("estimate") or {}
    damaged = run.status == "damaged"
    return {
        **_moving(run),
        "name": run.name or run.id[:8],
        "state": run.status,
        "base": config.model.rstrip("/").rsplit("/", 1)[-1],
        "method": "" if damaged else live.method_in_words(config.method),
        "dataset": config.dataset.name,
        "base_loss": curves.short(summary.get("base_loss")),
        "base_accuracy": curves.short(summary.get("base_accuracy")),
        "accuracy": curves.short(summary.get("best_accuracy")),
        "parameters": known.get("trainable"),
        "seconds": curves.short(summary.get("seconds")),
        "created": run.created,
        "study": config.study,
        "remarks": run.remarks[:GLIMPSE],
        "adapter": run.has_adapter,
        "reason": (run.error or {}).get("message", ""),
    }


def describe_run(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Call a run otherwise, and note something about it."""
    given = {name: ask[name] for name in ("name", "remarks") if isinstance(ask.get(name), str)}
    return live.said_of(lambda: studio.describe(live.id_of(ask.get("run")), **given).name)


def each(ask: Mapping[str, Any], act: Any) -> dict[str, Any]:
    """Do something to all chosen runs; one for which it cannot be done does not keep the others back."""
    wanted, problems = ask.get("runs"), []
    for run in wanted[:AT_ONCE] if isinstance(wanted, list) else []:
        try:
            act(live.id_of(run))
        except StudioError as error:
            problems.append(str(error))
    return {"problem": problems[0] if problems else ""}


# ---- inside --------------------------------------------------------------------------------------------------------


def _moving(run: Run) -> dict[str, Any]:
    """What of a row moves while a run trains."""
    loss = run.latest.get("heldout_loss") if run.status in ACTIVE else run.summary.get("best_loss")
    return {"run": run.id, "step": run.step, "steps": run.steps, "loss": curves.short(loss)}


def _gone(studio: Studio) -> list[tuple[Run, float]]:
    return [(run, round(left, 1)) for run, left in studio.runs.deleted() if left]


def _token(parts: Any) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
