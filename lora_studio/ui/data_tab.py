"""Tab 1: bring a dataset, correct what was guessed of it, and see its health and which tokens will be learnt.

The rest of the page knows the dataset by its choice: {"id", "name", "format", "columns"}, as DataChoice has it,
where format and columns hold only what the person has corrected.
"""

import html
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

from lora_studio import charts
from lora_studio.data.formats import FORMATS, LEFT_OUT, REPEATED
from lora_studio.data.health import LIMITS, Health
from lora_studio.data.library import SAMPLES, Dataset
from lora_studio.data.readers import EXTENSIONS
from lora_studio.errors import StudioError
from lora_studio.limits import MIB, Limits
from lora_studio.results import Inspection
from lora_studio.runs.config import DataChoice
from lora_studio.settings import TrainConfig
from lora_studio.ui import figure
from lora_studio.ui.boundary import as_html, problem_instead, problem_last
from lora_studio.ui.desk import Desk, data_choice
from lora_studio.ui.form import SETTINGS, training
from lora_studio.ui.terms import term

SLOTS = max(len(format.roles) + len(format.optional) for format in FORMATS.values())
CALLED = {"completion": "answer", "output": "answer"}  # a role of a column, on the page
PREVIEW_CHARACTERS = 100_000
NO_COLUMN = ("none", "")
EMPTY = "<div class='empty'><b>Nothing chosen yet.</b> Take an example with one click, or bring your own data.</div>"


@dataclass(frozen=True)
class DataTab:
    """The components that events join."""

    samples: dict[str, gr.Button]
    upload: gr.File
    paste: gr.Textbox
    paste_button: gr.Button
    hub: gr.Textbox
    hub_button: gr.Button
    used: gr.Dropdown
    problem: gr.HTML
    correction: gr.Column
    format: gr.Dropdown
    slots: tuple[gr.Dropdown, ...]
    go_on: gr.Button
    understood: gr.HTML
    preview: gr.HTML
    pager: gr.Row
    back: gr.Button
    row: gr.Number
    on: gr.Button
    health: gr.Row
    lengths: gr.HTML
    labels: gr.HTML
    labels_line: gr.HTML
    limit: gr.Slider
    costs: gr.HTML
    use_limit: gr.Button
    choice: gr.State

    @property
    def seen(self) -> list[Any]:
        """What shows a dataset under a model, SEEN of them."""
        own = [self.understood, self.pager, self.health, self.lengths, self.labels, self.labels_line]
        return [*own, self.limit, self.costs]


def build(limits: Limits) -> DataTab:
    """Left: where rows come from and what their columns mean. Right: what a model will see of them."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300, elem_classes="card"):
            gr.HTML("<h3>Start from an example</h3>", apply_default_css=False)
            with gr.Column(elem_classes="samples-row"):
                samples = {
                    name: gr.Button(f"{sample.title}\n{sample.about}", elem_classes="sample", elem_id=f"sample-{name}")
                    for name, sample in SAMPLES.items()
                }
            sources = _sources(limits)
            problem = gr.HTML("", apply_default_css=False, elem_id="data-problem")
            with gr.Column(visible=False, elem_classes="correction") as correction:
                format = gr.Dropdown(
                    [(format.label, format.name) for format in FORMATS.values()],
                    label="Format",
                    info="Guessed; correct it here",
                    elem_id="format",
                )
                with gr.Row():
                    slots = tuple(gr.Dropdown([], label=f"Column {number}", min_width=130) for number in range(SLOTS))
            go_on = gr.Button("Continue to training", variant="primary", elem_id="continue")
        with gr.Column(scale=7, min_width=300, elem_classes="card"):
            understood = gr.HTML(EMPTY, apply_default_css=False, elem_id="understood")
            preview = gr.HTML("", apply_default_css=False, elem_id="preview")
            with gr.Row(visible=False, elem_classes="pager", elem_id="pager") as pager:
                back = gr.Button("Previous row", size="sm", min_width=110)
                row = gr.Number(1, label="Row", precision=0, min_width=90, scale=0, elem_id="row")
                on = gr.Button("Next row", size="sm", min_width=110)
    with gr.Row(visible=False, equal_height=False, elem_id="health") as health:
        with gr.Column(min_width=300, elem_classes="card"):
            costs = _limit_card()
        with gr.Column(min_width=300, elem_classes="card"):
            gr.HTML("<h3>How long the rows are</h3>", apply_default_css=False)
            lengths = figure.build("Histograms of the rows by their tokens", "data-lengths")
            labels_line = gr.HTML("", apply_default_css=False, elem_id="data-labels-line")
            labels = figure.build("Rows of each label", "data-labels")
    return DataTab(
        samples,
        *sources,
        problem,
        correction,
        format,
        slots,
        go_on,
        understood,
        preview,
        pager,
        back,
        row,
        on,
        health,
        lengths,
        labels,
        labels_line,
        *costs,
        gr.State(None),
    )


def _limit_card() -> tuple[gr.Slider, gr.HTML, gr.Button]:
    """What a length limit would cost, and the button that sets it."""
    gr.HTML(
        "<h3>What the length limit costs</h3>"
        "<p class='soft'>A row longer than the limit loses its end, which is where an answer stands. Longer rows"
        " take more memory and time.</p>",
        apply_default_css=False,
    )
    setting = SETTINGS["max_length"]
    limit = gr.Slider(
        setting.min or 1,
        setting.default,
        value=setting.default,
        step=1,
        label="Try a limit",
        info="In tokens; shows what would be lost and changes nothing",
        elem_id="try-limit",
    )
    costs = gr.HTML("", apply_default_css=False, elem_id="limit-costs")
    return limit, costs, gr.Button("Use this limit", elem_id="use-limit")


def _sources(limits: Limits) -> tuple[gr.File, gr.Textbox, gr.Button, gr.Textbox, gr.Button, gr.Dropdown]:
    """A file, pasted text, a Hub id, or something that is kept here already."""
    with gr.Tabs(elem_id="sources"):
        with gr.Tab("Upload"):
            most = f"{limits.file_bytes // MIB:,} MB"
            gr.HTML(
                f"<p class='soft'>CSV, TSV, JSON, JSON lines, Parquet or text, up to {most}.</p>",
                apply_default_css=False,
            )
            upload = gr.File(
                label="Dataset file",
                file_types=sorted(EXTENSIONS),
                height=136,
                elem_id="upload",
                elem_classes="keep",
            )
        with gr.Tab("Paste"):
            paste = gr.Textbox(
                label="Rows as CSV, JSON or JSON lines",
                lines=5,
                max_lines=12,
                elem_id="paste",
                placeholder="prompt,answer",
            )
            paste_button = gr.Button("Use this text")
        with gr.Tab("Hub"):
            hub = gr.Textbox(label="Dataset on the Hugging Face Hub", placeholder="owner/name", elem_id="hub")
            hub_button = gr.Button("Fetch the first rows")
        with gr.Tab("Used before"):
            used = gr.Dropdown([], label="Datasets of this app", value=None, elem_id="used")
    return upload, paste, paste_button, hub, hub_button, used


# ---- handlers: bringing a dataset --------------------------------------------------------------------------------
# Each gives: choice, correction, format, one update per slot, row; the boundary adds the problem.

OPENED = 4 + SLOTS


@problem_last(OPENED)
def open_sample(desk: Desk, name: str) -> tuple[Any, ...]:
    return opened(desk.studio.data.add_sample(name))


@problem_last(OPENED)
def open_file(desk: Desk, path: str | None) -> tuple[Any, ...]:
    if not path:
        return (gr.skip(),) * OPENED
    studio = desk.studio
    with claimed(Path(path), studio.root) as file:
        return opened(studio.data.add(file))


@contextmanager
def claimed(path: Path, root: Path) -> Iterator[Path]:
    """An upload, taken out of the cache that all visitors share; gone when the block ends, however it does."""
    with tempfile.TemporaryDirectory(prefix="claimed-", dir=root) as own:
        try:
            file = Path(shutil.move(path, Path(own) / path.name))
        except FileNotFoundError:  # the same bytes have the same path, and somebody else was quicker
            raise StudioError("E_READ", "The file is no longer here.", "Upload it again.") from None
        with suppress(OSError):  # the folder's name is a hash of what was in it
            path.parent.rmdir()
        yield file


@problem_last(OPENED)
def open_text(desk: Desk, text: str) -> tuple[Any, ...]:
    return opened(desk.studio.data.add_text(text))


@problem_last(OPENED)
def open_hub(desk: Desk, repo: str) -> tuple[Any, ...]:
    return opened(desk.studio.data.add_hub(repo.strip()))


@problem_last(OPENED)
def open_used(desk: Desk, id: str | None) -> tuple[Any, ...]:
    return opened(desk.studio.data.get(id)) if id else (gr.skip(),) * OPENED


def opened(dataset: Dataset, chosen: DataChoice | None = None) -> tuple[Any, ...]:
    """The controls for a dataset, as guessed or as a run had chosen it."""
    corrected = {"format": chosen.format, "columns": dict(chosen.columns)} if chosen else {"format": "", "columns": {}}
    choice = {"id": dataset.id, "name": short_name(dataset), **corrected}
    format = corrected["format"] or dataset.format
    columns = corrected["columns"] or dataset.mapping
    return choice, gr.Column(visible=True), format, *slot_updates(dataset, format, columns), 1


def short_name(dataset: Dataset) -> str:
    """What a run calls its data: a sample's own name, so that the command line finds it again, else as it came."""
    return next((name for name, sample in SAMPLES.items() if sample.title == dataset.name), dataset.name)


def slot_updates(dataset: Dataset, format: str, columns: Mapping[str, str]) -> list[Any]:
    """One dropdown of columns per role of the format; the slots beyond are hidden."""
    needed, optional = FORMATS[format].roles, FORMATS[format].optional
    updates = []
    for role in (*needed, *optional):
        choices = [*([NO_COLUMN] if role in optional else []), *((name, name) for name in dataset.columns)]
        updates.append(
            gr.Dropdown(
                choices=choices,
                value=columns.get(role, "" if role in optional else None),
                label=f"{CALLED.get(role, role).capitalize()} column",
                visible=True,
            )
        )
    return updates + [gr.Dropdown(visible=False)] * (SLOTS - len(updates))


@problem_last(OPENED)
def change_format(desk: Desk, choice: dict[str, Any] | None, format: str) -> tuple[Any, ...]:
    """The columns that the other format would take by their names; the person corrects the rest."""
    dataset = desk.studio.data.get(data_choice(choice).id)
    columns = desk.studio.data.mapping(dataset, format)
    new = {**(choice or {}), "format": "" if format == dataset.format else format, "columns": {}}
    return new, gr.skip(), gr.skip(), *slot_updates(dataset, format, columns), 1


@problem_last(1)
def change_columns(desk: Desk, choice: dict[str, Any] | None, *slots: str | None) -> dict[str, Any]:
    """The choice with the columns that the person picked."""
    chosen = data_choice(choice)
    format = FORMATS[chosen.format or desk.studio.data.get(chosen.id).format]
    columns = {role: column for role, column in zip((*format.roles, *format.optional), slots, strict=False) if column}
    return {**(choice or {}), "columns": columns}


# ---- handlers: what a model sees of it ---------------------------------------------------------------------------


SEEN = 8  # outputs of inspect


def reading(choice: dict[str, Any] | None, shown: str) -> tuple[Any, ...]:
    """Until `inspect` has read a dataset that was chosen: its name, and nothing that is known of another.

    shown: what stands there; when that is the same dataset in another format, it stays.
    """
    hidden = gr.Row(visible=False), gr.Row(visible=False)
    if not choice:
        return EMPTY, *hidden
    head = f"<h3>{html.escape(str(choice.get('name')))}</h3>"
    if shown.startswith(head):
        return (gr.skip(),) * 3
    return f"{head}<p class='soft' role='status'>Reading its rows as the model will.</p>", *hidden


def inspect(
    desk: Desk,
    choice: dict[str, Any] | None,
    model: str,
    max_length: Any,
    holdout: Any,
    seed: Any,
    task: str = "causal",
) -> tuple[Any, ...]:
    """Everything that shows the chosen dataset under the chosen model: its health, and whether to page."""
    hidden = (gr.Row(visible=False), gr.Row(visible=False), *(gr.skip(),) * (SEEN - 3))
    if not choice:
        return EMPTY, *hidden
    try:
        config = training({"max_length": max_length, "holdout": holdout, "seed": seed})
        seen = desk.ready(model).inspect(data_choice(choice), model, config, task)
    except Exception as error:
        return f"<h3>{html.escape(str(choice.get('name')))}</h3>{as_html(error)}", *hidden
    health, limit = seen.health, config.max_length
    most = min(max(health.measured.tokens[-1], limit, *LIMITS), desk.limits.tokens)
    drawn = {name: one._asdict() for name, one in health.histograms().items()}
    return (
        understood(seen),
        gr.Row(visible=True),
        gr.Row(visible=True),
        figure.value(charts.token_lengths(drawn)),
        figure.value(charts.label_counts(health.labels)) if health.labels else {},
        labels_line(health),
        gr.Slider(maximum=most, value=limit),
        limit_costs(health, limit, limit),
    )


@problem_instead
def try_limit(
    desk: Desk,
    choice: dict[str, Any] | None,
    limit: Any,
    model: str,
    max_length: Any,
    holdout: Any,
    seed: Any,
    task: str = "causal",
) -> str:
    """What another length limit would cost, from lengths that were measured once."""
    if not choice:
        return ""
    config = training({"max_length": max_length, "holdout": holdout, "seed": seed})
    tried = training({"max_length": limit}).max_length
    health = desk.ready(model).inspect(data_choice(choice), model, config, task).health
    return limit_costs(health, tried, config.max_length)


def use_limit(limit: Any) -> Any:
    """The limit that was tried, for the Train tab."""
    return limit


@problem_instead
def show_row(
    desk: Desk, choice: dict[str, Any] | None, row: int, model: str, max_length: Any, task: str = "causal"
) -> str:
    """One row, by its number in the file, as the model will see it, the trained tokens coloured."""
    if not choice:
        return ""
    number = row if isinstance(row, int) else 1
    length = max_length if isinstance(max_length, int) and max_length > 0 else TrainConfig().max_length
    return preview(desk.ready(model).preview(data_choice(choice), number, model, length, task), number)


def turn(desk: Desk, by: int, choice: dict[str, Any] | None, row: int) -> int:
    """The number of the row before or after, around at the ends."""
    return ((row or 1) - 1 + by) % desk.studio.data.get(choice["id"]).rows + 1 if choice else 1


# ---- HTML out of plain values ------------------------------------------------------------------------------------


def understood(seen: Inspection) -> str:
    """The right-hand card's head: the verdict, then what it rests on."""
    health, lengths = seen.health, seen.lengths
    verdict = health.verdict(seen.limit)
    notes = [note for note in seen.notes if not note.endswith((LEFT_OUT, REPEATED))]  # those have figures
    warned = "".join(f"<li>{html.escape(note)}</li>" for note in (*seen.dataset.warnings, *notes))
    return (
        f"<h3>{html.escape(seen.dataset.name)}</h3>"
        f"<p class='soft'>{html.escape(_about(seen))}</p>"
        f"<p class='verdict-line' data-grade='{verdict.grade}'>{html.escape(verdict.sentence)}</p>"
        f"<p class='soft'>{html.escape(health.learnt(seen.limit))}</p>"
        + (f"<ul class='warned'>{warned}</ul>" if warned else "")
        + f"<div class='tiles'>{''.join(_tiles(health, lengths, seen.limit))}</div>"
    )


def _tiles(health: Health, lengths: Any, limit: int) -> Iterable[str]:
    yield _tile("Rows", f"{health.rows:,}")
    yield _tile("Train / held out", f"{health.train:,} / {health.heldout:,}")
    yield _tile("Left out, empty", f"{health.empty:,}")
    yield _tile("Duplicates", f"{health.duplicates:,}{_and_near(health.near_duplicates)}")
    yield _tile("Prompts on both sides", f"{health.shared_prompts:,}{_and_near(health.near_prompts)}")
    if health.shared_answers is not None:
        yield _tile("Answers on both sides", _with_share(health.shared_answers, health.heldout))
    yield _tile("Tokens, median / 95 %", f"{lengths.median:,} / {lengths.p95:,}")
    yield _tile("Cut", _with_share(health.cut(lengths), health.rows), f" at {limit:,} tokens")


def _tile(label: str, value: str, more: str = "") -> str:
    return f"<div><span>{term(label)}{more}</span><b>{value}</b></div>"


def _and_near(count: int) -> str:
    return f" <small>+ {count:,} near</small>" if count else ""


def _with_share(count: int, of: int) -> str:
    return f"{count:,} <small>({count / of:.1%})</small>" if count else f"{count:,}"


def limit_costs(health: Health, tried: int, used: int) -> str:
    """A table of what length limits take away: the usual ones, the one in use and the one that is tried."""
    learns = health.kind == "answers"
    what = {"answers": "Answers cut", "labels": "Texts cut", "documents": "Documents cut"}[health.kind]
    heads = ["Limit", what, "Learnt tokens lost" if learns else "Tokens lost", *["Nothing left"] * learns]
    rows = []
    for limit in sorted({*LIMITS, tried, used}):
        lengths = health.at(limit)
        lost, kept = (lengths.lost_supervised, lengths.supervised) if learns else (lengths.lost, lengths.total)
        cells = [_with_share(health.cut(lengths), health.rows), _with_share(lost, lost + kept)]
        cells += [f"{lengths.unsupervised:,}"] * learns
        named = " <small>in use</small>" * (limit == used)
        current = " aria-current='true'" * (limit == tried)
        values = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr{current}><th scope='row'>{limit:,}{named}</th>{values}</tr>")
    head = "".join(f"<th scope='col'>{one}</th>" for one in heads)
    return f"<table class='limits'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def labels_line(health: Health) -> str:
    """Which label is the most frequent and which the least."""
    if not health.labels:
        return ""
    (most, many), (least, few) = health.labels[0], health.labels[-1]

    def told(label: str, rows: int) -> str:
        return f"<b>{charts.text(label)}</b> ({rows:,}, {rows / health.rows:.1%})"

    spread = f"Most frequent: {told(most, many)}. Least: {told(least, few)}."
    spread = spread if many > few else f"Each has {few:,} rows."
    return f"<h4>{len(health.labels):,} labels</h4><p class='soft'>{spread}</p>"


def preview(pieces: Sequence[Any], row: int) -> str:
    """data.batches.Piece after Piece: what is context, what is trained, what is cut; every text escaped."""
    spans, shown = [], 0
    for kind, run in groupby(pieces, key=lambda piece: piece.kind):
        text = "".join(piece.text for piece in run)
        room = PREVIEW_CHARACTERS - shown
        shown += len(text)
        spans.append(f"<span class='{kind}'>{html.escape(text[: max(room, 0)])}</span>")
    more = f"<p class='soft'>{shown - PREVIEW_CHARACTERS:,} more characters</p>" if shown > PREVIEW_CHARACTERS else ""
    trained, cut = (sum(piece.kind == kind for piece in pieces) for kind in ("trained", "cut"))
    lost = f", {cut:,} are cut off" if cut else ""
    legend = "".join(
        f"<span class='{kind}'>{label}</span>"
        for kind, label in (("context", "read only"), ("trained", "learnt"), ("cut", "cut off"))
    )
    return (
        f"<div class='preview-head'><h4>What the model sees of row {row:,}</h4>"
        f"<span class='soft'>{trained:,} of {len(pieces):,} tokens are learnt{lost}</span>"
        f"<span class='legend'>{legend}</span></div>"
        f"<div class='rendered' tabindex='0' role='region' aria-label='Rendered row'>{''.join(spans)}</div>{more}"
    )


def _about(seen: Inspection) -> str:
    columns = ", ".join(f"{role} from “{column}”" for role, column in seen.columns.items())
    return f"{FORMATS[seen.format].label}: {columns}"
