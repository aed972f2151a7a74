"""A bench for bad inputs: a fresh folder, a tiny model, and everything a person could do with a file.

A case is a number of the design's list, a name, what must come of it, and a function of a Bench.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_studio import adapters, peft_format
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.data import words
from lora_studio.data.formats import Example, Message
from lora_studio.data.library import DataLibrary
from lora_studio.fields import build
from lora_studio.limits import LAPTOP, SPACE, Limits
from lora_studio.models import ModelLibrary
from lora_studio.runs.config import DataChoice, RunConfig
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from tests.tiny import causal

CSV = "question,answer\n" + "".join(f"question {number},answer {number}\n" for number in range(12))


class Bench:
    """A fresh folder, a tiny model, and what a person would do with a file."""

    def __init__(self, folder: Path, tiny: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.tiny, self.patch = folder, tiny, patch
        self.library = DataLibrary(folder / "root", SPACE)

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def rows(self, name: str, content: bytes | str, format: str = "", **columns: str) -> Sequence[str]:
        """Everything that is said of a file, from its bytes to its examples."""
        dataset = self.library.add(self.write(name, content))
        _, warnings = self.library.examples(dataset.id, format, columns or None)
        return [*dataset.warnings, *warnings]

    def cells(self, name: str, content: bytes | str) -> list[dict[str, Any]]:
        return list(self.library.table(self.library.add(self.write(name, content)).id).rows)

    def model(self, **config: Any) -> Path:
        """The tiny model with other settings; None takes a setting away."""
        folder = self.folder / "model"
        shutil.copytree(self.tiny, folder)
        known = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({key: one for key, one in known.items() if one is not None}))
        return folder

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        """The tiny model with other weights."""
        folder = self.model()
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def load(self, folder: Path | str, limits: Limits = LAPTOP) -> Any:
        return ModelLibrary(self.folder, limits).load(str(folder), precision="float32", on="cpu")

    def template(self, text: str) -> list[int]:
        """Ids of a question under another chat template, in the sandbox as the app does it."""
        folder = self.model()
        (folder / "chat_template.jinja").write_text(text)
        asked = Example((Message("user", "Why?"), Message("assistant", "So.")))
        return list(words.read_rows(ModelLibrary(self.folder, guarded=True).tokenizer(str(folder)), [asked])[0].ids)

    def adapter(self, config: dict[str, Any] | None = None, change: Callable[[dict], Any] | None = None) -> Path:
        """An adapter of the tiny model's architecture with other settings or tensors."""
        lora = LoRA(causal("llama"))
        lora.add("x", LoraSpec(rank=3))
        folder = self.folder / "adapter"
        peft_format.save(lora, "x", folder, "base")
        about, found = json.loads((folder / peft_format.CONFIG).read_text()), load_file(folder / peft_format.WEIGHTS)
        if change:
            change(found)
        (folder / peft_format.CONFIG).write_text(json.dumps(about | (config or {})))
        save_file(found, folder / peft_format.WEIGHTS)
        return folder

    def attach(self, folder: Path, family: str = "llama") -> Any:
        lora = LoRA(causal(family))
        try:
            return adapters.load(lora, folder, "again")
        finally:
            assert len(lora.names) == len(lora._parts)  # all of it or nothing

    def studio(self) -> tuple[Studio, RunConfig]:
        """A Studio with a dataset, and a run of it that would be right."""
        studio = Studio(self.folder / "root")
        self.patch.setattr(studio.supervisor, "tick", lambda: None)  # nothing is to train
        dataset = studio.data.add_text(CSV)
        spec = LoraSpec(rank=2)
        return studio, RunConfig(model=str(self.tiny), dataset=DataChoice(id=dataset.id), method=spec)

    def start(self, train: dict[str, Any] | None = None, spec: dict[str, Any] | None = None, **config: Any) -> Any:
        """Start a run with these settings, as any door of the app does."""
        studio, good = self.studio()
        method = build(LoraSpec, spec) if spec else good.method
        chosen = build(TrainConfig, {"max_length": 64, **(train or {})})
        return studio.start(replace(good, train=chosen, method=method, **config))


class Bad(NamedTuple):
    """One bad input: what it is called, what must come of it, and how it is given."""

    number: str
    name: str
    expected: str  # a code, "W" for at least one warning, "ok"
    act: Callable[[Bench], Any]


CASES: list[Bad] = []


def bad(number: str, name: str, expected: str) -> Callable[[Callable[[Bench], Any]], Callable[[Bench], Any]]:
    def put(act: Callable[[Bench], Any]) -> Callable[[Bench], Any]:
        CASES.append(Bad(number, name, expected, act))
        return act

    return put


def every(number: str, expected: str, acts: dict[str, Callable[[Bench], Any]]) -> None:
    for name, act in acts.items():
        CASES.append(Bad(number, name, expected, act))


def examples(*pairs: tuple[str, str]) -> list[Example]:
    return [
        Example((Message("user", asked), Message("assistant", said)), row=row)
        for row, (asked, said) in enumerate(pairs, 1)
    ]


def hollow(folder: Path, name: str, size: int, head: bytes = b"q,a\n") -> Path:
    """A file that has a size and hardly a byte."""
    path = folder / name
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path
