"""Tab 5: take it away: downloads made and proven at the click, lines to copy, a push to the Hub, the run's command."""

import html
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from lora_studio.runs.config import Run
from lora_studio.ui import fetch, report_card
from lora_studio.ui.boundary import OFFER, problem_last, toasted
from lora_studio.ui.desk import Desk
from lora_studio.visitors import signing_in

FROM = "Each has saved an adapter"
USUAL = "as loaded here"  # the dtype of merged weights when none is chosen
ADAPTER, MERGED = "The adapter", "The merged model"

WAITING = """<p class='soft'>Each download is loaded again before you get it and compared with the model in memory.
What that showed stands here, and in the README.md of the download.</p>"""
SHARING = """The files of the download go to a repository of your own, and no others. Their README.md holds the
settings, the figures and one held-out prompt: look at it before you make it public."""

# Gradio's label goes to the copy button, which stands in it before the text
NAME_BOXES = """() => setTimeout(() => document.querySelectorAll('.code label').forEach((label) =>
  label.querySelector('textarea')?.setAttribute('aria-label', label.innerText.trim())), 50)"""


@dataclass(frozen=True)
class ExportTab:
    """The components that events join."""

    run: gr.Dropdown
    followed: gr.State  # as CompareTab's
    badge: gr.HTML
    adapter: gr.Button
    merged: gr.Button
    dtype: gr.Dropdown
    file: gr.HTML
    proof: gr.HTML
    problem: gr.HTML
    loading: gr.Textbox
    loading_merged: gr.Textbox
    ollama: gr.Textbox
    gguf: gr.Textbox
    ways: list[gr.Tab]
    command: gr.Textbox
    what: gr.Radio
    repo: gr.Textbox
    private: gr.Checkbox
    token: gr.Textbox
    push: gr.Button
    pushed: gr.HTML
    push_problem: gr.HTML
    report: gr.Button

    @property
    def described(self) -> list[Component]:
        """What depends on the run alone, in the order of `describe`."""
        return [self.badge, self.loading, self.loading_merged, self.ollama, self.gguf, self.command]


def build() -> ExportTab:
    """On the left the downloads and their proof, on the right where they can go."""
    with gr.Row(equal_height=False, elem_classes="handing"):
        with gr.Column(scale=5, min_width=300):
            with gr.Column(elem_classes="card"):
                gr.HTML("<h3>Take it with you</h3>", apply_default_css=False)
                run = gr.Dropdown([], label="Run", value=None, info=FROM, elem_id="export-run")
                badge = gr.HTML(OFFER, apply_default_css=False, elem_id="portable")
                _said(
                    "The adapter",
                    "What was trained, and nothing else: LoRA's is a few megabytes. It needs its base model.",
                )
                adapter = gr.Button("Download the adapter", variant="primary", elem_id="get-adapter")
                _said(
                    "The merged model", "The base model with the adapter folded in. It stands alone, and is as large."
                )
                dtype = gr.Dropdown(
                    [USUAL, "float32", "bfloat16", "float16"],
                    value=USUAL,
                    label="Weights in",
                    info="bfloat16 and float16 halve the files and round the weights; what that changes is measured",
                    elem_id="merged-dtype",
                )
                merged = gr.Button("Download the merged model", elem_id="get-merged")
                file = fetch.build("archive")
                proof = gr.HTML(WAITING, apply_default_css=False, elem_id="export-proof")
                problem = gr.HTML("", apply_default_css=False, elem_id="export-problem")
            report = report_card.build()
        with gr.Column(scale=6, min_width=300):
            with gr.Column(elem_classes="card"):
                gr.HTML("<h3>Use it elsewhere</h3>", apply_default_css=False)
                with gr.Tabs():
                    with gr.Tab("PEFT") as peft:
                        loading = _copyable("Load the adapter in Python", "loading", 5)
                    with gr.Tab("transformers") as transformers:
                        loading_merged = _copyable("Load the merged model in Python", "loading-merged", 4)
                    with gr.Tab("Ollama") as in_ollama:
                        ollama = _copyable("Run the merged model in Ollama", "ollama", 3)
                    with gr.Tab("llama.cpp") as in_llama:
                        gguf = _copyable("Make a GGUF file of the merged model", "gguf", 2)
                command = _copyable("The command that repeats this run", "command", 2)
            with gr.Column(elem_classes="card"):
                gr.HTML(
                    f"<h3>Share it on the Hugging Face Hub</h3><p class='soft'>{SHARING}</p>", apply_default_css=False
                )
                what = gr.Radio([ADAPTER, MERGED], value=ADAPTER, label="Upload", elem_id="push-what")
                repo = gr.Textbox(label="Name", placeholder="my-adapter or owner/my-adapter", elem_id="push-repo")
                private = gr.Checkbox(True, label="Private", info="Only you see it", elem_id="push-private")
                signed = "; empty, if you have signed in above" if signing_in() else ""
                token = gr.Textbox(
                    label="Access token",
                    type="password",
                    info=f"One that may write. It is used for this upload and kept nowhere{signed}",
                    elem_id="push-token",
                    html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
                )
                push = gr.Button("Upload to the Hub", elem_id="push")
                pushed = gr.HTML("", apply_default_css=False, elem_id="pushed")
                push_problem = gr.HTML("", apply_default_css=False, elem_id="push-problem")
    return ExportTab(
        run=run,
        followed=gr.State(""),
        badge=badge,
        adapter=adapter,
        merged=merged,
        dtype=dtype,
        file=file,
        proof=proof,
        problem=problem,
        loading=loading,
        loading_merged=loading_merged,
        ollama=ollama,
        gguf=gguf,
        ways=[peft, transformers, in_ollama, in_llama],
        command=command,
        what=what,
        repo=repo,
        private=private,
        token=token,
        push=push,
        pushed=pushed,
        push_problem=push_problem,
        report=report,
    )


def _said(title: str, about: str) -> None:
    gr.HTML(f"<h4>{title}</h4><p class='soft'>{about}</p>", apply_default_css=False)


def _copyable(label: str, name: str, lines: int) -> gr.Textbox:
    return gr.Textbox(label=label, lines=lines, interactive=False, buttons=["copy"], elem_id=name, elem_classes="code")


def forget() -> tuple[str, str]:
    """Nothing is proven yet, and nothing has gone wrong."""
    return WAITING, ""


def forget_all() -> tuple[str, ...]:
    """The same, and of an upload, too: another run was chosen."""
    return *forget(), "", ""


@problem_last(2)
def pack(desk: Desk, merged: bool, run: str | None, dtype: str = USUAL) -> tuple[str, str]:
    """The address of a fresh archive, and its proof."""
    view = desk.run(run)
    done = desk.ready(view.config.model).archive(view.id, merged=merged, dtype=_dtype(dtype))
    rounding = done.rounding.sentence if done.rounding else ""
    return desk.hand_out(done.files[-1]), proof_of(done.proof, rounding)


@problem_last(2)
def push(
    desk: Desk,
    run: str | None,
    what: str,
    dtype: str,
    repo: str,
    private: bool,
    token: str,
    account: gr.OAuthToken | None,
) -> tuple[str, str]:
    """Upload to the Hub with the token that was typed, else that of the account which is signed in; empties the box."""
    view = desk.run(run)
    own = token.strip() or (account.token if account else "")
    studio = desk.ready(view.config.model)
    done = studio.push(view.id, repo.strip(), own, merged=what == MERGED, dtype=_dtype(dtype), private=private)
    link = html.escape(done.address)
    where = f"{len(done.files)} files are at <a href='{link}' target='_blank' rel='noopener'>{link}</a>"
    return "", f"<p class='uploaded'>{where}</p>{proof_of(done.proof)}"


@toasted
def describe(desk: Desk, run: str | None) -> tuple[str, ...]:
    """Whether other programs take the adapter, how they load it and the merged model, and the run's command."""
    if not run:
        return OFFER, *("",) * 5
    view = desk.ready().runs.get(run)
    from lora_studio.card import command_line, in_gguf, in_ollama, loading, loading_merged

    elsewhere = in_ollama(view, merged=True), in_gguf(view, merged=True)
    return badge(view), loading(view), loading_merged(view), *elsewhere, command_line(view)


def badge(run: Run) -> str:
    """portable, when PEFT and vLLM take the adapter alike; else why not."""
    from lora_studio.adapters import portable

    whole, why = portable(run.path / "adapter")
    if whole:
        return "<span class='badge good'>portable: PEFT and vLLM open this adapter</span>"
    return f"<span class='badge plain'>not portable</span> <span class='soft'>{html.escape(why)}</span>"


def proof_of(proof: Any, rounding: str = "") -> str:
    """A proof.Proof as a panel, and what rounding did to merged weights."""
    passed = {"passed": "good", "failed": "bad"}.get(proof.verdict, "plain")
    more = f"<p class='soft'>{html.escape(rounding)}</p>" if rounding else ""
    return (
        f"<div class='proof' role='status'><span class='badge {passed}'>proof {proof.verdict}</span>"
        f"<p>{html.escape(proof.sentence)}</p>{more}</div>"
    )


def _dtype(chosen: str) -> str:
    return "" if chosen == USUAL else chosen
