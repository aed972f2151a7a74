"""The one object that page, command line and tests hold."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lora_studio.core.spec import BaselineSpec, LoraSpec
from lora_studio.errors import StudioError
from lora_studio.limits import LAPTOP
from lora_studio.runs.config import DataChoice, RunConfig
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio, default_root
from tests.tiny import tiny_encoder
from tests.visits import trained


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


@pytest.fixture
def rows(studio: Studio) -> DataChoice:
    text = "\n".join(json.dumps({"note": f"n{n}", "question": "q" * n, "answer": "a" * n}) for n in range(11, 31))
    return DataChoice(id=studio.data.add_text(text).id)


def test_inspection_follows_the_choice_the_model_and_the_limit(studio: Studio, rows: DataChoice, tiny: Path) -> None:
    seen = studio.inspect(rows, str(tiny))
    assert (seen.format, dict(seen.columns)) == ("prompt_completion", {"prompt": "question", "completion": "answer"})
    assert (seen.health.rows, seen.health.train, seen.health.heldout, seen.lengths.cut) == (20, 18, 2, 0)
    assert seen == studio.inspect(rows, str(tiny))
    cut = studio.inspect(rows, str(tiny), TrainConfig(max_length=20, holdout=0.0))
    assert cut.lengths.cut > 0 and cut.health.heldout == 0
    assert any("cut at 20 tokens" in warning for warning in cut.warnings)
    other = studio.inspect(DataChoice(id=rows.id, columns={"prompt": "note", "completion": "question"}), str(tiny))
    assert other.lengths.supervised == seen.lengths.supervised and other.lengths.total != seen.lengths.total
    text = studio.inspect(DataChoice(id=rows.id, format="text", columns={"text": "note"}), str(tiny))
    assert text.format == "text" and text.lengths.median == 4  # n, two digits, end


def test_the_preview_shows_any_row(studio: Studio, rows: DataChoice, tiny: Path) -> None:
    for row in (1, 7, 19, 20):
        text = "".join(piece.text for piece in studio.preview(rows, row, str(tiny)) if piece.kind == "trained")
        assert text == "a" * (row + 10) + "<|end|>"
    for row in (0, -1, 21):
        with pytest.raises(StudioError, match=f"no row {row}. Rows are 1 to 20"):
            studio.preview(rows, row, str(tiny))


def test_a_plan_knows_the_dataset(studio: Studio, rows: DataChoice, tiny: Path) -> None:
    short, long = (studio.plan(str(tiny), LoraSpec(), TrainConfig(batch_size=size), rows) for size in (2, 16))
    assert short.estimate.trainable == long.estimate.trainable
    assert short.estimate.memory_bytes["activations"] < long.estimate.memory_bytes["activations"]


def test_a_plan_counts_a_shared_prefix_once_unless_each_row_drops_its_own(
    studio: Studio, rows: DataChoice, tiny: Path
) -> None:
    once, apart = (studio.plan(str(tiny), LoraSpec(dropout=dropout), choice=rows) for dropout in (0.0, 0.1))
    assert once.estimate.memory_bytes["activations"] < apart.estimate.memory_bytes["activations"]


def test_a_task_suits_model_and_data_and_a_plan_for_labels_trains_the_head(
    studio: Studio, rows: DataChoice, tiny: Path, tmp_path: Path
) -> None:
    encoder = str(tiny_encoder(tmp_path / "bert"))
    labelled = DataChoice(id=studio.data.add_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}').id)
    tasks = [studio.task(model, choice) for model in (str(tiny), encoder) for choice in (rows, labelled, None)]
    assert tasks == ["causal", "causal", "causal", "causal", "classify", "classify"]
    assert studio.task(encoder, rows, "classify") == "classify"
    for choice in (labelled, None):  # two labels, or two assumed
        plan = studio.plan(encoder, BaselineSpec(kind="bitfit"), choice=choice, task="classify")
        (head,) = [target for target in plan.as_json()["targets"] if target["name"] == "classifier"]
        assert plan.method.modules_to_save == ("classifier",) and head["parameters"] == 2 * 32 + 2
    assert plan.as_json().keys() == {"targets", "trainable", "total", "adapter_bytes", "memory_bytes", "seconds"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"dataset": DataChoice(id="f" * 32)}, "E_DATASET_NOT_FOUND"),
        ({"dataset": DataChoice(id="../../etc")}, "E_DATASET_NOT_FOUND"),
        ({"model": "nothing"}, "E_MODEL_ID"),
        ({"method": LoraSpec(targets=("attn.z",))}, "E_TARGETS"),
        ({"train": TrainConfig(max_length=8)}, "E_NO_TARGET"),
        ({"task": "dream"}, "E_CONFIG"),
        ({"method": LoraSpec(rank=33)}, "E_RANK"),
        ({"method": LoraSpec(alpha=0.0)}, "E_CONFIG"),
        ({"method": BaselineSpec(kind="top", width=3)}, "E_METHOD"),
        ({"method": BaselineSpec(kind="full"), "train": TrainConfig(precision="nf4")}, "E_METHOD"),
    ],
)
def test_starting_says_what_is_wrong_and_writes_nothing(
    studio: Studio, rows: DataChoice, tiny: Path, change: dict, code: str
) -> None:
    with pytest.raises(StudioError) as caught:
        studio.start(RunConfig(**({"model": str(tiny), "dataset": rows} | change)))
    assert caught.value.code == code and studio.runs.list() == []


@pytest.mark.parametrize(("name", "fresh"), [("", ""), (" (2)", ""), ("n", "n (2)"), ("n (2)", "n (3)")])
def test_a_restarted_run_is_named_after_the_first(
    studio: Studio, rows: DataChoice, tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str, fresh: str
) -> None:
    monkeypatch.setattr(studio.supervisor, "tick", lambda: None)
    run = studio.start(RunConfig(name=name, model=str(tiny), dataset=rows))
    assert studio.restart(run.id, {"steps": 3}).name == fresh


def test_the_root_is_one_folder_given_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_STUDIO_ROOT", str(tmp_path / "here"))
    monkeypatch.delenv("LORA_STUDIO_MODELS", raising=False)
    studio = Studio()
    assert studio.root == default_root() == tmp_path / "here"
    folders = (studio.models.folder, studio.data.folder, studio.runs.folder)
    assert all(folder.is_relative_to(tmp_path / "here") for folder in folders)


def test_rows_of_many_visitors_are_kept_where_they_are_small_and_in_one_place_where_they_are_large(
    tmp_path: Path, tiny: Path
) -> None:
    studio = Studio(tmp_path, replace(LAPTOP, rows_at_hand=2000))
    visitors = [studio.of(f"{number}" * 32) for number in range(3)]
    for size, shared in ((1, False), (500, True)):
        text = "\n".join(json.dumps({"question": "q" * size, "answer": f"a{n}"}) for n in range(9))
        choices = [DataChoice(id=one.data.add_text(text).id) for one in visitors]
        assert len({choice.id for choice in choices}) == 1  # the same rows have the same id, whosoever they are
        for one, choice in zip(visitors, choices, strict=True):
            first = one._examples(choice)
            assert first is one._examples(choice) and len(first[0]) == 9
            assert (one._large.read[1] is first) == shared and (one._small.read[1] is first) != shared
    visitors[2].data.delete(choices[2].id)
    with pytest.raises(StudioError):
        visitors[2]._examples(choices[2])
    assert visitors[1]._examples(choices[1])[0]


def test_an_export_leaves_the_reserve_free(tmp_path: Path, tiny: Path) -> None:
    studio = Studio(tmp_path)
    choice = DataChoice(id=studio.data.add_text("question,answer\nq,a\nr,b\n").id)
    run = trained(studio, tiny, choice, "one")
    assert studio.archive(run.id).files
    studio.runs.limits = replace(LAPTOP, reserve_bytes=2**60)
    shutil.rmtree(studio.exports)
    for merged in (False, True):
        with pytest.raises(StudioError) as caught:
            studio.archive(run.id, merged=merged)
        assert caught.value.code == "E_DISK" and not studio.exports.exists()


def test_a_run_whose_rows_are_gone_can_still_be_compared(studio: Studio, rows: DataChoice, tiny: Path) -> None:
    run = trained(studio, tiny, rows, "orders")
    studio.data.delete(rows.id)
    *_, last = studio.compare([run.id], "hello")
    assert last.answers[0].text != last.answers[1].text
