"""Studio(root): the one object that the page, the command line and the tests hold.

It joins the libraries (models, data), the runs and their queue, and keeps one base model loaded for
comparing. Everything durable lies under `root`; two Studios on one root see the same runs.
"""

import contextlib
import copy
import functools
import itertools
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_studio.at_hand import AtHand, Loaded, check_adapter, no_run
from lora_studio.ballots import Ballots
from lora_studio.core.spec import VIRTUAL, BaselineSpec, LoraSpec, Method
from lora_studio.data.library import DataLibrary, split
from lora_studio.errors import StudioError, quote
from lora_studio.fields import build, check
from lora_studio.limits import Limits, limits_here
from lora_studio.models import CATALOGUE, ModelLibrary
from lora_studio.owners import NOBODY, home
from lora_studio.results import Comparison, Exported, Inspection, Plan, Pushed, Wanted, Written
from lora_studio.runs.config import TASKS, DataChoice, Run, RunConfig, base_precision, check_limits
from lora_studio.runs.store import RunStore
from lora_studio.runs.supervisor import Supervisor
from lora_studio.settings import QUANTISED, TrainConfig
from lora_studio.study import Table, grid, studies, table

log = logging.getLogger(__name__)

WANTED_TOKENS = 256  # of an answer whose tokens are looked at one by one


def default_root() -> Path:
    """LORA_STUDIO_ROOT, else /data on a Space with storage, else a folder in the user's home."""
    given = os.environ.get("LORA_STUDIO_ROOT")
    if given:
        return Path(given)
    if os.environ.get("SPACE_ID") and os.access("/data", os.W_OK):
        return Path("/data")
    return Path.home() / ".lora-studio"


class _Rows:
    """The rows that were read last, with what they are the rows of."""

    def __init__(self) -> None:
        self.read: tuple[Any, Any] = (None, None)


class Studio:
    """All work of the app, without a page."""

    def __init__(self, root: Path | str | None = None, limits: Limits | None = None) -> None:
        self.root = (Path(root) if root else default_root()).expanduser().absolute()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"The folder {quote(str(self.root))} cannot be made: {error.strerror}."
            raise StudioError("E_ROOT", message, "Set LORA_STUDIO_ROOT to a folder that you may write to.") from None
        self.limits = limits or limits_here()
        self.exports = self.root / "exports"  # downloads, each in a folder of its own
        self.models = ModelLibrary(self.root, self.limits, guarded=True)
        self.runs = RunStore(self.root, self.limits)
        self.supervisor = Supervisor(self.runs)
        self.operator = ""
        self._hand = AtHand(self.models)
        self._large = _Rows()  # one set for all owners
        self._belong(NOBODY)

    def of(self, owner: str) -> "Studio":
        """The same Studio as one owner sees it: with the runs and datasets of that owner, and no others."""
        scoped = copy.copy(self)
        scoped.runs = self.runs.of(owner)
        scoped._belong(owner)
        return scoped

    def by(self, operator: str) -> "Studio":
        """The same Studio as an operator has it: with everybody's work, and every change logged under that name."""
        seen = copy.copy(self)
        seen.operator = operator
        return seen

    def fresh_uploads(self) -> Path:
        """An empty folder for what browsers send; call it while no other app uses this root."""
        folder = self.root / "uploads"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _note(self, change: str, what: str) -> None:
        if self.operator:
            log.warning("operator %s: %s %s", self.operator, change, what)

    def _of_owner(self, view: Run) -> "Studio":
        """The Studio that has the rows of a run: an operator may look at a run of somebody else."""
        return self if view.owner == self.owner else self.of(view.owner)

    def _belong(self, owner: str) -> None:
        self.owner = owner
        self.data = DataLibrary(home(self.root, owner), self.limits)
        self.ballots = Ballots(home(self.root, owner))
        self._small = _Rows()
        self._measured: tuple[Any, Any] = (None, None)  # their lengths, by choice, model and task
        self._health: tuple[Any, Any] = (None, None)  # and what is known of them, by that and the split
        self._measuring = threading.Lock()
        self._report: tuple[Any, Any] = (None, None)  # what was seen inside last, by the adapters looked into

    # ---- before a run ------------------------------------------------------------------------------------------------

    def task(self, model: str, choice: DataChoice | None = None, asked: str = "auto") -> str:
        """causal or classify, as asked; auto chooses labels for text with labels on a model that cannot write."""
        if asked in TASKS:
            return asked
        if asked != "auto":
            raise StudioError("E_TASK", f"There is no task {quote(asked)}.", f"Give one of auto, {', '.join(TASKS)}.")
        if choice and self.format(choice) != "text_label":
            return "causal"
        return "causal" if self._writes(model) else "classify"

    def format(self, choice: DataChoice) -> str:
        """How the rows of a choice are read: a name of data.formats.FORMATS."""
        return choice.format or self.data.get(choice.id).format

    def labels(self, choice: DataChoice) -> tuple[str, ...]:
        """What a classifier would choose from: the different labels of all rows. Raises E_LABELS."""
        from lora_studio.data.formats import labels_of

        return labels_of(self._examples(choice)[0])

    def inspect(
        self, choice: DataChoice, model: str = "starter", config: TrainConfig = TrainConfig(), task: str = "causal"
    ) -> Inspection:
        """Rows, split, token lengths, health and warnings of a dataset under a model's tokenizer."""
        _, notes = self._examples(choice)
        health = self._examined(choice, model, config, task)
        if health.measured.quoted:
            quoted = f"{health.measured.quoted:,} examples quote control tokens of the model; read as plain text"
            notes = [*notes, quoted]
        return Inspection(
            dataset=self.data.get(choice.id),
            format=self.format(choice),
            columns=choice.columns or self.data.mapping(self.data.get(choice.id), choice.format),
            limit=config.max_length,
            health=health,
            lengths=health.at(config.max_length),
            notes=tuple(notes),
        )

    def _examined(self, choice: DataChoice, model: str, config: TrainConfig, task: str) -> Any:
        """The health of a choice's rows; the latest is kept, and its lengths for every limit and split."""
        from lora_studio.data.batches import measure, measure_labels
        from lora_studio.data.health import examine

        examples, _ = self._examples(choice)
        rows = (*_key(choice), model, task)
        key = (*rows, config.holdout, config.seed)
        with self._measuring:  # the form asks at every change from several places, mostly about the same rows
            if rows != self._measured[0]:
                tokenizer = self.models.tokenizer(model)
                if task == "classify":
                    self.labels(choice)
                self._measured = rows, (measure_labels if task == "classify" else measure)(tokenizer, examples)
            if key != self._health[0]:
                format = self.format(choice)
                kind = "labels" if task == "classify" else "documents" if format == "text" else "answers"
                found = examine(
                    *split(examples, config.holdout, config.seed),
                    self._measured[1],
                    kind=kind,
                    labels=kind == "labels" or format == "text_label",
                    empty=self.data.get(choice.id).rows - len(examples),
                )
                self._health = key, found
            return self._health[1]

    def preview(
        self, choice: DataChoice, row: int = 1, model: str = "starter", max_length: int = 512, task: str = "causal"
    ) -> list[Any]:
        """A row by its number in the file, from 1, as the model will see it: data.batches.Piece per token.

        A classifier's ends in its label. Raises E_ROW for a number that is no row's or belongs to one left out.
        """
        from lora_studio.data.batches import preview, preview_label

        examples, _ = self._examples(choice)
        last = self.data.get(choice.id).rows
        if not 1 <= row <= last:
            raise StudioError("E_ROW", f"There is no row {row:,}.", f"Rows are 1 to {last:,}.")
        place = bisect_left(examples, row, key=lambda example: example.row)
        if place == len(examples) or examples[place].row != row:
            raise StudioError("E_ROW", f"Row {row:,} is left out.", "There is nothing to learn in it.")
        tokenizer, example = self.models.tokenizer(model), examples[place]
        if task == "classify":
            self.labels(choice)
        return (preview_label if task == "classify" else preview)(tokenizer, example, max_length)

    def matrices(self, model: str) -> list[Any]:
        """Every matrix of a model that LoRA can adapt (core.layout.Target), in forward order."""
        from lora_studio.core.layout import matrices

        return matrices(self.models.skeleton(model, labels=0 if self._writes(model) else 2))

    def plan(
        self,
        model: str,
        method: Method,
        config: TrainConfig = TrainConfig(),
        choice: DataChoice | None = None,
        task: str = "causal",
    ) -> Plan:
        """What would be trained, exact parameter counts, forecast memory and time.

        A classifier without a dataset is planned for two labels.
        """
        from lora_studio.core.baselines import plan
        from lora_studio.core.layout import heads
        from lora_studio.core.lean import can_share
        from lora_studio.estimate import estimate
        from lora_studio.models import check_quantising, context, device, parameter_count
        from lora_studio.step import side_by_side

        check(config)
        if isinstance(method, BaselineSpec) and method.kind in VIRTUAL and config.checkpointing == "on":
            message = f"The method {method.kind} cannot compute activations twice."
            hint = "Set checkpointing to auto or off."
            raise StudioError("E_METHOD", message, hint, {"checkpointing": "auto"})
        labels = () if task == "causal" else self.labels(choice) if choice else ("0", "1")
        skeleton = self.models.skeleton(model, labels=len(labels))
        if labels:
            method = replace(method, modules_to_save=heads(skeleton))
        pieces = plan(skeleton, method)
        most = context(skeleton)
        if most and isinstance(method, BaselineSpec) and method.kind in VIRTUAL:
            most -= method.size
        if most and config.max_length > most:
            message = f"The length limit is {config.max_length}, this model reads at most {most} tokens."
            hint = f"Set the length limit to {most} or less."
            raise StudioError("E_CONTEXT", message, hint, {"max_length": most})
        seen = self.inspect(choice, model, config, task) if choice else None
        if seen and not seen.lengths.supervised:
            message = f"None of the {seen.health.rows:,} examples has a token to learn from."
            hint = "Raise the length limit, or check which column holds the answer."
            longer = int(min(2 * config.max_length, most or math.inf, self.limits.tokens))
            change = {"max_length": longer} if seen.lengths.cut and longer > config.max_length else None
            raise StudioError("E_NO_TARGET", message, hint, change)
        on = device()
        precision = base_precision(method, config.precision, on, parameter_count(skeleton))
        if precision in QUANTISED:
            check_quantising(skeleton, precision, on)
        lengths = seen.lengths if seen else None
        shares = can_share(skeleton, on) and _lays_prefix_once(skeleton, method)
        if lengths and not shares:
            lengths = replace(lengths, shared_prefix=0)
        factors = isinstance(method, LoraSpec) and not method.modules_to_save
        recorded = on == "cuda" and precision == "bfloat16" and config.checkpointing != "on"
        forecast = estimate(
            skeleton,
            pieces,
            config,
            precision=precision,
            device=on,
            lengths=lengths,
            rows=seen.health.rows if seen else 100,
            abreast=side_by_side(skeleton, shares=shares, only_factors=factors) if on == "cpu" else 1,
            recorded=recorded and _can_be_recorded(skeleton, method),
        )
        return Plan(pieces=pieces, method=method, labels=labels, estimate=forecast)

    # ---- runs --------------------------------------------------------------------------------------------------------

    def start(self, config: RunConfig) -> Run:
        """Queue a run; everything that can be wrong with it is said here, before anything is written."""
        checked = self._checked(config)
        with self.supervisor.hold():  # whoever else asks at this moment is counted
            self.runs.admit()
            run = self.runs.create(*checked)
        self._note("start", run.id)
        self.supervisor.tick()
        return self.runs.get(run.id)

    def sweep(
        self, config: RunConfig, ranks: Sequence[int], targets: Sequence[Sequence[str]], rates: Sequence[float] = ()
    ) -> list[Run]:
        """Queue a study: one run per choice of matrices, rank and learning rate (study.grid), all of them or none.

        Raises E_STUDY, and as `start` does for any of its cells.
        """
        checked = [self._checked(cell) for cell in grid(config, ranks, targets, rates)]
        with self.supervisor.hold():  # one look at the queue sees them all, so that one worker may take them all
            self.runs.admit(len(checked))
            runs = [self.runs.create(*one) for one in checked]
        self._note("start the study", runs[0].config.study)
        self.supervisor.tick()
        return [self.runs.get(run.id) for run in runs]

    def follow(self, run: str, start: int = 0, interval_s: float = 0.2) -> Iterator[dict[str, Any]]:
        """The events of a run from number `start` on, as they come, until it has ended; turns the queue's crank."""
        read = start
        while True:
            view = self.runs.get(run)
            fresh = self.runs.events(run, read)
            yield from fresh
            read += len(fresh)
            if not view.active and not self.supervisor.resumes(view):
                return
            self.supervisor.tick()
            time.sleep(interval_s)

    def studies(self) -> dict[str, list[Run]]:
        """The runs of each study, newest first."""
        return studies(self.runs.list())

    def study(self, study: str) -> Table:
        """A study as it stands, by its id or a unique beginning of it. Raises E_STUDY_NOT_FOUND."""
        known = self.studies()
        found = [study] if study in known else [one for one in known if len(study) >= 4 and one.startswith(study)]
        if len(found) != 1:
            raise StudioError("E_STUDY_NOT_FOUND", f"There is no study {quote(study)}.", "Each run names its own.")
        return table(known[found[0]])

    def follow_study(self, study: str, interval_s: float = 0.2) -> Iterator[dict[str, Any]]:
        """The events of all runs of a study as they come, each with its "run", until all have ended."""
        read: dict[str, int] = {}
        while True:
            views = self.studies().get(study, [])[::-1]
            for view in views:
                fresh = self.runs.events(view.id, read.get(view.id, 0))
                yield from ({**event, "run": view.id} for event in fresh)
                read[view.id] = read.get(view.id, 0) + len(fresh)
            if not any(view.active or self.supervisor.resumes(view) for view in views):
                return
            self.supervisor.tick()
            time.sleep(interval_s)

    def stop(self, run: str) -> None:
        """Ask a run to end after its current step and keep its adapter."""
        self._note("stop", run)
        self.runs.request_stop(run)

    def pause(self, run: str) -> None:
        """Ask a run to end after its current step, so that it can be resumed exactly there."""
        self._note("pause", run)
        self.runs.request_pause(run)

    def discard(self, run: str) -> None:
        """Ask a run to end after its current step and to be deleted then; `restore` brings it back for a while."""
        self._note("discard", run)
        self.runs.request_discard(run)

    def share(self, run: str, on: bool = True) -> None:
        """Let others see a run's figures and settings, or no longer."""
        self._note("share" if on else "no longer share", run)
        self.runs.share(run, on)

    def delete(self, run: str) -> None:
        """Put a run aside, to be removed with all its files after store.UNDO_S. Raises E_RUN_ACTIVE while it trains."""
        self._note("delete", run)
        self.runs.delete(run)

    def restore(self, run: str) -> None:
        """Bring back a run that was just deleted, as it was. Raises E_RUN_NOT_FOUND once it is gone for good."""
        self._note("restore", run)
        with self.supervisor.hold():
            if any(view.id == run and view.status == "queued" for view, _ in self.runs.deleted()):
                self.runs.admit()
            self.runs.restore(run)
        self.supervisor.tick()

    def describe(self, run: str, *, name: str | None = None, remarks: str | None = None) -> Run:
        """Call a run otherwise, or note something about it. Raises E_CONFIG, E_LIMIT."""
        self._note("describe", run)
        return self.runs.describe(run, name=name, remarks=remarks)

    def resume(self, run: str) -> Run:
        """Put a run that was paused, stopped, lost or failed back into the queue; it goes on where it was saved.

        Raises E_RUN_DONE, E_RUN_ACTIVE, E_NO_CHECKPOINT and E_CHECKPOINT.
        """
        self._note("resume", run)
        with self.supervisor.hold():
            self.runs.admit()
            self.runs.check_room(self.runs.get(run).facts)
            resumed = self.runs.requeue(run)
        self.supervisor.tick()
        return self.runs.get(resumed.id)

    def resume_study(self, study: str) -> list[Run]:
        """Put all paused and lost runs of a study back into the queue, so that one worker may take them together.

        One that cannot go on does not keep the others back; then its error is raised, as `resume` does.
        """
        self._note("resume the study", study)
        wanted = [cell.run for cell in self.study(study).every if cell.resumable]
        resumed, problem = [], None
        with self.supervisor.hold():
            self.runs.admit(len(wanted))
            for run in wanted:
                try:
                    self.runs.check_room(self.runs.get(run).facts)
                    resumed.append(self.runs.requeue(run))
                except StudioError as error:
                    problem = problem or error
        self.supervisor.tick()
        if problem:
            raise problem
        return [self.runs.get(run.id) for run in resumed]

    def restart(self, run: str, change: Mapping[str, Any]) -> Run:
        """Start a run anew with some settings of its TrainConfig changed. Raises E_CONFIG, and as `start` does."""
        view = self.runs.get(run)
        self._note("restart", view.id)
        train = build(TrainConfig, asdict(view.config.train) | dict(change))
        config = replace(view.config, name=self._free_name(view.name), train=train, study="")
        return self._of_owner(view).start(config)

    def another_rank(self, run: str, rank: int) -> Run:
        """Queue the same run with another rank; alpha keeps its ratio to it. Raises E_NOT_LORA, and as `start` does."""
        view = self.runs.get(run)
        method = view.config.method
        if not isinstance(method, LoraSpec):
            message = f"{quote(view.name)} was trained by the method {method.kind}, which has no rank."
            raise StudioError("E_NOT_LORA", message, "Choose a run of LoRA.")
        self._note("another rank of", view.id)
        old, new = f"r{method.rank}", f"r{rank}"
        name = " ".join(new if word == old else word for word in view.name.split(" "))
        name = self._free_name(view.name) if name == view.name else name
        method = replace(method, rank=rank, alpha=method.alpha / method.rank * rank)
        return self._of_owner(view).start(replace(view.config, name=name, method=method, study=""))

    def adopt(self, folder: Path, model: str, name: str = "") -> Run:
        """Keep an adapter that was made elsewhere, in PEFT's layout, as a run that is done; `model` is its base.

        Only its two files are read, and nothing is stored unless they fit the base. Raises E_TOO_LARGE, E_LIMIT, E_DISK
        and the codes of peft_format.load.
        """
        from lora_studio.adapters import save
        from lora_studio.adoption import draft, settled, take

        model = self.models.lasting_name(model)
        with tempfile.TemporaryDirectory(prefix="claimed-", dir=self.root) as own:
            origin = take(folder, Path(own) / "adapter", self.limits)
            config = draft(model, name, self.models.tokenizer(model).chat_template)
            repo = {"repo": CATALOGUE[model].repo} if model in CATALOGUE else {}
            facts = {"revision": self.models.revision(model), "origin": origin, **repo}
            view = Run(id="draft", path=Path(own), config=config, status="done", created=0.0, facts=facts)
            with self._hand.busy:
                lora = self._hand.with_adapters([view]).lora
                config = settled(config, lora.specs[view.id], self.limits)
                values = sum(tensor.numel() for _, part in lora.parts(view.id) for tensor in part.parameters())
                self.runs.check_free("This adapter needs", 4 * values)
                save(lora, view.id, Path(own) / "checked", repo.get("repo", model))
            run = self.runs.create(config, facts, adapter=Path(own) / "checked")
        self._note("adopt", run.id)
        return run

    def _free_name(self, name: str) -> str:
        """The name with the lowest number behind it that no run has: orders, orders (2); none stays none."""
        stem = re.sub(r" \(\d+\)$", "", name)
        if not stem:
            return ""
        taken = {run.name for run in self.runs.list()}
        return next(free for number in itertools.count(2) if (free := f"{stem} ({number})") not in taken)

    def heldout(self, run: str, limit: int = 5) -> list[Any]:
        """The first held-out examples of a run, which it never trained on; none of one that was brought along."""
        view = self.runs.get(run)
        if view.brought:
            return []
        examples, _ = self._of_owner(view)._examples(view.config.dataset)
        return split(examples, view.config.train.holdout, view.config.train.seed)[1][:limit]

    # ---- after a run -------------------------------------------------------------------------------------------------

    def compare(
        self,
        runs: Sequence[str | Mapping[str, float]],
        prompt: str | Sequence[Any],
        *,
        strength: float = 1.0,
        sampling: Any = None,
    ) -> Generator[Comparison, None, None]:
        """The base model and each run's adapter on one prompt, one batch, as the texts grow.

        prompt: what a user says, or all messages of a conversation (data.formats.Message), the last one's answer due.
        runs: one entry per pane behind the base's, a run at `strength` or {run: strength}; several of a mapping act
        together. Classifiers answer at once, with the chance of each label; their base has the head it began with.
        All runs must share a base model and labels. Raises E_NO_PROMPT, E_NO_ADAPTER, E_MIXED_BASES, E_STRENGTH,
        E_LIMIT.
        """
        from lora_studio.generate import Sampling, base_difference, classify, compare
        from lora_studio.models import context
        from lora_studio.prompts import Prompt, check_set, saying

        sampling = check(sampling or Sampling())
        asked = saying(prompt) if isinstance(prompt, str) else [Prompt(tuple(prompt))]
        check_set(asked, 1 + len(runs), sampling.max_new_tokens, self.limits)
        views, rows = self._asked(runs, strength)
        with self._hand.of(views) as loaded:
            ids = self._asked_ids(views[0], loaded.tokenizer, asked[0].messages)
            most = context(loaded.lora.model)
            if most and len(ids) >= most:
                message = f"The prompt is {len(ids)} tokens long, this model reads at most {most}."
                raise StudioError("E_CONTEXT", message, "Shorten it.")
            batch = [None, *rows]
            difference = base_difference(loaded.lora, ids, batch)
            exact = all(loaded.lora.packs(view.id) for view in views)
            names, clock = ("base", *map(" + ".join, rows)), time.monotonic()
            if labels := views[0].labels:
                found = [dict(zip(labels, row, strict=True)) for row in classify(loaded.lora, batch, ids, labels)]
                answers = [_chosen(chances) for chances in found]
                yield Comparison(names, answers, difference, time.monotonic() - clock, exact, found)
                return
            for answers in compare(loaded.lora, loaded.tokenizer, ids, batch, sampling):
                yield Comparison(names, answers, difference, time.monotonic() - clock, exact)

    def writers(self, runs: Sequence[str]) -> list[Run]:
        """The runs, each of which writes text. Raises E_RUN_NOT_FOUND, E_NO_TEXT."""
        views = [self.runs.get(run) for run in runs]
        for view in views:
            if view.labels:
                message = f"{quote(view.name)} chooses among labels and writes no text."
                raise StudioError("E_NO_TEXT", message, "Under Answers you see the chance of each label.")
        return views

    def prompts_in(self, path: Path) -> list[Any]:
        """The prompts of a small file and the answers that it gives for them: prompts.Prompt."""
        from lora_studio.data.formats import asked
        from lora_studio.prompts import of_examples

        return of_examples(asked(self.data.glance(path, self.limits.prompts)))

    def answer_prompts(
        self, sides: Sequence[str], prompts: Sequence[Any], sampling: Any = None
    ) -> Generator[Written, None, None]:
        """What each side, "base" or a run's id, answers to each of prompts.Prompt, all sides in one batch.

        All runs must share a base model. Raises E_NO_PROMPT, E_LIMIT, E_CONTEXT, E_NO_TEXT, and as `compare` does.
        """
        from lora_studio.generate import Sampling, answer_all, base_difference
        from lora_studio.prompts import BASE, check_set

        sampling = check(sampling or Sampling())
        runs = [side for side in sides if side != BASE]
        views = self.writers(runs)
        check_set(prompts, len(sides), sampling.max_new_tokens, self.limits)
        with self._hand.of(views) as loaded:
            most = self._hand.room(views, loaded) - 1
            ids = [self._asked_ids(views[0], loaded.tokenizer, prompt.messages) for prompt in prompts]
            for number, one in enumerate(ids, 1):
                if len(one) > most:
                    message = f"Prompt {number:,} is {len(one):,} tokens long, this model reads at most {most:,.0f}."
                    raise StudioError("E_CONTEXT", message, "Shorten it.")
            adapters = {run: view.id for run, view in zip(runs, views, strict=True)}
            rows = [adapters.get(side) for side in sides]
            difference = base_difference(loaded.lora, ids[0], rows) if BASE in sides else None
            exact = all(map(loaded.lora.packs, adapters.values()))
            for texts in answer_all(loaded.lora, loaded.tokenizer, ids, rows, sampling):
                yield Written(texts, difference, exact)

    def chat(
        self, run: str, turns: Sequence[Any], *, strength: float = 1.0, sampling: Any = None
    ) -> Generator[Any, None, None]:
        """Base and adapted answers to the newest of chat.Turn, each going on from its own conversation: chat.Moment.

        Oldest turns that do not fit are left out. Raises E_NO_PROMPT, E_LIMIT, E_CONTEXT, and as `compare` does.
        """
        from lora_studio.chat import SIDES, Moment, fitting, template_remark
        from lora_studio.generate import Sampling, answer, base_difference
        from lora_studio.prompts import check_set, saying

        sampling, views = check(sampling or Sampling()), self.writers([run])
        check_set(saying(turns[-1].said), len(SIDES), sampling.max_new_tokens, self.limits)
        _, (row,) = self._asked([run], strength)
        with self._hand.of(views) as loaded:
            room, model = self._hand.room(views, loaded), loaded.lora.model
            room -= min(sampling.max_new_tokens, room // 2)  # an answer may have half of what the model reads
            most = self.limits.prompt_characters
            fitted = [fitting(loaded.tokenizer, turns, side, room, most) for side in SIDES]
            left_out, remark = (fitted[0][1], fitted[1][1]), template_remark(loaded.tokenizer)
            checked = base_difference(loaded.lora, fitted[0][0], [None, row]), loaded.lora.packs(views[0].id)
            with loaded.lora.use(None, row):
                for answers in answer(model, loaded.tokenizer, [ids for ids, _ in fitted], sampling):
                    yield Moment(answers, left_out, remark, *checked)

    def answer_blind(self, trial: str, sampling: Any = None) -> Generator[None, None, None]:
        """Write both sides' answers of a blind test, a step at a time; `ballots` has it as it stands."""
        from lora_studio import blind
        from lora_studio.prompts import Prompt

        begun = self.ballots.get(trial)
        try:
            asked = [Prompt(pair.messages) for pair in begun.pairs]
            for written in self.answer_prompts(begun.sides, asked, sampling):
                if written.texts:
                    self.ballots.change(trial, partial(blind.answered, answers=written.texts))
                yield
        finally:
            self.ballots.change(trial, blind.written)

    def evaluate(self, run: str, choice: DataChoice | None = None, limit: int = 200) -> dict[str, Any]:
        """Base against adapted on the run's held-out rows, or on all rows of another dataset; at most `limit`."""
        from lora_studio.evaluate import evaluate

        view = self.runs.get(run)
        config = view.config
        kept_by = self if choice else self._of_owner(view)
        if choice is None:
            choice, examples = config.dataset, self.heldout(run, limit)
        else:
            examples = self._examples(choice)[0][:limit]
        with self._hand.of([view]) as loaded:
            return evaluate(
                loaded.lora,
                view.id,
                loaded.tokenizer,
                examples,
                max_length=config.train.max_length,
                labels=kept_by.format(choice) == "text_label",
                classes=view.labels,
            )

    def learned(self, run: str) -> Mapping[str, Any] | None:
        """What its worker saw at the end of a run (events.Learned); None where it did not look, or not yet."""
        return next((one for one in reversed(self.runs.curve(run)) if one["type"] == "Learned"), None)

    def inside(self, run: str, other: str | None = None) -> Any:
        """What a run's adapter is made of (inside.Report) and, with `other`, what it has in common with that run's.

        The latest report is kept. Raises E_NOT_LORA, E_NOTHING_SHARED, E_QUANTISED, and as `compare` does.
        """
        from lora_studio.inside import report

        views = [self.runs.get(one) for one in (run, other) if one]
        key, kept = [_stamp(view) for view in views], self._report
        if key != kept[0]:
            with self._hand.of(views) as loaded:
                kept = key, report(loaded.lora, *(view.id for view in views))
            self._report = kept
        return kept[1]

    def rank_curve(self, run: str) -> Generator[Any, None, None]:
        """The held-out loss of a run's adapter at smaller ranks (inside.RankCurve), as it is measured.

        On the rows that training measured. Raises E_NO_HELDOUT, E_NOT_LORA, E_NO_ADAPTER.
        """
        from lora_studio.inside import rank_curve

        view = self.runs.get(run)
        rows = self._measured_rows(view)
        with self._hand.of([view]) as loaded:
            yield from rank_curve(loaded.lora, view.id, rows)

    def strength_curve(self, run: str) -> Generator[Any, None, None]:
        """The held-out loss of a run's adapter by its strength (strength.StrengthCurve), as it is measured.

        On the rows that training measured. Raises E_STRENGTH, E_NO_HELDOUT, E_NO_ADAPTER.
        """
        from lora_studio.strength import STRENGTHS, strength_curve

        view = self.runs.get(run)
        for strength in STRENGTHS:
            _check_strength(view, strength)
        rows = self._measured_rows(view)
        with self._hand.of([view]) as loaded:
            yield from strength_curve(loaded.lora, view.id, rows)

    def wanted(self, runs: Sequence[str], row: int, *, strength: float = 1.0) -> Wanted:
        """How likely the base model and each run, at this strength, make the answer of a held-out row.

        row: its number among the first run's. At most WANTED_TOKENS of the answer. Raises E_NO_TARGET, E_LABELS, and
        as `compare` does.
        """
        from lora_studio.core.lean import Tokens
        from lora_studio.data.words import read_rows
        from lora_studio.generate import chances

        views, rows = self._asked(runs, strength)
        if not views:
            raise no_run()
        if views[0].labels:
            message = "A classifier's answer is one label, which has no tokens."
            raise StudioError("E_LABELS", message, "Generate shows the chance of each label.")
        example = self.heldout(views[0].id, row + 1)[row]
        reading = read_rows(self._hand.models_of(views[0]).tokenizer(views[0].config.model), [example], texts=True)[0]
        kept = reading.supervised[: views[0].config.train.max_length]
        places = [place for place, learnt in enumerate(kept) if learnt and place]
        if not places:
            raise StudioError("E_NO_TARGET", "This row keeps no token to learn from.", "Pick another one.")
        shown = places[:WANTED_TOKENS]
        end = shown[-1] + 1
        with self._hand.of(views) as loaded:
            found = chances(loaded.lora, [None, *rows], Tokens(reading.ids[:end], kept[:end]))
        texts = tuple(reading.texts[place] for place in shown)
        return Wanted(("base", *map(" + ".join, rows)), texts, found, len(places) - len(shown))

    def smaller(self, run: str, rank: int, to: Path) -> Exported:
        """Write a run's adapter with only its `rank` strongest directions per matrix to the folder `to`, with a proof.

        Raises E_RANK, E_NOT_LORA, and as `export` does.
        """
        from lora_studio.export import check_folder, export_smaller, sort_of

        view, to = self.runs.get(run), to.expanduser().resolve()
        check_folder(to, sort_of(view, merged=False))
        rows, heldout = self._heldout_rows(view), []
        with contextlib.suppress(StudioError):  # there are none, or they are gone
            heldout = self._measured_rows(view)
        with self._hand.of([view]) as loaded:
            files, proof = export_smaller(view, loaded.lora, loaded.tokenizer, rank, to, rows=rows, heldout=heldout)
        return Exported(files=files, proof=proof)

    def export(self, run: str, to: Path, *, merged: bool = False, archive: bool = False, dtype: str = "") -> Exported:
        """Write the adapter, or the merged model, to the folder `to`; with `archive` also as a zip beside it.

        `to` must be new, empty or hold an earlier export of the same kind. dtype: of the merged weights; empty takes
        the one in which this machine compares. Raises E_EXISTS, E_NO_ADAPTER, E_DTYPE, and E_MERGE for methods that
        are no change of weights.
        """
        from lora_studio.export import DTYPES, archive_of, check_folder, export_adapter, export_merged, pack, sort_of

        if dtype and dtype not in DTYPES:
            raise StudioError("E_DTYPE", f"There is no dtype {quote(dtype)}.", f"Give one of {', '.join(DTYPES)}.")
        view, to = self.runs.get(run), to.expanduser().resolve()
        check_adapter(view)  # before anything is fetched for it
        check_folder(to, sort_of(view, merged=merged), archive=archive)
        rows, more = self._heldout_rows(view), self._background(view)
        if not merged:
            prove = functools.partial(self._prove, view, rows)
            files, proof = export_adapter(view, to, self._tokenizer(view), prove, more)
            done = Exported(files=files, proof=proof)
        else:
            with self._hand.busy:
                usual = self._hand.precision(view)
                loaded = self._hand.with_adapters([view], self._hand.exact(view))
                files, rounding, proof = export_merged(
                    view, loaded.lora, loaded.tokenizer, to, dtype=dtype or usual, rows=rows, more=more
                )
                done = Exported(files=files, proof=proof, rounding=rounding)
        return replace(done, files=[*done.files, pack(done.files, to, archive_of(to))]) if archive else done

    def report(self, run: str, to: Path | None = None) -> Path:
        """Write all that is known of a run to one HTML file, which opens offline; without `to`, one for a download.

        It quotes the run's rows, so nobody but the owner gets one. Raises E_EXISTS, E_WRITE.
        """
        from lora_studio.export import fresh_download
        from lora_studio.models import hardware
        from lora_studio.peft_format import pairs
        from lora_studio.report import Shown, page, write

        view, data, update = self.runs.get(run), None, []
        config = view.config
        with contextlib.suppress(StudioError):  # the rows, or the model that counts their tokens, may be gone
            seen = self._of_owner(view).inspect(config.dataset, config.model, config.train, config.task)
            data = seen.as_json()
        if view.has_adapter and isinstance(config.method, LoraSpec):
            with contextlib.suppress(StudioError):  # damaged meanwhile, which the tabs that open it say
                update = pairs(view.path / "adapter")
        records = self.runs.curve(view.id)
        shown = Shown(records=records, data=data, update=update, machine=hardware(), now=time.time())
        to = to.expanduser().resolve() if to else fresh_download(self.exports) / f"report-{view.id[:8]}.html"
        return write(page(view, shown), to)

    def combine(self, runs: Sequence[str], weights: Sequence[float], to: Path, *, rank: int | None = None) -> Exported:
        """Write one LoRA adapter that does what these runs' adapters do together, each with its weight.

        Without `rank` the sum is exact, and as wide as the adapters together; with it, the nearest of that rank.
        Raises E_WEIGHTS, E_MERGE, and as `compare` and `export` do.
        """
        from lora_studio.export import check_folder, export_combined, sort_of

        views, to = [self.runs.get(run) for run in runs], to.expanduser().resolve()
        if len(weights) != len({view.id for view in views}) or not all(math.isfinite(weight) for weight in weights):
            message = f"There are {len(views)} runs and {len(weights)} weights."
            raise StudioError("E_WEIGHTS", message, "Give each run once, and a number for each.")
        if views:
            check_folder(to, sort_of(views[0], merged=False))
        rows = self._heldout_rows(views[0]) if views else []
        with self._hand.of(views) as loaded:
            lora, tokenizer = loaded.lora, loaded.tokenizer
            files, proof = export_combined(views, weights, lora, tokenizer, to, rank=rank, rows=rows)
        return Exported(files=files, proof=proof)

    def archive(self, run: str, *, merged: bool = False, dtype: str = "", rank: int | None = None) -> Exported:
        """A fresh zip of the adapter or the merged model under `exports`, for a download; kept for an hour.

        rank: cuts the adapter to it, as `smaller` does. Raises E_DISK, and as `export` does.
        """
        from lora_studio.export import archive_of, fresh_download, pack

        view = self.runs.get(run)
        self._check_room(view, merged=merged)
        folder = fresh_download(self.exports)
        cut = "" if rank is None else f"-r{rank}"
        unpacked = folder / f"{'merged' if merged else 'adapter'}-{view.id[:8]}{cut}"
        try:
            if rank is not None:
                done = self.smaller(view.id, rank, unpacked)
                return replace(done, files=[pack(done.files, unpacked, archive_of(unpacked))])
            done = self.export(view.id, unpacked, merged=merged, archive=True, dtype=dtype)
            return replace(done, files=done.files[-1:])
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # nobody will fetch it
            raise
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)

    def push(
        self, run: str, repo: str, token: str, *, merged: bool = False, dtype: str = "", private: bool = True
    ) -> Pushed:
        """Export a run and upload just these files to the Hugging Face Hub.

        The token is used here and kept nowhere. Raises E_PROOF for files whose proof fails, and as `export` and
        push.push do.
        """
        from lora_studio.export import fresh_download
        from lora_studio.push import check_target, push

        view = self.runs.get(run)
        check_target(repo, token)
        self._check_room(view, merged=merged)
        self._note("push to the Hub", view.id)
        folder = fresh_download(self.exports)
        try:
            done = self.export(view.id, folder, merged=merged, dtype=dtype)
            if done.proof.verdict == "failed":
                raise StudioError("E_PROOF", done.proof.sentence, "Nothing was uploaded. Try another dtype.")
            title = f"{'Merged model' if merged else 'Adapter'} of run {view.id[:8]}, from LoRA Studio"
            address = push(done.files, folder, repo, token, private=private, title=title)
            files = [file.relative_to(folder).as_posix() for file in done.files]
            return Pushed(address=address, files=files, proof=done.proof)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _checked(self, config: RunConfig) -> tuple[RunConfig, dict[str, Any]]:
        """The config and the facts that a run is created from, once nothing can be wrong with them any more."""
        check(config)
        check_limits(config, self.limits)
        config = replace(config, model=self.models.lasting_name(config.model))
        plan = self.plan(config.model, config.method, config.train, config.dataset, config.task)
        config = replace(config, method=plan.method)
        facts = {"revision": self.models.revision(config.model), "estimate": plan.estimate.as_json()}
        if plan.labels:
            facts["labels"] = list(plan.labels)
        entry = CATALOGUE.get(config.model)
        if entry:
            facts["repo"] = entry.repo
        self.runs.check_room(facts)
        return config, facts

    def _check_room(self, view: Run, *, merged: bool) -> None:
        """Raise E_DISK where an export and its zip would not fit beside what is to stay free."""
        files = (view.path / "adapter").glob("*")
        needs = 2 * (4 * self._hand.parameters(view) if merged else sum(file.stat().st_size for file in files))
        self.runs.check_free("This export needs for a while", needs)

    def _writes(self, model: str) -> bool:
        """Whether a model can write text; encoders can only choose labels. Raises E_ARCH for one that does neither."""
        try:
            return bool(self.models.skeleton(model))
        except StudioError as error:
            if error.code == "E_ARCH":
                with contextlib.suppress(StudioError):
                    return not self.models.skeleton(model, labels=2)
            raise

    def _examples(self, choice: DataChoice) -> tuple[list[Any], list[str]]:
        """The rows of a choice and the warnings on the way; the latest are kept, large ones in one place for all."""
        key, keeper = (self.owner, *_key(choice)), self._small
        if key != keeper.read[0] and self.data.bytes_of(choice.id) > self.limits.rows_at_hand:
            keeper = self._large
        found = keeper.read
        if key != found[0]:
            keeper.read = None, None  # or two of them would be in memory for a while
            keeper.read = found = key, self.data.examples(choice.id, choice.format, choice.columns or None)
        return found[1]

    def _asked(
        self, runs: Sequence[str | Mapping[str, float]], strength: float
    ) -> tuple[list[Run], list[dict[str, float]]]:
        """The runs, each once, and by their ids what each row of a batch behind the base's gives them."""
        rows = [{run: strength} if isinstance(run, str) else dict(run) for run in runs]
        if len(rows) > self.limits.answers_at_once:
            message = f"{len(rows)} answers beside the base model's are too many at once."
            raise StudioError("E_LIMIT", message, f"Ask for at most {self.limits.answers_at_once}.")
        for given in (given for row in rows for given in row.values()):
            if not 0 <= given <= 4:
                raise StudioError("E_STRENGTH", f"The strength is {quote(given)}.", "Give a number between 0 and 4.")
        views = {run: self.runs.get(run) for row in rows for run in row}
        for run, given in (one for row in rows for one in row.items()):
            _check_strength(views[run], given)
        named = [{views[run].id: given for run, given in row.items()} for row in rows]
        return list({view.id: view for view in views.values()}.values()), named

    def _measured_rows(self, view: Run) -> list[Any]:
        """The held-out rows that training measured, as core.lean.Tokens. Raises E_NO_HELDOUT."""
        from lora_studio.measure import HELDOUT_TOKENS, within

        rows = [tokens for tokens in self._tokens(view, self.heldout(view.id, 1000)) if tokens.count]
        if not rows:
            message = f"{quote(view.name)} has no held-out rows to measure on."
            raise StudioError("E_NO_HELDOUT", message, "Train with a share of the rows held out.")
        return within(rows, HELDOUT_TOKENS)

    def _asked_ids(self, view: Run, tokenizer: Any, messages: Sequence[Any]) -> list[int]:
        """Messages as the run's training rows began, see `_prompt_ids`."""
        from lora_studio.data.words import prompt_ids

        if len(messages) > 1:
            return prompt_ids(tokenizer, messages)
        return self._prompt_ids(view, tokenizer, messages[0].content)

    def _prompt_ids(self, view: Run, tokenizer: Any, prompt: str) -> list[int]:
        """As the run's training rows began: through the chat template, or as raw text for plain text rows."""
        from lora_studio.data.batches import encode_label
        from lora_studio.data.formats import Example, Message
        from lora_studio.data.words import prompt_ids, read_texts

        said = Message("user", prompt)
        if view.labels:
            example = Example((said, Message("assistant", view.labels[0])))
            return list(encode_label(tokenizer, example, view.labels, sys.maxsize).tokens.ids)
        if self._plain_text(view):
            return read_texts(tokenizer, [prompt])[0].ids
        return prompt_ids(tokenizer, [said])

    def _plain_text(self, view: Run) -> bool:
        """Whether a run's rows are texts that no chat's template frames; of rows that are gone, that is not known."""
        try:
            return self._of_owner(view).format(view.config.dataset) == "text"
        except StudioError:
            return False

    def _heldout_rows(self, view: Run) -> list[Any]:
        """The first held-out rows of a run as training saw them (core.lean.Tokens); any rows when none were held out.

        The general text where they are gone, or the adapter was made elsewhere. No row where the tokenizer is gone:
        the export is worth more than its proof.
        """
        from lora_studio import general
        from lora_studio.proof import ROWS

        try:
            rows = self._of_owner(view)._examples
            return self._tokens(view, self.heldout(view.id, ROWS) or rows(view.config.dataset)[0][:ROWS])
        except StudioError as error:
            log.info("the rows of %s are gone: %s", view.id, error)
        try:
            return self._tokens(view, general.examples(view.labels))
        except StudioError as error:
            log.warning("no rows to measure on: %s", error)
            return []

    def _tokenizer(self, view: Run) -> Any:
        """The tokenizer of a run's base; None where it cannot be had."""
        try:
            return self._hand.models_of(view).tokenizer(view.config.model)
        except StudioError as error:
            log.warning("no tokenizer: %s", error)
            return None

    def _background(self, view: Run) -> Any:
        """What the card of an export says beyond the run: card.Background, with the shortest held-out prompt."""
        from lora_studio.card import background
        from lora_studio.data.words import rendered

        events = self.runs.curve(view.id)
        try:
            asked = [example.prompt for example in self.heldout(view.id, 8) if example.messages]
            tokenizer = self._hand.models_of(view).tokenizer(view.config.model)
            texts = [] if view.labels else rendered(tokenizer, asked)
        except StudioError as error:
            log.warning("no prompt to show: %s", error)
            return background(events)
        return background(events, min(texts, key=len, default=""), around=not tokenizer.chat_template)

    def _prove(self, view: Run, rows: Sequence[Any], folder: Path) -> Any:
        """proof.Proof that the adapter in `folder`, on a base that is read from its files anew, is the run's."""
        import torch

        from lora_studio.adapters import load
        from lora_studio.proof import Proof, compare, look

        def seen(loaded: Loaded) -> Any:
            with loaded.lora.use(view.id):
                return look(loaded.lora.model, loaded.tokenizer, rows)

        if not rows:
            return Proof(stored="adapter")
        precision = self._hand.precision(view)
        with self._hand.busy:
            try:
                before = seen(self._hand.with_adapters([view], precision))
                self._hand.loaded = None  # so that the base is read from its files again
                fresh = self._hand.base(view, precision)
                load(fresh.lora, folder, view.id)
                return compare(before, seen(fresh), stored="adapter", computed_in=precision)
            except StudioError as error:
                return Proof(stored="adapter", problem=str(error))
            except torch.OutOfMemoryError:
                return Proof(stored="adapter", problem="The memory does not hold the base model.")

    def _tokens(self, view: Run, examples: Sequence[Any]) -> list[Any]:
        """Rows as a run trains on them: core.lean.Tokens."""
        from lora_studio.data.batches import encode_all, encode_labels

        most, tokenizer = view.config.train.max_length, self._hand.models_of(view).tokenizer(view.config.model)
        if view.labels:
            return [one.tokens for one in encode_labels(tokenizer, examples, view.labels, most)]
        return [one.tokens for one in encode_all(tokenizer, examples, most)]


def _lays_prefix_once(skeleton: Any, method: Method) -> bool:
    """Whether a training's passes will, where core.lean.can_share: what measure finds of an adapter that is there."""
    from lora_studio.core.layout import drops
    from lora_studio.core.lean import packable

    virtual = isinstance(method, BaselineSpec) and method.kind in VIRTUAL
    return packable(skeleton) and not (virtual or drops(skeleton) or getattr(method, "dropout", 0))


def _can_be_recorded(skeleton: Any, method: Method) -> bool:
    """Whether passes of a training can, on a GPU: what recorded.recordable finds of an adapter that is there."""
    from lora_studio.recorded import suits

    plain = isinstance(method, LoraSpec) and not (method.modules_to_save or method.dropout)
    return plain and suits(skeleton)


def _check_strength(view: Run, strength: float) -> None:
    """Raises E_STRENGTH for a strength that a run's method does not know."""
    if strength not in (0, 1) and getattr(view.config.method, "kind", "") in VIRTUAL:
        message = f"Virtual tokens are there or not; the strength is {quote(strength)}."
        raise StudioError("E_STRENGTH", message, "Set it to 1, or to 0 for the base model.")


def _chosen(chances: Mapping[str, float], most: int = 5) -> Any:
    """A classifier's answer in words: the likeliest labels first."""
    from lora_studio.generate import Answer

    ranked = sorted(chances.items(), key=lambda one: -one[1])[:most]
    return Answer(", ".join(f"{label} {100 * chance:.0f} %" for label, chance in ranked), done=True)


def _stamp(view: Run) -> tuple[str, int]:
    """What is different once a run has saved its adapter anew."""
    file = view.path / "adapter" / "adapter_model.safetensors"
    return view.id, file.stat().st_mtime_ns if view.has_adapter else 0


def _key(choice: DataChoice) -> tuple:
    return choice.id, choice.format, *sorted(choice.columns.items())
