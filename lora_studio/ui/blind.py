"""Compare, blind: two answers to one prompt as A and B, votes, and what they say once there are enough.

Until the sides are revealed nothing that the page gets tells them apart: `picture` is all it gets. The script is
blind.js; everything that a model or a person wrote goes into the page as text.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from lora_studio import blind
from lora_studio.errors import StudioError
from lora_studio.ui import answering, fetch, form, script
from lora_studio.ui.answering import BASE, HELDOUT, TYPED
from lora_studio.ui.boundary import problem_last
from lora_studio.ui.desk import Desk

HERE = Path(__file__).parent
NOTHING: dict[str, Any] = {"trial": "", "number": -1, "of": 0}
EARLY = "You looked before the last pair: an interval after stopping at will is a little too narrow."


@dataclass(frozen=True)
class Blind:
    """The components that events join."""

    first: gr.Dropdown
    second: gr.Dropdown
    source: gr.Radio
    count: gr.Slider
    typed: gr.Textbox
    tokens: gr.Number
    go: gr.Button
    stop: gr.Button
    problem: gr.HTML
    arena: gr.HTML
    fetch: gr.HTML


def build(desk: Desk) -> Blind:
    """Above: which two and which prompts. Below: the pair to vote on, or what came of it."""
    with gr.Column(elem_classes="card"):
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=260):
                with gr.Row():
                    first = gr.Dropdown([], label="One side", value=None, min_width=200, elem_id="blind-first")
                    second = gr.Dropdown([], label="The other", value=None, min_width=200, elem_id="blind-second")
                source = gr.Radio([HELDOUT, TYPED], value=HELDOUT, label="Prompts", elem_id="blind-source")
                count = answering.row_count(desk.limits, "blind-count")
                typed = gr.Textbox(
                    label="Prompts, one a line", lines=5, max_lines=12, visible=False, elem_id="blind-typed"
                )
            with gr.Column(scale=4, min_width=220):
                tokens = answering.answer_length("blind-tokens", 64)
                with gr.Row():
                    go = gr.Button("Start blind", variant="primary", min_width=110, elem_id="blind-start")
                    stop = gr.Button("Stop", min_width=80, interactive=False, elem_id="blind-stop")
        problem = gr.HTML("", apply_default_css=False, elem_id="blind-problem")
    with gr.Column(elem_classes="card"):
        arena = gr.HTML(
            NOTHING,
            html_template=script.template("blind"),
            js_on_load=(HERE / "blind.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            elem_id="arena",
        )
    return Blind(first, second, source, count, typed, tokens, go, stop, problem, arena, fetch.build("blind-file"))


# ---- handlers ----------------------------------------------------------------------------------------------------


@problem_last(1)
def start(
    desk: Desk, first: str | None, second: str | None, source: str, count: int, typed: str, max_new_tokens: Any
) -> Iterator[Mapping[str, Any]]:
    """A new blind test, as its answers are written; votes may come in between."""
    how = form.sampling({"max_new_tokens": max_new_tokens})
    sides = [first or BASE, second or BASE]
    if sides[0] == sides[1]:
        raise StudioError("E_SIDES", "Both sides are the same.", "Choose two that differ.")
    views, names = answering.chosen(desk.studio, sides)
    studio = desk.ready(views[0].config.model)
    from lora_studio.prompts import check_set

    prompts = answering.asked(studio, views[-1].id, source, typed, count)
    limits = replace(studio.limits, prompts=min(blind.MOST_PAIRS, studio.limits.prompts))
    check_set(prompts, len(sides), how.max_new_tokens, limits)
    trial = blind.new(sides, names, [prompt.messages for prompt in prompts])
    studio.ballots.add(trial)
    yield picture(trial)
    with closing(studio.answer_blind(trial.id, how)) as news:
        for _, due in answering.paced(news):
            if due:
                yield picture(studio.ballots.get(trial.id))
    yield picture(studio.ballots.get(trial.id))


def resume(desk: Desk) -> Mapping[str, Any]:
    """The blind test that was voted on last."""
    trial = desk.studio.ballots.newest()
    return picture(trial) if trial else NOTHING


@problem_last(1)
def vote(desk: Desk, event: gr.EventData) -> Mapping[str, Any]:
    """Count a vote, and go on to the next pair."""
    number, choice = int(event.number), str(event.vote)
    return picture(desk.studio.ballots.change(str(event.trial), partial(blind.voted, number=number, vote=choice)))


@problem_last(1)
def reveal(desk: Desk, event: gr.EventData) -> Mapping[str, Any]:
    """Say which side is which, after which nobody votes."""
    return picture(desk.studio.ballots.change(str(event.trial), blind.revealed))


@problem_last(1)
def download(desk: Desk, event: gr.EventData) -> str:
    """The address of the decided pairs as JSON lines."""
    studio = desk.studio
    pairs = blind.preferences(studio.ballots.get(str(event.trial)))
    if not pairs:
        raise StudioError("E_NO_VOTES", "No pair is decided yet.", "Vote for A or B first.")
    from lora_studio.export import fresh_download
    from lora_studio.prompts import lines_of

    file = fresh_download(studio.exports) / "preferences.jsonl"
    file.write_bytes(lines_of(pairs))
    return desk.hand_out(file)


# ---- plain values out of plain values ----------------------------------------------------------------------------


def picture(trial: blind.Trial) -> Mapping[str, Any]:
    """All that the page gets of a blind test: the same for both orders of its sides, until they are revealed."""
    count, number = blind.tally(trial), trial.next
    there = sum(bool(pair.answers) and not pair.same for pair in trial.pairs)
    voted = sum(bool(pair.vote) for pair in trial.pairs)
    asked = trial.pairs[number] if number is not None else None
    told = {
        "trial": trial.id,
        "number": -1 if number is None else number,
        "place": voted + 1,
        "of": there,
        "prompt": answering.words(asked.messages) if asked else "",
        "shown": list(asked.shown) if asked else [],
        "state": trial.state,
        "votes": _votes(count),
        "standing": blind.standing(count, trial.names if trial.state == "revealed" else ()),
        "decided": count.decided,
        "pairs": [],
    }
    if trial.state == "revealed":
        told["pairs"] = [_revealed(trial, pair) for pair in trial.pairs if pair.vote]
        told["standing"] += f" {EARLY}" if voted < there and count.decided else ""
    return told


def _votes(count: blind.Tally) -> str:
    """How many votes of which kind, but not for whom."""
    said = [f"{count.decided} decided", f"{count.ties} {'tie' if count.ties == 1 else 'ties'}", f"{count.bad} both bad"]
    return " · ".join(said + ([f"{count.same} with equal answers, not asked"] if count.same else []))


def _revealed(trial: blind.Trial, pair: blind.Pair) -> dict[str, Any]:
    """One pair with the names of its sides, the preferred one named."""
    preferred = pair.preferred
    vote = {"tie": "tie", "bad": "both bad"}.get(pair.vote, "")
    return {
        "prompt": answering.words(pair.messages),
        "answers": [{"name": name, "text": text} for name, text in zip(trial.names, pair.answers, strict=True)],
        "vote": vote if preferred is None else trial.names[preferred],
    }
