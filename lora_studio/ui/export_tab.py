"""Tab 4: take the adapter away: archives made at the click, the command that repeats the run, how to load it."""

from dataclasses import dataclass

import gradio as gr

from lora_studio.errors import StudioError
from lora_studio.ui.boundary import problem_last, toasted
from lora_studio.ui.desk import Desk

PEFT = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")  # the unpacked adapter"""

# Gradio's label goes to the copy button, which stands in it before the text
NAME_BOXES = """() => setTimeout(() => document.querySelectorAll('.code label').forEach((label) =>
  label.querySelector('textarea')?.setAttribute('aria-label', label.innerText.trim())), 50)"""


@dataclass(frozen=True)
class ExportTab:
    """The components that events join."""

    run: gr.Dropdown
    adapter: gr.Button
    merged: gr.Button
    file: gr.DownloadButton
    problem: gr.HTML
    command: gr.Textbox
    loading: gr.Textbox


def build() -> ExportTab:
    """Two downloads and two texts to copy."""
    with gr.Column(elem_classes="card narrow"):
        gr.HTML("<h3>Take it with you</h3>", apply_default_css=False)
        run = gr.Dropdown([], label="Run", value=None, elem_id="export-run")
        with gr.Row():
            adapter = gr.Button("Download the adapter", variant="primary", min_width=200, elem_id="get-adapter")
            merged = gr.Button("Download the merged model", min_width=200, elem_id="get-merged")
        gr.HTML(
            "<p class='soft'>The adapter is a few megabytes in PEFT's layout and needs its base model. The merged model"
            " stands alone and is as large as the base. Both are packed at the click.</p>",
            apply_default_css=False,
        )
        file = gr.DownloadButton("File", visible="hidden", elem_id="archive")
        problem = gr.HTML("", apply_default_css=False, elem_id="export-problem")
        command = _copyable("The command that repeats this run", "command", 2)
        loading = _copyable("Load the adapter with PEFT", "loading", 3)
    return ExportTab(run, adapter, merged, file, problem, command, loading)


def _copyable(label: str, name: str, lines: int) -> gr.Textbox:
    return gr.Textbox(label=label, lines=lines, interactive=False, buttons=["copy"], elem_id=name, elem_classes="code")


@problem_last(1)
def pack(desk: Desk, run: str | None, merged: bool) -> str:
    """A fresh archive; Gradio copies it into its cache, from where the browser fetches it."""
    if not run:
        raise StudioError(
            "E_NO_RUN", "No run is chosen.", "Train one first; it appears here with its first evaluation."
        )
    view = desk.studio.runs.get(run)
    return str(desk.ready(view.config.model).archive(view.id, merged=merged))


@toasted
def describe(desk: Desk, run: str | None) -> tuple[str, str]:
    """The command line and the lines for PEFT."""
    if not run:
        return "", ""
    view = desk.ready().runs.get(run)
    from lora_studio.export import command_line

    return command_line(view), PEFT.format(folder=f"adapter-{view.id[:8]}")
