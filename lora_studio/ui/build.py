"""build(desk): the page. Tabs are drawn by their own modules; here their events are joined."""

from typing import Any

import gradio as gr

from lora_studio.errors import StudioError
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
from lora_studio.visitors import signing_in

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


def build(desk: Desk) -> gr.Blocks:
    """The whole page; serve it with style.looks()."""
    with gr.Blocks(title="LoRA Studio", fill_width=True, analytics_enabled=False, delete_cache=(600, 900)) as page:
        api.register(desk)
        _header(desk)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("1 Data", id="data"):
                data = data_tab.build(desk.limits)
            with gr.Tab("2 Train", id="train"):
                train = train_tab.build(desk)
            with gr.Tab("Study", id="study") as study_page:
                study = study_tab.build(desk)
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
        compare_page.select(desk.mine(compare_tab.list_runs), compare.run, compare.run, **QUICK)
        listed = inside_page.select(desk.mine(compare_tab.list_runs), inside.run, inside.run, **QUICK)
        listed.then(desk.mine(inside_tab.list_others), [inside.run, inside.other], inside.other, **QUICK)
        export_page.select(desk.mine(compare_tab.list_runs), export.run, export.run, **QUICK)
        for drawn in (export_page, *export.ways):  # its boxes are there only once a tab has been opened
            drawn.select(None, None, None, js=export_tab.NAME_BOXES, **QUICK)
    return page


def _header(desk: Desk) -> None:
    def status(desk: Desk, _: Any = None) -> dict:
        return desk.status()

    asked = [desk.mine(status)]
    gr.HTML("", html_template=HEADER, js_on_load=HEADER_JS, server_functions=asked, apply_default_css=False)
    if signing_in():
        gr.LoginButton(size="sm", elem_id="sign-in")


def _join_data(desk: Desk, data: DataTab, train: TrainTab, tabs: gr.Tabs) -> None:
    opened = [data.choice, data.correction, data.format, *data.slots, data.row, data.problem]
    for name, button in data.samples.items():
        button.click(desk.mine(data_tab.open_sample, name), None, opened, **QUIET)
    data.upload.upload(desk.mine(data_tab.open_file), data.upload, opened, **PRIVATE, show_progress="minimal")
    gr.on([data.paste_button.click], desk.mine(data_tab.open_text), data.paste, opened, **QUIET)
    gr.on([data.hub_button.click, data.hub.submit], desk.mine(data_tab.open_hub), data.hub, opened, **PRIVATE)
    data.used.input(desk.mine(data_tab.open_used), data.used, opened, **QUIET)
    data.used.focus(desk.mine(_used), None, data.used, **QUICK)
    data.format.input(desk.mine(data_tab.change_format), [data.choice, data.format], opened, **QUIET)
    for slot in data.slots:
        slot.input(desk.mine(data_tab.change_columns), [data.choice, *data.slots], [data.choice, data.problem], **QUIET)
    data.go_on.click(_to_training, None, tabs, **QUICK)
    _join_preview(desk, data, train)


def _join_preview(desk: Desk, data: DataTab, train: TrainTab) -> None:
    settings = train.settings
    seen_by = [data.choice, train.model, settings["max_length"], settings["holdout"], settings["seed"], train.task]
    changed = [data.choice.change, train.model.change, settings["max_length"].change, train.task.change]
    changed += [settings["holdout"].change]
    gr.on(changed, desk.mine(data_tab.inspect), seen_by, [data.understood, data.pager], **LATEST)
    shown = [data.choice, data.row, train.model, settings["max_length"], train.task]
    show_row = desk.mine(data_tab.show_row)
    changed = [data.choice.change, train.model.change, settings["max_length"].change, train.task.change]
    gr.on(changed, show_row, shown, data.preview, **LATEST)
    for button, by in ((data.back, -1), (data.on, 1)):
        turned = button.click(desk.mine(data_tab.turn, by), [data.choice, data.row], data.row, **QUICK)
        turned.then(show_row, shown, data.preview, **LATEST)


def _join_settings(desk: Desk, page: gr.Blocks, data: DataTab, train: TrainTab) -> None:
    described = [train.model, train.preset, train.picker]
    asked = {"inputs": _asked(data, train), "inputs_kwargs": train.settings, "outputs": train.line, **LATEST}
    cost = desk.mine(train_tab.cost)
    settled = gr.on(
        [page.load, train.model.change, data.choice.change],
        desk.mine(train_tab.settle_task),
        [data.choice, train.model, train.task, train.forced],
        [train.task, train.forced],
        **LATEST,
    )
    shown = settled.then(desk.mine(train_tab.show_matrices), described, train.picker, **LATEST)
    shown.then(cost, **asked)
    page.load(desk.mine(train_tab.label_models), None, train.model, **QUIET)
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
        desk.mine(train_tab.start),
        [*_asked(data, train), train.name],
        [train.live, train.problem],
        inputs_kwargs=train.settings,
        validator=train_tab.check_start,
        **QUIET,
    )
    to_compare = train.live.compare(desk.mine(_to_compare), train.live, [tabs, compare.run], **QUICK)
    to_compare.then(desk.mine(compare_tab.list_prompts), compare.run, compare.chips, **QUIET)

    opened = [data.choice, data.correction, data.format, *data.slots, data.row]

    def restore(request: gr.Request) -> tuple[Any, ...]:
        asked = request.query_params
        return first_view(desk.of(request), str(asked.get("run", "")), str(asked.get("study", "")))

    # queued: an event that is not does not tell the page that the State of the choice has changed
    page.load(restore, None, [train.live, tabs, study.view, *opened], **QUIET)


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
    cost = desk.mine(study_tab.cost)
    gr.on(
        [shown.select, data.choice.change, *(control.change for control in study.asked)],
        cost,
        outputs=study.line,
        **asked,
        **LATEST,
    )
    study.start.click(desk.mine(study_tab.start), outputs=[study.view, study.problem], **asked, **QUIET)

    picked = study.view.compare(desk.mine(_cell_to_compare), None, [tabs, compare.run], **QUICK)
    picked.then(desk.mine(compare_tab.list_prompts), compare.run, compare.chips, **QUIET)
    study.view.export(desk.mine(_cell_to_export), None, [tabs, export.run], **QUICK)
    study.view.watch(_cell_to_run, None, [tabs, train.live], **QUICK)


def _join_compare(desk: Desk, compare: CompareTab) -> None:
    buttons = [compare.go, compare.stop]
    compare.run.change(desk.mine(compare_tab.list_prompts), compare.run, compare.chips, **QUIET)
    compare.chips.pick(compare_tab.take_prompt, None, [compare.prompt, compare.expected], **QUICK)
    compare.prompt.input(lambda: "", None, compare.expected, **QUICK)
    cleared = gr.on(
        [compare.go.click, compare.prompt.submit], compare_tab.clear, None, [*compare.panes, *buttons], **QUICK
    )
    answering = cleared.then(
        desk.mine(compare_tab.compare),
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
    inside.run.input(desk.mine(inside_tab.list_others), runs, inside.other, **QUICK)
    gr.on([inside.run.change, inside.other.change], inside_tab.close, None, [inside.summary, inside.results], **QUICK)
    looked = inside.look.click(
        desk.mine(inside_tab.look),
        runs,
        [*inside.looked, inside.problem],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=[inside.summary],
        **PRIVATE,
    )
    show = desk.mine(inside_tab.show_matrix)
    looked.success(show, inside.chosen, shown, **QUIET)
    gr.on([inside.matrix.input, inside.which.input], show, inside.chosen, shown, **QUIET)
    inside.measure.click(
        desk.mine(inside_tab.measure),
        inside.run,
        [inside.curve, inside.curve_line, inside.rank, inside.dial_problem],
        concurrency_id="model",
        concurrency_limit=1,
        **QUIET,
    )
    inside.download.click(
        desk.mine(inside_tab.pack_smaller),
        [inside.run, inside.rank],
        [inside.file, inside.dial_problem],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=[inside.download],
        **PRIVATE,
    )


def _join_export(desk: Desk, export: ExportTab) -> None:
    export.run.change(desk.mine(export_tab.describe), export.run, export.described, **QUIET)
    for button, merged in ((export.adapter, False), (export.merged, True)):
        button.click(
            desk.mine(export_tab.pack, merged),
            [export.run, export.dtype],
            [export.file, export.proof, export.problem],
            concurrency_id="model",
            concurrency_limit=1,
            show_progress_on=[button],
            **PRIVATE,
        )
    export.push.click(
        desk.mine(export_tab.push),
        [export.run, export.what, export.dtype, export.repo, export.private, export.token],
        [export.token, export.pushed, export.push_problem],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=[export.push],
        **PRIVATE,
    )


# ---- handlers that concern more than one tab -----------------------------------------------------------------------


def first_view(desk: Desk, asked: str, study: str = "") -> tuple[Any, ...]:
    """On load: the run to show, the tab to open, the study to show, and that run's dataset in the Data tab."""
    untouched = (gr.skip(),) * data_tab.OPENED
    try:
        runs = desk.studio.runs.list()
        shown, study = live.shown_at_first(desk.studio, runs, asked), study_tab.shown_at_first(desk.studio, study)
        tab = gr.Tabs(selected="study" if study else "train")
        if not shown:
            return asked, tab if study or asked else gr.skip(), study, *untouched
        own = next((run for run in runs if run.id == shown), None)
        return shown, tab, study, *(_data_of(desk, own, untouched) if own else untouched)
    except StudioError:  # nobody can tell who this is; the header says so
        return (gr.skip(), gr.skip(), gr.skip(), *untouched)
    except OSError as error:
        raise as_toast(error) from None


def _data_of(desk: Desk, run: Run, otherwise: tuple[Any, ...]) -> tuple[Any, ...]:
    known = {dataset.id: dataset for dataset in desk.studio.data.list()}
    dataset = known.get(run.config.dataset.id)
    return data_tab.opened(dataset, run.config.dataset) if dataset else otherwise


def _used(desk: Desk) -> Any:
    return gr.Dropdown(choices=[(f"{one.name} · {one.rows:,} rows", one.id) for one in desk.studio.data.list()])


def _to_training() -> Any:
    return gr.Tabs(selected="train")


def _to_compare(desk: Desk, run: str) -> tuple[Any, Any]:
    return gr.Tabs(selected="compare"), compare_tab.list_runs(desk, run)


def _cell_to_compare(desk: Desk, event: gr.EventData) -> tuple[Any, Any]:
    return _to_compare(desk, str(event.run))


def _cell_to_export(desk: Desk, event: gr.EventData) -> tuple[Any, Any]:
    return gr.Tabs(selected="export"), compare_tab.list_runs(desk, str(event.run))


def _cell_to_run(event: gr.EventData) -> tuple[Any, str]:
    return gr.Tabs(selected="train"), str(event.run)
