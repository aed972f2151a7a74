"""Training as a generator of events: train(job) yields, the caller decides what happens to each event.

There are no callbacks and there is no file code here. To stop, stop pulling; between two events the weights
are consistent, so that is when a caller saves. Same job, same seed: same events. Any method trains in the same
way, LoRA or one of the paper's others, and so does a classifier: its rows carry a label instead of an answer.

Several jobs on one base train together: each has its own adapter, rows, settings and events, and ends where it
would have ended alone. As long as a pass is small its tokens share the base's matrix products.
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from lora_studio.core import lean
from lora_studio.core.lora import LoRA
from lora_studio.data.batches import Encoded
from lora_studio.data.formats import Example
from lora_studio.errors import StudioError
from lora_studio.events import Event, Metric, Probed, Sample, Started, Warned
from lora_studio.measure import (
    HELDOUT_TOKENS,
    figures,
    is_shortage,
    mean_loss,
    peak_memory,
    sample_tokens,
    sampled,
    shortage,
    within,
)
from lora_studio.models import parameter_count
from lora_studio.recorded import forget
from lora_studio.settings import QUANTISED, TrainConfig
from lora_studio.step import Crowded, Share, careful, on_their_way, probe, random_states, restore_random, share_of

PROBED = 1_000  # steps ahead among which the heaviest batch is looked for
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class State:
    """All that a training goes on from: tensors on the CPU, ready for safetensors, and plain values."""

    adapter: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]  # both moments and the step count of each tensor, and the random states
    progress: Mapping[str, Any]  # JSON


@dataclass(kw_only=True, eq=False)
class Job:
    """Everything that one training needs, loaded: the adapter is attached and fresh.

    classes: the names of the labels, where the rows carry labels. general: a text that has nothing to do with the
    rows, on which forgetting shows. What training writes: step (the last finished one), over (it takes no further
    part), error (why, when it failed among others).
    """

    lora: LoRA
    adapter: str
    tokenizer: Any
    train: Sequence[Encoded]
    heldout: Sequence[Encoded]
    general: Sequence[Encoded] = ()
    samples: Sequence[Example] = ()
    classes: Sequence[str] = ()
    config: TrainConfig
    optimizer: torch.optim.Optimizer = field(init=False)
    share: Share = field(init=False)  # of a step: how its passes are cut
    step: int = field(init=False, default=0)
    measured: int = field(init=False, default=-1)  # the last step whose held-out loss is known
    best: float = field(init=False, default=math.inf)  # held-out loss
    stale: int = field(init=False, default=0)  # evaluations since the best
    over: bool = field(init=False, default=False)
    error: StudioError | None = field(init=False, default=None)
    random: list[torch.Tensor] = field(init=False)  # its own states, so that others' draws do not reach it

    def __post_init__(self) -> None:
        config = self.config
        groups = self.lora.groups(self.adapter, config.lr_ratio_b)
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=self.device.type in ("cuda", "cpu")
        )
        longest = max((len(row.tokens.ids) for row in self.train), default=0)
        self.share = share_of(self.lora, self.adapter, config.accumulate, config.checkpointing, longest)
        kept = random_states(self.device)
        torch.manual_seed(config.seed)  # dropout's
        self.random = random_states(self.device)
        restore_random(self.device, kept)

    @property
    def device(self) -> torch.device:
        return next(self.lora.model.parameters()).device

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return self.lora.parameters(self.adapter)

    def leave(self) -> None:
        """Take no further part: the rows vanish, the other jobs go on."""
        self.over = True
        if self.share.recordings is not None:
            self.share.recordings.stop()

    def state(self) -> State:
        """All that `restore` needs to go on bit for bit (CPU, one thread); call it between two events."""
        moments = {
            f"{number}.{name}": value
            for number, tensor in enumerate(self.parameters)
            for name, value in self.optimizer.state[tensor].items()
        }
        moments |= {f"random.{number}": state for number, state in enumerate(self.random)}
        return State(
            adapter={str(number): _plain(tensor) for number, tensor in enumerate(self.parameters)},
            optimizer={name: _plain(tensor) for name, tensor in moments.items()},
            progress={
                "step": self.step,
                "measured": self.measured,
                "best": self.best if math.isfinite(self.best) else None,
                "stale": self.stale,
                "accumulate": self.share.accumulate,
                "recompute": self.share.recompute,
            },
        )

    def restore(self, state: State) -> None:
        """Go on from `state`; the job must have been built as the one that it is of. Raises E_CHECKPOINT."""
        parameters, progress = self.parameters, state.progress
        shapes = {str(number): tensor.shape for number, tensor in enumerate(parameters)}
        if {name: tensor.shape for name, tensor in state.adapter.items()} != shapes:
            raise StudioError("E_CHECKPOINT", "The checkpoint is of another adapter.", "Start the run again.")
        for number, tensor in enumerate(parameters):
            with torch.no_grad():
                tensor.copy_(state.adapter[str(number)])
            names = [name for name in ("step", "exp_avg", "exp_avg_sq") if f"{number}.{name}" in state.optimizer]
            self.optimizer.state[tensor] = {
                name: state.optimizer[f"{number}.{name}"].clone().to(tensor.device) for name in names
            }
        # a GPU that has come since has no state yet
        self.random = [state.optimizer.get(f"random.{number}", own) for number, own in enumerate(self.random)]
        self.step, self.measured, self.stale = progress["step"], progress["measured"], progress["stale"]
        self.best = math.inf if progress["best"] is None else progress["best"]
        self.share.accumulate, self.share.recompute = progress["accumulate"], progress["recompute"]


def train(job: Job) -> Iterator[Event]:
    """Train one adapter; the first event is Started, step 0 measures the base model. A restored job goes on.

    Raises E_NO_TARGET when no training row has a token to learn from, E_NOT_FINITE when the loss or the gradient
    stops being a number, E_MEMORY when no way to cut a step fits.
    """
    for _, event in train_together([job]):
        if job.error:
            raise job.error
        yield event


def train_together(jobs: Sequence[Job]) -> Iterator[tuple[int, Event]]:
    """Train several adapters on one base; each event comes with the number of its job.

    A job that fails gets its `error`, says so in a Warned event and leaves; the others go on.
    """
    lora = jobs[0].lora
    assert all(job.lora is lora for job in jobs), "jobs that train together share a base model"
    courses = {job: _Course(number, job) for number, job in enumerate(jobs)}
    for course in courses.values():
        yield from course.guarded(course.begin())
    yield from _probe(lora, [course for course in courses.values() if not course.job.over])
    yield from _measure([course for course in courses.values() if course.due])
    while live := [course for course in courses.values() if not course.job.over]:
        for group in _groups(lora, live):
            yield from _step(lora, group)
        yield from _measure([course for course in live if course.due])
        for course in live:
            yield from course.end_of_round()


class _Course:
    """A job on its way: its rows, the batches to come, its clock."""

    def __init__(self, number: int, job: Job) -> None:
        self.number, self.job = number, job
        self.rows: list[lean.Tokens] = []
        self.steps = 0
        self.measured_at: frozenset[int] = frozenset()
        self.batches: Iterator[list[lean.Tokens]] = iter(())
        self.batch: list[lean.Tokens] = []  # of the step that is next
        self.ahead: list[lean.Tokens] | None = None  # of the one behind it, once it was looked at
        self.clock, self.seen, self.since = 0.0, 0, job.step  # of this attempt: start, tokens, first step
        self.seen_before = 0  # tokens, by earlier attempts
        self.parameters = job.parameters
        self.floor = 0  # most memory that was held before training

    def begin(self) -> Iterator[Event]:
        """Started, and what should be said before the first step."""
        job, config = self.job, self.job.config
        self.rows = [one.tokens for one in job.train if one.tokens.count]
        if not self.rows:
            raise StudioError("E_NO_TARGET", "No training row has a token to learn from.", "Raise the length limit.")
        self.steps = config.total_steps(len(self.rows), sum(len(tokens.ids) for tokens in self.rows))
        self.measured_at = measured_steps(config, self.steps)
        self.batches = _batches(self.rows, config, self.steps)
        for _ in range(job.step):
            self.seen_before += sum(len(tokens.ids) for tokens in next(self.batches))
        model = job.lora.model
        total = parameter_count(model)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        yield Started(
            step=job.step,
            steps=self.steps,
            trainable=sum(tensor.numel() for tensor in self.parameters),
            total=total,
            device=str(job.device),
            precision=config.precision if config.precision in QUANTISED else dtype,
            train_rows=len(self.rows),
            heldout_rows=len(_measured(job)),
        )
        usual = config.usual_rate(total, getattr(job.lora.specs[job.adapter], "kind", "lora"))
        if config.learning_rate > 2 * usual and not job.step:
            rate = f"A learning rate of {config.learning_rate:g} is high for this model and method"
            change = {"learning_rate": float(f"{usual:.1g}")}
            yield Warned(step=0, code="W_RATE", message=f"{rate}; {usual:.1g} is usual.", change=change)
        if job.measured >= job.step and (job.step >= self.steps or self.has_no_patience):
            job.leave()
        self.clock = time.monotonic()

    def guarded(self, events: Iterator[Event]) -> Iterator[tuple[int, Event]]:
        """The events with this job's number; an error ends the job and nothing else."""
        try:
            for event in events:
                yield self.number, event
        except StudioError as error:
            yield self.number, self.failed(error)

    def failed(self, error: StudioError) -> Event:
        self.job.error = error
        self.job.leave()
        return Warned(step=self.job.step, code=error.code, message=error.message, hint=error.hint)

    @property
    def due(self) -> bool:
        """Whether the held-out loss is to be measured now; step 0 is the base model."""
        job = self.job
        new = job.measured < 0 or (job.measured < job.step and job.step in self.measured_at)
        return new and not job.over

    @property
    def has_no_patience(self) -> bool:
        return 0 < self.job.config.patience <= self.job.stale

    def advance(self) -> None:
        """Fetch the batch of the next step."""
        self.batch = next(self.batches) if self.ahead is None else self.ahead
        self.ahead = None

    def update(self, lost: torch.Tensor) -> Iterator[Event]:
        """The optimizer's part of a step, its gradients being there; and its figures. lost: the step's loss ()."""
        job, config = self.job, self.job.config
        unreached = job.lora.unreached(job.adapter)
        if unreached:
            message = f"The model does not pass through {unreached[0]}, so it cannot be adapted."
            raise StudioError("E_UNREACHED", message, "Leave this matrix out.")
        step = job.step + 1
        rate = config.learning_rate * schedule(config, step, self.steps)
        for group in job.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        total = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm or math.inf)
        job.optimizer.step()
        torch.autograd.graph.increment_version(self.parameters)  # what is kept until they change asks for it
        job.optimizer.zero_grad(set_to_none=True)
        job.step = step
        self.seen += sum(len(tokens.ids) for tokens in self.batch)
        figures = on_their_way(torch.stack([lost.double(), total.double()]))
        if job.share.recordings is not None and (ahead := next(self.batches, None)):
            self.ahead = ahead
            job.share.look_ahead(ahead)  # while the GPU is at work on this step
        held = max(self.floor, peak_memory(job.device))
        loss, norm = figures()  # it is waited for here, nowhere before
        elapsed = time.monotonic() - self.clock
        yield Metric(
            step=step,
            values={
                "train_loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": self.seen_before + self.seen,
                "tokens_per_s": self.seen / elapsed,
                "seconds_left": elapsed / (step - self.since) * (self.steps - step),
                "memory_bytes": held,
            },
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _no_number("loss", job)

    def judge(self, loss: float | None) -> None:
        """Take in a held-out loss that was just measured."""
        job = self.job
        if loss is not None and job.step:
            better = loss < job.best
            job.best, job.stale = (loss, 0) if better else (job.best, job.stale + 1)

    def end_of_round(self) -> Iterator[tuple[int, Event]]:
        """Leave when all steps are done, or when patience has run out."""
        job = self.job
        if job.over:
            return
        if self.has_no_patience and job.step < self.steps:
            message = f"The held-out loss has not fallen for {job.stale} evaluations; training ends at step {job.step}."
            yield self.number, Warned(step=job.step, code="I_PATIENCE", message=message)
            job.leave()
        if job.step >= self.steps:
            job.leave()


def _groups(lora: LoRA, live: Sequence[_Course]) -> list[list[_Course]]:
    """Which jobs share a pass: those that can be packed, as long as it stays small. Fetches the batches."""
    groups: list[list[_Course]] = []
    room = 0
    for course in live:
        course.advance()
        joins = len(live) > 1 and course.job.share.joins(lora, course.batch)
        size = course.job.share.size(course.batch) if joins else 0
        if joins and size <= room:
            groups[-1].append(course)
            room -= size
        else:
            groups.append([course])
            room = min(course.job.share.room, course.job.share.together) - size if joins else 0
    return groups


def _step(lora: LoRA, group: Sequence[_Course]) -> Iterator[tuple[int, Event]]:
    """One optimizer step of each of these jobs, which share a pass when there are several."""
    alone = group[0].job if len(group) == 1 else None
    if alone:  # only then are random numbers drawn
        restore_random(alone.device, alone.random)
    try:
        losses = careful(lora, [(course.job.share, course.batch) for course in group])
    except Crowded:
        for course in group:
            yield from _step(lora, [course])
        return
    except StudioError as error:  # no way to cut this step fits the memory
        yield group[0].number, group[0].failed(error)
        return
    if alone:
        alone.random = random_states(alone.device)
    for course, loss in zip(group, losses, strict=True):
        yield from _notes(course)
        yield from course.guarded(course.update(loss))


def _notes(course: _Course) -> Iterator[tuple[int, Event]]:
    """What had to be done because memory ran short."""
    while course.job.share.notes:
        note = course.job.share.notes.pop(0)
        yield course.number, Warned(step=course.job.step, code="W_MEMORY", message=note)


def _probe(lora: LoRA, courses: Sequence[_Course]) -> Iterator[tuple[int, Event]]:
    """One forward and backward on each job's heaviest batch before anything is trained: what it takes is measured."""
    for course in courses:
        course.floor = peak_memory(course.job.device)
    for course in courses:
        job, config = course.job, course.job.config
        ahead = list(itertools.islice(_batches(course.rows, config, course.steps), job.step, job.step + PROBED))
        if not ahead:
            continue
        sizes = [sum(len(tokens.ids) for tokens in batch) for batch in ahead]
        try:
            found = probe(lora, job.share, ahead)
        except StudioError as error:
            yield course.number, course.failed(error)
            continue
        yield from _notes(course)
        per_token = found.seconds / found.tokens
        steps = course.steps - job.step
        rows = (*_measured(job), *(one.tokens for one in job.general))
        measured = sum(len(tokens.ids) for tokens in rows) * per_token / 3  # a forward is a third of a step
        written = 0.0
        if job.samples and not job.classes:
            written = sample_tokens(job.tokenizer, job.samples, config.max_length) * found.seconds_token
        rounds = sum(step > job.step for step in course.measured_at) + (job.measured < 0)
        seconds = sum(sizes) / len(sizes) * steps * per_token + rounds * (measured + written)
        yield (
            course.number,
            Probed(
                step=job.step,
                tokens=found.tokens,
                seconds_step=found.seconds,
                seconds=seconds,
                memory_bytes=max(found.memory_bytes, 0),
                accumulate=len(job.share.rounds(ahead[sizes.index(max(sizes))])),
                batch_fits=found.batch_fits,
            ),
        )
    for course in courses:
        course.job.share.may_record = course.job.device.type == "cuda"
        course.clock = time.monotonic()


def _measure(courses: Sequence[_Course]) -> Iterator[tuple[int, Event]]:
    """Held-out loss and the fixed sample prompts of these jobs; at step 0 of the base model, once for all of them."""
    paused = time.monotonic()
    events: list[tuple[_Course, Event]] = []
    base: dict[Any, dict[str, float]] = {}
    for course in courses:
        job = course.job
        key = None if job.step else tuple(id(one) for one in (*job.heldout, *job.general))
        try:
            found = base[key] if key in base else _with_room(job.lora, partial(evaluation, job, base=not job.step))
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            most = max(len(tokens.ids) for tokens in _measured(job))
            events.append((course, course.failed(shortage(job.device, most))))
            continue
        if key is not None:
            base[key] = found
        if found:
            events.append((course, Metric(step=job.step, values=found)))
        if job.step and not math.isfinite(found.get("heldout_loss", 0.0)):
            events.append((course, course.failed(_no_number("held-out loss", job))))
            continue
        if "heldout_loss" not in found and not job.step:
            message = "No rows are held out, so learning cannot be told from memorising."
            events.append((course, Warned(step=0, code="W_NO_HELDOUT", message=message)))
        course.judge(found.get("heldout_loss"))
        job.measured = job.step
    courses = [course for course in courses if not course.job.over]
    for course, texts in zip(courses, _written([course.job for course in courses]), strict=True):
        step = course.job.step
        if texts is None:
            message = "Memory ran out while sample prompts were answered; the answers of this step are left out."
            events.append((course, Warned(step=step, code="W_SAMPLES", message=message)))
            continue
        for index, (example, text) in enumerate(zip(course.job.samples, texts, strict=True)):
            prompt = example.prompt[-1].content
            events.append((course, Sample(step=step, index=index, prompt=prompt, text=text, target=example.target)))
    for course in courses:
        course.clock += time.monotonic() - paused  # measuring is not training
    for course, event in events:
        yield course.number, event


def _no_number(what: str, job: Job) -> StudioError:
    hint = f"Lower the learning rate, for instance to {job.config.learning_rate / 10:g}."
    return StudioError("E_NOT_FINITE", f"The {what} stopped being a number at step {job.step}.", hint)


def _with_room(lora: LoRA, work: Callable[[], Found]) -> Found:
    """What `work` gives, if need be with the memory that recordings held."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not (is_shortage(error) and forget(lora.model)):
            raise
    return work()


def _written(jobs: Sequence[Job]) -> Sequence[list[str] | None]:
    """What each job's adapter writes to its samples; None of each where the memory does not take that."""
    try:
        return _with_room(jobs[0].lora, lambda: list(_sampled(jobs))) if jobs else []
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
    return [None] * len(jobs)


def _sampled(jobs: Sequence[Job]) -> Iterator[list[str]]:
    """What each job's adapter writes to its samples; rows of several adapters that write are one batch."""
    together = len(jobs) > 1 and not any(job.classes or not job.lora.packs(job.adapter) for job in jobs)
    if together and any(job.samples for job in jobs):
        lora, samples = jobs[0].lora, [example for job in jobs for example in job.samples]
        with lora.use(*(job.adapter if job.step else None for job in jobs for _ in job.samples)):
            texts = iter(sampled(lora, jobs[0].tokenizer, samples, (), jobs[0].config.max_length))
        yield from ([next(texts) for _ in job.samples] for job in jobs)
        return
    for job in jobs:
        with job.lora.use(job.adapter if job.step else None):
            most = job.config.max_length
            yield sampled(job.lora, job.tokenizer, job.samples, job.classes, most) if job.samples else []


def heldout_loss(job: Job) -> float | None:
    """Mean loss of the held-out rows under the job's adapter; None when nothing is held out."""
    return heldout_figures(job).get("heldout_loss")


def heldout_figures(job: Job, *, base: bool = False) -> dict[str, float]:
    """heldout_loss, and the accuracy where rows carry labels, under the job's adapter or of the base model.

    {} when nothing is held out.
    """
    rows = _measured(job)
    if not rows:
        return {}
    with job.lora.use(None if base else job.adapter):
        found = figures(job.lora, rows)
    return {"heldout_loss" if name == "loss" else name: value for name, value in found.items()}


def evaluation(job: Job, *, base: bool = False) -> dict[str, float]:
    """All that is measured at an evaluation: heldout_figures, and general_loss where the job has a general text."""
    found = heldout_figures(job, base=base)
    if job.general:
        with job.lora.use(None if base else job.adapter):
            found["general_loss"] = mean_loss(job.lora, [one.tokens for one in job.general])
    return found


def seen_first(job: Job, count: int) -> list[int]:
    """Places in `job.train` of the first rows that it has trained on, at most `count`."""
    places = {id(one.tokens): place for place, one in enumerate(job.train)}
    rows = [one.tokens for one in job.train if one.tokens.count]
    seen = (places[id(tokens)] for batch in _batches(rows, job.config, job.step) for tokens in batch)
    return list(itertools.islice(dict.fromkeys(itertools.islice(seen, 4 * count)), count))


def measured_steps(config: TrainConfig, steps: int) -> frozenset[int]:
    """The steps after which the held-out loss is measured and samples are answered; the last is among them."""
    return frozenset(math.ceil(steps * part / config.evaluations) for part in range(1, config.evaluations + 1))


def schedule(config: TrainConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` of 1..steps; rises over the warm-up, then falls towards 0."""
    warmup = min(steps - 1, round(config.warmup * steps))
    if step <= warmup:
        return step / (warmup + 1)
    left = 1 - (step - 1 - warmup) / (steps - warmup)  # 1 at the first step after the warm-up, above 0 at the last
    if config.schedule == "constant":
        return 1.0
    return left if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))


def _measured(job: Job) -> list[lean.Tokens]:
    """The held-out rows that are measured: the same first ones each time, within the budget."""
    return within([one.tokens for one in job.heldout if one.tokens.count], HELDOUT_TOKENS)


def _batches(rows: Sequence[lean.Tokens], config: TrainConfig, steps: int) -> Iterator[list[lean.Tokens]]:
    """`steps` batches over ever new shuffles of the rows; a batch may reach from one pass into the next.

    They follow from seed and step alone, so a resumed run finds its place by counting.
    """
    shuffle = random.Random(config.seed)
    order: list[int] = []
    for _ in range(steps):
        batch: list[lean.Tokens] = []
        room = config.batch_tokens
        while len(batch) < (len(rows) if config.batch_tokens else min(config.batch_size, len(rows))):
            if not order:
                order = list(range(len(rows)))
                shuffle.shuffle(order)
            size = len(rows[order[-1]].ids)
            if config.batch_tokens and batch and size > room:
                break
            room -= size
            batch.append(rows[order.pop()])
        yield batch


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone().contiguous()
