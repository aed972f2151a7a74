"""Blind tests: the interval against closed forms, what the page may know, votes that survive, pairs to train on."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from lora_studio import blind
from lora_studio.ballots import MOST, Ballots
from lora_studio.blind import VOTES, Pair, Tally, Trial, standing, tally, wilson
from lora_studio.data.formats import Message
from lora_studio.data.words import prompt_ids
from lora_studio.errors import StudioError
from lora_studio.generate import Sampling, compare
from lora_studio.runs.config import DataChoice
from lora_studio.studio import Studio
from lora_studio.ui import answering
from lora_studio.ui import blind as page
from lora_studio.ui.desk import Desk
from tests.visits import ReadyDesk, trained

NAMES = ("base", "orders r8")
SIX = Sampling(max_new_tokens=6)


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


# ---- the page --------------------------------------------------------------------------------------------------------


@given(TRIALS)
def test_until_it_is_revealed_the_page_gets_the_same_for_either_order(trial: Trial) -> None:
    told = page.picture(trial)
    if trial.state != "revealed":
        assert told == page.picture(exchanged(trial)) and told["pairs"] == []
        return
    assert told["shown"] == [] and told["number"] == -1
    for pair, shown in zip([pair for pair in trial.pairs if pair.vote], told["pairs"], strict=True):
        assert [one["text"] for one in shown["answers"]] == list(pair.answers)
        assert [one["name"] for one in shown["answers"]] == list(NAMES)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return ReadyDesk(Studio(tmp_path))


def sent(told: Mapping[str, Any], **more: Any) -> Any:
    """An event as the script of the page raises it."""
    return SimpleNamespace(trial=told["trial"], number=told["number"], **more)


def begun(desk: Desk, run: str, prompts: str = "a\nbb\nccc") -> Mapping[str, Any]:
    told, problem = list(page.start(desk, "base", run, answering.TYPED, 3, prompts, 6))[-1]
    assert problem == ""
    return told


def test_a_blind_test_from_start_to_pairs(desk: Desk, tiny: Path) -> None:
    choice = DataChoice(id=desk.studio.data.add_sample("orders").id)
    run = trained(desk.studio, tiny, choice, "orders r8").id
    told = begun(desk, run)
    assert told["state"] == "written" and told["of"] == 3 and told["place"] == 1 and "orders" not in json.dumps(told)
    stale = sent(told, vote="a")
    told, _ = page.vote(desk, stale)
    assert page.vote(desk, stale)[0] == told and told["place"] == 2 and told["votes"].startswith("1 decided")
    told, _ = page.vote(desk, sent(told, vote="bad"))
    assert page.resume(desk) == told  # a reload
    assert "E_VOTE" in page.vote(desk, sent(told, vote="x"))[-1]
    address, problem = page.download(desk, sent(told))
    file = desk.downloads.take(address.removeprefix("download/"), "")
    assert file and problem == "" and json.loads(file.read_text()).keys() == {"prompt", "chosen", "rejected"}
    told, _ = page.reveal(desk, sent(told))
    assert [one["vote"] for one in told["pairs"]].count("both bad") == 1 and page.EARLY in told["standing"]
    assert {"Base model", "orders r8"} == {one["name"] for one in told["pairs"][0]["answers"]}
    assert page.vote(desk, sent(told, vote="a"))[0] == told
    trial, loaded = desk.studio.ballots.newest(), desk.studio._hand.loaded
    assert trial and loaded
    for pair in trial.pairs:
        (*_, last) = compare(
            loaded.lora, loaded.tokenizer, prompt_ids(loaded.tokenizer, pair.messages), [None, run], SIX
        )
        assert tuple(answer.text for answer in last) == pair.answers


def test_stopping_keeps_what_is_written_and_mistakes_are_said(desk: Desk, tiny: Path) -> None:
    choice = DataChoice(id=desk.studio.data.add_sample("orders").id)
    run = trained(desk.studio, tiny, choice, "orders r8").id
    going = page.start(desk, "base", run, answering.HELDOUT, 3, "", 6)
    told, _ = next(going)
    assert told["state"] == "writing" and told["of"] == 0
    next(going)
    going.close()
    assert page.resume(desk)["state"] == "written" and not desk.studio._hand.busy.locked()
    assert "E_NO_VOTES" in page.download(desk, sent(told))[-1]
    for first, second, code in (("base", "base", "E_SIDES"), (run, run, "E_SIDES"), ("base", "0" * 32, "E_RUN_NOT")):
        assert code in list(page.start(desk, first, second, answering.TYPED, 3, "a", 6))[-1][-1]
    for act in (page.vote, page.reveal, page.download):
        assert "E_TRIAL_NOT_FOUND" in act(desk, SimpleNamespace(trial="0" * 32, number=0, vote="a"))[-1]
