"""What a run is: RunConfig is frozen and written once, Run is what anyone can read of it at this moment."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_studio.core.spec import BASELINES, METHODS, BaselineSpec, LoraSpec, Method
from lora_studio.errors import StudioError, quote
from lora_studio.fields import build, knob, knobs
from lora_studio.limits import Limits
from lora_studio.owners import NOBODY
from lora_studio.settings import QUANTISED, TrainConfig

Status = Literal["queued", "running", "paused", "done", "stopped", "failed", "lost", "damaged"]
ACTIVE: tuple[Status, ...] = ("queued", "running")
TASKS = ("causal", "classify")
OUT_OF_MEMORY = "W_OUT_OF_MEMORY"  # the warning after which a run goes on in smaller passes
CHECKPOINT = re.compile(r"step-(\d{8,})")  # a folder's name once it is whole; before, it ends otherwise


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

    name: str = knob("", max=200, label="Name", help="Shown in the run list")
    model: str = knob("starter", label="Base model", help="starter, a catalogue name, a Hub id or a local folder")
    task: str = knob("causal", choices=TASKS, label="Task", help="What is learnt: to write text, or to choose a label")
    dataset: DataChoice
    method: Method = LoraSpec()
    train: TrainConfig = TrainConfig()
    executor: str = knob("local", choices=("local",), label="Executor", help="Where the worker runs")
    study: str = ""  # an id that the runs of one study share


@dataclass(frozen=True, kw_only=True)
class Run:
    """A read view of one run folder; `error` has code, message and hint when the run did not end well.

    It may have `change`, too: settings of TrainConfig that would cure it. A damaged one has an empty config.
    """

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
    verdict: str = ""  # what it has learnt in a word, once it has ended and was looked at; events.Learned
    error: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # model revision, estimate before launch
    owner: str = NOBODY
    shared: bool = False  # whether others may see its figures and its config, never its rows or what it wrote
    renamed: str = ""  # what its owner calls it since; empty: as its config does
    remarks: str = ""  # what its owner has noted about it
    discarded: bool = False  # it has ended and is to be deleted, as was asked while it trained

    @property
    def name(self) -> str:
        return self.renamed or self.config.name

    @property
    def revision(self) -> str:
        """Of the base when the run was planned, as ModelLibrary.revision says; empty where it was not looked up."""
        return str(self.facts.get("revision") or "")

    @property
    def active(self) -> bool:
        return self.status in ACTIVE

    @property
    def brought(self) -> bool:
        """Whether its adapter was made elsewhere (adoption.origin): nothing is known of the training."""
        return "origin" in self.facts

    @property
    def has_adapter(self) -> bool:
        return self.status != "damaged" and (self.path / "adapter" / "adapter_model.safetensors").is_file()

    @property
    def resumable(self) -> bool:
        """Whether it can go on: it has a checkpoint, was lost before the first one, or had not begun to train."""
        if self.active or self.status in ("done", "damaged"):
            return False
        saved = any(CHECKPOINT.fullmatch(path.name) for path in (self.path / "checkpoints").glob("step-*"))
        return saved or self.status == "lost" or self.step == 0

    @property
    def labels(self) -> tuple[str, ...]:
        """What a classifier chooses from, in the order of its outputs; empty for a model that writes text."""
        return tuple(self.facts.get("labels", ()))


def check_limits(config: RunConfig, limits: Limits) -> None:
    """Raise E_LIMIT for the first setting of a run that asks for more than there is for one visitor.

    Epochs are no number of steps yet; the worker counts those.
    """
    method, train = config.method, config.train
    ranks = [method.rank, *method.rank_pattern.values()] if isinstance(method, LoraSpec) else [0]
    check_limit("rank", max(ranks), limits.rank)
    check_limit("length limit", train.max_length, limits.tokens, "max_length")
    check_limit("number of steps", train.steps, limits.steps, "steps")


def check_limit(name: str, value: float, most: float, setting: str = "") -> None:
    """Raise E_LIMIT when it is more than there is; setting: of the form, which would have to be less."""
    if value > most:
        message = f"The {name} is {value:,}; here it is at most {most:,.0f}."
        hint = "Ask for less, or run LoRA Studio on a machine of your own."
        raise StudioError("E_LIMIT", message, hint, {setting: int(most)} if setting else None)


def method_of(name: str, width: int = 0, lora: Mapping[str, Any] | None = None) -> Method:
    """The method of spec.METHODS that a form or a command line describes. Raises E_METHOD, E_CONFIG.

    width: of a method that has one, 0 for its usual. lora: the values of LoraSpec, when it is LoRA.
    """
    if name not in METHODS:
        raise StudioError("E_METHOD", f"There is no method {quote(name)}.", f"Give one of {', '.join(METHODS)}.")
    if width and (name == "lora" or not BASELINES[name][1]):
        raise StudioError("E_METHOD", f"The method {name} has no width.", "Leave it out.")
    return build(LoraSpec, lora or {}) if name == "lora" else build(BaselineSpec, {"kind": name, "width": width})


def short(method: Method) -> str:
    """The method in a run's name: r8, full, prefix 16."""
    if isinstance(method, LoraSpec):
        return f"r{method.rank}"
    return f"{method.kind} {method.size}" if method.size else method.kind


def width_in_words(method: BaselineSpec) -> str:
    """16 virtual tokens, bottleneck width 8; empty for a method without a width."""
    means = BASELINES[method.kind][1]
    return f"{method.size} {means}" if means.endswith("s") else f"{means} {method.size}" if means else ""


def change_in_words(change: Mapping[str, Any]) -> str:
    """learning rate 0.0005, steps 40; empty for no change."""
    labels = {**knobs(LoraSpec), **knobs(TrainConfig)}
    known = [(labels[name].label.lower(), value) for name, value in change.items() if name in labels]
    return ", ".join(f"{label} {value:g}" if isinstance(value, float) else f"{label} {value}" for label, value in known)


def settings_in_words(run: Run) -> dict[str, str]:
    """Every setting of a run by its label, in the order of the form; what is not set is empty."""
    config, method = run.config, run.config.method
    data = config.dataset
    said = {
        "Base model": config.model,
        "Revision": run.revision[:12],
        "Dataset": f"{data.name} ({data.id[:8]})",
        "Format": data.format,
        "Columns": _in_words(data.columns),
        "Labels": _in_words(run.labels),
        "Task": config.task,
        "Method": "LoRA" if isinstance(method, LoraSpec) else BASELINES[method.kind][0],
    }
    for part in (method, config.train):
        settings = [setting for name, setting in knobs(type(part)).items() if name != "kind"]
        said |= {setting.label: _in_words(getattr(part, setting.name)) for setting in settings}
    return said


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={one}" for name, one in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if type(value) is float else str(value)


def base_precision(method: Method, asked: str, on: str, parameters: int) -> str:
    """How a base of so many parameters is held while it trains.

    auto: what suits the device, but float32 where its own weights learn.

    Raises E_METHOD for weights that are packed and are to be trained.
    """
    from lora_studio.models import training_precision

    whole = isinstance(method, BaselineSpec) and method.kind in ("full", "top")
    if whole and asked in QUANTISED:
        message = f"This method trains the weights that {asked} packs."
        raise StudioError("E_METHOD", message, "Take LoRA, or auto.", {"precision": "auto"})
    if isinstance(method, LoraSpec) and method.variant in ("dora", "pissa") and asked in QUANTISED:
        message = f"Variant {method.variant} needs the weights that {asked} packs."
        raise StudioError("E_QUANTISED", message, "Take variant lora, or precision auto.", {"precision": "auto"})
    return asked if asked != "auto" else "float32" if whole else training_precision(on, parameters)
