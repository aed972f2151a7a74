"""The page's own views: each has its HTML, and a script that begins with what they have in common (common.js)."""

from pathlib import Path

from lora_studio.ui.boundary import OFFER, TRY

HERE = Path(__file__).parent


def of(name: str) -> str:
    """The script of one view, as gr.HTML takes it."""
    return "".join((HERE / f"{one}.js").read_text(encoding="utf-8") for one in ("common", name))


def template(name: str) -> str:
    """The HTML of one view, with the buttons in it that offer the example."""
    page = (HERE / f"{name}.html").read_text(encoding="utf-8")
    return page.replace("<!-- offer -->", OFFER).replace("<!-- try -->", TRY)
