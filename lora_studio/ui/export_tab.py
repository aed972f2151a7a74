"""Tab 5: take the adapter away: archives made at the click, who can open it, the command that repeats the run."""

import html
from dataclasses import dataclass

import gradio as gr

from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError
from lora_studio.runs.config import Run
from lora_studio.ui import fetch
from lora_studio.ui.boundary import problem_last, toasted
from lora_studio.ui.desk import Desk

PEFT = """from peft import AutoPeftModelFor{kind}

model = AutoPeftModelFor{kind}.from_pretrained("{folder}"{more})  # the unpacked adapter"""
HERE = """from pathlib import Path
from lora_studio import LoRA
from lora_studio.adapters import load

lora = LoRA(model)
load(lora, Path("{folder}"), "mine")  # the unpacked adapter; then: with lora.use("mine"): ..."""
USUAL = "as loaded here"  # the dtype of merged weights when none is chosen

# Gradio's label goes to the copy button, which stands in it before the text
NAME_BOXES = """() => setTimeout(() => document.querySelectorAll('.code label').forEach((label) =>
  label.querySelector('textarea')?.setAttribute('aria-label', label.innerText.trim())), 50)"""


@dataclass(frozen=True)
class ExportTab:
    """The components that events join."""

    run: gr.Dropdown
    badge: gr.HTML
    adapter: gr.Button
    merged: gr.Button
    dtype: gr.Dropdown
    file: gr.HTML
    about: gr.HTML
    problem: gr.HTML
    command: gr.Textbox
    loading: gr.Textbox


def build() -> ExportTab:
    """Two downloads and two texts to copy."""
    with gr.Column(elem_classes="card narrow"):
        gr.HTML("<h3>Take it with you</h3>", apply_default_css=False)
        run = gr.Dropdown([], label="Run", value=None, elem_id="export-run")
        badge = gr.HTML("", apply_default_css=False, elem_id="portable")
        with gr.Row():
            adapter = gr.Button("Download the adapter", variant="primary", min_width=200, elem_id="get-adapter")
            merged = gr.Button("Download the merged model", min_width=200, elem_id="get-merged")
        gr.HTML(
            "<p class='soft'>The adapter needs its base model; LoRA's is a few megabytes in PEFT's layout. The merged"
            " model stands alone and is as large as the base. Both are packed at the click.</p>",
            apply_default_css=False,
        )
        dtype = gr.Dropdown(
            [USUAL, "float32", "bfloat16", "float16"],
            value=USUAL,
            label="Merged weights in",
            info="What rounding changes is measured and said here and in the card",
            elem_id="merged-dtype",
        )
        file = fetch.build("archive")
        about = gr.HTML("", apply_default_css=False, elem_id="export-about")
        problem = gr.HTML("", apply_default_css=False, elem_id="export-problem")
        command = _copyable("The command that repeats this run", "command", 2)
        loading = _copyable("Load the adapter in Python", "loading", 3)
    return ExportTab(run, badge, adapter, merged, dtype, file, about, problem, command, loading)


def _copyable(label: str, name: str, lines: int) -> gr.Textbox:
    return gr.Textbox(label=label, lines=lines, interactive=False, buttons=["copy"], elem_id=name, elem_classes="code")


@problem_last(2)
def pack(desk: Desk, merged: bool, run: str | None, dtype: str = USUAL) -> tuple[str, str]:
    """The address of a fresh archive, and what rounding did."""
    if not run:
        raise StudioError(
            "E_NO_RUN", "No run is chosen.", "Train one first; it appears here with its first evaluation."
        )
    view = desk.studio.runs.get(run)
    done = desk.ready(view.config.model).archive(view.id, merged=merged, dtype="" if dtype == USUAL else dtype)
    about = f"<p class='soft'>{html.escape(done.rounding.sentence)}</p>" if done.rounding else ""
    return desk.hand_out(done.files[-1]), about


@toasted
def describe(desk: Desk, run: str | None) -> tuple[str, str, str]:
    """The command line, the lines that load the adapter, and whether other programs take it."""
    if not run:
        return "", "", ""
    view = desk.ready().runs.get(run)
    from lora_studio.export import command_line

    folder = f"adapter-{view.id[:8]}"
    if not isinstance(view.config.method, LoraSpec):
        return command_line(view), HERE.format(folder=folder), badge(view)
    kind, more = ("SequenceClassification", f", num_labels={len(view.labels)}") if view.labels else ("CausalLM", "")
    return command_line(view), PEFT.format(kind=kind, folder=folder, more=more), badge(view)


def badge(run: Run) -> str:
    """portable, when PEFT and vLLM take the adapter alike; else why not."""
    from lora_studio.adapters import portable

    whole, why = portable(run.path / "adapter")
    if whole:
        return "<span class='badge good'>portable: PEFT and vLLM open this adapter</span>"
    return f"<span class='badge plain'>not portable</span> <span class='soft'>{html.escape(why)}</span>"
