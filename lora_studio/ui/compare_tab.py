"""Tab 3: one prompt, the base model and up to four adapters answering at once from one batch.

Under the runs that are compared stand several ways to compare them, each a tab of its own; this file draws the first,
the answers side by side, with what they say of one run: at which strength it is best, and how likely it makes a known
answer.
"""

import html
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_studio import charts
from lora_studio.changes import changed_words
from lora_studio.errors import StudioError
from lora_studio.fields import knobs
from lora_studio.results import Comparison, Wanted
from lora_studio.runs.config import Run
from lora_studio.settings import Sampling
from lora_studio.ui import figure, form, panes, tokens
from lora_studio.ui.boundary import NONE, OFFER, problem_last
from lora_studio.ui.desk import Desk
from lora_studio.ui.live import run_label

KNOBS = knobs(Sampling)
INTERVAL_S = 1 / 12  # between two pictures of the growing texts
CHIPS = 3  # held-out rows to try
OFF_TOPIC = ("What is the capital of France?", "Explain in one sentence why the sky is blue.")
OTHERS = 3  # runs beside the first
NAMED = 3  # runs named for each reason why they are not offered
SIDE_BY_SIDE = (0.5, 1.0, 1.5, 2.0)  # strengths beside 0, which is the base model
GREEDY, SAMPLED = "Greedy", "Sampled"
EMPTY = f"""<b>Nothing is asked yet.</b><br>Pick a prompt or write one, then press Generate.<br>
{OFFER}"""
WAITING, LOADING, STOPPED = "Waiting for the model", "Loading the base model", "Stopped"
HEAD = "<h3>The wanted answer</h3>"
NO_ANSWER = f"{HEAD}<p class='soft'>Pick one of the held-out rows above: its answer is known.</p>"

READ_STRENGTH = (
    "The same held-out rows that training measured, with the adapter turned down or up: 0 is the base model, 1 as"
    " trained, 2 twice that.",
    "A lowest point well below 1 often means too long or too fast a training for these rows; above 1, too short a one.",
)
READ_TOKENS = (
    "The stronger a token is shaded, the likelier the model writes it, given the prompt and the answer before it.",
    "Tokens that stay plain in a run's line are what it has not learnt.",
)


@dataclass(frozen=True)
class CompareTab:
    """The components that events join."""

    run: gr.Dropdown
    followed: gr.State  # which run of the Train tab the choice went by last
    others: gr.Dropdown
    apart: gr.HTML
    prompt: gr.Textbox
    chips: gr.HTML
    row: gr.State  # which held-out row the prompt is, None for one that was written by hand
    mode: gr.Radio
    strength: gr.Slider
    sampling: dict[str, Any]
    go: gr.Button
    ladder: gr.Button
    stop: gr.Button
    problem: gr.HTML
    panes: gr.HTML
    expected: gr.HTML
    look: gr.Button
    tokens: gr.HTML
    tokens_line: gr.HTML
    tokens_problem: gr.HTML
    measure: gr.Button
    curve: gr.HTML
    curve_line: gr.HTML
    curve_problem: gr.HTML

    @property
    def buttons(self) -> list[gr.Button]:
        return [self.go, self.ladder, self.stop]

    @property
    def of_wanted(self) -> list[gr.HTML]:
        """What belongs to the answer of one held-out row."""
        return [self.tokens, self.tokens_line, self.tokens_problem]

    @property
    def of_curve(self) -> list[gr.HTML]:
        return [self.curve, self.curve_line, self.curve_problem]


CHIPS_JS = """
const box = element.querySelector('.chips');
function chip(one, place) {
  const made = document.createElement('button');
  made.type = 'button';
  made.textContent = one.prompt;
  made.title = one.prompt;
  made.dataset.place = place;
  made.dataset.known = Boolean(one.target_text);  // whether the wanted answer is
  return made;
}
function draw() {
  const all = props.value || [];
  box.replaceChildren();
  all.forEach((one, place) => {
    if (one.from !== all[place - 1]?.from) {
      const head = document.createElement('span');
      head.textContent = one.from;
      box.append(head);
    }
    box.append(chip(one, place));
  });
  element.hidden = !all.length;
}
box.addEventListener('click', event => {
  const place = event.target.closest('button')?.dataset.place;
  if (place != null) trigger('pick', { ...props.value[place], place: +place });
});
watch('value', draw);
draw();
"""


def build() -> CompareTab:
    """Above: the runs. Below: the ways to compare them."""
    with gr.Column(elem_classes="card"):
        with gr.Row(equal_height=False):
            run = gr.Dropdown(
                [], label="Run", value=None, info="Each has saved an adapter", elem_id="compare-run", min_width=240
            )
            others = gr.Dropdown(
                [],
                label="Side by side with",
                info="Up to three more runs on the same base model",
                value=[],
                multiselect=True,
                max_choices=OTHERS,
                elem_id="compare-others",
                min_width=240,
            )
        apart = gr.HTML("", apply_default_css=False, elem_id="compare-apart")
    return CompareTab(run=run, followed=gr.State(""), others=others, apart=apart, **_answers())


def _answers() -> dict[str, Any]:
    """The prompt, the panes, and what is known of the run's strength and of a wanted answer."""
    with gr.Column(elem_classes="card"):
        asked = _question()
    made = {"panes": panes.build("answers", EMPTY)}
    with gr.Row(equal_height=False):
        with gr.Column(elem_classes="card", min_width=300):
            made |= _wanted_answer()
        with gr.Column(elem_classes="card", min_width=300):
            made |= _strength_curve()
    return {**asked, **made}


def _question() -> dict[str, Any]:
    with gr.Row(equal_height=False):
        with gr.Column(scale=8, min_width=280):
            prompt = gr.Textbox(
                label="Prompt", lines=2, max_lines=8, placeholder="Ask all models the same", elem_id="prompt"
            )
            chips = gr.HTML(
                [],
                html_template="<div class='chips' role='group' aria-label='Prompts to try'></div>",
                js_on_load=CHIPS_JS,
                apply_default_css=False,
                elem_id="chips",
            )
        with gr.Column(scale=4, min_width=240):
            strength = gr.Slider(
                0, 2, 1, step=0.05, label="Strength", info="0 is the base model, 1 as trained", elem_id="strength"
            )
            mode = gr.Radio(
                [GREEDY, SAMPLED],
                value=GREEDY,
                label="Next token",
                info="Greedy: always the likeliest; sampled: by chance",
                elem_id="mode",
            )
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
            ladder = gr.Button("The run at strengths 0 to 2", min_width=200, elem_id="compare-strengths")
    problem = gr.HTML("", apply_default_css=False, elem_id="compare-problem")
    return {
        "prompt": prompt,
        "chips": chips,
        "row": gr.State(None),
        "mode": mode,
        "strength": strength,
        "sampling": sampling,
        "go": go,
        "ladder": ladder,
        "stop": stop,
        "problem": problem,
    }


def _wanted_answer() -> dict[str, Any]:
    expected = gr.HTML(NO_ANSWER, apply_default_css=False, elem_id="expected")
    look = gr.Button("How likely is each of its tokens?", min_width=200, elem_id="look-at-tokens")
    line = gr.HTML("", apply_default_css=False, elem_id="tokens-line")
    shaded = tokens.build("tokens")
    problem = gr.HTML("", apply_default_css=False, elem_id="tokens-problem")
    _reading(READ_TOKENS)
    return {"expected": expected, "look": look, "tokens": shaded, "tokens_line": line, "tokens_problem": problem}


def _strength_curve() -> dict[str, Any]:
    gr.HTML("<h3>Which strength is best?</h3>", apply_default_css=False)
    measure = gr.Button("Measure the held-out loss by strength", min_width=200, elem_id="measure-strengths")
    curve = figure.build("Held-out loss by strength", "strength-curve")
    line = gr.HTML("", apply_default_css=False, elem_id="strength-line")
    problem = gr.HTML("", apply_default_css=False, elem_id="strength-problem")
    _reading(READ_STRENGTH)
    return {"measure": measure, "curve": curve, "curve_line": line, "curve_problem": problem}


def _reading(lines: Sequence[str]) -> None:
    gr.HTML("".join(f"<p class='soft reading'>{line}</p>" for line in lines), apply_default_css=False)


# ---- handlers ----------------------------------------------------------------------------------------------------


def list_runs(desk: Desk, chosen: str | None, live: str, followed: str) -> tuple[Any, str]:
    """The runs that have an adapter, newest first, and which run of the Train tab was `followed` here.

    The choice stays while it is there, until another run has been trained: that one is chosen then, once.
    """
    runs = [run for run in desk.studio.runs.list() if run.has_adapter]
    ids = [run.id for run in runs]
    if live in ids and live != followed:
        chosen = followed = live
    value = chosen if chosen in ids else next(iter(ids), None)
    offered = [(run_label(run), run.id) for run in runs]
    return gr.Dropdown(choices=offered, value=value, elem_classes=[] if runs else NONE), followed


def list_others(desk: Desk, run: str | None, others: list[str] | None) -> tuple[Any, str]:
    """The runs that fit beside `run`, keeping those that are chosen, and a line on the ones that do not."""
    runs = [one for one in desk.studio.runs.list() if one.has_adapter]
    first = next((one for one in runs if one.id == run), None)
    if first is None:
        return gr.Dropdown(choices=[], value=[], multiselect=True), ""
    reasons = {one.id: _misfit(first, one) for one in runs if one.id != first.id}
    fitting = [one for one in runs if reasons.get(one.id) == ""]
    kept = [one for one in others or [] if reasons.get(one) == ""]
    changed: dict[str, Any] = (
        {} if kept == (others or []) else {"value": kept}
    )  # the person may be choosing while this is asked for
    offered = gr.Dropdown(choices=[(run_label(one), one.id) for one in fitting], multiselect=True, **changed)
    return offered, apart([(one, reasons[one.id]) for one in runs if reasons.get(one.id)])


def list_prompts(desk: Desk, run: str | None) -> list[dict[str, Any]]:
    """Prompts to try: held-out ones of the run with the answers that were wanted, and two that it was not taught."""
    if not run:
        return []
    try:
        view = desk.studio.runs.get(run)
        examples = desk.studio.heldout(run, CHIPS)
    except StudioError:
        return []  # the dataset may have been deleted; comparing works without chips
    others = () if view.labels else OFF_TOPIC
    ours = [{"prompt": prompt, "target_text": "", "before": 0, "from": "Off topic"} for prompt in others]
    return [_chip(example) for example in examples] + ours


def take_prompt(event: gr.EventData) -> tuple[Any, ...]:
    """The prompt of a chip, its row and the answer that was wanted; what was said of another answer goes."""
    row = int(event.place) if event.target_text else None
    return str(event.prompt), row, expectation(str(event.target_text), int(event.before)), *forget()


def own_prompt() -> tuple[Any, ...]:
    """The prompt was written by hand."""
    return None, NO_ANSWER, *forget()


def keep_answer(desk: Desk, run: str | None, prompt: str, row: int | None) -> tuple[Any, Any]:
    """After another run was chosen: the row and its answer stay if it has the same one."""
    same = row is not None and next((chip for chip in list_prompts(desk, run)[row : row + 1]), {})
    return (gr.skip(), gr.skip()) if same and same["prompt"] == prompt else (None, NO_ANSWER)


def wait() -> tuple[Any, ...]:
    """In a place that a measurement will fill: others may be at work with the model."""
    return {}, f"<p class='soft'>{WAITING}</p>", ""


def forget() -> tuple[Any, ...]:
    """Nothing in one of the places that a measurement fills: figure, line and problem."""
    return {}, "", ""


def clear() -> tuple[Any, ...]:
    """Before the answers: others may be at work with the model; no problem, Stop instead of Generate."""
    off = gr.Button(interactive=False)
    return [panes.pane("Base", pace=WAITING)], "", off, off, gr.Button(interactive=True)


def stop(shown: list[dict[str, Any]]) -> tuple[Any, ...]:
    """The answers as far as they came."""
    waiting = WAITING, LOADING
    return [{**one, "pace": STOPPED if one["pace"] in waiting else one["pace"]} for one in shown], *settle()


def settle() -> tuple[Any, ...]:
    """After the answers, however they ended."""
    return gr.Button(interactive=True), gr.Button(interactive=True), gr.Button(interactive=False)


@problem_last(1)
def compare(
    desk: Desk,
    run: str | None,
    others: list[str] | None,
    prompt: str,
    row: int | None,
    mode: str,
    strength: float,
    **raw: Any,
) -> Iterator[list[dict[str, Any]]]:
    """The answers of the base model and of each run as they grow."""
    views = [desk.run(one) for one in (run, *(others or []))]
    titles = [("Base", _base_name(views[0])), *((_name(view), f"strength {strength:g}") for view in views)]
    yield from _asked(desk, views[0], [{view.id: float(strength)} for view in views], titles, prompt, row, mode, raw)


@problem_last(1)
def compare_strengths(
    desk: Desk, run: str | None, prompt: str, row: int | None, mode: str, **raw: Any
) -> Iterator[list[dict[str, Any]]]:
    """One run's answers at five strengths as they grow; at 0 it is the base model."""
    view = desk.run(run)
    about = {1.0: "as trained"}
    titles = [("Strength 0", "the base model")]
    titles += [(f"Strength {one:g}", about.get(one, _name(view))) for one in SIDE_BY_SIDE]
    yield from _asked(desk, view, [{view.id: one} for one in SIDE_BY_SIDE], titles, prompt, row, mode, raw)


@problem_last(2)
def look_at_tokens(
    desk: Desk, run: str | None, others: list[str] | None, row: int | None, strength: float
) -> Iterator[tuple[dict[str, Any], str]]:
    """How likely each model finds each token of the answer that a held-out row has."""
    views = [desk.run(one) for one in (run, *(others or []))]
    if row is None:
        message = "No answer to this prompt is known."
        if any(chip["target_text"] for chip in list_prompts(desk, run)):
            raise StudioError("E_NO_ANSWER", message, "Pick one of the held-out rows above.")
        raise StudioError("E_NO_HELDOUT", message, "This run has no held-out rows that could be read.")
    yield {}, f"<p class='soft'>{LOADING}</p>"
    found = desk.ready(views[0].config.model).wanted([view.id for view in views], row, strength=float(strength))
    names = ["Base", *map(_name, views)]
    yield tokens.value(names, found.texts, found.chances), tokens_line(found, names, float(strength))


@problem_last(2)
def measure(desk: Desk, run: str | None) -> Iterator[tuple[Any, ...]]:
    """The held-out loss by strength as it is measured, and in the end what it says."""
    view = desk.run(run)
    yield {}, f"<p class='soft'>{LOADING}</p>"
    told: dict[str, Any] = {}
    with closing(desk.ready(view.config.model).strength_curve(view.id)) as moments:
        for moment in moments:
            told = moment.as_json()
            wait = f"<p class='soft'>Measured up to strength {told['points'][-1]['strength']:g} of 2</p>"
            yield figure.value(charts.strength_curve(told)), wait
    if told:
        yield figure.value(charts.strength_curve(told)), strength_line(told, _name(view))


# ---- plain values and HTML out of what was found -----------------------------------------------------------------


def picture(moment: Comparison, titles: Sequence[tuple[str, str]], spent_s: Sequence[float]) -> list[dict[str, Any]]:
    """The panes of one moment; words that the base does not say are marked once all have ended.

    titles: of each pane, with what is said about it. spent_s: seconds that each has been writing.
    """
    base, ended = moment.answers[0], all(answer.done for answer in moment.answers)
    made = []
    for place, (answer, (title, about), spent) in enumerate(zip(moment.answers, titles, spent_s, strict=True)):
        marked = ended and place and not moment.chances
        parts = changed_words(answer.text, base.text) if marked else [(answer.text, False)]
        pace = "" if moment.chances else _pace(answer.tokens, spent)
        if moment.chances and not place:
            about = "with the head it began with, which has learnt nothing"
        sign = None if place else panes.badge(moment.base_difference, moment.exact)
        made.append(panes.pane(title, about=about, parts=parts, pace=pace, badge=sign))
    return made


def expectation(text: str, before: int = 0) -> str:
    """The answer of the data, and with how many `before` the prompt it belongs to."""
    also = f"<p class='soft'>Asked with the {_messages(before)} that this row has before it.</p>" if before else ""
    return f"{HEAD}{also}<div class='answer'>{html.escape(text)}</div>" if text else NO_ANSWER


def tokens_line(found: Wanted, names: Sequence[str], strength: float = 1.0) -> str:
    """How likely each model finds a token on average, in words."""
    means = [tokens.percent(sum(row) / len(row)) for row in found.chances]
    said = ", ".join(f"{html.escape(name)} {mean}" for name, mean in zip(names, means, strict=True))
    left = f" The first {len(found.texts)} tokens; {found.left:,} more follow." if found.left else ""
    at = "" if strength == 1 else f" at strength {strength:g}"
    return f"<p class='verdict'>On average a wanted token is this likely{at}: {said}.{left}</p>"


def strength_line(curve: Mapping[str, Any], name: str) -> str:
    """What the curve of the run of this name says: the best strength, the one as trained, and the base model."""
    losses = {point["strength"]: point["loss"] for point in curve["points"]}
    told = {one: "no number" if loss is None else f"{loss:.3g}" for one, loss in losses.items()}
    best, base = curve["best"], f"the base model has {told[0.0]}"
    if best is None:
        said = "The held-out loss is no number at any strength."
    elif best == 0:
        said = f"No strength is better than the base model, which has {told[0.0]}; at 1, as trained, it is {told[1.0]}."
    elif best == 1:
        said = f"Best at 1, as trained: {told[1.0]}; {base}."
    elif curve["trained_is_best"]:
        said = f"Lowest at {best:g}: {told[best]}; at 1, as trained, it is as good, {told[1.0]}; {base}."
    else:
        said = f"Best at {best:g}: {told[best]}; at 1, as trained, it is {told[1.0]}; {base}."
    return f"<p class='verdict'>{html.escape(name)}: {said[0].lower()}{said[1:]}</p>"


def apart(misfits: Sequence[tuple[Run, str]]) -> str:
    """Which runs are not offered, by reason."""
    lines = []
    for reason in dict.fromkeys(reason for _, reason in misfits):
        names = [_name(run) for run, why in misfits if why == reason]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"{html.escape(reason)}: {html.escape(', '.join(names[:NAMED]))}{more}")
    return f"<p class='soft'>Not offered here · {' · '.join(lines)}</p>" if lines else ""


# ---- inside ------------------------------------------------------------------------------------------------------


def _asked(
    desk: Desk,
    first: Run,
    rows: Sequence[Mapping[str, float]],
    titles: Sequence[tuple[str, str]],
    prompt: str,
    row: int | None,
    mode: str,
    raw: Mapping[str, Any],
) -> Iterator[list[dict[str, Any]]]:
    """The panes as their texts grow, at most 12 times a second, and the last state."""
    how = form.sampling({**raw, "temperature": raw["temperature"] if mode == SAMPLED else 0.0})
    yield [panes.pane(title, about=about, pace=LOADING) for title, about in titles]
    try:
        studio = desk.ready(first.config.model)
        said = prompt if row is None else _conversation(desk, first, row) or prompt
        with closing(studio.compare(rows, said, sampling=how)) as moments:
            yield from _pictures(moments, titles)
    except StudioError:
        yield []
        raise


def _conversation(desk: Desk, first: Run, row: int) -> Sequence[Any]:
    """All messages before the answer of a held-out row; none where its prompt is all there is to say."""
    found = desk.studio.heldout(first.id, row + 1)[row:]
    return found[0].prompt if found and len(found[0].prompt) > 1 and not first.labels else ()


def _pictures(moments: Iterator[Comparison], titles: Sequence[tuple[str, str]]) -> Iterator[list[dict[str, Any]]]:
    last, ended, moment = 0.0, {}, None
    for moment in moments:
        for place, answer in enumerate(moment.answers):
            if answer.done:
                ended.setdefault(place, moment.seconds)
        if time.monotonic() - last > INTERVAL_S:
            last = time.monotonic()
            yield picture(moment, titles, _spent(moment, ended))
    if moment:
        yield picture(moment, titles, _spent(moment, ended))


def _spent(moment: Comparison, ended: Mapping[int, float]) -> list[float]:
    return [ended.get(place, moment.seconds) for place in range(len(moment.answers))]


def _misfit(first: Run, other: Run) -> str:
    """Why a run cannot stand beside the first; empty when it can."""
    if other.config.model != first.config.model:
        return f"on {_base_name(other)}"
    if other.revision != first.revision:
        return "on another revision of the base"
    if other.labels != first.labels:
        return "choosing other labels" if other.labels and first.labels else "for another task"
    return ""


def _base_name(run: Run) -> str:
    return run.config.model.rstrip("/").rsplit("/", 1)[-1]


def _name(run: Run) -> str:
    return run.name or run.id[:8]


def _pace(tokens: int, seconds: float) -> str:
    rate = f" · {tokens / seconds:.0f} tokens/s" if seconds > 0.2 else ""
    return f"{tokens} tokens{rate}"


def _chip(example: Any) -> dict[str, Any]:
    words, prompt = example.text.split(), example.prompt
    asked, wanted = (prompt[-1].content, example.target) if prompt else (" ".join(words[:8]), " ".join(words[8:60]))
    return {"prompt": asked, "target_text": wanted, "before": max(0, len(prompt) - 1), "from": "Held out"}


def _messages(count: int) -> str:
    return f"{count} message{'s' * (count > 1)}"
