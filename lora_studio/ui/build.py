"""build(desk): the page. Tabs are drawn by their own modules; here their events are joined."""

from typing import Any

import gradio as gr

from lora_studio.data.library import SAMPLES
from lora_studio.errors import StudioError
from lora_studio.runs.config import Run
from lora_studio.settings import TrainConfig
from lora_studio.ui import (
    adapter_upload,
    answering,
    api,
    blind,
    chat,
    compare_tab,
    data_tab,
    export_tab,
    fetch,
    header,
    inside_tab,
    live,
    prompt_set,
    report_card,
    runs_tab,
    study_tab,
    train_tab,
)
from lora_studio.ui.adapter_upload import AdapterUpload
from lora_studio.ui.blind import Blind
from lora_studio.ui.boundary import as_toast
from lora_studio.ui.chat import Chat
from lora_studio.ui.compare_tab import CompareTab
from lora_studio.ui.data_tab import DataTab
from lora_studio.ui.desk import Desk
from lora_studio.ui.export_tab import ExportTab
from lora_studio.ui.inside_tab import InsideTab
from lora_studio.ui.prompt_set import PromptSet
from lora_studio.ui.study_tab import StudyTab
from lora_studio.ui.train_tab import TrainTab

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
QUICK: dict[str, Any] = {**QUIET, "queue": False}
LATEST: dict[str, Any] = {**QUIET, "trigger_mode": "always_last", "concurrency_limit": 4}


def build(desk: Desk) -> gr.Blocks:
    """The whole page; serve it with style.looks()."""
    with gr.Blocks(title="LoRA Studio", fill_width=True, analytics_enabled=False, delete_cache=(600, 900)) as page:
        api.register(desk)
        head = header.build(desk)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("1 Data", id="data"):
                data = data_tab.build(desk.limits)
            with gr.Tab("2 Train", id="train"):
                train = train_tab.build(desk)
            with gr.Tab("Study", id="study") as study_page:
                study = study_tab.build(desk)
            with gr.Tab("Runs", id="runs"), gr.Column(elem_classes="card"):
                runs = runs_tab.build(desk)
            with gr.Tab("3 Compare", id="compare") as compare_page, gr.Tabs(elem_id="compare-ways"):
                with gr.Tab("Answers"):
                    compare = compare_tab.build()
                    brought = adapter_upload.build(desk.limits)
                with gr.Tab("Prompt set") as set_page:
                    questions = prompt_set.build(desk)
                with gr.Tab("Chat") as chat_page:
                    talk = chat.build()
                with gr.Tab("Blind") as blind_page:
                    votes = blind.build(desk)
            with gr.Tab("4 Inside", id="inside") as inside_page:
                inside = inside_tab.build()
            with gr.Tab("5 Export", id="export") as export_page:
                export = export_tab.build()
        report_file = fetch.build("report-file")  # outside the tabs, whose parts are there only once they are opened
        cured = [data.problem, train.problem, study.problem]
        head.example(desk.mine(_to_example), None, [tabs, *_opened(data), *cured], **QUIET)
        _join_data(desk, data, train, tabs)
        _join_cure(desk, head, data, train, study)
        _join_settings(desk, page, data, train)
        _join_run(desk, page, data, train, study, compare, export, tabs)
        _join_study(desk, study, study_page, data, train, compare, export, tabs)
        _join_runs(desk, runs, data, train, study, compare, inside, export, tabs)
        _join_compare(desk, compare)
        _join_prompt_set(desk, questions, [compare_page.select, set_page.select])
        _join_chat(desk, talk)
        _join_blind(desk, votes, [compare_page.select, blind_page.select])
        _join_upload(desk, brought, train, compare, tabs)
        _join_inside(desk, inside)
        _join_export(desk, export)
        hand_out = desk.mine(report_card.hand_out)
        export.report.click(hand_out, export.run, report_file, show_progress_on=[export.report], **PRIVATE)
        made = train.live.report(hand_out, train.live, report_file, **QUIET)
        made.then(None, None, None, js=report_card.MADE, **QUICK)
        seen = _list_runs(desk, [compare_page.select], train, compare)
        seen.then(desk.mine(compare_tab.list_others), [compare.run, compare.others], _beside(compare), **QUICK)
        listed = _list_runs(desk, [inside_page.select], train, inside)
        listed.then(desk.mine(inside_tab.list_others), [inside.run, inside.other], inside.other, **QUICK)
        _list_runs(desk, [export_page.select], train, export)
        _list_runs(desk, [compare_page.select, chat_page.select], train, talk)
        for drawn in (export_page, *export.ways):  # its boxes are there only once a tab has been opened
            drawn.select(None, None, None, js=export_tab.NAME_BOXES, **QUICK)
    return page


def _list_runs(desk: Desk, shown: list[Any], train: TrainTab, part: CompareTab | InsideTab | ExportTab | Chat) -> Any:
    """The runs to choose from, each time that the tab of the choice is opened."""
    chosen = [part.run, part.followed]
    return gr.on(shown, desk.mine(compare_tab.list_runs), [part.run, train.live, part.followed], chosen, **QUICK)


def _join_data(desk: Desk, data: DataTab, train: TrainTab, tabs: gr.Tabs) -> None:
    opened = [*_opened(data), data.problem]
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


def _opened(data: DataTab) -> list[Any]:
    """What a dataset fills when it is opened, data_tab.OPENED of them."""
    return [data.choice, data.correction, data.format, *data.slots, data.row]


def _join_preview(desk: Desk, data: DataTab, train: TrainTab) -> None:
    settings, row = train.settings, [data.choice, data.row, train.model]
    inspect, show_row = desk.mine(data_tab.inspect), desk.mine(data_tab.show_row)
    split = [settings["holdout"], settings["seed"], train.task]
    seen_by, shown = _seen_by(data, train), _row_shown(data, train)
    changed = [train.model.change, settings["max_length"].change, train.task.change]
    gr.on([*changed, settings["holdout"].change], inspect, seen_by, data.seen, **LATEST)
    waiting = data.choice.change(
        data_tab.reading, [data.choice, data.understood], [data.understood, data.pager, data.health], **QUICK
    )
    waiting.then(inspect, seen_by, data.seen, **LATEST)
    gr.on([data.choice.change, *changed], show_row, shown, data.preview, **LATEST)
    data.row.input(show_row, shown, data.preview, **LATEST)
    for button, by in ((data.back, -1), (data.on, 1)):
        turned = button.click(desk.mine(data_tab.turn, by), [data.choice, data.row], data.row, **QUICK)
        turned.then(show_row, shown, data.preview, **LATEST)

    tried = [data.choice, data.limit, *seen_by[1:]]
    data.limit.input(desk.mine(data_tab.try_limit), tried, data.costs, **LATEST)
    # the control of the Train tab says nothing of a change before that tab was opened once
    data.use_limit.click(inspect, [data.choice, train.model, data.limit, *split], data.seen, **LATEST)
    data.use_limit.click(show_row, [*row, data.limit, train.task], data.preview, **LATEST)


def _seen_by(data: DataTab, train: TrainTab) -> list[Any]:
    """What the card of a dataset depends on, data_tab.inspect's."""
    settings = train.settings
    return [data.choice, train.model, *(settings[name] for name in ("max_length", "holdout", "seed")), train.task]


def _row_shown(data: DataTab, train: TrainTab) -> list[Any]:
    """What the tokens of one row depend on, data_tab.show_row's."""
    return [data.choice, data.row, train.model, train.settings["max_length"], train.task]


def _join_cure(desk: Desk, head: gr.HTML, data: DataTab, train: TrainTab, study: StudyTab) -> None:
    solved = {train.problem: "", study.problem: ""}

    def cure(event: gr.EventData) -> dict[Any, Any]:
        """The settings as a problem said that they should be, and no problem any more."""
        return {train.settings[name]: value for name, value in event.change.items() if name in train.settings} | solved

    cured = head.cure(cure, None, [*train.settings.values(), *solved], **QUICK)
    asked, controls = _asked(data, train), {"inputs_kwargs": train.settings, **LATEST}
    # a control that is folded away says nothing of its change
    cured.then(desk.mine(train_tab.cost), asked, train.line, **controls)
    cured.then(desk.mine(study_tab.cost), [*asked, *study.asked], study.line, **controls)
    cured.then(desk.mine(data_tab.inspect), _seen_by(data, train), data.seen, **LATEST)
    cured.then(desk.mine(data_tab.show_row), _row_shown(data, train), data.preview, **LATEST)


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
    used = data.use_limit.click(data_tab.use_limit, data.limit, train.settings["max_length"], **QUICK)
    used.then(cost, **asked)
    pressed = train.preset.input(train_tab.press_preset, [train.picker, train.preset], train.picker, **QUICK)
    pressed.then(cost, **asked)
    train.picker.pick(train_tab.name_preset, train.picker, train.preset, **QUICK)
    train.picker.pick(cost, **asked)
    changed = train.method.input(
        train_tab.show_method, train.method, [*train.of_lora, train.settings["width"]], **QUICK
    )
    changed.then(cost, **asked)
    rate, ours = train.settings["learning_rate"], gr.State(TrainConfig.learning_rate)
    usual = [train.model, train.method, rate, ours]
    gr.on([train.method.input, train.model.input], desk.mine(train_tab.settle_rate), usual, [rate, ours], **QUIET)
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
    export: ExportTab,
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
    this = [train.live, train.live]
    to_compare = train.live.compare(desk.mine(_to_compare), this, [tabs, compare.run, compare.followed], **QUICK)
    _follow_choice(desk, compare, to_compare)
    train.live.export(desk.mine(_to_export), this, [tabs, export.run, export.followed], **QUICK)

    def restore(request: gr.Request) -> tuple[Any, ...]:
        asked = request.query_params
        return first_view(desk.of(request), str(asked.get("run", "")), str(asked.get("study", "")))

    # queued: an event that is not does not tell the page that the State of the choice has changed
    restored = page.load(restore, None, [train.live, tabs, study.view, *_opened(data)], **QUIET)
    restored.then(desk.mine(_form_of, tuple(train.settings)), train.live, _form(train), **QUIET)


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

    comparing, exporting = [tabs, compare.run, compare.followed], [tabs, export.run, export.followed]
    picked = study.view.compare(desk.mine(_cell_to_compare), train.live, comparing, **QUICK)
    _follow_choice(desk, compare, picked)
    study.view.export(desk.mine(_cell_to_export), train.live, exporting, **QUICK)
    study.view.watch(_cell_to_run, None, [tabs, train.live], **QUICK)


def _form(train: TrainTab) -> list[Any]:
    """What a run's settings fill, train_tab.filled of them."""
    about = [train.model, train.task, train.forced, train.method, *train.of_lora, train.preset, train.picker]
    return [*about, *train.settings.values()]


def _join_runs(
    desk: Desk,
    runs: gr.HTML,
    data: DataTab,
    train: TrainTab,
    study: StudyTab,
    compare: CompareTab,
    inside: InsideTab,
    export: ExportTab,
    tabs: gr.Tabs,
) -> None:
    runs.watch(_cell_to_run, None, [tabs, train.live], **QUICK)
    runs.study(_to_study, None, [tabs, study.view], **QUICK)
    comparing = [tabs, compare.run, compare.followed]
    picked = runs.compare(desk.mine(_cell_to_compare), train.live, comparing, **QUICK)
    picked.then(desk.mine(compare_tab.list_prompts), compare.run, compare.chips, **QUIET)
    looking = runs.inside(desk.mine(_cell_to_inside), train.live, [tabs, inside.run, inside.followed], **QUICK)
    looking.then(desk.mine(inside_tab.list_others), [inside.run, inside.other], inside.other, **QUICK)
    runs.export(desk.mine(_cell_to_export), train.live, [tabs, export.run, export.followed], **QUICK)
    filled = [tabs, *_opened(data), *_form(train)]
    # queued, as the restored choice of `_join_run` is
    runs.clone(desk.mine(_to_form, tuple(train.settings)), None, filled, **QUIET)


def _join_compare(desk: Desk, compare: CompareTab) -> None:
    cleared = [compare.panes, compare.problem, *compare.buttons]
    forward = {"concurrency_id": "model", "concurrency_limit": 1, **QUIET}
    answering = []
    for triggers, handler, inputs in (
        (
            [compare.go.click, compare.prompt.submit],
            compare_tab.compare,
            [compare.run, compare.others, compare.prompt, compare.row, compare.mode, compare.strength],
        ),
        (
            [compare.ladder.click],
            compare_tab.compare_strengths,
            [compare.run, compare.prompt, compare.row, compare.mode],
        ),
    ):
        begun = gr.on(triggers, compare_tab.clear, None, cleared, **QUICK)
        outputs = [compare.panes, compare.problem]
        answering.append(begun.then(desk.mine(handler), inputs, outputs, inputs_kwargs=compare.sampling, **forward))
        answering[-1].then(compare_tab.settle, None, compare.buttons, **QUICK)
    stopped = [compare.panes, *compare.buttons]
    compare.stop.click(compare_tab.stop, compare.panes, stopped, cancels=answering, **QUICK)

    looked = [compare.run, compare.others, compare.row, compare.strength]
    begun = compare.look.click(compare_tab.wait, None, compare.of_wanted, **QUICK)
    looking = begun.then(desk.mine(compare_tab.look_at_tokens), looked, compare.of_wanted, **forward)
    begun = compare.measure.click(compare_tab.wait, None, compare.of_curve, **QUICK)
    measuring = begun.then(desk.mine(compare_tab.measure), compare.run, compare.of_curve, **forward)

    # what is measured just now, of another run or answer, is not to be shown beside this one
    changed = compare.run.change(compare_tab.forget, None, compare.of_curve, cancels=[measuring], **QUICK)
    _follow_choice(desk, compare, changed)
    gr.on(
        [compare.run.change, compare.others.change],
        compare_tab.forget,
        None,
        compare.of_wanted,
        cancels=[looking],
        **QUICK,
    )
    answer = [compare.row, compare.expected]
    changed.then(desk.mine(compare_tab.keep_answer), [compare.run, compare.prompt, compare.row], answer, **QUICK)
    asked = [compare.prompt, *answer, *compare.of_wanted]
    compare.chips.pick(compare_tab.take_prompt, None, asked, cancels=[looking], **QUICK)
    compare.prompt.input(compare_tab.own_prompt, None, asked[1:], cancels=[looking], **QUICK)


def _follow_choice(desk: Desk, compare: CompareTab, chosen: Any) -> None:
    """After a run was chosen to compare: its prompts, and the runs that fit beside it."""
    chosen.then(desk.mine(compare_tab.list_prompts), compare.run, compare.chips, **QUIET)
    chosen.then(desk.mine(compare_tab.list_others), [compare.run, compare.others], _beside(compare), **QUICK)


def _beside(compare: CompareTab) -> list[Any]:
    return [compare.others, compare.apart]


def _join_prompt_set(desk: Desk, part: PromptSet, shown: list[Any]) -> None:
    gr.on(shown, desk.mine(answering.list_several), part.runs, part.runs, **QUICK)
    part.source.input(prompt_set.show_source, part.source, [part.count, part.typed, part.file], **QUICK)
    opened = [part.uploaded, part.about_file, part.problem]
    part.upload.upload(desk.mine(prompt_set.open_file), part.upload, opened, show_progress_on=[part.upload], **PRIVATE)
    answering_all = _with_stop(
        part.go.click,
        desk.mine(prompt_set.answer),
        [part.runs, part.source, part.count, part.typed, part.uploaded, part.tokens],
        [part.table, part.answers, part.problem],
        [part.go, part.stop],
    )
    part.stop.click(answering.settled, None, [part.go, part.stop], cancels=[answering_all], **QUICK)
    for button, kind in ((part.csv, "csv"), (part.jsonl, "jsonl")):
        button.click(desk.mine(prompt_set.download, kind), part.answers, [part.fetch, part.problem], **QUIET)


def _join_chat(desk: Desk, part: Chat) -> None:
    answering_both = _with_stop(
        [part.send.click, part.said.submit],
        desk.mine(chat.say),
        [part.run, part.said, part.turns, part.strength, part.tokens, part.temperature],
        [part.said, part.talk, part.turns, part.problem],
        [part.send, part.stop],
    )
    part.stop.click(answering.settled, None, [part.send, part.stop], cancels=[answering_both], **QUICK)
    emptied = [part.talk, part.turns, part.problem, part.send, part.stop]
    gr.on([part.restart.click, part.run.input], chat.forget, None, emptied, cancels=[answering_both], **QUICK)


def _join_blind(desk: Desk, part: Blind, shown: list[Any]) -> None:
    sides = [part.first, part.second]
    gr.on(shown, desk.mine(answering.list_sides), sides, sides, **QUICK)
    gr.on(shown, desk.mine(blind.resume), None, part.arena, **QUICK)
    part.source.input(answering.show_source, part.source, [part.count, part.typed], **QUICK)
    writing = _with_stop(
        part.go.click,
        desk.mine(blind.start),
        [*sides, part.source, part.count, part.typed, part.tokens],
        [part.arena, part.problem],
        [part.go, part.stop],
    )
    part.stop.click(answering.settled, None, [part.go, part.stop], cancels=[writing], **QUICK)
    part.arena.vote(desk.mine(blind.vote), None, [part.arena, part.problem], **QUICK)
    part.arena.reveal(desk.mine(blind.reveal), None, [part.arena, part.problem], **QUICK)
    part.arena.download(desk.mine(blind.download), None, [part.fetch, part.problem], **QUICK)


def _with_stop(triggers: Any, handler: Any, inputs: list[Any], outputs: list[Any], buttons: list[Any]) -> Any:
    """A stream on the model, with Stop instead of its button while it goes on; the event that Stop cancels."""
    begun = gr.on(triggers, answering.begun, None, buttons, **QUICK)
    streaming = begun.then(handler, inputs, outputs, concurrency_id="model", concurrency_limit=1, **QUIET)
    streaming.then(answering.settled, None, buttons, **QUICK)
    return streaming


def _join_upload(desk: Desk, brought: AdapterUpload, train: TrainTab, compare: CompareTab, tabs: gr.Tabs) -> None:
    brought.go.click(
        desk.mine(adapter_upload.adopt),
        [brought.files, brought.model, brought.name],
        [brought.run, brought.files, brought.done, brought.problem],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=[brought.go],
        **PRIVATE,
    )
    brought.run.change(
        desk.mine(_to_compare), [brought.run, train.live], [tabs, compare.run, compare.followed], **QUICK
    )


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
        [inside.curve, inside.curve_line, inside.measured, inside.rank, inside.dial_problem],
        concurrency_id="model",
        concurrency_limit=1,
        **QUIET,
    )
    dial = [inside.measured, inside.rank]
    gr.on([inside.rank.change, inside.measured.change], inside_tab.read_dial, dial, inside.rank_line, **LATEST)
    begun = inside.download.click(inside_tab.forget, None, inside.proof, **QUICK)
    packing = begun.then(
        desk.mine(inside_tab.pack_smaller),
        [inside.run, inside.rank],
        [inside.file, inside.proof, inside.dial_problem],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=[inside.download],
        **PRIVATE,
    )
    gone = [inside.run.change, inside.rank.change]
    gr.on(gone, inside_tab.forget, None, inside.proof, cancels=[packing], **QUICK)


def _join_export(desk: Desk, export: ExportTab) -> None:
    proven, uploaded = [export.proof, export.problem], [export.pushed, export.push_problem]
    export.run.change(desk.mine(export_tab.describe), export.run, export.described, **QUIET)
    export.run.change(export_tab.forget_all, None, [*proven, *uploaded], **QUICK)
    for button, merged in ((export.adapter, False), (export.merged, True)):
        begun = button.click(export_tab.forget, None, proven, **QUICK)
        begun.then(
            desk.mine(export_tab.pack, merged),
            [export.run, export.dtype],
            [export.file, *proven],
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


def _to_example(desk: Desk) -> tuple[Any, ...]:
    """The first sample is chosen, what trains on it stands open, and nobody says any more that there is no dataset."""
    return _to_training(), *data_tab.opened(desk.studio.data.add_sample(next(iter(SAMPLES)))), "", "", ""


def _to_training() -> Any:
    return gr.Tabs(selected="train")


def _to_compare(desk: Desk, run: str, live: str) -> tuple[Any, ...]:
    """That run is compared, whichever the Train tab shows."""
    return gr.Tabs(selected="compare"), *compare_tab.list_runs(desk, run, live, followed=live)


def _to_export(desk: Desk, run: str, live: str) -> tuple[Any, ...]:
    return gr.Tabs(selected="export"), *compare_tab.list_runs(desk, run, live, followed=live)


def _cell_to_compare(desk: Desk, live: str, event: gr.EventData) -> tuple[Any, ...]:
    return _to_compare(desk, str(event.run), live)


def _cell_to_export(desk: Desk, live: str, event: gr.EventData) -> tuple[Any, ...]:
    return _to_export(desk, str(event.run), live)


def _cell_to_inside(desk: Desk, live: str, event: gr.EventData) -> tuple[Any, ...]:
    return gr.Tabs(selected="inside"), *compare_tab.list_runs(desk, str(event.run), live, followed=live)


def _to_study(event: gr.EventData) -> tuple[Any, str]:
    return gr.Tabs(selected="study"), str(event.study)


def _to_form(desk: Desk, settings: tuple[str, ...], event: gr.EventData) -> tuple[Any, ...]:
    """Tabs 1 and 2 as they were when that run was started."""
    run, untouched = desk.studio.runs.get(str(event.run)), (gr.skip(),) * data_tab.OPENED
    filled, opened = train_tab.filled(desk, run.config, settings), _data_of(desk, run, untouched)
    if opened is untouched:
        gr.Warning("The dataset of this run is no longer here. Choose another in tab 1.")
    return gr.Tabs(selected="train"), *opened, *filled


def _form_of(desk: Desk, settings: tuple[str, ...], run: str) -> tuple[Any, ...]:
    """Tab 2 as it was when the run that is shown was started; as it is, where none is or it cannot be told."""
    try:
        return train_tab.filled(desk, desk.studio.runs.get(run).config, settings)
    except StudioError:
        return (gr.skip(),) * (train_tab.ABOUT + len(settings))


def _cell_to_run(event: gr.EventData) -> tuple[Any, str]:
    return gr.Tabs(selected="train"), str(event.run)
