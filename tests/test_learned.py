"""Did it learn? Verdicts and intervals by laws; looking with a tiny model; the worker's record and what reads it."""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_studio import learned as module
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.data.batches import encode, encode_label
from lora_studio.data.formats import Example, Message
from lora_studio.events import Event, Learned
from lora_studio.general import PASSAGES, TOKENS, passages
from lora_studio.learned import Row, bootstrap, fitting, judge, look, score, told, wilson
from lora_studio.runs.attempt import Attempt
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.runs.store import OVER, RunStore, claim, read_json, write_json
from lora_studio.runs.worker import work
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from tests.crash import Crash
from tests.tiny import causal, classifier, tokenizer

PATIENT = settings(deadline=None)
KINDS = {"learnt", "memorised", "no change", "broken", "untested"}


def rows(train: tuple[float, float], heldout: tuple[float, float], *, answer: str = "right", base: str = "x") -> list:
    """Five rows of each part with these losses; the adapted answer is the same in each."""
    return [
        Row(part=part, prompt=f"p{n}", target="right", base=base, adapted=answer, base_loss=pair[0], loss=pair[1])
        for part, pair in (("train", train), ("heldout", heldout))
        for n in range(5)
    ]


def kind(made: list[Row], **more: Any) -> str:
    return judge(made, score=score(made, "exact_match"), **more).kind


# ---- judging ---------------------------------------------------------------------------------------------------------


@PATIENT
@given(st.floats(0.2, 50), st.floats(0.2, 50))
def test_a_perfect_adapter_has_learnt_and_equal_sides_are_no_change(train: float, heldout: float) -> None:
    assert kind(rows((train, 0.0), (heldout, 0.0))) == "learnt"
    assert kind(rows((train, train), (heldout, heldout), answer="x")) == "no change"


@PATIENT
@given(st.floats(0.2, 50), st.floats(0.0, 0.8), st.floats(0.97, 3))
def test_a_fall_on_training_rows_alone_is_memorised(loss: float, left: float, kept: float) -> None:
    said = judge(rows((loss, left * loss), (loss, kept * loss), answer="wrong"))
    assert said.kind == "memorised" and f"{loss:.3g}" in said.sentence and said.advice


@pytest.mark.parametrize("bad", ["", "   \n", "no no no no no no no no no no no no ", "a" * 40])
def test_answers_that_are_empty_or_go_round_are_broken_whatever_the_losses(bad: str) -> None:
    said = judge(rows((2.0, 0.1), (2.0, 0.1), answer=bad))
    assert said.kind == "broken" and "10 of 10" in said.sentence
    assert kind(rows((2.0, 2.0), (2.0, 2.0), answer=bad, base=bad)) == "no change"  # so they were before


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_a_loss_that_is_no_number_and_one_that_rises_everywhere_are_broken(part: str) -> None:
    made = rows((2.0, 1.0), (2.0, 1.0))
    at = next(place for place, row in enumerate(made) if row.part == part)
    made[at] = dataclasses.replace(made[at], loss=math.nan)
    assert kind(made) == "broken"
    assert kind(rows((2.0, 2.5), (2.0, 2.5))) == kind(rows((2.0, 2.0), (2.0, 2.5))) == "broken"


losses = st.tuples(st.floats(0.1, 20), st.floats(0, 20))


@PATIENT
@given(losses, losses, st.sampled_from(["right", "x", "", "other"]), st.randoms())
def test_the_order_of_rows_says_nothing_and_every_case_has_a_verdict(
    train: Any, held: Any, text: str, dice: Any
) -> None:
    made = rows(train, held, answer=text)
    said = judge(made)
    dice.shuffle(made)
    assert judge(made) == said and said.kind in KINDS and said.sentence.endswith(".") and said.advice


@PATIENT
@given(losses, losses)
def test_no_adapter_and_its_reverse_have_both_learnt(train: Any, held: Any) -> None:
    there = kind(rows(train, held, answer="y", base="z"))
    back = kind(rows(train[::-1], held[::-1], answer="z", base="y"))
    assert not there == back == "learnt"


def test_what_training_measured_of_all_rows_counts_more_than_the_few() -> None:
    made = rows((2.0, 1.0), (2.0, 1.0), answer="y")
    assert judge(made, heldout=(2.0, 2.0)).kind == "memorised" and judge(made).kind == "learnt"


def test_without_held_out_rows_it_says_that_it_cannot_tell() -> None:
    assert judge(rows((2.0, 0.1), (2.0, 0.1))[:5]).kind == "untested"
    assert judge(rows((2.0, 2.0), (2.0, 2.0))[:5]).kind == "no change"


def test_forgetting_is_said_where_there_is_some() -> None:
    made = rows((2.0, 1.0), (2.0, 1.0))
    assert "forgot" in judge(made, general=(3.0, 3.6)).advice and "forgot" not in judge(made, general=(3.0, 3.1)).advice


def test_rows_that_the_base_knew_leave_nothing_to_learn() -> None:
    assert "knew" in judge(rows((0.01, 0.01), (0.01, 0.01))).sentence


def test_a_score_that_is_surely_better_is_learning_too() -> None:
    made = [dataclasses.replace(row, part="heldout") for row in rows((2.0, 2.0), (2.0, 2.0)) * 2]
    assert kind(made) == "learnt"


# ---- scores ----------------------------------------------------------------------------------------------------------


@PATIENT
@given(st.integers(1, 200).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilsons_interval_holds_the_share_and_mirrors(trial: tuple[int, int]) -> None:
    hits, count = trial
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1 and high - low > 0
    assert wilson(count - hits, count) == pytest.approx((1 - high, 1 - low))
    z = 1.96  # its ends solve |p - p'| = z sqrt(p'(1 - p') / n)
    for end in (low, high):
        if 0 < end < 1:
            assert abs(hits / count - end) == pytest.approx(z * math.sqrt(end * (1 - end) / count), abs=1e-9)


@PATIENT
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_the_bootstrap_is_the_same_each_time_and_lies_among_the_rows(differences: list[float]) -> None:
    low, high = bootstrap(differences, draws=200)
    assert (low, high) == bootstrap(differences, draws=200)
    assert min(differences) - 1e-9 <= low <= high <= max(differences) + 1e-9


def test_its_width_is_that_of_the_normal_law_where_rows_are_many() -> None:
    sample = [math.sin(n) for n in range(400)]
    low, high = bootstrap(sample)
    error = statistics.pstdev(sample) / math.sqrt(len(sample))
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_the_figure_follows_the_answers() -> None:
    assert (
        fitting(["billing", "returns"] * 20) == "accuracy" and fitting(["a b c d e f g h"], labels=True) == "accuracy"
    )
    assert fitting([str(n) for n in range(30)]) == "exact_match"
    assert fitting([json.dumps({"items": ["a b c d e f g h"], "n": n}) for n in range(30)]) == "exact_match"
    longer = [f"this is quite a long sentence about the number {n}" for n in range(30)]
    assert fitting(longer) == "rouge_l"
    assert fitting(longer, [f"{n} Mal ein ganz schön langer Satz" for n in range(30)]) == "bleu"  # said again
    assert fitting(longer, ["word " * 60] * 30) == "rouge_l"  # summed up
    assert fitting(longer, ["why?"] * 30) == "rouge_l"  # answered at length


@pytest.mark.parametrize("name", module.NAMES)
def test_a_score_is_of_held_out_rows_that_both_sides_answered(name: str) -> None:
    made = rows((2.0, 1.0), (2.0, 1.0))
    made[-1] = dataclasses.replace(made[-1], adapted=None)
    found = score(made, name)
    assert found and (found.rows, found.base, found.adapted) == (4, 0.0, 1.0) and found.better
    assert (
        found.interval == ("paired bootstrap" if name in module.OVERLAPS else "Wilson") and "0% to 100%" in found.words
    )
    assert score(made[:5], name) is None


# ---- looking ---------------------------------------------------------------------------------------------------------


def pairs(words: Any, count: int, first: int = 0) -> list:
    made = [
        Example(messages=(Message("user", f"say {n}"), Message("assistant", "ab" * (1 + n % 3))), row=n)
        for n in range(first, first + count)
    ]
    return [(one, encode(words, one, 512).tokens) for one in made]


def test_a_fresh_adapter_is_its_base_in_every_row_and_looking_leaves_no_route() -> None:
    words = tokenizer()
    lora = LoRA(causal("llama", vocabulary=len(words)))
    lora.add("x", LoraSpec())
    (*_, found) = look(lora, "x", words, pairs(words, 7), pairs(words, 30, 50), ())
    assert [row.part for row in found] == ["train"] * 5 + ["heldout"] * 30 and lora.in_use == ()
    assert all(row.base == row.adapted and row.base is not None for row in found)
    shown = [row for row in found if row.loss is not None]
    assert len(shown) == 10 and all(row.loss == row.base_loss for row in shown)
    assert judge(found).kind == "no change"
    for moment in look(lora, "x", words, pairs(words, 7), pairs(words, 3, 50), ()):
        assert len(moment) == 8  # whenever it is broken off, there are all rows
        break
    assert lora.in_use == ()


def test_a_classifier_answers_with_its_labels_and_plain_text_is_not_asked() -> None:
    words, names = tokenizer(), ("bad", "good")
    lora = LoRA(classifier("bert", labels=2, vocabulary=len(words)))
    lora.add("x", LoraSpec(modules_to_save=("classifier",)))
    made = [Example(messages=(Message("user", f"t{n}"), Message("assistant", names[n % 2])), row=n) for n in range(9)]
    labelled = [(one, encode_label(words, one, names, 64).tokens) for one in made]
    (*_, found) = look(lora, "x", words, labelled[:2], labelled[2:], names)
    assert len(found) == 9 and all(row.base in names and row.base == row.adapted for row in found)
    assert all(row.loss is not None for row in found)

    lora = LoRA(causal("gpt2", vocabulary=len(words)))
    lora.add("x", LoraSpec())
    text = Example(text="Once upon a time.")
    (*_, found) = look(lora, "x", words, [(text, encode(words, text, 64).tokens)], [], ())
    assert found[0].adapted is None and found[0].loss and found[0].target == text.text and not found[0].prompt


def test_the_record_is_plain_json_of_bounded_length() -> None:
    made = rows((2.0, 1.0), (2.0, math.nan), answer="y" * 5000)
    event = told(made, step=3, figure="exact_match", heldout=(None, math.inf), general=(3.0, 3.1))
    assert event and event.verdict == "broken" and event.losses["heldout"] == [2.0, None]
    text = json.dumps(dataclasses.asdict(event), allow_nan=False)
    assert len(text) < 10 * 4 * (module.CHARACTERS + 100) and len(event.rows) == 10
    assert told([], step=0, figure="accuracy", heldout=(None, math.inf), general=(None, None)) is None


def test_the_general_text_is_small_and_read_whole_by_a_usual_tokenizer() -> None:
    found = passages(tokenizer())
    assert len(found) == len(PASSAGES) and {len(one.tokens.ids) for one in found} == {TOKENS}  # a token per byte here
    assert max(len(one.tokens.ids) for one in passages(tokenizer(), 16)) == 16
    assert all(len(passage) / 4 < TOKENS and passage.isascii() for passage in PASSAGES)


# ---- the worker's look -----------------------------------------------------------------------------------------------


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    yield Studio(tmp_path)


def begun(studio: Studio, tiny: Path, **train: Any) -> Run:
    """A run that waits for the worker's code in this process."""
    made = "\n".join(json.dumps({"prompt": f"say {n}", "completion": "ab" * (1 + n % 3)}) for n in range(20))
    dataset = studio.data.add_text(made)
    settings = {"steps": 4, "batch_size": 4, "evaluations": 2, "samples": 1, "learning_rate": 0.05} | train
    method = LoraSpec(rank=4, targets=("all-linear",))
    config = RunConfig(
        name="tiny r4", model=str(tiny), dataset=DataChoice(id=dataset.id), method=method, train=TrainConfig(**settings)
    )
    return studio.runs.create(config, {})


def attempt(run: Run) -> None:
    (run.path / "worker.log").touch()
    with claim(run.path) as lock:
        work([Attempt(run.path, lock)])


def of(studio: Studio, run: Run, kind: str) -> list[dict]:
    return [record for record in studio.runs.events(run.id) if record["type"] == kind]


def test_a_run_ends_with_its_record_and_everybody_reads_the_same(studio: Studio, tiny: Path) -> None:
    run = begun(studio, tiny, steps=30)
    attempt(run)
    (record,) = of(studio, run, "Learned")
    assert [one["type"] for one in studio.runs.events(run.id)[-2:]] == ["Learned", "Ended"]
    view = studio.runs.get(run.id)
    assert view.verdict == record["verdict"] in KINDS and RunStore(studio.root).get(run.id).verdict == view.verdict
    assert studio.learned(run.id) == record and not (run.path / OVER).exists()
    assert [row["part"] for row in record["rows"]] == ["train"] * 5 + ["heldout"] * 2
    assert record["losses"]["heldout"] == [view.summary["base_loss"], view.summary["best_loss"]]
    general = [one["values"]["general_loss"] for one in of(studio, run, "Metric") if "general_loss" in one["values"]]
    steps = [one["step"] for one in of(studio, run, "Metric") if "general_loss" in one["values"]]
    assert steps == [0, 15, 30] and record["losses"]["general"] == [general[0], general[steps.index(record["step"])]]
    seen = {row["prompt"] for row in record["rows"] if row["part"] == "train"}
    assert seen.isdisjoint(example.prompt[-1].content for example in studio.heldout(run.id))


def test_the_general_text_changes_nothing_in_the_training(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_, without = begun(studio, tiny), begun(studio, tiny)
    attempt(with_)
    monkeypatch.setattr("lora_studio.general.passages", lambda *_: [])
    attempt(without)
    names = ("train_loss", "heldout_loss", "grad_norm")
    curves = [
        [(one["step"], *map(one["values"].get, names)) for one in of(studio, run, "Metric")] for run in (with_, without)
    ]
    assert curves[0] == curves[1]
    assert (with_.path / "adapter/adapter_model.safetensors").stat().st_size
    assert "general" in of(studio, with_, "Learned")[0]["losses"]
    assert "general" not in of(studio, without, "Learned")[0]["losses"]


def test_without_held_out_rows_and_samples_a_step_is_saved_once(studio: Studio, tiny: Path) -> None:
    run = begun(studio, tiny, holdout=0.0, samples=0)
    attempt(run)
    assert [one["step"] for one in of(studio, run, "Saved")] == [2, 4]
    assert studio.runs.get(run.id).verdict in ("untested", "no change", "broken")


@pytest.mark.parametrize("error", [RuntimeError("no"), MemoryError(), KeyError("x")])
def test_a_look_that_fails_costs_the_record_alone(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> Iterator[list[Row]]:
        raise error
        yield []

    monkeypatch.setattr(module, "look", fail)
    run = begun(studio, tiny)
    attempt(run)
    view = studio.runs.get(run.id)
    assert view.status == "done" and not view.error and view.has_adapter and view.verdict == ""
    assert not of(studio, run, "Learned") and not (run.path / OVER).exists()


def looking(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], Any]) -> list[int]:
    """Call `act` with the number of each piece of a look, before it is made; the numbers so far."""
    pieces: list[int] = []
    real = look

    def watched(*given: Any) -> Iterator[list[Row]]:
        for moment in real(*given):
            pieces.append(len(pieces) + 1)
            act(pieces[-1])
            yield moment

    monkeypatch.setattr(module, "look", watched)
    return pieces


@pytest.mark.parametrize("at", [1, 3, 6])
def test_killed_while_it_looks_a_run_is_done_and_what_it_kept_is_there(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    def kill(piece: int) -> None:
        if piece == at:
            raise Crash

    looking(monkeypatch, kill)
    run = begun(studio, tiny)
    with pytest.raises(Crash):
        attempt(run)
    view = RunStore(studio.root).get(run.id)
    assert view.status == "done" and view.has_adapter and view.summary["best_loss"] and view.verdict == ""
    assert not (run.path / "checkpoints").exists() and not view.resumable
    studio.runs.settle(view, "stopped")  # too late
    assert RunStore(studio.root).get(run.id).status == "done"
    studio.runs.delete(run.id)


def test_a_stop_ends_the_look_at_once_and_the_run_stays_done(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(studio, tiny)
    pieces = looking(monkeypatch, lambda piece: piece == 2 and write_json(run.path / "control.json", {"stop": True}))
    attempt(run)
    view = studio.runs.get(run.id)
    assert view.status == "done" and pieces == [1, 2] and view.verdict  # of what it had


def test_time_ends_it_too_and_is_no_part_of_the_runs(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_studio.runs.attempt.LOOK_S", -1.0)
    monkeypatch.setattr("lora_studio.runs.attempt.LOOK_SHARE", 0.0)
    pieces = looking(monkeypatch, lambda piece: None)
    run = begun(studio, tiny)
    attempt(run)
    assert pieces == [1] and studio.runs.get(run.id).status == "done"


def test_a_stopped_run_is_looked_at_and_looked_at_anew_when_it_went_on(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(studio, tiny, steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "asked", lambda self: "stopped" if self.step == 4 else None)
        attempt(run)
    assert studio.runs.get(run.id).status == "stopped" and studio.runs.get(run.id).verdict
    studio.runs.requeue(run.id)
    assert not (run.path / OVER).exists()
    attempt(run)
    assert len(of(studio, run, "Learned")) == 2 and studio.runs.get(run.id).status == "done"
    told = [one for one in studio.runs.curve(run.id) if one["type"] == "Learned"]
    assert len(told) == 1 and studio.learned(run.id) == told[0]


def test_the_kept_adapter_is_looked_at_and_not_the_last(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falls = {0: 9.0, 2: 5.0, 4: 6.0}
    monkeypatch.setattr("lora_studio.train.heldout_figures", lambda job, base=False: {"heldout_loss": falls[job.step]})
    run, held = begun(studio, tiny), []
    real = look

    def watched(lora: LoRA, adapter: str, *rest: Any) -> Iterator[list[Row]]:
        held.extend(tensor.detach().clone() for tensor in lora.parameters(adapter))
        yield from real(lora, adapter, *rest)

    monkeypatch.setattr(module, "look", watched)
    attempt(run)
    (record,) = of(studio, run, "Learned")
    assert record["step"] == 2 and record["losses"]["heldout"] == [9.0, 5.0]
    from safetensors.torch import load_file

    kept = load_file(run.path / "adapter/adapter_model.safetensors").values()
    assert sorted(float(one.abs().sum()) for one in kept) == pytest.approx(sorted(float(o.abs().sum()) for o in held))


def test_another_rank_keeps_the_ratio_of_alpha_and_everything_else(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio.supervisor, "tick", lambda: None)
    run = begun(studio, tiny)
    for rank in (2, 8):
        fresh = studio.another_rank(run.id, rank)
        method = fresh.config.method
        assert isinstance(method, LoraSpec) and method.rank == rank and method.alpha / rank == 16.0 / 4
        assert fresh.name == f"tiny r{rank}" and fresh.config.train == run.config.train and fresh.status == "queued"
        assert fresh.config.dataset == run.config.dataset and read_json(fresh.path / "run.json")


def test_a_study_is_looked_at_run_by_run_and_one_that_is_stopped_stops_the_look_of_others(
    studio: Studio, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = begun(studio, tiny), begun(studio, tiny, seed=0, learning_rate=0.01)
    for run in (first, second):
        (run.path / "worker.log").touch()
    work([Attempt(first.path), Attempt(second.path)])
    assert all(len(of(studio, run, "Learned")) == 1 for run in (first, second))

    events: list[Event] = []
    real = Attempt.append
    monkeypatch.setattr(Attempt, "append", lambda self, event: (events.append(event), real(self, event))[1])
    third, fourth = begun(studio, tiny), begun(studio, tiny)
    stopped = itertools.chain([True], itertools.repeat(False))

    def stop(_: int) -> None:
        if next(stopped):
            write_json(fourth.path / "control.json", {"stop": True})

    pieces = looking(monkeypatch, stop)
    work([Attempt(third.path), Attempt(fourth.path)])
    assert pieces[0] == 1 and any(isinstance(event, Learned) for event in events)
    assert {studio.runs.get(run.id).status for run in (third, fourth)} == {"done"}
