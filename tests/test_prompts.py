"""Prompt sets: answers of a mixed batch, prompts from three sources, bounds, and the table as files."""

import csv
import html
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from lora_studio.core.baselines import add
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import BaselineSpec, LoraSpec, Method
from lora_studio.data.formats import Example, Message
from lora_studio.errors import StudioError
from lora_studio.generate import Sampling, answer_all, answers
from lora_studio.limits import LAPTOP, SPACE, Limits
from lora_studio.prompts import Answers, Prompt, as_csv, as_jsonl, check_set, means, of_examples, scores, typed
from lora_studio.runs.config import DataChoice, RunConfig
from lora_studio.studio import Studio
from lora_studio.ui import answering, prompt_set
from lora_studio.ui.desk import Desk
from tests.tiny import causal, tokenizer
from tests.visits import ReadyDesk, trained

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17], [9, 11, 12]]
TEXTS = some.text(min_size=1, max_size=12)


def perturbed(*methods: Method) -> LoRA:
    lora = LoRA(causal("llama", vocabulary=len(tokenizer())))
    for number, method in enumerate(methods):
        add(lora, f"x{number}", method)
        for tensor in lora.parameters(f"x{number}"):
            tensor.data.normal_(0, 0.5)
    return lora


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_each_prompt_gets_from_each_model_what_that_one_would_answer_alone(batch: int) -> None:
    methods = LoraSpec(rank=3), BaselineSpec(kind="bitfit"), BaselineSpec(kind="prefix", width=3)
    lora, words = perturbed(*methods), tokenizer()
    rows, sampling = [None, "x0", {"x0": 0.5}, "x1", "x2"], Sampling(max_new_tokens=6)
    found: dict[int, list[str]] = {}
    for fresh in answer_all(lora, words, PROMPTS, rows, sampling, batch=batch):
        assert not fresh.keys() & found.keys()
        found |= fresh
    assert sorted(found) == list(range(len(PROMPTS)))
    for place, row in enumerate(rows):
        with lora.use(row):
            alone = [answers(lora.model, words, [prompt], sampling)[0] for prompt in PROMPTS]
        assert [found[number][place] for number in sorted(found)] == alone
    assert len({tuple(texts) for texts in zip(*(found[number] for number in found), strict=True)}) > 3


def test_a_prompt_is_told_as_soon_as_all_its_answers_are_final_and_every_step_can_be_the_last() -> None:
    lora, words, sampling = perturbed(LoraSpec(rank=3)), tokenizer(), Sampling(max_new_tokens=5)
    news = list(answer_all(lora, words, PROMPTS, [None, "x0"], sampling, batch=4))
    assert len(news) == 2 * (5 + 1) and [bool(one) for one in news].count(True) == 2
    going = answer_all(lora, words, PROMPTS, [None, "x0"], sampling)
    next(going)
    going.close()
    assert not lora._route.names  # the gates are as before


# ---- where prompts come from -----------------------------------------------------------------------------------------


def test_prompts_are_typed_a_line_or_taken_from_rows() -> None:
    assert [prompt.text for prompt in typed(" one\r\n\n  \ntwo é \n")] == ["one", "two é"]
    assert typed("a\ud800b")[0].text.encode() == b"a?b"
    chat = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
    rows = [
        Example(chat),
        Example(text="a b c d e f g h i j"),
        Example((Message("user", " "), Message("assistant", "x"))),
    ]
    assert of_examples(rows) == [Prompt(chat[:2], "a"), Prompt((Message("user", "a b c d e f g h"),))]


FILES = {
    "a.txt": ("first\nsecond\n", [("first", ""), ("second", "")]),
    "a.csv": ("prompt,answer\nq1,a1\nq2,\n", [("q1", "a1"), ("q2", "")]),
    "a.jsonl": ('{"prompt": "=1+1"}\n{"prompt": "é"}\n', [("=1+1", ""), ("é", "")]),
    "b.jsonl": ('{"instruction": "do", "input": "it", "output": "ok"}\n', [("do\n\nit", "ok")]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_small_file_is_read_and_not_kept(tmp_path: Path, name: str) -> None:
    text, wanted = FILES[name]
    (tmp_path / name).write_text(text)
    studio = Studio(tmp_path / "root")
    assert [(one.text, one.target) for one in studio.prompts_in(tmp_path / name)] == wanted
    assert studio.data.list() == [] and list(studio.data.folder.iterdir()) == []


def test_a_file_that_is_too_long_or_no_table_says_so(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "root", replace(LAPTOP, prompts=3))
    for name, text in {"a.txt": "1\n2\n3\n4\n", "b.csv": "a,b\n1,2,3\n", "c.exe": "x", "d.jsonl": "{"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(StudioError):
            studio.prompts_in(tmp_path / name)


@pytest.mark.parametrize(
    ("prompts", "models", "tokens", "limits", "code"),
    [
        ([], 2, 9, LAPTOP, "E_NO_PROMPT"),
        (typed("p\n" * 21), 2, 9, SPACE, "E_LIMIT"),
        (typed("p" * 8001), 2, 9, SPACE, "E_LIMIT"),
        (typed("p"), 2, 257, SPACE, "E_LIMIT"),
        (typed("p\n" * 20), 5, 129, SPACE, "E_LIMIT"),
        (typed("p\n" * 20), 5, 128, SPACE, ""),
    ],
)
def test_a_set_has_bounds(prompts: list[Prompt], models: int, tokens: int, limits: Limits, code: str) -> None:
    if not code:
        return check_set(prompts, models, tokens, limits)
    with pytest.raises(StudioError) as caught:
        check_set(prompts, models, tokens, limits)
    assert caught.value.code == code


# ---- the table as files ----------------------------------------------------------------------------------------------

EVIL = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "a,b", 'say "x"', "two\r\nlines", " =1", "'=1", "é", ""]


def table(texts: list[str], target: str = "", name: str = "=run") -> Answers:
    prompts = tuple(Prompt((Message("user", text),), target) for text in texts)
    return Answers(("base", name), prompts, {number: (text, target) for number, text in enumerate(texts)})


@given(some.lists(some.one_of(some.sampled_from(EVIL), TEXTS), min_size=1, max_size=6))
def test_json_lines_give_every_text_back_as_it_is(texts: list[str]) -> None:
    lines = as_jsonl(table(texts, "t")).decode().split("\n")
    assert lines.pop() == ""
    for text, line in zip(texts, lines, strict=True):
        row = json.loads(line)
        assert row["messages"] == [{"role": "user", "content": text}] and row["target"] == "t"
        assert row["answers"] == [{"name": "base", "text": text}, {"name": "=run", "text": "t"}]


@given(some.lists(some.one_of(some.sampled_from(EVIL), TEXTS), min_size=1, max_size=6))
def test_no_cell_of_the_csv_is_a_formula_and_all_others_are_as_they_were(texts: list[str]) -> None:
    head, *lines = csv.reader(io.StringIO(as_csv(table(texts)).decode(), newline=""))
    assert head == ["prompt", "base", "'=run"]
    for text, (prompt, base, run) in zip(texts, lines, strict=True):
        assert prompt == base and not run and not prompt.startswith(("=", "+", "-", "@", "\t", "\r"))
        assert prompt == text or (prompt == f"'{text}" and text[0] in "=+-@\t\r")


def test_scores_stand_beside_the_answers_where_a_target_is_known() -> None:
    prompts = (Prompt((Message("user", "p"),), "the cat sat"), Prompt((Message("user", "q"),)))
    answers = Answers(("base", "r8"), prompts, {0: ("the cat ran", " the cat sat"), 1: ("x", "y")})
    assert scores("the cat ran", "the cat sat") == {"exact_match": 0.0, "rouge_l": pytest.approx(2 / 3)}
    assert scores("x", "") == {}
    first, second = means(answers)
    assert first == {"rows": 1, "exact_match": 0.0, "rouge_l": pytest.approx(2 / 3)}
    assert second == {"rows": 1, "exact_match": 1.0, "rouge_l": 1.0}
    head, scored, free = csv.reader(io.StringIO(as_csv(answers).decode(), newline=""))
    assert head[-4:] == ["exact_match: base", "rouge_l: base", "exact_match: r8", "rouge_l: r8"]
    assert scored[-4:] == ["0", "0.6667", "1", "1"] and free[-4:] == [""] * 4 and free[1] == ""
    told = prompt_set.picture(answers)
    assert [cell["score"] for cell in told["rows"][0]["answers"]] == ["ROUGE-L 0.67", "exact match"]
    assert told["scores"] == ["exact 0 of 1 · ROUGE-L 0.67", "exact 1 of 1 · ROUGE-L 1.00"]
    assert means(replace(answers, texts={})) == [{"rows": 0}, {"rows": 0}]


# ---- the page's handlers ---------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return ReadyDesk(Studio(tmp_path))


def two_runs(desk: Desk, tiny: Path, name: str = "orders r8") -> list[str]:
    choice = DataChoice(id=desk.studio.data.add_sample("orders").id)
    return [trained(desk.studio, tiny, choice, name).id for _ in range(2)]


def ask(desk: Desk, runs: list[str], source: str = answering.TYPED, typed: str = "a\nbb", tokens: int = 4) -> list:
    return list(prompt_set.answer(desk, runs, source, 3, typed, [], tokens))


def test_a_set_is_answered_by_base_and_runs_and_can_be_taken_away(desk: Desk, tiny: Path) -> None:
    runs = two_runs(desk, tiny)
    told, kept, problem = ask(desk, runs)[-1]
    assert problem == "" and told["line"] == "2 of 2 prompts answered"
    assert told["names"] == ["Base model", "orders r8", f"orders r8 · {runs[1][:8]}"]
    first, second = (row["answers"] for row in told["rows"])
    assert first[0] != first[1] == first[2] and second[0] != second[1] and told["scores"] == []
    for kind in ("csv", "jsonl"):
        address, problem = prompt_set.download(desk, kind, kept)
        file = desk.downloads.take(address.removeprefix("download/"), "")
        assert file and file.name == f"answers.{kind}" and problem == "" and "orders r8" in file.read_text()
    assert "E_NO_ANSWERS" in prompt_set.download(desk, "csv", None)[-1]
    told, *_ = ask(desk, runs[:1], answering.HELDOUT)[-1]
    assert len(told["rows"]) == 3 and all(row["target"].startswith("{") for row in told["rows"]) and told["scores"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"runs": []}, "E_NO_RUN"),
        ({"runs": ["0" * 32]}, "E_RUN_NOT_FOUND"),
        ({"typed": " \n "}, "E_NO_PROMPT"),
        ({"typed": "x" * 3000}, "E_CONTEXT"),
        ({"tokens": 4000}, "E_LIMIT"),
        ({"tokens": None}, "E_CONFIG"),
    ],
)
def test_what_cannot_be_answered_is_said(desk: Desk, tiny: Path, change: dict, code: str) -> None:
    runs = two_runs(desk, tiny)[:1]
    assert code in ask(desk, **{"runs": runs, **change})[-1][-1]


def test_the_list_of_several_keeps_what_is_still_there(desk: Desk, tiny: Path) -> None:
    runs = two_runs(desk, tiny)
    newest = answering.choices(desk.studio)[0][1]
    assert answering.list_several(desk, [runs[0], "0" * 32]).value == [runs[0]]
    assert answering.list_several(desk, None).value == [newest]
    assert [side.value for side in answering.list_sides(desk, None, None)] == ["base", newest]
    assert [side.value for side in answering.list_sides(desk, runs[0], "gone")] == [runs[0], newest]


def test_an_upload_becomes_prompts(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "p.csv").write_text("prompt,answer\nq,a\nr,\n")
    prompts, about, problem = prompt_set.open_file(desk, str(tmp_path / "in" / "p.csv"))
    assert [one.text for one in prompts] == ["q", "r"] and "2 prompts, 1 of them" in about and problem == ""
    assert not (tmp_path / "in").exists()  # taken out of the cache
    assert "E_READ" in prompt_set.open_file(desk, str(tmp_path / "in" / "p.csv"))[-1]
    assert prompt_set.open_file(desk, None) == ([], "", "")


def test_a_run_that_chooses_labels_gets_a_plain_word(desk: Desk, tiny: Path) -> None:
    config = RunConfig(name="tickets", model=str(tiny), dataset=DataChoice(id="0" * 32), task="classify")
    run = desk.studio.runs.create(config, {"labels": ["x", "y"]})
    assert "'tickets' chooses among labels and writes no text" in html.unescape(ask(desk, [run.id])[-1][-1])
