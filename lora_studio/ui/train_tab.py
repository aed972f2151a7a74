"""Tab 2: what to adapt and how, what that will cost, and the live view of a run.

The settings come from the knobs of LoraSpec, BaselineSpec and TrainConfig; what does not belong to the chosen method
is hidden. The line under them follows every control.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_studio.core.spec import BASELINES, PRESETS, LoraSpec, Method
from lora_studio.errors import StudioError
from lora_studio.models import CATALOGUE, STARTER, fit, in_round_numbers, memory, parameter_count
from lora_studio.results import Plan
from lora_studio.runs.config import DataChoice, RunConfig, short
from lora_studio.settings import TrainConfig
from lora_studio.study import short as matrices_in_short
from lora_studio.ui import form, live, picker
from lora_studio.ui.boundary import problem_instead, problem_last
from lora_studio.ui.desk import Desk, data_choice
from lora_studio.ui.form import SETTINGS
from lora_studio.ui.terms import term

MAIN = ("rank", "width", "learning_rate", "steps", "batch_size", "seed")  # the others are folded away
OF_LORA = (*form.LORA, "lr_ratio_b")  # hidden with another method
MORE = tuple(name for name in SETTINGS if name not in (*MAIN, "targets"))
TASKS = [("Write text", "causal"), ("Choose a label", "classify")]
FIRST_PRESET = next(iter(PRESETS))
NAME_LENGTH = 80
RANK_SLIDER = 128  # where it ends; a run with more moves the end
PARTS = {  # of estimate.Estimate.memory_bytes
    "weights": "Weights of the base",
    "adapter": "What is trained, gradients and optimiser",
    "activations": "Activations of a step",
    "head": "Scores over the vocabulary",
    "runtime": "Python and its libraries",
}
STAYS_OPEN = """let open = false;
element.addEventListener('toggle', event => { open = event.target.open; }, true);
watch('value', () => { const parts = element.querySelector('details'); if (parts) parts.open = open; });"""


@dataclass(frozen=True)
class TrainTab:
    """The components that events join."""

    model: gr.Dropdown
    task: gr.Radio
    forced: gr.State  # whether the model leaves no choice of the task
    method: gr.Dropdown
    of_lora: tuple[gr.Column, gr.Column]  # hidden with another method
    preset: gr.Radio
    picker: gr.HTML
    settings: dict[str, Any]  # by knob name
    name: gr.Textbox
    line: gr.HTML
    problem: gr.HTML
    start: gr.Button
    live: gr.HTML


def build(desk: Desk) -> TrainTab:
    """Left: the settings. Right: the run."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300, elem_classes="card"):
            gr.HTML("<h3>Settings</h3>", apply_default_css=False)
            model = gr.Dropdown(
                [(name, name) for name in CATALOGUE],
                value=STARTER,
                label="Base model",
                info="Or type a Hub id (owner/name) or a folder",
                allow_custom_value=True,
                filterable=True,
                elem_id="model",
            )
            task = gr.Radio(TASKS, value="causal", label="Task", visible=False, elem_id="task")
            method = gr.Dropdown(
                [("LoRA", "lora"), *((label, kind) for kind, (label, _, _) in BASELINES.items())],
                value="lora",
                label="Method",
                info="LoRA, or one that the paper compares it with",
                elem_id="method",
            )
            with gr.Column(elem_classes="of-lora") as low_rank:
                settings = {"rank": form.control(SETTINGS["rank"], slide_to=RANK_SLIDER)}
                preset = gr.Radio(
                    [*PRESETS, picker.OWN], value=FIRST_PRESET, label="Matrices to adapt", elem_id="preset"
                )
                matrices = picker.build("Matrices to adapt")
            settings |= {"width": form.control(SETTINGS["width"], visible=False)}
            settings |= _pair("learning_rate", "steps") | _pair("batch_size", "seed")
            with gr.Accordion("More", open=False, elem_id="more"):
                name = gr.Textbox(label="Name", placeholder="made from the settings", max_length=NAME_LENGTH)
                with gr.Column(elem_classes="of-lora") as more_of_lora:
                    settings |= _pairs([one for one in MORE if one in OF_LORA])
                settings |= _pairs([one for one in MORE if one not in OF_LORA])
            line = gr.HTML(
                "<div class='cost soft'>Loading the model list</div>",
                js_on_load=STAYS_OPEN,
                apply_default_css=False,
                elem_id="cost",
            )
            problem = gr.HTML("", apply_default_css=False, elem_id="train-problem")
            start = gr.Button("Start training", variant="primary", elem_id="start")
        with gr.Column(scale=7, min_width=300, elem_classes="card"):
            view = live.build(desk)
    columns = low_rank, more_of_lora
    return TrainTab(
        model, task, gr.State(False), method, columns, preset, matrices, settings, name, line, problem, start, view
    )


def _pairs(names: Sequence[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for at in range(0, len(names), 2):
        made |= _pair(*names[at : at + 2])
    return made


def _pair(*names: str) -> dict[str, Any]:
    with gr.Row(elem_classes="pair"):
        return {name: form.control(SETTINGS[name]) for name in names}


# ---- handlers ----------------------------------------------------------------------------------------------------


def label_models(desk: Desk) -> Any:
    """The catalogue with size, licence and how it fits this machine; needs the libraries, so it comes after load."""
    desk.ready()
    return gr.Dropdown(
        choices=[
            (
                f"{entry.name} · {_count(entry.parameters)} · {entry.licence} · {fit(entry.parameters)}"
                + (" · for labels" if entry.labels_only else ""),
                entry.name,
            )
            for entry in CATALOGUE.values()
        ]
    )


def settle_task(
    desk: Desk, choice: Mapping[str, Any] | None, model: str, current: str, forced: bool
) -> tuple[Any, bool]:
    """Whether the task is open and which one suits data and model; and whether the model leaves no choice.

    An encoder can only choose labels. A model that writes may do either where the rows have a text and a label; it
    keeps the person's choice, but not one that another model had `forced`.
    """
    try:
        studio = desk.ready(model)
        encoder = studio.task(model) == "classify"
        labelled = bool(choice) and studio.format(DataChoice(**choice)) == "text_label"
    except StudioError:
        encoder = labelled = False  # the line under the form says why
    value = "classify" if encoder else current if labelled and not forced else "causal"
    return gr.Radio(value=value, visible=encoder or labelled), encoder


def show_method(name: str) -> tuple[Any, ...]:
    """The controls that belong to a method: LoRA's two columns, and the width."""
    shown = gr.Column(visible=name == "lora")
    return shown, shown, _width(name)


def settle_rate(desk: Desk, model: str, method: str, rate: Any, ours: float) -> tuple[Any, float]:
    """The learning rate that is usual for this model and method, and once more to know it by.

    ours: the one that was set here last. Any other is the person's, and stays.
    """
    if rate != ours:
        return gr.skip(), ours
    try:
        parameters = parameter_count(desk.ready(model).models.skeleton(model))
    except StudioError:
        return gr.skip(), ours  # the line under the form says why
    usual = float(f"{TrainConfig().usual_rate(parameters, method):.2g}")
    return usual, usual


def _width(name: str, value: int = 0) -> Any:
    """The width's control as a method has it; value 0 is the usual one."""
    means = form.widths(name)
    if not means:
        return gr.Number(visible=False)
    usually = BASELINES[name][2]
    info = f"0 takes the usual {usually}"
    return gr.Number(visible=True, label=means.capitalize(), info=info, value=value or usually)


ABOUT = 8  # of what `filled` fills, all but the settings


def filled(desk: Desk, config: RunConfig, settings: Sequence[str]) -> tuple[Any, ...]:
    """The form as a run was started from it: model, task, forced, method, LoRA's columns, preset, picker, `settings`.

    The name is left to be made anew. Matrices that were named one by one have no button; then none is pressed.
    """
    method, lora = config.method, isinstance(config.method, LoraSpec)
    kind = "lora" if isinstance(method, LoraSpec) else method.kind
    described = picker.describe(desk.ready(config.model).matrices(config.model))
    targets = method.targets if isinstance(method, LoraSpec) else PRESETS[FIRST_PRESET]
    picked, values = picker.choose(described, targets), form.values(method, config.train)
    shown = gr.Column(visible=lora)
    values["width"] = _width(kind, 0 if isinstance(method, LoraSpec) else method.width)
    if isinstance(method, LoraSpec):
        values["rank"] = gr.Slider(value=method.rank, maximum=max(RANK_SLIDER, method.rank))
    about = config.model, config.task, False, kind, shown, shown, picker.preset(picked), picked
    return *about, *(values.get(name, gr.skip()) for name in settings)


def show_matrices(desk: Desk, model: str, preset: str, picked: Mapping[str, Any] | None) -> Any:
    """The model's own matrices, with the same choice pressed as far as it has them; none for an unknown model.

    What shows the same matrices already is left alone: a click may have come since.
    """
    wanted = PRESETS.get(preset) or picker.targets(picked, preset)
    try:
        matrices = desk.ready(model).matrices(model)
    except StudioError:
        return {"matrices": [], "chosen": []}  # the line under the form says why
    described = picker.describe(matrices)
    if picked and picked.get("matrices") == described:
        return gr.skip()
    return picker.choose(described, wanted)


def press_preset(picked: Mapping[str, Any] | None, preset: str) -> Any:
    """The picker as the preset wants it; OWN leaves it alone."""
    if preset not in PRESETS or not picked:
        return gr.skip()
    return picker.choose(list(picked.get("matrices", [])), PRESETS[preset])


def name_preset(picked: Mapping[str, Any] | None) -> str:
    """The preset that the pressed buttons are."""
    return picker.preset(picked)


@problem_instead
def cost(
    desk: Desk,
    choice: Mapping[str, Any] | None,
    model: str,
    task: str,
    method: str,
    preset: str,
    picked: Mapping[str, Any] | None,
    **raw: Any,
) -> str:
    """The line that follows every control."""
    chosen, config = form.method(raw, picker.targets(picked, preset), method), form.training(raw)
    studio = desk.ready(model)
    plan = studio.plan(model, chosen, config, DataChoice(**choice) if choice else None, task)
    return cost_line(plan, memory()[1])


def cost_line(plan: Plan, memory_bytes: int) -> str:
    """Trainable parameters, adapter size, memory and time in words."""
    about = plan.estimate
    peak, share = about.memory_bytes["peak"], about.trainable / about.total
    tight = " class='tight'" if peak > 0.9 * memory_bytes else ""
    parts = (
        f"<b>{about.trainable:,}</b> {term('trainable')} of {_count(about.total)} ({share:.2%})",
        f"{term('adapter')} <b>{_bytes(about.adapter_bytes)}</b>",
        f"about <b{tight}>{_bytes(peak)}</b> of {in_round_numbers(memory_bytes)}",
        f"about <b>{_duration(about.seconds)}</b>",
    )
    return (
        "<div class='cost'>"
        + "".join(f"<span>{part}</span>" for part in parts)
        + _by_part(about.memory_bytes)
        + "</div>"
    )


def _by_part(memory_bytes: Mapping[str, int]) -> str:
    """What the memory goes to, folded away; the largest first."""
    parts = sorted(((size, name) for name, size in memory_bytes.items() if name != "peak" and size), reverse=True)
    bar = "".join(f"<i data-part='{name}' style='flex-grow:{size}'></i>" for size, name in parts)
    rows = "".join(
        f"<li><i data-part='{name}'></i><span>{html.escape(PARTS.get(name, name))}</span><b>{_bytes(size)}</b></li>"
        for size, name in parts
    )
    inside = f"<div class='stack'>{bar}</div><ul>{rows}</ul>"
    return f"<details class='parts'><summary>Memory by part</summary>{inside}</details>"


def check_start(
    choice: Mapping[str, Any] | None,
    model: str,
    task: str,
    method: str,
    preset: str,
    picked: Mapping[str, Any] | None,
    name: str,
    **raw: Any,
) -> list[Any]:
    """One verdict per input, so that a message stands at the control it is about; hidden ones are not looked at."""
    problems = ["", "" if (model or "").strip() else "Choose a base model.", "", "", "", "", ""]
    hidden = ("width",) if method == "lora" else OF_LORA if form.widths(method) else (*OF_LORA, "width")
    problems += ["" if key in hidden else form.problem(SETTINGS[key], value) for key, value in raw.items()]
    return [gr.validate(not found, found) for found in problems]


@problem_last(1)
def start(
    desk: Desk,
    choice: Mapping[str, Any] | None,
    model: str,
    task: str,
    method: str,
    preset: str,
    picked: Mapping[str, Any] | None,
    name: str,
    **raw: Any,
) -> str:
    """Queue a run and give its id to the live view."""
    rows, model = data_choice(choice), model.strip()
    chosen = form.method(raw, picker.targets(picked, preset), method)
    studio = desk.ready(model)
    desk.may_start()
    wanted = (name or "").strip()[:NAME_LENGTH] or f"{rows.name} {_short(chosen)}"
    config = RunConfig(
        name=unique(wanted, {run.name for run in studio.runs.list()}),
        model=model,
        task=task,
        dataset=rows,
        method=chosen,
        train=form.training(raw),
    )
    return studio.start(config).id


def unique(name: str, taken: set[str]) -> str:
    """The name, with a number behind it where another run has it."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free


# ---- words -------------------------------------------------------------------------------------------------------


def _short(method: Method) -> str:
    return f"{short(method)} {matrices_in_short(method.targets)}" if isinstance(method, LoraSpec) else short(method)


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 100 * size else f"{number / size:.1f} {unit}"
    return html.escape(str(number))


def _bytes(size: float) -> str:
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
