"""A blind test: two sides' answers as A and B, in an order that only the server knows, votes, and what they say.

The share of votes for a side comes with Wilson's interval (Wilson, 1927): for w of n votes and p = w / n,
(p + z²/2n ± z √(p (1 - p) / n + z²/4n²)) / (1 + z²/n). It stays within 0 and 1 and is honest about few votes.
Knows no model, no page and no file; `ballots` keeps trials.
"""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lora_studio.data.formats import Message
from lora_studio.errors import StudioError, quote

Z = 1.959963984540054  # of an interval that holds in 95 % of cases
MOST_PAIRS = 100  # of one trial
VOTES = ("a", "b", "tie", "bad")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt, what each side answered to it, and the vote."""

    messages: tuple[Message, ...]
    answers: tuple[str, ...] = ()  # of the first and of the second side; none while they are being written
    swapped: bool  # whether A is the second side
    vote: str = ""  # one of VOTES

    @property
    def shown(self) -> tuple[str, ...]:
        """The answers as A and B."""
        return self.answers[::-1] if self.swapped else self.answers

    @property
    def same(self) -> bool:
        """Whether there is nothing to choose: both wrote the same."""
        return len(set(self.answers)) == 1

    @property
    def preferred(self) -> int | None:
        """The number of the side that was voted for."""
        return VOTES.index(self.vote) ^ self.swapped if self.vote in ("a", "b") else None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A blind test of two sides; each is "base" or a run's id."""

    id: str
    sides: tuple[str, ...]
    names: tuple[str, ...]  # of the sides, for people
    pairs: tuple[Pair, ...]
    state: Literal["writing", "written", "revealed"] = "writing"  # of its answers, then of its sides

    @property
    def next(self) -> int | None:
        """The number of the pair to vote on; None when there is none, or none yet."""
        waiting = (number for number, pair in enumerate(self.pairs) if pair.answers and not pair.vote and not pair.same)
        return next(waiting, None) if self.state != "revealed" else None


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How the votes fell; equal answers, which nobody is asked about, are `same`."""

    wins: tuple[int, int]
    ties: int
    bad: int
    same: int

    @property
    def decided(self) -> int:
        return sum(self.wins)

    @property
    def distinguishable(self) -> bool:
        """Whether the interval of the share of wins leaves out one half."""
        low, high = wilson(self.wins[1], self.decided)
        return not low <= 0.5 <= high


def new(
    sides: Sequence[str],
    names: Sequence[str],
    prompts: Sequence[Sequence[Message]],
    coin: Callable[[], bool] = lambda: bool(secrets.randbits(1)),
) -> Trial:
    """A trial whose answers are still to be written; the order of each pair is drawn by `coin`."""
    assert len(sides) == len(names) == 2
    pairs = tuple(Pair(messages=tuple(messages), swapped=coin()) for messages in prompts)
    return Trial(id=secrets.token_hex(16), sides=tuple(sides), names=tuple(names), pairs=pairs)


def answered(trial: Trial, answers: Mapping[int, Sequence[str]]) -> Trial:
    """The trial with both sides' answers to some of its prompts."""
    return _with_pairs(trial, {number: {"answers": tuple(texts)} for number, texts in answers.items()})


def voted(trial: Trial, number: int, vote: str) -> Trial:
    """The trial with one vote more; a second vote on a pair, or one on a pair that is not open, changes nothing."""
    if vote not in VOTES:
        raise StudioError("E_VOTE", f"There is no vote {quote(vote, 20)}.", f"Give one of {', '.join(VOTES)}.")
    return trial if number != trial.next else _with_pairs(trial, {number: {"vote": vote}})


def written(trial: Trial) -> Trial:
    """The trial once no more answers come."""
    return replace(trial, state="written") if trial.state == "writing" else trial


def revealed(trial: Trial) -> Trial:
    """The trial once its sides are known, after which nobody votes."""
    return replace(trial, state="revealed")


def tally(trial: Trial) -> Tally:
    """How the votes fell so far."""
    preferred = [pair.preferred for pair in trial.pairs]
    votes = [pair.vote for pair in trial.pairs]
    return Tally(
        wins=(preferred.count(0), preferred.count(1)),
        ties=votes.count("tie"),
        bad=votes.count("bad"),
        same=sum(pair.same for pair in trial.pairs),
    )


def wilson(wins: int, n: int, z: float = Z) -> tuple[float, float]:
    """Where the true share of wins lies, seen `wins` of `n`; everything is possible as long as nothing was seen."""
    assert 0 <= wins <= n and z >= 0, (wins, n, z)
    if not n:
        return 0.0, 1.0
    share, slack = wins / n, z * z / n
    middle = (share + slack / 2) / (1 + slack)
    half = z * math.sqrt(share * (1 - share) / n + slack / (4 * n)) / (1 + slack)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def standing(count: Tally, names: Sequence[str] = ()) -> str:
    """What the votes say in a sentence; without the names of the sides nothing in it tells which side is ahead."""
    n = count.decided
    if not n:
        return "No preference yet."
    if not names:
        blind = "One of the two is preferred; which one is said when you reveal them"
        return f"{blind if count.distinguishable else 'Not yet distinguishable'} (n = {n})."
    ahead = 0 if count.wins[0] > count.wins[1] else 1
    wins, (low, high) = count.wins[ahead], wilson(count.wins[ahead], n)
    share = f"{wins} of {n}, {100 * wins / n:.0f} % (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    if count.distinguishable:
        return f"{names[ahead]} is preferred to {names[1 - ahead]}: {share}."
    return f"Not yet distinguishable (n = {n}): {names[ahead]} was preferred in {share}."


def preferences(trial: Trial) -> list[dict[str, Any]]:
    """The pairs that were decided, as TRL trains on them: prompt, chosen, rejected.

    Plain texts; as lists of messages where some prompt is more than one message.
    """
    decided = [pair for pair in trial.pairs if pair.preferred is not None]
    plain = all(len(pair.messages) == 1 for pair in trial.pairs)
    found = []
    for pair in decided:
        chosen, rejected = pair.answers[:: 1 if pair.preferred == 0 else -1]
        if plain:
            found.append({"prompt": pair.messages[0].content, "chosen": chosen, "rejected": rejected})
            continue
        said = {"prompt": pair.messages, "chosen": _by_assistant(chosen), "rejected": _by_assistant(rejected)}
        found.append({key: [vars(message) for message in messages] for key, messages in said.items()})
    return found


def from_json(value: Mapping[str, Any]) -> Trial:
    """A trial from what dataclasses.asdict made of it. Raises KeyError and TypeError for anything else."""
    pairs = tuple(
        Pair(
            **pair | {"messages": tuple(Message(**one) for one in pair["messages"]), "answers": tuple(pair["answers"])}
        )
        for pair in value["pairs"]
    )
    return Trial(**{**value, "sides": tuple(value["sides"]), "names": tuple(value["names"]), "pairs": pairs})


def _with_pairs(trial: Trial, changes: Mapping[int, Mapping[str, Any]]) -> Trial:
    pairs = (replace(pair, **changes.get(number, {})) for number, pair in enumerate(trial.pairs))
    return replace(trial, pairs=tuple(pairs))


def _by_assistant(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)
