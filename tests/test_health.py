"""Health of rows against counting them one by one, and against what training would really cut."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from lora_studio.data import health, words
from lora_studio.data.batches import encode_all, encode_labels, measure, measure_labels, preview, preview_label
from lora_studio.data.formats import REPEATED, Example, Message, convert
from lora_studio.data.health import LIMITS, Health, examine
from lora_studio.data.library import split
from lora_studio.data.readers import Table
from lora_studio.errors import StudioError
from lora_studio.runs.config import DataChoice
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from lora_studio.ui import data_tab
from tests.test_batches import closing_tokenizer
from tests.tiny import tiny_encoder, tokenizer
from tests.visits import ReadyDesk

WORDS = tokenizer()
LAW = settings(max_examples=40, deadline=None, derandomize=True)
ALIKE = some.sampled_from(["a", "A", " a", "a b", "a  B", "é", "🎛"])  # so that many are equal, or nearly
PAIRS = some.lists(some.tuples(ALIKE, ALIKE), min_size=2, max_size=30)


def answered(*pairs: tuple[str, str]) -> list[Example]:
    rows = enumerate(pairs, 1)
    return [Example((Message("user", asked), Message("assistant", said)), row=row) for row, (asked, said) in rows]


def told(rows: list[Example], heldout: list[Example] | None = None, **about: object) -> Health:
    heldout = heldout or []
    return examine(rows, heldout, measure(WORDS, [*rows, *heldout]), **{"kind": "answers", "labels": False, **about})


def plainly(text: str) -> list[str]:
    return text.casefold().split()


# ---- lengths ---------------------------------------------------------------------------------------------------------


def conversation(turns: int, chance: random.Random) -> Example:
    said = [Message(role, "é" * chance.randrange(9)) for _ in range(turns) for role in ("user", "assistant")]
    return Example(tuple(said))


@LAW
@given(seed=some.integers(0, 999), limit=some.integers(1, 60), texts=some.booleans())
def test_lengths_measured_once_are_those_of_rows_cut_at_any_limit(seed: int, limit: int, texts: bool) -> None:
    chance = random.Random(seed)
    rows = [conversation(chance.randrange(1, 4), chance) for _ in range(7)]
    rows = [Example(text="a" * chance.randrange(1, 50)) for _ in range(7)] if texts else rows
    cut, whole = encode_all(WORDS, rows, limit), encode_all(WORDS, rows, 10**6)
    seen, pairs = measure(WORDS, rows).at(limit), list(zip(cut, whole, strict=True))
    assert seen.total == sum(len(one.tokens.ids) for one in cut)
    assert seen.lost == sum(one.cut for one in cut)
    assert seen.supervised == sum(one.tokens.count for one in cut)
    assert seen.lost_supervised == sum(all_.tokens.count - one.tokens.count for one, all_ in pairs)
    assert seen.cut == sum(one.cut > 0 for one in cut)
    assert seen.cut_answers == sum(one.tokens.count < all_.tokens.count for one, all_ in pairs)
    assert seen.unsupervised == sum(one.tokens.count == 0 for one in cut)
    assert seen.max == max(len(one.tokens.ids) for one in whole) and sum(seen.histogram) == len(rows)


@LAW
@given(said=some.lists(some.text("aB é🎛", max_size=5), min_size=1, max_size=6), limit=some.integers(4, 20))
def test_texts_of_a_classifier_lose_words_and_never_their_label(said: list[str], limit: int) -> None:
    closing = closing_tokenizer()
    rows = answered(*((text, "good") for text in said))
    cut, seen = encode_labels(closing, rows, ["bad", "good"], limit), measure_labels(closing, rows).at(limit)
    assert (seen.total, seen.lost) == (sum(len(one.tokens.ids) for one in cut), sum(one.cut for one in cut))
    assert seen.cut == sum(one.cut > 0 for one in cut)
    assert (seen.supervised, seen.lost_supervised, seen.cut_answers, seen.unsupervised) == (len(rows), 0, 0, 0)


def test_another_limit_reads_no_row_again(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studio, asked = Studio(tmp_path), []
    kept = studio.data.add_text("\n".join(json.dumps({"q": f"q{n}", "a": "a" * n}) for n in range(1, 40)))
    ask = words._ask
    monkeypatch.setattr(words, "_ask", lambda *given: asked.append(given[1]) or ask(*given))
    limits = [10, 20, 30, 512]
    costs = [studio.inspect(DataChoice(id=kept.id), str(tiny), TrainConfig(max_length=most)) for most in limits]
    assert asked == ["rows"] and len({one.lengths.lost for one in costs}) == 4
    assert studio.inspect(DataChoice(id=kept.id), str(tiny), TrainConfig(holdout=0.5)).health.heldout == 20
    assert asked == ["rows"]
    studio.inspect(DataChoice(id=kept.id), str(tiny), task="classify")
    assert asked == ["rows", "texts"]


# ---- every token of a row --------------------------------------------------------------------------------------------


@LAW
@given(seed=some.integers(0, 999), limit=some.integers(1, 60), texts=some.booleans())
def test_tokens_are_painted_as_training_takes_them(seed: int, limit: int, texts: bool) -> None:
    chance = random.Random(seed)
    row = Example(text="née 🎛" * chance.randrange(1, 9)) if texts else conversation(chance.randrange(1, 4), chance)
    pieces, (cut,) = preview(WORDS, row, limit), encode_all(WORDS, [row], limit)
    kinds = Counter(piece.kind for piece in pieces)
    assert (kinds["trained"], kinds["cut"], len(pieces)) == (cut.tokens.count, cut.cut, len(cut.tokens.ids) + cut.cut)
    assert all(piece.kind == "cut" for piece in pieces[limit:])
    whole = row.text + "<|end|>" if texts else words.render(WORDS, row.messages).rstrip()
    assert "".join(piece.text for piece in pieces) == whole  # a sign of several tokens stands there once


@pytest.mark.parametrize("limit", [4, 7, 99])
def test_a_classifiers_text_shows_what_is_cut_out_of_it(limit: int) -> None:
    closing, (row,) = closing_tokenizer(), answered(("née 🎛<|end|>!", "good"))
    pieces, kept = preview_label(closing, row, limit), encode_labels(closing, [row], ["good"], limit)[0]
    kinds = Counter(piece.kind for piece in pieces)
    assert (kinds["context"], kinds["cut"], kinds["trained"]) == (len(kept.tokens.ids), kept.cut, 1)
    assert "".join(piece.text for piece in pieces) == "<|user|>née 🎛<|end|>!<|assistant|><|end|> → good"
    assert [piece.kind for piece in pieces[-3:]] == ["context", "context", "trained"]  # what closes a text stays


def test_a_row_is_found_by_its_number_in_the_file(tmp_path: Path, tiny: Path) -> None:
    studio = Studio(tmp_path)
    kept = studio.data.add_text("q,a\none,first\ntwo,\nthree,third\n")

    def shown(row: int) -> str:
        return "".join(piece.text for piece in studio.preview(DataChoice(id=kept.id), row, str(tiny)))

    assert "first" in shown(1) and "third" in shown(3)
    for row, said in ((2, "left out"), (4, "no row 4"), (0, "no row 0")):
        with pytest.raises(StudioError, match=said):
            shown(row)


# ---- what repeats and what is shared ---------------------------------------------------------------------------------


@LAW
@given(pairs=PAIRS)
def test_duplicates_are_the_rows_that_a_set_swallows(pairs: list[tuple[str, str]]) -> None:
    seen = told(answered(*pairs))
    alike = {(tuple(plainly(asked)), tuple(plainly(said))) for asked, said in pairs}
    assert seen.duplicates == len(pairs) - len(set(pairs))
    assert seen.duplicates + seen.near_duplicates == len(pairs) - len(alike)
    cells = tuple({"q": asked, "a": said} for asked, said in pairs if said.strip())
    table = Table(kind="csv", columns=("q", "a"), rows=cells, warnings=())
    rows, notes = convert(table, "prompt_completion", {"prompt": "q", "completion": "a"}) if cells else ([], [])
    (repeated,) = [int(note.split()[0]) for note in notes if note.endswith(REPEATED)] or [0]
    assert not rows or repeated == told(rows).duplicates


@LAW
@given(pairs=PAIRS, share=some.floats(0, 0.9), seed=some.integers(0, 5))
def test_no_prompt_is_on_both_sides_of_a_split(pairs: list[tuple[str, str]], share: float, seed: int) -> None:
    rows = answered(*pairs)
    if share and len({asked for asked, _ in pairs}) < 2:
        return
    train, heldout = split(rows, share, seed)
    seen = told(train, heldout)
    assert (seen.rows, seen.train, seen.heldout, seen.shared_prompts) == (len(rows), len(train), len(heldout), 0)
    prompts = [plainly(one.prompt[0].content) for one in train]
    assert seen.near_prompts == sum(plainly(one.prompt[0].content) in prompts for one in heldout)
    assert seen.shared_answers == sum(one.target in {other.target for other in train} for one in heldout)


@LAW
@given(pairs=PAIRS, at=some.integers(1, 29))
def test_a_split_that_straddles_is_seen(pairs: list[tuple[str, str]], at: int) -> None:
    rows = answered(*pairs)
    train, heldout = rows[:at], rows[at:]
    both = sum(one.prompt in {other.prompt for other in train} for one in heldout)
    assert told(train, heldout).shared_prompts == both


def test_documents_are_compared_whole_and_labels_are_counted() -> None:
    texts = [Example(text=text, row=row) for row, text in enumerate(["a", "b", "A ", "a"], 1)]
    seen = told(texts, kind="documents")
    assert (seen.duplicates, seen.near_duplicates, seen.shared_answers, seen.labels) == (1, 1, None, ())
    rows = answered(("1", "spam"), ("2", "ham "), ("3", "ham"), ("4", "eggs"))
    seen = told(rows, labels=True)
    assert seen.labels == (("ham", 2), ("eggs", 1), ("spam", 1)) and seen.shared_answers is None


@LAW
@given(counts=some.lists(some.integers(0, 5000), min_size=1, max_size=60))
def test_every_row_is_in_one_bar(counts: list[int]) -> None:
    counts = sorted(counts)
    width, bars, longest = health._histogram(counts)
    assert sum(bars) == len(counts) and len(bars) <= health.BARS and longest == counts[-1] and bars[-1] > 0
    for bar, count in enumerate(bars[:-1]):
        assert count == sum(width * bar <= one < width * (bar + 1) for one in counts)


# ---- in words --------------------------------------------------------------------------------------------------------

GOOD = [(f"question {number}", f"answer {number}") for number in range(40)]
LONG = [*GOOD[:30], *((f"{number} long", "x" * 100) for number in range(10))]


@pytest.mark.parametrize(
    ("rows", "limit", "about", "grade", "said"),
    [
        (GOOD, 64, {}, "fit", "Fit to train on: 40 rows, no duplicates, nothing is cut at 64 tokens."),
        ([*GOOD, GOOD[0]], 64, {}, "fit", "Fit to train on: 41 rows, 1 duplicate, nothing is cut at 64 tokens."),
        (LONG, 64, {}, "look", "10 of 40 answers are cut at 64 tokens. 128 would cut none."),
        ([*GOOD, *GOOD], 64, {}, "look", "40 of 80 rows are like an earlier one"),
        ([*GOOD, *((one.upper(), two) for one, two in GOOD)], 64, {}, "look", "40 of 80 rows are like an earlier one"),
        (GOOD, 64, {"empty": 10}, "look", "no answer in 10 of 50, which are left out."),
        (GOOD, 64, {"labels": True}, "look", "40 of them have fewer than 5 rows"),
        ([(one, "x") for one, _ in GOOD], 64, {"labels": True}, "look", "40 of 40 rows have “x”"),
        (GOOD[:5], 64, {}, "look", "5 are few to learn from"),
        (GOOD, 8, {}, "unfit", "no answer has a token left to learn at 8 tokens. A limit of 64 cuts nothing."),
    ],
)
def test_the_sentence_says_what_weighs_most(rows: list, limit: int, about: dict, grade: str, said: str) -> None:
    verdict = told(answered(*rows), **about).verdict(limit)
    assert (verdict.grade, said in verdict.sentence) == (grade, True), verdict


def test_a_prompt_that_is_held_out_and_trained_but_for_its_capitals_is_said() -> None:
    train, heldout = answered(*GOOD), answered(*((one.upper(), "another") for one, _ in GOOD[:4]))
    verdict = told(train, heldout).verdict(64)
    assert "4 of 4 held-out prompts are trained on too" in verdict.sentence


@LAW
@given(sizes=some.lists(some.integers(1, 400), min_size=1, max_size=30), share=some.sampled_from([0.5, 0.99, 1.0]))
def test_the_limit_that_is_advised_leaves_as_many_whole_as_is_said(sizes: list[int], share: float) -> None:
    seen = told([Example(text="a" * size) for size in sizes], kind="documents")
    most = seen.enough(share)
    assert seen.at(most).cut <= (1 - share) * len(sizes) + 1e-9
    assert seen.at(most - health.ROUND).cut > (1 - share) * len(sizes) - 1e-9


def test_documents_are_said_plainly() -> None:
    seen = told([Example(text="a" * size) for size in (10, 20, 30)], kind="documents")
    assert seen.learnt(512) == (  # each with its end, and without its first token, which nothing foretells
        "All tokens of each document are learnt, 60 in all; each is one row. None is longer than 512 tokens."
    )
    assert seen.learnt(21).endswith(
        "1 document is longer than 21 tokens and cut there: 10 tokens are left out, not continued in another row."
    )
    assert seen.histograms().keys() == {"document"}
    assert told(answered(*GOOD)).histograms().keys() == {"prompt", "answer"}


def test_the_json_has_the_usual_limits_and_the_chosen_one() -> None:
    plain = json.loads(json.dumps(told(answered(*LONG), labels=True).as_json(100)))
    assert [one["limit"] for one in plain["limits"]] == sorted([*LIMITS, 100])
    assert plain["limits"][0]["cut_answers"] == 10 and plain["limits"][1]["supervised_tokens_lost"] == 0
    assert plain["grade"] == "look" and plain["different_labels"] == len(plain["labels"]) == 31
    assert sum(plain["histograms"]["answer"]["counts"]) == 40 and "measured" not in plain


def test_a_dataset_is_told_by_its_format_and_its_task(tmp_path: Path, tiny: Path) -> None:
    studio, encoder = Studio(tmp_path), str(tiny_encoder(tmp_path / "bert"))
    tickets = DataChoice(id=studio.data.add_sample("tickets").id)
    wrote, chose = studio.inspect(tickets, str(tiny)).health, studio.inspect(tickets, encoder, task="classify").health
    assert (wrote.kind, chose.kind) == ("answers", "labels") and wrote.labels == chose.labels
    assert sum(rows for _, rows in chose.labels) == chose.rows and chose.at(8).lost_supervised == 0
    prose = DataChoice(id=studio.data.add_text('{"text": "a b"}\n{"text": " "}\n{"text": "c"}').id)
    seen = studio.inspect(prose, str(tiny))
    assert (seen.health.kind, seen.health.rows, seen.health.empty) == ("documents", 2, 1)
    assert seen.as_json()["health"]["empty"] == 1


def test_the_tab_shows_a_limit_before_it_is_used_and_turns_round_at_the_last_row(tmp_path: Path, tiny: Path) -> None:
    desk = ReadyDesk(Studio(tmp_path))
    choice = data_tab.opened(desk.studio.data.add_text("q,a\n" + "".join(f"q{n},{'a' * n}\n" for n in range(60))))[0]
    seen = data_tab.inspect(desk, choice, str(tiny), 512, 0.1, 0)
    assert len(seen) == data_tab.SEEN and "no answer in 1 of 60, which is left out" in seen[0]
    assert "<tr aria-current='true'><th scope='row'>512 <small>in use</small></th><td>0</td>" in seen[-1]
    tried = data_tab.try_limit(desk, choice, 32, str(tiny), 512, 0.1, 0)
    cut = desk.studio.inspect(DataChoice(**choice), str(tiny), TrainConfig(max_length=32)).lengths.cut_answers
    assert f"<tr aria-current='true'><th scope='row'>32</th><td>{cut:,} <small>" in tried and "512 <small>in" in tried
    assert "E_CONFIG" in data_tab.try_limit(desk, choice, 0, str(tiny), 512, 0.1, 0)
    assert data_tab.use_limit(32) == 32
    assert [data_tab.turn(desk, 1, choice, row) for row in (1, 60)] == [2, 1]
    assert [data_tab.turn(desk, -1, choice, row) for row in (1, 60)] == [60, 59]
    assert "Row 1 is left out" in data_tab.show_row(desk, choice, 1, str(tiny), 512)
    assert "<span class='cut'>" in data_tab.show_row(desk, choice, 60, str(tiny), 32)
