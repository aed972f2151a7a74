"""Bring an adapter that was made elsewhere: two files of PEFT's layout and the base that the person names for them."""

import html
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from lora_studio.adoption import FILES
from lora_studio.errors import StudioError
from lora_studio.limits import MIB, Limits
from lora_studio.models import CATALOGUE, STARTER
from lora_studio.ui.boundary import problem_last
from lora_studio.ui.data_tab import claimed
from lora_studio.ui.desk import Desk

ABOUT = """<p class='soft'>Trained with PEFT or another program? Bring its two files, adapter_config.json and
adapter_model.safetensors, up to {most} MB, and name the base model that it was trained on. It is checked against that
base and then stands among your runs: compare it, look inside, take it with you. No zip or .bin file is opened.</p>"""


@dataclass(frozen=True)
class AdapterUpload:
    """The components that events join."""

    files: gr.File
    model: gr.Dropdown
    name: gr.Textbox
    go: gr.Button
    done: gr.HTML
    problem: gr.HTML
    run: gr.State  # the id of what was brought


def build(limits: Limits) -> AdapterUpload:
    """A form that is folded away."""
    with gr.Accordion(
        "Bring an adapter made elsewhere", open=False, elem_id="bring-adapter", elem_classes="card narrow"
    ):
        gr.HTML(ABOUT.format(most=f"{limits.file_bytes // MIB:,}"), apply_default_css=False)
        files = gr.File(
            label="Its two files",
            file_count="multiple",
            file_types=[".json", ".safetensors"],
            height=136,
            elem_id="adapter-files",
            elem_classes="keep",
        )
        with gr.Row(equal_height=False):
            model = gr.Dropdown(
                [*CATALOGUE],
                value=STARTER,
                label="Its base model",
                info="Or type a Hub id (owner/name) or a folder",
                allow_custom_value=True,
                filterable=True,
                min_width=220,
                elem_id="adapter-base",
            )
            name = gr.Textbox(
                label="Name", info="Shown among your runs", max_length=80, min_width=220, elem_id="adapter-name"
            )
        go = gr.Button("Bring it along", variant="primary", elem_id="adopt")
        done = gr.HTML("", apply_default_css=False, elem_id="adopted")
        problem = gr.HTML("", apply_default_css=False, elem_id="adopt-problem")
    return AdapterUpload(files, model, name, go, done, problem, gr.State(""))


@problem_last(3)
def adopt(desk: Desk, files: Sequence[str] | None, model: str | None, name: str) -> tuple[str, None, str]:
    """The id of the run that it became, an empty place for the next files, and what was done."""
    studio = desk.studio
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="claimed-", dir=studio.root)))
        sent = [stack.enter_context(claimed(Path(path), studio.root)) for path in files or ()]
        if sorted(file.name for file in sent) != sorted(FILES):
            got = f"{len(sent)} files of other names" if sent else "none"
            raise StudioError("E_ADAPTER_FILES", f"Two files are wanted; {got} came.", f"Choose {' and '.join(FILES)}.")
        for file in sent:
            file.rename(folder / file.name)
        desk.may_start()
        run = desk.ready(model or "").adopt(folder, model or "", name)
    done = f"<p class='soft' role='status'><b>{html.escape(run.name)}</b> is among your runs, and chosen above.</p>"
    return run.id, None, done
