"""Answers side by side: a pane for each, drawn from plain values by panes.js, so that a streamed text is appended to.

Its value is a list of `pane`s. Whatever they say is set as text, never as HTML.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr


def build(name: str, empty: str) -> gr.HTML:
    """The component; `empty` stands there while it has no pane."""
    return gr.HTML(
        [],
        html_template=f"<div class='empty'>{empty}</div><div class='panes'></div>",
        js_on_load=(Path(__file__).parent / "panes.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=name,
    )


def pane(
    title: str,
    *,
    about: str = "",
    parts: Sequence[tuple[str, bool]] = (),
    pace: str = "",
    badge: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """One answer. parts: its text in pieces, each with whether it is marked; badge: good, bad or plain, and words."""
    return {"title": title, "about": about, "parts": [list(part) for part in parts], "pace": pace, "badge": badge}


def badge(difference: float, exact: bool = True) -> tuple[str, str]:
    """Whether the base answers as the untouched model does, by its logits; virtual tokens leave one of rounding."""
    if not exact:
        about = f"Virtual tokens are masked in this row: max difference to the untouched model {difference:.2g}"
        return "plain", about
    if difference == 0:
        return "good", "Checked: equal to the untouched model (max difference 0)"
    return "bad", f"Not the untouched model: max difference {difference:.3g}"
