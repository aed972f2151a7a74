"""Visitors for tests: requests as Gradio hands them to a handler, and runs that somebody has trained."""

import json
import time
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from fastapi import Request

from lora_studio.adapters import save
from lora_studio.core.baselines import add
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.events import Event, Learned, Metric, Sample, Saved, Started, Warned, to_line
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.runs.store import write_json
from lora_studio.studio import Studio
from lora_studio.ui.desk import Desk
from lora_studio.visitors import HEADER, cookie_name

ANN, BOB = "a1" * 16, "b2" * 16  # the secrets of two browsers
FACTS = {"trainable": 1, "total": 2, "device": "cpu", "precision": "float32", "train_rows": 3, "heldout_rows": 1}


class ReadyDesk(Desk):
    """A desk whose libraries are loaded; no starter model is looked for."""

    def ready(self, model: str = "") -> Studio:
        return self.studio


def came(
    secret: str = "",
    *,
    header: str = "",
    account: str = "",
    name: str = "",
    expires: float = 60,
    at: str = "7.7.7.7",
    query: str = "",
    **more: str,
) -> Request:
    """A request with what a browser would send, or with the session of somebody who is signed in."""
    sent = {"host": "127.0.0.1:7860", **more}
    if secret:
        sent["cookie"] = f"{cookie_name()}={secret}"
    if header:
        sent[HEADER] = header
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": query.encode(),
        "headers": [(key.encode(), value.encode()) for key, value in sent.items()],
        "client": (at, 1),
        "session": {},
    }
    if account:
        about = {"sub": account, "preferred_username": name or account, "name": account, "profile": "", "picture": ""}
        scope["session"] = {"oauth_info": {"userinfo": about, "expires_at": time.time() + expires}}
    return Request(scope)


def asking(request: Request, page: str = "") -> gr.Request:
    """The same as an event of Gradio has it."""
    return gr.Request(request=request, session_hash=page or None)


def trained(
    studio: Studio,
    model: Path,
    choice: DataChoice,
    name: str,
    *,
    words: str = "words",
    warning: str = "odd",
    study: str = "",
) -> Run:
    """A run as a worker leaves it: a curve, answers, a warning, a log and an adapter with every value drawn."""
    config = RunConfig(name=name, model=str(model), dataset=choice, method=LoraSpec(rank=2), study=study)
    run = studio.runs.create(config, {"estimate": {"seconds": 3.0, "memory_bytes": {"peak": 9}, "trainable": 5}})
    told: list[Event] = [Started(steps=4, **FACTS), Metric(step=0, values={"heldout_loss": 2.0})]
    told += [Metric(step=step, values={"train_loss": 2.0 / step}) for step in range(1, 5)]
    told += [Sample(step=4, index=0, prompt=words, text=words, target=words), Saved(step=4, heldout_loss=1.0)]
    told += [Metric(step=4, values={"heldout_loss": 1.0}), Warned(step=4, code="W_DATA", message=warning, hint=warning)]
    row = {"part": "heldout", "prompt": words, "target": words, "base": words, "adapted": words}
    told += [Learned(step=4, verdict="learnt", sentence="s", advice="a", losses={}, metric=None, rows=[row])]
    flat = Warned(step=4, code="W_FLAT", message=warning, hint=warning, change={"learning_rate": 0.005})
    lines = [to_line(event, time=0.0, attempt=1) for event in (*told, flat)]
    (run.path / "events.jsonl").write_text("\n".join(lines) + "\n")
    (run.path / "worker.log").write_text(f"{words}\n")
    lora = LoRA(studio.models.load(str(model), precision="float32", on="cpu"))
    add(lora, run.id, config.method)
    for tensor in lora.parameters(run.id):
        tensor.data += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
    save(lora, run.id, run.path / "adapter", str(model))
    values = {"base_loss": 2.0, "best_loss": 1.0, "best_step": 4, "seconds": 3.0}
    write_json(run.path / "exit.json", {"status": "done", "step": 4, "values": values})
    return studio.runs.get(run.id)


def rows(words: str, count: int = 20) -> str:
    """A dataset as JSON lines, with the same words in every row."""
    return "\n".join(json.dumps({"question": f"{words} {n}", "answer": f"{words} yes {n}"}) for n in range(count))
