"""A conversation with two models: each goes on from its own answers, old turns are left out, the template is said."""

from pathlib import Path

import pytest

from lora_studio.chat import SIDES, Turn, fitting, messages, template_remark
from lora_studio.data.formats import Message
from lora_studio.data.words import prompt_ids, render
from lora_studio.errors import StudioError
from lora_studio.generate import Sampling, answers
from lora_studio.runs.config import DataChoice, Run
from lora_studio.studio import Studio
from lora_studio.ui import chat
from lora_studio.ui.desk import Desk
from tests.tiny import tiny_model, tokenizer
from tests.visits import ReadyDesk, trained

TURNS = [Turn("hello", "hi", "ahoy"), Turn("who?", "me", "a pirate, and a rather long answer"), Turn("why?")]


def test_each_side_knows_its_own_answers_and_ends_with_what_was_said() -> None:
    for side, first in {"base": "hi", "adapted": "ahoy"}.items():
        told = messages(TURNS, side)
        assert [one.role for one in told] == ["user", "assistant"] * 2 + ["user"]
        assert (told[1].content, told[-1].content) == (first, "why?")


def test_as_many_of_the_newest_turns_as_fit_are_read() -> None:
    words = tokenizer()
    lengths = [len(prompt_ids(words, messages(TURNS[left:], "adapted"))) for left in range(3)]
    assert lengths == sorted(lengths, reverse=True)
    for room in range(lengths[2], lengths[0] + 2):
        ids, left_out = fitting(words, TURNS, "adapted", room, 10_000)
        assert ids == prompt_ids(words, messages(TURNS[left_out:], "adapted")) and len(ids) <= room
        assert left_out == 0 or lengths[left_out - 1] > room  # and no fewer
    with pytest.raises(StudioError) as caught:
        fitting(words, TURNS, "adapted", lengths[2] - 1, 10_000)
    assert caught.value.code == "E_CONTEXT"
    assert fitting(words, TURNS, "base", 10_000, len("who?mewhy?"))[1] == 1
    assert fitting(words, TURNS, "base", 10_000, 0)[1] == 2  # what was said last is always read


def test_the_plain_template_is_the_one_that_is_described() -> None:
    words = tokenizer()
    assert template_remark(words) == ""
    words.chat_template = None
    text = render(words, [Message("user", "a"), Message("assistant", "b")])
    assert text.startswith("User: a\nAssistant: b")
    assert "“User: …” and “Assistant: …”" in template_remark(words)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return ReadyDesk(Studio(tmp_path))


def run_of(desk: Desk, model: Path) -> Run:
    choice = DataChoice(id=desk.studio.data.add_sample("orders").id)
    return trained(desk.studio, model, choice, "orders <r8>")


def test_both_answers_are_what_each_model_says_to_its_own_conversation(desk: Desk, tiny: Path) -> None:
    run, sampling = run_of(desk, tiny), Sampling(max_new_tokens=6)
    (*_, last) = desk.studio.chat(run.id, TURNS, sampling=sampling)
    loaded = desk.studio._hand.loaded
    assert loaded and last.left_out == (0, 0) and last.template == ""
    assert last.base_difference == 0 and last.exact
    for side, row, answer in zip(SIDES, (None, run.id), last.answers, strict=True):
        with loaded.lora.use(row):
            ids = prompt_ids(loaded.tokenizer, messages(TURNS, side))
            assert answers(loaded.lora.model, loaded.tokenizer, [ids], sampling) == [answer.text]
    (*_, same) = desk.studio.chat(run.id[:8], [Turn("one")], strength=0.0, sampling=sampling)
    assert same.answers[0] == same.answers[1]


def say(desk: Desk, run: str | None, said: str, turns: list, strength: float = 1.0, tokens: object = 5) -> tuple:
    (*_, last) = chat.say(desk, run, said, turns, strength, tokens, 0.0)
    return last


def test_a_talk_goes_on_and_starts_again(desk: Desk, tiny: Path) -> None:
    run = run_of(desk, tiny)
    box, told, turns, problem = say(desk, run.id, " hello\nthere\ud800 ", [])
    assert (box, problem, turns[0].said, told["note"]) == ("", "", "hello\nthere?", "")
    assert (
        told["name"] == "orders <r8>"
        and told["turns"][0]["strength"] == 1.0
        and told["turns"][0]["adapted"] == turns[0].adapted
    )
    assert turns[0].base != turns[0].adapted
    *_, turns, problem = say(desk, run.id, "and?", turns)
    assert len(turns) == 2 and problem == "" and turns[1].base
    assert chat.forget()[:3] == (chat.NOTHING, [], "")


def test_what_was_left_out_and_a_missing_template_are_said(desk: Desk, tmp_path: Path) -> None:
    small = tiny_model(tmp_path / "small", max_position_embeddings=96)
    (small / "chat_template.jinja").unlink()
    run = run_of(desk, small)
    long = [Turn("x", "y" * 40, "y"), Turn("z", "z", "z")]
    _, told, turns, problem = say(desk, run.id, "q", long)
    assert problem == "" and len(turns) == 3
    assert "no chat template" in told["note"] and "the oldest 1 (base) and 0 (adapted)" in told["note"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"run": None}, "E_NO_RUN"),
        ({"run": "0" * 32}, "E_RUN_NOT_FOUND"),
        ({"said": " "}, "E_NO_PROMPT"),
        ({"said": "x" * 3000}, "E_CONTEXT"),
        ({"strength": 5.0}, "E_STRENGTH"),
        ({"tokens": 0}, "E_CONFIG"),
        ({"turns": [Turn("a")] * chat.MOST_TURNS}, "E_LIMIT"),
    ],
)
def test_what_cannot_be_said_stays_in_the_box(desk: Desk, tiny: Path, change: dict, code: str) -> None:
    run = run_of(desk, tiny)
    box, *_, problem = say(desk, **{"run": run.id, "said": "q", "turns": [], **change})
    assert code in problem and box != ""
