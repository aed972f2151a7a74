"""build(desk): the page. Tabs are drawn by their own modules; here their events are joined."""

from functools import partial
from typing import Any

import gradio as gr

from lora_studio.runs.config import Run
from lora_studio.ui import api, compare_tab, data_tab, export_tab, inside_tab, live, study_tab, style, train_tab
from lora_studio.ui.boundary import as_toast
from lora_studio.ui.compare_tab import CompareTab
from lora_studio.ui.data_tab import DataTab
from lora_studio.ui.desk import Desk
from lora_studio.ui.export_tab import ExportTab
from lora_studio.ui.inside_tab import InsideTab
from lora_studio.ui.study_tab import StudyTab
from lora_studio.ui.train_tab import TrainTab

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
QUICK: dict[str, Any] = {**QUIET, "queue": False}
LATEST: dict[str, Any] = {**QUIET, "trigger_mode": "always_last", "concurrency_limit": 4}

HEADER = f"""<header class="top">{style.LOGO}<h1>LoRA Studio</h1>
<p class="news" role="status" aria-live="polite"></p><span class="chip" hidden></span></header>"""
HEADER_JS = """
const news = element.querySelector('.news'), chip = element.querySelector('.chip');
async function tick() {
  let wait = 1000;
  try {
    const said = await server.status();
    news.textContent = said.line;
    news.classList.toggle('bad', said.problem);
    chip.textContent = said.hardware;
    chip.hidden = !said.hardware;
    if (said.settled) return;
    if (said.problem) wait = 10000;
  } catch (problem) { wait = 5000; }
  if (element.isConnected) setTimeout(tick, wait);
}
tick();
"""
CLICK_SMALLER = "() => setTimeout(() => document.querySelector('#smaller-archive')?.click(), 50)"
CLICK_ARCHIVE = """() => setTimeout(() =>
  document.querySelector('#export-problem .problem') || document.querySelector('#archive')?.click(), 50)"""


def build(desk: Desk) -> gr.Blocks:
    """The whole page; launch it with style.launch_options()."""
    with gr.Blocks(title="LoRA Studio", fill_width=True, analytics_enabled=False, delete_cache=(3600, 86_400)) as page:
        api.register(desk)
        _header(desk)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("1 Data", id="data"):
                data = data_tab.build()
            with gr.Tab("2 Train", id="train"):
                train = train_tab.build(desk.studio)
            with gr.Tab("Study", id="study") as study_page:
                study = study_tab.build(desk.studio)
            with gr.Tab("3 Compare", id="compare") as compare_page:
                compare = compare_tab.build()
            with gr.Tab("4 Inside", id="inside") as inside_page:
                inside = inside_tab.build()
            with gr.Tab("5 Export", id="export") as export_page:
                export = export_tab.build()
        _join_data(desk, data, train, tabs)
        _join_settings(desk, page, data, train)
        _join_run(desk, page, data, train, study, compare, tabs)
        _join_study(desk, study, study_page, data, train, compare, export, tabs)
        _join_compare(desk, compare)
        _join_inside(desk, inside)
        _join_export(desk, export)
        compare_page.select(partial(compare_tab.list_runs, desk), compare.run, compare.run, **QUICK)
        listed = inside_page.select(partial(compare_tab.list_runs, desk), inside.run, inside.run, **QUICK)
        listed.then(partial(inside_tab.list_others, desk), [inside.run, inside.other], inside.other, **QUICK)
        export_page.select(partial(compare_tab.list_runs, desk), export.run, export.run, **QUICK)
        export_page.select(None, None, None, js=export_tab.NAME_BOXES, **QUICK)
    return page


def _header(desk: Desk) -> None:
    def status(_: Any = None) -> dict:
        return desk.status()

    gr.HTML("", html_template=HEADER, js_on_load=HEADER_JS, server_functions=[status], apply_default_css=False)


def _join_data(desk: Desk, data: DataTab, train: TrainTab, tabs: gr.Tabs) -> None:
    opened = [data.choice, data.correction, data.format, *data.slots, data.row, data.problem]
    for name, button in data.samples.items():
        button.click(partial(_open_sample, desk, name), None, opened, **QUIET)
    data.upload.upload(partial(data_tab.open_file, desk), data.upload, opened, **PRIVATE, show_progress="minimal")
    gr.on([data.paste_button.click], partial(data_tab.open_text, desk), data.paste, opened, **QUIET)
    gr.on([data.hub_button.click, data.hub.submit], partial(data_tab.open_hub, desk), data.hub, opened, **PRIVATE)
    data.used.input(partial(data_tab.open_used, desk), data.used, opened, **QUIET)
    data.used.focus(partial(_used, desk), None, data.used, **QUICK)
    data.format.input(partial(data_tab.change_format, desk), [data.choice, data.format], opened, **QUIET)
    for slot in data.slots:
        slot.input(
            partial(data_tab.change_columns, desk), [data.choice, *data.slots], [data.choice, data.problem], **QUIET
        )
    data.go_on.click(_to_training, None, tabs, **QUICK)
    _join_preview(desk, data, train)


def _join_preview(desk: Desk, data: DataTab, train: TrainTab) -> None:
    settings = train.settings
    seen_by = [data.choice, train.model, settings["max_length"], settings["holdout"], settings["seed"], train.task]
    changed = [data.choice.change, train.model.change, settings["max_length"].change, train.task.change]
    changed += [settings["holdout"].change]
    gr.on(changed, partial(data_tab.inspect, desk), seen_by, [data.understood, data.pager], **LATEST)
    shown = [data.choice, data.row, train.model, settings["max_length"], train.task]
    show_row = partial(data_tab.show_row, desk)
    changed = [data.choice.change, train.model.change, settings["max_length"].change, train.task.change]
    gr.on(changed, show_row, shown, data.preview, **LATEST)
    for button, by in ((data.back, -1), (data.on, 1)):
        turned = button.click(partial(data_tab.turn, desk, by), [data.choice, data.row], data.row, **QUICK)
        turned.then(show_row, shown, data.preview, **LATEST)


def _join_settings(desk: Desk, page: gr.Blocks, data: DataTab, train: TrainTab) -> None:
    described = [train.model, train.preset, train.picker]
    asked = {"inputs": _asked(data, train), "inputs_kwargs": train.settings, "outputs": train.line, **LATEST}
    cost = partial(train_tab.cost, desk)
    settled = gr.on(
        [page.load, train.model.change, data.choice.change],
        partial(train_tab.settle_task, desk),
        [data.choice, train.model, train.task, train.forced],
        [train.task, train.forced],
        **LATEST,
    )
    shown = settled.then(partial(train_tab.show_matrices, desk), described, train.picker, **LATEST)
    shown.then(cost, **asked)
    page.load(partial(train_tab.label_models, desk), None, train.model, **QUIET)
    pressed = train.preset.input(train_tab.press_preset, [train.picker, train.preset], train.picker, **QUICK)
    pressed.then(cost, **asked)
    train.picker.pick(train_tab.name_preset, train.picker, train.preset, **QUICK)
    train.picker.pick(cost, **asked)
    rate = train.settings["learning_rate"]
    changed = train.method.input(
        train_tab.show_method, [train.method, rate], [*train.of_lora, train.settings["width"], rate], **QUICK
    )
    changed.then(cost, **asked)
    gr.on([train.task.change, *(control.change for control in train.settings.values())], cost, **asked)


def _asked(data: DataTab, train: TrainTab) -> list[Any]:
    """What describes a run, apart from the settings."""
    return [data.choice, train.model, train.task, train.method, train.preset, train.picker]


def _join_run(
    desk: Desk,
    page: gr.Blocks,
    data: DataTab,
    train: TrainTab,
    study: StudyTab,
    compare: CompareTab,
    tabs: gr.Tabs,
) -> None:
    train.start.click(
        partial(train_tab.start, desk),
        [*_asked(data, train), train.name],
        [train.live, train.problem],
        inputs_kwargs=train.settings,
        validator=train_tab.check_start,
        **QUIET,
    )
    to_compare = train.live.compare(partial(_to_compare, desk), train.live, [tabs, compare.run], **QUICK)
    to_compare.then(partial(compare_tab.list_prompts, desk), compare.run, compare.chips, **QUIET)

    def restore(request: gr.Request) -> tuple[Any, ...]:
        asked = request.query_params
        return first_view(desk, str(asked.get("run", "")), str(asked.get("study", "")))

    opened = [data.choice, data.correction, data.format, *data.slots, data.row]
    page.load(restore, None, [train.live, tabs, study.view, *opened], **QUICK)


def _join_study(
    desk: Desk,
    study: StudyTab,
    shown: gr.Tab,
    data: DataTab,
    train: TrainTab,
    compare: CompareTab,
    export: ExportTab,
    tabs: gr.Tabs,
) -> None:
    asked = {"inputs": [*_asked(data, train), *study.asked], "inputs_kwargs": train.settings}
    cost = partial(study_tab.cost, desk)
    gr.on(
        [shown.select, data.choice.change, *(control.change for control in study.asked)],
        cost,
        outputs=study.line,
        **asked,
        **LATEST,
    )
    study.start.click(partial(study_tab.start, desk), outputs=[study.view, study.problem], **asked, **QUIET)

    def to_compare(event: gr.EventData) -> tuple[Any, Any]:
        return _to_compare(desk, str(event.run))

    def to_export(event: gr.EventData) -> tuple[Any, Any]:
        return gr.Tabs(selected="export"), compare_tab.list_runs(desk, str(event.run))

    def to_run(event: gr.EventData) -> tuple[Any, str]:
        return gr.Tabs(selected="train"), str(event.run)

    picked = study.view.compare(to_compare, None, [tabs, compare.run], **QUICK)
    picked.then(partial(compare_tab.list_prompts, desk), compare.run, compare.chips, **QUIET)
    study.view.export(to_export, None, [tabs, export.run], **QUICK)
    study.view.watch(to_run, None, [tabs, train.live], **QUICK)


def _join_compare(desk: Desk, compare: CompareTab) -> None:
    buttons = [compare.go, compare.stop]
    compare.run.change(partial(compare_tab.list_prompts, desk), compare.run, compare.chips, **QUIET)
    compare.chips.pick(compare_tab.take_prompt, None, [compare.prompt, compare.expected], **QUICK)
    compare.prompt.input(lambda: "", None, compare.expected, **QUICK)
    cleared = gr.on(
        [compare.go.click, compare.prompt.submit], compare_tab.clear, None, [*compare.panes, *buttons], **QUICK
    )
    answering = cleared.then(
        partial(compare_tab.compare, desk),
        [compare.run, compare.prompt, compare.mode, compare.strength],
        [*compare.panes, compare.problem],
        inputs_kwargs=compare.sampling,
        concurrency_id="model",
        concurrency_limit=1,
        **QUIET,
    )
    answering.then(compare_tab.settle, None, buttons, **QUICK)
    compare.stop.click(compare_tab.settle, None, buttons, cancels=[answering], **QUICK)


def _join_inside(desk: Desk, inside: InsideTab) -> None:
    runs, shown = [inside.run, inside.other], [*inside.of_matrix, inside.problem]
    inside.run.input(partial(inside_tab.list_others, desk), runs, inside.other, **QUICK)
    gr.on([inside.run.change, inside.other.change], inside_tab.close, None, [inside.summary, inside.results], **QUICK)
    looked = inside.look.click(
        partial(inside_tab.look, desk),
        runs,
        [*inside.looked, inside.problem],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=[inside.summary],
        **PRIVATE,
    )
    show = partial(inside_tab.show_matrix, desk)
    looked.success(show, inside.chosen, shown, **QUIET)
    gr.on([inside.matrix.input, inside.which.input], show, inside.chosen, shown, **QUIET)
    inside.measure.click(
        partial(inside_tab.measure, desk),
        inside.run,
        [inside.curve, inside.curve_line, inside.rank, inside.dial_problem],
        concurrency_id="model",
        concurrency_limit=1,
        **QUIET,
    )
    packed = inside.download.click(
        partial(inside_tab.pack_smaller, desk),
        [inside.run, inside.rank],
        [inside.file, inside.dial_problem],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=[inside.download],
        **PRIVATE,
    )
    packed.success(None, None, None, js=CLICK_SMALLER, **PRIVATE)


def _join_export(desk: Desk, export: ExportTab) -> None:
    described = [export.command, export.loading, export.badge]
    export.run.change(partial(export_tab.describe, desk), export.run, described, **QUIET)
    for button, merged in ((export.adapter, False), (export.merged, True)):
        packed = button.click(
            partial(_pack, desk, merged),
            [export.run, export.dtype],
            [export.file, export.about, export.problem],
            concurrency_id="model",
            concurrency_limit=1,
            show_progress_on=[button],
            **PRIVATE,
        )
        packed.success(None, None, None, js=CLICK_ARCHIVE, **PRIVATE)


# ---- handlers that concern more than one tab -----------------------------------------------------------------------


def first_view(desk: Desk, asked: str, study: str = "") -> tuple[Any, ...]:
    """On load: the run to show, the tab to open, the study to show, and that run's dataset in the Data tab."""
    untouched = (gr.skip(),) * data_tab.OPENED
    try:
        runs = desk.studio.runs.list()
        shown, study = live.shown_at_first(runs, asked), study_tab.shown_at_first(desk.studio, study)
        tab = gr.Tabs(selected="study" if study else "train")
        if not shown:
            return asked, tab if study else gr.skip(), study, *untouched
        return (
            shown,
            tab,
            study,
            *_data_of(desk, next(run for run in runs if run.id == shown), untouched),
        )
    except OSError as error:
        raise as_toast(error) from None


def _data_of(desk: Desk, run: Run, otherwise: tuple[Any, ...]) -> tuple[Any, ...]:
    known = {dataset.id: dataset for dataset in desk.studio.data.list()}
    dataset = known.get(run.config.dataset.id)
    return data_tab.opened(dataset, run.config.dataset) if dataset else otherwise


def _open_sample(desk: Desk, name: str) -> tuple[Any, ...]:
    return data_tab.open_sample(desk, name)


def _pack(desk: Desk, merged: bool, run: str | None, dtype: str) -> tuple[Any, ...]:
    return export_tab.pack(desk, run, merged, dtype)


def _used(desk: Desk) -> Any:
    return gr.Dropdown(choices=[(f"{one.name} · {one.rows:,} rows", one.id) for one in desk.studio.data.list()])


def _to_training() -> Any:
    return gr.Tabs(selected="train")


def _to_compare(desk: Desk, run: str) -> tuple[Any, Any]:
    return gr.Tabs(selected="compare"), compare_tab.list_runs(desk, run)
