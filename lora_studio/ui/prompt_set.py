"""Compare, a set of prompts: rows of a table, one column per model, filled while it is answered.

The table's script is prompt_set.js; everything that a model or a person wrote goes into the page as text.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from lora_studio.data.readers import EXTENSIONS
from lora_studio.errors import StudioError
from lora_studio.ui import answering, fetch, form, panes, script
from lora_studio.ui.answering import BASE, HELDOUT, TYPED
from lora_studio.ui.boundary import problem_last
from lora_studio.ui.data_tab import claimed
from lora_studio.ui.desk import Desk

UPLOADED = "A file"
MOST_RUNS = 4
NOTHING: dict[str, Any] = {"names": [], "rows": [], "line": "", "scores": [], "badge": None}


@dataclass(frozen=True)
class PromptSet:
    """The components that events join."""

    runs: gr.Dropdown
    source: gr.Radio
    count: gr.Slider
    typed: gr.Textbox
    file: gr.Column
    upload: gr.File
    about_file: gr.HTML
    tokens: gr.Number
    go: gr.Button
    stop: gr.Button
    problem: gr.HTML
    table: gr.HTML
    csv: gr.Button
    jsonl: gr.Button
    fetch: gr.HTML
    uploaded: gr.State  # prompts.Prompt of the file
    answers: gr.State  # prompts.Answers, what the table shows


def build(desk: Desk) -> PromptSet:
    """Above: which models and which prompts. Below: the table and what may be taken away."""
    with gr.Column(elem_classes="card"):
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=260):
                runs = gr.Dropdown(
                    [],
                    label="Runs",
                    info=f"Beside the base model; up to {MOST_RUNS} that share it",
                    multiselect=True,
                    max_choices=MOST_RUNS,
                    elem_id="set-runs",
                )
                source = gr.Radio([HELDOUT, TYPED, UPLOADED], value=HELDOUT, label="Prompts", elem_id="set-source")
                count = answering.row_count(desk.limits, "set-count")
                typed = gr.Textbox(
                    label="Prompts, one a line", lines=5, max_lines=12, visible=False, elem_id="set-typed"
                )
                with gr.Column(visible=False) as file:
                    upload = gr.File(
                        label="Text, JSON lines or CSV; a second column is the wanted answer",
                        file_types=sorted(EXTENSIONS),
                        height=120,
                        elem_id="set-upload",
                        elem_classes="keep",
                    )
                    about_file = gr.HTML("", apply_default_css=False, elem_id="set-file")
            with gr.Column(scale=4, min_width=220):
                tokens = answering.answer_length("set-tokens", 64)
                with gr.Row():
                    go = gr.Button("Answer all", variant="primary", min_width=110, elem_id="answer-all")
                    stop = gr.Button("Stop", min_width=80, interactive=False, elem_id="stop-set")
        problem = gr.HTML("", apply_default_css=False, elem_id="set-problem")
    with gr.Column(elem_classes="card"):
        table = gr.HTML(
            NOTHING,
            html_template=script.template("prompt_set"),
            js_on_load=script.of("prompt_set"),
            apply_default_css=False,
            elem_id="set-table",
        )
        with gr.Row():
            csv = gr.Button("Download CSV", min_width=140, elem_id="set-csv")
            jsonl = gr.Button("Download JSON lines", min_width=140, elem_id="set-jsonl")
    return PromptSet(
        *(runs, source, count, typed, file, upload, about_file, tokens, go, stop, problem, table, csv, jsonl),
        fetch.build("set-file-fetch"),
        gr.State([]),
        gr.State(None),
    )


# ---- handlers ----------------------------------------------------------------------------------------------------


def show_source(source: str) -> tuple[Any, ...]:
    """Which of the sources' controls are there: rows, text, file."""
    return *answering.show_source(source), gr.Column(visible=source == UPLOADED)


@problem_last(2)
def open_file(desk: Desk, path: str | None) -> tuple[Any, ...]:
    """The prompts of an uploaded file, and how many there are."""
    if not path:
        return [], ""
    studio = desk.ready()
    with claimed(Path(path), studio.root) as file:
        prompts = studio.prompts_in(file)
    wanted = sum(bool(prompt.target) for prompt in prompts)
    return prompts, f"<p class='soft'>{len(prompts):,} prompts, {wanted:,} of them with the wanted answer.</p>"


@problem_last(2)
def answer(
    desk: Desk,
    runs: Sequence[str] | None,
    source: str,
    count: int,
    typed: str,
    uploaded: Sequence[Any],
    max_new_tokens: Any,
) -> Iterator[tuple[Any, ...]]:
    """The table as it fills, and its texts for a download."""
    sides = [BASE, *list(runs or ())[:MOST_RUNS]]
    how = form.sampling({"max_new_tokens": max_new_tokens})
    views, names = answering.chosen(desk.studio, sides)
    studio = desk.ready(views[0].config.model)
    from lora_studio.prompts import Answers, check_set

    prompts = uploaded if source == UPLOADED else answering.asked(studio, views[0].id, source, typed, count)
    check_set(prompts, len(sides), how.max_new_tokens, studio.limits)
    shown, sign = Answers(names, tuple(prompts), {}), None
    yield picture(shown, line="Loading the base model"), shown
    with closing(studio.answer_prompts(sides, prompts, how)) as news:
        for fresh, due in answering.paced(news):
            assert fresh.base_difference is not None, "the base is among the sides"
            sign = sign or panes.badge(fresh.base_difference, fresh.exact)
            if fresh.texts:
                texts = {number: tuple(ones) for number, ones in fresh.texts.items()}
                shown = Answers(shown.names, shown.prompts, {**shown.texts, **texts})
            if fresh.texts or due:
                yield picture(shown, sign), shown
    yield picture(shown, sign), shown


@problem_last(1)
def download(desk: Desk, kind: str, answers: Any) -> str:
    """The address of the table as a file."""
    exports = desk.studio.exports
    from lora_studio.export import fresh_download
    from lora_studio.prompts import as_csv, as_jsonl

    if not answers or not answers.texts:
        raise StudioError("E_NO_ANSWERS", "There is no answer yet.", "Choose prompts and press Answer all.")
    file = fresh_download(exports) / f"answers.{kind}"
    file.write_bytes(as_csv(answers) if kind == "csv" else as_jsonl(answers))
    return desk.hand_out(file)


# ---- plain values out of plain values ----------------------------------------------------------------------------


def picture(answers: Any, sign: tuple[str, str] | None = None, *, line: str = "") -> Mapping[str, Any]:
    """What the table's script draws of prompts.Answers; sign: the badge of the base model, which is the first."""
    from lora_studio.prompts import means, scores

    rows = []
    for number, prompt in enumerate(answers.prompts):
        texts = answers.texts.get(number, ())
        cells = [{"text": text, "score": score_words(scores(text, prompt.target))} for text in texts]
        rows.append({"prompt": answering.words(prompt.messages), "target": prompt.target, "answers": cells})
    done = f"{len(answers.texts):,} of {len(answers.prompts):,} prompts answered"
    return {
        "names": list(answers.names),
        "rows": rows,
        "line": line or done,
        "badge": sign,
        "scores": [mean_words(mean) for mean in means(answers)] if answers.scored else [],
    }


def score_words(found: Mapping[str, float]) -> str:
    """How near one answer is to the wanted one."""
    if not found:
        return ""
    return "exact match" if found["exact_match"] else f"ROUGE-L {found['rouge_l']:.2f}"


def mean_words(mean: Mapping[str, float]) -> str:
    """How near a model's answers are."""
    if not mean["rows"]:
        return "–"
    rows = int(mean["rows"])
    return f"exact {round(mean['exact_match'] * rows)} of {rows} · ROUGE-L {mean['rouge_l']:.2f}"
