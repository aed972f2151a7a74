"""The proof of an export: nothing apart for what was written faithfully, and a plain no for what was not."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from lora_studio import export
from lora_studio.card import Background, background, model_card
from lora_studio.core.lean import Tokens
from lora_studio.core.spec import BaselineSpec, LoraSpec, Method
from lora_studio.events import Metric, Started, to_line
from lora_studio.proof import Look, Proof, compare
from lora_studio.studio import Studio
from tests.test_export import finished
from tests.visits import FACTS


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


@pytest.mark.parametrize(
    ("method", "labels"),
    [
        (LoraSpec(), ()),
        (LoraSpec(variant="dora", targets=("attn.q", "mlp.up")), ()),
        (BaselineSpec(kind="prefix", width=3), ()),
        (LoraSpec(modules_to_save=("score",)), ("no", "yes")),
    ],
)
def test_an_adapter_on_a_fresh_base_gives_the_same_logits_bit_for_bit(
    studio: Studio, tiny: Path, tmp_path: Path, method: Method, labels: tuple[str, ...]
) -> None:
    run, _ = finished(studio, tiny, method=method, labels=labels)
    proof = studio.export(run.id, tmp_path / "out").proof
    assert proof.passed and proof.largest == proof.mean == proof.tolerance == 0
    assert proof.rows and proof.answers == proof.same > 0 and proof.computed_in == "float32"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**Passed.** {proof.sentence}" in card
    assert proof.as_json()["passed"] and json.dumps(proof.as_json())


def test_files_that_were_damaged_on_the_way_are_not_called_good(
    studio: Studio, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished(studio, tiny)
    copyfile = export.shutil.copyfile

    def damage(source: Path, to: Path) -> None:
        copyfile(source, to)
        if to.suffix == ".safetensors":
            tensors = load_file(to)
            save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, to)

    monkeypatch.setattr(export.shutil, "copyfile", damage)
    proof = studio.export(run.id, tmp_path / "out").proof
    assert not proof.passed and proof.largest > 0 and "do not rely" in proof.sentence
    assert "**Failed.**" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_that_lost_its_update_is_not_called_good(
    studio: Studio, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    run, _ = finished(studio, tiny)
    assert studio.export(run.id, tmp_path / "good", merged=True, dtype=dtype).proof.passed

    def forget(lora: Any, name: str, kind: torch.dtype) -> dict:
        return {key: tensor.detach().to(kind) for key, tensor in lora.model.state_dict().items()}

    monkeypatch.setattr(export, "merged_state", forget)
    proof = studio.export(run.id, tmp_path / "bad", merged=True, dtype=dtype).proof
    assert not proof.passed and proof.largest > proof.tolerance


def test_an_export_without_a_base_says_that_it_is_not_proven_and_one_without_rows_takes_a_general_text(
    studio: Studio, tiny: Path, tmp_path: Path
) -> None:
    run, _ = finished(studio, tiny)
    model = tiny / "model.safetensors"
    kept = model.read_bytes()
    try:
        model.write_bytes(kept[: len(kept) // 2])
        studio._hand.loaded = None
        proof = studio.export(run.id, tmp_path / "no-base").proof
    finally:
        model.write_bytes(kept)
    assert proof.verdict == "not made" and proof.problem in (tmp_path / "no-base" / "README.md").read_text()
    for file in studio.data.folder.rglob("*"):
        file.unlink() if file.is_file() else None
    proof = Studio(studio.root).export(run.id, tmp_path / "no-rows").proof
    assert proof.passed and proof.rows > 0


def test_the_allowance_grows_with_the_logits_and_equal_answers_alone_prove_nothing() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    size = float(logits.abs().max())
    near = compare(
        Look([logits], ["a"]), Look([logits + 0.5e-4 * size], ["a"]), stored="float32", computed_in="float32"
    )
    assert (
        near.passed
        and near.tolerance == pytest.approx(1e-4 * size)
        and near.mean == pytest.approx(near.largest, rel=1e-2)
    )
    for other, words in ((logits + 2e-4 * size, "a"), (logits * float("nan"), "a")):
        far = compare(Look([logits], ["a"]), Look([other], [words]), stored="float32", computed_in="float32")
        assert not far.passed and far.same == 1
    same = Look([logits], ["a"])
    assert compare(same, same, stored="adapter", computed_in="float32").passed
    assert not compare(same, Look([logits], ["b"]), stored="adapter", computed_in="float32").passed
    assert not compare(Look([], []), Look([], []), stored="adapter", computed_in="float32").passed
    assert not Proof(stored="adapter", rows=3, problem="x").passed


# ---- the card --------------------------------------------------------------------------------------------------------


def test_the_card_shows_the_curve_the_rows_and_the_prompt_that_it_can_be_asked_with(
    studio: Studio, tiny: Path, tmp_path: Path
) -> None:
    run, _ = finished(studio, tiny)
    journal = [Started(steps=3, **FACTS)]
    journal += [Metric(step=step, values={"heldout_loss": loss}) for step, loss in ((0, 2.0), (2, 1.25), (3, 1.0))]
    lines = [to_line(event, time=0.0, attempt=1) for event in journal]
    (run.path / "events.jsonl").write_text("\n".join(lines) + "\n")
    studio.export(run.id, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Step | Held-out loss |\n| --- | --- |\n| 0 | 2 |\n| 2 | 1.25 |\n| 3 | 1 |" in card
    assert "3 rows were trained on; held-out figures are of 1 more." in card and "| Rank | `8` |" in card
    (example,) = studio.heldout(run.id)
    said = f"<|user|>{example.prompt[0].content}<|end|>\n<|assistant|>"
    assert f"```text\n{said}\n```" in card
    (code,) = re.findall(r"```python\n(prompt = .*?)\n```", card, re.DOTALL)
    first = ast.parse(code).body[0]
    assert isinstance(first, ast.Assign) and ast.literal_eval(first.value) == said
    about: Any = ModelCard(card).data
    assert about.library_name == "peft" and about.model_name == "orders r8" and "license" not in about.to_dict()
    assert about.eval_results and [(one.metric_type, one.metric_value) for one in about.eval_results] == [("loss", 1.0)]
    assert yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]


def test_no_text_of_a_row_ends_the_block_that_it_stands_in(studio: Studio, tiny: Path) -> None:
    run, _ = finished(studio, tiny)
    evil = "a\n```\n# Not mine\n````\n<img src=x onerror=alert(1)>"
    card = model_card(run, more=Background(prompt=evil))
    assert f"`````text\n{evil}\n`````" in card
    long = model_card(run, more=Background(prompt="x" * 5000))
    assert "xxxx" not in long and "5,000 characters" in long


def test_a_base_of_the_catalogue_hands_its_licence_to_what_is_merged(studio: Studio, tiny: Path) -> None:
    run, _ = finished(studio, tiny)
    known = replace(run, config=replace(run.config, model="gpt2"), facts={"repo": "openai-community/gpt2"})
    merged: Any = ModelCard(model_card(known, "Merged in float32.")).data
    adapter: Any = ModelCard(model_card(known)).data
    assert merged.license == "mit" and merged.base_model == "openai-community/gpt2"
    assert "Licence of the base model: MIT" in model_card(known) and "not known here" in model_card(run)
    assert adapter.license is None and "base_model" not in ModelCard(model_card(run)).data.to_dict()


def test_the_background_reads_evaluations_alone() -> None:
    events = [
        {"type": "Started", "step": 0, "train_rows": 7, "heldout_rows": 2},
        {"type": "Metric", "step": 1, "values": {"train_loss": 1.0}},
        {"type": "Metric", "step": 2, "values": {"heldout_loss": None}},
        {"type": "Metric", "step": 2, "values": {"heldout_loss": 0.5, "accuracy": 0.25}},
    ]
    found = background(events)
    assert found.rows == (7, 2) and found.evaluations == [{"step": 2, "heldout_loss": 0.5, "accuracy": 0.25}]
    assert Tokens((1,), (True,)).count == 0
