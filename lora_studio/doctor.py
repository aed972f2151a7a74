"""The run doctor: takes a run's events as they come and says what goes wrong, why, and which setting would cure it.

Three rules, each over several steps, because one batch proves nothing:

    W_EXPLODING  the gradient norm leaves its level upward, or the loss its beginning    -> a lower learning rate
    W_FLAT       half of the run is over and neither loss has fallen                     -> a usual learning rate
    W_RISING     the held-out loss rises again while the training loss goes on falling   -> fewer steps

It knows figures only: no model, no rows, no torch. A finding is advice; the run goes on.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from lora_studio.events import EVENTS, Event, Metric, Started, Warned
from lora_studio.fields import knobs
from lora_studio.settings import TrainConfig

WINDOW = 50  # steps that a mean or a median goes over, at most
NORMS, LOSSES = 3, 5  # in a row, that have to be high
LEVELS = 10.0  # times its level that a gradient norm is when it explodes
RISE = 0.08  # of the best held-out loss, and of what was gained, that is lost again when rows are memorised
LEARNT = 0.1  # share that the training loss has fallen meanwhile
FALL, FAINT_FALL = 0.003, 0.03  # share of the loss that half a run takes off at the least; the second at a low rate
UNSURE = 0.03  # share of the loss that it may have moved, noise included, where the training loss alone has to tell
SIGMAS = 3
KNOWN = 0.05  # a loss below this has nowhere to fall to
HALVED = 8  # passes that training cuts a step into by itself, at most
LIMITS = knobs(TrainConfig)


@dataclass(frozen=True)
class _Evaluation:
    """What one measurement of the held-out rows said, and the mean training loss since the one before it."""

    step: int
    loss: float
    accuracy: float | None
    train_loss: float


class Doctor:
    """Watches one attempt at one run. usual_rate: what model and method bear, `TrainConfig.usual_rate`."""

    def __init__(self, config: TrainConfig, usual_rate: float) -> None:
        self._config, self._usual = config, usual_rate
        self._found: set[str] = set()
        self._begin(steps=config.steps, after=0, heldout=False)

    def see(self, event: Event) -> Iterator[Warned]:
        """What this event gives away; each finding comes once in a run."""
        if isinstance(event, Started):
            if event.step == 0 or not self._seen:
                self._begin(steps=event.steps, after=event.step, heldout=event.heldout_rows > 0)
        elif isinstance(event, Warned):
            self._found.add(event.code)  # its own findings may come back to it
        elif isinstance(event, Metric):
            for finding in filter(None, self._rules(event)):
                if finding.code not in self._found:
                    self._found.add(finding.code)
                    yield finding

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take in what the journal says of earlier attempts, as far as it still holds; nothing is found in that anew.

        Without it, an attempt that goes on behind a step is not measured by a beginning that it has not seen.
        """
        for record in records:
            if record["type"] in ("Started", "Metric", "Warned"):
                kind = EVENTS[record["type"]]
                known = {field.name: record[field.name] for field in fields(kind) if field.name in record}
                if known.get("values"):
                    known["values"] = {name: value for name, value in known["values"].items() if value is not None}
                list(self.see(kind(**known)))

    def _begin(self, *, steps: int, after: int, heldout: bool) -> None:
        self._steps, self._heldout = steps, heldout
        self._whole = after == 0  # otherwise the beginning, which falling is measured by, was not seen
        self._seen = 0  # steps
        self._first: list[tuple[float, float]] = []  # training loss and gradient norm of the first steps
        self._last: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._since: list[float] = []  # training losses since the last evaluation
        self._evaluations: list[_Evaluation] = []

    def _rules(self, event: Metric) -> Iterator[Warned | None]:
        values = {name: value for name, value in event.values.items() if math.isfinite(value)}
        measured = "heldout_loss" in values
        if "train_loss" in values and "grad_norm" in values:
            self._take(values["train_loss"], values["grad_norm"])
            yield self._exploding(event.step)
        if measured:
            train_loss = fmean(self._since) if self._since else math.inf
            self._evaluations.append(
                _Evaluation(event.step, values["heldout_loss"], values.get("accuracy"), train_loss)
            )
            self._since = []
            yield self._rising(event.step)
        if measured or not self._heldout:
            yield self._flat(event.step)

    def _take(self, loss: float, norm: float) -> None:
        self._seen += 1
        if len(self._first) < WINDOW:
            self._first.append((loss, norm))
        self._last.append((loss, norm))
        self._since.append(loss)

    def _exploding(self, step: int) -> Warned | None:
        """By the norm, or by losses that are all far above each of the first ones."""
        if self._seen < 2 * LOSSES:
            return None
        losses, norms = zip(*self._last, strict=True)
        # Not below the level of the beginning: a trained model's gradient is small, but for a hard row now and then.
        level = max(median(norms[:-NORMS]), median(norm for _, norm in self._first[:10]))
        leaves = min(norms[-NORMS:]) > LEVELS * level > 0 and fmean(losses[-NORMS:]) > median(losses[:-NORMS])
        start = max(loss for loss, _ in self._first[:LOSSES])
        if not leaves and min(losses[-LOSSES:]) < max(1.5 * start, start + 0.5):
            return None
        rate = self._config.learning_rate
        message = (
            f"Training runs away: the loss is {losses[-1]:.3g}, the gradient norm {norms[-1]:.3g} after {level:.2g}. "
            f"The learning rate of {rate:g} is probably too high."
        )
        return Warned(
            step=step,
            code="W_EXPLODING",
            message=message,
            hint="Lower the learning rate.",
            change=_rate(min(rate / 10, self._usual)),
        )

    def _flat(self, step: int) -> Warned | None:
        """Half of the steps after the warm-up, or 200, and nothing learnt.

        The held-out rows are the same each time, so their loss decides; without any, the training loss does, where
        it is exact enough.
        """
        warmup = self._config.warmup * self._steps
        if not self._whole or step < max(10, warmup + min(self._steps / 2, 200)) or "W_EXPLODING" in self._found:
            return None
        rate, usual = self._config.learning_rate, self._usual
        low = rate < usual / 5
        expected = FAINT_FALL if low else FALL
        start, now, error = self._trend()
        if start < KNOWN or start - now > max(expected * start, SIGMAS * error):
            return None
        if self._heldout:
            base, best = self._evaluations[0].loss, min(one.loss for one in self._evaluations)
            if base < KNOWN or base - best > expected * base:
                return None
        elif self._seen < 25 or abs(start - now) + SIGMAS * error > UNSURE * start:
            return None
        cause, hint, change = (
            "Either the model knows these rows, or nothing in them can be learnt.",
            "Look at a few.",
            {},
        )
        if low or rate > 2 * usual:
            cause = f"The learning rate of {rate:g} is far {'below' if low else 'above'} what is usual here."
            hint, change = f"Take the usual one, about {usual:.1g}.", _rate(usual)
        elif rate < 1.5 * usual:
            cause = "The learning rate is a usual one, but these rows or matrices may need more."
            hint, change = "Raise it once; if that does not help, look at the rows.", _rate(2 * usual)
        message = f"The loss does not fall: {start:.3g} in the first steps, {now:.3g} in the last. {cause}"
        return Warned(step=step, code="W_FLAT", message=message, hint=hint, change=change)

    def _rising(self, step: int) -> Warned | None:
        """Two evaluations in a row, or a quarter of them, are clearly worse than the best; the training loss is not."""
        past = self._evaluations
        place = min(range(len(past)), key=lambda one: past[one].loss)
        base, best, after, row = past[0].loss, past[place], past[place + 1 :], max(2, len(past) // 4)
        if len(after) < row:
            return None
        now, before = after[-1], best.train_loss if best.step else after[0].train_loss
        rises = min(one.loss for one in after[-row:]) > best.loss + RISE * max(best.loss, base - best.loss)
        if not rises or now.train_loss > (1 - LEARNT) * before:
            return None
        if now.accuracy is not None and best.accuracy is not None and now.accuracy >= best.accuracy:
            return None  # surer of its mistakes, but not making more of them
        message = (
            f"The held-out loss rises, {best.loss:.3g} at step {best.step} and {now.loss:.3g} now, while the training "
            "loss falls: the rows are being memorised."
        )
        hint, change = (
            f"The best adapter, of step {best.step}, is kept. Train no longer than that.",
            {"steps": best.step},
        )
        if not best.step:
            hint, change = "More rows would help, or a lower learning rate.", _rate(self._config.learning_rate / 3)
        return Warned(step=step, code="W_RISING", message=message, hint=hint, change=change)

    def _trend(self) -> tuple[float, float, float]:
        """Mean training loss of the first and of the last fifth of the steps, and the standard error between them."""
        size = min(WINDOW, max(3, self._seen // 5))
        first, last = [loss for loss, _ in self._first[:size]], [loss for loss, _ in self._last][-size:]
        if len(first) < size:
            return 0.0, 0.0, math.inf
        # from one step to the next, so that a fall does not count as noise
        noise = math.sqrt(fmean([*_squared_jumps(first), *_squared_jumps(last)]) / 2)
        return fmean(first), fmean(last), noise * math.sqrt(2 / size)


def remedy(code: str, config: TrainConfig) -> dict[str, Any]:
    """Settings that would cure a run which failed with this error code; {} where no setting does."""
    match code:
        case "E_NOT_FINITE":
            return _rate(config.learning_rate / 10)
        case "E_NO_UPDATE":
            return _rate(config.learning_rate * 10)
        case "E_NO_TARGET":
            return _within("max_length", 2 * config.max_length)
        case "E_MEMORY":
            return _smaller(config)
    return {}


def _smaller(config: TrainConfig) -> dict[str, Any]:
    """What takes most off the memory of a step, among what training has not done by itself when memory ran out."""
    if config.checkpointing == "off":
        return {"checkpointing": "auto"}
    if config.batch_tokens:
        return _within("batch_tokens", config.batch_tokens // 2)
    if config.batch_size > HALVED * config.accumulate:  # so a pass still has several examples
        return _within("accumulate", config.batch_size)
    return _within("max_length", config.max_length // 2)


def _rate(value: float) -> dict[str, Any]:
    """A learning rate of one digit, not above `value`."""
    if value <= 0:
        return {}
    digit = 10.0 ** math.floor(math.log10(value))
    return _within("learning_rate", float(f"{math.floor(value / digit + 1e-9) * digit:.1g}"))


def _within(name: str, value: float) -> dict[str, Any]:
    """The setting, where its bounds allow the value."""
    least, most = LIMITS[name].min, LIMITS[name].max
    return {name: value} if (least or 0) <= value <= (most or math.inf) else {}


def _squared_jumps(values: Sequence[float]) -> list[float]:
    return [(b - a) ** 2 for a, b in pairwise(values)]
