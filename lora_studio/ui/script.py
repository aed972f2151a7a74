"""The scripts of the page's own views: each begins with what they have in common (common.js)."""

from pathlib import Path

HERE = Path(__file__).parent


def of(name: str) -> str:
    """The script of one view, as gr.HTML takes it."""
    return "".join((HERE / f"{one}.js").read_text(encoding="utf-8") for one in ("common", name))
