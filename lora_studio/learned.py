"""Did it learn? A few rows that were trained on and a few that were not, base against adapted, and what they say.

    look    measures and asks, in pieces between which a caller may stop pulling; what is there then is used
    score   one figure of the task on held-out rows, with an interval
    judge   rows and figures -> learnt, memorised, no change, broken or untested, with the reason

`look` alone needs a model; the others are arithmetic on plain values.
"""

import itertools
import json
import math
import random
import statistics
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lora_studio.core import lean
from lora_studio.core.lora import LoRA
from lora_studio.data.formats import Example
from lora_studio.data.words import prompt_ids
from lora_studio.evaluate import ANSWER_TOKENS
from lora_studio.evaluate import score as scored
from lora_studio.events import Learned
from lora_studio.generate import Answer, answer
from lora_studio.measure import losses, passes
from lora_studio.settings import Sampling

SHOWN = 5  # rows of each part
ANSWERED = 48  # held-out rows that the score is over, where there is time for them
CHARACTERS = 1_000  # of a prompt, a target or an answer that are kept
CLEAR = 0.05  # share of the base's loss that must be gained or lost to count
BY_HEART = 0.15  # that training rows must have gained where held-out ones have not
FORGOTTEN = 0.1  # rise of the loss on general text that is worth a word
KNOWN = 0.05  # a loss below this has nowhere to fall to
LOOP = 24  # characters that a text must repeat itself for
NAMES = {"accuracy": "accuracy", "exact_match": "exact match", "rouge_l": "ROUGE-L", "bleu": "BLEU"}
OVERLAPS = ("rouge_l", "bleu")  # of them, those that are no share of hits
AS_LONG = (0.5, 2.0)  # answers over prompts, in words, where the answer says again what was asked

Pair = tuple[Example, lean.Tokens]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row; what has not been measured or asked is None, a loss that is no number is nan."""

    part: str  # train or heldout
    prompt: str
    target: str
    base: str | None = None  # the base model's answer
    adapted: str | None = None
    base_loss: float | None = None  # per supervised token, or of the label
    loss: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values of bounded length; nan is None."""
        return {
            name: value[:CHARACTERS] if isinstance(value, str) else _finite(value)
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, kw_only=True)
class Score:
    """A figure in 0..1 on held-out rows, base against adapted, with a 95 % interval.

    interval: "Wilson" is of the adapted share itself, "paired bootstrap" of the mean difference to the base.
    """

    name: str  # of NAMES
    rows: int
    base: float
    adapted: float
    low: float
    high: float
    interval: str

    @property
    def better(self) -> bool:
        """Whether the whole interval lies above the base."""
        return self.low > (self.base if self.interval == "Wilson" else 0.0)

    @property
    def words(self) -> str:
        """exact match rose from 0 % to 75 %"""
        moved = "rose" if self.adapted > self.base else "fell"
        if self.adapted == self.base:
            return f"{NAMES[self.name]} stayed at {self.base:.0%}"
        return f"{NAMES[self.name]} {moved} from {self.base:.0%} to {self.adapted:.0%}"


@dataclass(frozen=True)
class Verdict:
    """kind: learnt, memorised, no change, broken or untested. sentence: the reason in figures. advice: what is next."""

    kind: str
    sentence: str
    advice: str


# ---- looking ---------------------------------------------------------------------------------------------------------


def look(
    lora: LoRA, adapter: str, tokenizer: Any, train: Sequence[Pair], heldout: Sequence[Pair], classes: Sequence[str]
) -> Generator[list[Row], None, None]:
    """The rows with what is known of them so far, after each pass of the model.

    First the losses of SHOWN rows of each part; then their answers, those of the held-out ones first, for who has
    little time; then the answers of further held-out rows. classes:
    what a classifier chooses from; it answers at once. A row without an answer of its own, plain text, is not asked;
    nor is one whose prompt alone would fill a pass.
    """
    first = [*train[:SHOWN], *heldout[:SHOWN]]
    pairs = [*first, *heldout[SHOWN:ANSWERED]]
    parts = ["train"] * len(train[:SHOWN]) + ["heldout"] * len(heldout[:ANSWERED])
    rows = [
        Row(
            part=part,
            prompt=example.prompt[-1].content if example.prompt else "",
            target=example.target or example.text,
        )
        for part, (example, _) in zip(parts, pairs, strict=True)
    ]
    weigh = [[*range(len(first))], [*range(len(first), len(pairs))] if classes else []]
    for places in weigh:
        for row in (None, adapter):
            yield from _weigh(lora, row, pairs, places, rows, classes)
    if not classes:
        asked = [place for place, (example, _) in enumerate(pairs) if example.messages]
        seen, rest = len(train[:SHOWN]), len(first)
        groups = [
            [place for place in asked if place in part]
            for part in (range(seen, rest), range(seen), range(rest, len(pairs)))
        ]
        room = lean.PASS[_device(lora).type]
        for batch, prompts in (one for group in groups for one in _askable(tokenizer, pairs, group, room)):
            longest = max(pairs[place][1].count for place in batch)
            sampling = Sampling(max_new_tokens=min(ANSWER_TOKENS, longest + 16))
            said: list[Answer] = []
            with lora.use(*[None] * len(batch), *[adapter] * len(batch)):
                for said in answer(lora.model, tokenizer, [*prompts, *prompts], sampling):  # noqa: B007
                    yield rows
            for place, base, adapted in zip(batch, said[: len(batch)], said[len(batch) :], strict=True):
                rows[place] = replace(rows[place], base=base.text, adapted=adapted.text)
        yield rows


def _weigh(
    lora: LoRA, row: str | None, pairs: Sequence[Pair], places: Sequence[int], rows: list[Row], classes: Sequence[str]
) -> Iterator[list[Row]]:
    """Fill in the loss of each of these rows under an adapter or, with None, the base; of classifiers the label too."""
    loss, text = ("loss", "adapted") if row else ("base_loss", "base")
    of = {id(pairs[place][1]): place for place in places}
    tokens = [pairs[place][1] for place in places]
    for batch in passes(tokens, lean.PASS[_device(lora).type] // 2):
        with torch.no_grad(), lora.use(row):
            if classes:
                logits = lean.class_logits(lora.model, batch)
                found = lean.label_losses(logits, batch).tolist()
                said = [classes[best] for best in logits.argmax(-1).tolist()]
            else:
                split = losses(lora, batch).float().split([one.count for one in batch])
                found, said = [float(one.mean()) for one in split], []
        for number, one in enumerate(batch):
            place = of[id(one)]
            value = found[number] if math.isfinite(found[number]) else math.nan
            rows[place] = replace(rows[place], **{loss: value}, **({text: said[number]} if said else {}))
        yield rows


def _askable(
    tokenizer: Any, pairs: Sequence[Pair], places: Sequence[int], room: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Rows that are asked together and their prompts, so that base and adapted ones fit into `room` tokens."""
    batch: list[int] = []
    prompts: list[list[int]] = []
    for place in places:
        ids = prompt_ids(tokenizer, pairs[place][0].prompt)
        if 2 * len(ids) > room:
            continue
        widest = max(map(len, [*prompts, ids]))
        full = 2 * widest * (len(batch) + 1) > room or len(batch) == 2 * SHOWN
        if batch and full:
            yield batch, prompts
            batch, prompts = [], []
        batch.append(place)
        prompts.append(ids)
    if batch:
        yield batch, prompts


def _device(lora: LoRA) -> torch.device:
    return next(lora.model.parameters()).device


# ---- scoring ---------------------------------------------------------------------------------------------------------


def fitting(targets: Sequence[str], prompts: Sequence[str] = (), *, labels: bool = False) -> str:
    """Which figure suits such answers: a few that come again and again are labels, short or structured ones must be
    met exactly, and longer texts are compared by what they have in common: by BLEU where they are about as long as
    their prompts, as translations and rewordings are, and else by ROUGE-L, as summaries are.
    """
    short = statistics.median(len(target.split()) for target in targets) <= 6
    if labels or (short and len({target.strip() for target in targets}) <= len(targets) / 5):
        return "accuracy"
    if short or all(map(_is_json, targets)):
        return "exact_match"
    pairs = zip(targets, prompts, strict=True) if prompts else ()
    longer = [len(target.split()) / max(1, len(prompt.split())) for target, prompt in pairs]
    return "bleu" if longer and AS_LONG[0] <= statistics.median(longer) <= AS_LONG[1] else "rouge_l"


def score(rows: Iterable[Row], name: str) -> Score | None:
    """The figure `name` over the held-out rows that both sides have answered; None when there are none."""
    texts = [(row.base, row.adapted, row.target) for row in rows if row.part == "heldout"]
    asked = [(base, adapted, target) for base, adapted, target in texts if base is not None and adapted is not None]
    if not asked:
        return None
    base, adapted = ([_point(name, texts[side], texts[2]) for texts in asked] for side in (0, 1))
    if name in OVERLAPS:
        interval, (low, high) = "paired bootstrap", bootstrap([b - a for a, b in zip(base, adapted, strict=True)])
    else:
        interval, (low, high) = "Wilson", wilson(sum(adapted), len(adapted))
    mean = statistics.fmean
    return Score(
        name=name, rows=len(asked), base=mean(base), adapted=mean(adapted), low=low, high=high, interval=interval
    )


def _point(name: str, text: str, target: str) -> float:
    """0 to 1, of one row; BLEU as sentences have it, which may be shorter than four words."""
    if name == "bleu":
        from sacrebleu import sentence_bleu

        return min(1.0, sentence_bleu(text.strip(), [target.strip()]).score / 100)  # it rounds
    return scored([text], [target], labels=False)[name] if name in OVERLAPS else float(text.strip() == target.strip())


def wilson(hits: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share, which is right for few trials and for shares of 0 and 1 too."""
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # sums round


def bootstrap(differences: Sequence[float], draws: int = 2_000) -> tuple[float, float]:
    """The 95 % interval of their mean, from resampled rows; the same rows give the same interval."""
    dice = random.Random(0)
    means = sorted(statistics.fmean(dice.choices(differences, k=len(differences))) for _ in range(draws))
    return means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


# ---- judging ---------------------------------------------------------------------------------------------------------


def mean_losses(rows: Iterable[Row], part: str) -> tuple[float, float] | None:
    """The base's and the adapted mean loss over the rows of a part that have both; None when there are none."""
    known = [(row.base_loss, row.loss) for row in rows if row.part == part]
    found = [(base, loss) for base, loss in known if base is not None and loss is not None]
    return (statistics.fmean(base for base, _ in found), statistics.fmean(loss for _, loss in found)) if found else None


def told(
    rows: Sequence[Row],
    *,
    step: int,
    figure: str,
    heldout: tuple[float | None, float | None],
    general: tuple[float | None, float | None],
) -> Learned | None:
    """All of it as an event: the rows that are shown, the `figure` over all that answered, losses and the verdict.

    heldout, general: as training measured them, the base's and the adapter's; what it has not is None or infinite.
    None when nothing was measured at all.
    """
    found = score(rows, figure)
    train, held, known = mean_losses(rows, "train"), _pair(*heldout) or mean_losses(rows, "heldout"), _pair(*general)
    if not (train or held):
        return None
    said = judge(rows, heldout=held, general=known, score=found)
    losses = {"train": train, "heldout": held, "general": known}
    shown = [*itertools.islice((row for row in rows if row.part == "heldout"), SHOWN)]
    return Learned(
        step=step,
        verdict=said.kind,
        sentence=said.sentence,
        advice=said.advice,
        losses={part: [*map(_finite, pair)] for part, pair in losses.items() if pair},
        metric=asdict(found) if found else None,
        rows=[row.as_json() for row in (*(row for row in rows if row.part == "train"), *shown)],
    )


def judge(
    rows: Sequence[Row],
    *,
    heldout: tuple[float, float] | None = None,
    general: tuple[float, float] | None = None,
    score: Score | None = None,
) -> Verdict:
    """What the rows say. heldout: the losses of all rows held out, where training measured more than `rows` has.

    What is gained or lost goes by shares of the base's loss.
    """
    train, held = mean_losses(rows, "train"), heldout or mean_losses(rows, "heldout")
    spoilt = _spoilt(rows, train, held)
    if spoilt:
        return Verdict("broken", f"It is broken: {spoilt}.", "Lower the learning rate, to a third or less, and retry.")
    gained, by_heart = held and _fall(*held), train and _fall(*train)
    also = f", and {score.words}" if score else ""
    if held is None:
        return _untested(train, by_heart)
    moved = f"on rows it never saw the loss went from {_figure(held[0])} to {_figure(held[1])}{also}"
    if (gained or 0) >= CLEAR or (score and score.better):
        return Verdict("learnt", f"It learnt: {moved}.", _next(train, gained or 0, by_heart, score) + _lost(general))
    if train and by_heart and (by_heart >= BY_HEART or (by_heart >= CLEAR and (gained or 0) <= -CLEAR)):
        rows_went = f"on rows it trained on the loss fell from {_figure(train[0])} to {_figure(train[1])}"
        advice = "More rows, or more varied ones, help most; so do fewer steps and a lower rank."
        return Verdict("memorised", f"It memorised: {rows_went}, but {moved}.", advice + _lost(general))
    if held[0] < KNOWN:
        advice = "There is little to learn in these rows for this model; bring harder ones."
        return Verdict("no change", f"Almost nothing changed: {moved}; the base knew these rows.", advice)
    advice = "Train longer, raise the learning rate, or adapt more matrices."
    return Verdict("no change", f"Almost nothing changed: {moved}.", advice + _lost(general))


def _spoilt(rows: Sequence[Row], train: Any, held: Any) -> str:
    """How the adapter is worse than the base on all sides, or writes nothing of use where the base did; else empty."""
    if any(row.loss is not None and math.isnan(row.loss) for row in rows):
        return "its loss is not a number"
    asked = [row for row in rows if row.adapted is not None and row.base is not None]
    for sort, how in ((_is_empty, "are empty"), (_repeats, "repeat themselves")):
        adapted = sum(sort(row.adapted or "", row.target) for row in asked)
        base = sum(sort(row.base or "", row.target) for row in asked)
        if asked and adapted >= len(asked) / 2 and adapted > base:
            return f"{adapted} of {len(asked)} answers {how}, and {base} of the base model's"
    known = [pair for pair in (train, held) if pair]
    if known and all(_fall(*pair) < CLEAR for pair in known) and any(_fall(*pair) <= -CLEAR for pair in known):
        base, loss = min(known, key=lambda pair: _fall(*pair))
        where = "rows it never saw" if (base, loss) == held else "rows it trained on"
        return f"on {where} the loss rose from {_figure(base)} to {_figure(loss)}"
    return ""


def _untested(train: tuple[float, float] | None, by_heart: float | None) -> Verdict:
    """Without held-out rows."""
    if train is None or (by_heart or 0) < CLEAR:
        return Verdict(
            "no change", "Almost nothing changed on the rows it trained on.", "Train longer, or at a higher rate."
        )
    went = f"on rows it trained on the loss fell from {_figure(train[0])} to {_figure(train[1])}"
    return Verdict(
        "untested",
        f"It fits its rows: {went}; none were held out, so learning cannot be told from memorising.",
        "Hold out a tenth of the rows next time.",
    )


def _next(train: Any, gained: float, by_heart: float | None, score: Score | None) -> str:
    if by_heart is not None and by_heart > gained + 0.3:
        went = f"{_figure(train[0])} to {_figure(train[1])}"
        return f"Rows it trained on gained more ({went}): more varied rows would bring more than more steps."
    if score and score.adapted < 0.9 and score.name not in OVERLAPS:
        return "More steps or more rows may bring the rest; compare it on prompts of your own."
    return "Compare it on prompts of your own, then take it away under Export."


def _lost(general: tuple[float, float] | None) -> str:
    if general is None or -_fall(*general) < FORGOTTEN:
        return ""
    went = f"from {_figure(general[0])} to {_figure(general[1])}"
    return f" It also forgot: the loss on general text rose {went}; fewer steps or a lower strength keep more."


def _pair(base: float | None, adapted: float | None) -> tuple[float, float] | None:
    """Both, when both are known numbers."""
    base, adapted = _finite(base), _finite(adapted)
    return None if base is None or adapted is None else (base, adapted)


def _fall(base: float, loss: float) -> float:
    """The share of the base's loss that is gone; negative where it rose."""
    return (base - loss) / base if base > 0 else 0.0 if loss <= base else -math.inf


def _is_empty(text: str, target: str) -> bool:
    return not text.strip() and bool(target.strip())


def _repeats(text: str, target: str) -> bool:
    """Whether the last half of a text, at least, is one piece again and again, and is not what was wanted."""
    if text.strip() == target.strip():
        return False
    text = text.strip()
    for size in range(1, min(60, len(text) // 4) + 1):
        same = 0  # letters at the end that stand `size` before as well
        while same < len(text) - size and text[-1 - same] == text[-1 - same - size]:
            same += 1
        if same >= max(3 * size, len(text) / 2, LOOP):
            return True
    return False


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _figure(loss: float) -> str:
    return f"{loss:.3g}"
