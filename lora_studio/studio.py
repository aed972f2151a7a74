"""Studio(root): the one object that the page, the command line and the tests hold.

It joins the libraries (models, data), the runs and their queue, and keeps one base model loaded for
comparing. Everything durable lies under `root`; two Studios on one root see the same runs.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_studio.core.spec import LoraSpec
from lora_studio.data.library import DataLibrary, Dataset, split
from lora_studio.errors import StudioError, quote
from lora_studio.fields import check
from lora_studio.models import CATALOGUE, ModelLibrary
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.runs.store import RunStore
from lora_studio.runs.supervisor import Supervisor
from lora_studio.settings import TrainConfig

log = logging.getLogger(__name__)


def default_root() -> Path:
    """LORA_STUDIO_ROOT, else /data on a Space with storage, else a folder in the user's home."""
    given = os.environ.get("LORA_STUDIO_ROOT")
    if given:
        return Path(given)
    if os.environ.get("SPACE_ID") and os.access("/data", os.W_OK):
        return Path("/data")
    return Path.home() / ".lora-studio"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A dataset as one model will see it."""

    dataset: Dataset
    format: str
    columns: Mapping[str, str]
    rows: int
    train: int
    heldout: int
    lengths: Any  # data.batches.Lengths
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        tokens = {"median": self.lengths.median, "p95": self.lengths.p95, "max": self.lengths.max}
        return {
            "id": self.dataset.id,
            "name": self.dataset.name,
            "format": self.format,
            "columns": dict(self.columns),
            "rows": self.rows,
            "train": self.train,
            "heldout": self.heldout,
            "tokens": tokens,
            "histogram": list(self.lengths.histogram),
            "cut": self.lengths.cut,
            "supervised_tokens": self.lengths.supervised,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would adapt and cost."""

    targets: Sequence[Any]  # core.layout.Target
    rank: int
    estimate: Any  # estimate.Estimate

    def as_json(self) -> dict[str, Any]:
        targets = [
            {
                "name": target.name,
                "role": target.role,
                "shape": list(target.shape),
                "parameters": target.parameters(self.rank),
            }
            for target in self.targets
        ]
        return {"targets": targets, **self.estimate.as_json()}


@dataclass(frozen=True)
class Comparison:
    """One moment of a side-by-side: answers in the order of the panes, the base model first."""

    names: tuple[str, ...]  # "base", then run ids
    answers: Sequence[Any]  # generate.Answer
    base_difference: float  # largest |logit| difference of the base row to the untouched model; 0 is right
    seconds: float


@dataclass
class _Loaded:
    """The base model kept for comparing, with the adapters loaded so far."""

    model: str
    lora: Any
    tokenizer: Any


class Studio:
    """All work of the app, without a page."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = (Path(root) if root else default_root()).expanduser().absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        self.exports = self.root / "exports"  # downloads, each in a folder of its own
        self.models = ModelLibrary(self.root)
        self.data = DataLibrary(self.root)
        self.runs = RunStore(self.root)
        self.supervisor = Supervisor(self.runs)
        self._loaded: _Loaded | None = None
        self._busy = threading.Lock()  # one forward at a time on the loaded model
        self._read: tuple[Any, Any] = (None, None)  # the rows looked at last, by their choice
        self._measured: tuple[Any, Any] = (None, None)  # their lengths, by choice, model and limit

    # ---- before a run ------------------------------------------------------------------------------------------------

    def inspect(self, choice: DataChoice, model: str = "starter", config: TrainConfig = TrainConfig()) -> Inspection:
        """Rows, split, token lengths and warnings of a dataset under a model's tokenizer."""
        from lora_studio.data.batches import encode, lengths

        dataset = self.data.get(choice.id)
        examples, warnings = self._examples(choice)
        key, kept = (*_key(choice), model, config.max_length), self._measured
        if key != kept[0]:  # the form asks at every change, mostly about the same rows
            tokenizer = self.models.tokenizer(model)
            kept = key, lengths([encode(tokenizer, example, config.max_length) for example in examples])
            self._measured = kept
        measured = kept[1]
        train, heldout = split(examples, config.holdout, config.seed)
        if measured.cut:
            warnings = [*warnings, f"{measured.cut} of {len(examples)} examples are cut at {config.max_length} tokens"]
        if measured.unsupervised:
            warnings = [*warnings, f"{measured.unsupervised} examples keep no token to learn from and are left out"]
        return Inspection(
            dataset=dataset,
            format=choice.format or dataset.format,
            columns=choice.columns or self.data.mapping(dataset, choice.format),
            rows=len(examples),
            train=len(train),
            heldout=len(heldout),
            lengths=measured,
            warnings=tuple(warnings),
        )

    def preview(self, choice: DataChoice, row: int = 0, model: str = "starter", max_length: int = 512) -> list[Any]:
        """Row number `row` as the model will see it: data.batches.Piece per token."""
        from lora_studio.data.batches import preview

        examples, _ = self._examples(choice)
        return preview(self.models.tokenizer(model), examples[row % len(examples)], max_length)

    def plan(
        self, model: str, spec: LoraSpec, config: TrainConfig = TrainConfig(), choice: DataChoice | None = None
    ) -> Plan:
        """The matrices that would be adapted, exact parameter counts, forecast memory and time."""
        from lora_studio.core.lora import plan
        from lora_studio.estimate import estimate
        from lora_studio.models import context, device, training_precision

        check(config)
        skeleton = self.models.skeleton(model)
        most = context(skeleton)
        if most and config.max_length > most:
            message = f"The length limit is {config.max_length}, this model reads at most {most} tokens."
            raise StudioError("E_CONTEXT", message, f"Set the length limit to {most} or less.")
        targets = plan(skeleton, spec)
        seen = self.inspect(choice, model, config) if choice else None
        on = device()
        precision = training_precision(on) if config.precision == "auto" else config.precision
        forecast = estimate(
            skeleton,
            targets,
            spec.rank,
            config,
            precision=precision,
            device=on,
            lengths=seen.lengths if seen else None,
            rows=seen.rows if seen else 100,
        )
        return Plan(targets=targets, rank=spec.rank, estimate=forecast)

    # ---- runs --------------------------------------------------------------------------------------------------------

    def start(self, config: RunConfig) -> Run:
        """Queue a run; everything that can be wrong with it is said here, before anything is written."""
        check(config)
        config = replace(config, model=self.models.lasting_name(config.model))
        plan = self.plan(config.model, config.method, config.train, config.dataset)
        facts = {"revision": self.models.revision(config.model), "estimate": plan.estimate.as_json()}
        entry = CATALOGUE.get(config.model)
        if entry:
            facts["repo"] = entry.repo
        run = self.runs.create(config, facts)
        self.supervisor.tick()
        return self.runs.get(run.id)

    def follow(self, run: str, start: int = 0, interval_s: float = 0.2) -> Iterator[dict[str, Any]]:
        """The events of a run from number `start` on, as they come, until it has ended; turns the queue's crank."""
        read = start
        while True:
            active = self.runs.get(run).active
            fresh = self.runs.events(run, read)
            yield from fresh
            read += len(fresh)
            if not active:
                return
            self.supervisor.tick()
            time.sleep(interval_s)

    def stop(self, run: str) -> None:
        """Ask a run to end after its current step and keep its adapter."""
        self.runs.request_stop(run)

    def heldout(self, run: str, limit: int = 5) -> list[Any]:
        """The first held-out examples of a run, which it never trained on."""
        config = self.runs.get(run).config
        examples, _ = self._examples(config.dataset)
        return split(examples, config.train.holdout, config.train.seed)[1][:limit]

    # ---- after a run -------------------------------------------------------------------------------------------------

    def compare(
        self, runs: Sequence[str], prompt: str, *, strength: float = 1.0, sampling: Any = None
    ) -> Generator[Comparison, None, None]:
        """The base model and each run's adapter on one prompt, one batch, as the texts grow.

        All runs must share a base model. Raises E_NO_PROMPT, E_NO_ADAPTER, E_MIXED_BASES, E_STRENGTH.
        """
        from lora_studio.generate import Sampling, base_difference, compare
        from lora_studio.models import context

        if not prompt.strip():
            raise StudioError("E_NO_PROMPT", "The prompt is empty.", "Write one, or pick a held-out row.")
        if not 0 <= strength <= 4:
            raise StudioError("E_STRENGTH", f"The strength is {quote(strength)}.", "Give a number between 0 and 4.")
        sampling = check(sampling or Sampling())
        views = [self.runs.get(run) for run in runs]
        with self._busy:
            loaded = self._with_adapters(views)
            ids = self._prompt_ids(views[0], loaded.tokenizer, prompt)
            most = context(loaded.lora.model)
            if most and len(ids) >= most:
                message = f"The prompt is {len(ids)} tokens long, this model reads at most {most}."
                raise StudioError("E_CONTEXT", message, "Shorten it.")
            rows = [None, *({view.id: strength} for view in views)]
            difference = base_difference(loaded.lora, ids, rows)
            names, clock = ("base", *(view.id for view in views)), time.monotonic()
            for answers in compare(loaded.lora, loaded.tokenizer, ids, rows, sampling):
                yield Comparison(names, answers, difference, time.monotonic() - clock)

    def evaluate(self, run: str, choice: DataChoice | None = None, limit: int = 200) -> dict[str, Any]:
        """Base against adapted on the run's held-out rows, or on all rows of another dataset; at most `limit`."""
        from lora_studio.evaluate import evaluate

        view = self.runs.get(run)
        config = view.config
        if choice is None:
            choice, examples = config.dataset, self.heldout(run, limit)
        else:
            examples = self._examples(choice)[0][:limit]
        labels = (choice.format or self.data.get(choice.id).format) == "text_label"
        with self._busy:
            loaded = self._with_adapters([view])
            return evaluate(
                loaded.lora, view.id, loaded.tokenizer, examples, max_length=config.train.max_length, labels=labels
            )

    def export(self, run: str, to: Path, *, merged: bool = False, archive: bool = False) -> list[Path]:
        """Write the adapter, or the merged model, to the folder `to`; with `archive` also as a zip beside it.

        `to` must be new, empty or hold an earlier export of the same kind. Raises E_EXISTS, E_NO_ADAPTER.
        """
        from lora_studio.export import archive_of, check_folder, export_adapter, export_merged, pack

        view, to = self.runs.get(run), to.expanduser().resolve()
        check_folder(to, merged=merged, archive=archive)
        if not merged:
            files = export_adapter(view, to)
        else:
            with self._busy:
                loaded = self._with_adapters([view])
                files = export_merged(view, loaded.lora, view.id, loaded.tokenizer, to)
        return [*files, pack(files, to, archive_of(to))] if archive else files

    def archive(self, run: str, *, merged: bool = False) -> Path:
        """A fresh zip of the adapter or the merged model under `exports`, for a download; kept for an hour."""
        from lora_studio.export import fresh_download

        view = self.runs.get(run)
        folder = fresh_download(self.exports)
        unpacked = folder / f"{'merged' if merged else 'adapter'}-{view.id[:8]}"
        try:
            return self.export(view.id, unpacked, merged=merged, archive=True)[-1]
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _examples(self, choice: DataChoice) -> tuple[list[Any], list[str]]:
        """The rows of a choice and the warnings on the way; the latest are kept."""
        key, found = _key(choice), self._read
        if key != found[0]:
            found = key, self.data.examples(choice.id, choice.format, choice.columns or None)
            self._read = found
        return found[1]

    def _with_adapters(self, views: Sequence[Run]) -> _Loaded:
        """The runs' base model with their adapters attached; call with the lock held."""
        from lora_studio.peft_format import load

        if not views:
            raise StudioError("E_RUN_NOT_FOUND", "No run is chosen.", "Choose at least one.")
        for view in views:
            if not view.has_adapter:
                raise StudioError(
                    "E_NO_ADAPTER", f"{quote(view.name)} has not saved an adapter yet.", "Wait for an evaluation."
                )
        bases = {view.config.model for view in views}
        if len(bases) > 1:
            raise StudioError(
                "E_MIXED_BASES", f"These runs have different bases: {', '.join(sorted(bases))}.", "Choose one."
            )
        loaded = self._base(bases.pop())
        for view in views:
            if view.id in loaded.lora.names:
                loaded.lora.remove(view.id)  # a running run may have saved a better one since
            load(loaded.lora, view.path / "adapter", view.id)
        return loaded

    def _base(self, model: str) -> _Loaded:
        from lora_studio.core.lora import LoRA
        from lora_studio.models import device, inference_precision

        if self._loaded is None or self._loaded.model != model:
            self._loaded = None  # free the old one first
            skeleton = self.models.skeleton(model)
            on = device()
            precision = inference_precision(on, sum(tensor.numel() for tensor in skeleton.parameters()))
            lora = LoRA(self.models.load(model, precision=precision, on=on))
            self._loaded = _Loaded(model, lora, self.models.tokenizer(model))
        return self._loaded

    def _prompt_ids(self, view: Run, tokenizer: Any, prompt: str) -> list[int]:
        """As the run's training rows began: through the chat template, or as raw text for plain text rows."""
        from lora_studio.data.batches import prompt_ids
        from lora_studio.data.formats import Message

        dataset = view.config.dataset
        if (dataset.format or self.data.get(dataset.id).format) == "text":
            return tokenizer(prompt)["input_ids"]
        return prompt_ids(tokenizer, [Message("user", prompt)])


def _key(choice: DataChoice) -> tuple:
    return choice.id, choice.format, *sorted(choice.columns.items())


def run_as_json(run: Run) -> dict[str, Any]:
    """One entry of `runs --json`."""
    return {
        "id": run.id,
        "name": run.name,
        "status": run.status,
        "step": run.step,
        "steps": run.steps,
        "model": run.config.model,
        "error": dict(run.error) if run.error else None,
        "created": run.created,
        "summary": dict(run.summary),
        "config": asdict(run.config),
    }
