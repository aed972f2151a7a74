"""Tab 1: bring a dataset, correct what was guessed of it, and see which tokens will be learnt.

The rest of the page knows the dataset by its choice: {"id", "name", "format", "columns"}, as DataChoice has it,
where format and columns hold only what the person has corrected.
"""

import html
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

from lora_studio.data.formats import FORMATS
from lora_studio.data.library import SAMPLES, Dataset
from lora_studio.data.readers import EXTENSIONS
from lora_studio.errors import StudioError
from lora_studio.limits import MIB, Limits
from lora_studio.runs.config import DataChoice
from lora_studio.settings import TrainConfig
from lora_studio.studio import Inspection
from lora_studio.ui.boundary import as_html, problem_instead, problem_last
from lora_studio.ui.desk import Desk
from lora_studio.ui.form import training

SLOTS = max(len(format.roles) + len(format.optional) for format in FORMATS.values())
PREVIEW_CHARACTERS = 6_000
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
    on: gr.Button
    choice: gr.State
    row: gr.State


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
                on = gr.Button("Next row", size="sm", min_width=110)
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
        on,
        gr.State(None),
        gr.State(0),
    )


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
    return choice, gr.Column(visible=True), format, *slot_updates(dataset, format, columns), 0


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
                label=f"{role.capitalize()} column",
                visible=True,
            )
        )
    return updates + [gr.Dropdown(visible=False)] * (SLOTS - len(updates))


@problem_last(OPENED)
def change_format(desk: Desk, choice: dict[str, Any] | None, format: str) -> tuple[Any, ...]:
    """The columns that the other format would take by their names; the person corrects the rest."""
    dataset = desk.studio.data.get(_chosen(choice).id)
    columns = desk.studio.data.mapping(dataset, format)
    new = {**(choice or {}), "format": "" if format == dataset.format else format, "columns": {}}
    return new, gr.skip(), gr.skip(), *slot_updates(dataset, format, columns), 0


@problem_last(1)
def change_columns(desk: Desk, choice: dict[str, Any] | None, *slots: str | None) -> dict[str, Any]:
    """The choice with the columns that the person picked."""
    chosen = _chosen(choice)
    format = FORMATS[chosen.format or desk.studio.data.get(chosen.id).format]
    columns = {role: column for role, column in zip((*format.roles, *format.optional), slots, strict=False) if column}
    return {**(choice or {}), "columns": columns}


# ---- handlers: what a model sees of it ---------------------------------------------------------------------------


def inspect(
    desk: Desk,
    choice: dict[str, Any] | None,
    model: str,
    max_length: Any,
    holdout: Any,
    seed: Any,
    task: str = "causal",
) -> tuple[str, Any]:
    """Title, warnings, figures and histogram of the chosen dataset under the chosen model; and whether to page."""
    if not choice:
        return EMPTY, gr.Row(visible=False)
    try:
        config = training({"max_length": max_length, "holdout": holdout, "seed": seed})
        seen = desk.ready(model).inspect(_chosen(choice), model, config, task)
        return understood(seen, config), gr.Row(visible=True)
    except Exception as error:
        return f"<h3>{html.escape(str(choice.get('name')))}</h3>{as_html(error)}", gr.Row(visible=False)


@problem_instead
def show_row(
    desk: Desk, choice: dict[str, Any] | None, row: int, model: str, max_length: Any, task: str = "causal"
) -> str:
    """One row as the model will see it, the trained tokens coloured."""
    if not choice:
        return ""
    length = max_length if isinstance(max_length, int) and max_length > 0 else TrainConfig().max_length
    return preview(desk.ready(model).preview(_chosen(choice), row, model, length, task), row)


def turn(desk: Desk, by: int, choice: dict[str, Any] | None, row: int) -> int:
    """The row before or after, around at the ends."""
    return (row + by) % desk.studio.data.get(choice["id"]).rows if choice else 0


# ---- HTML out of plain values ------------------------------------------------------------------------------------


def understood(seen: Inspection, config: TrainConfig) -> str:
    """The right-hand card's head."""
    lengths = seen.lengths
    share = f" <small>({lengths.cut / seen.rows:.1%})</small>" if lengths.cut else ""
    tiles = [
        ("Examples", f"{seen.rows:,}"),
        ("Train / held out", f"{seen.train:,} / {seen.heldout:,}"),
        ("Tokens, median / 95 %", f"{lengths.median:,} / {lengths.p95:,}"),
        (f"Cut at {config.max_length:,} tokens", f"{lengths.cut:,}{share}"),
    ]
    notes = [*seen.dataset.warnings, *seen.warnings]
    warned = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f"<h3>{html.escape(seen.dataset.name)}</h3>"
        f"<p class='soft'>{html.escape(_about(seen))}</p>"
        + (f"<ul class='warned'>{warned}</ul>" if warned else "")
        + "<div class='tiles'>"
        + "".join(f"<div><span>{label}</span><b>{value}</b></div>" for label, value in tiles)
        + "</div>"
        + histogram(lengths.histogram, lengths.max)
    )


def histogram(bins: Sequence[int], longest: int) -> str:
    """How many examples have how many tokens, as bars."""
    if not bins:
        return ""
    top = max(bins) or 1
    width = (longest + 1) / len(bins)
    bars = "".join(
        f"<i style='height:{max(100 * count / top, 1.5 if count else 0):.0f}%'"
        f" title='{count:,} examples of {width * place:.0f} to {width * (place + 1):.0f} tokens'></i>"
        for place, count in enumerate(bins)
    )
    return (
        f"<div class='bars' role='img' aria-label='Histogram of the tokens per example, up to {longest:,}'>{bars}</div>"
        f"<div class='axis'><span>0</span><span>tokens per example</span><span>{longest:,}</span></div>"
    )


def preview(pieces: Sequence[Any], row: int) -> str:
    """data.batches.Piece after Piece: what is context, what is trained, what is cut; every text escaped."""
    spans, shown = [], 0
    for kind, run in groupby(pieces, key=lambda piece: piece.kind):
        text = "".join(piece.text for piece in run)
        room = PREVIEW_CHARACTERS - shown
        shown += len(text)
        spans.append(f"<span class='{kind}'>{html.escape(text[: max(room, 0)])}</span>")
    more = "<span class='soft'> …</span>" if shown > PREVIEW_CHARACTERS else ""
    trained = sum(piece.kind == "trained" for piece in pieces)
    legend = "".join(
        f"<span class='{kind}'>{label}</span>"
        for kind, label in (("context", "read only"), ("trained", "learnt"), ("cut", "cut off"))
    )
    return (
        f"<div class='preview-head'><h4>What the model sees of row {row + 1}</h4>"
        f"<span class='soft'>{trained:,} of {len(pieces):,} tokens are learnt</span>"
        f"<span class='legend'>{legend}</span></div>"
        f"<div class='rendered' tabindex='0' aria-label='Rendered row'>{''.join(spans)}{more}</div>"
    )


def _about(seen: Inspection) -> str:
    columns = ", ".join(f"{role} from “{column}”" for role, column in seen.columns.items())
    return f"{FORMATS[seen.format].label}: {columns}"


def _chosen(choice: Mapping[str, Any] | None) -> DataChoice:
    if not choice:
        raise StudioError("E_NO_DATA", "No dataset is chosen.", "Take an example in the Data tab, or bring a file.")
    return DataChoice(**choice)
