"""The page's head: logo, news, hardware; it also explains words, and takes what an empty tab or a problem offers."""

from pathlib import Path
from typing import Any

import gradio as gr

from lora_studio.ui import style
from lora_studio.ui.desk import Desk
from lora_studio.ui.terms import TERMS
from lora_studio.visitors import signing_in

HEADER = f"""<header class="top">{style.LOGO}<h1>LoRA Studio</h1>
<p class="news" role="status" aria-live="polite"></p><span class="chip" hidden></span>
<div class="says" id="says" role="tooltip" hidden></div></header>"""


def build(desk: Desk) -> gr.HTML:
    """The component; it raises `example` to try the example, and `cure` with settings to change."""

    def status(desk: Desk, _: Any = None) -> dict:
        return desk.status()

    made = gr.HTML(
        TERMS,
        html_template=HEADER,
        js_on_load=(Path(__file__).parent / "header.js").read_text(encoding="utf-8"),
        server_functions=[desk.mine(status)],
        apply_default_css=False,
    )
    if signing_in():
        gr.LoginButton(size="sm", elem_id="sign-in")
    return made
