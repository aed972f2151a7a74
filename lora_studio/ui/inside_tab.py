"""Tab 4: section 7 of the paper for one's own adapter, as pictures that say how to be read, and the rank dial."""

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_studio import charts
from lora_studio.core.spec import BASELINES, BaselineSpec
from lora_studio.errors import StudioError
from lora_studio.runs.config import Run
from lora_studio.ui import fetch, figure
from lora_studio.ui.boundary import OFFER, problem_instead, problem_last
from lora_studio.ui.desk import Desk
from lora_studio.ui.export_tab import proof_of
from lora_studio.ui.live import run_label
from lora_studio.ui.terms import term

ALONE = ""  # the choice of no second run
WHOLE, OF_A = "The whole update", "A alone, as the paper"
LOOKED = 12  # outputs that show one report
EMPTY = f"""<div class='empty'><b>Nothing is opened yet.</b><br>Choose a run that has trained, then press Look inside.
It shows which matrices changed, in how many directions, and whether a smaller rank would have done.<br>
{OFFER}</div>"""

READ_CHANGE = (
    "Bright cells changed most for the size of the weight that was there: at 1 % the update is a hundredth of it.",
    "A column that stays dark was hardly used; the next run may do without these matrices.",
)
READ_VALUES = (
    "Each bar is one direction in which the matrix was changed, and its height how strongly. Strong bars hold 99 %.",
    "A few tall bars and then nothing: this matrix needs fewer directions than the rank allows.",
)
READ_SIMILARITY = (
    "How much of the first i directions of one run lies within the first j of the other: 1 is all, 0 is none.",
    "They agree only where the left is brighter than the right, which is what chance gives. A keeps its random start,"
    " so runs with the same seed agree from the beginning.",
)
READ_CURVE = (
    "Each point keeps only the strongest directions of every matrix and measures the held-out loss anew.",
    "Rank 0 is the base model; the dotted line is the whole adapter, the ring the smallest rank that keeps 99 % of its"
    " gain.",
)
READ_AMPLIFICATION = (
    "How many times stronger the update is than what the weight itself does in the update's directions.",
    "In the table: more along ΔW than along random directions means that the base model knew them; less than along W,"
    " that it did not stress them.",
)


@dataclass(frozen=True)
class InsideTab:
    """The components that events join."""

    run: gr.Dropdown
    followed: gr.State  # as CompareTab's
    other: gr.Dropdown
    look: gr.Button
    summary: gr.HTML
    problem: gr.HTML
    results: gr.Column
    change: gr.HTML
    matrix: gr.Dropdown
    values: gr.HTML
    values_line: gr.HTML
    shared: gr.Column
    which: gr.Radio
    similarity: gr.HTML
    similarity_line: gr.HTML
    measure: gr.Button
    curve: gr.HTML
    curve_line: gr.HTML
    measured: gr.State  # the curve, as RankCurve.as_json
    rank: gr.Slider
    rank_line: gr.HTML
    download: gr.Button
    file: gr.HTML
    proof: gr.HTML  # of the smaller adapter that was downloaded last
    dial_problem: gr.HTML
    amplification: gr.HTML
    table: gr.HTML

    @property
    def chosen(self) -> list[Any]:
        """What names the report that is looked at."""
        return [self.run, self.other, self.matrix, self.which]

    @property
    def of_matrix(self) -> list[Any]:
        """What shows one matrix."""
        return [self.values, self.values_line, self.similarity, self.similarity_line]

    @property
    def looked(self) -> list[Any]:
        """What shows a whole report, LOOKED of them."""
        own = [self.summary, self.results, self.change, self.matrix, self.shared, self.amplification]
        return [*own, self.table, self.curve, self.curve_line, self.measured, self.rank_line, self.rank]


def build() -> InsideTab:
    """Above: which runs. Below: the pictures, once there is something to show."""
    with gr.Column(elem_classes="card"):
        with gr.Row(equal_height=False, elem_classes="pair"):
            run = gr.Dropdown([], label="Run", value=None, elem_id="inside-run", min_width=220)
            other = gr.Dropdown(
                [("none", ALONE)], label="Compare its directions with", value=ALONE, elem_id="inside-other"
            )
            look = gr.Button("Look inside", variant="primary", min_width=130, scale=0, elem_id="look-inside")
        problem = gr.HTML("", apply_default_css=False, elem_id="inside-problem")
        summary = gr.HTML(EMPTY, apply_default_css=False, elem_id="inside-summary")
    with gr.Column(visible=False, elem_id="inside-results") as results, gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            change = _picture("How much each matrix changed", "inside-change", READ_CHANGE)
            with gr.Column(elem_classes="card"):
                rank_parts = _dial()
        with gr.Column(min_width=300):
            with gr.Column(elem_classes="card"):
                matrix = gr.Dropdown([], label="Matrix", value=None, elem_id="inside-matrix")
                _head("Its directions, by strength")
                values = figure.build("Singular values of the update of one matrix", "inside-values")
                values_line = gr.HTML("", apply_default_css=False, elem_id="inside-values-line")
                _reading(READ_VALUES)
                with gr.Column(visible=False) as shared:
                    _head("The same directions in both runs")
                    which = gr.Radio(
                        [WHOLE, OF_A], value=WHOLE, label="Directions of", elem_id="inside-which", show_label=False
                    )
                    similarity = figure.build("Similarity of the directions of two runs", "inside-similarity")
                    similarity_line = gr.HTML("", apply_default_css=False, elem_id="inside-similarity-line")
                    _reading(READ_SIMILARITY)
            with gr.Column(elem_classes="card"):
                _head(f"What it {term('amplifies')}")
                amplification = figure.build("Amplification factor by layer and matrix", "inside-amplification")
                _reading(READ_AMPLIFICATION)
                with gr.Accordion("Table of norms", open=False):
                    table = gr.HTML("", apply_default_css=False, elem_id="inside-table")
    return InsideTab(
        run=run,
        followed=gr.State(""),
        other=other,
        look=look,
        summary=summary,
        problem=problem,
        results=results,
        change=change,
        matrix=matrix,
        values=values,
        values_line=values_line,
        shared=shared,
        which=which,
        similarity=similarity,
        similarity_line=similarity_line,
        amplification=amplification,
        table=table,
        **rank_parts,
    )


def _dial() -> dict[str, Any]:
    """The rank dial: measure, read, take the smaller adapter."""
    _head("Would a smaller rank do?")
    measure = gr.Button("Measure the held-out loss at smaller ranks", min_width=200, elem_id="measure-ranks")
    curve = figure.build("Held-out loss by the rank that is kept", "inside-curve")
    curve_line = gr.HTML("", apply_default_css=False, elem_id="inside-curve-line")
    _reading(READ_CURVE)
    with gr.Row(elem_classes="pair"):
        rank = gr.Slider(1, 2, 1, step=1, label="Rank", info="Directions to keep", elem_id="smaller-rank")
        download = gr.Button("Download the smaller adapter", min_width=200, elem_id="get-smaller")
    rank_line = gr.HTML("", apply_default_css=False, elem_id="smaller-rank-line")
    file = fetch.build("smaller-archive")
    proof = gr.HTML("", apply_default_css=False, elem_id="smaller-proof")
    problem = gr.HTML("", apply_default_css=False, elem_id="dial-problem")
    return {
        "measure": measure,
        "curve": curve,
        "curve_line": curve_line,
        "measured": gr.State({}),
        "rank": rank,
        "rank_line": rank_line,
        "download": download,
        "file": file,
        "proof": proof,
        "dial_problem": problem,
    }


def _picture(title: str, name: str, reading: Sequence[str]) -> gr.HTML:
    with gr.Column(elem_classes="card"):
        _head(title)
        made = figure.build(title, name)
        _reading(reading)
    return made


def _head(title: str) -> None:
    gr.HTML(f"<h3>{title}</h3>", apply_default_css=False)


def _reading(lines: Sequence[str]) -> None:
    gr.HTML("".join(f"<p class='soft reading'>{line}</p>" for line in lines), apply_default_css=False)


# ---- handlers ----------------------------------------------------------------------------------------------------


def list_others(desk: Desk, run: str | None, other: str | None) -> Any:
    """The runs that `run` can be compared with: LoRA on the same base."""
    runs = [one for one in desk.studio.runs.list() if one.has_adapter]
    chosen = next((one for one in runs if one.id == run), None)
    fitting = [one for one in runs if chosen and one.id != run and _comparable(chosen, one)]
    choices = [("none", ALONE), *((run_label(one), one.id) for one in fitting)]
    return gr.Dropdown(choices=choices, value=other if other in [one.id for one in fitting] else ALONE)


def close() -> tuple[Any, Any]:
    """Another run was chosen: what is shown belongs to the one before."""
    return EMPTY, gr.Column(visible=False)


@problem_last(LOOKED)
def look(desk: Desk, run: str | None, other: str | None) -> tuple[Any, ...]:
    """The whole report of a run; one that is no LoRA run gets a sentence."""
    view = desk.run(run)
    if isinstance(view.config.method, BaselineSpec):
        return _nothing(_not_lora(view.config.method))
    told = _report(desk, view, other)
    modules, similarity = told["modules"], told["similarity"]
    shared = {_key(overlap) for overlap in similarity["modules"]} if similarity else set()
    strongest = max(modules, key=lambda module: (_key(module) in shared, module["relative_norm"]))
    choices = [_key(module) for module in modules]
    return (
        summary(view, told),
        gr.Column(visible=True),
        figure.value(charts.relative_change(modules)),
        gr.Dropdown(choices=choices, value=_key(strongest)),
        gr.Column(visible=similarity is not None),
        figure.value(charts.amplification(told["amplification"])),
        table(told["amplification"]),
        {},
        "",
        {},
        "",
        _turned(max(module["rank99"] for module in modules), _rank(modules)),
    )


@problem_last(4)
def show_matrix(desk: Desk, run: str | None, other: str | None, matrix: str | None, which: str) -> tuple[Any, ...]:
    """One matrix: its singular values and, with a second run, what the two have in common there."""
    if not run or not matrix:
        return {}, "", {}, ""
    view = desk.run(run)
    told = _report(desk, view, other)
    module = _pick(told["modules"], matrix)
    if module is None:
        return {}, "", {}, ""
    shown = figure.value(charts.singular_values(module)), values_line(module)
    if told["similarity"] is None:
        return *shown, {}, ""
    overlap = _pick(told["similarity"]["modules"], matrix) or {}
    phi = overlap.get("phi" if which == OF_A else "phi_update")
    if not phi:
        return *shown, {}, "<p class='soft'>The second run does not change this matrix.</p>"
    names = view.name, desk.studio.runs.get(str(other)).name
    baseline = [row[: len(phi[0])] for row in overlap["baseline"][: len(phi)]]
    return *shown, figure.value(charts.similarity(phi, baseline, names)), similarity_line(phi, baseline)


@problem_last(4)
def measure(desk: Desk, run: str | None) -> Iterator[tuple[Any, ...]]:
    """The rank curve as it grows, and in the end what it says."""
    view = desk.run(run)
    yield {}, "<p class='soft'>Loading the base model</p>", {}, gr.skip()
    studio = desk.ready(view.config.model)
    told: dict[str, Any] = {}
    with closing(studio.rank_curve(view.id)) as moments:
        for moment in moments:
            told = moment.as_json()
            last = max(point["rank"] for point in told["points"])
            wait = f"<p class='soft'>Measured up to rank {last} of {told['rank']}</p>"
            yield figure.value(charts.rank_curve(told)), wait, told, gr.skip()
    if told:
        best = told["smallest"] or told["rank"]
        yield figure.value(charts.rank_curve(told)), verdict(told), told, _turned(best, told["rank"])


@problem_instead
def read_dial(told: Mapping[str, Any] | None, rank: float | None) -> str:
    """What the rank on the dial costs and keeps; empty while nothing is measured."""
    return rank_line(told, int(rank)) if told and rank else ""


def forget() -> str:
    """No proof: what was downloaded was of another rank or run."""
    return ""


@problem_last(2)
def pack_smaller(desk: Desk, run: str | None, rank: float | None) -> tuple[str, str]:
    """The address of a fresh archive of the adapter at a lower rank, and its proof."""
    view = desk.run(run)
    if rank is None or rank != int(rank):
        raise StudioError("E_RANK", "No rank is given.", "Give a whole number of at least 1.")
    done = desk.ready(view.config.model).archive(view.id, rank=int(rank))
    return desk.hand_out(done.files[-1]), proof_of(done.proof)


# ---- HTML out of plain values ------------------------------------------------------------------------------------


def summary(view: Run, told: Mapping[str, Any]) -> str:
    """A run in one line of figures."""
    modules = told["modules"]
    shares = [module["relative_norm"] for module in modules]
    effective = sorted(module["effective_rank"] for module in modules)
    parts = [
        f"<b>{len(modules)}</b> {'matrix' if len(modules) == 1 else 'matrices'}",
        f"changed by <b>{charts.percent(min(shares))} to {charts.percent(max(shares))}</b>",
        f"{term('effective rank')} <b>{effective[len(effective) // 2]:.1f}</b> of {_rank(modules)} (median)",
    ]
    if getattr(view.config.method, "variant", "") == "dora":
        parts.append("DoRA: of its low-rank part, without the magnitudes")
    if told["similarity"]:
        shared = told["similarity"]
        parts.append(f"{len(shared['modules'])} matrices in both runs, {sum(shared['alone'])} in one only")
    return f"<div class='cost'>{''.join(f'<span>{part}</span>' for part in parts)}</div>"


def values_line(module: Mapping[str, Any]) -> str:
    """What the bars say of one matrix."""
    if not module["rank99"]:
        return "<p class='soft'>This matrix was not changed.</p>"
    return (
        f"<p class='soft'>99 % of ‖ΔW‖² in <b>{_directions(module['rank99'])}</b> of"
        f" {len(module['singular_values'])} · {term('effective rank')} <b>{module['effective_rank']:.1f}</b>"
        f" · {term('‖ΔW‖')} is <b>{charts.percent(module['relative_norm'])}</b> of ‖W‖</p>"
    )


def similarity_line(phi: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> str:
    """The corners of the grid in words: the first direction of each, and all of them."""
    first, whole = phi[0][0], phi[-1][-1]
    return (
        f"<p class='soft'>First directions: <b>{first:.2f}</b>, by chance {baseline[0][0]:.2g}"
        f" · all directions: <b>{whole:.2f}</b>, by chance {baseline[-1][-1]:.2g}</p>"
    )


def verdict(curve: Mapping[str, Any]) -> str:
    """What the curve says: the smallest rank that is good enough, and what it saves."""
    rank, smallest = curve["rank"], curve["smallest"]
    sizes = {point["rank"]: point["parameters"] for point in curve["points"]}
    if smallest is None:
        said = "On its held-out rows this adapter is no better than the base model, so there is no gain to keep."
    elif smallest == rank:
        said = f"All {_directions(rank)} are needed: no smaller rank keeps 99 % of the gain on the held-out rows."
    else:
        saved = f"{sizes[smallest]:,} parameters instead of {sizes[rank]:,}"
        said = f"You paid for rank {rank}; rank {smallest} keeps 99 % of the gain on the held-out rows, with {saved}."
    return f"<p class='verdict'>{said}</p>"


def rank_line(curve: Mapping[str, Any], rank: int) -> str:
    """Loss, share of the gain and size at one rank; of one between two that were measured, what lies on both sides."""
    points = {point["rank"]: point for point in curve["points"]}
    base, whole, own = (points.get(one) for one in (0, curve["rank"], rank))
    if own is None:
        near = [points[end] for end in _around(rank, points) if end is not None]
        sides = " and ".join(f"{_figure(one['loss'], 4)} at rank {one['rank']}" for one in near)
        return f"<p class='soft'>Rank {rank} was not measured; the held-out loss is {sides}.</p>"
    said = f"Rank {rank}: held-out loss <b>{_figure(own['loss'], 4)}</b>"
    if base and whole and None not in (base["loss"], whole["loss"], own["loss"]) and base["loss"] > whole["loss"]:
        kept = (base["loss"] - own["loss"]) / (base["loss"] - whole["loss"])
        said += f", <b>{math.floor(1000 * kept + 1e-6) / 10:g} %</b> of the gain"
    if whole and own is not whole:
        said += f", {own['parameters']:,} parameters instead of {whole['parameters']:,}"
    return f"<p class='soft'>{said}.</p>"


def _around(rank: int, measured: Iterable[int]) -> tuple[int | None, int | None]:
    """The nearest measured ranks below and above."""
    below, above = [one for one in measured if one < rank], [one for one in measured if one > rank]
    return max(below, default=None), min(above, default=None)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Table 7 of the paper for every matrix."""
    heads = ("Matrix", "r", "‖W‖", "‖ΔW‖", "along ΔW", "along W", "along random", "factor")
    keys = ("weight_norm", "delta_norm", "along_delta", "along_weight", "along_random", "factor")
    lines = []
    for row in rows:
        cells = [_key(row), str(row["rank"]), *(_figure(row[key]) for key in keys)]
        lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th scope='col'>{word}</th>" for word in heads)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    note = "<p class='soft'>“Along” is ‖Uᵀ W V‖ with the r strongest directions of that matrix.</p>"
    return f"<div class='scroll' tabindex='0'><table><tr>{head}</tr>{body}</table></div>{note}"


# ---- inside ------------------------------------------------------------------------------------------------------


def _report(desk: Desk, view: Run, other: str | None) -> dict[str, Any]:
    return desk.ready(view.config.model).inside(view.id, other or None).as_json()


def _comparable(one: Run, other: Run) -> bool:
    same = one.config.model == other.config.model and one.revision == other.revision
    return same and one.labels == other.labels and not isinstance(other.config.method, BaselineSpec)


def _nothing(said: str) -> tuple[Any, ...]:
    return f"<div class='empty'>{said}</div>", gr.Column(visible=False), *(gr.skip(),) * (LOOKED - 2)


def _not_lora(method: BaselineSpec) -> str:
    return (
        f"<b>There is nothing low-rank in this run.</b><br>It was trained by the method “{BASELINES[method.kind][0]}”,"
        " which has no factors A and B to look into. Choose a LoRA run."
    )


def _key(module: Mapping[str, Any]) -> str:
    """A matrix in the dropdown and in the table."""
    return module["role"] if module["layer"] is None else f"{module['role']} · layer {module['layer']}"


def _pick(modules: Sequence[Mapping[str, Any]], matrix: str) -> Mapping[str, Any] | None:
    return next((module for module in modules if _key(module) == matrix), None)


def _turned(rank: int, most: int) -> gr.Slider:
    """The dial at a rank; it ends at the adapter's own."""
    return gr.Slider(value=max(rank, 1), maximum=max(most, 2), interactive=most > 1)


def _rank(modules: Sequence[Mapping[str, Any]]) -> int:
    return max(len(module["singular_values"]) for module in modules)


def _directions(count: int) -> str:
    return f"{count} {'direction' if count == 1 else 'directions'}"


def _figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"
