"""Tab 3: one prompt, the base model and the adapted one answering at once from one batch."""

import html
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_studio.errors import StudioError
from lora_studio.fields import knobs
from lora_studio.settings import Sampling
from lora_studio.studio import Comparison
from lora_studio.ui import form
from lora_studio.ui.boundary import problem_last
from lora_studio.ui.desk import Desk
from lora_studio.ui.live import run_label

KNOBS = knobs(Sampling)
INTERVAL_S = 1 / 12  # between two pictures of the growing texts
CHIPS = 5
PANES = 6  # outputs that show one moment of a comparison
GREEDY, SAMPLED = "Greedy", "Sampled"


@dataclass(frozen=True)
class CompareTab:
    """The components that events join."""

    run: gr.Dropdown
    prompt: gr.Textbox
    chips: gr.HTML
    mode: gr.Radio
    strength: gr.Slider
    sampling: dict[str, Any]
    go: gr.Button
    stop: gr.Button
    problem: gr.HTML
    base: gr.HTML
    adapted: gr.HTML
    badge: gr.HTML
    about: gr.HTML
    base_pace: gr.HTML
    adapted_pace: gr.HTML
    expected: gr.HTML

    @property
    def panes(self) -> list[gr.HTML]:
        return [self.base, self.adapted, self.base_pace, self.adapted_pace, self.badge, self.about]


CHIPS_JS = """
const box = element.querySelector('.chips');
function draw() {
  box.replaceChildren(...(props.value || []).map((one, place) => {
    const made = document.createElement('button');
    made.type = 'button';
    made.textContent = one.prompt;
    made.title = one.prompt;
    made.dataset.place = place;
    return made;
  }));
  element.hidden = !(props.value || []).length;
}
box.addEventListener('click', event => {
  const place = event.target.closest('button')?.dataset.place;
  if (place != null) trigger('pick', props.value[place]);
});
watch('value', draw);
draw();
"""


def build() -> CompareTab:
    """Above: run and prompt. Below: the two answers."""
    with gr.Column(elem_classes="card"):
        with gr.Row(equal_height=False):
            with gr.Column(scale=8, min_width=280):
                run = gr.Dropdown([], label="Run", value=None, elem_id="compare-run")
                prompt = gr.Textbox(
                    label="Prompt", lines=2, max_lines=8, placeholder="Ask both models the same", elem_id="prompt"
                )
                chips = _chips()
            with gr.Column(scale=4, min_width=240):
                strength = gr.Slider(
                    0, 2, 1, step=0.05, label="Strength", info="0 is the base model, 1 as trained", elem_id="strength"
                )
                mode = gr.Radio([GREEDY, SAMPLED], value=GREEDY, label="Next token", elem_id="mode")
                with gr.Accordion("Sampling and length", open=False):
                    with gr.Row(elem_classes="pair"):
                        sampling = {
                            "max_new_tokens": form.control(KNOBS["max_new_tokens"]),
                            "seed": form.control(KNOBS["seed"], elem_id="set-sampling-seed"),
                        }
                    with gr.Row(elem_classes="pair"):
                        sampling |= {
                            "temperature": form.control(KNOBS["temperature"], value=0.8, info="When sampled"),
                            "top_p": form.control(KNOBS["top_p"], value=0.95, info="Mass of the likeliest"),
                        }
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", min_width=110, elem_id="generate")
                    stop = gr.Button("Stop", min_width=80, interactive=False, elem_id="stop-generating")
        problem = gr.HTML("", apply_default_css=False, elem_id="compare-problem")
    with gr.Row(equal_height=True):
        base, base_pace, badge = _pane("Base", "base")
        adapted, adapted_pace, about = _pane("Adapted", "adapted")
    expected = gr.HTML("", apply_default_css=False, elem_id="expected")
    return CompareTab(
        run,
        prompt,
        chips,
        mode,
        strength,
        sampling,
        go,
        stop,
        problem,
        base,
        adapted,
        badge,
        about,
        base_pace,
        adapted_pace,
        expected,
    )


def _chips() -> gr.HTML:
    return gr.HTML(
        [],
        html_template="<div class='chips-head'>From the held-out rows</div><div class='chips'></div>",
        js_on_load=CHIPS_JS,
        apply_default_css=False,
        elem_id="chips",
    )


def _pane(title: str, name: str) -> tuple[gr.HTML, gr.HTML, gr.HTML]:
    """Text, pace and a badge under a title."""
    with gr.Column(elem_classes="card", min_width=280):
        gr.HTML(f"<h3>{title}</h3>", apply_default_css=False)
        badge = gr.HTML("", apply_default_css=False, elem_id=f"{name}-badge", min_height=24)
        text = gr.HTML(
            "", html_template="<div class='answer'>${value}</div>", apply_default_css=False, elem_id=f"{name}-answer"
        )
        pace = gr.HTML("", apply_default_css=False, elem_id=f"{name}-pace")
    return text, pace, badge


# ---- handlers ----------------------------------------------------------------------------------------------------


def list_runs(desk: Desk, chosen: str | None) -> Any:
    """The runs that have an adapter, newest first; keeps the choice while it is still there."""
    runs = [run for run in desk.studio.runs.list() if run.has_adapter]
    ids = [run.id for run in runs]
    value = chosen if chosen in ids else next(iter(ids), None)
    return gr.Dropdown(choices=[(run_label(run), run.id) for run in runs], value=value)


def list_prompts(desk: Desk, run: str | None) -> list[dict[str, str]]:
    """Held-out prompts of the run and the answers that were wanted."""
    if not run:
        return []
    try:
        examples = desk.studio.heldout(run, CHIPS)
    except StudioError:
        return []  # the dataset may have been deleted; comparing works without chips
    return [_chip(example) for example in examples]


def take_prompt(event: gr.EventData) -> tuple[str, str]:
    """The prompt of a chip, and the answer that was wanted."""
    return str(event.prompt), expectation(str(event.target_text))


def clear() -> tuple[Any, ...]:
    """Before the answers: empty panes, Stop instead of Generate."""
    return *[""] * PANES, gr.Button(interactive=False), gr.Button(interactive=True)


def settle() -> tuple[Any, Any]:
    """After the answers, however they ended."""
    return gr.Button(interactive=True), gr.Button(interactive=False)


@problem_last(PANES)
def compare(
    desk: Desk, run: str | None, prompt: str, mode: str, strength: float, **raw: Any
) -> Iterator[tuple[str, ...]]:
    """Both answers as they grow, at most 12 times a second, and the last state."""
    if not run:
        raise StudioError(
            "E_NO_RUN", "No run is chosen.", "Train one first; it appears here with its first evaluation."
        )
    how = form.sampling({**raw, "temperature": raw["temperature"] if mode == SAMPLED else 0.0})
    view = desk.studio.runs.get(run)
    wait = "<span class='soft'>Loading the base model</span>"
    about = f"<span class='soft'>{html.escape(view.name)} · strength {strength:g}</span>"
    yield "", "", wait, wait, "", about
    studio = desk.ready(view.config.model)
    last, moment = 0.0, None
    with closing(studio.compare([view.id], prompt, strength=float(strength), sampling=how)) as moments:
        for moment in moments:
            if time.monotonic() - last > INTERVAL_S:
                last = time.monotonic()
                yield *picture(moment), about
    if moment:
        yield *picture(moment), about


# ---- HTML out of plain values ------------------------------------------------------------------------------------


def picture(moment: Comparison) -> tuple[str, str, str, str, str]:
    """Texts, paces and the badge of one moment."""
    base, adapted = moment.answers
    paces = [_pace(answer.tokens, moment.seconds) for answer in moment.answers]
    if moment.chances:
        paces = ["<span class='soft'>with the head it began with, which has learnt nothing</span>", ""]
    checked = badge(moment.base_difference, moment.exact)
    return html.escape(base.text), html.escape(adapted.text), paces[0], paces[1], checked


def badge(difference: float, exact: bool = True) -> str:
    """Whether the base pane is the untouched model, by its logits; virtual tokens leave a difference of rounding."""
    if not exact:
        about = f"Virtual tokens are masked in this row: max difference to the untouched model {difference:.2g}"
        return f"<span class='badge plain'>{about}</span>"
    if difference == 0:
        return "<span class='badge good'>Checked: equal to the untouched model (max difference 0)</span>"
    return f"<span class='badge bad'>Not the untouched model: max difference {difference:.3g}</span>"


def expectation(text: str) -> str:
    """The answer of the data, under the panes."""
    return (
        f"<div class='card expected'><h3>Wanted</h3><div class='answer'>{html.escape(text)}</div></div>" if text else ""
    )


def _pace(tokens: int, seconds: float) -> str:
    rate = f" · {tokens / seconds:.0f} tokens/s" if seconds > 0.2 else ""
    return f"<span class='soft'>{tokens} tokens{rate}</span>"


def _chip(example: Any) -> dict[str, str]:
    if example.messages:
        return {"prompt": example.prompt[-1].content, "target_text": example.target}
    words = example.text.split()
    return {"prompt": " ".join(words[:8]), "target_text": " ".join(words[8:60])}
