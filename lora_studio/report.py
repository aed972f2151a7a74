"""A run as one HTML file that opens anywhere, without this app and without a network.

The file has no script and no address, and its own policy forbids both, should a text ever become markup after all.
Whatever a person, a model or a file said goes through `said`. It quotes rows, so only who may read these is given one.
"""

import contextlib
import html
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from lora_studio.card import command_line
from lora_studio.core import analysis
from lora_studio.core.lora import Factors
from lora_studio.core.spec import BASELINES, BaselineSpec
from lora_studio.drawings import Line, bars, curve, figure, heat, smooth, spread
from lora_studio.errors import StudioError, quote, redacted
from lora_studio.fields import knobs
from lora_studio.runs.config import Run

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
MADE_BY = "LoRA Studio report"  # in every report; says that a file is ours
STYLE = Path(__file__).with_suffix(".css")
TEXT = 800  # characters of one text that are shown
MOMENTS = 12  # of a sample's timeline
EVALUATIONS = 40  # in the table of figures
LIBRARIES = ("torch", "transformers", "safetensors", "gradio")
VERDICTS = {"learnt": "good", "broken": "bad"}
SCORES = {"exact_match": "Exact match", "accuracy": "Accuracy", "rouge_l": "ROUGE-L", "bleu": "BLEU"}
NONE = "–"
STATES = {"lost": "broken off", "stopped": "stopped and kept", "queued": "waiting"}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """All that a report is made of, apart from the run itself."""

    records: Sequence[Mapping[str, Any]]  # of the journal, those that hold
    data: Mapping[str, Any] | None = None  # studio.Inspection.as_json; None where the rows are gone
    update: Sequence[Factors] = ()  # of a LoRA adapter
    machine: str = ""  # on which the report is made
    now: float = 0.0  # seconds since the epoch


def page(run: Run, shown: Shown) -> str:
    """The whole file; tokens that somebody wrote are not in it."""
    parts = [
        _head(run),
        _result(run, shown.records),
        _learned(shown.records),
        _curves(run, shown.records),
        _timeline(run, shown.records),
        _costs(run, shown.records),
        _update(shown.update),
        _data(run, shown),
        _settings(run),
        _made(run, shown),
    ]
    name = said(run.name or run.id[:8])
    return redacted(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<meta name='generator' content='{MADE_BY}'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'><meta name='referrer' content='no-referrer'>"
        f"<link rel='icon' href='data:,'><title>{name} · {MADE_BY}</title>"
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def write(text: str, to: Path) -> Path:
    """Write a report to a new file, or over an earlier report. Raises E_EXISTS and E_WRITE."""
    part = to.with_name(f".{to.name}.part")
    try:
        if to.exists() and MADE_BY.encode() not in to.read_bytes()[:1000]:
            raise StudioError("E_EXISTS", f"{quote(str(to))} is there and is no report.", "Give another name.")
        part.write_text(text, encoding="utf-8", errors="replace")
        return part.replace(to)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        message = f"{quote(str(to))} cannot be written: {error.strerror}."
        raise StudioError("E_WRITE", message, "Give a file in a folder that is there.") from error


def said(text: object, most: int = TEXT) -> str:
    """Somebody's words as text of the page: escaped, and not without end."""
    words = str(text)
    return html.escape(words if len(words) <= most else f"{words[:most]}…")


# ---- sections ----------------------------------------------------------------------------------------------------


def _head(run: Run) -> str:
    config = run.config
    made = "brought along, made elsewhere" if run.brought else config.dataset.name
    line = " · ".join(said(part) for part in (config.model.rstrip("/").rsplit("/", 1)[-1], made, _method(run)) if part)
    when = time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(run.created))
    state = STATES.get(run.status, run.status)
    return f"<header><h1>{said(run.name or run.id[:8])}</h1><p>{line}</p><p>Begun {when} · {state}</p></header>"


def _method(run: Run) -> str:
    method = run.config.method
    if isinstance(method, BaselineSpec):
        return BASELINES[method.kind][0]
    return f"{method.variant}, rank {method.rank} on {', '.join(method.targets)}"


def _result(run: Run, records: Sequence[Mapping[str, Any]]) -> str:
    """The figures that a run ends with; why it did not end well; what was noticed on the way."""
    found, started = {**run.latest, **run.summary}, _last(records, "Started")
    tiles = [
        ("Held-out loss", f"{_of(found.get('base_loss'))} → {_of(found.get('best_loss'))}"),
        ("Accuracy", f"{_of(found.get('base_accuracy'), _percent)} → {_of(found.get('best_accuracy'), _percent)}"),
        ("Best step", _of(found.get("best_step"), lambda step: f"{step:,.0f} of {run.step:,}")),
        ("Time", _of(found.get("seconds"), _duration)),
        ("Memory", _of(found.get("memory_bytes"), _size)),
        ("Tokens/s", _of(found.get("tokens_per_s"))),
        ("Trained parameters", _of(started.get("trainable"), lambda count: f"{count:,}")),
        ("Share of the model", _of(started.get("trainable"), lambda count: f"{100 * count / started['total']:.2g} %")),
    ]
    filled = "".join(f"<div><span>{name}</span><b>{value}</b></div>" for name, value in tiles if NONE not in value)
    notes = [*_notes(records), *([run.error] if run.error else [])]
    warned = "".join(
        f"<p class='warned'><b>{said(n.get('message'))}</b> {said(n.get('hint') or '')}</p>" for n in notes
    )
    return _section("Result", (f"<div class='tiles'>{filled}</div>" if filled else "") + warned)


def _notes(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each warning once."""
    told = [one for one in records if one["type"] == "Warned" and str(one.get("code")).startswith("W_")]
    return list({str(one.get("message")): one for one in told}.values())


def _learned(records: Sequence[Mapping[str, Any]]) -> str:
    """The verdict, what it rests on, and rows before and after; nothing for runs that have no such record."""
    told = _last(records, "Learned")
    if not told:
        return ""
    kind = VERDICTS.get(str(told.get("verdict")), "")
    parts = [f"<p class='verdict {kind}'>{said(told.get('sentence', ''))}</p>"]
    parts += [f"<p class='soft'>{said(told['advice'])}</p>"] if told.get("advice") else []
    names = {"train": "Rows it trained on", "heldout": "Held-out rows", "general": "General text"}
    losses = [
        [names.get(part, str(part)), *(_of(value) for value in pair)]
        for part, pair in (told.get("losses") or {}).items()
        if len(pair) == 2
    ]
    parts += [_table(["Loss on", "Base", "Adapted"], losses)] if losses else []
    if metric := told.get("metric"):
        parts.append(f"<p class='soft'>{_score(metric)}</p>")
    parts += [_row(row) for row in told.get("rows") or ()]
    return _section("Did it learn?", "".join(parts))


def _score(metric: Mapping[str, Any]) -> str:
    name = SCORES.get(str(metric.get("name")), str(metric.get("name")))
    of = "the difference" if metric.get("interval") == "paired bootstrap" else "the adapted share"
    between = f"{_of(metric.get('low'), _percent)} to {_of(metric.get('high'), _percent)}"
    before, after = (_of(metric.get(side), _percent) for side in ("base", "adapted"))
    rows = f"{metric.get('rows')} held-out rows"
    return said(f"{name} on {rows}: {before} before, {after} after; 95 % interval of {of}: {between}.")


def _row(row: Mapping[str, Any]) -> str:
    where = "A row it trained on" if row.get("part") == "train" else "A held-out row"
    losses = f": loss {_of(row.get('base_loss'))} before, {_of(row.get('loss'))} after"
    lines = [("Prompt", row.get("prompt")), ("Wanted", row.get("target"))]
    lines += [("Base", row.get("base")), ("Adapted", row.get("adapted"))]
    return f"<article><h3>{where}{losses}</h3>{_pairs(lines)}</article>"


def _curves(run: Run, records: Sequence[Mapping[str, Any]]) -> str:
    train = _series(records, "train_loss")
    held, general = _series(records, "heldout_loss"), _series(records, "general_loss")
    mean = smooth([loss for _, loss in train], run.steps)
    lines = [
        Line(name="training, each batch", points=train, look="faint"),
        Line(
            name="training, smoothed",
            points=[(at[0], loss) for at, loss in zip(train, mean, strict=True)],
            look="strong",
        ),
        Line(name="held out", points=held, look="held", dots=True),
        Line(name="general text", points=general, look="general", dots=True),
    ]
    drawn = curve(lines, across="step", up="loss, nats", label="Training and held-out loss by step")
    measured = {"held out": dict(held), "general text": dict(general), "accuracy": dict(_series(records, "accuracy"))}
    measured = {name: points for name, points in measured.items() if points}
    at = spread(sorted({step for points in measured.values() for step in points}), EVALUATIONS)
    rows = [[f"{step:,.0f}", *(_of(points.get(step)) for points in measured.values())] for step in at]
    table = _table(["Step", *measured], rows) if rows else ""
    return _section("Loss", drawn + (f"<details><summary>The figures</summary>{table}</details>" if table else ""))


def _series(records: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """One figure by step, rising; what is no number is left out."""
    found = {
        float(record["step"]): record["values"][name]
        for record in records
        if record["type"] == "Metric" and isinstance(record["values"].get(name), int | float)
    }
    return sorted((step, float(value)) for step, value in found.items() if math.isfinite(value))


def _timeline(run: Run, records: Sequence[Mapping[str, Any]]) -> str:
    """Each prompt with its answers over the steps; equal ones that follow each other stand once."""
    samples = sorted((one for one in records if one["type"] == "Sample"), key=lambda one: (one["index"], one["step"]))
    cards = ""
    for _, group in groupby(samples, key=lambda one: one["index"]):
        own = list({one["step"]: one for one in group}.values())
        lines: list[tuple[str, Any]] = [("Prompt", own[0]["prompt"]), ("Wanted", own[0]["target"])]
        for text, same in groupby(spread(own, MOMENTS), key=lambda one: one["text"]):
            steps = [one["step"] for one in same]
            until = f" to {steps[-1]:,}" if len(steps) > 1 else ""
            wanted = own[0]["target"].strip()
            met = text.strip() == wanted or (run.labels and text.startswith(f"{wanted} ("))  # a label has its chance
            name = "Base model" if steps == [0] else f"Step {steps[0]:,}{until}"
            lines.append((f"{name} ✓" if met else name, text))
        cards += f"<article>{_pairs(lines)}</article>"
    return _section("Held-out prompts, answered while it trained", cards)


def _costs(run: Run, records: Sequence[Mapping[str, Any]]) -> str:
    """What was said before and what it was."""
    known, probe = run.facts.get("estimate") or {}, _last(records, "Probed")
    found = {**run.latest, **run.summary}
    memory = ((known.get("memory_bytes") or {}).get("peak"), probe.get("memory_bytes"), found.get("memory_bytes"))
    seconds = known.get("seconds"), probe.get("seconds"), found.get("seconds")
    if not any(memory + seconds):
        return ""
    rows = [["Memory", *(_of(one, _size) for one in memory)], ["Time", *(_of(one, _duration) for one in seconds)]]
    rows[1][-1] += f" for {run.step:,} of {run.steps:,} steps" if run.step < run.steps else ""
    return _section("Estimated and measured", _table(["", "Estimated", "Probe step", "The run"], rows))


def _update(update: Sequence[Factors]) -> str:
    """How much each matrix changed and in how many directions, from the adapter's factors alone."""
    if not update:
        return ""
    spectra = {one.layer: analysis.spectrum(one) for one in update}
    strongest, most = max(spectra.items(), key=lambda item: item[1].norm)
    if not most.norm:
        return _section("What the update looks like", "<p class='soft'>No matrix was changed.</p>")
    cells = {
        _place(layer): (
            one.norm,
            f"{layer}: size {figure(one.norm)}, effective rank {one.effective_rank:.1f} of {len(one.S)}",
        )
        for layer, one in spectra.items()
    }
    values, needed = most.S.tolist(), most.rank_keeping(0.99)
    titles = [f"direction {place}: {figure(value)}" for place, value in enumerate(values, start=1)]
    holds = f"{needed} of {len(values)} directions hold 99 % of it"
    parts = [
        f"<p class='soft'>The size ‖ΔW‖ of the change of every matrix, up to {figure(most.norm)}: the fuller the",
        " colour, the more it changed. A column that stays pale was hardly used.</p>",
        f"<div class='wide' tabindex='0'>{heat(dict(sorted(cells.items(), key=_layer_of)), corner='layer')}</div>",
        f"<h3>The matrix that changed most, <code>{said(strongest)}</code>: {holds}</h3>",
        bars(values, titles, strong=needed, label=f"Singular values: {holds}"),
        f"<div class='ends'><span>first, {figure(values[0])}</span><span>last, {figure(values[-1])}</span></div>",
    ]
    return _section("What the update looks like", "".join(parts))


def _layer_of(cell: tuple[tuple[str, str], Any]) -> tuple[int, str]:
    row = cell[0][0]
    return (int(row), "") if row.isdecimal() else (-1, row)


def _place(layer: str) -> tuple[str, str]:
    """model.layers.3.self_attn.q_proj stands in row 3, column self_attn.q_proj."""
    parts = layer.split(".")
    at = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return ("outside", parts[-1]) if at is None else (parts[at], ".".join(parts[at + 1 :]))


def _data(run: Run, shown: Shown) -> str:
    """What was read of the rows."""
    if run.brought:
        origin = run.facts["origin"]
        rows = [["Where it comes from", "made elsewhere and brought along"]]
        rows += [["Base, as its files call it", said(origin["base_model"] or "not named")]]
        return _section("Origin", _table([], [*rows, ["Fingerprint of its weights", said(origin["sha256"])]]))
    choice, started, data = run.config.dataset, _last(shown.records, "Started"), shown.data
    rows = [["Name", said(choice.name)], ["Fingerprint", f"<code>{said(choice.id)}</code>"]]
    if data is None:
        split = f"{started['train_rows']:,} / {started['heldout_rows']:,}" if started else "–"
        gone = "<p class='soft'>The rows are no longer here, or cannot be read, so there is no more to say of them.</p>"
        return _section("Data", _table([], [*rows, ["Trained on / held out", split]]) + gone)
    tokens, histogram = data["tokens"], data["histogram"]
    rows += [
        ["Format", said(data["format"])],
        ["Columns", said(", ".join(f"{role} from “{column}”" for role, column in data["columns"].items()))],
        ["Rows", f"{data['rows']:,}"],
        ["Trained on / held out", f"{data['train']:,} / {data['heldout']:,}"],
        ["Tokens, median / 95 % / longest", f"{tokens['median']:,} / {tokens['p95']:,} / {tokens['max']:,}"],
        ["Tokens that are learnt from", f"{data['supervised_tokens']:,}"],
        [f"Cut at {run.config.train.max_length:,} tokens", f"{data['cut']:,}"],
    ]
    width = (tokens["max"] + 1) / max(1, len(histogram))
    spans = [f"{width * place:.0f} to {width * (place + 1):.0f} tokens" for place in range(len(histogram))]
    titles = [f"{count:,} rows of {span}" for count, span in zip(histogram, spans, strict=True)]
    drawn = bars(histogram, titles, label="Rows by their length in tokens")
    ends = f"<div class='ends'><span>0</span><span>tokens per row</span><span>{tokens['max']:,}</span></div>"
    warned = "".join(f"<li>{said(note)}</li>" for note in data["warnings"])
    notes = f"<ul class='soft'>{warned}</ul>" if warned else ""
    return _section("Data", f"{_table([], rows)}<h3>Lengths</h3>{drawn}{ends}{notes}")


def _settings(run: Run) -> str:
    """The command that repeats it, and every setting; what differs from the default is strong."""
    config = run.config
    rows = [["Base model", said(config.model)], ["Revision", said(run.revision or "unknown")]]
    for part in () if run.brought else (config.method, config.train):
        for name, setting in knobs(type(part)).items():
            value = getattr(part, name)
            shown = said(_word(value))
            label = f"<span title='{html.escape(setting.help)}'>{html.escape(setting.label)}</span>"
            rows.append([label, shown if value == setting.default else f"<b>{shown}</b>"])
    again = "To bring it along again" if run.brought else "To repeat it"
    line = f"<p class='soft'>{again}, where LoRA Studio is installed:</p><pre>{said(command_line(run), 4000)}</pre>"
    every = f"<details><summary>Every setting; what was changed is bold</summary>{_table([], rows)}</details>"
    return _section("Settings", line + every)


def _made(run: Run, shown: Shown) -> str:
    started = _last(shown.records, "Started")
    rows = [["Run", f"<code>{said(run.id)}</code>"]]
    if started:
        rows.append(["Trained on", said(f"{started.get('device')}, base in {started.get('precision')}")])
    rows += [
        ["Report made", time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(shown.now))],
        ["on", said(f"{shown.machine} · {platform.system()} {platform.machine()}")],
        ["with", said(", ".join([f"Python {platform.python_version()}", *_versions()]))],
    ]
    return _section("Machine and versions", _table([], rows))


def _versions() -> list[str]:
    found = []
    for library in LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return found


# ---- pieces ------------------------------------------------------------------------------------------------------


def _section(title: str, inside: str) -> str:
    """A part of the page; nothing where nothing is inside."""
    return f"<section><h2>{title}</h2>{inside}</section>" if inside else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """heads and cells are HTML; the first cell of a row names it."""
    head = "".join(f"<th scope='col'>{one}</th>" for one in heads)
    body = "".join(
        f"<tr><th scope='row'>{first}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for first, *cells in rows
    )
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if heads else ''}<tbody>{body}</tbody></table>"


def _pairs(lines: Iterable[tuple[str, Any]]) -> str:
    """Names and what was said; what nobody said is left out."""
    spoken = [(name, said(text) or "(nothing)") for name, text in lines if text is not None]
    return "<dl>{}</dl>".format("".join(f"<dt>{said(name)}</dt><dd class='text'>{text}</dd>" for name, text in spoken))


def _last(records: Iterable[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    """The newest record of a kind; {} where there is none."""
    return next((record for record in reversed([*records]) if record["type"] == kind), {})


def _of(value: Any, words: Callable[[Any], str] = figure) -> str:
    """A figure in words; NONE where there is none."""
    return words(value) if isinstance(value, int | float) and math.isfinite(value) else NONE


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _size(count: float) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={number}" for name, number in value.items()) or "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "all"
    return f"{value:g}" if isinstance(value, float) else str(value)
