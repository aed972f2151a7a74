"""Compare, a chat: one box to write in, base and adapted model side by side, each going on from its own answers.

The conversation's script is chat.js; everything that a model or a person wrote goes into the page as text.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from lora_studio.errors import StudioError
from lora_studio.fields import knobs
from lora_studio.settings import Sampling
from lora_studio.ui import answering, form, panes, script
from lora_studio.ui.boundary import problem_last
from lora_studio.ui.desk import Desk

MOST_TURNS = 100
NOTHING: dict[str, Any] = {"name": "Adapted", "turns": [], "note": "", "badge": None, "growing": False}


@dataclass(frozen=True)
class Chat:
    """The components that events join."""

    run: gr.Dropdown
    followed: gr.State  # as CompareTab's
    strength: gr.Slider
    tokens: gr.Number
    temperature: gr.Number
    talk: gr.HTML
    said: gr.Textbox
    send: gr.Button
    stop: gr.Button
    restart: gr.Button
    problem: gr.HTML
    turns: gr.State  # chat.Turn


def build() -> Chat:
    """Above: which run and how. Below: the conversation and the box."""
    with gr.Column(elem_classes="card"):
        run = gr.Dropdown([], label="Run", value=None, elem_id="chat-run")
        with gr.Row(equal_height=False):
            strength = gr.Slider(
                0, 2, 1, step=0.05, label="Strength", info="0 is the base model, 1 as trained", elem_id="chat-strength"
            )
            tokens = answering.answer_length("chat-tokens", 128)
            temperature = form.control(knobs(Sampling)["temperature"], elem_id="chat-temperature")
    with gr.Column(elem_classes="card"):
        talk = gr.HTML(
            NOTHING,
            html_template=script.template("chat"),
            js_on_load=script.of("chat"),
            apply_default_css=False,
            elem_id="talk",
        )
        problem = gr.HTML("", apply_default_css=False, elem_id="chat-problem")
        said = gr.Textbox(
            label="Your message", lines=1, max_lines=6, placeholder="Say something to both", elem_id="chat-said"
        )
        with gr.Row():
            send = gr.Button("Send", variant="primary", min_width=90, elem_id="chat-send")
            stop = gr.Button("Stop", min_width=80, interactive=False, elem_id="chat-stop")
            restart = gr.Button("Start again", min_width=100, elem_id="chat-restart")
    followed = gr.State("")
    return Chat(run, followed, strength, tokens, temperature, talk, said, send, stop, restart, problem, gr.State([]))


# ---- handlers ----------------------------------------------------------------------------------------------------


def forget() -> tuple[Any, ...]:
    """An empty conversation: page, turns, problem, buttons."""
    return NOTHING, [], "", *answering.settled()


@problem_last(3)
def say(
    desk: Desk,
    run: str | None,
    said: str,
    turns: Sequence[Any],
    strength: float,
    max_new_tokens: Any,
    temperature: Any,
) -> Iterator[tuple[Any, ...]]:
    """Both answers as they grow: the box, the conversation, its turns. What cannot be answered stays in the box."""
    run = desk.run(run).id
    if len(turns) >= MOST_TURNS:
        raise StudioError("E_LIMIT", f"The conversation has {len(turns)} turns.", "Start again.")
    how = form.sampling({"max_new_tokens": max_new_tokens, "temperature": temperature})
    (view,), (name,) = answering.chosen(desk.studio, [run])
    studio = desk.ready(view.config.model)
    from lora_studio.chat import Turn
    from lora_studio.prompts import whole

    talked = [*turns, Turn(whole(said.strip()), strength=strength)]
    moment = None
    with closing(studio.chat(view.id, talked, strength=strength, sampling=how)) as moments:
        for moment, due in answering.paced(moments):
            if due:
                talked = [*talked[:-1], _answered(talked[-1], moment)]
                yield "", picture(talked, moment, name, growing=True), talked
    if moment:
        talked = [*talked[:-1], _answered(talked[-1], moment)]
        yield "", picture(talked, moment, name), talked


# ---- plain values out of plain values ----------------------------------------------------------------------------


def picture(turns: Sequence[Any], moment: Any, name: str, *, growing: bool = False) -> Mapping[str, Any]:
    """What the conversation's script draws; words that the base does not say are marked where no more are to come."""
    sign = panes.badge(moment.base_difference, moment.exact)
    told = {"name": name, "turns": [vars(turn) for turn in turns], "note": remark(moment)}
    return {**told, "badge": sign, "growing": growing}


def remark(moment: Any) -> str:
    """What is to be known of how the models read the conversation: chat.Moment's template and what was left out."""
    base, adapted = moment.left_out
    left_out = ""
    if base or adapted:
        which = f"the oldest {base}" if base == adapted else f"the oldest {base} (base) and {adapted} (adapted)"
        left_out = f"The conversation is longer than what is read at once: {which} of the turns were left out."
    return " ".join(filter(None, [moment.template, left_out]))


def _answered(turn: Any, moment: Any) -> Any:
    base, adapted = moment.answers
    return replace(turn, base=base.text, adapted=adapted.text)
