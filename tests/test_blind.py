"""Blind tests: the interval against closed forms, what the page may know, votes that survive, pairs to train on."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from lora_studio import blind
from lora_studio.ballots import MOST, Ballots
from lora_studio.blind import VOTES, Pair, Tally, Trial, standing, tally, wilson
from lora_studio.data.formats import Message
from lora_studio.errors import StudioError

NAMES = ("base", "orders r8")


@pytest.mark.parametrize(
    ("wins", "n", "z", "low", "high"),
    [
        (0, 0, 1.96, 0.0, 1.0),
        (0, 10, 2.0, 0.0, 4 / 14),  # z² / (n + z²), and what mirrors it
        (10, 10, 2.0, 10 / 14, 1.0),
        (5, 10, 0.0, 0.5, 0.5),
        (8, 16, 2.0, 0.5 - math.sqrt(0.05), 0.5 + math.sqrt(0.05)),  # 1/2 ± z / 2√(n + z²)
        (1, 4, 2.0, (3 - math.sqrt(7)) / 8, (3 + math.sqrt(7)) / 8),
    ],
)
def test_wilsons_interval_has_its_closed_forms(wins: int, n: int, z: float, low: float, high: float) -> None:
    assert wilson(wins, n, z) == pytest.approx((low, high), abs=1e-12)


@given(some.integers(0, 300), some.integers(1, 300), some.floats(0.01, 5))
def test_the_interval_has_the_share_shrinks_with_votes_and_stays_a_share(wins: int, n: int, z: float) -> None:
    wins = min(wins, n)
    low, high = wilson(wins, n, z)
    assert 0 <= low <= wins / n <= high <= 1
    below, above = wilson(n - wins, n, z)
    assert (1 - above, 1 - below) == pytest.approx((low, high), abs=1e-12)
    narrower = wilson(3 * wins, 3 * n, z)
    assert narrower[1] - narrower[0] < high - low
    for end in {low, high} - {0.0, 1.0}:  # where it ends, the test of that share has exactly z
        assert abs(wins / n - end) * math.sqrt(n) == pytest.approx(z * math.sqrt(end * (1 - end)), rel=1e-5, abs=1e-6)


def counted(first: int, second: int) -> Tally:
    return Tally(wins=(first, second), ties=0, bad=0, same=0)


def test_the_standing_is_honest_about_few_votes() -> None:
    assert standing(counted(0, 0), NAMES) == standing(counted(0, 0)) == "No preference yet."
    said = "Not yet distinguishable (n = 9): orders r8 was preferred in 6 of 9, 67 % (95 % interval 35 to 88 %)."
    assert standing(counted(3, 6), NAMES) == said
    assert standing(counted(3, 6)) == "Not yet distinguishable (n = 9)."
    clear = "base is preferred to orders r8: 18 of 20, 90 % (95 % interval 70 to 97 %)."
    assert standing(counted(18, 2), NAMES) == clear
    assert not counted(0, 3).distinguishable and counted(0, 4).distinguishable


@given(some.integers(0, 60), some.integers(0, 60))
def test_without_names_the_standing_does_not_tell_which_side_is_ahead(first: int, second: int) -> None:
    assert standing(counted(first, second)) == standing(counted(second, first))


def said(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


PAIRS = some.builds(
    Pair,
    messages=some.text(min_size=1).map(said),
    answers=some.one_of(some.just(()), some.tuples(some.text(max_size=3), some.text(max_size=3))),
    swapped=some.booleans(),
    vote=some.sampled_from(["", *VOTES]),
).map(lambda pair: pair if pair.answers and not pair.same else replace(pair, vote=""))
TRIALS = some.builds(
    Trial,
    id=some.just("1" * 32),
    sides=some.just(("base", "2" * 32)),
    names=some.just(NAMES),
    pairs=some.lists(PAIRS, max_size=6).map(tuple),
    state=some.sampled_from(["writing", "written", "revealed"]),
)


def exchanged(trial: Trial) -> Trial:
    """The same answers under the same letters, with the sides the other way round."""
    pairs = (replace(pair, answers=pair.answers[::-1], swapped=not pair.swapped) for pair in trial.pairs)
    return replace(trial, sides=trial.sides[::-1], names=trial.names[::-1], pairs=tuple(pairs))


@given(TRIALS)
def test_a_vote_counts_for_the_side_that_wrote_the_answer(trial: Trial) -> None:
    count, other = tally(trial), tally(exchanged(trial))
    assert other == replace(count, wins=count.wins[::-1])
    for pair, turned in zip(trial.pairs, exchanged(trial).pairs, strict=True):
        assert pair.shown == turned.shown
        if pair.preferred is not None:
            assert pair.answers[pair.preferred] == pair.shown[VOTES.index(pair.vote)]
    assert blind.preferences(trial) == blind.preferences(exchanged(trial))


@given(TRIALS)
def test_a_trial_comes_back_from_its_file_as_it_was(trial: Trial) -> None:
    assert blind.from_json(json.loads(json.dumps(asdict(trial)))) == trial


@given(TRIALS, some.integers(-2, 8), some.sampled_from(VOTES))
def test_only_the_pair_that_is_open_is_voted_on_and_only_once(trial: Trial, number: int, vote: str) -> None:
    after = blind.voted(trial, number, vote)
    if number != trial.next:
        assert after == trial
        return
    changed = [place for place, pair in enumerate(after.pairs) if pair != trial.pairs[place]]
    assert changed == [number] and after.pairs[number].vote == vote and after.next != number
    assert blind.voted(after, number, "bad") == after


def test_the_order_is_drawn_for_each_pair() -> None:
    trial = blind.new(("base", "2" * 32), NAMES, [said("p")] * 200)
    assert 40 < sum(pair.swapped for pair in trial.pairs) < 160  # 8 standard deviations
    again = blind.new(("base", "2" * 32), NAMES, [said("p")] * 200)
    assert [pair.swapped for pair in again.pairs] != [pair.swapped for pair in trial.pairs] and again.id != trial.id
    with pytest.raises(StudioError) as caught:
        blind.voted(trial, 0, "c")
    assert caught.value.code == "E_VOTE"


def test_pairs_to_train_on_have_the_shape_that_trl_reads() -> None:
    coins = iter([False, True, False, False, True])
    trial = blind.new(("base", "2" * 32), NAMES, [said(f"p{n}") for n in range(5)], lambda: next(coins))
    trial = blind.answered(trial, {n: (f"b{n}", f"r{n}") for n in range(4)} | {4: ("same", "same")})
    for number, vote in enumerate(["a", "a", "tie", "bad", "a"]):
        trial = blind.voted(trial, number, vote)
    assert trial.next is None and tally(trial) == Tally(wins=(1, 1), ties=1, bad=1, same=1)
    assert blind.preferences(trial) == [
        {"prompt": "p0", "chosen": "b0", "rejected": "r0"},
        {"prompt": "p1", "chosen": "r1", "rejected": "b1"},
    ]
    told = replace(trial.pairs[0], messages=(Message("system", "s"), *trial.pairs[0].messages))
    (first, _) = blind.preferences(replace(trial, pairs=(told, *trial.pairs[1:])))
    assert first["prompt"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "p0"}]
    assert first["chosen"] == [{"role": "assistant", "content": "b0"}]


def test_votes_survive_and_only_the_newest_trials_are_kept(tmp_path: Path) -> None:
    ballots = Ballots(tmp_path)
    assert ballots.newest() is None
    trials = [blind.new(("base", "2" * 32), NAMES, [said("é\n")]) for _ in range(MOST + 2)]
    for trial in trials:
        ballots.add(trial)
    assert len(list(ballots.folder.iterdir())) == MOST
    with pytest.raises(StudioError):
        ballots.get(trials[0].id)
    ballots.change(trials[5].id, lambda trial: blind.answered(trial, {0: ("x", "y")}))
    kept = ballots.change(trials[5].id, lambda trial: blind.voted(trial, 0, "tie"))
    assert Ballots(tmp_path).newest() == kept and kept.pairs[0].vote == "tie"
    for wrong in ("0" * 32, "../../etc/passwd", "", trials[5].id + "\n"):
        with pytest.raises(StudioError) as caught:
            ballots.change(wrong, blind.revealed)
        assert caught.value.code == "E_TRIAL_NOT_FOUND"
    (ballots.folder / f"{kept.id}.json").write_text('{"id": 3}')
    assert Ballots(tmp_path).newest() != kept
