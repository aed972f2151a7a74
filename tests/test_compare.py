"""Laws of comparing: a batch of five is five answers, strength 0 is the base model, the curve's ends, word marks."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gradio as gr
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_studio import charts
from lora_studio.changes import WORD, changed_words
from lora_studio.core.lean import Tokens
from lora_studio.core.lora import LoRA, Row
from lora_studio.core.spec import BaselineSpec, LoraSpec
from lora_studio.data.formats import Example, Message
from lora_studio.errors import StudioError
from lora_studio.generate import Sampling, answers, base_difference, chances, classify, compare
from lora_studio.limits import LAPTOP
from lora_studio.measure import losses, mean_loss
from lora_studio.prompts import Prompt
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.settings import TrainConfig
from lora_studio.strength import STRENGTHS, StrengthCurve, strength_curve
from lora_studio.studio import Studio
from lora_studio.ui import api, compare_tab, tokens
from tests.tiny import CAUSAL, causal, classifier, tokenizer
from tests.visits import ReadyDesk, trained
from tests.visits import rows as rows_of

PROMPT = [5, 6, 7, 8, 9]
ROW = Tokens((5, 6, 7, 8, 9, 10, 11), (True, False, False, True, True, False, True))
FOUR = {
    "a": LoraSpec(rank=3, targets=("all-linear",)),
    "b": LoraSpec(rank=2),
    "c": LoraSpec(rank=5, targets=("attn.v",), variant="dora"),
    "d": LoraSpec(rank=1, targets=("mlp.up",)),
}
FIVE: list[Row] = [None, *FOUR]


def with_adapters(family: str = "llama", *, seed: int = 1, vocabulary: int = 0) -> LoRA:
    """Four adapters of different shapes, each with every value drawn."""
    lora = LoRA(causal(family, vocabulary=vocabulary or len(tokenizer())))
    draws = torch.Generator().manual_seed(seed)
    for name, spec in FOUR.items():
        wanted = {role for role in spec.targets if role != "mlp.up" or family not in ("gpt_neox", "phi3", "gpt2")}
        lora.add(name, replace(spec, targets=tuple(sorted(wanted)) or ("attn.q",)))
        for tensor in lora.parameters(name):
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=draws)
    return lora


@pytest.mark.parametrize("family", CAUSAL)
def test_the_rows_of_a_batch_of_five_are_what_each_says_alone(family: str) -> None:
    lora, sampling = with_adapters(family), Sampling(max_new_tokens=10)
    (*_, together) = compare(lora, tokenizer(), PROMPT, FIVE, sampling)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode(), lora.use(*FIVE):
        logits = lora.model(input_ids=ids.expand(5, -1)).logits
    for place, row in enumerate(FIVE):
        with torch.inference_mode(), lora.use(row):
            alone = lora.model(input_ids=ids).logits[0]
            said = answers(lora.model, tokenizer(), [PROMPT], sampling)
        assert torch.allclose(logits[place], alone, rtol=0, atol=1e-5)
        assert [together[place].text] == said
    assert len({answer.text for answer in together}) > 2  # they do differ


@pytest.mark.parametrize("family", CAUSAL)
def test_a_row_of_strength_zero_is_the_base_model_bit_for_bit(family: str) -> None:
    lora = with_adapters(family)
    rows: list[Row] = [None, {"a": 0.0}, {"b": 0.5}, {"c": 1.5}, {"d": 2.0, "a": 0.0}]
    ids = torch.tensor([PROMPT] * len(rows))
    with torch.inference_mode(), lora.use(*rows):
        mixed = lora.model(input_ids=ids).logits
    with torch.inference_mode():
        untouched = lora.detach()(input_ids=ids).logits
    assert torch.equal(mixed[:2], untouched[:2]) and not any(map(torch.equal, mixed[2:], untouched[2:]))


def test_the_check_of_the_base_looks_at_rows_of_strength_zero_too() -> None:
    lora = with_adapters()
    assert base_difference(lora, PROMPT, [None, {"a": 0.0}, "b"]) == 0.0
    assert base_difference(lora, PROMPT, [{"a": 0.0}, "b"]) == 0.0
    lora._parts["a"]["model.layers.0.mlp.up_proj"][0].B.data[0, 0] = float("nan")  # 0 times it is no 0
    assert base_difference(lora, PROMPT, [{"a": 0.0}, "b"]) != 0.0


# ---- the wanted answer, token by token -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL)
def test_chances_of_a_wanted_answer_are_what_its_loss_says(family: str) -> None:
    lora = with_adapters(family)
    found = chances(lora, FIVE, ROW)
    for row, own in zip(FIVE, found, strict=True):
        with torch.inference_mode(), lora.use(row):
            assert own == pytest.approx((-losses(lora, [ROW])).exp().tolist(), abs=1e-5)
    assert [len(own) for own in found] == [ROW.count] * 5 == [3] * 5  # the first token has nothing before it


# ---- strength --------------------------------------------------------------------------------------------------------


def test_the_curve_begins_at_the_base_passes_the_adapter_and_ends_at_its_double() -> None:
    lora, rows = with_adapters(), [ROW, Tokens((9, 8, 7), (False, True, True))]
    (*grown, curve) = strength_curve(lora, "a", rows)
    assert [len(one.losses) for one in grown] == [*range(1, 9)] and tuple(curve.losses) == STRENGTHS
    with lora.use("a"):
        assert curve.losses[1.0] == pytest.approx(mean_loss(lora, rows), abs=1e-6)
    for _, part in lora.parts("a"):
        part.B.data *= 2  # type: ignore[union-attr]
    with lora.use("a"):
        assert curve.losses[2.0] == pytest.approx(mean_loss(lora, rows), abs=1e-5)
    untouched = LoRA(lora.detach())
    assert curve.losses[0.0] == mean_loss(untouched, rows)


def test_the_curve_of_a_classifier_goes_from_its_own_head_to_the_trained_one() -> None:
    lora = LoRA(classifier("bert"))
    lora.add("x", LoraSpec(rank=2, modules_to_save=("classifier",)))
    for tensor in lora.parameters("x"):
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    row = Tokens((5, 6, 7), (False,) * 3, 2)
    (*_, curve) = strength_curve(lora, "x", [row])
    for strength, used in {0.0: None, 0.5: {"x": 0.5}, 1.0: "x"}.items():
        (found,) = classify(lora, [used], row.ids, ("a", "b", "c"))
        assert curve.losses[strength] == pytest.approx(-torch.tensor(found[2]).log().item(), abs=1e-5)


NAN = float("nan")


@pytest.mark.parametrize(
    ("measured", "best", "trained"),
    [
        ({0: 2.0}, 0, False),
        ({0: 2.0, 0.5: 0.5, 1: 0.4, 1.5: 0.45}, 1, True),
        ({0: 2.0, 0.5: 0.3, 1: 0.4}, 0.5, False),
        ({0: 2.0, 0.5: 1.000, 1: 1.009}, 0.5, True),  # 0.9 % of the gain
        ({0: 2.0, 0.5: 2.5, 1: 3.0}, 0, False),
        ({0: 2.0, 1: 2.0}, 0, True),
        ({0: 2.0, 0.5: 1.0, 1: NAN}, 0.5, False),
        ({0: NAN, 1: NAN}, None, False),
    ],
)
def test_the_best_strength(measured: dict[float, float], best: float | None, trained: bool) -> None:
    curve = StrengthCurve(losses=measured)
    assert (curve.best, curve.trained_is_best) == (best, trained)
    told = curve.as_json()
    figure = charts.strength_curve(told)
    assert NAN not in list(figure.data[0].y) and len(figure.data) == (1 if best is None else 2)
    if best is not None:
        assert (list(figure.data[1].x), list(figure.data[1].y)) == ([best], [measured[best]])


# ---- words -----------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.sampled_from("ab ,\nä1<"), max_size=30)


def words(text: str) -> list[str]:
    return [word for word in WORD.findall(text) if not word.isspace()]


def is_within(some: list[str], every: list[str]) -> bool:
    """Whether they come in this order."""
    rest = iter(every)
    return all(word in rest for word in some)


@given(TEXTS, TEXTS)
def test_marked_parts_are_the_text_and_what_is_not_marked_stands_in_the_other(text: str, before: str) -> None:
    parts = changed_words(text, before)
    assert "".join(part for part, _ in parts) == text and all(part for part, _ in parts)
    kept = [word for part, differs in parts if not differs for word in words(part)]
    assert is_within(kept, words(before)) and is_within(kept, words(text))
    assert all(one != other for (_, one), (_, other) in pairwise(parts))
    assert changed_words(text, text) == ([(text, False)] if text else [])


def test_the_words_that_differ_are_marked() -> None:
    before = 'Sure: {"name": "Tom", "size": "large"}'
    marked = changed_words('{"name": "Maya Lee", "size": "large"}', before)
    assert [part for part, differs in marked if differs] == ["Maya Lee"]
    assert changed_words("b <b>", "") == [("b <b>", True)]


def test_an_endless_loop_is_compared_in_no_time() -> None:
    text, before = "the cat sat, " * 900, "the cat sat on the cat, " * 600
    assert "".join(part for part, _ in changed_words(text, before)) == text
    assert changed_words(text, text) == [(text, False)]


# ---- Studio ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("root"), replace(LAPTOP, answers_at_once=4))


@pytest.fixture(scope="module")
def runs(studio: Studio, tiny: Path) -> list[Run]:
    choice = DataChoice(id=studio.data.add_text(rows_of("say")).id)
    made = [trained(studio, tiny, choice, f"run {number}") for number in range(4)]
    for number, run in enumerate(made):  # the helper draws the same values for each
        file = run.path / "adapter" / "adapter_model.safetensors"
        _scaled(file, 1 + 3 * number)
    return made


def _scaled(file: Path, times: float) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: tensor * times for name, tensor in load_file(file).items()}, file)


SHORT = Sampling(max_new_tokens=8)


def test_a_comparison_of_four_runs_is_that_of_each(studio: Studio, runs: list[Run]) -> None:
    ids = [run.id for run in runs]
    (*_, together) = studio.compare(ids, "say 3", sampling=SHORT)
    assert together.names == ("base", *ids) and together.base_difference == 0.0 and together.exact
    for place, run in enumerate(ids, start=1):
        (*_, alone) = studio.compare([run], "say 3", sampling=SHORT)
        assert [one.text for one in alone.answers] == [together.answers[0].text, together.answers[place].text]
    (*_, twice) = studio.compare([ids[0], ids[0]], "say 3", sampling=SHORT)
    assert twice.answers[1] == twice.answers[2]
    with pytest.raises(StudioError) as caught:
        next(studio.compare([*ids, ids[0]], "say 3"))
    assert caught.value.code == "E_LIMIT"


def test_one_run_at_several_strengths_is_one_comparison(studio: Studio, runs: list[Run]) -> None:
    run = runs[3].id
    strengths = (0.0, 0.5, 1.0, 2.0)
    (*_, last) = studio.compare([{run: strength} for strength in strengths], "say 3", sampling=SHORT)
    assert last.names == ("base", *[run] * 4) and last.base_difference == 0.0
    assert last.answers[0] == last.answers[1]
    for place, strength in enumerate(strengths, start=1):
        (*_, alone) = studio.compare([run], "say 3", strength=strength, sampling=SHORT)
        assert alone.answers[1] == last.answers[place]
    (*_, blend) = studio.compare([{runs[0].id: 0.5, run: 1.0}], "say 3", sampling=SHORT)
    assert blend.names == ("base", f"{runs[0].id} + {run}")
    for wrong in (-0.1, 4.1, NAN):
        with pytest.raises(StudioError) as caught:
            next(studio.compare([{run: 1.0}, {run: wrong}], "say 3"))
        assert caught.value.code == "E_STRENGTH"


def test_the_strength_curve_is_measured_on_the_rows_of_the_run(studio: Studio, runs: list[Run]) -> None:
    (*_, curve) = studio.strength_curve(runs[0].id)
    measured = studio.evaluate(runs[0].id)  # all its held-out rows, which are few
    assert curve.losses[0.0] == pytest.approx(measured["base"]["loss"], abs=1e-5)
    assert curve.losses[1.0] == pytest.approx(measured["adapted"]["loss"], abs=1e-5)


def test_a_wanted_answer_is_looked_at_token_by_token(
    studio: Studio, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [run.id for run in runs]
    found = studio.wanted(ids, 1)
    assert "".join(found.texts) == studio.heldout(ids[0], 2)[1].target + "<|end|>" and found.left == 0
    assert found.names == ("base", *ids) and {len(row) for row in found.chances} == {len(found.texts)}
    assert all(0 <= chance <= 1 for row in found.chances for chance in row) and found.chances[0] != found.chances[1]
    monkeypatch.setattr("lora_studio.studio.WANTED_TOKENS", 3)
    less = studio.wanted(ids, 1)
    assert less.texts == found.texts[:3] and less.left == len(found.texts) - 3
    assert less.chances[1] == pytest.approx(found.chances[1][:3], abs=1e-6)  # what comes behind is not seen


def test_virtual_tokens_have_no_strengths_between(studio: Studio, runs: list[Run], tiny: Path) -> None:
    config = RunConfig(name="p", model=str(tiny), dataset=runs[0].config.dataset, method=BaselineSpec(kind="prefix"))
    run = studio.runs.create(replace(config, train=TrainConfig(steps=2)), {})
    for asked in (studio.strength_curve(run.id), studio.compare([{run.id: 0.5}], "say 3")):
        with pytest.raises(StudioError) as caught:
            next(asked)
        assert caught.value.code == "E_STRENGTH"


# ---- the page's handlers ---------------------------------------------------------------------------------------------

RAW = {"max_new_tokens": 6, "temperature": 0.8, "top_p": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def desk(studio: Studio) -> ReadyDesk:
    return ReadyDesk(studio)


def test_answers_stream_into_a_pane_each_and_differences_are_marked_at_the_end(
    desk: ReadyDesk, runs: list[Run]
) -> None:
    one, *others = [run.id for run in runs]
    moments = list(compare_tab.compare(desk, one, others, "say 3", None, compare_tab.GREEDY, 1.0, **RAW))
    assert all(problem == "" and len(panes) == 5 for panes, problem in moments)
    first, last = moments[0][0], moments[-1][0]
    assert {pane["pace"] for pane in first} == {"Loading the base model"}
    assert [pane["title"] for pane in last] == ["Base", *(run.name for run in runs)]
    assert last[0]["badge"] == ("good", "Checked: equal to the untouched model (max difference 0)")
    assert any(marked for pane in last[1:] for _, marked in pane["parts"])
    assert not any(marked for panes, _ in moments[:-2] for pane in panes for _, marked in pane["parts"])
    assert all(pane["pace"].startswith("6 tokens") for pane in last)


def test_five_strengths_of_one_run_stand_side_by_side(desk: ReadyDesk, runs: list[Run]) -> None:
    *_, (last, problem) = compare_tab.compare_strengths(desk, runs[3].id, "say 3", None, compare_tab.GREEDY, **RAW)
    assert problem == "" and [pane["title"] for pane in last] == [f"Strength {one}" for one in (0, 0.5, 1, 1.5, 2)]
    texts = ["".join(text for text, _ in pane["parts"]) for pane in last]
    *_, (alone, _) = compare_tab.compare(desk, runs[3].id, [], "say 3", None, compare_tab.GREEDY, 1.0, **RAW)
    assert ["".join(text for text, _ in pane["parts"]) for pane in alone] == [texts[0], texts[2]]


def test_a_comparison_that_cannot_be_leaves_no_empty_panes(desk: ReadyDesk, runs: list[Run]) -> None:
    *_, (panes, cleared), (_, problem) = compare_tab.compare(
        desk, runs[0].id, [], " ", None, compare_tab.GREEDY, 1.0, **RAW
    )
    assert (panes, cleared) == ([], "") and "E_NO_PROMPT" in problem


def test_chips_are_three_held_out_rows_and_two_prompts_that_were_not_taught(
    desk: ReadyDesk, studio: Studio, runs: list[Run]
) -> None:
    chips = compare_tab.list_prompts(desk, runs[0].id)
    known = [(row.prompt[-1].content, row.target) for row in studio.heldout(runs[0].id, 2)]  # it has two
    assert [(one["prompt"], one["target_text"]) for one in chips] == [
        *known,
        *((one, "") for one in compare_tab.OFF_TOPIC),
    ]
    assert compare_tab.list_prompts(desk, None) == compare_tab.list_prompts(desk, "0" * 32) == []


def test_a_held_out_row_is_asked_with_all_that_was_said_before(
    desk: ReadyDesk, studio: Studio, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (Message("system", "Be brief."), Message("user", "say 3"))
    monkeypatch.setattr(studio, "heldout", lambda run, limit=5: [Example((*said, Message("assistant", "3")))][:limit])
    (chip, *_) = compare_tab.list_prompts(desk, runs[3].id)
    assert (chip["prompt"], chip["before"]) == ("say 3", 1)
    assert "with the 1 message that this row has before it" in compare_tab.expectation("3", chip["before"])
    *_, (last, problem) = compare_tab.compare(desk, runs[3].id, [], "say 3", 0, compare_tab.GREEDY, 1.0, **RAW)
    assert problem == ""
    found: dict[int, list[str]] = {}
    for some in studio.answer_prompts(["base", runs[3].id], [Prompt(said)], Sampling(max_new_tokens=6)):
        found |= some.texts
        assert some.base_difference == 0 and some.exact
    assert ["".join(text for text, _ in pane["parts"]) for pane in last] == found[0]
    *_, (plain, _) = compare_tab.compare(desk, runs[3].id, [], "say 3", None, compare_tab.GREEDY, 1.0, **RAW)
    assert plain != last
    assert compare_tab.keep_answer(desk, runs[3].id, "say 3", 0) == (gr.skip(), gr.skip())
    assert compare_tab.keep_answer(desk, runs[3].id, "say 4", 0)[0] is None
    assert compare_tab.keep_answer(desk, runs[3].id, "say 3", None)[0] is None


def test_stop_says_that_what_waited_has_stopped() -> None:
    shown, *_ = compare_tab.clear()
    waiting = [*shown, {**shown[0], "pace": "6 tokens"}]
    stopped, *_ = compare_tab.stop(waiting)
    assert [one["pace"] for one in stopped] == ["Stopped", "6 tokens"]


def test_runs_that_do_not_fit_are_named_with_the_reason(
    desk: ReadyDesk, studio: Studio, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def like(run: Run, **change: object) -> Run:
        return replace(run, id=f"{len(str(change)):032x}", config=replace(runs[0].config, **change))

    labelled = replace(like(runs[0], name="<b>"), facts={"labels": ["a", "b"]})
    far = [like(runs[0], name=f"far {number * 'x'}", model="elsewhere") for number in range(5)]
    monkeypatch.setattr(Run, "has_adapter", True)
    monkeypatch.setattr(studio.runs, "list", lambda: [*runs, labelled, *far])
    box, line = compare_tab.list_others(desk, runs[0].id, [runs[1].id, far[0].id, "0" * 32])
    assert [value for _, value in box.choices] == [run.id for run in runs[1:]] and box.value == [runs[1].id]
    assert "for another task: &lt;b&gt;" in line and "on elsewhere: far , far x, far xx and 2 more" in line
    untouched, _ = compare_tab.list_others(desk, runs[0].id, [runs[1].id])
    assert "value" not in untouched._constructor_args[0] and "value" in box._constructor_args[0]
    assert compare_tab.list_others(desk, None, [])[1] == ""
    assert compare_tab.list_others(desk, labelled.id, [])[0].choices == []


def test_tokens_of_a_wanted_answer_are_asked_for_by_its_row(desk: ReadyDesk, studio: Studio, runs: list[Run]) -> None:
    known = studio.heldout(runs[0].id, 2)[1]
    *_, (shown, line, problem) = compare_tab.look_at_tokens(desk, runs[0].id, [runs[1].id], 1, 1.0)
    assert problem == "" and "".join(shown["texts"]) == known.target + "<|end|>"
    assert [row["name"] for row in shown["rows"]] == ["Base", "run 0", "run 1"] and "Base " in line
    found = studio.wanted([runs[0].id], 1)
    assert shown["rows"][1]["chances"] == pytest.approx(found.chances[1], abs=1e-4)
    *_, (other, line, _) = compare_tab.look_at_tokens(desk, runs[0].id, [runs[1].id], 1, 0.0)
    assert other["rows"][1]["chances"] == other["rows"][0]["chances"] and "at strength 0:" in line
    ((*_, problem),) = compare_tab.look_at_tokens(desk, runs[0].id, [], None, 1.0)
    assert "E_NO_ANSWER" in problem


@pytest.mark.parametrize(
    ("chance", "said"),
    [(1.0, "100 %"), (0.9996, "100 %"), (0.5, "50 %"), (0.0123, "1.2 %"), (0.0009, "under 0.1 %"), (0, "under 0.1 %")],
)
def test_chances_are_said_in_percent(chance: float, said: str) -> None:
    assert tokens.percent(chance) == said


def test_the_curve_grows_and_ends_in_words(desk: ReadyDesk, runs: list[Run]) -> None:
    *grown, (drawn, line, problem) = compare_tab.measure(desk, runs[0].id)
    assert problem == "" and "verdict" in line and "the base model" in line and len(grown) == 1 + len(STRENGTHS)
    assert list(drawn["data"][0]["x"]) == list(STRENGTHS) and "Measured up to strength 0.25 of 2" in grown[2][1]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({0: 2.0, 0.75: 0.029, 1: 0.031}, "Lowest at 0.75: 0.029; at 1, as trained, it is as good, 0.031"),
        ({0: 2.0, 0.75: 0.5, 1: 0.75}, "Best at 0.75: 0.5; at 1, as trained, it is 0.75; the base model has 2."),
        ({0: 2.0, 0.75: 0.5, 1: 0.4}, "Best at 1, as trained: 0.4; the base model has 2."),
        (
            {0: 2.0, 0.75: 2.5, 1: NAN},
            "No strength is better than the base model, which has 2; at 1, as trained, it is no",
        ),
        ({0: NAN, 1: NAN}, "The held-out loss is no number at any strength."),
    ],
)
def test_the_curve_in_words(losses: dict[float, float], said: str) -> None:
    line = compare_tab.strength_line(StrengthCurve(losses=losses).as_json(), "<b>")
    assert f"&lt;b&gt;: {said[0].lower()}{said[1:]}" in line


def test_programs_compare_several_runs_at_once(desk: ReadyDesk, studio: Studio, runs: list[Run]) -> None:
    ids = [run.id for run in runs[:3]]
    *_, texts = api.compare_runs(desk, ids, "say 3", max_new_tokens=8)
    (*_, last) = studio.compare(ids, "say 3", sampling=SHORT)
    assert texts == [answer.text for answer in last.answers]
    with pytest.raises(StudioError) as caught:
        next(api.compare_runs(desk, [], "say 3"))
    assert caught.value.code == "E_RUN_NOT_FOUND"
