"""What prompt set, chat and blind test share: runs to choose among, names, where prompts come from, pace of news."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import gradio as gr

from lora_studio.data.formats import Message
from lora_studio.errors import StudioError
from lora_studio.fields import knobs
from lora_studio.limits import Limits
from lora_studio.runs.config import Run
from lora_studio.settings import Sampling
from lora_studio.studio import Studio
from lora_studio.ui import form
from lora_studio.ui.desk import NO_RUN, Desk
from lora_studio.ui.live import run_label

BASE = "base"  # prompts.BASE, which cannot be imported before torch is
BASE_NAME = "Base model"
HELDOUT, TYPED = "Held-out rows", "Typed"
INTERVAL_S = 1 / 4  # between two pictures of what grows

News = TypeVar("News")


def answer_length(elem_id: str, value: int) -> gr.Number:
    """The control for the tokens of an answer."""
    return form.control(knobs(Sampling)["max_new_tokens"], elem_id=elem_id, value=value)


def row_count(limits: Limits, elem_id: str) -> gr.Slider:
    """The control for how many held-out rows are asked."""
    return gr.Slider(
        *(1, min(50, limits.prompts), min(10, limits.prompts)),
        step=1,
        label="Rows",
        info="The first held-out ones of the run",
        elem_id=elem_id,
    )


def choices(studio: Studio) -> list[tuple[str, str]]:
    """Label and id of every run that has an adapter, newest first."""
    return [(run_label(run), run.id) for run in studio.runs.list() if run.has_adapter]


def list_several(desk: Desk, runs: Sequence[str] | None) -> Any:
    """A choice of several runs with what is still there of it, or with the newest."""
    offered = choices(desk.studio)
    ids = [id for _, id in offered]
    kept = [run for run in runs or () if run in ids]
    return gr.Dropdown(choices=offered, value=kept or ids[:1], multiselect=True)


def list_sides(desk: Desk, first: str | None, second: str | None) -> tuple[Any, Any]:
    """Two choices among the base model and the runs: at first the base and the newest run."""
    offered = [(BASE_NAME, BASE), *choices(desk.studio)]
    ids = [id for _, id in offered]
    newest = ids[min(1, len(ids) - 1)]
    return (
        gr.Dropdown(choices=offered, value=first if first in ids else BASE),
        gr.Dropdown(choices=offered, value=second if second in ids else newest),
    )


def chosen(studio: Studio, sides: Sequence[str]) -> tuple[list[Run], tuple[str, ...]]:
    """The runs among some sides, and the names of all sides, no two alike.

    Raises E_NO_RUN, E_RUN_NOT_FOUND, E_NO_TEXT.
    """
    runs = [side for side in sides if side != BASE]
    views = studio.writers(runs)
    if not views:
        raise StudioError(*NO_RUN)
    names: dict[str, str] = {BASE: BASE_NAME}
    for run, view in zip(runs, views, strict=True):
        name = view.name or view.id[:8]
        names[run] = f"{name} · {view.id[:8]}" if name in names.values() else name
    return views, tuple(names[side] for side in sides)


def asked(studio: Studio, run: str, source: str, typed_text: str, count: int) -> list[Any]:
    """prompts.Prompt from held-out rows or from what was typed."""
    from lora_studio.prompts import of_examples, typed

    if source == TYPED:
        return typed(typed_text)
    return of_examples(studio.heldout(run, max(1, int(count))))


def words(messages: Sequence[Message]) -> str:
    """A prompt on the page: the one message as it is, or everybody's with who says it."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


def show_source(source: str) -> tuple[Any, ...]:
    """Which of the sources' controls are there: rows, text."""
    return gr.Slider(visible=source == HELDOUT), gr.Textbox(visible=source == TYPED)


def begun() -> tuple[Any, Any]:
    """Stop instead of the button that starts."""
    return gr.Button(interactive=False), gr.Button(interactive=True)


def settled() -> tuple[Any, Any]:
    """The button that starts instead of Stop, however it ended."""
    return gr.Button(interactive=True), gr.Button(interactive=False)


def paced(news: Iterator[News]) -> Iterator[tuple[News, bool]]:
    """Everything that comes, and whether it is time for a picture of it."""
    last = -INTERVAL_S
    for one in news:
        due = time.monotonic() - last > INTERVAL_S
        if due:
            last = time.monotonic()
        yield one, due
