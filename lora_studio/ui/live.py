"""The live view of one run: state, figures, findings, curve, sample answers, run list and log, out of its files.

The component's value is a run id. Its script (live.js) asks `poll` for the records it has not seen and draws them;
there is no event that owns a run, so a reload, a second browser and a restart of the app see the same.
"""

import contextlib
import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr

from lora_studio.core.spec import BASELINES, LoraSpec, Method
from lora_studio.errors import StudioError, redacted
from lora_studio.events import EVENTS, Learned
from lora_studio.runs.config import Run, change_in_words, width_in_words
from lora_studio.runs.store import ID, RunStore, standing
from lora_studio.studio import Studio
from lora_studio.study import short
from lora_studio.ui import script
from lora_studio.ui.boundary import problem_in_answer
from lora_studio.ui.desk import Desk
from lora_studio.ui.terms import term

PLOTLY = Path(importlib.util.find_spec("plotly").origin).parent / "package_data" / "plotly.min.js"  # type: ignore
DRAWING = "<script src='plotly.min.js'></script>"  # which the door serves
POINTS = 4_000  # of a curve in one answer; a longer one is thinned
LOG_CHARACTERS = 8_000
LISTED = 50  # of the newest runs under the one that is shown; the Runs tab has all
BROUGHT = "brought along"  # an adapter that was made elsewhere
SAMPLED = ("step", "index", "prompt", "text", "target")
PROBED = ("seconds", "memory_bytes", "accumulate", "batch_fits")
LEARNED = tuple(field.name for field in fields(Learned))
CURVES = {"train_loss": "Loss", "grad_norm": "Gradient norm", "learning_rate": "Learning rate"}  # the chart shows one
TILES = {
    "step": "Step",
    "train_loss": "Train loss",
    "heldout_loss": "Held-out loss",
    "accuracy": "Accuracy",
    "tokens_per_s": "Tokens/s",
    "memory_bytes": "Memory",
    "seconds_left": "Time left",
    "learning_rate": "Learning rate",
}


def build(desk: Desk) -> gr.HTML:
    """The component; it raises `compare` when the person wants to compare the run that is shown."""

    def poll(desk: Desk, ask: dict) -> dict:
        return answer(desk.studio, ask) | {"visitors": desk.visitors}

    def stop(desk: Desk, ask: dict) -> dict:
        return stop_run(desk.studio, ask)

    def discard(desk: Desk, ask: dict) -> dict:
        return discard_run(desk.studio, ask)

    def pause(desk: Desk, ask: dict) -> dict:
        return pause_run(desk.studio, ask)

    def resume(desk: Desk, ask: dict) -> dict:
        desk.may_start()
        return resume_run(desk.studio, ask)

    def restart(desk: Desk, ask: dict) -> dict:
        desk.may_start()
        return restart_run(desk.studio, ask)

    def another(desk: Desk, ask: dict) -> dict:
        desk.may_start()
        return try_another_rank(desk.studio, ask)

    def share(desk: Desk, ask: dict) -> dict:
        return share_run(desk.studio, ask)

    def delete(desk: Desk, ask: dict) -> dict:
        return delete_run(desk.studio, ask)

    def restore(desk: Desk, ask: dict) -> dict:
        return restore_run(desk.studio, ask)

    asked = [poll, stop, discard, pause, resume, restart, another, share, delete, restore]
    tiles = "".join(
        f"<div><span>{term(label)}</span><b data-tile='{name}'>–</b></div>" for name, label in TILES.items()
    )
    curves = "".join(
        f"<button type='button' data-curve='{name}' data-term='{label.lower()}'"
        f" aria-pressed='{str(name == 'train_loss').lower()}'>{label}</button>"
        for name, label in CURVES.items()
    )
    page = script.template("live")
    return gr.HTML(
        "",
        html_template=page.replace("<!-- tiles -->", tiles).replace("<!-- curves -->", curves),
        js_on_load=script.of("live"),
        head=DRAWING,
        server_functions=[desk.mine(problem_in_answer(one)) for one in asked],
        apply_default_css=False,
        elem_id="live",
    )


def answer(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """What is new since the caller's last look.

    ask: run (id or ""), start (records seen), curve (of CURVES), list (whether runs may have changed), known (their
    last token), log (whether the log is open). An unknown run has state "missing", one that can be brought back
    "deleted", none at all has "none". A run that somebody else shares comes as `public` leaves it.
    """
    curve = next((name for name in CURVES if name == ask.get("curve")), "train_loss")
    said: dict[str, Any] = {"run": ask.get("run") or "", "start": _count(ask.get("start")), "state": "none"}
    said["curve"] = curve
    if ask.get("list"):
        said |= _changed_runs(studio.runs, ask.get("known"))
    if said["run"]:
        try:
            view = studio.runs.look(id_of(said["run"]))
            if studio.runs.owner not in (None, view.owner):
                return said | public(_news(studio.runs.of(view.owner), view, said["start"], curve), view)
            said |= _news(studio.runs, view, said["start"], curve)
            if ask.get("log"):
                said["log"] = redacted(studio.runs.log(view.id, LOG_CHARACTERS))
        except StudioError:
            said["state"] = "missing"
            for run, left_s in studio.runs.deleted():
                if run.id == said["run"] and left_s:
                    said |= {"state": "deleted", "name": run.name or run.id[:8], "left_s": left_s}
    return said


PUBLIC = ("next", "whole", "state", "step", "steps", "latest", "train", "heldout", "general")
PUBLIC += ("saved", "probe", "adapter")
FIGURES = ("seconds", "memory_bytes", "probe_seconds", "probe_memory_bytes", "base_loss", "best_loss", "best_step")
FIGURES += ("base_accuracy", "best_accuracy")


def public(news: Mapping[str, Any], view: Run) -> dict[str, Any]:
    """What others may see of a run that is shared: figures and settings.

    No rows, no answers, no log, no warning and no error text, which may quote rows; nor the name and the labels,
    which are made from the dataset's.
    """
    said = {name: news[name] for name in PUBLIC} | {"samples": [], "findings": [], "note": "", "own": False}
    said["adapter"] = False  # there is nothing to compare with
    if "about" in news:
        config, train = view.config, view.config.train
        line = [config.model.rstrip("/").rsplit("/", 1)[-1], method_in_words(config.method)]
        line += [f"{len(view.labels)} labels"] if view.labels else []
        line += [f"learning rate {train.learning_rate:g}", f"batch {train.batch_size}", f"seed {train.seed}"]
        about = {"name": f"Shared run {view.id[:8]}", "line": " · ".join(line), "estimate": news["about"]["estimate"]}
        said["about"] = about
    if "summary" in news:
        said["summary"] = {name: value for name, value in news["summary"].items() if name in FIGURES}
        said |= {"resumable": False, "error": None}
    if learned := news.get("learned"):  # its sentences are made of figures
        said["learned"] = learned | {"rows": []}
    return said


def stop_run(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Ask a run to end and keep its adapter."""
    return said_of(lambda: studio.stop(id_of(ask.get("run"))))


def discard_run(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Ask a run to end and to leave nothing behind."""
    return said_of(lambda: studio.discard(id_of(ask.get("run"))))


def pause_run(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Ask a run to end so that it can be resumed."""
    return said_of(lambda: studio.pause(id_of(ask.get("run"))))


def resume_run(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Put a run back into the queue."""
    return said_of(lambda: studio.resume(id_of(ask.get("run"))))


def restart_run(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Start a run anew with the change that one of its findings, or its error, names; give its id as "run".

    What the run itself says is changed, not what the page sends. A run that is still training is stopped, once the
    new one is queued.
    """

    def act() -> str:
        view = studio.runs.get(id_of(ask.get("run")))
        change = next((one["change"] for one in advice(studio.runs, view) if one["code"] == ask.get("code")), None)
        if not change:
            raise StudioError("E_NO_CHANGE", "Nothing is to be changed in this run.", "Start one in the form.")
        fresh = studio.restart(view.id, change)
        if view.active:
            studio.stop(view.id)
        return fresh.id

    return said_of(act)


def try_another_rank(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Queue a run's settings once more with twice its rank, or with half of it; its id as "run"."""

    def act() -> str:
        view = studio.runs.get(id_of(ask.get("run")))
        found = other_ranks(view)
        if not found:
            raise StudioError("E_NOT_LORA", "This run has no rank.", "Choose a run of LoRA.")
        return studio.another_rank(view.id, found[-1] if ask.get("more") is True else found[0]).id

    return said_of(act)


def other_ranks(run: Run) -> list[int]:
    """Half of a run's rank and twice as much, as far as there are such ranks; none for other methods."""
    method = run.config.method
    if not isinstance(method, LoraSpec):
        return []
    return [rank for rank in (method.rank // 2, 2 * method.rank) if rank >= 1]


def share_run(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Let others see a run's figures and settings, or no longer."""
    return said_of(lambda: studio.share(id_of(ask.get("run")), ask.get("on") is True))


def delete_run(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Put a run that has ended aside, to be removed with all its files in a while."""
    return said_of(lambda: studio.delete(id_of(ask.get("run"))))


def restore_run(studio: Studio, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Bring back a run that was just deleted."""
    return said_of(lambda: studio.restore(id_of(ask.get("run"))))


def said_of(act: Callable[[], Any]) -> dict[str, Any]:
    """What the page asked for, and what it must say when that cannot be done."""
    try:
        return {"problem": "", "run": act()}
    except StudioError as error:
        return {"problem": str(error)}


def shown_at_first(studio: Studio, runs: Sequence[Run], asked: str) -> str:
    """The run to show on load: the one in the address, else the newest active one, else one that broke off last."""
    with contextlib.suppress(StudioError):
        return studio.runs.look(id_of(asked)).id
    broke_off = [run for run in runs[:1] if run.status in ("lost", "paused") and run.resumable]
    return next((run.id for run in (*filter(lambda run: run.active, runs), *broke_off)), "")


def thin(steps: Sequence[int], values: Sequence[float | None], limit: int = POINTS) -> tuple[list, list]:
    """At most about `limit` points: the lowest and the highest of each of equally many neighbours."""
    if len(steps) <= limit:
        return list(steps), list(values)
    size = math.ceil(2 * len(steps) / limit)
    kept: list[int] = []
    for start in range(0, len(steps), size):
        bucket = range(start, min(start + size, len(steps)))
        kept += sorted(
            {min(bucket, key=lambda place: _number(values[place])), max(bucket, key=lambda p: _number(values[p]))}
        )
    return [steps[place] for place in kept], [values[place] for place in kept]


def advice(store: RunStore, run: Run) -> list[dict[str, Any]]:
    """What is wrong in a run: code, message, hint, the change that would cure it or {}, and that change in words.

    The warnings, the newest of each that names a change, and last why the run ended early or failed.
    """
    found: dict[str, dict[str, Any]] = {}
    told = [one for one in store.curve(run.id) if one["type"] == "Warned"]
    warnings = [one for one in told if one["code"].startswith("W_") or one["code"] == "I_PATIENCE"]
    for record in [*warnings, run.error] if run.error and not run.active else warnings:
        said = {name: redacted(record.get(name) or "") for name in ("code", "message", "hint")}
        change = dict(record.get("change") or {})
        key = said["code"] if change else said["message"]
        found[key] = {**said, "change": change, "again": change_in_words(change)}
    return list(found.values())


def _news(store: RunStore, view: Run, start: int, curve: str) -> dict[str, Any]:
    """whole: these records are all that hold, since an attempt said anew what the caller has seen."""
    records: Sequence[Mapping[str, Any]] = store.events(view.id, start)
    seen = start + len(records)
    whole = start > 0 and any(one["type"] == "Started" and one.get("attempt", 1) > 1 for one in records)
    if whole or start == 0:
        everything = store.events(view.id)
        records, seen = standing(everything), len(everything)
    said: dict[str, list[Mapping[str, Any]]] = {name: [] for name in EVENTS}
    for record in records:
        said[record["type"]].append(record)
    metrics, losses = said["Metric"], curve == "train_loss"
    news: dict[str, Any] = {
        "next": seen,
        "whole": whole,
        "state": view.status,
        "step": view.step,
        "steps": view.steps,
        "latest": {name: _rounded(value) for name, value in view.latest.items() if name in TILES},
        "note": redacted(view.note),
        "own": True,
        "brought": view.brought,
        "discarded": view.discarded,
        "shared": view.shared,
        "place": store.position(view.id) if view.status == "queued" else 0,
        "adapter": view.has_adapter,
        "train": _curve(metrics, curve),
        "heldout": _curve(metrics, "heldout_loss") if losses else ([], []),
        "general": _curve(metrics, "general_loss") if losses else ([], []),
        "samples": [{name: record[name] for name in SAMPLED} for record in said["Sample"]],
        "saved": [record["step"] for record in said["Saved"]][-1:],
        "probe": [{name: _rounded(record[name]) for name in PROBED} for record in said["Probed"]][-1:],
    }
    if start == 0 or said["Warned"] or not view.active:
        news["findings"] = advice(store, view)
    if start == 0:
        news["about"] = _about(view)
    if learned := said["Learned"]:
        news["learned"] = {name: learned[-1][name] for name in LEARNED} | {"ranks": other_ranks(view)}
    if not view.active:
        news |= {"error": view.error, "summary": {name: _rounded(value) for name, value in view.summary.items()}}
        news["resumable"] = view.resumable and not _would_repeat(view)
    return news


def _would_repeat(run: Run) -> bool:
    """Whether a resumed run would only fail in the same way, at the same step; memory may be free by then."""
    error = run.error or {}
    return bool(error.get("change")) and error["code"] != "E_MEMORY"


def _curve(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float | None]]:
    points = [(one["step"], one["values"][name]) for one in metrics if name in one["values"]]
    steps, values = thin([step for step, _ in points], [value for _, value in points])
    return steps, [_rounded(value) for value in values]


def _about(run: Run) -> dict[str, Any]:
    config = run.config
    base = config.model.rstrip("/").rsplit("/", 1)[-1]
    parts = [base, BROUGHT if run.brought else config.dataset.name, method_in_words(config.method)]
    if run.labels:
        parts.append(f"{len(run.labels)} labels")
    return {"name": run.name or run.id[:8], "line": " · ".join(parts), "estimate": _estimate(run)}


def _estimate(run: Run) -> dict[str, float]:
    """What was forecast before launch; {} where nothing was."""
    known = run.facts.get("estimate") or {}
    figures = {"seconds": known.get("seconds"), "memory_bytes": (known.get("memory_bytes") or {}).get("peak")}
    return {name: _rounded(value) for name, value in figures.items() if value}


def method_in_words(method: Method) -> str:
    """rank 8 on q+v, or what another method is called and how wide it is."""
    if isinstance(method, LoraSpec):
        kind = "" if method.variant == "lora" else f"{method.variant}, "
        return f"{kind}rank {method.rank} on {short(method.targets)}"
    return ", ".join(filter(None, [BASELINES[method.kind][0], width_in_words(method)]))


def _changed_runs(store: RunStore, known: Any) -> dict[str, Any]:
    """The newest runs when any came, went or changed its state or name; else only how far the active ones are.

    Active ones are among them however old they are; more: how many are not.
    """
    runs = store.list()
    token = hashlib.sha256("".join(f"{run.id}{run.status}{run.name}" for run in runs).encode()).hexdigest()[:16]
    if token == known:
        return {"active": [{"id": run.id, "step": run.step, "steps": run.steps} for run in runs if run.active]}
    shown = [run for place, run in enumerate(runs) if place < LISTED or run.active]
    return {"token": token, "runs": [_entry(run) for run in shown], "more": len(runs) - len(shown)}


def _entry(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "name": run.name or run.id[:8],
        "state": run.status,
        "step": run.step,
        "steps": run.steps,
        "loss": _rounded(run.summary.get("best_loss")),
        "verdict": run.verdict,
        "reason": BROUGHT if run.brought else (run.error or {}).get("message", ""),
    }


def id_of(run: Any) -> str:
    if not isinstance(run, str) or not ID.fullmatch(run):
        raise StudioError("E_RUN_NOT_FOUND", "There is no such run.", "The run list shows the runs.")
    return run


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def run_label(run: Run) -> str:
    """A run in the dropdowns: its name and how it stands."""
    loss = run.summary.get("best_loss")
    state = f"held-out loss {loss:.3g}" if loss is not None else BROUGHT if run.brought else run.status
    return f"{run.name or run.id[:8]} · {state}"
