"""A wanted answer token by token, once for each model, shaded by how likely the model finds each; drawn by tokens.js.

Its value is `value(...)`, or {} for nothing. One stop of the Tab key per model; arrow keys go from token to token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr


def build(name: str) -> gr.HTML:
    """The component."""
    return gr.HTML(
        {},
        html_template="<p class='soft readout' role='status'></p><div class='rows'></div>",
        js_on_load=(Path(__file__).parent / "tokens.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=name,
    )


def value(names: Sequence[str], texts: Sequence[str], chances: Sequence[Sequence[float]]) -> dict[str, Any]:
    """names and chances: of each model; texts: of the tokens that all of them are asked about."""
    rows = [
        {"name": name, "chances": [round(chance, 4) for chance in row], "said": [percent(chance) for chance in row]}
        for name, row in zip(names, chances, strict=True)
    ]
    return {"texts": list(texts), "rows": rows}


def percent(chance: float) -> str:
    """0.973 as 97 %, 0.0123 as 1.2 %, 0.00001 as under 0.1 %."""
    if chance < 0.001:
        return "under 0.1 %"
    return f"{100 * chance:.1f} %" if chance < 0.1 else f"{100 * chance:.0f} %"
