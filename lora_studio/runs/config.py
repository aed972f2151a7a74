"""What a run is: RunConfig is frozen and written once, Run is what anyone can read of it at this moment."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_studio.core.spec import LoraSpec
from lora_studio.fields import knob
from lora_studio.settings import TrainConfig

Status = Literal["queued", "running", "done", "stopped", "failed", "lost"]
ACTIVE: tuple[Status, ...] = ("queued", "running")


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """A dataset of the library and how its columns are to be read; empty means as guessed."""

    id: str
    name: str = ""
    format: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)  # role -> column


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that repeats a run. It never holds a secret."""

    name: str = knob("", label="Name", help="Shown in the run list")
    model: str = knob("starter", label="Base model", help="starter, a catalogue name, a Hub id or a local folder")
    task: str = knob("causal", choices=("causal",), label="Task", help="What is learnt: to continue text")
    dataset: DataChoice
    method: LoraSpec = LoraSpec()
    train: TrainConfig = TrainConfig()
    executor: str = knob("local", choices=("local",), label="Executor", help="Where the worker runs")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A read view of one run folder; `error` has code, message and hint when the run did not end well."""

    id: str
    path: Path
    config: RunConfig
    status: Status
    created: float  # seconds since the epoch
    step: int = 0
    steps: int = 0
    latest: Mapping[str, float] = field(default_factory=dict)  # newest value of each metric
    summary: Mapping[str, Any] = field(default_factory=dict)  # exit.json's figures, once ended
    note: str = ""  # the newest message for the reader, such as what is being fetched
    error: Mapping[str, str] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # model revision, estimate before launch

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def active(self) -> bool:
        return self.status in ACTIVE

    @property
    def has_adapter(self) -> bool:
        return (self.path / "adapter" / "adapter_model.safetensors").is_file()
