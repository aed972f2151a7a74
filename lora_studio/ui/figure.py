"""A plotly figure on the page, drawn by the plotly.js that the live view serves.

gr.Plot would load a second plotly.js, and draws with its own colours in the dark.
"""

import json
from pathlib import Path
from typing import Any

import gradio as gr

from lora_studio.ui.live import DRAWING

HERE = Path(__file__).parent


def build(label: str, name: str) -> gr.HTML:
    """The component; its value is `value(figure)` or {}. label: what is read out for it."""
    return gr.HTML(
        {},
        html_template=f"<div class='figure' role='img' aria-label='{label}'></div>",
        js_on_load=(HERE / "figure.js").read_text(encoding="utf-8"),
        head=DRAWING,
        apply_default_css=False,
        elem_id=name,
    )


def value(figure: Any) -> dict[str, Any]:
    """A plotly Figure as the component takes it."""
    return json.loads(figure.to_json())
