"""The report of a run, to take away: one file that opens without this app."""

import gradio as gr

from lora_studio.ui.desk import Desk

ABOUT = """<h3>Show it to someone</h3><p class='soft'>One HTML file with everything about this run: curves, answers,
data, settings, figures. It opens in any browser, offline, and loads nothing. It quotes held-out rows: send it to those
who may read them.</p>"""
MADE = "() => { document.querySelector('#live .report').textContent = 'Report'; }"  # in the live view


def build() -> gr.Button:
    """A card under the other downloads."""
    with gr.Column(elem_classes="card"):
        gr.HTML(ABOUT, apply_default_css=False)
        return gr.Button("Download the report", min_width=200, elem_id="get-report")


def hand_out(desk: Desk, run: str | None) -> str:
    """The address of a fresh report."""
    chosen = desk.run(run).id
    return desk.hand_out(desk.ready().report(chosen))
